/** What is around the run of one job, without a database: its span, its scope, its control, and what it leaves. */
import { assert, describe, it } from "@effect/vitest"
import {
  type Cause,
  Clock,
  Context,
  Deferred,
  Effect,
  Exit,
  Fiber,
  Option,
  References,
  Schema,
  SchemaGetter,
  Scope,
  Tracer
} from "effect"
import { TestClock } from "effect/testing"
import * as Bounded from "../src/Bounded.ts"
import * as Handling from "../src/Handling.ts"
import { Job } from "../src/index.ts"
import * as Run from "../src/Run.ts"
import type * as Store from "../src/Store.ts"
import { tracing } from "./support/queue.ts"

class Name extends Context.Service<Name, string>()("effect-pgqueue/test/run.test/Name") {}

const id = "0198c0de-0000-7000-8000-000000000000"
const traceId = "0123456789abcdef0123456789abcdef"

const claimed: Store.ClaimedRow = {
  id,
  lane: 5,
  run_at: "0",
  kind: "k",
  priority: 5,
  attempt: 2,
  max_attempts: 5,
  rescued: 0,
  timeout_ms: null,
  trace: null,
  metadata: "{}",
  enqueued_at: 1_750_000_000_000.25,
  scheduled_for: 1_750_000_001_000.75,
  claimed_at: 1_750_000_002_000,
  payload: "null",
  progress: null,
  cancelled: false,
  history: null
}

type Handler = Effect.Effect<unknown, unknown, Job.Current | Scope.Scope>

/** Starts a run in this context, as the worker's loop does. */
const start = Effect.fnUntraced(function*(handler: Handler | (() => Handler), options: {
  readonly row?: Partial<Store.ClaimedRow>
  readonly job?: { readonly "~effect-pgqueue/Job": { readonly definition: any } }
  /** What the handler's layer was built in. */
  readonly own?: Context.Context<never>
  readonly middleware?: ReadonlyArray<Job.Middleware>
} = {}) {
  const { definition } = (options.job ?? Job.make("k"))["~effect-pgqueue/Job"]
  const handling = Handling.make(definition, {
    // Sound: what it needs, every run provides.
    run: (): any => typeof handler === "function" ? handler() : handler,
    context: options.own ?? Context.empty(),
    transactional: false
  })
  const running: Run.Running = {
    row: { ...claimed, ...options.row },
    lease: id,
    queue: "default",
    claimedAt: Bounded.monotonic(yield* Clock.Clock),
    fiber: undefined,
    interruption: undefined,
    entry: undefined,
    settled: undefined
  }
  const context = yield* Effect.context<never>()
  const run = Run.make({
    context,
    middleware: options.middleware ?? [],
    transactional: (_running, handler) => handler,
    progress: () => Effect.void
  })
  running.fiber = Effect.runForkWith(context)(run(running, handling, "k"), { uninterruptible: true })
  return running
})

/** Runs it to its end. */
const ran = (...args: Parameters<typeof start>) => Effect.tap(start(...args), (running) => Fiber.await(running.fiber!))

const statusOf = (span: Tracer.Span) => {
  assert(span.status._tag === "Ended")
  return span.status
}

const causeOf = (span: Tracer.Span): Cause.Cause<unknown> => {
  const { exit } = statusOf(span)
  assert(Exit.isFailure(exit))
  return exit.cause
}

