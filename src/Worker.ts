/**
 * The worker of one process: claims, runs and settles the jobs it has handlers for, until it is told to stop.
 *
 * @since 0.1.0
 */
import * as Cause from "effect/Cause"
import * as Clock from "effect/Clock"
import type * as Context from "effect/Context"
import { SecureRandom } from "effect/crypto"
import * as Deferred from "effect/Deferred"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Latch from "effect/Latch"
import * as Layer from "effect/Layer"
import type * as Runtime from "effect/Runtime"
import type * as Scope from "effect/Scope"
import type { SqlError } from "effect/sql/SqlError"
import type * as Job from "./Job.ts"
import { JobQueue, JobQueueError } from "./JobQueue.ts"
import * as Line from "./Line.ts"
import * as Liveness from "./Liveness.ts"
import * as Maintenance from "./Maintenance.ts"
import * as Run from "./Run.ts"
import * as Settler from "./Settler.ts"
import * as Wakeup from "./Wakeup.ts"

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
  /** A name for people to read; a worker is identified by a UUID made at start. Default `"worker"`. */
  readonly name?: string | undefined
  /** How long running handlers may go on when the worker is told to stop. Default 20 s. */
  readonly gracePeriod?: Duration.Input | undefined
  /** How often the worker looks by itself. Default 5 s, or 1 s when it cannot LISTEN. */
  readonly pollInterval?: Duration.Input | undefined
  /** How often the worker says that it is alive. Default 10 s. */
  readonly heartbeat?: Duration.Input | undefined
  /** After how long without a heartbeat its jobs go to others. At least two heartbeats. Default 30 s. */
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
 * **Gotchas**
 *
 * Effect's `runMain` ends with code 130 after SIGTERM; pass it {@link teardown} for 0.
 *
 * @category layers
 * @since 0.1.0
 */
export const layer = <const J extends ReadonlyArray<Job.Any>, M extends Job.Middleware<unknown> = never>(
  options: Options<J, M>
): Layer.Layer<never, JobQueueError | SqlError, Needs<J, M>> =>
  Layer.effectDiscard(
    Effect.flatMap(start(options), (engine) => Effect.addFinalizer(() => engine.drain))
  ) as Layer.Layer<never, JobQueueError | SqlError, Needs<J, M>>

/**
 * Runs a worker until nothing is due, or `limit` jobs have been started, and tells how they ended.
 *
 * **Details**
 *
 * For cron hosts and serverless. Jobs that are due later are left in line. `completed` and `failed` count runs: a job
 * that fails and is due again at once is run again.
 *
 * @category running
 * @since 0.1.0
 */
export const runUntilEmpty = <const J extends ReadonlyArray<Job.Any>, M extends Job.Middleware<unknown> = never>(
  options: Options<J, M> & { readonly limit?: number | undefined }
): Effect.Effect<{ readonly completed: number; readonly failed: number }, JobQueueError | SqlError, Needs<J, M>> =>
  Effect.scoped(Effect.gen(function*() {
    const engine = yield* start(options, options.limit ?? Infinity)
    yield* Effect.addFinalizer(() => engine.drain)
    yield* engine.idle
    return engine.counts()
  })) as Effect.Effect<{ readonly completed: number; readonly failed: number }, JobQueueError | SqlError, Needs<J, M>>

/**
 * Defines a middleware, with its requirements inferred.
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
    const [duration, exit] = yield* Effect.timed(Effect.exit(run))
    const took = Duration.format(duration)
    if (Exit.isSuccess(exit)) yield* Effect.logInfo(`job ${job.kind} completed in ${took}`)
    else if (Cause.hasInterruptsOnly(exit.cause)) yield* Effect.logInfo(`job ${job.kind} stopped after ${took}`)
    else yield* Effect.logWarning(`job ${job.kind} failed after ${took}`)
    return yield* exit
  })

/**
 * Ends the process with code 0 when it was told to stop and did; for `NodeRuntime.runMain(…, { teardown })`.
 *
 * @category running
 * @since 0.1.0
 */
export const teardown: Runtime.Teardown = (exit, onExit) =>
  onExit(Exit.isSuccess(exit) || Cause.hasInterruptsOnly(exit.cause) ? 0 : 1)

