/**
 * How the queue's own sessions are opened, with the settings of the application's client.
 *
 * @since 0.1.0
 */
import * as PgClient from "@effect/sql-pg/PgClient"
import type * as PgConnection from "@effect/sql-pg/PgConnection"
import * as Predicate from "effect/Predicate"
import type * as SqlClient from "effect/sql/SqlClient"

/** An address of the server, and what its sessions can be relied on for. */
export interface Endpoint {
  readonly config: PgConnection.Config
  /** Whether its sessions have the settings that they are opened with, and keep what was prepared in them. */
  readonly keepsSettings: boolean
}

/**
 * The ways over which a `PgClient` reaches the server.
 */
export interface Reach {
  /** For the pools. */
  readonly pools: Endpoint
  /** For the sessions that listen, notify and beat. */
  readonly sessions: Endpoint
  /** Whether what is announced over the former is heard over the latter. */
  readonly listens: boolean
}

/**
 * Returns `true` when the client lends its settings for connections of the queue's own.
 */
export const isPgClient = (client: SqlClient.SqlClient): client is PgClient.PgClient =>
  Predicate.hasProperty(client, PgClient.TypeId)

/** Connection settings of the queue's own sessions, as far as any server and any pooler takes them. */
const bareConfig = (config: PgClient.PgClientConfig) =>
  ({
    ...config,
    // What shapes values and statements for the application must not shape them for the queue.
    types: undefined,
    multiplex: false,
    // A cut link must not look alive for the two hours of the kernel's default.
    keepAlive: config.keepAlive ?? "10 seconds",
    applicationName: config.applicationName ?? "effect-pgqueue"
  }) satisfies PgConnection.Config

/**
 * The server itself, for the queue's own sessions, with the settings of the application's client, and those that this server
 * is known to have.
 */
export const direct = (config: PgClient.PgClientConfig, ofServer: Readonly<Record<string, string>> = {}): Endpoint => ({
  keepsSettings: true,
  config: {
    ...bareConfig(config),
    startupParameters: {
      // A frozen process must not keep locks.
      idle_in_transaction_session_timeout: "60s",
      jit: "off",
      // The server must notice within half a minute that nobody is there any more, whether it waits for the client or has
      // something to send: until then the session keeps its locks and its snapshot. Without meaning in a local socket.
      tcp_keepalives_idle: "10",
      tcp_keepalives_interval: "5",
      tcp_keepalives_count: "3",
      tcp_user_timeout: "30s",
      ...config.startupParameters,
      // What the role or the database sets for the application: a sweep or a settle that is cancelled half-way, and sent
      // again as it was, never ends. The queue bounds its statements itself.
      statement_timeout: "0",
      lock_timeout: "0",
      idle_session_timeout: "0",
      default_transaction_isolation: "read committed",
      search_path: "pg_catalog",
      datestyle: "ISO",
      intervalstyle: "postgres",
      // Rows that a policy hides would be jobs that have gone. Better an error.
      row_security: "off",
      // A plan made while a table was empty must not be kept: it turns one claim into a scan of seconds.
      plan_cache_mode: "force_custom_plan",
      ...ofServer
    }
  }
})

/**
 * The same through a pooler, where each transaction may have another session: nothing is set in one, and nothing prepared.
 */
export const pooled = (config: PgClient.PgClientConfig): Endpoint => ({
  keepsSettings: false,
  config: { ...bareConfig(config), prepare: false }
})
