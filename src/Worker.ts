/**
 * The worker of one process: claims, runs and settles the jobs it has handlers for, until it is told to stop.
 *
 * @since 0.1.0
 */
import * as Cause from "effect/Cause"
import * as Clock from "effect/Clock"
import * as Context from "effect/Context"
import type * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Layer from "effect/Layer"
import * as Option from "effect/Option"
import * as Predicate from "effect/Predicate"
import type * as Scope from "effect/Scope"
import * as SqlClient from "effect/sql/SqlClient"
import type { SqlError } from "effect/sql/SqlError"
import * as Bounded from "./Bounded.ts"
import * as Database from "./Database.ts"
import * as Enqueue from "./Enqueue.ts"
import type * as Job from "./Job.ts"
import { JobQueue, JobQueueError } from "./JobQueue.ts"
import * as Loop from "./Loop.ts"
import * as Report from "./Report.ts"
import * as Router from "./Router.ts"

export { runMain, teardown } from "./Main.ts"

/**
 * The options of a worker.
 *
 * @category models
 * @since 0.1.0
 */
export interface Options<J extends ReadonlyArray<Job.Any>, M> {
  /** The jobs to handle. The worker requires a handler for each. */
  readonly jobs: J
  /** Settings of the queues of these jobs. Queues that are left out run with the default. */
  readonly queues?:
    | { readonly [Q in J[number]["queue"] | (string & {})]?: { readonly concurrency?: number | undefined } }
    | undefined
  /** Wraps every run, outermost first. */
  readonly middleware?: ReadonlyArray<M> | undefined
  /** How many jobs of one queue run at once where `queues` does not say. Default 10. */
  readonly concurrency?: number | undefined
  /** A name for people to read, 1 to 200 characters; a worker is identified by a UUID made at start. Default `"worker"`. */
  readonly name?: string | undefined
  /** How long running handlers may go on when the worker is told to stop. Default 20 s. */
  readonly gracePeriod?: Duration.Input | undefined
  /** How often the worker looks by itself. Default 5 s, or 1 s when it cannot LISTEN. */
  readonly pollInterval?: Duration.Input | undefined
  /** How often the worker says that it is alive; not less often than `pollInterval` where it cannot LISTEN. Default 10 s. */
  readonly heartbeat?: Duration.Input | undefined
  /**
   * After how long without a heartbeat its jobs go to others. At least two heartbeats. Its handlers are interrupted a
   * heartbeat earlier: after two thirds of it at the defaults, and at the latest when a sixth of it is left. Default 30 s.
   */
  readonly lease?: Duration.Input | undefined
  /** How often to look for dead workers' jobs, ±20 %. Default 15 s. */
  readonly rescueInterval?: Duration.Input | undefined
}

type Requirements<M> = M extends (...args: ReadonlyArray<never>) => Effect.Effect<infer _A, infer _E, infer R>
  ? Exclude<R, Job.Current | Scope.Scope>
  : never
type Needs<J extends ReadonlyArray<Job.Any>, M> =
  | JobQueue
  | J[number]["~effect-pgqueue/Job"]["handler"]
  | Requirements<M>

/**
 * Runs a worker for as long as the layer lives.
 *
 * **Details**
 *
 * Claims only kinds it has a handler for. When the scope closes it stops claiming, hands back what it has not started,
 * gives running handlers the grace period, interrupts the rest and hands their jobs back without spending an attempt.
 *
 * Fails with `JobQueueError` when an option does not fit, and with `SqlError` (`AuthorizationError`) when the role it logs
 * in as may not work.
 *
 * **Gotchas**
 *
 * Effect's `runMain` ends with code 130 after SIGTERM, and never where a COMMIT is not answered: use {@link runMain}.
 *
 * **Example** (A process that works)
 *
 * ```ts
 * import { PgClient } from "@effect/sql-pg"
 * import { Config, Effect, Layer, Schema } from "effect"
 * import { Job, JobQueue, Worker } from "effect-pgqueue"
 *
 * class Greet extends Job.make("greet", { payload: { name: Schema.String } }) {}
 *
 * const GreetHandler = Greet.toLayer(({ name }) => Effect.log(`Hello, ${name}!`))
 * const PgLive = PgClient.layerConfig({ url: Config.Redacted("DATABASE_URL") })
 * const QueueLive = JobQueue.layer().pipe(Layer.provideMerge(PgLive))
 *
 * const Main = Worker.layer({ jobs: [Greet], queues: { default: { concurrency: 50 } } }).pipe(
 *   Layer.provide([GreetHandler, QueueLive])
 * )
 *
 * Worker.runMain(Layer.launch(Main))
 * ```
 *
 * @category layers
 * @since 0.1.0
 */
