/** When a worker may start jobs, what it hears of, and what becomes of the jobs of one that is not heard of. */
import { PgClient } from "@effect/sql-pg"
import { assert, describe, it } from "@effect/vitest"
import {
  Clock,
  Context,
  DateTime,
  Deferred,
  Effect,
  Exit,
  Layer,
  Logger,
  Redacted,
  Schedule,
  Schema,
  Scope
} from "effect"
import { SqlClient } from "effect/sql"
import { Job, JobQueue, Worker } from "../src/index.ts"
import { Ledger } from "./support/ledger.ts"
import { makeLink } from "./support/link.ts"
import {
  allInPlace,
  assertRows,
  databaseUrl,
  queueLayer,
  rows,
  running,
  until,
  untilAllEnded,
  untilValue,
  value,
  withPolling,
  withQueue
} from "./support/queue.ts"

class Note extends Job.make("note", { payload: { n: Schema.Number } }) {}
const NoteHandler = Note.toLayer(() => Effect.flatMap(Ledger, ({ record }) => record("start")))

const started = (count: number, within: number) =>
  untilValue("select count(*)::int from ledger where phase = 'start'", count, { within })

/** A queue whose sessions go over a link. */
const overLink = Effect.gen(function*() {
  const link = yield* makeLink(yield* databaseUrl)
  const queue = Layer.provideMerge(
    JobQueue.layer(),
    PgClient.layer({ url: Redacted.make(link.url), maxConnections: 3 })
  )
  return { link, queue: yield* Layer.build(Layer.fresh(queue)) }
})

/** Long enough that what waits for a poll or for a regular heartbeat is seen to wait. */
const rare = { pollInterval: "30 seconds", heartbeat: "20 seconds", lease: "60 seconds" } as const

/** Every session of the database but the one that says so. */
const terminateAll = rows(
  "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
)

const beat = "beat_at = clock_timestamp() where id = $1"

describe("a worker that loses sessions", () => {
  it.live("compares its leases again when one more is lost while it compares them", () =>
    withQueue(Effect.gen(function*() {
      const { link, queue } = yield* overLink
      yield* running(
        Worker.layer({ jobs: [Note], ...rare }).pipe(
          Layer.provide(NoteHandler),
          Layer.provide(Layer.succeedContext(queue))
        )
      )
      yield* Note.enqueue({ n: 0 })
      yield* started(1, 10_000)
      link.holdAnswersTo(beat)
      const listening = () => link.sessions("LISTEN") > 0
      yield* until("it listens", Effect.sync(listening))
      link.cut("LISTEN")
      yield* until("a beat is out", Effect.sync(() => link.held() > 0))
      yield* until("it listens again", Effect.sync(listening))
      link.cut("LISTEN")
      yield* Effect.sleep(300)
      link.letThrough()
      yield* Note.enqueue({ n: 1 })
      yield* started(2, 10_000)
    })))

  it.live("hears of what was announced by a session that was cut while it was idle", () =>
    withQueue(
      Effect.gen(function*() {
        const other = yield* Layer.build(queueLayer())
        yield* running(
          Worker.layer({ jobs: [Note], ...rare }).pipe(
            Layer.provide(NoteHandler),
            Layer.provide(Layer.succeedContext(other))
          )
        )
        // A bulk is announced by that session, a job that comes alone by its own insert.
        yield* Note.enqueueAll([{ n: 0 }])
        yield* started(1, 10_000)
        for (let n = 1; n <= 2; n++) {
          const cut = yield* until(
            "the session that announces is cut",
            Effect.map(
              value(
                `select count(pg_terminate_backend(pid))::int from pg_stat_activity
                 where datname = current_database() and application_name = 'producer' and query like 'select pg_notify%'`
              ),
              (count) => count > 0
            )
          )
          assert.isBelow(cut, 20_000)
          yield* Effect.sleep(300)
          yield* Note.enqueueAll([{ n }])
          yield* started(n + 1, 10_000)
        }
      }),
      { pool: { applicationName: "producer" } }
    ))
})

