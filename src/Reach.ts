/**
 * How the connections of a client reach the server: whether they keep what they are told, and hear what others say. Found
 * out at the start, because a pooler in between fails in silence.
 *
 * @since 0.1.0
 */
import type * as PgClient from "@effect/sql-pg/PgClient"
import * as PgConnection from "@effect/sql-pg/PgConnection"
import { SecureRandom } from "effect/crypto"
import * as Effect from "effect/Effect"
import * as Queue from "effect/Queue"
import * as Redacted from "effect/Redacted"
import type * as Scope from "effect/Scope"
import type { SqlError } from "effect/sql/SqlError"
import * as Bounded from "./Bounded.ts"
import * as Database from "./Database.ts"
import * as Endpoint from "./Endpoint.ts"
import * as Report from "./Report.ts"
import * as Store from "./Store.ts"

/** A setting that no server, role or pooler has: whoever finds its value has the session that it was sent for. */
const marker = "effect_pgqueue.session"

/**
 * The same for all: behind a pooler a session goes on listening when nobody does, and must not collect channels.
 */
const channel = "effect_pgqueue probe"

/** How long a notification may take, in milliseconds, and how often it is tried where it should come: a server may be busy. */
const hearBound = 1000
const tries = 3

/** How long all of it may take, in milliseconds, the connections included. */
const bound = 15_000

/** An attempt that failed of what may be refused by who does not know it, such as a pooler. */
const isRefusal = (error: SqlError): boolean =>
  !Database.isConnectionLoss(error) && !/^(28|3D|42501)/.test(Database.sqlState(error) ?? "28")

/** A standby, which may be promoted, can neither LISTEN nor NOTIFY; the server's queue of notifications may be full. */
const isUndecided = (error: SqlError): boolean => Database.isReadOnly(error) || Database.isFullOfNews(error)

/**
 * Returns the settings of the client for another address. What the URL does not say of the session is the client's.
 */
export const at = (config: PgClient.PgClientConfig, url: Redacted.Redacted): PgClient.PgClientConfig => ({
  ...config,
  url,
  host: undefined,
  port: undefined,
  path: undefined,
  stream: undefined,
  database: undefined,
  username: undefined,
  password: undefined,
  ssl: new URL(Redacted.value(url)).searchParams.has("sslmode") ? undefined : config.ssl
})

/**
 * Returns `true` for a URL that a connection can be made from.
 */
export const isUrl = (url: unknown): boolean =>
  Redacted.isRedacted(url) && URL.canParse(String(Redacted.value(url))) &&
  /^postgres(ql)?:$/.test(new URL(String(Redacted.value(url))).protocol)

/** Opens a session, and finds out whether it has its settings. Without them, if they are refused. */
const open = Effect.fnUntraced(function*(
  config: PgClient.PgClientConfig
): Effect.fn.Return<
  { readonly session: PgConnection.PgConnection; readonly endpoint: Endpoint.Endpoint },
  SqlError,
  Scope.Scope
> {
  const direct = Endpoint.direct(config)
  const pooled = Endpoint.pooled(config)
  const mark = SecureRandom.uuidV4Unsafe()
  const startupParameters = { ...direct.config.startupParameters, [marker]: mark }
  const marked = PgConnection.make({ ...direct.config, prepare: false, startupParameters })
  return yield* Effect.flatMap(
    marked,
    (session) =>
      Effect.map(session.query(Store.givenText, [marker]), ({ rows }) => ({
        session,
        // Somebody in between may also drop them without a word.
        endpoint: rows[0]?.["given"] !== mark
          ? pooled
          // A session that ends in the middle of a statement cannot say that it took too long.
          : rows[0]["timeout"] === null
          ? direct
          : Endpoint.direct(config, { transaction_timeout: "0" })
      }))
  ).pipe(
    Effect.catchIf(
      isRefusal,
      () => Effect.map(PgConnection.make(pooled.config), (session) => ({ session, endpoint: pooled }))
    )
  )
})

/** Whether what one session announces is heard by the other. */
const hears = Effect.fnUntraced(function*(
  speaker: PgConnection.PgConnection,
  listener: PgConnection.PgConnection,
  attempts: number
) {
  const notifications = yield* listener.listen(channel)
  const word = SecureRandom.uuidV4Unsafe()
  const heard = Effect.repeat(Queue.take(notifications), { until: ({ payload }) => payload === word })
  for (let attempt = 0; attempt < attempts; attempt++) {
    yield* speaker.query(Store.notifyText, [channel, [word]])
    const found = yield* Effect.map(Bounded.bounded(heard, hearBound), () => true).pipe(
      Effect.catchIf((error) => error instanceof Bounded.TimedOut, () => Effect.succeed(false))
    )
    if (found) return true
  }
  return false
})

/**
 * Finds out how a `PgClient` reaches the server, and says once what is to be known of it. `direct` is the address of the
 * server itself, where the client has another one.
 *
 * **Details**
 *
 * Two sessions are opened at once. Each asks for a setting that it was opened with, one listens, and the other notifies.
 * Fails with a transient error while there is no database.
 */
export const find = (
  client: PgClient.PgClient,
  direct: Redacted.Redacted | undefined
): Effect.Effect<Endpoint.Reach, SqlError> =>
  Bounded.scoped(Effect.gen(function*() {
    const there = direct === undefined ? client.config : at(client.config, direct)
    const [speaker, listener] = yield* Effect.all([open(client.config), open(there)], { concurrency: 2 })
    const listens = yield* hears(speaker.session, listener.session, listener.endpoint.keepsSettings ? tries : 1).pipe(
      Effect.catchIf((error) => isUndecided(error) || !Database.isConnectionLoss(error), (error) =>
        // Nobody asks again: as it would be without a pooler.
        Effect.succeed(isUndecided(error) && speaker.endpoint.keepsSettings && listener.endpoint.keepsSettings))
    )
    if (!listens) {
      yield* Report.warning(
        deafness(speaker.endpoint, direct !== undefined) + preparing(speaker.endpoint, client.config)
      )
    }
    // An address that does not hear the client's announcements may be that of another database.
    return { pools: speaker.endpoint, sessions: listens ? listener.endpoint : speaker.endpoint, listens }
  })).pipe(Database.answeredWithin(bound))

/** Why nothing is heard, and what to do. */
const deafness = (endpoint: Endpoint.Endpoint, direct: boolean): string => {
  const so = "jobs are found by polling"
  const planned = endpoint.keepsSettings ? "" : ", and statements are planned each time"
  if (direct) {
    return `LISTEN at directUrl does not hear what the client announces: ${so}${planned}. It has to be the address of the same database, and of the server itself`
  }
  return endpoint.keepsSettings
    ? `LISTEN hears nothing over the client's connections: ${so}. Something between them and the server loses notifications; give JobQueue.layer the server's own address as directUrl`
    : `the client goes through a transaction pooler, where settings of a session and LISTEN have no effect: ${so}${planned}. Give JobQueue.layer the server's own address as directUrl to hear of jobs at once`
}

/**
 * What the application's own statements meet behind such a pooler. It is no small thing: where a ROLLBACK is prepared, too, it
 * fails like the statement before it, and the pooler's sessions stay in transactions that nobody ends.
 */
const preparing = (endpoint: Endpoint.Endpoint, config: PgClient.PgClientConfig): string =>
  endpoint.keepsSettings || config.prepare === false
    ? ""
    : ". Unless the pooler keeps prepared statements, give the PgClient prepare: false, or its own transactions fail"