export const layer = <const J extends ReadonlyArray<Job.Any>, M extends Job.Middleware<unknown> = never>(
  options: Options<J, M>
): Layer.Layer<never, JobQueueError | SqlError, Needs<J, M>> =>
  Layer.effectDiscard(
    Effect.flatMap(start(options), (loop) => Effect.addFinalizer(() => loop.drain))
  ) as Layer.Layer<never, JobQueueError | SqlError, Needs<J, M>>

/**
 * Runs a worker until nothing is due, or `limit` jobs have been started, and tells how they ended.
 *
 * **Details**
 *
 * For cron hosts and serverless. Jobs that are due later are left in line. Those of workers that look dead are waited for,
 * and taken back once this one has been connected for a `lease`: nobody else may ever be. `completed` and `failed` count
 * runs: a job that fails and is due again at once is run again. It waits by the clock: under a `TestClock` that stands still
 * it does not end.
 *
 * Fails with `SqlError` when the database refuses the claims for good, or the role it logs in as may not work, and with
 * `JobQueueError` when an option does not fit, or when it is called inside a transaction.
 *
 * **Example** (Working through what is due)
 *
 * ```ts
 * import { Effect } from "effect"
 * import { Job, Worker } from "effect-pgqueue"
 *
 * class Sweep extends Job.make("sweep") {}
 *
 * const SweepHandler = Sweep.toLayer(() => Effect.log("swept"))
 * const once = Worker.runUntilEmpty({ jobs: [Sweep], limit: 1000 }).pipe(Effect.provide(SweepHandler))
 * ```
 *
 * @category running
 * @since 0.1.0
 */
export const runUntilEmpty = <const J extends ReadonlyArray<Job.Any>, M extends Job.Middleware<unknown> = never>(
  options: Options<J, M> & { readonly limit?: number | undefined }
): Effect.Effect<{ readonly completed: number; readonly failed: number }, JobQueueError | SqlError, Needs<J, M>> =>
  Effect.scoped(Effect.gen(function*() {
    const loop = yield* start(options, options.limit ?? Infinity)
    yield* Effect.addFinalizer(() => loop.drain)
    yield* loop.idle
    return loop.counts()
  })) as Effect.Effect<{ readonly completed: number; readonly failed: number }, JobQueueError | SqlError, Needs<J, M>>

/**
 * Defines a middleware, with its requirements inferred.
 *
 * **Example** (Annotating the logs of every run)
 *
 * ```ts
 * import { Effect } from "effect"
 * import { Worker } from "effect-pgqueue"
 *
 * const tenant = Worker.middleware((run, job) => Effect.annotateLogs(run, "tenant", job.metadata["tenant"] ?? "none"))
 * ```
 *
 * @category middleware
 * @since 0.1.0
 */
export const middleware = <R>(wrap: Job.Middleware<R>): Job.Middleware<R> => wrap

/**
 * Logs the start, the end and the duration of every run. Never the payload.
 *
 * @category middleware
 * @since 0.1.0
 */
export const logged: Job.Middleware = (run, job) =>
  Effect.gen(function*() {
    yield* Effect.logDebug(`job ${job.kind} starts, attempt ${job.attempt} of ${job.maxAttempts}`)
    const clock = yield* Clock.Clock
    const begun = Bounded.monotonic(clock)
    // Whoever is interrupted goes on nowhere but here.
    return yield* Effect.onExit(run, (exit) => {
      const took = `${Math.round(Bounded.monotonic(clock) - begun)} ms`
      if (Exit.isSuccess(exit)) return Effect.logInfo(`job ${job.kind} completed in ${took}`)
      return Cause.hasInterruptsOnly(exit.cause)
        ? Effect.logInfo(`job ${job.kind} stopped after ${took}`)
        : Effect.logWarning(`job ${job.kind} failed after ${took}`)
    })
  })

/** How long the start of a worker waits to learn whether its role may work, in milliseconds. */
const permissionBound = 1000