describe("a worker that is idle", () => {
  it.live("finds what becomes due just after it has looked", () =>
    withQueue(Effect.gen(function*() {
      yield* running(Worker.layer({ jobs: [Note], ...rare }).pipe(Layer.provide(NoteHandler)))
      let n = 0
      for (const ahead of [6, 8, 10, 12, 14, 16, 18, 20, 22, 25]) {
        const due = yield* value("select (extract(epoch from clock_timestamp()) * 1000)::float8 + $1::int", [ahead])
        yield* Note.enqueue({ n }, { runAt: DateTime.makeUnsafe(due) })
        yield* started(++n, 10_000)
        yield* Effect.sleep(100)
      }
      for (const ahead of [5, 10, 15]) {
        yield* rows(
          `select pgqueue.enqueue('note', '{"n":0}', delay => $1::int * interval '1 ms')`,
          [ahead]
        )
        yield* started(++n, 10_000)
        yield* Effect.sleep(100)
      }
    })))

  it.live("listens on one session together with the others of its process", () =>
    withQueue(Effect.gen(function*() {
      class Mail extends Job.make("mail", { queue: "mail" }) {}
      const handlers = [
        NoteHandler,
        Mail.toLayer(() => Effect.flatMap(Ledger, ({ record }) => record("start")))
      ] as const
      yield* running(Worker.layer({ jobs: [Note], ...rare }).pipe(Layer.provide([...handlers])))
      yield* running(Worker.layer({ jobs: [Note], ...rare }).pipe(Layer.provide([...handlers])))
      yield* running(Worker.layer({ jobs: [Mail], ...rare }).pipe(Layer.provide([...handlers])))
      // Its last query is LISTEN, or the question whether it is still there.
      const listening = value(
        `select count(*)::int from pg_stat_activity
         where datname = current_database() and (query ilike 'listen%' or query = 'select 1 as here')`
      )
      yield* untilValue("select count(*)::int from pgqueue.worker", 3)
      yield* until("it listens", Effect.map(listening, (count) => count > 0))
      yield* Effect.sleep(500)
      assert.strictEqual(yield* listening, 1)
      // And each of them hears of what is its own.
      const other = yield* Layer.build(queueLayer())
      yield* Effect.provideContext(Effect.andThen(Note.enqueue({ n: 1 }), Mail.enqueue()), other)
      yield* started(2, 10_000)
    })))
})

describe("a worker that is not heard of", () => {
  /** As often as the first loss, which is free, and the one attempt allow. */
  const bounded = Effect.gen(function*() {
    yield* untilAllEnded({ within: 25_000 })
    yield* assertRows("select status, attempt::int, rescued::int, error ->> 'tag' as tag from pgqueue.finished", [
      { status: "discarded", attempt: 1, rescued: 2, tag: "Lost" }
    ])
    assert.strictEqual(yield* value("select count(*)::int from ledger"), 2)
    yield* allInPlace
  })
  const timing = { lease: 1800, heartbeat: 200, rescueInterval: 300, gracePeriod: 0 } as const

  it.live("because a handler blocks the process spends attempts of its jobs", () =>
    withQueue(Effect.gen(function*() {
      class Blocking extends Job.make("blocking", { maxAttempts: 1, retry: Schedule.recurs(5) }) {}
      const BlockingHandler = Blocking.toLayer(() =>
        Effect.gen(function*() {
          const { record } = yield* Ledger
          yield* record("start")
          // A heartbeat that just makes it is as good as any, so again and again.
          while (true) {
            const end = performance.now() + 1750
            while (performance.now() < end) { /* as a long computation would */ }
            yield* Effect.sleep(400)
          }
        })
      )
      yield* running(Worker.layer({ jobs: [Blocking], ...timing }).pipe(Layer.provide(BlockingHandler)))
      yield* Effect.sleep(500)
      yield* Blocking.enqueue()
      yield* bounded
    })))

  it.live("because a handler keeps the only connection spends attempts of its jobs", () =>
    withPolling(
      Effect.gen(function*() {
        class Keeping extends Job.make("keeping", { maxAttempts: 1, retry: Schedule.recurs(5) }) {}
        const KeepingHandler = Keeping.toLayer(() =>
          Effect.gen(function*() {
            const { record } = yield* Ledger
            const sql = yield* SqlClient.SqlClient
            yield* record("start")
            yield* Effect.orDie(sql.withTransaction(Effect.andThen(sql`select 1`, Effect.sleep("4 seconds"))))
          })
        )
        yield* Keeping.enqueue()
        yield* running(Worker.layer({ jobs: [Keeping], ...timing }).pipe(Layer.provide(KeepingHandler)))
        yield* bounded
      }),
      { maxConnections: 1 }
    ))

  it.live("because a handler locks what the heartbeat writes to spends attempts of its jobs", () =>
    withQueue(Effect.gen(function*() {
      class Locking extends Job.make("locking", { maxAttempts: 1, retry: Schedule.recurs(5) }) {}
      const LockingHandler = Locking.toLayer(() =>
        Effect.gen(function*() {
          const { record } = yield* Ledger
          const sql = yield* SqlClient.SqlClient
          yield* record("start")
          const lock = Effect.andThen(sql`lock table pgqueue.worker in exclusive mode`, Effect.sleep("4 seconds"))
          yield* Effect.orDie(sql.withTransaction(lock))
        })
      )
      yield* Locking.enqueue()
      yield* running(Worker.layer({ jobs: [Locking], ...timing }).pipe(Layer.provide(LockingHandler)))
      yield* bounded
    })))
})

