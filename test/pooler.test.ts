/** Behind a pooler the queue does without what that does not keep, and says so. */
import { PgClient } from "@effect/sql-pg"
import * as PgConnection from "@effect/sql-pg/PgConnection"
import { assert, describe, it } from "@effect/vitest"
import { Context, Effect, Exit, Fiber, Layer, Logger, Queue, Redacted, Schema, Scope } from "effect"
import { ConnectionError, SqlError } from "effect/sql/SqlError"
import * as Database from "../src/Database.ts"
import { Job, JobQueue, Worker } from "../src/index.ts"
import type { Options } from "../src/JobQueue.ts"
import * as Reach from "../src/Reach.ts"
import { Step } from "./programs/jobs.ts"
import { makeDatabase } from "./support/database.ts"
import { Ledger } from "./support/ledger.ts"
import { makePgBouncer, pgbouncerBinary } from "./support/pgbouncer.ts"
import { makePooling } from "./support/pooling.ts"
import { startWorker } from "./support/processes.ts"
import {
  allInPlace,
  databaseUrl,
  databaseWithLedger,
  endedTwice,
  now,
  phases,
  quantile,
  rows,
  running,
  until,
  untilAllEnded,
  untilValue,
  value,
  watchEnds,
  withQueue
} from "./support/queue.ts"

class Note extends Job.make("note", { payload: { n: Schema.Number } }) {}
const NoteHandler = Note.toLayer(() => Effect.flatMap(Ledger, ({ record }) => record("start")))

/** A queue with a client of its own at this address, and what it warns of. */
const queueAt = Effect.fnUntraced(function*(url: string, options?: Options) {
  const warnings: Array<string> = []
  const logger = Logger.make(({ logLevel, message }) => void (logLevel === "Warn" && warnings.push(String(message))))
  const context = yield* Layer.build(Layer.fresh(
    JobQueue.layer(options).pipe(
      Layer.provide(PgClient.layer({ url: Redacted.make(url), applicationName: "pooled" })),
      Layer.provide(Logger.layer([logger]))
    )
  ))
  return { queue: Context.get(context, JobQueue), context, warnings }
})

const worker = (context: Context.Context<JobQueue>, pollInterval: string) =>
  running(
    // Sound: the tests write it as a duration.
    Worker.layer({ jobs: [Note], pollInterval: pollInterval as "1 second" }).pipe(
      Layer.provide(NoteHandler),
      Layer.provide(Layer.succeedContext(context))
    )
  )

/** How many milliseconds it takes from an enqueue on another queue to the handler. */
const latency = Effect.gen(function*() {
  const before = yield* phases("start")
  const begun = yield* now
  yield* Note.enqueue({ n: 0 })
  yield* until("it is started", Effect.map(phases("start"), (n) => n > before), { every: 2 })
  return (yield* now) - begun
})

const aloneAndInBulk = (context: Context.Context<JobQueue>) =>
  Effect.gen(function*() {
    yield* Effect.provideContext(Note.enqueue({ n: 1 }), context)
    yield* Effect.provideContext(Note.enqueueAll([{ n: 2 }, { n: 3 }]), context)
    yield* Effect.provideContext(Note.enqueueAll(Array.from({ length: 1500 }, (_, n) => ({ n }))), context)
    yield* Effect.provideContext(Note.enqueue({ n: 4 }, { unique: "four" }), context)
  })
const enqueued = 1504

