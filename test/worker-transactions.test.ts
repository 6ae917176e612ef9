/** Enqueue inside a transaction: the job is there if and only if it commits, and nobody hears of it before. */
import { PgClient } from "@effect/sql-pg"
import { assert, describe, it } from "@effect/vitest"
import { Context, Deferred, Effect, Fiber, Layer, Queue, Redacted, Schema } from "effect"
import { SqlClient } from "effect/sql"
import * as Database from "../src/Database.ts"
import { Job, Worker } from "../src/index.ts"
import { clientLayer, makeDatabase } from "./support/database.ts"
import { Ledger } from "./support/ledger.ts"
import { long } from "./support/long.ts"
import { allInPlace, assertRows, rows, running, untilAllEnded, untilValue, value, withQueue } from "./support/queue.ts"

class Note extends Job.make("note", { payload: { n: Schema.Number } }) {}

const NoteHandler = Note.toLayer(({ n }) => Effect.flatMap(Ledger, ({ record }) => record("start", String(n))))

class Undo extends Schema.TaggedError<Undo>()("Undo", {}) {}

/** What a stranger hears on the queue's channel, from a session of its own. */
const eavesdrop = Effect.gen(function*() {
  const sql = yield* Effect.map(
    Layer.build(Layer.fresh(clientLayer({ maxConnections: 1 }))),
    (context) => Context.get(context, PgClient.PgClient)
  )
  return yield* sql.listen(Database.channelOf("pgqueue"))
})

describe("enqueue inside sql.withTransaction", () => {
  const total = long ? 20_000 : 6000

  it.live(`counts exactly: ${total} enqueues, 30 % rolled back, 10 % in a savepoint that is`, () =>
    withQueue(
      Effect.gen(function*() {
        const sql = yield* SqlClient.SqlClient
        yield* running(Worker.layer({ jobs: [Note], concurrency: 50 }).pipe(Layer.provide(NoteHandler)))
        const committed: Array<string> = []
        /** Ten numbers a transaction: 0, 1 and 2 of ten transactions roll back, and one enqueue of the others does. */
        const transaction = Effect.fnUntraced(function*(t: number) {
          const ids: Array<string> = []
          yield* sql.withTransaction(Effect.gen(function*() {
            for (let i = 0; i < 10; i++) {
              const enqueue = Effect.map(Note.enqueue({ n: t * 10 + i }), ({ id }) => id)
              // 10 % of all: every one of these is among the transactions that commit.
              if (t % 7 < 1 && t % 10 >= 3 || i === 4) {
                yield* Effect.ignore(sql.withTransaction(Effect.andThen(enqueue, Effect.fail(new Undo()))))
              } else ids.push(yield* enqueue)
            }
            if (t % 10 < 3) return yield* new Undo()
          })).pipe(Effect.tap(() => Effect.sync(() => committed.push(...ids))), Effect.ignore)
        })
        yield* Effect.forEach(Array.from({ length: total / 10 }, (_, t) => t), transaction, { concurrency: 16 })
        assert.isAbove(committed.length, total / 2)
        yield* untilAllEnded({ within: 120_000 })

        const started = (yield* rows<{ job: string }>("select job::text from ledger order by 1")).map(({ job }) => job)
        assert.deepStrictEqual(started, committed.toSorted())
        yield* allInPlace
      }),
      { pool: { maxConnections: 16 } }
    ), 240_000)

  it.live("wakes nobody and is claimed by nobody before the commit", () =>
    withQueue(Effect.gen(function*() {
      const sql = yield* SqlClient.SqlClient
      const heard = yield* eavesdrop
      yield* running(Worker.layer({ jobs: [Note], pollInterval: 50 }).pipe(Layer.provide(NoteHandler)))
      const enqueued = yield* Deferred.make<void>()
      const commit = yield* Deferred.make<void>()
      const transaction = yield* Effect.forkChild(sql.withTransaction(Effect.gen(function*() {
        yield* Note.enqueue({ n: 1 })
        yield* sql.withTransaction(Note.enqueue({ n: 2 }))
        yield* Deferred.succeed(enqueued, undefined)
        yield* Deferred.await(commit)
      })))
      yield* Deferred.await(enqueued)
      // A job that is committed later, and is done: whatever the transaction could have woken would be done as well.
      const { id } = yield* Note.enqueue({ n: 3 })
      yield* untilValue("select count(*)::int from pgqueue.finished where id = $1::uuid", 1, { params: [id] })
      yield* rows("select pg_notify($1, 'end')", [Database.channelOf("pgqueue")])
      let before = 0
      while ((yield* Queue.take(heard)).payload !== "end") before++
      assert.isAtMost(before, 1, "one for the job outside the transaction")
      assert.strictEqual(yield* value("select count(*)::int from ledger"), 1)

      yield* Deferred.succeed(commit, undefined)
      yield* Fiber.join(transaction)
      assert.match((yield* Queue.take(heard)).payload, /default/)
      yield* untilValue("select count(*)::int from ledger", 3)
    })))

  it.live("wakes nobody when it rolls back", () =>
    withQueue(Effect.gen(function*() {
      const sql = yield* SqlClient.SqlClient
      const heard = yield* eavesdrop
      for (let n = 0; n < 20; n++) {
        yield* Effect.flip(sql.withTransaction(Effect.andThen(Note.enqueue({ n }), Effect.fail(new Undo()))))
        yield* sql.withTransaction(
          Effect.ignore(sql.withTransaction(Effect.andThen(Note.enqueueAll([{ n }, { n }]), Effect.fail(new Undo()))))
        )
      }
      yield* rows("select pg_notify($1, 'end')", [Database.channelOf("pgqueue")])
      assert.strictEqual((yield* Queue.take(heard)).payload, "end")
      yield* assertRows("select * from pgqueue.job", [])
    })))

  it.live("announces itself once, when it has committed", () =>
    withQueue(Effect.gen(function*() {
      const sql = yield* SqlClient.SqlClient
      const heard = yield* eavesdrop
      yield* sql.withTransaction(Effect.andThen(Note.enqueueAll([{ n: 1 }, { n: 2 }]), Note.enqueue({ n: 3 })))
      assert.strictEqual((yield* Queue.take(heard)).payload, "0 default")
      yield* rows("select pg_notify($1, 'end')", [Database.channelOf("pgqueue")])
      assert.strictEqual((yield* Queue.take(heard)).payload, "end")
    })))
})

