/** How a run ends, and what that means for its job. */
import { assert, describe, it, layer } from "@effect/vitest"
import { Cause, Deferred, Effect, Fiber, Layer, Schedule, Schema, Stream } from "effect"
import { SqlClient, type SqlError } from "effect/sql"
import { Job, Worker } from "../src/index.ts"
import {
  allInPlace,
  assertRows,
  databaseWithLedger,
  queueLayer,
  rows,
  running,
  until,
  untilAllEnded,
  untilValue,
  value,
  withQueue
} from "./support/queue.ts"

class Boom extends Schema.TaggedError<Boom>()("Boom", { n: Schema.Number }) {}

/** One job of a kind that is handled by `handler`, to its end. */
const runOne = Effect.fnUntraced(function*<R>(
  handler: Effect.Effect<unknown, Boom, R | Job.Current>,
  options: { readonly retry?: Job.Retry<Boom>; readonly maxAttempts?: number; readonly timeout?: number } = {}
) {
  class One extends Job.make("one", { error: Boom, retry: Schedule.recurs(0), ...options }) {}
  class Next extends Job.make("next") {}
  yield* running(
    Worker.layer({ jobs: [One, Next], concurrency: 1, gracePeriod: 0 }).pipe(
      Layer.provide([One.toLayer(() => Effect.asVoid(handler)), Next.toLayer(() => Effect.void)])
    )
  )
  const { id } = yield* One.enqueue()
  yield* Next.enqueue()
  // Whatever the first did to its worker, it goes on.
  yield* untilValue("select count(*)::int from pgqueue.finished where kind = 'next'", 1)
  return id
})

const finished = Effect.fnUntraced(function*(id: string) {
  yield* untilValue("select count(*)::int from pgqueue.finished where id = $1::uuid", 1, { params: [id] })
  const [row] = yield* rows(
    "select status, reason, attempt::int, error, result from pgqueue.finished where id = $1::uuid",
    [id]
  )
  return row as {
    readonly status: string
    readonly reason: string | null
    readonly attempt: number
    readonly error: { readonly tag: string; readonly message: string; readonly error: unknown } | null
    readonly result: unknown
  }
})

