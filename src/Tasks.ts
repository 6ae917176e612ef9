/**
 * What the processes do for all of them, by turns: take back the jobs of workers that died, park kinds that nobody handles,
 * look for jobs in no place, remove what nobody needs any more.
 *
 * @since 0.1.0
 */
import * as Cause from "effect/Cause"
import * as Clock from "effect/Clock"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import type * as Latch from "effect/Latch"
import * as Metric from "effect/Metric"
import * as Random from "effect/Random"
import type { SqlError } from "effect/sql/SqlError"
import * as Bounded from "./Bounded.ts"
import * as Cleanup from "./Cleanup.ts"
import type * as Contact from "./Contact.ts"
import * as Database from "./Database.ts"
import * as Episode from "./Episode.ts"
import * as Line from "./Line.ts"
import * as Report from "./Report.ts"
import type * as Store from "./Store.ts"
import * as Telemetry from "./Telemetry.ts"
import type * as Wakeup from "./Wakeup.ts"

/** Leases taken back in one statement: a few thousand jobs at most, so that no statement holds its locks for long. */
const batch = 10

/** How many refusals a sweep goes by: it asks twice for each. */
const mostRefusals = 500

/** How many due jobs of each lane are looked at for kinds that nobody handles, and moved in one statement. */
const front = 2000

/** How many parked jobs of a lane come back in one statement. */
const back = 2000

/** How many jobs an audit looks at in one statement: 300 000 in an hour. */
const page = 5000

/**
 * How many finished jobs, or keys, are removed in one statement, and how much longer than it the pause after it is: a few
 * milliseconds of work that nobody who runs jobs feels, and still a million in three minutes. Beside 1 000 jobs a second the
 * p99 of a claim is 2.7 ms without it and 3.1 ms with it (`test/bench/cleanup.ts`); with four times as long, 2.9 and 3.7 ms.
 */
const removals = 250
const rest = 8
/** The longest pause, in milliseconds. */
const longestRest = 5000

/** A statement on a dead link never answers; none of these takes more than a second or two. */
const bound = 30_000

/** After how long to ask whose turn it is in any case, in milliseconds: the interval may have become shorter. */
const longestSleep = 60_000

/** How often at most a turn that lasts is renewed, in milliseconds. */
const shortestRenewal = 100

/** How long the question whose turn it is may take, in milliseconds. */
const askBound = 10_000

/**
 * How long a turn that is due may be locked, in milliseconds, before this process goes on without: whoever takes one has it
 * locked for a statement. Two who do so at once do each other no harm.
 */
const longestHold = 5000

/** One transaction of upkeep, for which nobody waits without end. */
const apart = <A, E>(store: Store.Store, self: Effect.Effect<A, E>, options?: Parameters<Store.Store["apart"]>[1]) =>
  Bounded.bounded(store.apart(self, options), bound)

/**
 * A batch that is halved whenever a statement asks for too much of the server, or is refused for what is in a row, and then
 * grows again slowly: something else may have been the reason.
 */
const halving = (size: number) => {
  let next = size
  const run = <A, E>(statement: (limit: number) => Effect.Effect<A, E>): Effect.Effect<{ full: number; done: A }, E> =>
    Effect.suspend(() => {
      const limit = next
      return statement(limit).pipe(
        Effect.map((done) => {
          next = Math.min(size, limit + Math.ceil(limit / 8))
          return { full: limit, done }
        }),
        Effect.catchIf(
          (error) => limit > 1 && (Database.isTooMuch(error) || Database.isRefusal(error)),
          () => {
            next = Math.ceil(limit / 2)
            return run(statement)
          }
        )
      )
    })
  return run
}

/**
 * Takes back, once, what dead workers left: first their registration, then, in a later statement, their jobs.
 */
