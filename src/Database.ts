/**
 * How the queue reaches PostgreSQL: the application's client, connections of its own, and what an error means.
 *
 * @since 0.1.0
 */
import * as PgClient from "@effect/sql-pg/PgClient"
import * as PgConnection from "@effect/sql-pg/PgConnection"
import * as Cause from "effect/Cause"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Predicate from "effect/Predicate"
import * as Reactivity from "effect/reactivity/Reactivity"
import * as Schedule from "effect/Schedule"
import type * as Scope from "effect/Scope"
import * as SqlClient from "effect/sql/SqlClient"
import { ConnectionError, isSqlError, SqlError } from "effect/sql/SqlError"
import * as Bounded from "./Bounded.ts"
import * as Endpoint from "./Endpoint.ts"

/**
 * The ways to the database that one queue uses.
 */
export interface Database {
  /** The application's client without name transforms: an enqueue inside its transaction joins it. */
  readonly app: SqlClient.SqlClient
  /** Runs one statement outside any transaction of the application, in READ COMMITTED. Never as a generic plan. */
  readonly query: <A extends object = Record<string, never>>(
    text: string,
    params: ReadonlyArray<unknown>
  ) => Effect.Effect<ReadonlyArray<A>, SqlError>
  /** The client behind `query`, for what needs a transaction. */
  readonly own: SqlClient.SqlClient
  /**
   * Runs one of the statements that every job goes through, as `query` does, but each session plans it only once, where
   * there are sessions for it: those of a `PgClient`, with more than one connection.
   */
  readonly often: Database["query"]
  /** The same, with the columns of a row in their order: names cost a driver more than values. */
  readonly oftenInOrder: (
    text: string,
    params: ReadonlyArray<unknown>
  ) => Effect.Effect<ReadonlyArray<ReadonlyArray<unknown>>, SqlError>
  /**
   * The client behind `often`, for what needs a transaction; only `often` is part of it. `own` is the same where there is
   * only one connection.
   */
  readonly hot: SqlClient.SqlClient
  /**
   * Whether the sessions of these have the settings of the queue's own. Not those of a client that is no `PgClient`, nor
   * those that a pooler lends for a transaction: what is safe only with them is not for these.
   */
  readonly keepsSettings: boolean
  /** Opens a session that nobody else can hold up; `undefined` when the client is not a `PgClient`. */
  readonly connect:
    | ((settings?: Record<string, string>) => Effect.Effect<PgConnection.PgConnection, SqlError, Scope.Scope>)
    | undefined
  /** Whether LISTEN in such a session hears what others announce. */
  readonly listens: boolean
  /** Opens what `query` does over such a session; over the client's own pool when it is not a `PgClient`. */
  readonly alone: Effect.Effect<Database["query"], SqlError, Scope.Scope>
}

/**
 * What makes a plan safe to keep, whatever the tables looked like when it was made: none that reads a table from end to
 * end, and none that joins what a statement has at hand in a nested loop, which is quadratic (a settle of 1 000 that go back
 * in line took 66 to 88 ms, and 36 joined by hash). To plan anew took 0.5 to 0.9 ms for each claim and each settle, ten times
 * what they then do for a single job.
 */
const planOnce = {
  plan_cache_mode: "force_generic_plan",
  enable_seqscan: "off",
  enable_bitmapscan: "off",
  enable_nestloop: "off",
  enable_mergejoin: "off"
}

/**
 * Opens the queue's ways to the database over the application's client.
 *
 * **Details**
 *
 * A `PgClient` lends its connection settings, and the queue opens two small pools of its own with them, so that neither
 * the size, the multiplexing nor the name transforms of the application's pool matter: one for the statements that every
 * job goes through, which are planned once a session, and one for all others, which are planned for the values that they
 * come with. Each has half of the connections; where there is only one, it plans each time. Through a pooler that lends a
 * session for a transaction it is one pool, and each statement is sent unprepared in a READ COMMITTED transaction. Any
 * other client is used as it is, in the same manner. Without a `reach` the `PgClient` reaches the server itself.
 */