describe("a client whose sessions do not keep what they are told", () => {
  for (const settings of ["refused", "dropped"] as const) {
    it.live(
      `works by polling, prepares nothing and warns once: settings ${settings}`,
      () =>
        withQueue(Effect.gen(function*() {
          const proxy = yield* makePooling(yield* databaseUrl, { settings, listen: "deaf" })
          const { context, queue, warnings } = yield* queueAt(proxy.url)
          assert.strictEqual(queue.mode, "poll")
          yield* worker(context, "200 millis")
          yield* aloneAndInBulk(context)
          yield* untilAllEnded()
          assert.strictEqual(yield* phases("start"), enqueued)
          assert.strictEqual(warnings.length, 1, warnings.join("\n"))
          assert.match(warnings[0]!, /transaction pooler.*found by polling.*directUrl/)
          assert.notInclude(warnings[0], new URL(proxy.url).password)
          const sent = proxy.sent().join("\n")
          // Not printed when it fails: it is all that was said.
          assert.isFalse(sent.includes("LISTEN \"effect_pgqueue_pgqueue\""), "it listens")
          // A Parse message with a name.
          assert.isFalse(/P\0\0..[a-z_0-9]+\0(begin|select|with|insert)/is.test(sent), "it prepares")
          assert.isFalse(/\0set\s/i.test(sent), "it sets what a session keeps")
          yield* allInPlace
        })),
      60_000
    )
  }

  it.live("listens, where that works all the same", () =>
    withQueue(Effect.gen(function*() {
      const proxy = yield* makePooling(yield* databaseUrl, { settings: "refused" })
      const { context, queue, warnings } = yield* queueAt(proxy.url)
      assert.strictEqual(queue.mode, "listen")
      yield* worker(context, "30 seconds")
      yield* untilValue("select count(*)::int from pgqueue.worker", 1)
      yield* Effect.sleep(300)
      assert.isBelow(yield* latency, 5000)
      assert.deepStrictEqual(warnings, [])
    })), 60_000)
})

describe("a client that cannot hear", () => {
  for (const listen of ["deaf", "refused"] as const) {
    it.live(`works by polling, with sessions of its own: LISTEN ${listen}`, () =>
      withQueue(Effect.gen(function*() {
        const proxy = yield* makePooling(yield* databaseUrl, { listen })
        const { context, queue, warnings } = yield* queueAt(proxy.url)
        assert.strictEqual(queue.mode, "poll")
        yield* worker(context, "200 millis")
        yield* aloneAndInBulk(context)
        yield* untilAllEnded()
        assert.strictEqual(warnings.length, 1, warnings.join("\n"))
        assert.match(warnings[0]!, /hears nothing.*directUrl/)
        // Others hear what it says.
        yield* Effect.scoped(Effect.gen(function*() {
          const client = yield* PgClient.PgClient
          const heard = yield* client.listen("effect_pgqueue_pgqueue")
          yield* Effect.provideContext(Note.enqueueAll([{ n: 7 }]), context)
          assert.match((yield* Queue.take(heard)).payload, /default/)
        }))
      })), 60_000)
  }
})

describe("the server's own address", () => {
  it.live("makes a queue behind a pooler hear at once", () =>
    withQueue(Effect.gen(function*() {
      const url = yield* databaseUrl
      const proxy = yield* makePooling(url, { settings: "refused", listen: "deaf" })
      const { context, queue, warnings } = yield* queueAt(proxy.url, { directUrl: Redacted.make(url) })
      assert.strictEqual(queue.mode, "listen")
      yield* worker(context, "30 seconds")
      yield* untilValue("select count(*)::int from pgqueue.worker", 1)
      yield* Effect.sleep(300)
      assert.isBelow(yield* latency, 5000)
      assert.deepStrictEqual(warnings, [])
      const sent = proxy.sent().join("\n")
      assert.isTrue(sent.includes("\"pgqueue\".ready"), "jobs go through the pooler")
      assert.isFalse(sent.includes("beat_at = clock_timestamp() where id = $1"), "a heartbeat does")
    })), 60_000)

  it.live("of another database is found out", () =>
    withQueue(Effect.gen(function*() {
      const url = yield* databaseUrl
      const other = yield* makeDatabase()
      const proxy = yield* makePooling(url, { settings: "refused", listen: "deaf" })
      const { context, queue, warnings } = yield* queueAt(proxy.url, { directUrl: other.url })
      assert.strictEqual(queue.mode, "poll")
      assert.strictEqual(warnings.length, 1)
      assert.match(warnings[0]!, /directUrl does not hear.*same database/)
      assert.notInclude(warnings[0], new URL(url).password)
      yield* worker(context, "200 millis")
      yield* Note.enqueue({ n: 0 })
      yield* untilAllEnded()
    })), 60_000)

  it.live("that is none is refused", () =>
    withQueue(Effect.gen(function*() {
      const url = yield* databaseUrl
      for (const directUrl of ["", "localhost:5432", "https://localhost"]) {
        const exit = yield* Effect.exit(queueAt(url, { directUrl: Redacted.make(directUrl) }))
        assert.isTrue(Exit.isFailure(exit))
        assert.match(String(exit), /directUrl must be/)
      }
    })), 60_000)
})