export const rescueOnce = Effect.fnUntraced(function*(
  store: Store.Store,
  wakeup: Wakeup.Wakeup,
  standing?: Contact.Standing
) {
  // Each statement by itself: a process that is frozen in the middle of this keeps no lock from the next one.
  const dead = yield* Bounded.bounded(store.reapWorkers(standing), 10_000)
  const leases = halving(batch)
  let jobs = 0
  let after: string | undefined
  /** Jobs that cannot be taken back, and what is said of the first one. */
  let stuck = 0
  let patience = mostRefusals
  let why: string | undefined
  while (true) {
    const tried = yield* Effect.exit(leases((limit) => Bounded.bounded(store.rescue(limit, after), bound)))
    if (Exit.isFailure(tried)) {
      // What cannot be taken back must not keep the jobs of all others.
      const error = tried.cause.reasons.find(Cause.isFailReason)?.error
      const isOfOne = Database.isRefusal(error) || Database.isTooMuch(error)
      const lease = isOfOne ? yield* Bounded.bounded(store.firstLost(after), bound) : undefined
      if (lease === undefined || --patience < 0) return yield* Effect.failCause(tried.cause)
      // One of its jobs is why, or their number: the others come back without it.
      if (lease.jobs > 1) {
        if ((yield* Bounded.bounded(store.scatter(lease.id), bound)) === 0) after = lease.id
        continue
      }
      stuck++
      why ??= Database.describe(error)
      after = lease.id
      continue
    }
    const { done: taken, full } = tried.value
    for (const queue of taken.queues) wakeup.mark(queue, 0)
    for (const job of taken.awaited) wakeup.tell("end", job)
    jobs += taken.back + taken.ended
    // Leases whose rows are locked by somebody stay for the next sweep, and hide no other.
    if (taken.leases < full || taken.last === null) break
    after = taken.last
  }
  if (stuck > 0) yield* Report.error(`${stuck} lost jobs cannot be taken back (${why})`)
  if (dead.length > 0 || jobs > 0) {
    yield* Report.info(`rescued ${jobs} jobs, ${dead.length} workers declared dead`)
  }
  return jobs
})

/**
 * Parks the jobs at the front of the lines that no live worker lists, until handled ones are in front again.
 */
export const parkOnce = Effect.fnUntraced(function*(store: Store.Store) {
  let jobs = 0
  while (true) {
    const count = yield* apart(store, store.park(Line.everyLane, front))
    jobs += count
    if (count < front / 2) break
  }
  if (jobs > 0) yield* Report.info(`parked ${jobs} jobs of kinds that no worker handles`)
  return jobs
})

/**
 * Brings back everything that is parked and that this worker lists.
 */
export const unparkOnce = Effect.fnUntraced(function*(store: Store.Store, wakeup: Wakeup.Wakeup, worker: string) {
  let jobs = 0
  while (true) {
    const { count, queues } = yield* Bounded.bounded(store.unpark(worker, back), bound)
    for (const queue of queues) wakeup.mark(queue, 0)
    jobs += count
    // The statement that finds nothing more removes the mark.
    if (count === 0) break
  }
  if (jobs > 0) yield* Report.info(`brought ${jobs} parked jobs back in line`)
  return jobs
})

/**
 * Holds one page of jobs, after the job `after`, against the places a job can be in, and puts those in none back in line.
 * Returns how many that were, and where to go on; `undefined` at the end.
 */
export const auditOnce = Effect.fnUntraced(function*(
  store: Store.Store,
  wakeup: Wakeup.Wakeup,
  after: string | undefined
) {
  const { last, misplaced } = yield* apart(store, store.audit(after, page))
  let jobs = 0
  if (misplaced.length > 0) {
    const { queues, repaired } = yield* apart(store, store.repair(misplaced))
    for (const queue of queues) wakeup.mark(queue, 0)
    jobs = repaired.length
    if (repaired.length > 0) {
      yield* Metric.update(Telemetry.misplacedJobs, repaired.length)
      yield* Report.error(
        `${repaired.length} jobs were in no place and are back in line; this must not happen, please report it`,
        repaired.slice(0, 10)
      )
    }
  }
  return { jobs, last }
})

/** From when on the server's queue of notifications is worth a warning. */
const alarming = 0.5

/**
 * Watches the server's queue of notifications: a session that listens and holds a transaction open keeps everything in it.
 */
const watchingNews = (store: Store.Store) => {
  let warned = false
  return Effect.gen(function*() {
    const usage = yield* Bounded.bounded(store.newsUsage, askBound)
    yield* Metric.update(Telemetry.notificationQueueUsage, usage)
    const alarmed = warned
    warned = usage >= alarming
    if (alarmed || !warned) return
    yield* Report.warning(
      `the server's queue of notifications is ${
        Math.round(usage * 100)
      } % full: a session that listens holds a transaction open. When it is full, jobs are found by polling alone`
    )
  })
}