export const make = Effect.fnUntraced(function*(
  client: SqlClient.SqlClient,
  options: { readonly maxConnections: number; readonly reach?: Endpoint.Reach | undefined }
): Effect.fn.Return<Database, SqlError, Scope.Scope> {
  const app = client.withoutTransforms()
  if (!Endpoint.isPgClient(client)) {
    // Out of the application's transaction, if the fiber is in one: with a connection of its own.
    const outside = Context.omit(app.transactionService)
    const query: Database["query"] = <A extends object>(text: string, params: ReadonlyArray<unknown>) =>
      Effect.updateContext(inItsOwn(app, app.unsafe<A>(text, params).unprepared), outside)
    const oftenInOrder: Database["oftenInOrder"] = (text, params) =>
      Effect.updateContext(inItsOwn(app, app.unsafe(text, params).valuesUnprepared), outside)
    return {
      app,
      own: app,
      hot: app,
      query,
      often: query,
      oftenInOrder,
      keepsSettings: false,
      connect: undefined,
      listens: false,
      alone: Effect.succeed(query)
    }
  }
  const { maxConnections } = options
  const direct = Endpoint.direct(client.config)
  const { listens, pools, sessions } = options.reach ?? { pools: direct, sessions: direct, listens: true }
  const withReactivity = <A, E>(self: Effect.Effect<A, E, Reactivity.Reactivity | Scope.Scope>) =>
    Effect.provideServiceEffect(self, Reactivity.Reactivity, Reactivity.make)
  const pool = (config: PgConnection.Config, maxConnections: number) =>
    Effect.map(
      withReactivity(PgClient.make({ ...config, maxConnections })),
      (pool) => pool.withoutTransforms()
    )
  const connect: Database["connect"] = (settings) =>
    PgConnection.make(
      sessions.keepsSettings
        ? { ...sessions.config, startupParameters: { ...sessions.config.startupParameters, ...settings } }
        : sessions.config
    )
  const alone: Database["alone"] = sessions.keepsSettings
    ? Effect.map(connect(), (session) =>
    // Sound as far as the caller is right about the columns of its statement, as with any client.
    <A extends object>(text: string, params: ReadonlyArray<unknown>) =>
      Effect.map(session.query(text, params), ({ rows }) => rows as ReadonlyArray<A>))
    : Effect.map(withReactivity(PgClient.makeClient(sessions.config)), (session) => {
      const client = session.withoutTransforms()
      return <A extends object>(text: string, params: ReadonlyArray<unknown>) =>
        inItsOwn(client, client.unsafe<A>(text, params).unprepared)
    })

  if (!pools.keepsSettings) {
    const own = yield* pool(pools.config, maxConnections)
    // Inside a transaction of the pool a statement is a part of that.
    const each = <A>(self: Effect.Effect<A, SqlError>) =>
      Effect.withFiber<A, SqlError>((fiber) => inTransaction(own, fiber.context) ? self : inItsOwn(own, self))
    const query: Database["query"] = <A extends object>(text: string, params: ReadonlyArray<unknown>) =>
      each(own.unsafe<A>(text, params).unprepared)
    const oftenInOrder: Database["oftenInOrder"] = (text, params) => each(own.unsafe(text, params).valuesUnprepared)
    return {
      app,
      own,
      hot: own,
      query,
      often: query,
      oftenInOrder,
      keepsSettings: false,
      connect,
      listens,
      alone
    }
  }
  const { config } = pools
  const own = yield* pool(config, Math.max(1, maxConnections >> 1))
  const hot = maxConnections === 1 ? own : yield* pool(
    { ...config, startupParameters: { ...config.startupParameters, ...planOnce } },
    maxConnections - (maxConnections >> 1)
  )
  // Inside a transaction of the other pool a statement is a part of that.
  const oftenFrom = <A>(send: (client: SqlClient.SqlClient) => Effect.Effect<A, SqlError>) =>
    Effect.withFiber((fiber) => send(inTransaction(own, fiber.context) ? own : hot))
  return {
    app,
    own,
    hot,
    query: (text, params) => own.unsafe(text, params),
    often: (text, params) => oftenFrom((client) => client.unsafe(text, params)),
    oftenInOrder: (text, params) => oftenFrom((client) => client.unsafe(text, params).values),
    keepsSettings: true,
    connect,
    listens,
    alone
  }
})

/**
 * Returns `true` when the fiber is inside a transaction of this client.
 */
export const inTransaction = (client: SqlClient.SqlClient, context: Context.Context<never>): boolean =>
  Context.getOrUndefined(context, client.transactionService) !== undefined

/**
 * Whether this fiber is inside a transaction of the application's client: what it asks for is then part of that.
 */
export const inside = (db: Database): Effect.Effect<boolean> =>
  Effect.withFiber((fiber) => Effect.succeed(inTransaction(db.app, fiber.context)))