describe("the span of a run", () => {
  it.effect("begins when its handler does, says of which job, and ends with it and its exit", () =>
    Effect.gen(function*() {
      const { spans, tracer } = tracing()
      const link = { span: Tracer.externalSpan({ traceId, spanId: "0123456789abcdef" }), attributes: {} }
      yield* TestClock.setTime(5)
      const running = yield* start(Effect.andThen(Effect.sleep(1000), Effect.succeed(undefined)), {
        row: { trace: `00-${traceId}-0123456789abcdef-01` }
      }).pipe(
        Effect.provideService(Tracer.Tracer, tracer),
        Effect.provideService(References.TracerSpanAnnotations, { "job.kind": "not mine", region: "eu" }),
        Effect.provideService(References.TracerSpanLinks, [link]),
        Effect.withSpan("around")
      )
      yield* TestClock.adjust(1000)
      yield* Fiber.join(running.fiber!)
      const [span, ...others] = spans.filter(({ name }) => name !== "around")
      assert.lengthOf(others, 0)
      assert.strictEqual(span!.name, "job k")
      assert.strictEqual(span!.kind, "consumer")
      assert.strictEqual(span!.sampled, true)
      assert.deepStrictEqual([...span!.attributes], [
        ["job.kind", "k"],
        ["region", "eu"],
        ["messaging.system", "effect-pgqueue"],
        ["messaging.destination.name", "default"],
        ["messaging.message.id", id],
        ["job.attempt", 3]
      ])
      assert.strictEqual(span!.traceId, traceId)
      assert.strictEqual(Option.getOrThrow(span!.parent).spanId, "0123456789abcdef")
      assert.deepStrictEqual(span!.links, [link])
      assert.deepStrictEqual(
        { ...statusOf(span!), exit: undefined },
        { _tag: "Ended", startTime: 5_000_000n, endTime: 1_005_000_000n, exit: undefined }
      )
      assert.isTrue(Exit.isSuccess(statusOf(span!).exit))
      assert.deepInclude(running.entry, { verb: "completed", result: undefined, ran: 1000 })
    }))

  it.effect("without a trace of its enqueuer is the root of one, whatever is around the worker", () =>
    Effect.gen(function*() {
      const { spans, tracer } = tracing()
      yield* ran(Effect.withSpan(Effect.void, "inner")).pipe(
        Effect.withSpan("around"),
        Effect.provideService(Tracer.Tracer, tracer)
      )
      assert.deepStrictEqual(spans.map(({ name, parent }) => [name, parent._tag]), [
        ["around", "None"],
        ["job k", "None"],
        ["inner", "Some"]
      ])
      assert.strictEqual(Option.getOrThrow(spans[2]!.parent), spans[1])
    }))

  it.effect("ends with the failure, the defect or the interruption that the handler ended with", () =>
    Effect.gen(function*() {
      const { spans, tracer } = tracing()
      const job = Job.make("k", { error: Schema.String })
      yield* Effect.forEach(
        [Effect.fail("no"), Effect.die("oh"), Job.cancel("enough")],
        (handler) => ran(handler, { job })
      ).pipe(Effect.provideService(Tracer.Tracer, tracer))
      const running = yield* Effect.provideService(start(Effect.never), Tracer.Tracer, tracer)
      yield* TestClock.adjust(30)
      assert.strictEqual(spans[3]!.status._tag, "Started")
      running.interruption = "shutdown"
      yield* Fiber.interrupt(running.fiber!)
      assert.deepInclude(running.entry, { verb: "released", ran: 30 })
      assert.deepStrictEqual(
        spans.map((span) => causeOf(span).reasons.map(({ _tag }) => _tag)),
        // The run and the fiber that asked are one and the same, and told twice.
        [["Fail"], ["Die"], ["Interrupt", "Interrupt"], ["Interrupt"]]
      )
      assert.strictEqual(statusOf(spans[3]!).endTime, 30_000_000n)
    }))

  it.effect("ends with what its middleware and its finalizers make of the handler's exit", () =>
    Effect.gen(function*() {
      const { spans, tracer } = tracing()
      const running = yield* ran(Effect.addFinalizer(() => Effect.die("in a finalizer"))).pipe(
        Effect.provideService(Tracer.Tracer, tracer)
      )
      assert.deepStrictEqual(causeOf(spans[0]!).reasons.map(({ _tag }) => _tag), ["Die"])
      assert.deepInclude(running.entry, { verb: "failed" })
      const middleware: Job.Middleware = (run) => Effect.andThen(run, Effect.die("in middleware"))
      yield* ran(Effect.void, { middleware: [middleware] }).pipe(Effect.provideService(Tracer.Tracer, tracer))
      assert.deepStrictEqual(causeOf(spans[1]!).reasons.map(({ _tag }) => _tag), ["Die"])
    }))

  it.effect("is not there for a payload that does not fit, or a handler that throws before it runs", () =>
    Effect.gen(function*() {
      const { spans, tracer } = tracing()
      const bad = yield* ran(Effect.void, {
        job: Job.make("k", { payload: { n: Schema.Int } }),
        row: { payload: "{}" }
      })
        .pipe(Effect.provideService(Tracer.Tracer, tracer))
      const throws = yield* ran((): never => {
        throw new Error("at once")
      }).pipe(Effect.provideService(Tracer.Tracer, tracer))
      const torn = yield* ran(Effect.void, { row: { payload: "{" } }).pipe(Effect.provideService(Tracer.Tracer, tracer))
      assert.deepStrictEqual([bad, throws, torn].map(({ entry }) => entry?.failure?.tag), [
        "Undecodable",
        "Defect",
        "Defect"
      ])
      assert.lengthOf(spans, 0)
    }))

  it.effect("is sampled as its parent and its level say", () =>
    Effect.gen(function*() {
      const { spans, tracer } = tracing()
      yield* Effect.gen(function*() {
        yield* ran(Effect.void, { row: { trace: `00-${traceId}-0123456789abcdef-00` } })
        yield* ran(Effect.void).pipe(Effect.provideService(Tracer.MinimumTraceLevel, "Error"))
        yield* ran(Effect.void).pipe(
          Effect.provideService(Tracer.MinimumTraceLevel, "Error"),
          Effect.provideService(Tracer.CurrentTraceLevel, "Fatal")
        )
        // The handler's own context wins.
        yield* ran(Effect.void, { own: Context.make(Tracer.MinimumTraceLevel, "Error") })
      }).pipe(Effect.provideService(Tracer.Tracer, tracer))
      assert.deepStrictEqual(spans.map(({ sampled }) => sampled), [false, false, true, false])
    }))

  it.effect("has no times, or is none, where tracing is told so", () =>
    Effect.gen(function*() {
      const { spans, tracer } = tracing()
      yield* TestClock.setTime(5)
      const seen: Array<Tracer.Span> = []
      const look = Effect.flatMap(Effect.orDie(Effect.currentSpan), (span) => Effect.sync(() => void seen.push(span)))
      const quiet = Effect.andThen(look, Effect.withSpan(Effect.void, "inner"))
      yield* ran(Effect.void).pipe(Effect.withTracerTiming(false), Effect.provideService(Tracer.Tracer, tracer))
      assert.deepStrictEqual({ ...statusOf(spans[0]!), exit: undefined }, {
        _tag: "Ended",
        startTime: 0n,
        endTime: 0n,
        exit: undefined
      })
      const running = yield* ran(quiet, { row: { trace: `00-${traceId}-0123456789abcdef-01` } }).pipe(
        Effect.withTracerEnabled(false),
        Effect.provideService(Tracer.Tracer, tracer)
      )
      yield* ran(quiet, { own: Context.make(References.TracerEnabled, false) }).pipe(
        Effect.provideService(Tracer.Tracer, tracer)
      )
      assert.deepInclude(running.entry, { verb: "completed" })
      assert.lengthOf(spans, 1)
      assert.deepStrictEqual(
        seen.map(({ name, parent, sampled, spanId }) => [name, parent._tag, sampled, spanId]),
        [["job k", "Some", false, "noop"], ["job k", "None", false, "noop"]]
      )
    }))

  it.effect("is there for the handler where nobody exports it", () =>
    Effect.gen(function*() {
      const seen: Array<Tracer.Span> = []
      yield* TestClock.setTime(7)
      const running = yield* ran(Effect.gen(function*() {
        const span = yield* Effect.orDie(Effect.currentSpan)
        seen.push(span)
        yield* Effect.annotateCurrentSpan({ "job.kind": "mine now", more: 1 })
        const inner = yield* Effect.withSpan(Effect.orDie(Effect.currentSpan), "inner")
        assert.strictEqual(inner.traceId, span.traceId)
        assert.strictEqual(Option.getOrThrow(inner.parent), span)
      })).pipe(Effect.provideService(References.TracerSpanAnnotations, { region: "eu" }))
      assert.deepInclude(running.entry, { verb: "completed" })
      assert.deepStrictEqual([...seen[0]!.attributes], [
        ["region", "eu"],
        ["messaging.system", "effect-pgqueue"],
        ["messaging.destination.name", "default"],
        ["messaging.message.id", id],
        ["job.kind", "mine now"],
        ["job.attempt", 3],
        ["more", 1]
      ])
      assert.deepStrictEqual(statusOf(seen[0]!), {
        _tag: "Ended",
        startTime: 7_000_000n,
        endTime: 7_000_000n,
        exit: Exit.void
      })
      yield* ran(Effect.map(Effect.orDie(Effect.currentSpan), (span) => void seen.push(span)))
      assert.strictEqual(seen[1]!.attributes.get("messaging.message.id"), id)
      seen[1]!.attribute("late", 1)
      assert.isFalse(seen[1]!.attributes.has("late"))
    }))

  it.effect("shows its times and its end where nobody exports it, whenever it is looked at", () =>
    Effect.gen(function*() {
      const spans: Array<Tracer.Span> = []
      const keep = Effect.map(Effect.orDie(Effect.currentSpan), (span) => void spans.push(span))
      const start1 = yield* start(Effect.andThen(keep, Effect.sleep(1000)), {
        row: { trace: `00-${traceId}-0123456789abcdef-00` }
      })
      yield* TestClock.adjust(10)
      const start2 = yield* start(Effect.andThen(keep, Effect.sleep(1000)))
      const [first, second] = spans
      assert.deepStrictEqual(first!.status, { _tag: "Started", startTime: 0n })
      yield* TestClock.adjust(2000)
      assert.isDefined(start1.entry)
      assert.isDefined(start2.entry)
      assert.deepStrictEqual(statusOf(first!), {
        _tag: "Ended",
        startTime: 0n,
        endTime: 1_000_000_000n,
        exit: Exit.void
      })
      assert.deepStrictEqual(statusOf(second!), {
        _tag: "Ended",
        startTime: 10_000_000n,
        endTime: 1_010_000_000n,
        exit: Exit.void
      })
      assert.deepStrictEqual(
        spans.map(({ kind, links, sampled, traceId: trace }) => [kind, links, sampled, trace === traceId]),
        [["consumer", [], false, true], ["consumer", [], true, false]]
      )
      yield* ran(keep, { own: Context.make(References.TracerTimingEnabled, false) })
      assert.deepInclude(spans[2]!.status, { startTime: 0n, endTime: 0n })
    }))

  it.effect("is where a tracer can enter, and is named in the traces of errors", () =>
    Effect.gen(function*() {
      const entered = new Set<string>()
      const frames: Array<unknown> = []
      const tracer = Tracer.make({
        span: (options) => new Tracer.NativeSpan(options),
        context: (primitive, fiber) => {
          entered.add(fiber.cache.span?._tag === "Span" ? fiber.cache.span.name : "nothing")
          return primitive["~effect/Effect/evaluate"](fiber)
        }
      })
      yield* ran(Effect.map(References.CurrentStackFrame, (frame) => void frames.push(frame))).pipe(
        Effect.provideService(Tracer.Tracer, tracer),
        Effect.provideService(References.CurrentStackFrame, { name: "around", stack: () => "s", parent: undefined })
      )
      assert.isTrue(entered.has("job k"))
      const [frame] = frames as Array<any>
      assert.deepStrictEqual([frame.name, frame.stack(), frame.parent.name], ["job k", undefined, "around"])
    }))
})

