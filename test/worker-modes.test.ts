/** Ways to run: until nothing is left, by polling alone, over any client the application may have. */
import { PgClient } from "@effect/sql-pg"
import { assert, describe, it } from "@effect/vitest"
import { Context, Deferred, Effect, Layer, Redacted, Schedule, Schema, String } from "effect"
import { SqlClient } from "effect/sql"
import { Job, JobQueue, Worker } from "../src/index.ts"
import { TestDatabase } from "./support/database.ts"
import { Ledger } from "./support/ledger.ts"
import { makeLink } from "./support/link.ts"
import { makePooling } from "./support/pooling.ts"
import {
  allInPlace,
  assertRows,
  databaseUrl,
  phases,
  pollingQueueLayer,
  queueLayer,
  rows,
  running,
  untilAllEnded,
  untilQuiet,
  untilValue,
  value,
  withPolling,
  withQueue
} from "./support/queue.ts"
import { statements } from "./support/wire.ts"

class Note extends Job.make("note", { payload: { n: Schema.Number } }) {}
const NoteHandler = Note.toLayer(() => Effect.flatMap(Ledger, ({ record }) => record("start")))
const numbers = (count: number) => Array.from({ length: count }, (_, n) => ({ n }))

describe("Worker.runUntilEmpty", () => {
  it.live("runs what is due, counts it, leaves what is due later, and ends", () =>
    withQueue(Effect.gen(function*() {
      class Mixed extends Job.make("mixed", { payload: { n: Schema.Number }, retry: Schedule.recurs(0) }) {}
      const MixedHandler = Mixed.toLayer(({ n }) =>
        n % 3 === 0 ? Effect.die("x") : n % 3 === 1 ? Job.cancel("no") : Effect.void
      )
      yield* Mixed.enqueueAll(numbers(300))
      yield* Mixed.enqueueAll(numbers(5), { delay: "1 hour" })
      const counts = yield* Worker.runUntilEmpty({ jobs: [Mixed] }).pipe(Effect.provide(MixedHandler))
      assert.deepStrictEqual(counts, { completed: 100, failed: 100 })
      yield* assertRows("select status, count(*)::int as count from pgqueue.finished group by 1 order by 1", [
        { status: "cancelled", count: 100 },
        { status: "completed", count: 100 },
        { status: "discarded", count: 100 }
      ])
      yield* assertRows("select * from pgqueue.worker", [])
      yield* assertRows("select * from pgqueue.lease", [])
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.ready"), 5)
      yield* allInPlace
    })))

  it.live("ends at once when nothing is due", () =>
    withQueue(Effect.gen(function*() {
      const counts = yield* Worker.runUntilEmpty({ jobs: [Note] }).pipe(Effect.provide(NoteHandler))
      assert.deepStrictEqual(counts, { completed: 0, failed: 0 })
    })))

  it.live("runs again what failed and is due again at once, and jobs that jobs enqueue", () =>
    withQueue(Effect.gen(function*() {
      class Flaky extends Job.make("flaky", { retry: Schedule.recurs(5) }) {}
      const FlakyHandler = Flaky.toLayer(() =>
        Effect.gen(function*() {
          const { attempt } = yield* Job.Current
          if (attempt < 3) return yield* Effect.die("x")
          yield* Effect.orDie(Note.enqueue({ n: 1 }))
        })
      )
      yield* Flaky.enqueue()
      const counts = yield* Worker.runUntilEmpty({ jobs: [Flaky, Note] }).pipe(
        Effect.provide([FlakyHandler, NoteHandler])
      )
      assert.deepStrictEqual(counts, { completed: 2, failed: 2 })
    })))

  it.live("starts no more than its limit and leaves the rest in line, unburnt", () =>
    withQueue(Effect.gen(function*() {
      yield* Note.enqueueAll(numbers(100))
      const counts = yield* Worker.runUntilEmpty({ jobs: [Note], limit: 30 }).pipe(Effect.provide(NoteHandler))
      assert.deepStrictEqual(counts, { completed: 30, failed: 0 })
      assert.strictEqual(yield* phases("start"), 30)
      yield* assertRows("select attempt::int, count(*)::int as count from pgqueue.ready group by 1", [{
        attempt: 0,
        count: 70
      }])
      yield* allInPlace
    })))

  it.live("of several processes shares the work", () =>
    withQueue(Effect.gen(function*() {
      yield* Note.enqueueAll(numbers(2000))
      const counts = yield* Effect.forEach([1, 2, 3], () =>
        Worker.runUntilEmpty({ jobs: [Note] }).pipe(
          Effect.provide(Layer.merge(NoteHandler, queueLayer()))
        ), { concurrency: "unbounded" })
      assert.strictEqual(counts.reduce((sum, { completed }) => sum + completed, 0), 2000)
      assert.strictEqual(yield* phases("start"), 2000)
    })))
})

