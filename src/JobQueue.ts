/**
 * The service that producers use: enqueues, alone, in the caller's transaction, in bulk, and grouped when many arrive
 * at once.
 *
 * @since 0.1.0
 */
import * as Config from "effect/Config"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import type * as Redacted from "effect/Redacted"
import * as Semaphore from "effect/Semaphore"
import * as SqlClient from "effect/sql/SqlClient"
import type { SqlError } from "effect/sql/SqlError"
import * as Awaiting from "./Awaiting.ts"
import * as Bounded from "./Bounded.ts"
import * as Database from "./Database.ts"
import * as Endpoint from "./Endpoint.ts"
import { type Enqueued, EnqueueError } from "./Enqueue.ts"
import * as Grouping from "./Grouping.ts"
import * as Migrations from "./Migrations.ts"
import * as Reach from "./Reach.ts"
import * as Report from "./Report.ts"
import * as Store from "./Store.ts"
import * as Transport from "./Transport.ts"
import * as UniqueKeys from "./UniqueKeys.ts"
import * as Wakeup from "./Wakeup.ts"

export { JobQueueError } from "./Migrations.ts"

/**
 * The counts of one queue and kind.
 *
 * @category models
 * @since 0.1.0
 */
export type Stats = Store.Stats

/**
 * The options of a queue.
 *
 * @category models
 * @since 0.1.0
 */
export interface Options {
  /** The database schema that holds the queue: `[a-z_][a-z0-9_]*`, at most 41 characters. Default `"pgqueue"`. */
  readonly schema?: string | undefined
  /** Create or update the storage at start. Off, the version is only checked. Default `true`. */
  readonly migrate?: boolean | undefined
  /** What to do when there is no database at start: wait for it, or fail with `SqlError`. Default `"wait"`. */
  readonly onUnavailable?: "wait" | "fail" | undefined
  /**
   * How many connections the queue opens at most, beside the listener's, the notifier's and the heartbeat's: half of them
   * for enqueues, claims and settlements, half for everything else. With 1 the statements of every job are planned each
   * time. A client that is no `PgClient` uses its own pool instead. Default 8.
   */
  readonly maxConnections?: number | undefined
  /**
   * The address of the server itself, where the client goes through a transaction pooler, which loses notifications and
   * the settings of a session: the listener, the notifier and the heartbeat connect there, one session each, and jobs are
   * heard of at once. A complete URL, with the user, the password and `sslmode`; the client's other settings hold, its
   * `ssl` where the URL says nothing. Default none: through such a pooler jobs are found by polling.
   */
  readonly directUrl?: Redacted.Redacted | undefined
  /** Allow enqueues inside a transaction of another `SqlClient`; they are not part of it. Default `false`. */
  readonly allowForeignTransaction?: boolean | undefined
  /**
   * Go on although the `PgClient` connects to another host without TLS, or without verifying its certificate: passwords and
   * payloads can then be read on the way. Default `false`: fail with `InsecureConnection`.
   */
  readonly allowInsecure?: boolean | undefined
}

/**
 * The queue.
 *
 * @category services
 * @since 0.1.0
 */