describe("a tracer that throws when a span ends", () => {
  it.effect("does not cost the job what it has done", () =>
    Effect.gen(function*() {
      const tracer = Tracer.make({
        span: (options) =>
          Object.assign(new Tracer.NativeSpan(options), {
            end: () => {
              throw new Error("no room for spans")
            }
          })
      })
      const running = yield* Effect.provideService(ran(Effect.void), Tracer.Tracer, tracer)
      assert.strictEqual(running.entry?.verb, "completed")
    }))
})

describe("the scope of a run", () => {
  it.effect("closes in its span, with the exit, in reverse, before it is settled, and nothing interrupts that", () =>
    Effect.gen(function*() {
      const { spans, tracer } = tracing()
      const log: Array<unknown> = []
      const gate = yield* Deferred.make<void>()
      let running: Run.Running | undefined
      const finalizer = (n: number) => (exit: Exit.Exit<unknown, unknown>) =>
        Effect.gen(function*() {
          const span = yield* Effect.orDie(Effect.currentSpan)
          const annotations = yield* References.CurrentLogAnnotations
          yield* Deferred.await(gate)
          log.push([n, exit._tag, span.name, span.status._tag, annotations["job.id"], running?.entry])
        })
      running = yield* start(Effect.gen(function*() {
        yield* Effect.addFinalizer(finalizer(1))
        yield* Effect.addFinalizer(finalizer(2))
        return yield* Effect.never
      })).pipe(Effect.provideService(Tracer.Tracer, tracer))
      running.interruption = "timeout"
      running.fiber!.interruptUnsafe()
      yield* TestClock.adjust(50)
      // Told again while they run.
      running.fiber!.interruptUnsafe()
      yield* TestClock.adjust(150)
      assert.lengthOf(log, 0)
      yield* Deferred.succeed(gate, undefined)
      yield* Fiber.join(running.fiber!)
      assert.deepStrictEqual(log, [
        [2, "Failure", "job k", "Started", id, undefined],
        [1, "Failure", "job k", "Started", id, undefined]
      ])
      assert.strictEqual(statusOf(spans[0]!).endTime, 200_000_000n)
      assert.deepInclude(running.entry, { verb: "failed", ran: 200 })
      assert.strictEqual(running.entry?.failure?.tag, "TimedOut")
    }))

  it.effect("is closed when the run is over, and takes nothing any more", () =>
    Effect.gen(function*() {
      const scopes: Array<Scope.Scope> = []
      let late = false
      const keep = Effect.map(Scope.Scope, (scope) => void scopes.push(scope))
      yield* ran(keep)
      yield* ran(keep)
      assert.notStrictEqual(scopes[0], scopes[1])
      yield* Scope.addFinalizer(
        scopes[0]!,
        Effect.sync(() => {
          late = true
        })
      )
      assert.isTrue(late)
    }))

  it.effect("closes in the part that can be interrupted: one that was told to stop meanwhile counts as stopped", () =>
    Effect.gen(function*() {
      const gate = yield* Deferred.make<void>()
      const running = yield* start(Effect.addFinalizer(() => Deferred.await(gate)))
      running.interruption = "shutdown"
      running.fiber!.interruptUnsafe()
      assert.strictEqual(running.entry as unknown, undefined)
      yield* Deferred.succeed(gate, undefined)
      yield* Fiber.join(running.fiber!)
      assert.deepInclude(running.entry, { verb: "released" })
    }))
})