/** Runs removals to the end of what is to be removed, one after the other with a pause; returns how many rows that were. */
const removeAll = Effect.fnUntraced(function*(
  store: Store.Store,
  remove: (limit: number, after: string | undefined) => Effect.Effect<Cleanup.Removed, SqlError>,
  timeout?: number
) {
  const rows = halving(removals)
  let total = 0
  let after: string | undefined
  while (true) {
    const { done: [took, { count, found, last }], full } = yield* rows((limit) =>
      Effect.timed(apart(store, remove(limit, after), { inOrder: true, timeout }))
    )
    total += count
    // What somebody has locked stays for the next turn.
    if (found < full || last === null || (count === 0 && last === after)) return total
    after = last
    yield* Effect.sleep(Math.min(longestRest, rest * Duration.toMillis(took)))
  }
})

/**
 * Removes every finished job whose retention is over, by what the processes have agreed on. `timeout` bounds a statement, in
 * milliseconds. That one status does not go through keeps no other from it.
 */
export const cleanUpOnce = Effect.fnUntraced(function*(
  store: Store.Store,
  timeout?: number
) {
  const exits = yield* Effect.forEach(
    Cleanup.endings,
    (ending) => Effect.exit(removeAll(store, (limit, after) => store.prune(ending, limit, after), timeout))
  )
  const jobs = exits.reduce((sum, exit) => sum + (Exit.isSuccess(exit) ? exit.value : 0), 0)
  if (jobs > 0) yield* Report.debug(`${jobs} finished jobs were past their retention`)
  for (const exit of exits) yield* exit
  return jobs
})

/**
 * Removes every unique key whose period is over.
 */
export const expireOnce = (store: Store.Store) =>
  Effect.tap(
    removeAll(store, store.expire),
    (keys) => keys > 0 ? Report.debug(`${keys} unique keys had expired`) : Effect.void
  )

/** How long at least from one turn of a task to the next, in all processes together, in milliseconds. */
export interface Intervals {
  readonly rescue: number
  readonly parking: number
  readonly audit: number
  readonly cleanup: number
  readonly keys: number
}

/** Where nobody says more than how often a worker sweeps. */
export const intervals = (rescueInterval: number): Intervals => ({
  rescue: rescueInterval,
  parking: rescueInterval,
  // Nothing waits for it, and six statements each 15 s were a third of all that an idle process sends.
  audit: 4 * rescueInterval,
  cleanup: 60_000,
  keys: 60_000
})

/** Where nobody says anything. */
export const defaults: Intervals = intervals(15_000)

/** What one turn has at hand. */
interface Having {
  readonly standing: Contact.Standing | undefined
  readonly position: string | undefined
}

interface Task {
  readonly name: keyof Intervals
  /** What it is called when it fails. */
  readonly what: string
  /** Whether only who may judge others takes part. */
  readonly judges: boolean
  /** Returns how many rows it has dealt with. */
  readonly once: (having: Having) => Effect.Effect<number, SqlError | Bounded.TimedOut>
}

const tasks = (
  store: Store.Store,
  wakeup: Wakeup.Wakeup,
  watchNews: ReturnType<typeof watchingNews>
): ReadonlyArray<Task> => [
  {
    name: "rescue",
    what: "the rescue of lost jobs",
    judges: true,
    once: ({ standing }) => rescueOnce(store, wakeup, standing)
  },
  { name: "parking", what: "parking", judges: true, once: () => parkOnce(store) },
  {
    name: "audit",
    what: "the audit",
    judges: true,
    once: ({ position }) =>
      Effect.flatMap(
        Effect.andThen(watchNews, auditOnce(store, wakeup, position)),
        ({ jobs, last }) => Effect.as(Bounded.bounded(store.goOn("audit", last), askBound), jobs)
      )
  },
  {
    name: "cleanup",
    what: "the cleanup of finished jobs",
    judges: false,
    once: () => cleanUpOnce(store)
  },
  { name: "keys", what: "the removal of expired keys", judges: false, once: () => expireOnce(store) }
]

/** Runs a turn in a span of its own and measures it. Without spans of its statements: there may be thousands. */
const measured = (task: Task, having: Having) => {
  const attributes = { task: task.name }
  const count = (metric: Metric.Counter<number>, by: number) =>
    Metric.update(Metric.withAttributes(metric, attributes), by)
  return Effect.gen(function*() {
    yield* count(Telemetry.taskRuns, 1)
    const rows = yield* Effect.withTracerEnabled(task.once(having), false)
    yield* Effect.annotateCurrentSpan("rows", rows)
    yield* count(Telemetry.taskRows, rows)
  }).pipe(
    Effect.timed,
    Effect.tap(([took]) => Metric.update(Metric.withAttributes(Telemetry.taskDuration, attributes), took)),
    Effect.tapCause((cause) => Cause.hasInterruptsOnly(cause) ? Effect.void : count(Telemetry.taskFailures, 1)),
    Effect.withSpan(`Maintenance.${task.name}`, { root: true })
  )
}