export class JobQueue extends Context.Service<JobQueue, {
  /** The schema that holds the queue. */
  readonly schema: string
  /** How workers hear of new jobs. */
  readonly mode: "listen" | "poll"
  /** Counts jobs by queue and kind. It reads the whole history: for people, not for a loop. */
  readonly stats: Effect.Effect<ReadonlyArray<Stats>, SqlError>
  /** Inserts one job. @internal */
  readonly enqueue: <E, R>(
    job: Effect.Effect<Store.NewJob, E, R>
  ) => Effect.Effect<Enqueued, E | EnqueueError | SqlError, R>
  /** Inserts many jobs, all or none. @internal */
  readonly enqueueAll: <E, R>(
    jobs: Effect.Effect<ReadonlyArray<Store.NewJob>, E, R>
  ) => Effect.Effect<ReadonlyArray<Enqueued>, E | EnqueueError | SqlError, R>
  /** Inserts one job and waits for its end, at most `wait` milliseconds. @internal */
  readonly execute: <E, R>(
    job: Effect.Effect<Store.NewJob, E, R>,
    wait: number | undefined
  ) => Effect.Effect<Store.EndRow, E | EnqueueError | Awaiting.ExecuteError | SqlError, R>
  /** What workers and people's tools are built on. @internal */
  readonly internal: {
    readonly database: Database.Database
    readonly store: Store.Store
    readonly wakeup: Wakeup.Wakeup
    /** Whether the fiber is in a transaction of the queue's client. Fails in one of another client, unless that is allowed. */
    readonly inTransaction: (kind: () => string) => Effect.Effect<boolean, EnqueueError>
  }
}>()("effect-pgqueue/JobQueue") {
  /**
   * Builds the queue over the `SqlClient` in the context.
   *
   * **Details**
   *
   * A `PgClient` gives LISTEN/NOTIFY and connections of the queue's own, made from its settings. Any other client on
   * PostgreSQL works by polling. Keep the layer in one constant and share it, so that everything uses one queue.
   *
   * At the start two sessions find out whether the client reaches the server itself. Through a transaction pooler the queue
   * prepares nothing, sends each statement in a transaction and works by polling, with a warning, unless it is given the
   * server's own address as `directUrl`.
   *
   * Fails with `JobQueueError` when the storage or the server is not what is needed, and with `SqlError`.
   *
   * **Example** (One queue over one client)
   *
   * ```ts
   * import { PgClient } from "@effect/sql-pg"
   * import { Config, Layer } from "effect"
   * import { JobQueue } from "effect-pgqueue"
   *
   * const PgLive = PgClient.layerConfig({ url: Config.Redacted("DATABASE_URL") })
   * const QueueLive = JobQueue.layer({ schema: "jobs" }).pipe(Layer.provideMerge(PgLive))
   * ```
   */
  static readonly layer = (
    options?: Options
  ): Layer.Layer<JobQueue, Migrations.JobQueueError | SqlError, SqlClient.SqlClient> =>
    Layer.effect(JobQueue, make(options ?? {}))

  /**
   * Builds the queue from options that may be `Config`s.
   *
   * **Example** (The schema from the environment)
   *
   * ```ts
   * import { Config } from "effect"
   * import { JobQueue } from "effect-pgqueue"
   *
   * const QueueLive = JobQueue.layerConfig({ schema: Config.String("QUEUE_SCHEMA") })
   * ```
   */
  static readonly layerConfig = (
    options: Config.Wrap<Options>
  ): Layer.Layer<JobQueue, Migrations.JobQueueError | SqlError | Config.ConfigError, SqlClient.SqlClient> =>
    Layer.effect(JobQueue, Effect.flatMap(Config.unwrap(options), make))
}

/** The queue, and whether this fiber is in a transaction of its client: for what people do. @internal */
export const here = Effect.flatMap(
  JobQueue,
  ({ internal }) => Effect.map(Database.inside(internal.database), (inside) => ({ ...internal, inside }))
)

/** Says something to workers once the transaction has committed, if there is one. @internal */
export const announce = (announcement: () => void): Effect.Effect<void, never, JobQueue> =>
  Effect.flatMap(here, ({ database }) => database.app.afterCommit(Effect.sync(announcement)))

/** How long a bulk may take, in milliseconds: 100 000 jobs take 3 to 13 s. Each job adds to it, and its text. */
const bulkBound = (jobs: ReadonlyArray<Store.NewJob>): number =>
  jobs.reduce((sum, job) => sum + 1 + Grouping.textOf(job) / 20_000, 15_000)

/** How long the storage may take to be made or changed, in milliseconds: it waits for locks for up to a minute. */
const migrationBound = 300_000

/** How long, in milliseconds, to wait for the mark on a job whose end is to be told: on a dead link it never comes. */
const askBound = 5000

