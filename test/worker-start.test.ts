/** What is checked when a queue or a worker starts, and what is waited for. */
import { PgClient } from "@effect/sql-pg"
import { assert, describe, it } from "@effect/vitest"
import { Effect, Exit, Fiber, Layer, Redacted } from "effect"
import { Reactivity } from "effect/reactivity"
import { SqlClient } from "effect/sql"
import { Job, JobQueue, Worker } from "../src/index.ts"
import { ownServer } from "./support/database.ts"
import { makeLink } from "./support/link.ts"
import {
  databaseUrl,
  databaseWithLedger,
  now,
  queueLayer,
  rows,
  running,
  until,
  value,
  withQueue
} from "./support/queue.ts"

class Ping extends Job.make("ping") {}
class Mail extends Job.make("mail", { queue: "mail" }) {}

const handlers = Layer.mergeAll(Ping.toLayer(() => Effect.void), Mail.toLayer(() => Effect.void))

/** The error with which a layer does not start. */
const failureOf = <A, E, R>(layer: Layer.Layer<A, E, R>) => Effect.flip(Effect.scoped(Layer.build(layer)))

const withDatabase = <A, E, R>(body: Effect.Effect<A, E, R>) =>
  Effect.scoped(body).pipe(Effect.provide(databaseWithLedger()))

describe("a worker refuses to start", () => {
  const refused = (
    name: string,
    options: Partial<Worker.Options<[typeof Ping, typeof Mail], never>>,
    reason: string,
    message: RegExp
  ) =>
    it.live(name, () =>
      withQueue(Effect.gen(function*() {
        const error = yield* failureOf(Worker.layer({ jobs: [Ping, Mail], ...options }).pipe(Layer.provide(handlers)))
        assert.strictEqual(error._tag, "JobQueueError")
        assert.propertyVal(error, "reason", reason)
        assert.match(error.message, message)
        // And leaves nothing behind.
        assert.strictEqual(yield* value("select count(*)::int from pgqueue.worker"), 0)
      })))

  refused(
    "with a queue that no listed job uses",
    { queues: { mail: { concurrency: 1 }, mial: {} } },
    "QueueNotConsumed",
    /"mial"/
  )
  refused("with no slot", { queues: { mail: { concurrency: 0 } } }, "InvalidOption", /mail/)
  refused("with half a slot", { concurrency: 1.5 }, "InvalidOption", /concurrency/)
  refused(
    "with a lease shorter than two heartbeats",
    { heartbeat: "10 seconds", lease: "19 seconds" },
    "InvalidOption",
    /lease/
  )
  refused("with an endless grace period", { gracePeriod: Infinity }, "InvalidOption", /gracePeriod/)
  refused("with no pause between polls", { pollInterval: 0 }, "InvalidOption", /pollInterval/)
  refused("with a grace period that is no number", { gracePeriod: NaN }, "InvalidOption", /gracePeriod/)

  it.live("inside a transaction, in which its handlers would write", () =>
    withQueue(Effect.gen(function*() {
      const sql = yield* SqlClient.SqlClient
      yield* Ping.enqueue()
      const worker = failureOf(Worker.layer({ jobs: [Ping] }).pipe(Layer.provide(handlers)))
      const once = Effect.flip(Effect.provide(Worker.runUntilEmpty({ jobs: [Ping] }), handlers))
      assert.propertyVal(yield* sql.withTransaction(worker), "reason", "InTransaction")
      assert.propertyVal(yield* sql.withTransaction(once), "reason", "InTransaction")
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.ready"), 1)
    })))

  for (const limit of [NaN, 1.5, -1]) {
    it.live(`with a limit of ${limit}`, () =>
      withQueue(Effect.gen(function*() {
        const error = yield* Effect.flip(Effect.provide(Worker.runUntilEmpty({ jobs: [Ping], limit }), handlers))
        assert.propertyVal(error, "reason", "InvalidOption")
      })))
  }
})

describe("a worker", () => {
  it.live("leaves out the queues of jobs it does not list", () =>
    withQueue(Effect.gen(function*() {
      yield* Mail.enqueue()
      yield* Ping.enqueue()
      yield* running(Worker.layer({ jobs: [Ping] }).pipe(Layer.provide(handlers)))
      yield* until("it is done", Effect.map(value("select count(*)::int from pgqueue.finished"), (n) => n === 1))
      assert.deepStrictEqual(yield* rows("select kind from pgqueue.ready"), [{ kind: "mail" }])
    })))
})

