/**
 * The service that producers use: enqueues, alone, in the caller's transaction, in bulk, and grouped when many arrive
 * at once.
 *
 * @since 0.1.0
 */
import * as Config from "effect/Config"
import * as Context from "effect/Context"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Schedule from "effect/Schedule"
import type * as Scope from "effect/Scope"
import * as SqlClient from "effect/sql/SqlClient"
import type { SqlError } from "effect/sql/SqlError"
import * as Bounded from "./Bounded.ts"
import * as Database from "./Database.ts"
import { EnqueueError, type JobId } from "./Enqueue.ts"
import * as Migrations from "./Migrations.ts"
import * as Store from "./Store.ts"
import * as Wakeup from "./Wakeup.ts"

export { JobQueueError } from "./Migrations.ts"

/**
 * What an enqueue did. `existing`: nothing was inserted, `id` is that of the job that holds the key or the id.
 * `replaced`: a waiting job got the new payload, `id` is that job's.
 *
 * @category models
 * @since 0.1.0
 */
export interface Enqueued {
  readonly id: JobId
  readonly status: "inserted" | "existing" | "replaced"
}

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
  /** How many connections the queue opens beside the listener's, the notifier's and the heartbeat's. Default 5. */
  readonly maxConnections?: number | undefined
  /** Allow enqueues inside a transaction of another `SqlClient`; they are not part of it. Default `false`. */
  readonly allowForeignTransaction?: boolean | undefined
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
  /** Counts jobs by queue and kind. */
  readonly stats: Effect.Effect<ReadonlyArray<Stats>, SqlError>
  /** Inserts one job. @internal */
  readonly enqueue: <E, R>(
    job: Effect.Effect<Store.NewJob, E, R>
  ) => Effect.Effect<Enqueued, E | EnqueueError | SqlError, R>
  /** Inserts many jobs, all or none. @internal */
  readonly enqueueAll: <E, R>(
    jobs: Effect.Effect<ReadonlyArray<Store.NewJob>, E, R>
  ) => Effect.Effect<ReadonlyArray<Enqueued>, E | EnqueueError | SqlError, R>
  /** What workers are built on. @internal */
  readonly internal: {
    readonly database: Database.Database
    readonly store: Store.Store
    readonly wakeup: Wakeup.Wakeup
  }
}>()("effect-pgqueue/JobQueue") {
  /**
   * Builds the queue over the `SqlClient` in the context.
   *
   * **Details**
   *
   * A `PgClient` gives LISTEN/NOTIFY and connections of the queue's own, made from its settings. Any other client on
   * PostgreSQL works by polling. Keep the layer in one constant and share it, so that everything uses one queue.
   */
  static readonly layer = (
    options?: Options
  ): Layer.Layer<JobQueue, Migrations.JobQueueError | SqlError, SqlClient.SqlClient> =>
    Layer.effect(JobQueue, make(options ?? {}))

  /** Builds the queue from options that may be `Config`s. */
  static readonly layerConfig = (
    options: Config.Wrap<Options>
  ): Layer.Layer<JobQueue, Migrations.JobQueueError | SqlError | Config.ConfigError, SqlClient.SqlClient> =>
    Layer.effect(JobQueue, Effect.flatMap(Config.unwrap(options), make))
}

/** The most rows of one insert: beyond it nothing is gained, and one statement must not hold its locks for long. */
const maxRows = 1000

/** How long an enqueue waits out an outage before it fails. */
const patience = "10 seconds"