describe("what a run says of its job", () => {
  it.effect("is a plain object of its own", () =>
    Effect.gen(function*() {
      const infos: Array<Job.Info> = []
      const note = Effect.map(Job.Current, (info) => void infos.push(info))
      yield* ran(note)
      yield* ran(note, { row: { progress: "{\"page\":1}", metadata: "{\"tenant\":\"t\"}" } })
      const [first, second] = infos
      const plain = JSON.parse(JSON.stringify(first))
      assert.deepStrictEqual(plain, {
        id,
        kind: "k",
        queue: "default",
        priority: 5,
        attempt: 3,
        maxAttempts: 5,
        enqueuedAt: "2025-06-15T15:06:40.000Z",
        scheduledFor: "2025-06-15T15:06:41.000Z",
        metadata: {},
        lastFailure: { _id: "Option", _tag: "None" },
        progress: { _id: "Option", _tag: "None" }
      })
      assert.deepStrictEqual(Object.keys(first!), Object.keys(plain))
      assert.deepStrictEqual(Reflect.ownKeys(first!), Object.keys(plain))
      assert.deepStrictEqual(first, { ...first! })
      assert.strictEqual(Object.getPrototypeOf(first), Object.prototype)
      assert.deepStrictEqual(second!.metadata, { tenant: "t" })
      assert.deepStrictEqual(second!.progress, Option.some({ page: 1 }))
      assert.notStrictEqual(first!.metadata, infos[1]!.metadata)
    }))

  it.effect("is what stops it, in whatever fiber it is used", () =>
    Effect.gen(function*() {
      const running = yield* start(Effect.gen(function*() {
        const info = yield* Job.Current
        Effect.runFork(Effect.provideService(Job.cancel("from outside"), Job.Current, info))
        return yield* Effect.never
      }))
      yield* Fiber.join(running.fiber!)
      assert.deepInclude(running.entry, { verb: "cancelled", reason: "from outside" })
    }))

  it.effect("one that nothing runs stops the fiber that asks", () =>
    Effect.gen(function*() {
      let info: Job.Info | undefined
      yield* ran(Effect.map(Job.Current, (own) => {
        info = own
      }))
      const exit = yield* Effect.exit(
        Fiber.join(yield* Effect.forkChild(Effect.provideService(Job.cancel("too late"), Job.Current, { ...info! })))
      )
      assert.isTrue(Exit.hasInterrupts(exit))
    }))
})