describe("a queue", () => {
  it.live("does not start on an empty database when it may not migrate, and says what to do", () =>
    withDatabase(Effect.gen(function*() {
      const error = yield* failureOf(queueLayer({ queue: { migrate: false } }))
      assert.strictEqual(error._tag, "JobQueueError")
      assert.propertyVal(error, "reason", "NotMigrated")
      assert.match(error.message, /migrate/)
      assert.strictEqual(yield* value("select count(*)::int from pg_namespace where nspname = 'pgqueue'"), 0)
      // Migrated by somebody else, it does.
      yield* running(queueLayer())
      yield* running(queueLayer({ queue: { migrate: false } }))
    })))

  it.live("is migrated once, by however many start at the same time", () =>
    withDatabase(Effect.gen(function*() {
      const exits = yield* Effect.forEach(
        Array.from({ length: 8 }),
        () => Effect.exit(running(queueLayer({ pool: { maxConnections: 2 } }))),
        { concurrency: "unbounded" }
      )
      assert.isTrue(exits.every(Exit.isSuccess))
    })))

  it.live("tries again when its link has gone dead before it was there", () =>
    withDatabase(Effect.gen(function*() {
      const link = yield* makeLink(yield* databaseUrl)
      link.loseRequestWith("server_version_num")
      yield* running(
        Layer.fresh(Layer.provideMerge(JobQueue.layer(), PgClient.layer({ url: Redacted.make(link.url) })))
      )
      assert.strictEqual(link.dead(), 1)
    })), 60_000)

  it.live("refuses the name of a schema that needs quoting", () =>
    withDatabase(Effect.gen(function*() {
      for (const schema of ["", "Jobs", "a.b", "a\"b", "1a", "x".repeat(42), "j;drop schema public"]) {
        const error = yield* failureOf(queueLayer({ queue: { schema } }))
        assert.propertyVal(error, "reason", "InvalidOption", schema)
      }
      yield* running(queueLayer({ queue: { schema: "jobs_2" } }))
    })))

  it.live("keeps two schemas of one database apart", () =>
    withDatabase(Effect.gen(function*() {
      const one = yield* Layer.build(queueLayer({ queue: { schema: "one" } }))
      const two = yield* Layer.build(queueLayer({ queue: { schema: "two" } }))
      yield* running(
        Worker.layer({ jobs: [Ping], pollInterval: 50 }).pipe(
          Layer.provide(handlers),
          Layer.provide(Layer.succeedContext(one))
        )
      )
      yield* Effect.provideContext(Ping.enqueue(), two)
      yield* Effect.provideContext(Ping.enqueue(), one)
      yield* until("the one is done", Effect.map(value("select count(*)::int from one.finished"), (n) => n === 1))
      assert.strictEqual(yield* value("select count(*)::int from two.ready"), 1)
    })))
})

describe("without a database", () => {
  const nowhere = PgClient.layer({ url: Redacted.make("postgresql://postgres@127.0.0.1:1/nowhere") })

  it.live("a queue that is told to fail, fails with what the driver says", () =>
    Effect.gen(function*() {
      const begun = yield* now
      const error = yield* failureOf(JobQueue.layer({ onUnavailable: "fail" }).pipe(Layer.provide(nowhere)))
      assert.strictEqual(error._tag, "SqlError")
      assert.isBelow((yield* now) - begun, 5000)
    }))

  it.live("a queue that waits can be told to stop waiting", () =>
    Effect.gen(function*() {
      const starting = yield* Effect.forkChild(
        Effect.scoped(Layer.build(JobQueue.layer().pipe(Layer.provide(nowhere))))
      )
      const begun = yield* now
      yield* until("it has tried for a while", Effect.map(now, (at) => at - begun > 500))
      assert.isUndefined(starting.pollUnsafe())
      yield* Fiber.interrupt(starting)
      assert.isBelow((yield* now) - begun, 5000)
    }))

  it.live("a worker waits until connections are accepted, and then works", () =>
    Effect.gen(function*() {
      const server = yield* ownServer()
      yield* Effect.promise(() => server.pgCtl(["stop", "-m", "immediate"]))
      yield* Effect.scoped(Effect.gen(function*() {
        const worker = yield* Effect.forkChild(running(
          Layer.effectDiscard(Ping.enqueue()).pipe(
            Layer.provide(Worker.layer({ jobs: [Ping] })),
            Layer.provide(handlers),
            Layer.provide(JobQueue.layer()),
            Layer.provide(PgClient.layer({ url: Redacted.make(server.url) }))
          )
        ))
        const begun = yield* now
        yield* until("it has tried for a while", Effect.map(now, (at) => at - begun > 1000))
        assert.isUndefined(worker.pollUnsafe())
        yield* Effect.promise(() => server.pgCtl(["start"]))
        yield* Fiber.join(worker)
        const sql = yield* PgClient.make({ url: Redacted.make(server.url), maxConnections: 1 })
        yield* until(
          "the job is done",
          Effect.map(sql<{ n: number }>`select count(*)::int as n from pgqueue.finished`, ([row]) => row?.n === 1)
        )
      }))
    }).pipe(Effect.provide(Reactivity.layer)))
})