describe("a client that reaches the server itself", () => {
  it.live("finds out in a few milliseconds", () =>
    withQueue(Effect.gen(function*() {
      const url = yield* databaseUrl
      const client = yield* PgClient.PgClient
      const took: Array<number> = []
      for (let round = 0; round < 20; round++) {
        const begun = yield* now
        const reach = yield* Reach.find(client, undefined)
        took.push((yield* now) - begun)
        assert.deepStrictEqual([reach.pools.keepsSettings, reach.sessions.keepsSettings, reach.listens], [
          true,
          true,
          true
        ])
      }
      assert.isBelow(quantile(took, 0.5), 200, took.map(Math.round).join(" "))
      const { queue, warnings } = yield* queueAt(url)
      assert.strictEqual(queue.mode, "listen")
      assert.isTrue(queue.internal.database.keepsSettings)
      assert.deepStrictEqual(warnings, [])
    })), 60_000)
})

describe("an error of a pooler", () => {
  const failing = (message: string, fields: object = {}) =>
    new SqlError({
      reason: new ConnectionError({
        cause: Object.assign(new Error(message), { code: "08P01", ...fields }),
        message: "PgConnection: Failed to connect",
        operation: "connect"
      })
    })

  it("is for a while, unless it is for good", () => {
    for (
      const message of [
        "query_wait_timeout",
        "server conn crashed?",
        "server login has been failing, try again later (server_login_retry)",
        "no more connections allowed (max_client_conn)",
        "client_login_timeout (server down)",
        "idle transaction timeout",
        "the database system is starting up"
      ]
    ) {
      assert.isTrue(Database.isTransient(failing(message)), message)
      assert.isTrue(Database.isConnectionLoss(failing(message)), message)
    }
    for (
      const message of [
        "unsupported startup parameter: plan_cache_mode",
        "database \"nope\" does not exist",
        "no such database: nope",
        "SASL authentication failed",
        "password authentication failed"
      ]
    ) assert.isFalse(Database.isTransient(failing(message)), message)
    // The server's own: what was sent is wrong, and remains so.
    assert.isFalse(Database.isTransient(failing("invalid message format", { routine: "pq_getmsgend" })))
    // What Node says of a socket is no SQLSTATE, though it has five letters.
    const cause = Object.assign(new Error("write EPIPE"), { code: "EPIPE" })
    const lost = new SqlError({ reason: new ConnectionError({ cause, message: "Socket error", operation: "query" }) })
    assert.isTrue(Database.isConnectionLoss(lost))
  })
})

/** Sessions of these programs on the server, whoever is in between. */
const sessions = "application_name = any ($1::text[]) and datname = current_database()"

/** Fails when something is left behind in the sessions that others are lent next, or a job is in no place. */
const nothingLeft = Effect.fnUntraced(function*(names: ReadonlyArray<string>) {
  yield* untilValue(
    `select count(*)::int from pg_stat_activity where ${sessions} and state like 'idle in transaction%'`,
    0,
    { params: [names] }
  )
  yield* untilValue(
    `select count(*)::int from pg_locks where locktype = 'advisory'
     and database = (select oid from pg_database where datname = current_database())`,
    0
  )
  assert.deepStrictEqual(yield* endedTwice, [])
  yield* allInPlace
})

