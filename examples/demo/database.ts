/** Where the demo runs: on the database at `DATABASE_URL`, or on a PostgreSQL of its own; in schemas of its own. */
import { PgClient } from "@effect/sql-pg"
import { Config, Context, Effect, Layer, Option, Redacted, Schema } from "effect"
import { SqlClient } from "effect/sql"
import { startPostgres } from "../../test/support/embedded.ts"
import * as jobs from "./jobs.ts"
import * as ledger from "./ledger.ts"
import { step, View } from "./view.ts"

/** Why the demo cannot go on, or did not go as it should. */
export class DemoFailed extends Schema.TaggedError<DemoFailed>()("DemoFailed", { message: Schema.String }) {}

export class DatabaseUrl extends Context.Service<DatabaseUrl, Redacted.Redacted>()(
  "effect-pgqueue/examples/demo/database/DatabaseUrl"
) {
  static readonly layer = Layer.effect(
    DatabaseUrl,
    Effect.gen(function*() {
      const given = yield* Config.option(Config.NonEmptyString("DATABASE_URL"))
      if (Option.isSome(given)) return Redacted.make(given.value)
      const server = yield* Effect.acquireRelease(
        step(
          "starting a PostgreSQL",
          Effect.tryPromise({
            try: () => startPostgres(),
            catch: (cause) => new DemoFailed({ message: String(cause) })
          }),
          ({ port, version }) => `started a PostgreSQL ${version} of its own on port ${port}`
        ),
        (server) => Effect.promise(() => server.stop())
      )
      return Redacted.make(server.url)
    })
  )
}

const PgLive = Layer.unwrap(Effect.map(DatabaseUrl, (url) => PgClient.layer({ url })))

/** Both schemas are dropped before, should a demo have been killed, and after. */
const CleanSchemas = Layer.effectDiscard(Effect.gen(function*() {
  const sql = yield* SqlClient.SqlClient
  const lock = yield* sql.reserve
  const [row] = yield* lock.executeUnprepared(
    "select pg_try_advisory_lock(hashtext($1)) as locked, current_setting('server_version') as version",
    [jobs.schema],
    undefined
  )
  if (!row.locked) return yield* new DemoFailed({ message: "another demo runs in this database" })
  const dropSchemas = Effect.forEach(
    [jobs.schema, ledger.schema],
    (schema) => sql`drop schema if exists ${sql(schema)} cascade`,
    { discard: true }
  )
  const view = yield* View
  yield* view.line(`on PostgreSQL ${row.version}, in the schemas ${jobs.schema} and ${ledger.schema}`)
  yield* Effect.acquireRelease(dropSchemas, () => Effect.ignore(dropSchemas, { log: "Warn" }))
}))

/** A client, and nothing yet in the demo's schemas. */
export const DatabaseLive = CleanSchemas.pipe(
  Layer.provideMerge(PgLive),
  Layer.provideMerge(DatabaseUrl.layer)
)
