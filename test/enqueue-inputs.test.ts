/** What may be left out, what is refused, and what counts as the same: the inputs of enqueues, queues and workers. */
import { assert, describe, it } from "@effect/vitest"
import { Effect, Fiber, Layer, Schema } from "effect"
import { Job, Worker } from "../src/index.ts"
import {
  allInPlace,
  assertRows,
  databaseWithLedger,
  queueLayer,
  running,
  untilAllEnded,
  untilValue,
  value,
  withQueue
} from "./support/queue.ts"

class Note extends Job.make("note", { payload: { n: Schema.Number } }) {}
const NoteHandler = Note.toLayer(() => Effect.void)

const id = "0190aaaa-0000-7000-8000-000000000001"

/** What JavaScript may pass. */
const untyped = (input: unknown): any => input

/** The error with which a layer does not start. */
const failureOf = <A, E, R>(layer: Layer.Layer<A, E, R>) => Effect.flip(Effect.scoped(Layer.build(layer)))

describe("an option is refused with a typed error", () => {
  it.live("maxConnections", () =>
    Effect.gen(function*() {
      for (const maxConnections of [0, -1, 1.5, NaN, "many"]) {
        const error = yield* failureOf(queueLayer({ queue: { maxConnections: untyped(maxConnections) } }))
        assert.strictEqual(error._tag, "JobQueueError")
        assert.propertyVal(error, "reason", "InvalidOption", String(maxConnections))
        assert.match(error.message, /maxConnections/)
      }
    }).pipe(Effect.provide(databaseWithLedger())))

  for (
    const [option, garbage] of [
      ["gracePeriod", "nonsense"],
      ["pollInterval", "often"],
      ["heartbeat", "now and then"],
      ["lease", "for a while"],
      ["rescueInterval", "never"]
    ] as const
  ) {
    it.live(`${option}: ${JSON.stringify(garbage)}`, () =>
      withQueue(Effect.gen(function*() {
        const options = untyped({ jobs: [Note], [option]: garbage }) as Worker.Options<[typeof Note], never>
        const error = yield* failureOf(Worker.layer(options).pipe(Layer.provide(NoteHandler)))
        assert.strictEqual(error._tag, "JobQueueError")
        assert.propertyVal(error, "reason", "InvalidOption")
        assert.match(error.message, new RegExp(option === "heartbeat" ? "lease" : option))
        assert.strictEqual(yield* value("select count(*)::int from pgqueue.worker"), 0)
      })))
  }

  it.live("unique.until, unique.onConflict and unique.period", () =>
    withQueue(Effect.gen(function*() {
      for (
        const [option, garbage] of [
          ["until", "tomorrow"],
          ["until", null],
          ["onConflict", "fight"],
          ["onConflict", 1],
          ["period", "nonsense"]
        ] as const
      ) {
        const unique = untyped({ key: "k", [option]: garbage })
        const errors = [
          yield* Effect.flip(Note.enqueue({ n: 1 }, { unique })),
          yield* Effect.flip(Note.enqueueAll([{ n: 1 }], () => ({ unique })))
        ]
        for (const error of errors) {
          assert.strictEqual(error._tag, "EnqueueError")
          assert.propertyVal(error, "reason", "InvalidOption")
          assert.match(error.message, new RegExp(`unique\\.${option}`))
        }
      }
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.job"), 0)
    })))

  it.live("two listed jobs of one kind, alias or prefix", () =>
    withQueue(Effect.gen(function*() {
      class Renamed extends Job.make("renamed", { aliases: ["note"] }) {}
      class Again extends Job.make("again", { aliases: ["renamed"] }) {}
      const Reports = Job.family("report:", {})
      const Charts = Job.family("chart:", { aliases: ["report:"] })
      const handlers = Layer.mergeAll(
        NoteHandler,
        Renamed.toLayer(() => Effect.void),
        Again.toLayer(() => Effect.void),
        Reports.toLayer(() => Effect.void),
        Charts.toLayer(() => Effect.void)
      )
      const pairs: ReadonlyArray<readonly [ReadonlyArray<Job.Any>, string]> = [
        [[Note, Note], "note"],
        [[Note, Renamed], "note"],
        [[Renamed, Again], "renamed"],
        [[Reports, Charts], "report:"]
      ]
      for (const [jobs, name] of pairs) {
        const error = yield* failureOf(
          (Worker.layer({ jobs: untyped(jobs) as [typeof Note] })).pipe(Layer.provide(handlers))
        )
        assert.strictEqual(error._tag, "JobQueueError")
        assert.propertyVal(error, "reason", "InvalidOption")
        assert.include(error.message, `"${name}"`)
      }
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.worker"), 0)
    })))
})

