/** Handlers that are settled in their own transaction: both, or neither. */
import { PgClient } from "@effect/sql-pg"
import { assert, describe, it } from "@effect/vitest"
import { Cause, Deferred, Effect, Exit, Fiber, Layer, Option, Redacted, Schedule, Schema, Scope } from "effect"
import { SqlClient } from "effect/sql"
import { Admin, Job, JobQueue, Worker } from "../src/index.ts"
import { makeDatabase } from "./support/database.ts"
import { makeLink } from "./support/link.ts"
import {
  allInPlace,
  assertRows,
  databaseUrl,
  rows,
  running,
  until,
  untilAllEnded,
  untilValue,
  value,
  withPolling,
  withQueue
} from "./support/queue.ts"

class Refused extends Schema.TaggedError<Refused>()("Refused", { n: Schema.Finite }) {}

class Pay extends Job.make("pay", {
  payload: { n: Schema.Finite },
  success: Schema.Unknown,
  error: Refused,
  retry: Schedule.recurs(0)
}) {}

const table = rows("create table public.paid (n int unique deferrable initially deferred)")

/** Writes what it was paid, then does something else. */
const paying = <E, R>(then: (n: number) => Effect.Effect<unknown, E, R>) =>
  Effect.fnUntraced(function*({ n }: { readonly n: number }) {
    const sql = yield* SqlClient.SqlClient
    yield* Effect.orDie(sql`insert into public.paid values (${n})`)
    return (yield* then(n)) ?? null
  })

/** A worker with one handler of `Pay`. */
const worker = <R>(
  handler: (payload: { readonly n: number }) => Effect.Effect<unknown, Refused, R>,
  options: { readonly gracePeriod?: number } = {}
) => Worker.layer({ ...options, jobs: [Pay] }).pipe(Layer.provide(Pay.toLayer(handler, { transactional: true })))

const work = <R>(
  handler: (payload: { readonly n: number }) => Effect.Effect<unknown, Refused, R>,
  options: { readonly gracePeriod?: number } = {}
) => Effect.andThen(table, running(worker(handler, options)))

const paid = (...numbers: ReadonlyArray<number>) =>
  assertRows("select n from public.paid order by n", numbers.map((n) => ({ n })))

const ends = Effect.andThen(
  untilAllEnded(),
  Effect.suspend(() =>
    rows(
      "select (payload ->> 'n')::int as n, status, attempt::int, result, error ->> 'tag' as tag from pgqueue.finished order by 1"
    )
  )
)