/** The key under which Effect keeps the innermost transaction of any client. */
const CurrentTransaction = Context.Reference<object | undefined>("effect/sql/CurrentTransactionService", {
  defaultValue: () => undefined
})

/**
 * Returns `true` when the fiber is inside a transaction of any client.
 */
export const inAnyTransaction = (context: Context.Context<never>): boolean =>
  Context.get(context, CurrentTransaction) !== undefined

/**
 * Turns a lost connection inside a transaction back into a typed failure.
 *
 * **Details**
 *
 * When the connection dies, ROLLBACK fails too, and Effect promotes that to a defect which hides the first error.
 */
export const typedTransaction = <A, E, R>(self: Effect.Effect<A, E, R>): Effect.Effect<A, E | SqlError, R> =>
  Effect.catchCause(self, (cause): Effect.Effect<never, E | SqlError> => {
    for (const reason of cause.reasons) {
      if (Cause.isDieReason(reason) && isSqlError(reason.defect)) return Effect.fail(reason.defect)
    }
    return Effect.failCause(cause)
  })

/**
 * Runs an effect in a READ COMMITTED transaction of a client, whatever the client's own level is. A lost connection is a
 * typed failure.
 */
export const transaction = <A, E, R>(
  client: SqlClient.SqlClient,
  self: Effect.Effect<A, E, R>
): Effect.Effect<A, E | SqlError, R> =>
  Effect.flatMap(SqlClient.BeginTransaction, (begin) =>
    // Only this transaction begins so, none that is begun inside it on another client.
    client.withTransaction(Effect.provideService(self, SqlClient.BeginTransaction, begin)).pipe(
      Effect.provideService(SqlClient.BeginTransaction, "BEGIN ISOLATION LEVEL READ COMMITTED"),
      typedTransaction
    ))

/** How long what it has locked stays so when a process is frozen before it commits, in milliseconds. */
export const frozen = 2000
const bound = `select pg_catalog.set_config('idle_in_transaction_session_timeout', '${frozen}', true) as bound`

/**
 * Runs one statement in a transaction of its own, where sessions do not keep what they were opened with. The limit is set
 * before anything is locked, and not by the statement: what that says of it may not be looked at. A process that froze with
 * rows locked kept jobs, schedules or the turn of a task from everybody for as long as it was frozen.
 */
const inItsOwn = <A>(client: SqlClient.SqlClient, statement: Effect.Effect<A, SqlError>): Effect.Effect<A, SqlError> =>
  transaction(
    client,
    Effect.andThen(client.unsafe(bound).unprepared, statement)
  )

/**
 * Runs one statement in the application's transaction. Unprepared: its sessions may keep a plan that was made while a
 * table was empty.
 */
export const here = <A extends object>(
  db: Database,
  text: string,
  params: ReadonlyArray<unknown>
): Effect.Effect<ReadonlyArray<A>, SqlError> => db.app.unsafe<A>(text, params).unprepared

/**
 * Runs one statement: in the application's transaction, or outside any.
 */
export const run = <A extends object>(
  db: Database,
  inUserTransaction: boolean,
  text: string,
  params: ReadonlyArray<unknown>
): Effect.Effect<ReadonlyArray<A>, SqlError> =>
  inUserTransaction ? here<A>(db, text, params) : db.query<A>(text, params)

/** A statement on a dead link never answers: how long people's questions wait, in milliseconds. */
export const answerBound = 15_000

/**
 * Waits for an answer at most so many milliseconds, then fails as a lost connection does.
 */
export const answeredWithin =
  (millis: number) => <A, E, R>(self: Effect.Effect<A, E, R>): Effect.Effect<A, E | SqlError, R> =>
    Effect.catch(Bounded.bounded(self, millis), (error): Effect.Effect<never, E | SqlError> =>
      Effect.fail(
        error instanceof Bounded.TimedOut
          ? new SqlError({
            reason: new ConnectionError({
              cause: error,
              operation: "query",
              message: "the database did not answer in time"
            })
          })
          : error
      ))

/** Sorts before every id. */
export const firstId = "00000000-0000-0000-0000-000000000000"

/** Reads a JSON list of text; empty when there is none. */
export const listOf = (json: string | null): ReadonlyArray<string> => json === null ? [] : JSON.parse(json)

