import { assert, it, layer } from "@effect/vitest"
import { Effect, Layer } from "effect"
import { SqlClient } from "effect/sql"
import { Job, Worker } from "../src/index.ts"
import { moveClock, withClock } from "./support/clock.ts"
import { databaseLayer, TestDatabase } from "./support/database.ts"
import { assertRows, running, untilAllEnded, untilValue, value } from "./support/queue.ts"

class Note extends Job.make("note") {}

layer(databaseLayer())("a test file's database", (it) => {
  it.effect("is fresh, its own, and on the version asked for", () =>
    Effect.gen(function*() {
      const sql = yield* SqlClient.SqlClient
      const { name } = yield* TestDatabase
      const [row] = yield* sql<{ database: string; tables: number; major: number }>`
        select
          current_database() as database,
          (select count(*)::int from pg_tables where schemaname = 'public') as tables,
          current_setting('server_version_num')::int / 10000 as major`
      assert.strictEqual(row?.database, name)
      assert.strictEqual(row?.tables, 0)
      // a server of somebody else's may have any version
      if (process.env["DATABASE_URL"] === undefined) {
        assert.strictEqual(row?.major, Number(process.env["PG_VERSION"] ?? 18))
      }
    }))
})

it.live("a database clock that was moved is the only one the queue knows", () =>
  withClock(Effect.gen(function*() {
    const hours = (column: string) =>
      value(`select round(extract(epoch from ${column} - clock_timestamp()) / 3600)::int from pgqueue.finished`)
    yield* moveClock(-3_600_000)
    const { id } = yield* Note.enqueue(undefined, { delay: "30 minutes" })
    yield* Note.enqueue()
    yield* running(
      Worker.layer({ jobs: [Note], pollInterval: 50 }).pipe(Layer.provide(Note.toLayer(() => Effect.void)))
    )
    yield* untilValue("select count(*)::int from pgqueue.finished", 1)
    yield* assertRows("select id::text from pgqueue.job", [{ id }])
    assert.strictEqual(yield* hours("enqueued_at"), -1)
    assert.strictEqual(yield* hours("started_at"), -1)
    yield* moveClock(3_600_000)
    yield* untilAllEnded()
  })))
