/** A job that comes alone is announced by the statement that inserts it, and one that cannot be is no less enqueued. */
import { PgClient } from "@effect/sql-pg"
import { assert, describe, it } from "@effect/vitest"
import { Context, Effect, Exit, Layer, Queue, Schema } from "effect"
import { SqlClient } from "effect/sql"
import * as Database from "../src/Database.ts"
import { Job, Worker } from "../src/index.ts"
import { clientLayer, ownServer } from "./support/database.ts"
import { assertRows, rows, running, value, withQueue } from "./support/queue.ts"

class Note extends Job.make("note", { payload: { n: Schema.Int } }) {}

/** What a stranger hears on the queue's channel, and the statement that the session which said it has run last. */
const eavesdrop = Effect.gen(function*() {
  const sql = yield* Effect.map(
    Layer.build(Layer.fresh(clientLayer({ maxConnections: 1 }))),
    (context) => Context.get(context, PgClient.PgClient)
  )
  const heard = yield* sql.listen(Database.channelOf("pgqueue"))
  return Effect.gen(function*() {
    const { payload, processId } = yield* Queue.take(heard)
    const said = yield* value<string>("select query from pg_stat_activity where pid = $1::int4", [processId])
    return [payload, said.includes("insert into") ? "insert" : "notify"]
  })
})

describe("an enqueue", () => {
  it.live("that is alone announces itself, and is announced apart where a worker of this process works its queue", () =>
    withQueue(Effect.gen(function*() {
      const heard = yield* eavesdrop
      yield* Note.enqueue({ n: 1 })
      assert.deepStrictEqual(yield* heard, ["0 default", "insert"])
      yield* Note.enqueue({ n: 2 }, { queue: "mail", delay: 50 })
      assert.deepStrictEqual(yield* heard, ["50 mail", "insert"])
      yield* running(Worker.layer({ jobs: [Note] }).pipe(Layer.provide(Note.toLayer(() => Effect.void))))
      yield* Note.enqueue({ n: 3 })
      assert.deepStrictEqual(yield* heard, ["0 default", "notify"])
      yield* Note.enqueue({ n: 4 }, { queue: "mail" })
      assert.deepStrictEqual(yield* heard, ["0 mail", "insert"])
    })))

  it.live("goes through though nobody can be told: the server's queue of notifications is full", () =>
    Effect.scoped(Effect.gen(function*() {
      // PostgreSQL 17 and newer can be given a small one.
      const server = yield* ownServer({ version: "18", settings: { max_notify_queue_pages: 64 } })
      yield* withQueue(
        Effect.gen(function*() {
          const sql = yield* SqlClient.SqlClient
          const session = yield* sql.reserve
          for (const text of ["listen other", "begin", "select 1"]) {
            yield* session.executeUnprepared(text, [], undefined)
          }
          const fill = rows("select pg_notify('other', clock_timestamp() || repeat('x', 7900))::text")
          assert.isTrue(Exit.isFailure(yield* Effect.exit(Effect.forever(fill))))
          yield* Note.enqueue({ n: 1 })
          yield* assertRows("select payload from pgqueue.job", [{ payload: { n: 1 } }])
          yield* session.executeUnprepared("rollback", [], undefined)
        }),
        { serverUrl: server.url }
      )
    })))
})