/** What every way of running has to do: wake up, obey transactions and due times, retry, and stop. */
const everything = Effect.gen(function*() {
  const sql = yield* SqlClient.SqlClient
  class Flaky extends Job.make("flaky", { retry: Schedule.recurs(5) }) {}
  class Undo extends Schema.TaggedError<Undo>()("Undo", {}) {}
  const FlakyHandler = Flaky.toLayer(() =>
    Effect.flatMap(Job.Current, ({ attempt }) => attempt === 1 ? Effect.die("x") : Effect.void)
  )
  yield* running(
    Worker.layer({ jobs: [Note, Flaky], pollInterval: 100 }).pipe(Layer.provide([NoteHandler, FlakyHandler]))
  )
  yield* Note.enqueueAll(numbers(500))
  yield* sql.withTransaction(Effect.andThen(Note.enqueue({ n: 1 }, { delay: 100 }), Note.enqueueAll(numbers(9))))
  yield* Effect.flip(sql.withTransaction(Effect.andThen(Note.enqueue({ n: 1 }), Effect.fail(new Undo()))))
  yield* Effect.forEach(numbers(200), (payload) => Note.enqueue(payload, { unique: `key ${payload.n % 100}` }), {
    concurrency: 20
  })
  yield* Flaky.enqueue()
  yield* untilAllEnded()
  const [{ count }] = (yield* rows("select count(*)::int from ledger")) as any
  assert.isAtLeast(count, 500 + 10 + 100)
  yield* assertRows("select kind, status, attempt::int from pgqueue.finished where attempt > 1", [
    { kind: "flaky", status: "completed", attempt: 2 }
  ])
  yield* assertRows("select job from ledger group by job having count(*) > 1", [])
  yield* allInPlace
})

describe("the application's client may", () => {
  it.live("have one connection", () => withQueue(everything, { pool: { maxConnections: 1 } }))

  it.live("have one connection that is in a transaction all the time", () =>
    withQueue(
      Effect.gen(function*() {
        const sql = yield* SqlClient.SqlClient
        yield* running(Worker.layer({ jobs: [Note] }).pipe(Layer.provide(NoteHandler)))
        const outside = yield* Effect.context<JobQueue>()
        yield* sql.withTransaction(Effect.gen(function*() {
          yield* sql`select 1`
          // From outside of it, on the same client.
          const { id } = yield* Effect.promise(() => Effect.runPromiseWith(outside)(Note.enqueue({ n: 1 })))
          yield* untilValue("select count(*)::int from pgqueue.finished where id = $1::uuid", 1, { params: [id] })
        }))
      }),
      { pool: { maxConnections: 1 } }
    ))

  it.live("multiplex", () => withQueue(everything, { pool: { multiplex: true } }))

  it.live("prepare nothing", () => withQueue(everything, { pool: { prepare: false } }))

  it.live("rename columns and results", () =>
    withQueue(everything, {
      pool: { transformQueryNames: String.camelToSnake, transformResultNames: (name) => `x${name.toUpperCase()}` }
    }))

  it.live("be set to serializable", () =>
    withQueue(everything, { pool: { startupParameters: { default_transaction_isolation: "serializable" } } }))
})

describe("a client that cannot LISTEN", () => {
  it.live("works by polling alone", () =>
    withPolling(Effect.andThen(
      Effect.map(JobQueue, ({ mode }) => assert.strictEqual(mode, "poll")),
      everything
    )))

  it.live("finds within a poll what another process has enqueued", () =>
    withPolling(Effect.gen(function*() {
      yield* running(Worker.layer({ jobs: [Note] }).pipe(Layer.provide(NoteHandler)))
      yield* untilValue("select count(*)::int from pgqueue.worker", 1)
      const other = Context.pick(JobQueue)(yield* Layer.build(queueLayer()))
      for (let n = 0; n < 3; n++) {
        yield* untilQuiet("polling")
        yield* Effect.provideContext(Note.enqueue({ n }), other)
        const took = yield* untilValue("select count(*)::int from ledger", n + 1)
        assert.isBelow(took, 5000)
      }
      assert.strictEqual(
        yield* value(
          "select count(*)::int from pg_stat_activity where query ilike 'listen%' and datname = current_database()"
        ),
        0
      )
    })))

  it.live("runs until empty", () =>
    withPolling(Effect.gen(function*() {
      yield* Note.enqueueAll(numbers(200))
      const counts = yield* Worker.runUntilEmpty({ jobs: [Note] }).pipe(Effect.provide(NoteHandler))
      assert.deepStrictEqual(counts, { completed: 200, failed: 0 })
    })))
})

describe("a process that is frozen before its claim commits", () => {
  /** A queue of its own at this address: by polling alone, or by a client behind a pooler. */
  const ways = {
    "without a PgClient": (address: string) =>
      Effect.map(makeLink(address), (link) => {
        const through = Layer.succeed(TestDatabase, { name: "through the link", url: Redacted.make(link.url) })
        return { link, layer: Layer.provide(pollingQueueLayer(), through) }
      }),
    "behind a pooler": (address: string) =>
      Effect.gen(function*() {
        const pooling = yield* makePooling(address, { settings: "refused", listen: "deaf" })
        const link = yield* makeLink(pooling.url)
        const PgLive = PgClient.layer({ url: Redacted.make(link.url), applicationName: "pooled", prepare: false })
        return { link, layer: Layer.fresh(Layer.provide(JobQueue.layer(), PgLive)) }
      })
  }
  for (const [name, way] of Object.entries(ways)) {
    it.live(`keeps no job of others: ${name}`, () =>
      withQueue(Effect.gen(function*() {
        const { layer, link } = yield* way(yield* databaseUrl)
        yield* running(
          Worker.layer({ jobs: [Note], name: "frozen", pollInterval: 100, gracePeriod: 100 }).pipe(
            Layer.provide(NoteHandler),
            Layer.provide(layer)
          )
        )
        yield* Note.enqueue({ n: 1 })
        yield* untilAllEnded()
        const frozen = yield* Deferred.make<void>()
        link.strike({ text: statements.claim, at: "sent" }, () => Deferred.doneUnsafe(frozen, Effect.void))
        yield* Note.enqueue({ n: 2 })
        yield* Deferred.await(frozen)
        yield* running(Worker.layer({ jobs: [Note], name: "another" }).pipe(Layer.provide(NoteHandler)))
        yield* untilAllEnded({ within: 10_000 })
        yield* allInPlace
      })))
  }
})