describe("a payload that is left out", () => {
  const seen: Array<unknown> = []
  const see = (payload: unknown) => Effect.sync(() => void seen.push(payload))

  it.live("is an empty struct where every key is optional, undefined where the schema takes that, and else refused", () =>
    withQueue(Effect.gen(function*() {
      seen.length = 0
      class Optional extends Job.make("optional", { payload: { n: Schema.optionalKey(Schema.Number) } }) {}
      class Maybe extends Job.make("maybe", { payload: Schema.UndefinedOr(Schema.String) }) {}
      class Nothing extends Job.make("nothing") {}
      yield* running(
        Worker.layer({ jobs: [Optional, Maybe, Nothing], concurrency: 1 }).pipe(
          Layer.provide([Optional.toLayer(see), Maybe.toLayer(see), Nothing.toLayer(see)])
        )
      )
      for (const enqueue of [Optional.enqueue(), Maybe.enqueue(undefined), Nothing.enqueue(), Maybe.enqueue("text")]) {
        yield* enqueue
        yield* untilAllEnded()
      }
      assert.deepStrictEqual(seen, [{}, undefined, undefined, "text"])

      class Required extends Job.make("required", { payload: { n: Schema.Number } }) {}
      const missing = yield* Effect.flip(Required.enqueue(untyped(undefined)))
      assert.deepInclude(missing, { _tag: "EnqueueError", reason: "InvalidPayload" })
      // Says what is wrong, and where.
      assert.match(missing.message, /missing.*\["n"\]/is)
      yield* allInPlace
    })))

  it.live("is never made up where the schema says nothing", () =>
    withQueue(Effect.gen(function*() {
      seen.length = 0
      class Whatever extends Job.make("whatever", { payload: Schema.Unknown }) {}
      yield* running(Worker.layer({ jobs: [Whatever] }).pipe(Layer.provide(Whatever.toLayer(see))))
      const error = yield* Effect.flip(Whatever.enqueue(untyped(undefined)))
      assert.strictEqual(error._tag, "EnqueueError")
      assert.propertyVal(error, "reason", "InvalidPayload")
      yield* Whatever.enqueue({ n: 1 })
      yield* untilAllEnded()
      assert.deepStrictEqual(seen, [{ n: 1 }])
    })))
})

describe("the same id twice", () => {
  for (const [what, unique] of [["without a key", undefined], ["with a key", "k"]] as const) {
    it.live(`in one enqueueAll is inserted once and existing once, ${what}`, () =>
      withQueue(Effect.gen(function*() {
        const done = yield* Note.enqueueAll([{ n: 1 }, { n: 2 }, { n: 3 }], (_, index) => ({
          id: index === 1 ? undefined : id,
          unique: index === 1 ? undefined : unique
        }))
        assert.deepStrictEqual(done.map(({ status }) => status), ["inserted", "inserted", "existing"])
        assert.deepStrictEqual([done[0]!.id, done[2]!.id], [id, id] as any)
        yield* assertRows("select (payload ->> 'n')::int as n from pgqueue.job order by 1", [{ n: 1 }, { n: 2 }])
        yield* allInPlace
      })))

    it.live(`in enqueues at the same time is inserted once, and existing for all others, ${what}`, () =>
      withQueue(Effect.gen(function*() {
        const fibers = yield* Effect.forEach(
          Array.from({ length: 20 }, (_, n) => n),
          (n) => Effect.forkChild(Note.enqueue({ n }, { id, unique }))
        )
        const done = yield* Effect.forEach(fibers, (fiber) => Fiber.join(fiber))
        assert.isTrue(done.every((one) => one.id === id))
        assert.lengthOf(done.filter(({ status }) => status === "inserted"), 1)
        assert.lengthOf(done.filter(({ status }) => status === "existing"), 19)
        assert.strictEqual(yield* value("select count(*)::int from pgqueue.job"), 1)
        yield* allInPlace
      })))
  }
})

describe("the alias of a family", () => {
  it.live("hands its handler the kind under the family's own prefix", () =>
    withQueue(Effect.gen(function*() {
      const Reports = Job.family("report:", { payload: { n: Schema.Number }, aliases: ["summary:", "old."] })
      const kinds: Array<string> = []
      yield* running(
        Worker.layer({ jobs: [Reports], concurrency: 1 }).pipe(
          Layer.provide(Reports.toLayer((_, kind) => Effect.sync(() => void kinds.push(kind))))
        )
      )
      for (const kind of ["report:daily", "summary:weekly", "old.", "summary:report:x"]) {
        yield* Job.make(kind, { payload: { n: Schema.Number } }).enqueue({ n: 1 })
        yield* untilValue("select count(*)::int from pgqueue.job", 0)
      }
      assert.deepStrictEqual(kinds, ["report:daily", "report:weekly", "report:", "report:report:x"])
      // What is stored is the name under which it was enqueued.
      yield* assertRows("select kind from pgqueue.finished where kind like 'old%'", [{ kind: "old." }])
    })))

  it.live("stands for the prefix of each of its kinds that is handled by itself", () =>
    withQueue(Effect.gen(function*() {
      const Reports = Job.family("report:", { payload: { n: Schema.Number }, aliases: ["summary:"] })
      const daily = Reports.of("report:daily")
      const weekly = Reports.of("report:weekly")
      const handled: Array<string> = []
      const handler = (name: string) => () => Effect.sync(() => void handled.push(name))
      yield* running(
        Worker.layer({ jobs: [daily, weekly], concurrency: 1 }).pipe(
          Layer.provide([daily.toLayer(handler("daily")), weekly.toLayer(handler("weekly"))])
        )
      )
      for (const kind of ["report:daily", "summary:weekly", "summary:daily"]) {
        yield* Job.make(kind, { payload: { n: Schema.Number } }).enqueue({ n: 1 })
        yield* untilValue("select count(*)::int from pgqueue.job", 0)
      }
      assert.deepStrictEqual(handled, ["daily", "weekly", "daily"])
    })))
})