/** Reads ids joined by commas; empty when there are none. */
export const idsOf = (ids: string | null): ReadonlyArray<string> => ids === null || ids === "" ? [] : ids.split(",")

/**
 * Writes values of which none needs quotes as the text of an array: a driver looks at each element of an array by itself.
 */
export const arrayText = (values: ReadonlyArray<string | number>): string => `{${values.join(",")}}`

/**
 * A column of a parameter with many rows: the value of each, or one for all of them when all have the same. The statement
 * takes the first value for a row that has none.
 */
export const column = <A, B>(rows: ReadonlyArray<A>, value: (row: A) => B): ReadonlyArray<B> => {
  if (rows.length === 0) return []
  const first = value(rows[0]!)
  return rows.every((row) => value(row) === first) ? [first] : rows.map(value)
}

/** The most text of one statement, in characters: values of 1 MiB are not to make one that takes too long, or cannot be sent. */
const maxText = 4_000_000

/**
 * Returns how many of the first rows, at most `most` and at least one if there is any, go into one statement.
 */
export const fitting = <A>(rows: ReadonlyArray<A>, most: number, textOf: (row: A) => number): number => {
  let text = 0
  let count = 0
  while (count < rows.length && count < most && (count === 0 || text < maxText)) text += textOf(rows[count++]!)
  return count
}

/**
 * Returns the SQLSTATE of an error, when the server gave one.
 */
export const sqlState = (error: SqlError): string | undefined => {
  const cause = error.reason.cause
  // No class of them begins with E, and Node's EPIPE has as many letters.
  return Predicate.hasProperty(cause, "code") && Predicate.isString(cause.code) && /^(?!E)[0-9A-Z]{5}$/.test(cause.code)
    ? cause.code
    : undefined
}

/**
 * Describes an error for a log: why, and never with the values of a row.
 */
export const describe = (error: unknown): string => {
  if (!isSqlError(error)) return String(error)
  const cause = error.reason.cause
  const detail = sqlState(error) ?? (Predicate.hasProperty(cause, "code") ? String(cause.code) : undefined)
  return detail === undefined ? error.message : `${error.message}: ${detail}`
}

/** Raised by the storage when an insert waited for the settle that ended the same job. */
export const alreadyEnded = "PQ001"

/**
 * Returns `true` when an insert of what was thought to be new met a row that is there, or has been.
 */
export const isReplay = (error: SqlError): boolean => {
  const state = sqlState(error)
  return state === alreadyEnded || state === "23505"
}

/**
 * What a pooler says for good.
 *
 * PgBouncer 1.18 has one code for all that it says itself, 08P01. For good: `unsupported startup parameter: …`, `SASL
 * authentication failed`, and what it passes on of the server's refusal, `database "…" does not exist`. For a while:
 * `query_wait_timeout`, `idle transaction timeout`, `no more connections allowed (max_client_conn)`, `server login has been
 * failing, try again later (server_login_retry)`, `server conn crashed?`, `client_login_timeout (server down)`, and what it
 * passes on of a server that starts up. Often it closes the connection before that is read: then there is no code.
 */
const forGood =
  /startup parameter|does not exist|no such|auth|rejected|password|ssl required|unsupported|not allowed in/i

/** A server that finds the protocol violated names the function that did; a pooler names none. */
const isPoolerOutage = (cause: unknown): boolean =>
  Predicate.hasProperty(cause, "message") && !Predicate.hasProperty(cause, "routine") &&
  !forGood.test(String(cause.message))

/** What Node says of a connection. */
const networkCodes =
  /^(ECONN(RESET|REFUSED|ABORTED)|EPIPE|ETIMEDOUT|EHOSTUNREACH|EHOSTDOWN|ENETUNREACH|ENETDOWN|ENOTFOUND|EAI_AGAIN|ERR_STREAM_DESTROYED|ERR_SOCKET_CLOSED)$/

/** What drivers say of one, in the words of each. */
const outages = /closed|terminated|timed out|rolled back|not queryable|connection (ended|lost|reset|destroyed)|hang up/i

const says = (cause: unknown, words: RegExp): boolean =>
  Predicate.hasProperty(cause, "message") && words.test(String(cause.message))

/** Whether an error without a SQLSTATE is one of the connection: not every client says so by the tag. */
const isOutage = ({ message, reason: { _tag, cause } }: SqlError): boolean =>
  _tag === "ConnectionError" || outages.test(message) || says(cause, outages) ||
  (Predicate.hasProperty(cause, "code") && networkCodes.test(String(cause.code)))

