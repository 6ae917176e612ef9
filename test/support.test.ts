import { assert, layer } from "@effect/vitest"
import { Effect } from "effect"
import { SqlClient } from "effect/sql"
import { databaseLayer, TestDatabase } from "./support/database.ts"

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