const warningsOf = (output: string) => output.split("\n").filter((line) => line.includes("transaction pooler")).length

const timing = { heartbeat: 500, lease: 5000, rescueInterval: 500 }

/** Enqueues until it is told to stop. */
const producing = Effect.fnUntraced(function*(context: Context.Context<JobQueue>) {
  const acknowledged: Array<string> = []
  let going = true
  let refused = 0
  const fiber = yield* Effect.forkChild(Effect.forEach([1, 2, 3, 4], () =>
    Effect.gen(function*() {
      while (going) {
        const exit = yield* Effect.exit(Effect.provideContext(
          Step.enqueueAll(Array.from({ length: 20 }, () => ({ millis: 2 }))),
          context
        ))
        if (Exit.isSuccess(exit)) acknowledged.push(...exit.value.map(({ id }) => id))
        else refused++
        yield* Effect.sleep(50)
      }
    }), { concurrency: "unbounded" }))
  return {
    acknowledged,
    refused: () => refused,
    stop: Effect.andThen(Effect.sync(() => void (going = false)), Fiber.join(fiber))
  }
})

/** Fails unless all of these have completed. */
const nothingLost = Effect.fnUntraced(function*(acknowledged: ReadonlyArray<string>) {
  const finished = new Set(
    (yield* rows<{ id: string }>("select id::text from pgqueue.finished where status = 'completed'"))
      .map(({ id }) => id)
  )
  assert.deepStrictEqual(acknowledged.filter((id) => !finished.has(id)), [])
})

const completed = value("select count(*)::int from pgqueue.finished")

/** How many milliseconds it takes until jobs end again. */
const recovery = Effect.fnUntraced(function*(what: string) {
  const before = yield* completed
  return yield* until(what, Effect.map(completed, (n) => n > before + 20), { within: 15_000 })
})

/** Two workers and a producer behind a pooler, under load. */
const underLoad = Effect.fnUntraced(function*(settings?: Parameters<typeof makePgBouncer>[1]) {
  const names = ["one", "two"]
  const url = yield* databaseUrl
  const pooler = yield* makePgBouncer(url, settings)
  yield* watchEnds
  const workers = yield* Effect.forEach(
    names,
    (name) =>
      startWorker({ url: pooler.through(url), ledgerUrl: url, name, concurrency: 10, ...timing, lease: 15_000 }),
    { concurrency: 2 }
  )
  const { context } = yield* queueAt(pooler.through(url))
  const { acknowledged, refused, stop } = yield* producing(context)
  yield* recovery("it is under load")
  /** The producer stops, all jobs end, once each, and the workers are still there. */
  const stopsWell = Effect.gen(function*() {
    yield* stop
    yield* untilAllEnded({ within: 30_000 })
    yield* Effect.logInfo("acknowledged", acknowledged.length, "refused", refused())
    for (const worker of workers) assert.isTrue(worker.running(), worker.output())
    yield* nothingLost(acknowledged)
    yield* nothingLeft([...names, "pooled"])
  })
  return { context, pooler, stopsWell, url }
})