// -----------------------------------------------------------------------------
// The engine
// -----------------------------------------------------------------------------

interface Engine {
  /** Stops as promised, inside the grace period and 5 s. */
  readonly drain: Effect.Effect<void>
  /** Waits until nothing is due and nothing runs. */
  readonly idle: Effect.Effect<void>
  readonly counts: () => { readonly completed: number; readonly failed: number }
}

/** A lease this process knows of: `confirmed` when the answer to its claim has arrived. */
interface Lease {
  confirmed: boolean
  readonly jobs: Map<string, Run.Running>
}

/** A claim on a dead link never answers; after this the lease counts as unknown and is handed back when found. */
const claimBound = 15_000

const start = Effect.fnUntraced(function*(
  options: Options<ReadonlyArray<Job.Any>, Job.Middleware<unknown>>,
  limit?: number
) {
  const queue = yield* JobQueue
  const { database, store, wakeup } = queue.internal
  // The layers of the handlers and what middleware needs: read by key, required by the public types.
  const context = yield* Effect.context<any>()
  const clock = yield* Clock.Clock
  const now = () => Run.monotonic(clock)
  const settings = yield* resolveOptions(options, queue.mode)
  const routes = routesOf(options.jobs, context)
  // Sound: what the middleware needs, the public types require of the context that every run is given.
  const middleware = (options.middleware ?? []) as ReadonlyArray<Job.Middleware>
  const run = Run.make({ context, middleware })
  const runFork = Effect.runForkWith(context as Context.Context<never>)

  const lines = settings.queues.map(([name, concurrency]) => Line.make(name, concurrency, now()))
  const signals = new Map(lines.map((line) => [line.queue, Latch.makeUnsafe(true)]))
  /** When each idle queue has something due, as far as is known. */
  const dueAt = new Map<string, number>()
  const leases = new Map<string, Lease>()
  let stopping = false
  let suspects = 0
  let startable = limit ?? Infinity
  const counts = { completed: 0, failed: 0 }

  const settler = Settler.make({
    store,
    worker: () => liveness.id(),
    onDoubt: () => liveness.doubt(),
    onSettled: (entry, answer) => {
      const lease = leases.get(entry.lease)
      const running = lease?.jobs.get(entry.id)
      lease?.jobs.delete(entry.id)
      if (lease?.jobs.size === 0) leases.delete(entry.lease)
      // Back in line: this process and the others know when to look.
      if (answer?.state === "done" && answer.status === null && running !== undefined) {
        wakeup.mark(running.queue, entry.delay ?? 0)
      }
    },
    onRelief: () => {
      for (const line of lines) signal(line)
    }
  })

  const liveness: Liveness.Liveness = yield* Liveness.make({
    database,
    store,
    worker: {
      name: options.name ?? "worker",
      queues: lines.map((line) => line.queue),
      kinds: [...routes.exact.keys()],
      prefixes: routes.families.map(({ prefix }) => prefix)
    },
    lease: settings.lease,
    beat: settings.heartbeat,
    leases: () => leases,
    onLost: (gone) => {
      for (const [id, lease] of gone === undefined ? [...leases] : gone.map((id) => [id, leases.get(id)] as const)) {
        if (lease === undefined) continue
        for (const running of lease.jobs.values()) interrupt(running, "lost")
        if (gone !== undefined) leases.delete(id)
      }
    },
    onCancelled: (ids) => {
      for (const lease of leases.values()) {
        for (const id of ids) {
          const running = lease.jobs.get(id)
          if (running !== undefined) interrupt(running, "cancelled")
        }
      }
    },
    onAlive: () => {
      for (const line of lines) {
        fill(line)
        signal(line)
      }
    }
  })

  const signal = (line: Line.Line): void => {
    signals.get(line.queue)!.openUnsafe()
  }

  /** Takes a job that has not started out of the buffer and hands it back, or tells its handler to stop. */
  const interrupt = (running: Run.Running, why: Run.Running["interruption"]): void => {
    if (running.entry !== undefined) return
    if (running.fiber !== undefined) {
      running.interruption ??= why
      running.fiber.interruptUnsafe()
      return
    }
    const line = lines.find((line) => line.queue === running.queue)!
    const index = line.buffer.indexOf(running)
    if (index >= 0) line.buffer.splice(index, 1)
    handBack(running)
  }
  const handBack = (running: Run.Running): void => {
    if (running.row.lane >= 100) suspects--
    running.entry = Run.entryOf(running, "released")
    settler.push(running.entry)
  }

  /** Starts what is claimed for as long as there is a free slot. */
  const fill = (line: Line.Line): void => {
    while (line.running < line.concurrency && line.buffer.length > 0 && liveness.alive() && !stopping) {
      launch(line, line.buffer.shift()!)
    }
  }

  const launch = (line: Line.Line, running: Run.Running): void => {
    line.running++
    line.movedAt = now()
    const startedAt = line.movedAt
    const handling = routes.find(running.row.kind!)
    // A route that was there when it was claimed is there now; uninterruptible, because only the run inside may be.
    running.fiber = runFork(run(running, handling!), { uninterruptible: true })
    running.fiber.addObserver((exit) => {
      Line.ended(line, now() - startedAt, now())
      if (running.row.lane >= 100) suspects--
      const entry = running.entry ??= {
        ...Run.entryOf(running, "failed"),
        delay: 60_000,
        failure: {
          tag: "Defect",
          message: Exit.isFailure(exit) ? "the run ended in an unexpected way" : "the run left no outcome",
          error: undefined
        }
      }
      if (entry.verb === "completed") counts.completed++
      else if (entry.verb === "failed" || entry.verb === "discarded") counts.failed++
      settler.push(entry)
      fill(line)
      signal(line)
    })
  }

  let claiming = 0

  /**
   * One claim. It runs to its end in a fiber of its own: the rows of a claim that nobody waited for would be lost, and
   * a shutdown must not wait for one on a dead link.
   */
  const claim = Effect.fnUntraced(function*(line: Line.Line, limit: number) {
    const result = Deferred.makeUnsafe<{ readonly taken: number; readonly sweep: boolean }, unknown>()
    claiming++
    yield* Effect.forkDetach(
      Effect.onExit(claimHere(line, limit), (exit) => {
        claiming--
        return Deferred.done(result, exit)
      }),
      { startImmediately: true, uninterruptible: true }
    )
    return yield* Deferred.await(result)
  })

  const claimHere = Effect.fnUntraced(function*(line: Line.Line, limit: number) {
    const id = SecureRandom.uuidV7Unsafe()
    const lease: Lease = { confirmed: false, jobs: new Map() }
    const startedAt = now()
    const sweep = Line.sweeps(line, startedAt)
    // At most one suspect runs in a process: a job that kills its worker must not take a whole lease along.
    const withSuspects = suspects === 0
    leases.set(id, lease)
    const rows = yield* Wakeup.bounded(
      store.claim({
        worker: liveness.id(),
        lease: id,
        queue: line.queue,
        lanes: Line.lanes(line, sweep, withSuspects),
        kinds: [...routes.exact.keys()],
        prefixes: routes.families.map(({ prefix }) => prefix),
        limit
      }),
      claimBound
    ).pipe(
      Effect.tapCause(() =>
        Effect.sync(() => {
          // Whether it took effect is unknown: if it did, the next comparison finds a lease that nobody knows.
          leases.delete(id)
          liveness.doubt()
        })
      )
    )
    const claimedAt = now()
    Line.claimed(line, rows, { sweep, limit, startedAt, now: claimedAt })
    if (rows.length === 0) leases.delete(id)
    lease.confirmed = true
    const jobs: Array<Run.Running> = []
    for (const row of rows) {
      const running: Run.Running = {
        row,
        lease: id,
        queue: line.queue,
        claimedAt,
        fiber: undefined,
        interruption: undefined,
        entry: undefined
      }
      lease.jobs.set(row.id, running)
      if (row.lane >= 100) suspects++
      // Told to stop meanwhile; a job whose row is gone; or one suspect too many: back, unburnt.
      if (stopping || row.kind === null || (row.lane >= 100 && suspects > 1) || startable <= 0) handBack(running)
      else {
        startable--
        jobs.push(running)
      }
    }
    Line.add(line, jobs)
    fill(line)
    return { taken: rows.length, sweep }
  })

  /** Claims for one queue whenever there is room and something may be due. */
  const pull = (line: Line.Line) => {
    const latch = signals.get(line.queue)!
    return Effect.gen(function*() {
      yield* latch.await
      latch.closeUnsafe()
      while (!stopping && liveness.alive() && !settler.full() && startable > 0) {
        const room = Math.min(Line.wanted(line, now()), startable)
        if (room === 0) break
        idle.delete(line.queue)
        const { sweep, taken } = yield* claim(line, room)
        if (taken === room) continue
        // Short from the cursor: something may stand behind it, so look from the front as soon as that is affordable.
        if (!sweep) {
          dueAt.set(line.queue, now() + 20)
          break
        }
        idle.set(line.queue, now())
        break
      }
      if (idle.size === lines.length) poke.openUnsafe()
    }).pipe(
      Effect.catchCause((cause) =>
        Effect.andThen(
          Effect.logDebug(`effect-pgqueue: a claim on "${line.queue}" did not go through`, Cause.pretty(cause)),
          Effect.sync(() => {
            dueAt.set(line.queue, now() + 200)
            poke.openUnsafe()
          })
        )
      ),
      Effect.forever
    )
  }

  /** Queues whose last claim came back short, since when. */
  const idle = new Map<string, number>()
  const poke = Latch.makeUnsafe(false)

  yield* wakeup.subscribe((name, delay) => {
    for (const line of lines) {
      if (name !== undefined && name !== line.queue) continue
      if (delay <= 0) {
        dueAt.delete(line.queue)
        signal(line)
      } else {
        const at = now() + delay
        if (at < (dueAt.get(line.queue) ?? Infinity)) {
          dueAt.set(line.queue, at)
          poke.openUnsafe()
        }
      }
    }
  })

  /**
   * Keeps time for all queues of the process: opens each when its next job is due, and looks, with one small query for
   * all that are idle, when a poll is due or a queue has just run dry.
   */
  let lookedAt = -Infinity
  const keepTime = Effect.gen(function*() {
    const at = now()
    for (const line of lines) {
      const due = dueAt.get(line.queue)
      if (due !== undefined && due <= at) {
        dueAt.delete(line.queue)
        signal(line)
      }
      if (Line.stuck(line, at)) {
        // These handlers do not end; other workers may be idle.
        for (const running of line.buffer.splice(0)) handBack(running)
      }
    }
    const polls = at - lookedAt >= settings.pollInterval
    if (polls || [...idle.values()].some((since) => since > lookedAt && at - since >= settleDown)) {
      lookedAt = at
      const looked = yield* Wakeup.bounded(store.look(lines.map((line) => line.queue), Line.everyLane), claimBound)
      const answered = now()
      for (const { due, queue: name, wait } of looked) {
        if (wait !== null) dueAt.set(name, Math.min(dueAt.get(name) ?? Infinity, answered + Math.max(0, wait)))
        // What is due in a queue that has just run dry is not for this worker: claiming it again would be a busy loop.
        if (due && polls) signals.get(name)!.openUnsafe()
      }
    }
    poke.closeUnsafe()
    const next = Math.min(
      ...dueAt.values(),
      lookedAt + settings.pollInterval,
      ...[...idle.values()].filter((since) => since > lookedAt).map((since) => since + settleDown),
      ...lines.filter((line) => line.buffer.length > 0 && line.running >= line.concurrency).map((line) =>
        line.movedAt + Line.stuckAfter
      )
    )
    yield* Effect.timeoutOption(poke.await, Math.max(1, Math.ceil(next - now())))
  }).pipe(
    Effect.catchCause((cause) =>
      Effect.andThen(
        Effect.logDebug("effect-pgqueue: a look did not go through", Cause.pretty(cause)),
        Effect.sleep("200 millis")
      )
    ),
    Effect.forever
  )

  const scope = yield* Effect.scope
  // Without spans: a stream of claims and beats that never ends belongs to nobody's trace.
  const fork = <A, E>(loop: Effect.Effect<A, E>) => Effect.forkIn(Effect.withTracerEnabled(loop, false), scope)
  yield* fork(settler.run)
  yield* fork(liveness.run)
  if (limit === undefined) yield* fork(wakeup.listen)
  yield* fork(keepTime)
  for (const line of lines) yield* fork(pull(line))
  yield* fork(
    Maintenance.sweep({
      store,
      wakeup,
      interval: settings.rescueInterval,
      allowed: () => !stopping && liveness.settled()
    })
  )

  const everyRun = () => [...leases.values()].flatMap((lease) => [...lease.jobs.values()])
  const stillRunning = () => everyRun().filter((running) => running.fiber !== undefined && running.entry === undefined)
  /** Waits until no handler runs, or the time is over. */
  const quiet = (millis: number) =>
    Effect.gen(function*() {
      const done = Deferred.makeUnsafe<void>()
      const check = () => {
        if (stillRunning().length === 0) Deferred.doneUnsafe(done, Effect.void)
      }
      for (const running of stillRunning()) running.fiber!.addObserver(check)
      check()
      yield* Effect.timeoutOption(Deferred.await(done), millis)
    })

  const claimsAnswered = Effect.gen(function*() {
    while (claiming > 0) yield* Effect.sleep(5)
  })

  const drain = Effect.gen(function*() {
    stopping = true
    const begun = now()
    for (const line of lines) for (const running of line.buffer.splice(0)) handBack(running)
    yield* quiet(settings.gracePeriod)
    const over = stillRunning()
    for (const running of over) interrupt(running, "shutdown")
    yield* quiet(1500)
    // A handler that does not stop keeps its lease until the others see that this process is gone.
    const stubborn = stillRunning().length
    if (stubborn > 0) {
      yield* Effect.logWarning(
        `effect-pgqueue: ${stubborn} handlers did not stop; their jobs are rescued after the lease time`
      )
    }
    const left = () => Math.max(200, settings.gracePeriod + 3000 - (now() - begun))
    yield* Effect.timeoutOption(Effect.andThen(claimsAnswered, settler.drained), left())
    if (settler.size() > 0) {
      yield* Effect.logWarning(
        `effect-pgqueue: ${settler.size()} jobs could not be settled; they are rescued after the lease time`
      )
    }
    if (stubborn === 0 && settler.size() === 0) {
      yield* Effect.ignoreCause(Wakeup.bounded(store.unregister(liveness.id()), Math.min(1000, left())))
    }
    for (const line of lines) wakeup.mark(line.queue, 0)
  })

  const engine: Engine = {
    drain,
    idle: Effect.gen(function*() {
      while (true) {
        const busy = leases.size > 0 || settler.size() > 0
        if (!busy && startable <= 0) return
        if (!busy && idle.size === lines.length && lookedAt > Math.max(...idle.values()) && liveness.alive()) return
        yield* Effect.sleep(5)
      }
    }),
    counts: () => ({ ...counts })
  }
  return engine
})

