/** When a failed attempt is followed by another, and after how long. */
import { assert, describe, it } from "@effect/vitest"
import { Duration, Effect, Layer, Option, Schedule, Schema } from "effect"
import { Job, Worker } from "../src/index.ts"
import { allInPlace, assertRows, rows, running, untilAllEnded, untilValue, value, withQueue } from "./support/queue.ts"

class Bounced extends Schema.TaggedError<Bounced>()("Bounced", { code: Schema.Number }) {}

/** A job that fails, and a worker that runs it until `times` attempts have failed. */
const failing = Effect.fnUntraced(function*(
  options: { readonly retry?: Job.Retry<Bounced>; readonly maxAttempts?: number },
  handler: (info: Job.Info) => Effect.Effect<void, Bounced>
) {
  class Failing extends Job.make("failing", { error: Bounced, ...options }) {}
  const infos: Array<Job.Info> = []
  yield* running(
    Worker.layer({ jobs: [Failing], gracePeriod: 0 }).pipe(
      Layer.provide(Failing.toLayer(() =>
        Effect.flatMap(Job.Current, (info) => {
          infos.push(info)
          return handler(info)
        })
      ))
    )
  )
  const { id } = yield* Failing.enqueue()
  return { id, infos }
})

/** Milliseconds between the end of an attempt and the due time of the next. */
const backoffs = Effect.map(
  rows<{ ms: number }>(
    `select (extract(epoch from r.run_at - max(a.ended_at)) * 1000)::float8 as ms
     from pgqueue.attempt a join pgqueue.job r on r.id = a.job group by r.run_at`
  ),
  (found) => found.map(({ ms }) => ms)
)

/** Lets the job go on at once, by the rule that a line entry is never updated. */
const hurry = rows(
  `with early as (delete from pgqueue.ready returning *), due as (
     insert into pgqueue.ready (queue, lane, run_at, id, kind, attempt)
     select queue, lane, statement_timestamp(), id, kind, attempt from early returning id, run_at)
   update pgqueue.job j set run_at = due.run_at from due where due.id = j.id`
).pipe(Effect.andThen(rows("select pg_notify('effect_pgqueue_pgqueue', '0 default')")))

const attempts = (count: number) => untilValue("select count(*)::int from pgqueue.attempt", count)