const make = Effect.fnUntraced(function*(options: Options) {
  const schema = options.schema ?? "pgqueue"
  if (!Database.isSchemaName(schema)) {
    return yield* new Migrations.JobQueueError({
      reason: "InvalidOption",
      message: "schema must match [a-z_][a-z0-9_]* and have at most 41 characters"
    })
  }
  const client = yield* SqlClient.SqlClient
  const database = yield* Bounded.open(Database.make(client, { maxConnections: options.maxConnections ?? 5 }))
  const store = Store.make(database, schema)

  const prepare = Effect.gen(function*() {
    yield* Migrations.verifyServer(database.own)
    if (options.migrate ?? true) yield* Migrations.run(database.own, schema)
    yield* Migrations.verify(database.own, schema)
  })
  yield* options.onUnavailable === "fail" ? prepare : prepare.pipe(
    Effect.tapError((error) =>
      Database.isTransient(error)
        ? Effect.logWarning(`effect-pgqueue: waiting for the database (${Database.describe(error)})`)
        : Effect.void
    ),
    Effect.retry({ while: Database.isTransient, schedule: Database.backoff })
  )
  const wakeup = yield* Bounded.open(Wakeup.make(database, schema))
  const mode = database.connect === undefined ? "poll" : "listen"
  yield* Effect.logDebug(`effect-pgqueue: schema "${schema}", ${mode === "listen" ? "LISTEN/NOTIFY" : "polling only"}`)

  // ---------------------------------------------------------------------------
  // Grouping
  // ---------------------------------------------------------------------------

  /** A job that waits for the next statement. */
  interface Waiting {
    readonly job: Store.NewJob
    readonly result: Deferred.Deferred<Enqueued, SqlError>
  }
  const scope = yield* Bounded.open(Effect.scope)
  const context = yield* Effect.context<SqlClient.SqlClient | Scope.Scope>()
  // In the layer's context, not in that of whichever caller happened to be first.
  const forkSender = (sender: Effect.Effect<void>) =>
    Effect.forkIn(
      Effect.updateContext(Effect.withTracerEnabled(sender, false), (_caller: Context.Context<never>) => context),
      scope
    )

  const succeed = (waiting: Waiting, enqueued: Enqueued) => {
    if (enqueued.status !== "existing") wakeup.mark(waiting.job.queue, delayOf(waiting.job))
    Deferred.doneUnsafe(waiting.result, Effect.succeed(enqueued))
  }
  const failAll = (group: ReadonlyArray<Waiting>, error: SqlError) =>
    Effect.sync(() => group.forEach(({ result }) => Deferred.doneUnsafe(result, Effect.fail(error))))

  /** Sends a group; when the data of one is refused, halves it until the bad neighbour is alone. */
  const sendPlain = (group: ReadonlyArray<Waiting>): Effect.Effect<void> =>
    persistently(store.insert(group.map(({ job }) => job), false)).pipe(
      Effect.matchEffect({
        onSuccess: (inserted) =>
          Effect.sync(() =>
            group.forEach((waiting) => succeed(waiting, enqueuedAs(waiting.job, inserted.has(waiting.job.id))))
          ),
        onFailure: (error) =>
          group.length === 1 || Database.isTransient(error) ? failAll(group, error) : halves(group, sendPlain)
      })
    )

  /**
   * Sends jobs with keys. Whoever meets a key in a transaction that has not ended waits apart from the others: nobody
   * else is held up for longer than the few milliseconds it takes to find it.
   */
  const sendKeyed = (group: ReadonlyArray<Waiting>): Effect.Effect<void> =>
    persistently(settleKeys(group.map(({ job }) => job), false, 4)).pipe(
      Effect.matchEffect({
        onSuccess: (enqueued) => Effect.sync(() => group.forEach((waiting, i) => succeed(waiting, enqueued[i]!))),
        onFailure: (error) => {
          if (Database.sqlState(error) === "55P03") {
            return group.length > 1 ? halves(group, sendKeyed) : Effect.asVoid(forkSender(waitForKey(group[0]!)))
          }
          return group.length === 1 || Database.isTransient(error) ? failAll(group, error) : halves(group, sendKeyed)
        }
      })
    )
  const waitForKey = (waiting: Waiting): Effect.Effect<void> =>
    persistently(settleKeys([waiting.job], false, 100)).pipe(
      Effect.retry({
        while: (error) => Database.sqlState(error) === "55P03" && !Deferred.isDoneUnsafe(waiting.result),
        schedule: Schedule.jittered(Schedule.spaced("20 millis"))
      }),
      Effect.matchEffect({
        onSuccess: ([enqueued]) => Effect.sync(() => succeed(waiting, enqueued!)),
        onFailure: (error) => failAll([waiting], error)
      })
    )
  const plain = makeGroup(sendPlain, forkSender)
  const keyed = makeGroup(sendKeyed, forkSender)

  /**
   * Inserts jobs with keys; the losers read the holders, in a second statement, and ask again when one has just ended.
   */
  const settleKeys = (
    jobs: ReadonlyArray<Store.NewJob>,
    inUserTransaction: boolean,
    lockTimeout: number | undefined
  ): Effect.Effect<ReadonlyArray<Enqueued>, SqlError> =>
    Effect.gen(function*() {
      const done = new Map<string, Enqueued>()
      let open = jobs
      while (open.length > 0) {
        const inserted = yield* store.insertUnique(open, inUserTransaction, lockTimeout)
        for (const job of open) if (inserted.has(job.id)) done.set(job.id, enqueuedAs(job, true))
        const losers = open.filter((job) => !inserted.has(job.id))
        if (losers.length === 0) break
        const holders = new Map(
          (yield* store.holders(losers, inUserTransaction)).map((holder) => [holder.id, holder] as const)
        )
        const expired: Array<Store.NewJob> = []
        const again: Array<Store.NewJob> = []
        for (const job of losers) {
          const holder = holders.get(job.id)
          if (holder === undefined) again.push(job)
          else if (holder.expired) expired.push(job)
          // A replay: the key is held by this very job.
          else if (holder.holder === job.id) done.set(job.id, enqueuedAs(job, true))
          else {
            const replaced = job.unique!.onConflict !== "keep" &&
              (yield* store.replace(holder.holder, job, inUserTransaction))
            // Sound: the holder of a key is a job of this queue.
            done.set(job.id, { id: holder.holder as JobId, status: replaced ? "replaced" : "existing" })
          }
        }
        if (expired.length > 0) yield* store.expireKeys(expired, inUserTransaction)
        open = [...again, ...expired]
      }
      return jobs.map((job) => done.get(job.id)!)
    })

  // ---------------------------------------------------------------------------
  // Entrances
  // ---------------------------------------------------------------------------

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

  /** Inserts in the caller's transaction, and wakes only after it has committed. */
  const insertHere = (jobs: ReadonlyArray<Store.NewJob>): Effect.Effect<ReadonlyArray<Enqueued>, SqlError> =>
    Effect.gen(function*() {
      const enqueued = new Map<string, Enqueued>()
      for (const part of parts(jobs.filter((job) => job.unique === undefined))) {
        const inserted = yield* store.insert(part, true)
        for (const job of part) enqueued.set(job.id, enqueuedAs(job, inserted.has(job.id)))
      }
      for (const part of parts(jobs.filter((job) => job.unique !== undefined))) {
        const settled = yield* settleKeys(part, true, undefined)
        part.forEach((job, index) => enqueued.set(job.id, settled[index]!))
      }
      const due = new Map<string, number>()
      for (const job of jobs) {
        if (enqueued.get(job.id)!.status !== "existing") {
          due.set(job.queue, Math.min(due.get(job.queue) ?? Infinity, delayOf(job)))
        }
      }
      yield* client.afterCommit(Effect.sync(() => due.forEach((delay, queue) => wakeup.mark(queue, delay))))
      return jobs.map((job) => enqueued.get(job.id)!)
    })

  return JobQueue.of({
    schema,
    mode,
    stats: store.stats(),
    enqueue: (resolve) =>
      Effect.flatMap(resolve, (job) =>
        Effect.flatMap(inTransaction(() => job.kind), (here) =>
          here
            ? Effect.map(insertHere([job]), ([enqueued]) => enqueued!)
            : job.unique === undefined
            ? plain(job)
            : keyed(job))),
    enqueueAll: (resolve) =>
      Effect.flatMap(resolve, (jobs) =>
        Effect.flatMap(inTransaction(() => jobs[0]?.kind ?? ""), (here) => {
          if (jobs.length === 0) return Effect.succeed([])
          // A savepoint of the caller's transaction.
          if (here) return client.withTransaction(insertHere(jobs))
          return client.withTransaction(insertHere(jobs)).pipe(
            Effect.provideService(SqlClient.BeginTransaction, "BEGIN ISOLATION LEVEL READ COMMITTED"),
            Database.typedTransaction,
            persistently
          )
        })),
    internal: { database, store, wakeup }
  })
})

