/** A job that comes alone is announced by the statement that inserts it, and one that cannot be is no less enqueued. */
import { PgClient } from "@effect/sql-pg"
import { assert, describe, it } from "@effect/vitest"
import { Context, Duration, Effect, Exit, Layer, Queue, Schema } from "effect"
import { SqlClient } from "effect/sql"
import * as Database from "../src/Database.ts"
import { Job, Worker } from "../src/index.ts"
import { clientLayer, ownServer } from "./support/database.ts"
import { assertRows, counting, rows, running, until, value, withQueue } from "./support/queue.ts"

class Note extends Job.make("note", { payload: { n: Schema.Int } }) {}

/** What a stranger hears on the queue's channel, and who said it: the insert, or the session that announces what is marked. */
const eavesdrop = Effect.gen(function*() {
  const sql = yield* Effect.map(
    Layer.build(Layer.fresh(clientLayer({ maxConnections: 1 }))),
    (context) => Context.get(context, PgClient.PgClient)
  )
  const heard = yield* sql.listen(Database.channelOf("pgqueue"))
  // Two that come together are announced apart.
  yield* Note.enqueueAll([{ n: 0 }, { n: 0 }])
  const { processId: notifier } = yield* Queue.take(heard)
  const alone = Effect.sleep(5)
  yield* alone
  return Effect.gen(function*() {
    const { payload, processId } = yield* Queue.take(heard)
    yield* alone
    return [payload, processId === notifier ? "notify" : "insert"]
  })
})

describe("an enqueue", () => {
  it.live("that is alone announces itself, and is announced apart where a worker of this process works its queue", () =>
    Effect.scoped(Effect.gen(function*() {
      // NOTIFY has one lock for all databases of a server, and an insert that does not get it soon goes without.
      const server = yield* ownServer({ version: "18" })
      yield* withQueue(
        Effect.gen(function*() {
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
        }),
        { serverUrl: server.url }
      )
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

  it.live("does not wait for a stranger whose NOTIFY is being committed, and is not announced that way again", () =>
    Effect.scoped(Effect.gen(function*() {
      const server = yield* ownServer({ version: "18" })
      yield* withQueue(
        Effect.gen(function*() {
          // The stranger waits for a standby that is not there, and NOTIFY has one lock for all databases of a server.
          yield* rows(
            `create function stranger() returns void language plpgsql as $$ begin
               perform set_config('synchronous_commit', 'on', true), pg_notify('strangers', 'x');
               insert into public.strangers values (1);
             end $$`
          )
          yield* rows("create table public.strangers (n int)")
          yield* counting("insert", "job")
          yield* rows("alter system set synchronous_standby_names = 'nobody'")
          yield* rows("select pg_reload_conf()")
          // Not all processes of the server have heard of it yet: again, until one waits.
          yield* Effect.forkScoped(Effect.forever(rows("select stranger()::text")))
          const waits = "select count(*)::int from pg_stat_activity where wait_event = 'SyncRep'"
          yield* until("the stranger waits", Effect.map(value(waits), (count) => count === 1))
          const times = yield* Effect.forEach([1, 2, 3, 4, 5], (n) => Effect.timed(Note.enqueue({ n })))
          assert.isBelow(Math.max(...times.map(([took]) => Duration.toMillis(took))), 4000)
          assert.strictEqual(yield* value("select count(*)::int from pgqueue.ready"), 5)
          // Who goes by itself goes after what could not be said: the first was tried twice, no other.
          assert.strictEqual(yield* value("select last_value::int from public.tries"), 6)
        }).pipe(Effect.ensuring(Effect.orDie(
          Effect.andThen(rows("alter system reset synchronous_standby_names"), rows("select pg_reload_conf()"))
        ))),
        { serverUrl: server.url, pool: { startupParameters: { synchronous_commit: "local" } } }
      )
    })))

  // The first commit is given up while it waits for the standby; then the job is there, and would not be after a fail-over.
  it.live(
    "is not acknowledged before a synchronous standby has it, however often it is sent",
    () =>
      Effect.scoped(Effect.gen(function*() {
        const server = yield* ownServer({ version: "18" })
        yield* withQueue(
          Effect.gen(function*() {
            class Keyed extends Job.make("keyed", { unique: () => "one" }) {}
            const id = "0190b5a0-0000-7000-8000-000000000001"
            const standby = (name: string) =>
              Effect.andThen(
                rows(`alter system set synchronous_standby_names = '${name}'`),
                rows("select pg_reload_conf()")
              )
            yield* standby("nobody")
            yield* until(
              "the server has heard of it",
              Effect.map(rows("show synchronous_standby_names"), ([row]) => row.synchronous_standby_names === "nobody")
            )
            yield* Effect.sleep(200)
            const ways = [Note.enqueue({ n: 1 }), Note.enqueue({ n: 2 }, { id }), Keyed.enqueue()]
            const exits = yield* Effect.forEach(ways, (way) => Effect.exit(way), { concurrency: "unbounded" })
            // They are there, and nobody has been told so.
            assert.strictEqual(yield* value("select count(*)::int from pgqueue.job"), 3)
            assert.deepStrictEqual(exits.map(Exit.isSuccess), [false, false, false])
            yield* standby("")
            assert.strictEqual((yield* Note.enqueue({ n: 2 }, { id })).status, "existing")
          }).pipe(Effect.ensuring(Effect.orDie(
            Effect.andThen(rows("alter system reset synchronous_standby_names"), rows("select pg_reload_conf()"))
          ))),
          { serverUrl: server.url }
        )
      })),
    60_000
  )
})