describe("a job that fails", () => {
  it.live("backs off further each time by the default policy, is then discarded, and tells the next attempt why", () =>
    withQueue(Effect.gen(function*() {
      const { id, infos } = yield* failing({ maxAttempts: 4 }, ({ attempt }) => new Bounced({ code: attempt }))
      for (const [n, expected] of [1000, 4000, 16_000].entries()) {
        yield* attempts(n + 1)
        const [ms] = yield* backoffs
        assert.isAtLeast(ms!, expected * 0.79)
        // With the time until it is settled.
        assert.isAtMost(ms!, expected * 1.2 + 500)
        yield* hurry
      }
      yield* untilAllEnded()
      yield* assertRows(
        "select status, attempt::int, error -> 'error' ->> 'code' as code from pgqueue.finished where id = $1::uuid",
        [
          { status: "discarded", attempt: 4, code: "4" }
        ],
        [id]
      )
      assert.deepStrictEqual(infos.map(({ attempt }) => attempt), [1, 2, 3, 4])
      assert.deepStrictEqual(infos.map(({ maxAttempts }) => maxAttempts), [4, 4, 4, 4])
      assert.deepStrictEqual(
        infos.map(({ lastFailure }) =>
          Option.getOrUndefined(
            Option.map(lastFailure, (failure) =>
              failure._tag === "Failed" ? (failure.error as Bounced).code : failure._tag)
          )
        ),
        [undefined, 1, 2, 3]
      )
      assert.instanceOf(Option.getOrThrow(infos[1]!.lastFailure as Option.Option<any>).error, Bounced)
      yield* allInPlace
    })))

  it.live("is tried again at once for as long as a Schedule says", () =>
    withQueue(Effect.gen(function*() {
      const { id, infos } = yield* failing({ retry: Schedule.recurs(3), maxAttempts: 100 }, () =>
        new Bounced({ code: 1 }))
      yield* untilAllEnded()
      yield* assertRows("select status, attempt::int from pgqueue.finished where id = $1::uuid", [
        { status: "discarded", attempt: 4 }
      ], [id])
      assert.lengthOf(infos, 4)
      yield* assertRows("select n::int, tag from pgqueue.attempt order by n", [
        { n: 1, tag: "Failed" },
        { n: 2, tag: "Failed" },
        { n: 3, tag: "Failed" }
      ])
    })))

  it.live("is tried again as a Schedule over its failures says, with the typed error, whatever failed before", () =>
    withQueue(Effect.gen(function*() {
      const seen: Array<string> = []
      const { infos } = yield* failing({
        maxAttempts: 100,
        retry: Schedule.recurs(50).pipe(
          Schedule.setInputType<Job.Failure<Bounced>>(),
          Schedule.while(({ input }) => {
            seen.push(input._tag === "Failed" ? String(input.error.code) : input._tag)
            return Effect.succeed(input._tag !== "Failed" || input.error.code !== 550)
          })
        )
      }, ({ attempt }) => attempt === 1 ? Effect.die("x") : new Bounced({ code: attempt === 3 ? 550 : 450 }))
      yield* untilAllEnded()
      assert.lengthOf(infos, 3)
      // Replayed from the first failure each time.
      assert.deepStrictEqual(seen, ["Defect", "Defect", "450", "Defect", "450", "550"])
    })))

  it.live("is discarded when its first failure is longer ago than the Schedule allows", () =>
    withQueue(Effect.gen(function*() {
      const { infos } = yield* failing(
        { maxAttempts: 100, retry: Schedule.spaced("10 minutes").pipe(Schedule.upTo({ duration: "1 hour" })) },
        () => new Bounced({ code: 1 })
      )
      yield* attempts(1)
      yield* hurry
      yield* attempts(2)
      assert.lengthOf(infos, 2)
      yield* rows("update pgqueue.attempt set ended_at = ended_at - interval '2 hours' where n = 1")
      yield* hurry
      yield* untilAllEnded()
      yield* assertRows("select status, attempt::int from pgqueue.finished", [{ status: "discarded", attempt: 3 }])
    })))

  it.live("with { schedule, while } is discarded on the first typed error that does not match", () =>
    withQueue(Effect.gen(function*() {
      const { infos } = yield* failing(
        { maxAttempts: 10, retry: { schedule: Schedule.recurs(50), while: (error) => error.code < 500 } },
        ({ attempt }) => new Bounced({ code: attempt === 3 ? 550 : 450 })
      )
      yield* untilAllEnded()
      assert.lengthOf(infos, 3)
    })))

  it.live("with { schedule, until } is discarded on the first typed error that matches", () =>
    withQueue(Effect.gen(function*() {
      const { infos } = yield* failing(
        { maxAttempts: 10, retry: { schedule: Schedule.recurs(50), until: (error) => error.code === 550 } },
        ({ attempt }) => new Bounced({ code: attempt === 2 ? 550 : 450 })
      )
      yield* untilAllEnded()
      assert.lengthOf(infos, 2)
    })))

  it.live("with predicates that see only typed errors, other failures are tried again", () =>
    withQueue(Effect.gen(function*() {
      const { infos } = yield* failing(
        { maxAttempts: 3, retry: { schedule: Schedule.recurs(50), while: () => false } },
        ({ attempt }) => attempt < 3 ? Effect.die("x") : Effect.void
      )
      yield* untilAllEnded()
      assert.lengthOf(infos, 3)
      yield* assertRows("select status from pgqueue.finished", [{ status: "completed" }])
    })))

  it.live("follows the policy of the definition that handles it: the family's, or that of its exact kind", () =>
    withQueue(Effect.gen(function*() {
      class Reports extends Job.family("report:", { retry: Schedule.recurs(1), maxAttempts: 9 }) {}
      class Weekly extends Job.family("report:week", { retry: { schedule: Schedule.recurs(2) }, maxAttempts: 9 }) {}
      class Daily extends Job.make("report:daily", { retry: Schedule.recurs(3), maxAttempts: 9 }) {}
      const broken = () => Effect.die("broken")
      yield* running(
        Worker.layer({ jobs: [Reports, Weekly, Daily] }).pipe(
          Layer.provide([Reports.toLayer(broken), Weekly.toLayer(broken), Daily.toLayer(broken)])
        )
      )
      // Who enqueued it does not matter.
      for (const kind of ["report:monthly", "report:weekly", "report:daily"] as const) yield* Reports.of(kind).enqueue()
      yield* untilAllEnded()
      yield* assertRows("select kind, status, attempt::int from pgqueue.finished order by attempt", [
        { kind: "report:monthly", status: "discarded", attempt: 2 },
        { kind: "report:weekly", status: "discarded", attempt: 3 },
        { kind: "report:daily", status: "discarded", attempt: 4 }
      ])
    })))

  it.live("under a policy that throws is discarded, and nobody else is concerned", () =>
    withQueue(Effect.gen(function*() {
      yield* failing({
        retry: {
          while: () => {
            throw new Error("policy")
          }
        }
      }, () => new Bounced({ code: 1 }))
      yield* untilAllEnded()
      yield* assertRows("select status, attempt::int from pgqueue.finished", [{ status: "discarded", attempt: 1 }])
    })))

  it.live("has its stored error, which no longer decodes, shown to the policy as Undecodable", () =>
    withQueue(Effect.gen(function*() {
      const { infos } = yield* failing(
        { maxAttempts: 3, retry: Schedule.spaced("1 hour") },
        ({ attempt }) => attempt === 1 ? new Bounced({ code: 1 }) : Effect.void
      )
      yield* attempts(1)
      yield* rows(`update pgqueue.attempt set error = '{"_tag": "Renamed"}'`)
      yield* hurry
      yield* untilAllEnded()
      assert.deepInclude(Option.getOrThrow(infos[1]!.lastFailure), { _tag: "Undecodable" })
      yield* assertRows("select status from pgqueue.finished", [{ status: "completed" }])
    })))

  it.live("starts as often as maxAttempts of the enqueue says, which wins over the definition", () =>
    withQueue(Effect.gen(function*() {
      let runs = 0
      class Twice extends Job.make("twice", { retry: Schedule.recurs(50), maxAttempts: 9 }) {}
      yield* running(
        Worker.layer({ jobs: [Twice] }).pipe(
          Layer.provide(Twice.toLayer(() => Effect.andThen(Effect.sync(() => runs++), Effect.die("x"))))
        )
      )
      yield* Twice.enqueue(undefined, { maxAttempts: 2 })
      yield* untilAllEnded()
      assert.strictEqual(runs, 2)
      assert.strictEqual(yield* value("select max_attempts::int from pgqueue.finished"), 2)
    })))

  it.live("is never tried before its delay is over, by the clock of the database", () =>
    withQueue(Effect.gen(function*() {
      class Often extends Job.make("often", {
        payload: { n: Schema.Number },
        retry: Schedule.spaced(Duration.millis(120)),
        maxAttempts: 3
      }) {}
      yield* running(
        Worker.layer({ jobs: [Often] }).pipe(Layer.provide(Often.toLayer(() => Effect.die("x"))))
      )
      yield* Often.enqueueAll(Array.from({ length: 50 }, (_, n) => ({ n })))
      const took = yield* untilAllEnded()
      assert.isBelow(took, 4500, "and not much later either")
      yield* assertRows(
        `select job::text from (
           select job, ended_at - lag(ended_at) over (partition by job order by n) as gap from pgqueue.attempt) a
         where gap < interval '119 ms'`,
        []
      )
      yield* assertRows("select status, attempt::int, count(*)::int as count from pgqueue.finished group by 1, 2", [
        { status: "discarded", attempt: 3, count: 50 }
      ])
    })))
})