/**
 * The tasks of all processes, each to be run until it is interrupted: at most once an interval whatever their number,
 * whoever comes first, and apart, so that a failure of one stops no other.
 *
 * **Details**
 *
 * A process looks when the turn is due, and up to a fifth of the interval later, so that a fleet does not work in step. A
 * turn that was taken and not done, because the process died, comes again after the interval.
 */
export const loops = (options: {
  readonly store: Store.Store
  readonly wakeup: Wakeup.Wakeup
  readonly intervals: Intervals
  /** What gives this process the right to judge others, while it has it. */
  readonly standing: () => Contact.Standing | undefined
  /** It begins nothing more. */
  readonly stopping: () => boolean
}): ReadonlyArray<Effect.Effect<never>> =>
  tasks(options.store, options.wakeup, watchingNews(options.store)).map((task) => {
    const { store } = options
    const own = options.intervals[task.name]
    const episode = Episode.make(task.what)
    /** How long until the next turn, at least. */
    let wait = 0
    /** How long a turn lasts: what all have agreed on, once it is known. */
    let interval = own
    /** Since when the turn has been due, and somebody has had it locked whenever this process asked. */
    let lockedSince = Infinity

    const turn = Effect.gen(function*() {
      wait = interval
      const standing = options.standing()
      if (options.stopping() || (task.judges && standing === undefined)) return
      const clock = yield* Clock.Clock
      const now = () => Bounded.monotonic(clock)
      let renewed = now()
      const anyway = now() - lockedSince >= longestHold
      const answer = yield* Effect.withTracerEnabled(
        Bounded.bounded(store.take(task.name, own, anyway), askBound),
        false
      )
      interval = answer.interval
      wait = answer.wait
      if (!answer.taken) {
        lockedSince = wait > 0 ? Infinity : Math.min(lockedSince, now())
        return
      }
      lockedSince = Infinity
      wait = interval
      // Beside the turn: a batch, and the rest after it, may be longer than the interval.
      const renewing = Effect.sleep(Math.max(shortestRenewal, interval / 3)).pipe(
        Effect.andThen(Effect.suspend(() => {
          renewed = now()
          return Effect.ignoreCause(Bounded.bounded(store.renew(task.name), askBound))
        })),
        Effect.forever,
        Effect.withTracerEnabled(false)
      )
      yield* Effect.raceFirst(measured(task, { standing, position: answer.position }), renewing)
      yield* episode.succeeded
      wait = Math.max(0, interval - (now() - renewed))
    })
    const pause = Effect.suspend(() =>
      Effect.flatMap(
        Random.nextBetween(0, 0.2),
        (jitter) => Effect.sleep(Math.min(wait + interval * jitter, longestSleep * (1 + jitter)))
      )
    )
    return episode.forever(Effect.andThen(pause, turn))
  })

/**
 * Brings back, for as long as it runs, what is parked and one worker lists: when it has been registered, and from time to
 * time, about every `interval` milliseconds, because somebody may have parked a job while it registered.
 */
export const unparking = (options: {
  readonly store: Store.Store
  readonly wakeup: Wakeup.Wakeup
  readonly worker: () => string
  readonly interval: number
  /** Opened when this worker has been registered: there may be something to bring back. */
  readonly latch: Latch.Latch
  readonly onUnparked: () => void
}): Effect.Effect<never> => {
  const episode = Episode.make("bringing parked jobs back")
  const pause = Effect.suspend(() =>
    Effect.flatMap(Random.nextBetween(0.8, 1.2), (jitter) => Effect.sleep(options.interval * jitter))
  )
  return episode.forever(
    Effect.raceFirst(options.latch.await, pause).pipe(
      Effect.andThen(Effect.suspend(() => {
        options.latch.closeUnsafe()
        return unparkOnce(options.store, options.wakeup, options.worker())
      })),
      Effect.map(options.onUnparked),
      Effect.andThen(episode.succeeded),
      Effect.tapCause(() => options.latch.open)
    )
  )
}
