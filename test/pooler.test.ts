/** Behind a pooler the queue does without what that does not keep, and says so. */
import { PgClient } from "@effect/sql-pg"
import { assert, describe, it } from "@effect/vitest"
import { Context, Effect, Exit, Layer, Logger, Queue, Redacted, Schema } from "effect"
import { ConnectionError, SqlError, UnknownError } from "effect/sql/SqlError"
import * as Database from "../src/Database.ts"
import { Job, JobQueue, Worker } from "../src/index.ts"
import type { Options } from "../src/JobQueue.ts"
import * as Reach from "../src/Reach.ts"
import { makeDatabase } from "./support/database.ts"
import { Ledger } from "./support/ledger.ts"
import { makePooling } from "./support/pooling.ts"
import {
  allInPlace,
  databaseUrl,
  now,
  phases,
  quantile,
  running,
  until,
  untilAllEnded,
  untilValue,
  withQueue
} from "./support/queue.ts"

class Note extends Job.make("note", { payload: { n: Schema.Number } }) {}
const NoteHandler = Note.toLayer(() => Effect.flatMap(Ledger, ({ record }) => record("start")))

/** A queue with a client of its own at this address, and what it warns of. */
const queueAt = Effect.fnUntraced(function*(url: string, options?: Options, prepare?: boolean) {
  const warnings: Array<string> = []
  const logger = Logger.make(({ logLevel, message }) => void (logLevel === "Warn" && warnings.push(String(message))))
  const context = yield* Layer.build(Layer.fresh(
    JobQueue.layer(options).pipe(
      Layer.provide(PgClient.layer({ url: Redacted.make(url), applicationName: "pooled", prepare })),
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
          assert.match(warnings[0]!, /give the PgClient prepare: false/)
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

  it.live("is not told to prepare nothing when it does not", () =>
    withQueue(Effect.gen(function*() {
      const proxy = yield* makePooling(yield* databaseUrl, { settings: "dropped", listen: "deaf" })
      const { warnings } = yield* queueAt(proxy.url, {}, false)
      assert.lengthOf(warnings, 1)
      assert.notInclude(warnings[0], "prepare:")
    })), 60_000)

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
        assert.notInclude(warnings[0], "prepare:")
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

  it("is for a while, however a client says that a connection was lost", () => {
    const unknown = (cause: unknown) =>
      new SqlError({ reason: new UnknownError({ cause, message: "Failed to execute statement", operation: "query" }) })
    for (
      const cause of [
        Object.assign(new Error("read"), { code: "ECONNRESET" }),
        new Error("Connection terminated unexpectedly"),
        new Error("Client has encountered a connection error and is not queryable"),
        Object.assign(new Error("database is not accepting commands that assign new transaction IDs"), {
          code: "54000"
        })
      ]
    ) {
      assert.isTrue(Database.isTransient(unknown(cause)), cause.message)
      assert.isFalse(Database.isUnstorable(unknown(cause)), cause.message)
    }
    for (const cause of [new Error("a bigint too large"), Object.assign(new Error("index row"), { code: "54000" })]) {
      assert.isFalse(Database.isTransient(unknown(cause)), cause.message)
      assert.isTrue(Database.isUnstorable(unknown(cause)), cause.message)
    }
  })
})