describe("a beat that the database refuses", () => {
  const Sleeper = Job.make("sleeper", { maxAttempts: 1 })
  const SleeperHandler = Sleeper.toLayer(() =>
    Effect.flatMap(Ledger, ({ record }) => Effect.andThen(record("start"), Effect.sleep("3 seconds")))
  )
  const timing = { lease: "2 seconds", heartbeat: "200 millis", rescueInterval: "200 millis" } as const
  const onBeat = (body: string) =>
    rows(`create function public.refuse() returns trigger language plpgsql as $$ begin ${body} end $$`).pipe(
      Effect.andThen(
        rows("create trigger refuse before update on pgqueue.worker for each row execute function public.refuse()")
      )
    )

  it.live("costs its jobs nothing, however often", () =>
    withQueue(Effect.gen(function*() {
      const gate = yield* Deferred.make<void>()
      const handler = Sleeper.toLayer(() =>
        Effect.flatMap(Ledger, ({ record }) => Effect.andThen(record("start"), Deferred.await(gate)))
      )
      yield* running(Worker.layer({ jobs: [Sleeper], ...timing }).pipe(Layer.provide(handler)))
      yield* Sleeper.enqueue()
      for (const starts of [1, 2, 3]) {
        yield* started(starts, 10_000)
        yield* onBeat("raise 'no beats today';")
        yield* untilValue("select count(*)::int from pgqueue.ready", 1)
        yield* rows("drop function public.refuse() cascade")
      }
      yield* started(4, 10_000)
      yield* Deferred.succeed(gate, undefined)
      yield* untilAllEnded()
      yield* assertRows("select status, attempt::int, rescued::int from pgqueue.finished", [
        { status: "completed", attempt: 1, rescued: 0 }
      ])
      yield* allInPlace
    })))

  it.live("without a word does not make it register again and again", () =>
    withQueue(Effect.gen(function*() {
      yield* onBeat("return null;")
      yield* running(Worker.layer({ jobs: [Sleeper], ...timing }).pipe(Layer.provide(SleeperHandler)))
      yield* Effect.sleep(2000)
      // Twice each 200 ms, not as fast as it can.
      assert.isAtMost(yield* value("select count(*)::int from pgqueue.worker"), 25)
      yield* rows("drop function public.refuse() cascade")
      yield* Sleeper.enqueue()
      yield* untilAllEnded()
    })))
})