describe("a handler that does not succeed", () => {
  const cases: ReadonlyArray<
    readonly [what: string, handler: Effect.Effect<unknown, Boom, Job.Current>, tag: string, message: RegExp]
  > = [
    ["fails with its typed error", new Boom({ n: 7 }), "Failed", /Boom/],
    ["dies with an error", Effect.die(new Error("broken")), "Defect", /broken/],
    ["dies with a string", Effect.die("just text"), "Defect", /just text/],
    ["dies with nothing", Effect.die(undefined), "Defect", /./],
    [
      "throws",
      Effect.sync(() => {
        throw new TypeError("thrown")
      }),
      "Defect",
      /thrown/
    ],
    [
      "dies with something that cannot be described",
      Effect.die({
        get message() {
          throw new Error("no")
        },
        toString() {
          throw new Error("no")
        },
        toJSON() {
          throw new Error("no")
        }
      }),
      "Defect",
      /./
    ],
    ["dies with NUL and half a character", Effect.die(new Error("a\0b \ud800 c")), "Defect", /a.b . c/],
    ["dies with 10 MB of text", Effect.die(new Error("€".repeat(3_500_000))), "Defect", /€€€/],
    [
      "fails together with a defect",
      Effect.failCause(Cause.combine(Cause.die("and"), Cause.fail(new Boom({ n: 1 })))),
      "Failed",
      /Boom/
    ],
    [
      "joins a fiber that was interrupted",
      Effect.gen(function*() {
        const child = yield* Effect.forkChild(Effect.never)
        yield* Fiber.interrupt(child)
        return yield* Fiber.join(child)
      }),
      "Interrupted",
      /interrupted/
    ],
    ["interrupts itself", Effect.interrupt, "Interrupted", /interrupted/]
  ]
  for (const [what, handler, tag, message] of cases) {
    it.live(`and ${what} has failed as ${tag}`, () =>
      withQueue(Effect.gen(function*() {
        const { error, status } = yield* finished(yield* runOne(handler))
        assert.strictEqual(status, "discarded")
        assert.isNotNull(error)
        assert.strictEqual(error.tag, tag)
        assert.match(error.message, message)
        assert.isAtMost(new TextEncoder().encode(error.message).length, 8192)
        assert.notInclude(error.message, "\0")
        assert.isTrue(error.message.isWellFormed())
        if (tag === "Failed") assert.deepInclude(error.error, { _tag: "Boom" })
        yield* allInPlace
      })))
  }

  it.live("and runs longer than its timeout has failed as TimedOut", () =>
    withQueue(Effect.gen(function*() {
      const { error, status } = yield* finished(yield* runOne(Effect.never, { timeout: 100 }))
      assert.deepStrictEqual([status, error?.tag], ["discarded", "TimedOut"])
    })))

  it.live("and does not stop after its timeout keeps its slot, and what it says in the end counts", () =>
    withQueue(Effect.gen(function*() {
      const gate = yield* Deferred.make<void>()
      class Deaf extends Job.make("deaf", { timeout: 50, retry: Schedule.spaced("1 hour") }) {}
      let runs = 0
      yield* running(
        Worker.layer({ jobs: [Deaf], gracePeriod: 0 }).pipe(
          Layer.provide(Deaf.toLayer(() =>
            Effect.uninterruptible(Effect.suspend(() => {
              runs++
              return Deferred.await(gate)
            }))
          ))
        )
      )
      const { id } = yield* Deaf.enqueue()
      yield* until("it has started", Effect.sync(() => runs === 1))
      yield* untilValue(
        "select clock_timestamp() - max(claimed_at) > interval '600 ms' from pgqueue.lease",
        true
      )
      assert.strictEqual(runs, 1)
      yield* Deferred.succeed(gate, undefined)
      yield* untilValue("select count(*)::int from pgqueue.lease", 0)
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.job where id = $1::uuid", [id]), 1)
      yield* assertRows("select tag from pgqueue.attempt", [{ tag: "TimedOut" }])
    })))

  it.live("and fails with a TimeoutError of its own has not timed out", () =>
    withQueue(Effect.gen(function*() {
      const { error } = yield* finished(
        yield* runOne(Effect.orDie(Effect.timeout(Effect.never, 20)), { timeout: 60_000 })
      )
      assert.strictEqual(error?.tag, "Defect")
    })))

  it.live("because its payload does not decode has failed as Undecodable, and others go on", () =>
    withQueue(Effect.gen(function*() {
      class Strict extends Job.make("strict", { payload: { n: Schema.Number }, retry: Schedule.recurs(0) }) {}
      const [bad] = yield* Strict.enqueueAll([{ n: 1 }, { n: 2 }])
      yield* rows(`update pgqueue.job set payload = '{"n": "one"}' where id = $1::uuid`, [bad!.id])
      yield* running(Worker.layer({ jobs: [Strict] }).pipe(Layer.provide(Strict.toLayer(() => Effect.void))))
      const { error, status } = yield* finished(bad!.id)
      assert.deepStrictEqual([status, error?.tag], ["discarded", "Undecodable"])
      assert.match(error!.message, /\["n"\]/)
      yield* untilAllEnded()
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.finished where status = 'completed'"), 1)
    })))

  it.live("because its result does not encode has failed as Defect", () =>
    withQueue(Effect.gen(function*() {
      class Result extends Job.make("result", { success: Schema.Unknown, retry: Schedule.recurs(0) }) {}
      const results: Array<unknown> = [1n, "a\0", "\ud800", "x".repeat(2_000_000), { ok: ["😀"] }]
      let next = 0
      yield* running(
        Worker.layer({ jobs: [Result], concurrency: 1 }).pipe(
          Layer.provide(Result.toLayer(() => Effect.sync(() => results[next++])))
        )
      )
      for (let n = 0; n < 4; n++) {
        const { error, status } = yield* finished((yield* Result.enqueue()).id)
        assert.deepStrictEqual([status, error?.tag], ["discarded", "Defect"])
        assert.match(error!.message, /result/)
      }
      const { result, status } = yield* finished((yield* Result.enqueue()).id)
      assert.deepStrictEqual([status, result], ["completed", { ok: ["😀"] }])
    })))
})

type Stop = Effect.Effect<never, never, Job.Current>
type Around = Job.Current | SqlClient.SqlClient

/** Would make a transaction roll back, and a retry go on. */
const undo = new Boom({ n: 0 })

const soon = Schedule.max([Schedule.spaced(1), Schedule.recurs(5)])

const inTransaction = <A, E, R>(self: Effect.Effect<A, E, R>) =>
  Effect.flatMap(SqlClient.SqlClient, (sql) => sql.withTransaction(self))

const write = Effect.gen(function*() {
  const sql = yield* SqlClient.SqlClient
  const { id } = yield* Job.Current
  yield* sql`insert into written values (${id}::uuid)`
})

