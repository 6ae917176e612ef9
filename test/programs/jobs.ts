/** The jobs that the test's processes handle and the tests enqueue. */
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Option from "effect/Option"
import * as Schedule from "effect/Schedule"
import * as Schema from "effect/Schema"
import { EventEmitter } from "node:events"
import { Job } from "../../src/index.ts"
import { Ledger } from "../support/ledger.ts"

/** Writes that it started, nothing else. */
export class Count extends Job.make("count", { payload: { n: Schema.Number } }) {}

/** Writes that it started, works for `millis`, writes that it ended. */
export class Step extends Job.make("step", {
  payload: {
    millis: Schema.Number,
    /** Goes on when it is told to stop. */
    stubborn: Schema.optionalKey(Schema.Boolean)
  }
}) {}

/** A step in a queue of its own. */
export class Aside extends Job.make("aside", { payload: { millis: Schema.Number }, queue: "aside" }) {}

/** Writes that it started and fails, the first time; completes the second time, at once after the first. */
export class Flaky extends Job.make("flaky", { retry: Schedule.recurs(10) }) {}

/** Writes that it started and keeps the event loop for `millis`, as a long computation would. */
export class Block extends Job.make("block", { payload: { millis: Schema.Number } }) {}

/** Writes that it started and takes its process down, or leaves something behind that may. */
export class Poison extends Job.make("poison", {
  payload: {
    how: Schema.Literals([
      "exit",
      "abort",
      "SIGKILL",
      "heap",
      "memory",
      "rejects",
      "throws late",
      "emits late",
      "emits"
    ])
  }
}) {}

/** Works for `first` milliseconds the first time, and for `next` when it is started again; the first time it ends as it is told. */
export class Trial extends Job.make("trial", {
  payload: {
    first: Schema.Number,
    next: Schema.Number,
    how: Schema.Literals(["completes", "fails", "notes", "blocks", "dies before", "dies after"])
  },
  retry: {}
}) {}

/** Takes longer than it may, and 600 ms to clean up after that. */
export class Late extends Job.make("late", { timeout: "500 millis", retry: Schedule.spaced("1 hour") }) {}
const LateHandler = Late.toLayer(() =>
  Effect.onInterrupt(Effect.never, () =>
    Effect.gen(function*() {
      const { record } = yield* Ledger
      yield* record("cleaning up")
      yield* Effect.sleep(600)
      yield* record("cleaned up")
    }))
)

const step = Effect.fnUntraced(function*(millis: number) {
  const { mention, record } = yield* Ledger
  yield* record("start")
  yield* Effect.onInterrupt(Effect.sleep(millis), () => mention("interrupted"))
  yield* record("end")
})

const CountHandler = Count.toLayer(() => Effect.flatMap(Ledger, ({ record }) => record("start")))
const StepHandler = Step.toLayer(({ millis, stubborn }) =>
  stubborn === true ? Effect.uninterruptible(step(millis)) : step(millis)
)
const AsideHandler = Aside.toLayer(({ millis }) => step(millis))
const FlakyHandler = Flaky.toLayer(() =>
  Effect.gen(function*() {
    yield* Effect.flatMap(Ledger, ({ record }) => record("start"))
    if ((yield* Job.Current).attempt === 1) return yield* Effect.die("the first time it fails")
  })
)
const BlockHandler = Block.toLayer(({ millis }) =>
  Effect.gen(function*() {
    const { mention, record } = yield* Ledger
    yield* record("start")
    const end = performance.now() + millis
    while (performance.now() < end) { /* nothing else runs */ }
    yield* mention("end")
  })
)
const PoisonHandler = Poison.toLayer(({ how }) =>
  Effect.gen(function*() {
    yield* Effect.flatMap(Ledger, ({ record }) => record("start"))
    switch (how) {
      case "exit":
        return process.exit(3)
      case "abort":
        return process.abort()
      case "SIGKILL":
        process.kill(process.pid, "SIGKILL")
        return yield* Effect.never
      case "heap": {
        const kept: Array<Array<number>> = []
        while (true) kept.push(Array.from({ length: 100_000 }, (_, n) => n + kept.length))
      }
      case "memory": {
        const kept: Array<Buffer> = []
        while (true) {
          kept.push(Buffer.alloc(8 << 20, kept.length + 1))
          yield* Effect.sleep(10)
        }
      }
      case "rejects":
        void Promise.reject(new Error("nobody listens"))
        break
      case "throws late":
        setTimeout(() => {
          throw new Error("nobody catches")
        }, 1)
        break
      case "emits late":
        setTimeout(() => new EventEmitter().emit("error", new Error("nobody hears")), 1)
        break
      case "emits":
        new EventEmitter().emit("error", new Error("nobody hears"))
    }
    // Where it does not take its process down it completes.
    yield* Effect.sleep(50)
    yield* Effect.flatMap(Ledger, ({ record }) => record("end"))
  })
)

const die = Effect.suspend(() => {
  process.kill(process.pid, "SIGKILL")
  return Effect.never
})
const TrialHandler = Trial.toLayer(({ first, how, next }) =>
  Effect.gen(function*() {
    const { mention, record } = yield* Ledger
    const again = Option.isSome((yield* Job.Current).lastFailure)
    if (!again && how === "dies before") return yield* die
    yield* record("start")
    if (!again && how === "blocks") {
      const end = performance.now() + first
      while (performance.now() < end) { /* nothing else runs */ }
    } else yield* Effect.onInterrupt(Effect.sleep(again ? next : first), () => mention("interrupted"))
    if (!again && how === "notes") yield* Job.progress("noted")
    yield* record("end")
    if (!again && how === "dies after") return yield* die
    if (!again && how === "fails") return yield* Effect.die("it fails the first time")
  })
)

/** What a worker process handles. */
export const all = [Count, Step, Aside, Flaky, Block, Poison, Trial, Late] as const
export const handlers = Layer.mergeAll(
  CountHandler,
  StepHandler,
  AsideHandler,
  FlakyHandler,
  BlockHandler,
  PoisonHandler,
  TrialHandler,
  LateHandler
)