describe("a transactional handler", () => {
  it.live("commits what it writes together with the end of its job", () =>
    withQueue(Effect.gen(function*() {
      const gate = yield* Deferred.make<void>()
      yield* work(paying((n) => Effect.as(n === 1 ? Deferred.await(gate) : Effect.void, { paid: n })))
      yield* Pay.enqueueAll([{ n: 1 }, { n: 2 }, { n: 3 }])
      yield* untilValue("select count(*)::int from pgqueue.finished", 2)
      yield* paid(2, 3)
      yield* Deferred.succeed(gate, undefined)
      assert.deepStrictEqual(
        yield* ends,
        [1, 2, 3].map((n) => ({ n, status: "completed", attempt: 1, result: { paid: n }, tag: null }))
      )
      yield* paid(1, 2, 3)
      yield* untilValue("select count(*)::int from pgqueue.lease", 0)
      yield* allInPlace
    })))

  const failures: ReadonlyArray<
    readonly [what: string, Effect.Effect<unknown, Refused, Job.Current>, status: string, tag: string | null]
  > = [
    ["fails with its typed error", new Refused({ n: 1 }), "discarded", "Failed"],
    ["dies", Effect.die("no"), "discarded", "Defect"],
    ["cancels", Job.cancel("no"), "cancelled", null],
    ["discards", Job.discard("no"), "discarded", null],
    ["returns what cannot be stored", Effect.succeed(1n), "discarded", "Defect"],
    ["times out", Effect.never, "discarded", "TimedOut"]
  ]
  for (const [what, then, status, tag] of failures) {
    it.live(`that ${what} leaves nothing behind`, () =>
      withQueue(Effect.gen(function*() {
        yield* work(paying(() => then))
        yield* Pay.enqueue({ n: 1 }, { timeout: what === "times out" ? 300 : "1 minute" })
        assert.deepStrictEqual(yield* ends, [{ n: 1, status, attempt: 1, result: null, tag }])
        yield* paid()
        yield* allInPlace
      })))
  }

  it.live("keeps its typed error when it fails, and its enqueues go with it", () =>
    withQueue(Effect.gen(function*() {
      class Mail extends Job.make("mail") {}
      yield* work(
        paying((n) => Effect.andThen(Effect.orDie(Mail.enqueue()), n === 1 ? new Refused({ n }) : Effect.void))
      )
      yield* Pay.enqueueAll([{ n: 1 }, { n: 2 }])
      yield* untilValue("select count(*)::int from pgqueue.finished", 2)
      yield* assertRows("select error -> 'error' ->> 'n' as n from pgqueue.finished where status = 'discarded'", [
        { n: "1" }
      ])
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.job where kind = 'mail'"), 1)
    })))

  it.live("snoozes without what it wrote, and writes it when it comes back", () =>
    withQueue(Effect.gen(function*() {
      let runs = 0
      yield* work(paying(() => ++runs < 3 ? Job.snooze("20 millis") : Effect.void))
      yield* Pay.enqueue({ n: 1 })
      assert.deepInclude((yield* ends)[0], { status: "completed", attempt: 1 })
      assert.strictEqual(runs, 3)
      yield* paid(1)
    })))

  it.live("has failed when the commit is refused, and nothing has happened", () =>
    withQueue(Effect.gen(function*() {
      yield* work(paying((n) =>
        Effect.flatMap(SqlClient.SqlClient, (sql) => Effect.orDie(sql`insert into public.paid values (${n})`))
      ))
      yield* Pay.enqueue({ n: 1 })
      assert.deepStrictEqual(yield* ends, [{ n: 1, status: "discarded", attempt: 1, result: null, tag: "Defect" }])
      yield* paid()
    })))

  it.live("has the last word when its session is lost, and cannot be rolled back any more", () =>
    withQueue(Effect.gen(function*() {
      const leave = (sql: SqlClient.SqlClient) => sql`select pg_terminate_backend(pg_backend_pid())`
      const ways: Record<number, Effect.Effect<unknown, Refused, Job.Current | SqlClient.SqlClient>> = {
        1: new Refused({ n: 1 }),
        2: Effect.die(new Error("of its own")),
        3: Job.discard("not wanted"),
        4: Effect.flatMap(
          SqlClient.SqlClient,
          (sql) => sql.withTransaction(Effect.andThen(Effect.exit(leave(sql)), Job.discard("not wanted here")))
        ).pipe(Effect.orDie)
      }
      yield* work(paying((n) =>
        Effect.gen(function*() {
          const sql = yield* SqlClient.SqlClient
          if (n < 4) yield* Effect.exit(leave(sql))
          return yield* ways[n]!
        })
      ))
      yield* Pay.enqueueAll([{ n: 1 }, { n: 2 }, { n: 3 }, { n: 4 }])
      yield* untilAllEnded()
      yield* assertRows(
        `select (payload ->> 'n')::int as n, status, error ->> 'tag' as tag, split_part(error ->> 'message', E'\n', 1) as message,
         error -> 'error' ->> 'n' as error, reason from pgqueue.finished order by 1`,
        [
          { n: 1, status: "discarded", tag: "Failed", message: "Refused: ", error: "1", reason: null },
          { n: 2, status: "discarded", tag: "Defect", message: "Error: of its own", error: null, reason: null },
          { n: 3, status: "discarded", tag: null, message: null, error: null, reason: "not wanted" },
          { n: 4, status: "discarded", tag: null, message: null, error: null, reason: "not wanted here" }
        ]
      )
      yield* paid()
    })))

  it.live("rolls back with a lost lease, and its job belongs to whoever has it now", () =>
    withQueue(Effect.gen(function*() {
      const started = yield* Deferred.make<void>()
      const go = yield* Deferred.make<void>()
      yield* work(
        paying(() => Effect.uninterruptible(Effect.andThen(Deferred.succeed(started, undefined), Deferred.await(go))))
      )
      const { id } = yield* Pay.enqueue({ n: 1 }, { maxAttempts: 1 })
      yield* Deferred.await(started)
      // Somebody has taken the job back and given it away; the handler does not know and completes.
      yield* rows("update pgqueue.lease set worker = $1::uuid, id = $1::uuid", ["0190b5a0-0000-7000-8000-000000000001"])
      yield* Deferred.succeed(go, undefined)
      yield* untilValue(
        "select count(*)::int from pg_stat_activity where state like 'idle in transaction%' and datname = current_database()",
        0
      )
      yield* paid()
      yield* assertRows("select ids[1]::text as id from pgqueue.lease", [{ id }])
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.finished"), 0)
    })))

  it.live("has a lease of its own, so that the settlements of its neighbours do not wait for its commit", () =>
    withQueue(Effect.gen(function*() {
      class Plain extends Job.make("plain") {}
      const sql = yield* SqlClient.SqlClient
      yield* table
      // Its commit waits for a lock, after the settlement that locks its lease.
      yield* rows(`create function public.wait() returns trigger language plpgsql as $$
        begin perform pg_advisory_xact_lock(42); return null; end $$`)
      yield* rows(`create constraint trigger waits after insert on public.paid deferrable initially deferred
        for each row execute function public.wait()`)
      yield* Plain.enqueueAll(Array.from({ length: 20 }, () => undefined))
      yield* Pay.enqueue({ n: 1 })
      yield* Plain.enqueueAll(Array.from({ length: 20 }, () => undefined))
      const [locked, unlock, go] = [
        yield* Deferred.make<void>(),
        yield* Deferred.make<void>(),
        yield* Deferred.make<void>()
      ]
      const lock = sql.withTransaction(
        sql`select pg_advisory_xact_lock(42)`.pipe(
          Effect.andThen(Deferred.succeed(locked, undefined)),
          Effect.andThen(Deferred.await(unlock))
        )
      )
      yield* Effect.forkChild(lock)
      yield* Deferred.await(locked)
      yield* running(
        Worker.layer({ jobs: [Pay, Plain], concurrency: 50 }).pipe(Layer.provide([
          Plain.toLayer(() => Deferred.await(go)),
          Pay.toLayer(paying(() => Effect.void), { transactional: true })
        ]))
      )
      yield* untilValue(
        "select count(*)::int from pg_locks join pg_database d on d.oid = database where locktype = 'advisory' and not granted and datname = current_database()",
        1
      )
      yield* Deferred.succeed(go, undefined)
      yield* untilValue("select count(*)::int from pgqueue.finished", 40)
      yield* assertRows("select cardinality(ids)::int as jobs from pgqueue.lease", [{ jobs: 1 }])
      yield* Deferred.succeed(unlock, undefined)
      yield* untilAllEnded()
      yield* paid(1)
    })))

  it.live("is handed back unburnt, without what it wrote, when its worker is told to stop", () =>
    withQueue(Effect.gen(function*() {
      yield* Effect.scoped(Effect.gen(function*() {
        yield* work(paying(() => Effect.never), { gracePeriod: 0 })
        yield* Pay.enqueue({ n: 1 })
        yield* untilValue(
          "select count(*)::int from pg_stat_activity where state = 'idle in transaction' and datname = current_database()",
          1
        )
      }))
      yield* paid()
      yield* assertRows("select attempt::int, rescued::int from pgqueue.job", [{ attempt: 0, rescued: 0 }])
      yield* allInPlace
    })))

  it.live("may be cancelled from outside while it runs", () =>
    withQueue(Effect.gen(function*() {
      yield* work(paying(() => Effect.never))
      const { id } = yield* Pay.enqueue({ n: 1 })
      yield* untilValue(
        "select count(*)::int from pg_stat_activity where state = 'idle in transaction' and datname = current_database()",
        1
      )
      assert.strictEqual(yield* Admin.cancel(id), "cancelling")
      assert.deepInclude((yield* ends)[0], { status: "cancelled" })
      yield* paid()
    })))

  it.live("waits for somebody who has locked its job's row", () =>
    withQueue(Effect.gen(function*() {
      const started = yield* Deferred.make<void>()
      const go = yield* Deferred.make<void>()
      yield* work(paying(() => Effect.andThen(Deferred.succeed(started, undefined), Deferred.await(go))))
      const { id } = yield* Pay.enqueue({ n: 1 })
      yield* Deferred.await(started)
      const sql = yield* SqlClient.SqlClient
      yield* sql.withTransaction(Effect.gen(function*() {
        yield* sql`select 1 from pgqueue.job where id = ${id}::uuid for update`
        yield* Deferred.succeed(go, undefined)
        // It has tried, and tries again.
        yield* untilValue(
          "select count(*)::int from pg_stat_activity where state like 'idle in transaction%' and query like 'with input as%' and datname = current_database()",
          1
        )
      }))
      assert.deepInclude((yield* ends)[0], { status: "completed" })
      yield* paid(1)
    })))

  it.live("closes its scope inside the transaction", () =>
    withQueue(Effect.gen(function*() {
      yield* work(paying((n) =>
        Effect.flatMap(SqlClient.SqlClient, (sql) =>
          Effect.addFinalizer(() =>
            Effect.orDie(sql`insert into public.paid values (${n + 100})`)
          ))
      ))
      yield* Pay.enqueue({ n: 1 })
      yield* ends
      yield* paid(1, 101)
    })))

  it.live("bounds how long its session may be idle", () =>
    withQueue(
      Effect.gen(function*() {
        const seen: Array<unknown> = []
        yield* work(paying(() =>
          Effect.flatMap(SqlClient.SqlClient, (sql) =>
            Effect.orDie(Effect.map(
              sql`select current_setting('idle_in_transaction_session_timeout') as idle, current_setting('transaction_isolation') as level`,
              ([row]) => void seen.push(row)
            )))
        ))
        yield* Pay.enqueue({ n: 1 })
        yield* Pay.enqueue({ n: 2 }, { timeout: "2 minutes" })
        yield* ends
        assert.sameDeepMembers(seen, [
          { idle: "30s", level: "read committed" },
          { idle: "2min", level: "read committed" }
        ])
      }),
      { pool: { startupParameters: { default_transaction_isolation: "serializable" } } }
    ))

  it.live("whose commit never arrives is over after the lease, however long its timeout is", () =>
    withQueue(Effect.gen(function*() {
      yield* table
      const link = yield* makeLink(yield* databaseUrl)
      const struck = yield* Deferred.make<void>()
      yield* running(
        Worker.layer({ jobs: [Pay], heartbeat: 500, lease: 2000 }).pipe(
          Layer.provide(Pay.toLayer(
            paying(() =>
              Effect.sync(() => {
                link.strike({ text: "COMMIT", at: "lost" }, () => Deferred.doneUnsafe(struck, Effect.void))
              })
            ),
            { transactional: true }
          )),
          Layer.provide(Layer.fresh(
            Layer.provideMerge(JobQueue.layer(), PgClient.layer({ url: Redacted.make(link.url), maxConnections: 5 }))
          ))
        )
      )
      yield* Pay.enqueue({ n: 1 }, { timeout: "1 hour" })
      yield* Deferred.await(struck)
      // It has settled, and keeps the locks of that: of its lease, its job and its key.
      yield* untilValue(
        "select count(*)::int from pg_stat_activity where state = 'idle in transaction' and datname = current_database()",
        1
      )
      yield* untilAllEnded({ within: 8000 })
      yield* assertRows("select status from pgqueue.finished", [{ status: "discarded" }])
      yield* paid()
      yield* allInPlace
    })))

  it.live("may have a timeout of a month", () =>
    withQueue(Effect.gen(function*() {
      yield* work(paying(() => Effect.void))
      yield* Pay.enqueue({ n: 1 }, { timeout: "30 days" })
      assert.deepInclude((yield* ends)[0], { status: "completed" })
      yield* paid(1)
    })))

  it.live("that is told to stop while it gets its lease is handed back from where it is", () =>
    withQueue(Effect.gen(function*() {
      const link = yield* makeLink(yield* databaseUrl)
      const queue = Layer.fresh(
        Layer.provideMerge(JobQueue.layer(), PgClient.layer({ url: Redacted.make(link.url), maxConnections: 3 }))
      )
      yield* table
      yield* Pay.enqueueAll([{ n: 1 }, { n: 2 }], { maxAttempts: 1 })
      link.holdAnswersTo("select alone from mine")
      const scope = yield* Scope.make()
      yield* Layer.buildWithScope(
        Layer.fresh(worker(paying(() => Effect.never), { gracePeriod: 0 }).pipe(Layer.provide(queue))),
        scope
      )
      yield* until("the answer is held back", Effect.sync(() => link.held() > 0))
      const closing = yield* Effect.forkChild(Scope.close(scope, Exit.void), { startImmediately: true })
      link.letThrough()
      yield* Fiber.join(closing)
      yield* assertRows("select attempt::int, rescued::int from pgqueue.job", [
        { attempt: 0, rescued: 0 },
        { attempt: 0, rescued: 0 }
      ])
      yield* assertRows("select id from pgqueue.lease", [])
      yield* allInPlace
    })))

  it.live("says how far it is from a fiber of its own, and is settled all the same", () =>
    withQueue(Effect.gen(function*() {
      const started = yield* Deferred.make<void>()
      const go = yield* Deferred.make<void>()
      const saying = Effect.forever(Effect.andThen(Job.progress(1), Effect.sleep(1)))
      yield* work(paying(() =>
        Effect.gen(function*() {
          yield* Effect.forkChild(saying)
          yield* Deferred.succeed(started, undefined)
          yield* Deferred.await(go)
        })
      ))
      const { id } = yield* Pay.enqueue({ n: 1 })
      yield* Deferred.await(started)
      const sql = yield* SqlClient.SqlClient
      // Both meet somebody who has locked the row of the job, and must not wait for each other when that is over.
      yield* sql.withTransaction(Effect.gen(function*() {
        yield* sql`select 1 from pgqueue.job where id = ${id}::uuid for update`
        yield* Deferred.succeed(go, undefined)
        yield* untilValue(
          "select count(*)::int from pg_stat_activity where state like 'idle in transaction%' and query like 'with input as%' and datname = current_database()",
          1
        )
      }))
      yield* untilAllEnded({ within: 4000 })
      yield* paid(1)
    })))

  it.live("begins other transactions as their clients do", () =>
    withQueue(Effect.gen(function*() {
      const { url } = yield* makeDatabase()
      const seen: Array<unknown> = []
      const other = PgClient.layer({
        url: Redacted.make(Redacted.value(url)),
        startupParameters: { default_transaction_isolation: "serializable" }
      })
      const context = yield* Layer.build(Layer.fresh(other))
      yield* work(paying(() =>
        Effect.flatMap(SqlClient.SqlClient, (sql) =>
          Effect.map(sql.withTransaction(sql`show transaction_isolation`), (shown) =>
            void seen.push(...shown))).pipe(
            Effect.provideContext(context),
            Effect.orDie
          )
      ))
      yield* Pay.enqueue({ n: 1 })
      yield* ends
      assert.deepStrictEqual(seen, [{ transaction_isolation: "serializable" }])
    })))

  it.live("whose commit is answered to nobody has happened once: both, and no second time", () =>
    withQueue(Effect.gen(function*() {
      yield* table
      const link = yield* makeLink(yield* databaseUrl)
      const queue = yield* Layer.build(Layer.fresh(Layer.provideMerge(
        JobQueue.layer(),
        PgClient.layer({ url: Redacted.make(link.url), maxConnections: 3 })
      )))
      let runs = 0
      const started = yield* Deferred.make<void>()
      const go = yield* Deferred.make<void>()
      yield* running(
        worker(paying(() =>
          Effect.suspend(() => {
            runs++
            return Effect.andThen(Deferred.succeed(started, undefined), Deferred.await(go))
          })
        )).pipe(Layer.provide(Layer.succeedContext(queue)))
      )
      yield* Pay.enqueue({ n: 1 })
      yield* Deferred.await(started)
      link.holdAnswersTo("insert into public.paid")
      yield* Deferred.succeed(go, undefined)
      // The settle's answer is let through, that of the commit is not.
      yield* until("the settle is answered", Effect.sync(() => link.held() > 0))
      link.letThrough()
      link.holdAnswersTo("insert into public.paid")
      yield* untilValue("select count(*)::int from pgqueue.finished", 1)
      link.cut("insert into public.paid")
      link.letThrough()
      yield* untilValue("select count(*)::int from pgqueue.lease", 0)
      yield* assertRows("select status, attempt::int from pgqueue.finished", [{ status: "completed", attempt: 1 }])
      yield* paid(1)
      assert.strictEqual(runs, 1)
      yield* allInPlace
    })))

  it.live("on another client does not start", () =>
    withQueue(Effect.gen(function*() {
      const { url } = yield* makeDatabase()
      const foreign = PgClient.layer({ url: Redacted.make(Redacted.value(url)), maxConnections: 1 })
      const handler = Pay.toLayer(paying(() => Effect.void), { transactional: true }).pipe(Layer.provide(foreign))
      const exit = yield* Effect.exit(running(Worker.layer({ jobs: [Pay] }).pipe(Layer.provide(handler))))
      assert.isTrue(Exit.isFailure(exit))
      const error = Exit.isFailure(exit) ? Option.getOrUndefined(Cause.findErrorOption(exit.cause)) : undefined
      assert.deepInclude(error, { _tag: "JobQueueError", reason: "ForeignClient" })
      // The same client without its transforms, or behind a service of its own, is the same.
      yield* running(
        Worker.layer({ jobs: [Pay] }).pipe(
          Layer.provide(Pay.toLayer(paying(() => Effect.void), { transactional: true })),
          Layer.provide(
            Layer.effect(SqlClient.SqlClient, Effect.map(SqlClient.SqlClient, (sql) => sql.withoutTransforms()))
          )
        )
      )
    })))

  it.live("works over a client that cannot LISTEN", () =>
    withPolling(Effect.gen(function*() {
      yield* work(paying((n) => n === 2 ? Effect.die("no") : Effect.void))
      yield* Pay.enqueueAll([{ n: 1 }, { n: 2 }])
      assert.deepStrictEqual((yield* ends).map((row) => row.status), ["completed", "discarded"])
      yield* paid(1)
    })))
})