describe("a run", () => {
  it.effect("whose handler does not wait has ended when it has been started", () =>
    Effect.gen(function*() {
      const running = yield* start(Effect.sync(() => {}))
      assert.deepInclude(running.entry, { verb: "completed", result: undefined })
      assert.isDefined(running.fiber!.pollUnsafe())
      const answers = yield* start(Effect.succeed({ n: 1 }), {
        job: Job.make("k", { success: Schema.Struct({ n: Schema.Int }) })
      })
      assert.deepInclude(answers.entry, { verb: "completed", result: "{\"n\":1}" })
    }))

  it.effect("decodes and encodes in the handler's context, waits for slow codecs, and can be interrupted in the first", () =>
    Effect.gen(function*() {
      const Slow = Schema.String.pipe(Schema.decodeTo(Schema.String, {
        decode: SchemaGetter.transformEffect((text: string) =>
          Effect.andThen(Effect.sleep(100), Effect.map(Job.Current, ({ kind }) => `${text} ${kind}`))
        ),
        encode: SchemaGetter.transformEffect((text: string) =>
          Effect.andThen(Effect.sleep(100), Effect.map(Name, (name) => `${text} ${name}`))
        )
      }))
      const job = Job.make("k", { payload: Slow, success: Slow }) as any
      const own = Context.make(Name, "mine") as Context.Context<never>
      const row = { payload: "\"p\"" }
      const running = yield* start(Effect.succeed("r"), { job, own, row })
      yield* TestClock.adjust(100)
      assert.strictEqual(running.entry as unknown, undefined)
      yield* TestClock.adjust(100)
      assert.deepInclude(running.entry, { verb: "completed", result: "\"r mine\"", ran: 100 })
      const stopped = yield* start(Effect.succeed("r"), { job, own, row })
      yield* TestClock.adjust(50)
      stopped.interruption = "shutdown"
      stopped.fiber!.interruptUnsafe()
      assert.deepInclude(stopped.entry, { verb: "released", ran: 50 })
    }))
})