/**
 * Collects what arrives while the last statement is in flight into the next one: a group commit.
 */
const makeGroup = (
  send: (
    group: ReadonlyArray<{ readonly job: Store.NewJob; readonly result: Deferred.Deferred<Enqueued, SqlError> }>
  ) => Effect.Effect<void>,
  fork: (sender: Effect.Effect<void>) => Effect.Effect<unknown>
) => {
  let waiting: Array<{ readonly job: Store.NewJob; readonly result: Deferred.Deferred<Enqueued, SqlError> }> = []
  let sending = false
  const sender = Effect.gen(function*() {
    while (waiting.length > 0) {
      const group = waiting.splice(0, maxRows)
      yield* Effect.onInterrupt(send(group), () => Effect.sync(() => giveUp(group)))
    }
  }).pipe(
    Effect.onInterrupt(() => Effect.sync(() => giveUp(waiting.splice(0)))),
    Effect.ensuring(Effect.sync(() => {
      sending = false
    }))
  )
  // The layer is closing: nobody must wait for an answer that will not come.
  const giveUp = (group: ReadonlyArray<{ readonly result: Deferred.Deferred<Enqueued, SqlError> }>) =>
    group.forEach(({ result }) => Deferred.doneUnsafe(result, Effect.interrupt))
  return (job: Store.NewJob): Effect.Effect<Enqueued, SqlError> =>
    Effect.suspend(() => {
      const entry = { job, result: Deferred.makeUnsafe<Enqueued, SqlError>() }
      waiting.push(entry)
      const awaited = Deferred.await(entry.result).pipe(
        // Not sent yet: then it never is. Sent: the caller does not learn what became of it.
        Effect.onInterrupt(() =>
          Effect.sync(() => {
            waiting = waiting.filter((other) => other !== entry)
            Deferred.doneUnsafe(entry.result, Effect.interrupt)
          })
        )
      )
      if (sending) return awaited
      sending = true
      return Effect.andThen(fork(sender), awaited)
    })
}