/** A queue that has just run dry is looked at once more after this many milliseconds, for what is due later. */
const settleDown = 20

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
  const millis = (input: Duration.Input | undefined, otherwise: number) =>
    input === undefined ? otherwise : Duration.toMillis(input)
  const settings = {
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

/** Finds handlers by kind: an exact kind wins over a family, the longest prefix among families. */
const routesOf = (jobs: ReadonlyArray<Job.Any>, context: Context.Context<any>) => {
  const exact = new Map<string, Run.Handling>()
  const families: Array<{ readonly prefix: string; readonly handling: Run.Handling }> = []
  for (const job of jobs) {
    const { definition } = job["~effect-pgqueue/Job"]
    // Sound: the layer's type requires this very key for every listed job.
    const registered = context.mapUnsafe.get(definition.key.key) as Job.Registered
    const handling = Run.handling(definition, registered)
    for (const name of [definition.name, ...definition.aliases]) {
      if (definition.family) families.push({ prefix: name, handling })
      else exact.set(name, handling)
    }
  }
  families.sort((a, b) => b.prefix.length - a.prefix.length)
  return {
    exact,
    families,
    find: (kind: string): Run.Handling | undefined =>
      exact.get(kind) ?? families.find(({ prefix }) => kind.startsWith(prefix))?.handling
  }
}