/** What may be around the place where a handler stops. `stop` never returns; what follows it is never reached. */
const wrappers: Readonly<Record<string, (stop: Stop) => Effect.Effect<unknown, Boom | SqlError.SqlError, Around>>> = {
  "as they are": (stop) => stop,
  "inside catch": (stop) => Effect.catch(Effect.andThen(stop, undo), () => Effect.void),
  "inside catchCause": (stop) => Effect.catchCause(stop, () => Effect.void),
  "inside catchDefect": (stop) => Effect.catchDefect(stop, () => Effect.void),
  "inside exit": (stop) => Effect.flatMap(Effect.exit(stop), () => Effect.void),
  "inside ignoreCause": (stop) => Effect.ignoreCause(stop),
  "inside orElseSucceed": (stop) => Effect.orElseSucceed(stop, () => "instead"),
  "inside retry": (stop) => Effect.ignore(Effect.retry(Effect.andThen(stop, undo), { times: 5 })),
  "inside retry with a schedule": (stop) => Effect.ignore(Effect.retry(Effect.andThen(stop, undo), soon)),
  "inside a retry of every cause": (stop) => Effect.ignore(Effect.retry(Effect.sandbox(stop), { times: 5 })),
  "inside repeat": (stop) => Effect.repeat(stop, soon),
  "inside Effect.all, one after the other": (stop) => Effect.all([Effect.void, stop, Effect.die("not reached")]),
  "inside Effect.all, all at once": (stop) =>
    Effect.all([Effect.sleep(5), stop, Effect.never], { concurrency: "unbounded" }),
  "inside Effect.all, two at a time": (stop) =>
    Effect.all([Effect.yieldNow, Effect.sleep(5), stop, Effect.never, Effect.die("not reached")], { concurrency: 2 }),
  "inside Effect.all that collects results": (stop) =>
    Effect.all([stop, Effect.never], { concurrency: "unbounded", mode: "result" }),
  "inside Effect.forEach, more than once": (stop) =>
    Effect.forEach([1, 2, 3], () => stop, { concurrency: "unbounded", discard: true }),
  "inside a race": (stop) => Effect.raceFirst(stop, Effect.never),
  "inside a race for success": (stop) => Effect.race(Effect.never, stop),
  "inside a child that is joined": (stop) => Effect.flatMap(Effect.forkChild(stop), Fiber.join),
  "inside a stream": (stop) => Stream.runDrain(Stream.mapEffect(Stream.make(1, 2, 3), () => stop)),
  "inside a timeout": (stop) => Effect.ignore(Effect.timeout(stop, "1 minute")),
  "inside a timeout with something else": (stop) =>
    Effect.timeoutOrElse(stop, { duration: "1 minute", orElse: () => Effect.void }),
  "inside an uninterruptible region": (stop) => Effect.uninterruptible(stop),
  "with a finalizer": (stop) => Effect.ensuring(stop, Effect.sleep(20)),
  "with something acquired": (stop) => Effect.acquireUseRelease(Effect.void, () => stop, () => Effect.sleep(20)),
  "inside a scope": (stop) => Effect.scoped(Effect.andThen(Effect.addFinalizer(() => Effect.sleep(20)), stop)),
  "inside a transaction": (stop) => inTransaction(Effect.andThen(write, stop)),
  "inside a transaction that catches": (stop) =>
    inTransaction(Effect.ignoreCause(Effect.andThen(write, Effect.catchCause(stop, () => Effect.void)))),
  "inside a transaction in a transaction": (stop) =>
    inTransaction(Effect.andThen(write, Effect.ignoreCause(inTransaction(Effect.andThen(write, stop))))),
  "inside a retried transaction": (stop) =>
    Effect.retry(inTransaction(Effect.andThen(write, Effect.andThen(stop, undo))), { times: 5 })
}

const intents: Readonly<Record<string, { readonly stop: Stop; readonly ends: object }>> = {
  "Job.cancel": {
    stop: Job.cancel("enough"),
    ends: { status: "cancelled", reason: "enough", attempt: 1, snoozed: 0, error: null }
  },
  "Job.discard": {
    stop: Job.discard("no good"),
    ends: { status: "discarded", reason: "no good", attempt: 1, snoozed: 0, error: null }
  },
  // The second run completes.
  "Job.snooze": {
    stop: Job.snooze(1),
    ends: { status: "completed", reason: null, attempt: 1, snoozed: 1, error: null }
  }
}

/** A job that stops in the way and in the place that its payload names, when it is run for the first time. */
class Stops extends Job.make("stops", {
  payload: { intent: Schema.String, where: Schema.String },
  error: Boom,
  retry: Schedule.recurs(0)
}) {}

const runs = new Map<string, number>()

const StopsHandler = Stops.toLayer(({ intent, where }) =>
  Effect.gen(function*() {
    const { id } = yield* Job.Current
    runs.set(id, (runs.get(id) ?? 0) + 1)
    if (runs.get(id) === 1) yield* wrappers[where]!(intents[intent]!.stop)
  }).pipe(Effect.catchTag("SqlError", Effect.die))
)