const make = Effect.fnUntraced(function*(options: Options) {
  const schema = options.schema ?? "pgqueue"
  const invalid = (message: string) => new Migrations.JobQueueError({ reason: "InvalidOption", message })
  if (!Database.isSchemaName(schema)) {
    return yield* invalid("schema must match [a-z_][a-z0-9_]* and have at most 41 characters")
  }
  const maxConnections = options.maxConnections ?? 8
  if (!Number.isInteger(maxConnections) || maxConnections < 1) {
    return yield* invalid("maxConnections must be a positive integer")
  }
  if (options.directUrl !== undefined && !Reach.isUrl(options.directUrl)) {
    return yield* invalid("directUrl must be a redacted URL that begins with postgres:// or postgresql://")
  }
  /** Tries again while the database is not there, unless that is not wanted. */
  const patiently = <A, E>(self: Effect.Effect<A, E>): Effect.Effect<A, E> =>
    options.onUnavailable === "fail" ? self : self.pipe(
      Effect.tapError((error) =>
        Database.isTransient(error)
          ? Report.warning(`waiting for the database (${Database.describe(error)})`)
          : Effect.void
      ),
      Effect.retry({ while: Database.isTransient, schedule: Database.backoff })
    )
  const client = yield* SqlClient.SqlClient
  if (options.allowInsecure !== true && Endpoint.isPgClient(client)) {
    const { directUrl } = options
    const insecure = Transport.problemOf(client.config, "the PgClient") ??
      (directUrl === undefined ? undefined : Transport.problemOf(Reach.at(client.config, directUrl), "directUrl"))
    if (insecure !== undefined) {
      return yield* new Migrations.JobQueueError({ reason: "InsecureConnection", message: insecure })
    }
  }
  const reach = Endpoint.isPgClient(client) ? yield* patiently(Reach.find(client, options.directUrl)) : undefined
  const database = yield* Bounded.open(Database.make(client, { maxConnections, reach }))
  const store = Store.make(database, schema)

  yield* patiently(Effect.gen(function*() {
    const answered = Database.answeredWithin(Database.answerBound)
    yield* answered(Migrations.verifyServer(database.own))
    if (options.migrate ?? true) {
      yield* Database.answeredWithin(migrationBound)(Migrations.run(database.own, schema))
    }
    yield* answered(Migrations.verify(database.own, schema))
  }))
  const wakeup = yield* Bounded.open(Wakeup.make(database, schema))
  const mode = database.listens ? "listen" : "poll"
  const pooled = reach?.pools.keepsSettings === false ? ", statements through a pooler" : ""
  yield* Report.info(
    `schema "${schema}", ${mode === "listen" ? "LISTEN/NOTIFY" : "polling only"}${pooled}`
  )

  const awaiting = yield* Awaiting.make(store, wakeup)

  /** Wakes the workers for what has gone in, each queue once. */
  const announce = (jobs: ReadonlyArray<Store.NewJob>, enqueued: ReadonlyArray<Enqueued>): void => {
    const due = new Map<string, number>()
    jobs.forEach((job, index) => {
      if (enqueued[index]!.status === "existing") return
      const known = due.get(job.queue)
      const delay = delayOf(job)
      if (known === undefined || delay < known) due.set(job.queue, delay)
    })
    due.forEach((delay, queue) => wakeup.mark(queue, delay))
  }

  const enqueue = yield* Grouping.make({
    store,
    withInsert: (job) => wakeup.withInsert(job.queue, delayOf(job)),
    onEnqueued: announce
  })

  /** Whether this fiber's transaction is the queue's client's. Checked at the call, before any grouping. */
  const inTransaction = (kind: () => string): Effect.Effect<boolean, EnqueueError> =>
    Effect.withFiber((fiber) => {
      if (Database.inTransaction(client, fiber.context)) return Effect.succeed(true)
      return options.allowForeignTransaction === true || !Database.inAnyTransaction(fiber.context)
        ? Effect.succeed(false)
        : Effect.fail(
          new EnqueueError({
            kind: kind(),
            reason: "ForeignTransaction",
            message: "this fiber is in a transaction of another SqlClient, the job would not be part of it"
          })
        )
    })

  /** Inserts jobs in statements of bounded size: where these are more than one, in a transaction that is open. */
  const insertMany = Effect.fnUntraced(function*(
    jobs: ReadonlyArray<Store.NewJob>,
    inUserTransaction: boolean,
    fresh = false
  ) {
    const manner = { inUserTransaction, patience: undefined, fresh }
    const plain = jobs.filter((job) => job.unique === undefined)
    const done: Array<Enqueued> = []
    for (const part of parts(plain)) done.push(...yield* UniqueKeys.insertPlain(store, part, manner))
    if (plain.length === jobs.length) return done
    const keyed = UniqueKeys.inKeyOrder(jobs.filter((job) => job.unique !== undefined))
    for (const part of parts(keyed)) done.push(...yield* UniqueKeys.insertKeyed(store, part, manner))
    const enqueued = new Map([...plain, ...keyed].map((job, index) => [job, done[index]!] as const))
    return jobs.map((job) => enqueued.get(job)!)
  })

  /** Inserts in the caller's transaction, and wakes only after it has committed. */
  const insertHere = (jobs: ReadonlyArray<Store.NewJob>): Effect.Effect<ReadonlyArray<Enqueued>, SqlError> =>
    Effect.tap(
      insertMany(jobs, true),
      (enqueued) => client.afterCommit(Effect.sync(() => announce(jobs, enqueued)))
    )

  // Neither sort is to take a whole pool.
  const bulks = Semaphore.makeUnsafe(2)
  const waitingBulks = Semaphore.makeUnsafe(2)

  /** Inserts all or none, outside the caller's transaction: what one statement does needs none of its own. */
  const insertApart = (jobs: ReadonlyArray<Store.NewJob>): Effect.Effect<ReadonlyArray<Enqueued>, SqlError> => {
    // A stranger's transaction may have taken a key or a chosen id: who waits for it is not to keep a session from the claims.
    const mayWait = jobs.some((job) => job.unique !== undefined || job.idGiven === true)
    const isOneStatement = !mayWait && Grouping.fitting(jobs) === jobs.length
    const insert = UniqueKeys.freshFirst((fresh) => {
      if (isOneStatement) return insertMany(jobs, false, fresh)
      return database.connect === undefined
        ? Database.transaction(database.app, insertMany(jobs, true))
        : Database.transaction(mayWait ? database.own : database.hot, insertMany(jobs, false, fresh && !mayWait))
    }).pipe(Database.answeredWithin(bulkBound(jobs)))
    return (isOneStatement ? insert : Semaphore.withPermit(mayWait ? waitingBulks : bulks, insert)).pipe(
      Grouping.persistently,
      Effect.tap((enqueued) => Effect.sync(() => announce(jobs, enqueued)))
    )
  }

  const executeError = (id: string, reason: Awaiting.ExecuteError["reason"], message: string) =>
    new Awaiting.ExecuteError({ id, reason, message })

  const waitFor = Effect.fnUntraced(function*(job: Store.NewJob, wait: number | undefined) {
    const own = yield* awaiting.open(job.id)
    const { id, status } = yield* enqueue({ ...job, awaited: true })
    const { ended } = id === job.id ? own : yield* awaiting.open(id)
    // Somebody else's job: whoever ends it is to say so, and may have. Only a hint: without it the end is found by looking.
    const asked = status === "existing" ? Effect.ignore(Bounded.bounded(store.awaits(id), askBound)) : Effect.void
    const over = Effect.andThen(asked, ended(status !== "inserted"))
    const end = yield* (wait === undefined ? over : Effect.timeoutOrElse(over, {
      duration: wait,
      orElse: () => Effect.fail(executeError(id, "WaitTimedOut", "the job has not ended in time; it goes on"))
    }))
    return end ?? (yield* executeError(id, "Pruned", "the job is no longer there"))
  }, Effect.scoped)

  return JobQueue.of({
    schema,
    mode,
    stats: Effect.flatMap(Database.inside(database), store.stats),
    enqueue: (resolve) =>
      Effect.flatMap(resolve, (job) =>
        Effect.flatMap(inTransaction(() => job.kind), (here) =>
          here
            ? Effect.map(insertHere([job]), (enqueued) => enqueued[0]!)
            : enqueue(job))),
    enqueueAll: (resolve) =>
      Effect.flatMap(resolve, (jobs) =>
        Effect.flatMap(inTransaction(() => jobs[0]?.kind ?? ""), (here) => {
          if (jobs.length === 0) return Effect.succeed([])
          // In the caller's transaction a savepoint makes it all or none.
          return here ? Database.typedTransaction(client.withTransaction(insertHere(jobs))) : insertApart(jobs)
        })),
    execute: (resolve, wait) =>
      Effect.flatMap(resolve, (job) =>
        Effect.flatMap(inTransaction(() => job.kind), (here) =>
          here
            ? Effect.fail(
              executeError("", "InTransaction", "the job would only be visible after the transaction that waits for it")
            )
            : waitFor(job, wait))),
    internal: { database, store, wakeup, inTransaction }
  })
})

function* parts(all: ReadonlyArray<Store.NewJob>) {
  for (let rest = all; rest.length > 0;) {
    const count = Grouping.fitting(rest)
    yield rest.slice(0, count)
    rest = rest.slice(count)
  }
}

/** How far away a job is; an instant is compared with nothing here, the worker looks at the database's clock. */
const delayOf = (job: Store.NewJob): number => job.runAt === undefined ? job.delay : 0