/** Tries again through an outage, for a while. The ids are the same each time, so nothing is inserted twice. */
const persistently = <A, R>(self: Effect.Effect<A, SqlError, R>): Effect.Effect<A, SqlError, R> =>
  Effect.retry(self, {
    // A lock timeout is for the caller to deal with.
    while: (error) => Database.isTransient(error) && Database.sqlState(error) !== "55P03",
    schedule: Schedule.upTo(Database.backoff, { duration: patience })
  })

const halves = <A>(group: ReadonlyArray<A>, send: (half: ReadonlyArray<A>) => Effect.Effect<void>) => {
  const middle = group.length >> 1
  return Effect.andThen(send(group.slice(0, middle)), send(group.slice(middle)))
}

function* parts<A>(all: ReadonlyArray<A>) {
  for (let start = 0; start < all.length; start += maxRows) yield all.slice(start, start + maxRows)
}

// Sound: ids are made or checked in `Enqueue.resolve`.
const enqueuedAs = (job: Store.NewJob, inserted: boolean): Enqueued => ({
  id: job.id as JobId,
  // An id of our own that is there already was inserted by an earlier send whose answer was lost.
  status: inserted || job.idGiven !== true ? "inserted" : "existing"
})

/** How far away a job is; an instant is compared with nothing here, the worker looks at the database's clock. */
const delayOf = (job: Store.NewJob): number => job.runAt === undefined ? job.delay : 0