const start = Effect.fnUntraced(function*(
  options: Options<ReadonlyArray<Job.Any>, Job.Middleware<unknown>>,
  limit?: number
) {
  if (limit !== undefined && limit !== Infinity && !(Number.isInteger(limit) && limit >= 0)) {
    return yield* new JobQueueError({ reason: "InvalidOption", message: "limit must be an integer and not negative" })
  }
  const queue = yield* JobQueue
  const settings = yield* resolveOptions(options, queue.mode)
  // The handlers and what middleware needs: read by key, required by the public types.
  const context = yield* Effect.context<never>()
  if (Database.inAnyTransaction(context)) {
    // Handlers would write into it, and their jobs end whatever becomes of it.
    return yield* new JobQueueError({ reason: "InTransaction", message: "a worker cannot run inside a transaction" })
  }
  const router = Router.make(options.jobs, context)
  if (router.ambiguous !== undefined) {
    return yield* new JobQueueError({
      reason: "InvalidOption",
      message: `two of the listed jobs handle "${router.ambiguous}"`
    })
  }
  // Stored with the worker, at every start: what the database could not hold would be tried again and again.
  const problem = Enqueue.problemOfName("name", settings.name, 200) ??
    settings.queues.map(([name]) => Enqueue.problemOfName("queue", name, 128)).find(Predicate.isString) ??
    [...router.kinds, ...router.prefixes.filter((prefix) => prefix !== "")].map((kind) =>
      Enqueue.problemOfName("kind", kind, 200)
    ).find(Predicate.isString)
  if (problem !== undefined) return yield* new JobQueueError({ reason: "InvalidOption", message: problem })
  const { database } = queue.internal
  for (const handler of router.transactional) {
    const client = Context.getOption(Context.merge(context, handler.context), SqlClient.SqlClient)
    if (Option.isSome(client) && client.value.transactionService.key !== database.app.transactionService.key) {
      return yield* new JobQueueError({
        reason: "ForeignClient",
        message: `the transactional handler of "${handler.name}" was built on another SqlClient than the queue's`
      })
    }
  }
  if (router.transactional.length > 0 && database.connect === undefined) {
    yield* Report.warning(
      "without a PgClient the heartbeat goes through the pool of the transactional handlers: give it more connections than handlers that run at once, or their jobs are lost"
    )
  }
  // A worker waits for a database that is away, and would go on asking one that refuses it everything. What keeps this from
  // being answered is for the loop to deal with.
  yield* Bounded.bounded(queue.internal.store.mayWork(), permissionBound).pipe(
    Effect.withTracerEnabled(false),
    Effect.catch((error) => Database.isDenied(error) ? Effect.fail(error) : Effect.void)
  )
  return yield* Loop.start({
    ...queue.internal,
    ...settings,
    // Without LISTEN a cancellation is heard of by looking.
    heartbeat: queue.mode === "listen" ? settings.heartbeat : Math.min(settings.heartbeat, settings.pollInterval),
    context,
    router,
    // Sound: what the middleware needs, the public types require of the context that every run is given.
    middleware: (options.middleware ?? []) as ReadonlyArray<Job.Middleware>,
    limit
  })
})

/** Checks the options and completes the queues from those of the listed jobs. */
const resolveOptions = Effect.fnUntraced(function*(
  options: Options<ReadonlyArray<Job.Any>, unknown>,
  mode: "listen" | "poll"
) {
  const invalid = (reason: JobQueueError["reason"], message: string) => new JobQueueError({ reason, message })
  const used = new Set(options.jobs.map((job) => job.queue))
  for (const name of Object.keys(options.queues ?? {})) {
    if (!used.has(name)) {
      return yield* invalid("QueueNotConsumed", `the queue "${name}" is named but no listed job uses it`)
    }
  }
  const named = options.queues === undefined ? undefined : new Map(Object.entries(options.queues))
  const queues: Array<readonly [string, number]> = []
  for (const name of used) {
    const concurrency = named?.get(name)?.concurrency ?? options.concurrency ?? 10
    if (!Number.isInteger(concurrency) || concurrency < 1 || concurrency > 10_000) {
      return yield* invalid("InvalidOption", `the concurrency of "${name}" must be an integer from 1 to 10000`)
    }
    queues.push([name, concurrency])
  }
  const millis = (input: Duration.Input | undefined, otherwise: number) => Enqueue.millisOf(input) ?? otherwise
  const settings = {
    name: options.name ?? "worker",
    queues,
    gracePeriod: millis(options.gracePeriod, 20_000),
    pollInterval: millis(options.pollInterval, mode === "listen" ? 5000 : 1000),
    heartbeat: millis(options.heartbeat, 10_000),
    lease: millis(options.lease, 30_000),
    rescueInterval: millis(options.rescueInterval, 15_000)
  }
  if (!(settings.heartbeat >= 10 && settings.lease >= 2 * settings.heartbeat && settings.lease <= 86_400_000)) {
    return yield* invalid("InvalidOption", "lease must be at least two heartbeats and at most a day")
  }
  if (!(settings.gracePeriod >= 0 && settings.gracePeriod <= 86_400_000)) {
    return yield* invalid("InvalidOption", "gracePeriod must be from 0 to a day")
  }
  if (!(settings.pollInterval >= 10 && settings.rescueInterval >= 10)) {
    return yield* invalid("InvalidOption", "pollInterval and rescueInterval must be at least 10 milliseconds")
  }
  return settings
})