describe("a worker whose logger throws", () => {
  it.live("goes on when there is something to log again", () =>
    withQueue(Effect.gen(function*() {
      let bad = false
      const logger = Logger.make(() => {
        if (bad) throw new Error("EMFILE")
      })
      yield* running(
        Worker.layer({ jobs: [Note], heartbeat: "200 millis", lease: "2 seconds" }).pipe(
          Layer.provide(NoteHandler),
          Layer.provide(queueLayer()),
          Layer.provide(Logger.layer([logger]))
        )
      )
      yield* Note.enqueue({ n: 0 })
      yield* started(1, 10_000)
      bad = true
      yield* terminateAll
      yield* Effect.sleep(1000)
      bad = false
      yield* Note.enqueue({ n: 1 })
      yield* started(2, 10_000)
      yield* untilAllEnded()
      yield* allInPlace
    })))
})

describe("a worker whose machine was suspended", () => {
  it.live("asks whether its jobs are still its own before it starts one", () =>
    withQueue(Effect.gen(function*() {
      // What is seen of it: the time of day has gone on, and the monotonic clock has not.
      let suspended = 0
      const clock = yield* Clock.Clock
      const ofDay: Clock.Clock = Object.assign(Object.create(clock), {
        currentTimeMillisUnsafe: () => clock.currentTimeMillisUnsafe() + suspended
      })
      yield* running(Worker.layer({ jobs: [Note], ...rare }).pipe(Layer.provide(NoteHandler))).pipe(
        Effect.provideService(Clock.Clock, ofDay)
      )
      yield* Note.enqueue({ n: 0 })
      yield* started(1, 10_000)
      const beatAt = value<string>("select beat_at::text from pgqueue.worker")
      // Those of the start.
      yield* until(
        "it beats no more",
        Effect.zipWith(beatAt, Effect.andThen(Effect.sleep(500), beatAt), (one, other) => one === other)
      )
      const before = yield* beatAt
      suspended = 3_600_000
      yield* Note.enqueue({ n: 1 })
      yield* started(2, 10_000)
      assert.notStrictEqual(yield* beatAt, before)
    })))
})

describe("a database that was read-only for a while", () => {
  it.live("is written to again, though sessions that were opened meanwhile may not", () =>
    withQueue(Effect.gen(function*() {
      yield* running(
        Worker.layer({ jobs: [Note], pollInterval: "200 millis", heartbeat: "200 millis", lease: "2 seconds" }).pipe(
          Layer.provide(NoteHandler),
          Layer.provide(queueLayer())
        )
      )
      yield* untilValue("select count(*)::int from pgqueue.worker", 1)
      const set = (text: string) =>
        rows(`do $$ begin execute format('alter database %I ${text}', current_database()); end $$`)
      yield* set("set default_transaction_read_only = on")
      yield* terminateAll
      yield* Effect.sleep(2000)
      yield* set("reset default_transaction_read_only")
      yield* Effect.provide(Note.enqueue({ n: 0 }), queueLayer())
      yield* untilAllEnded({ within: 5000 })
      yield* allInPlace
    })))
})

describe("a worker that has said goodbye", () => {
  it.live("does not register again, whatever its last heartbeats find", () =>
    withQueue(Effect.gen(function*() {
      const { link, queue } = yield* overLink
      const scope = yield* Scope.make()
      const worker = Worker.layer({ jobs: [Note], heartbeat: 20, gracePeriod: 0 }).pipe(
        Layer.provide(NoteHandler),
        Layer.provide(Layer.succeedContext(queue))
      )
      yield* Layer.buildWithScope(Layer.fresh(worker), scope)
      yield* untilValue("select count(*)::int from pgqueue.worker", 1)
      yield* Effect.provideContext(Note.enqueue({ n: 0 }), Context.pick(JobQueue)(queue))
      yield* started(1, 10_000)
      // Its row is gone and it beats on, for as long as it does not know.
      link.holdAnswersTo("delete from \"pgqueue\".worker where id = $1::uuid")
      yield* Scope.close(scope, Exit.void)
      yield* Effect.sleep(200)
      yield* assertRows("select name from pgqueue.worker", [])
      link.letThrough()
    })))
})