describe.skipIf(pgbouncerBinary === undefined)("PgBouncer in transaction mode", () => {
  it.live("loses nothing: workers that die, sessions that are terminated", () =>
    Effect.gen(function*() {
      const names = ["first", "second", "third"]
      const url = yield* databaseUrl
      const pooler = yield* makePgBouncer(url)
      const workers = yield* Effect.forEach(
        names,
        (name) => startWorker({ url: pooler.through(url), ledgerUrl: url, name, concurrency: 20, ...timing }),
        { concurrency: 3 }
      )
      yield* watchEnds
      const { context } = yield* queueAt(pooler.through(url))
      const jobs = Array.from({ length: 2000 }, () => ({ millis: 5 }))
      const ids = yield* Effect.provideContext(Step.enqueueAll(jobs), context)
      yield* until("it is under load", Effect.map(completed, (n) => n > 300))
      yield* workers[0]!.kill("SIGKILL")
      const terminated = yield* value(
        `select count(pg_terminate_backend(pid))::int from pg_stat_activity where ${sessions}`,
        [[...names, "pooled"]]
      )
      assert.isAtLeast(terminated, 1)
      yield* untilAllEnded({ within: 30_000 })
      yield* nothingLost(ids.map(({ id }) => id))
      yield* nothingLeft([...names, "pooled"])
      assert.deepStrictEqual(workers.map(({ output }) => warningsOf(output())), [1, 1, 1])
      for (const worker of workers.slice(1)) assert.isTrue(worker.running(), worker.output())
    }).pipe(Effect.scoped, Effect.provide(databaseWithLedger())), 90_000)

  it.live("is as fast with the server's own address", () =>
    withQueue(Effect.gen(function*() {
      const url = yield* databaseUrl
      const pooler = yield* makePgBouncer(url)
      const measured: Array<number> = []
      for (const at of [url, pooler.through(url)]) {
        const { context, queue, warnings } = yield* queueAt(at, { directUrl: Redacted.make(url) })
        const scope = yield* Scope.make()
        yield* Scope.provide(worker(context, "30 seconds"), scope)
        yield* untilValue("select count(*)::int from pgqueue.worker", 1)
        yield* Effect.sleep(300)
        const took: Array<number> = []
        for (let round = 0; round < 30; round++) took.push(yield* latency)
        measured.push(quantile(took, 0.5))
        yield* Scope.close(scope, Exit.void)
        assert.strictEqual(queue.mode, "listen")
        assert.deepStrictEqual(warnings, [])
      }
      yield* Effect.logInfo("milliseconds, direct and through the pooler", measured)
      // A poll would take seconds.
      assert.isBelow(measured[1]!, 200)
    })), 60_000)

  it.live("may pause, read its settings again, crash and come back under load", () =>
    withQueue(Effect.gen(function*() {
      const { pooler, stopsWell } = yield* underLoad()
      yield* pooler.pause
      yield* Effect.sleep(4000)
      yield* pooler.resume
      const took = [yield* recovery("after a pause")]
      yield* pooler.reload
      took.push(yield* recovery("after a reload"))
      yield* pooler.kill
      yield* Effect.sleep(500)
      yield* pooler.start
      took.push(yield* recovery("after a crash"))

      assert.isBelow(Math.max(...took), 6000, took.map(Math.round).join(" "))
      yield* stopsWell
    })), 90_000)

  it.live("may have no connection to lend for a while", () =>
    withQueue(Effect.gen(function*() {
      const { context, pooler, stopsWell, url } = yield* underLoad({
        default_pool_size: 3,
        query_wait_timeout: 1,
        server_idle_timeout: 1
      })
      // Somebody else has taken all of them.
      const strangers = yield* Effect.forEach([1, 2, 3], () =>
        Effect.forkChild(Effect.ignoreCause(Effect.scoped(Effect.gen(function*() {
          const session = yield* PgConnection.make({ url: Redacted.make(pooler.through(url)), prepare: false })
          yield* session.query("begin")
          yield* Effect.sleep(2500)
          yield* session.query("commit")
        })))))
      yield* Effect.forEach(strangers, Fiber.join)
      assert.isBelow(yield* recovery("when they are given back"), 6000)
      yield* stopsWell
      // Idle ones are closed under it.
      yield* Effect.sleep(1500)
      const last = yield* Effect.provideContext(Step.enqueue({ millis: 1 }), context)
      yield* untilAllEnded({ within: 10_000 })
      yield* nothingLost([last.id])
      assert.match(yield* pooler.log, /query_wait_timeout/)
    })), 90_000)
})