/** A server that protects itself from wraparound says 54000, as of something too large. */
const isProtection = (state: string, cause: unknown): boolean =>
  state === "54000" && says(cause, /not accepting commands/)

/**
 * Returns `true` when the same statement may succeed later: an outage, a restart, a lock, a conflict.
 *
 * **Details**
 *
 * `SqlError.isRetryable` is not used: it is false for most outages (57P01, 57P03, 53300, 25006).
 */
export const isTransient = (error: unknown): boolean => {
  if (!isSqlError(error)) return false
  const state = sqlState(error)
  if (state === undefined) return isOutage(error)
  if (state === "08P01") return isPoolerOutage(error.reason.cause)
  return state === alreadyEnded ||
    /^(08|40|53|58|57P|57014|55000|55P03|25006|25P0[234]|XX000|0A000|26000)/.test(state) ||
    isProtection(state, error.reason.cause)
}

/** What is refused whatever the rows are: a login (28), a database (3D), a schema (3F), the protocol (08). */
const ofNoRow = /^(28|3D|3F|08)/

/**
 * Returns `true` when a statement is not taken as it is, now or later. One row of it may be why, and a smaller one without
 * that goes through: somebody's trigger says no with any code there is, or has a mistake in it.
 */
export const isRefusal = (error: unknown): boolean => {
  if (!isSqlError(error) || isTransient(error)) return false
  const state = sqlState(error)
  return state === undefined ? error.reason._tag === "UnknownError" : !ofNoRow.test(state)
}

/**
 * Returns `true` when the values of a statement are at fault, so that the same statement without them would succeed:
 * bad data (22), a constraint (23), something too large (54), or what the driver could not encode.
 */
export const isUnstorable = (error: unknown): boolean => {
  if (!isSqlError(error) || !isRefusal(error)) return false
  const state = sqlState(error)
  return state === undefined || /^(22|23|54)/.test(state)
}

/**
 * Returns `true` when a statement asked for more than the server gave it, and a smaller one may succeed: it took too long,
 * or there was no memory (53200) or no room for what it had at hand (53400, `temp_file_limit`).
 */
export const isTooMuch = (error: unknown): boolean =>
  isStatementTimeout(error) || (isSqlError(error) && /^(53200|53400)$/.test(sqlState(error) ?? ""))

/**
 * Returns `true` when an error means that a connection was lost, or never came to be.
 */
export const isConnectionLoss = (error: unknown): boolean =>
  isSqlError(error) && isTransient(error) && !isTooMuch(error) && /^(08|57P|25006|58|53)/.test(sqlState(error) ?? "08")

/**
 * Returns `true` when the role of the client may not do this: nothing but a grant mends it.
 */
export const isDenied = (error: unknown): error is SqlError => isSqlError(error) && sqlState(error) === "42501"

/**
 * Returns `true` when a session may only read.
 */
export const isReadOnly = (error: SqlError): boolean => sqlState(error) === "25006"

/**
 * Returns `true` when the server gave up a statement because it took too long.
 */
export const isStatementTimeout = (error: unknown): boolean => isSqlError(error) && sqlState(error) === "57014"

/**
 * Returns `true` when the server gave up waiting for somebody's lock.
 */
export const isLockTimeout = (error: unknown): boolean => isSqlError(error) && sqlState(error) === "55P03"

/**
 * Returns `true` when the server takes no more notifications, or a limit of the server was met.
 */
export const isFullOfNews = (error: unknown): boolean => isSqlError(error) && sqlState(error) === "54000"

/**
 * Waits between tries of a statement that failed for a transient reason: 0.1 s doubling to 1 s, with jitter.
 */
export const backoff: Schedule.Schedule<unknown> = Schedule.min([
  Schedule.exponential("100 millis"),
  Schedule.spaced("1 second")
]).pipe(Schedule.jittered)

/**
 * Returns the schema name as a quoted identifier. Only names that `isSchemaName` accepts get here.
 */
export const quoteSchema = (schema: string): string => `"${schema}"`

/**
 * Returns `true` for a name that may be used as the queue's schema.
 */
export const isSchemaName = (name: string): boolean => /^[a-z_][a-z0-9_]{0,40}$/.test(name)

/**
 * Returns the channel on which the queues of a schema are announced: at most 63 bytes, one per schema.
 */
export const channelOf = (schema: string): string => `effect_pgqueue_${schema}`
