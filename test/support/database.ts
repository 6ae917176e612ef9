/** Databases for test files: each gets a fresh one on the server that the run started. */
import { PgClient } from "@effect/sql-pg"
import { Context, Effect, Layer, Redacted } from "effect"
import { SqlClient, type SqlError } from "effect/sql"
import { randomBytes } from "node:crypto"
import { inject } from "vitest"
import { type EmbeddedPostgres, type StartOptions, startPostgres } from "./embedded.ts"

/** A database made for one test file or one test, dropped at the end whoever is still connected. */
export class TestDatabase extends Context.Service<TestDatabase, {
  readonly name: string
  readonly url: Redacted.Redacted
}>()("effect-pgqueue/test/support/database/TestDatabase") {
  /** A new database for every build of this layer. */
  static readonly layer: Layer.Layer<TestDatabase, SqlError.SqlError> = Layer.effect(
    TestDatabase,
    Effect.suspend(() => makeDatabase())
  )
}

/** Creates a database in the current scope; `serverUrl` is the run's server unless told otherwise. */
export const makeDatabase = Effect.fnUntraced(function*(serverUrl: string = inject("databaseUrl")) {
  const name = `t_${randomBytes(8).toString("hex")}`
  const url = new URL(serverUrl)
  url.pathname = `/${name}`
  yield* Effect.acquireRelease(
    onServer(serverUrl, `create database ${name}`),
    // a server that a test has crashed takes its databases with it
    () => Effect.ignore(onServer(serverUrl, `drop database if exists ${name} with (force)`), { log: "Warn" })
  )
  return { name, url: Redacted.make(url.href) }
})

/**
 * A client of a fresh database. Every call makes a layer with a database of its
 * own; keep it in a constant to share one. `options` configure the pool.
 *
 * ```ts
 * layer(databaseLayer(), { excludeTestServices: true })("claim", (it) => { … })
 * ```
 */
export const databaseLayer = (
  options?: Omit<PgClient.PgPoolConfig, "url">
): Layer.Layer<PgClient.PgClient | SqlClient.SqlClient | TestDatabase, SqlError.SqlError> =>
  Layer.provideMerge(clientLayer(options), Layer.fresh(TestDatabase.layer))

/** One more client, with a pool of its own, of the {@link TestDatabase} in the context: a second process, so to speak. */
export const clientLayer = (
  options?: Omit<PgClient.PgPoolConfig, "url">
): Layer.Layer<PgClient.PgClient | SqlClient.SqlClient, SqlError.SqlError, TestDatabase> =>
  Layer.unwrap(Effect.map(TestDatabase, ({ url }) => PgClient.layer({ ...options, url })))

/** A server of its own in the current scope, for tests that crash it; the run's server is shared and stays up. */
export const ownServer = (options?: StartOptions) =>
  Effect.acquireRelease(
    Effect.promise(() => startPostgres(options)),
    (server: EmbeddedPostgres) => Effect.promise(() => server.stop())
  )

/** Runs a statement on a server. */
export const onServer = (serverUrl: string, statement: string) =>
  SqlClient.SqlClient.use((sql) => sql.unsafe(statement)).pipe(
    Effect.provide(PgClient.layer({ url: Redacted.make(serverUrl), maxConnections: 1 })),
    Effect.asVoid
  )