describe("the context of a run", () => {
  it.effect("is one like any other: what is in it can be listed, copied, replaced and kept", () =>
    Effect.gen(function*() {
      const own = Context.make(Name, "mine") as Context.Context<never>
      let kept: Context.Context<any> | undefined
      yield* ran(
        Effect.gen(function*() {
          const context: Context.Context<any> = kept = yield* Effect.context<any>()
          const keys = [...context.mapUnsafe.keys()]
          assert.strictEqual(context.mapUnsafe.size, keys.length)
          for (const key of keys) assert.isTrue(context.mapUnsafe.has(key))
          assert.lengthOf([...context.mapUnsafe.values()], keys.length)
          assert.deepStrictEqual([...context.mapUnsafe.entries()], [...context.mapUnsafe])
          let count = 0
          context.mapUnsafe.forEach(() => count++)
          assert.strictEqual(count, keys.length)
          for (const key of [Job.Current, Scope.Scope, Tracer.ParentSpan, References.CurrentLogAnnotations, Name]) {
            assert.include(keys, key.key)
            const merged = Context.merge(Context.empty(), context)
            assert.strictEqual(Context.getUnsafe(merged, key as any), Context.getUnsafe(context, key as any))
          }
          assert.isTrue(Option.isNone(Context.getOption(context, Context.Service<string>("nobody's"))))
          const info = yield* Job.Current
          const other = { ...info, attempt: 9 }
          // More lookups than it has services, over services that were added.
          yield* Effect.gen(function*() {
            for (let i = 0; i < 2 * keys.length + 20; i++) {
              assert.strictEqual(yield* Name, "mine")
              assert.strictEqual(yield* Job.Current, other)
            }
          }).pipe(Effect.provideService(Job.Current, other))
          assert.strictEqual(yield* Job.Current, info)
        }) as any,
        { own }
      ).pipe(Effect.tap(({ entry }) => Effect.sync(() => assert.deepInclude(entry, { verb: "completed" }))))
      // In what has outlived it.
      let closed = false
      yield* Effect.provideContext(
        Effect.addFinalizer(() => Effect.sync(() => void (closed = true))),
        kept!
      ) as Effect.Effect<void>
      assert.isTrue(closed)
    }))

  it.effect("has a scope that is closed for whoever asks for it later", () =>
    Effect.gen(function*() {
      let closed = false
      const late = yield* Deferred.make<void>()
      const done = yield* Deferred.make<void>()
      yield* ran(Effect.forkDetach(
        Deferred.await(late).pipe(
          Effect.andThen(Effect.addFinalizer(() => Effect.sync(() => void (closed = true)))),
          Effect.andThen(Deferred.succeed(done, undefined))
        )
      ))
      yield* Deferred.succeed(late, undefined)
      yield* Deferred.await(done)
      assert.isTrue(closed)
    }))
})