describe("enqueue inside a transaction of another client", () => {
  const elsewhere = Effect.map(
    Layer.build(Layer.fresh(clientLayer({ maxConnections: 2 }))),
    (context) => Context.get(context, SqlClient.SqlClient)
  )

  it.live("is refused", () =>
    withQueue(Effect.gen(function*() {
      const other = yield* elsewhere
      const one = yield* Effect.flip(other.withTransaction(Note.enqueue({ n: 1 })))
      const all = yield* Effect.flip(other.withTransaction(Note.enqueueAll([{ n: 1 }])))
      for (const error of [one, all]) {
        assert.deepInclude(error, { _tag: "EnqueueError", kind: "note", reason: "ForeignTransaction" })
      }
      // The right client inside the wrong one is right.
      const sql = yield* SqlClient.SqlClient
      yield* other.withTransaction(sql.withTransaction(Note.enqueue({ n: 2 })))
      yield* assertRows("select payload ->> 'n' as n from pgqueue.job", [{ n: "2" }])
    })))

  it.live("is refused in a fiber that the transaction forks", () =>
    withQueue(Effect.gen(function*() {
      const other = yield* elsewhere
      const error = yield* Effect.flip(other.withTransaction(
        Effect.flatMap(Effect.forkChild(Note.enqueue({ n: 1 })), Fiber.join)
      ))
      assert.deepInclude(error, { reason: "ForeignTransaction" })
    })))

  it.live("of another database is refused, and allowed when asked for", () =>
    withQueue(
      Effect.gen(function*() {
        const { url } = yield* makeDatabase()
        const other = Context.get(
          yield* Layer.build(PgClient.layer({ url: Redacted.make(Redacted.value(url)), maxConnections: 1 })),
          SqlClient.SqlClient
        )
        yield* Effect.flip(other.withTransaction(Effect.andThen(Note.enqueue({ n: 1 }), Effect.fail(new Undo()))))
        // It is not part of that transaction, as the option says.
        yield* assertRows("select payload ->> 'n' as n from pgqueue.job", [{ n: "1" }])
      }),
      { queue: { allowForeignTransaction: true } }
    ))
})