// One database and one worker for all of them.
layer(
  Worker.layer({ jobs: [Stops], concurrency: 1, gracePeriod: 0 }).pipe(
    Layer.provide(StopsHandler),
    Layer.provide(Layer.effectDiscard(rows("create table written (job uuid)"))),
    Layer.provideMerge(Layer.provideMerge(queueLayer(), databaseWithLedger()))
  ),
  { excludeTestServices: true }
)("the run is ended by", (it) => {
  for (const [intent, { ends }] of Object.entries(intents)) {
    for (const where of Object.keys(wrappers)) {
      it.effect(`${intent} ${where}`, () =>
        Effect.gen(function*() {
          const { id } = yield* Stops.enqueue({ intent, where })
          yield* untilValue("select count(*)::int from pgqueue.finished where id = $1::uuid", 1, { params: [id] })
          yield* assertRows(
            "select status, reason, attempt::int, snoozed::int, error from pgqueue.finished where id = $1::uuid",
            [ends],
            [id]
          )
          assert.strictEqual(runs.get(id), intent === "Job.snooze" ? 2 : 1)
          yield* assertRows("select * from written", [])
          yield* assertRows("select * from pgqueue.attempt", [])
        }))
    }
  }

  it.effect("and every job is where it belongs", () => allInPlace)
})

describe("Job.cancel, Job.discard and Job.snooze", () => {
  it.live("roll back the transaction they are called in", () =>
    withQueue(Effect.gen(function*() {
      const sql = yield* SqlClient.SqlClient
      yield* sql`create table written (n int)`
      const handler = sql.withTransaction(Effect.andThen(sql`insert into written values (1)`, Job.discard("no")))
      const { reason, status } = yield* finished(yield* runOne(Effect.orDie(handler)))
      assert.deepStrictEqual([status, reason], ["discarded", "no"])
      yield* assertRows("select * from written", [])
      // The connection went back as it should.
      yield* sql`insert into written values (2)`
      yield* assertRows("select * from written", [{ n: 2 }])
    })))

  it.live("snooze spends no attempt, however often", () =>
    withQueue(Effect.gen(function*() {
      const seen: Array<number> = []
      const handler = Effect.gen(function*() {
        const { attempt } = yield* Job.Current
        seen.push(attempt)
        if (seen.length < 8) return yield* Job.snooze("20 millis")
      })
      const id = yield* runOne(handler, { maxAttempts: 1 })
      const { attempt, status } = yield* finished(id)
      assert.deepStrictEqual({ attempt, seen, status }, {
        attempt: 1,
        seen: Array.from({ length: 8 }, () => 1),
        status: "completed"
      })
      yield* assertRows("select snoozed::int from pgqueue.finished where id = $1::uuid", [{ snoozed: 7 }], [id])
      yield* assertRows("select * from pgqueue.attempt", [])
    })))

  it.live("do not count when the handler fails all the same", () =>
    withQueue(Effect.gen(function*() {
      const { error, status } = yield* finished(
        yield* runOne(Effect.ensuring(Job.cancel("enough"), Effect.die("in the finalizer")))
      )
      assert.deepStrictEqual([status, error?.tag], ["discarded", "Defect"])
    })))

  it.live("sanitise their reasons", () =>
    withQueue(Effect.gen(function*() {
      const { reason, status } = yield* finished(yield* runOne(Job.discard(`a\0b\ud800${"€".repeat(10_000)}`)))
      assert.strictEqual(status, "discarded")
      assert.match(reason!, /^a.b.€/)
      assert.isAtMost(new TextEncoder().encode(reason!).length, 8192)
    })))
})

describe("whatever happens at the same time", () => {
  it.live("every job of a crowd of good and bad handlers ends, each in its own way", () =>
    withQueue(Effect.gen(function*() {
      class Mixed extends Job.make("mixed", {
        payload: { n: Schema.Number },
        error: Boom,
        retry: Schedule.recurs(0),
        timeout: 1500
      }) {}
      const ends = ["completed", "discarded", "discarded", "cancelled", "discarded", "discarded"] as const
      const handler = ({ n }: { readonly n: number }): Effect.Effect<void, Boom, Job.Current> => {
        switch (n % 6) {
          case 0:
            return Effect.void
          case 1:
            return new Boom({ n })
          case 2:
            return Effect.die(n)
          case 3:
            return Job.cancel("")
          case 4:
            return Job.discard("")
          default:
            return n < 60 ? Effect.never : Effect.interrupt
        }
      }
      yield* running(Worker.layer({ jobs: [Mixed], concurrency: 50 }).pipe(Layer.provide(Mixed.toLayer(handler))))
      yield* Mixed.enqueueAll(Array.from({ length: 3000 }, (_, n) => ({ n })))
      yield* untilAllEnded()
      yield* assertRows(
        "select (payload ->> 'n')::int % 6 as n, status, count(*)::int as count from pgqueue.finished group by 1, 2 order by 1",
        ends.map((status, n) => ({ n, status, count: 500 }))
      )
      yield* allInPlace
    })))
})
