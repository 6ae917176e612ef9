/**
 * What every worker does for all of them: takes back the jobs of workers that died, parks kinds that nobody handles, looks
 * for jobs in no place.
 *
 * @since 0.1.0
 */
import * as Effect from "effect/Effect"
import type * as Latch from "effect/Latch"
import * as Metric from "effect/Metric"
import * as Random from "effect/Random"
import * as Bounded from "./Bounded.ts"
import * as Episode from "./Episode.ts"
import * as Line from "./Line.ts"
import type * as Store from "./Store.ts"
import * as Telemetry from "./Telemetry.ts"
import type * as Wakeup from "./Wakeup.ts"

/** Leases taken back in one statement: a few thousand jobs at most, so that no statement holds its locks for long. */
const batch = 10

/** How many due jobs of each lane are looked at for kinds that nobody handles, and moved in one statement. */
const front = 2000

/** How many parked jobs of a lane come back in one statement. */
const back = 2000

/** How many jobs an audit looks at in one statement: a million in an hour. */
const page = 5000

/** A statement on a dead link never answers; none of these takes more than a second or two. */
const bound = 30_000

/**
 * Takes back, once, what dead workers left: first their registration, then, in a later statement, their jobs.
 */
export const rescueOnce = Effect.fnUntraced(function*(store: Store.Store, wakeup: Wakeup.Wakeup) {
  const dead = yield* Bounded.bounded(store.reapWorkers(), 10_000)
  let jobs = 0
  let after: string | undefined
  while (true) {
    const taken = yield* Bounded.bounded(store.rescue(batch, after), bound)
    for (const queue of taken.queues) wakeup.mark(queue, 0)
    for (const job of taken.awaited) wakeup.tell("end", job)
    jobs += taken.back + taken.ended
    // Leases whose rows are locked by somebody stay for the next sweep, and hide no other.
    if (taken.leases < batch || taken.last === null) break
    after = taken.last
  }
  if (dead.length > 0 || jobs > 0) {
    yield* Effect.logInfo(`effect-pgqueue: rescued ${jobs} jobs, ${dead.length} workers declared dead`)
  }
  return jobs
})

/**
 * Parks the jobs at the front of the lines that no live worker lists, until handled ones are in front again.
 */
export const parkOnce = Effect.fnUntraced(function*(store: Store.Store) {
  let jobs = 0
  while (true) {
    const count = yield* Bounded.bounded(store.park(Line.everyLane, front), bound)
    jobs += count
    if (count < front / 2) break
  }
  if (jobs > 0) yield* Effect.logInfo(`effect-pgqueue: parked ${jobs} jobs of kinds that no worker handles`)
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
  if (jobs > 0) yield* Effect.logInfo(`effect-pgqueue: brought ${jobs} parked jobs back in line`)
  return jobs
})

/**
 * Holds one page of jobs, after the job `after`, against the places a job can be in, and puts those in none back in line.
 * Returns where to go on; `undefined` at the end.
 */
export const auditOnce = Effect.fnUntraced(function*(
  store: Store.Store,
  wakeup: Wakeup.Wakeup,
  after: string | undefined
) {
  const { last, misplaced } = yield* Bounded.bounded(store.audit(after, page), bound)
  if (misplaced.length > 0) {
    const { queues, repaired } = yield* Bounded.bounded(store.repair(misplaced), bound)
    for (const queue of queues) wakeup.mark(queue, 0)
    if (repaired.length > 0) {
      yield* Metric.update(Telemetry.misplacedJobs, repaired.length)
      yield* Effect.logError(
        `effect-pgqueue: ${repaired.length} jobs were in no place and are back in line; this must not happen, please report it`,
        repaired.slice(0, 10)
      )
    }
  }
  return last
})

/**
 * The tasks, each to be run until it is interrupted: with jitter, so that the processes of a fleet do not work in step, and
 * apart, so that a failure of one stops no other.
 */
export const tasks = (options: {
  readonly store: Store.Store
  readonly wakeup: Wakeup.Wakeup
  readonly worker: () => string
  /** Milliseconds. */
  readonly interval: number
  /** Whether this process may judge others. */
  readonly allowed: () => boolean
  /** Opened when this worker has been registered: there may be something to bring back. */
  readonly unparking: Latch.Latch
  readonly onUnparked: () => void
}): ReadonlyArray<Effect.Effect<never>> => {
  const { store, unparking, wakeup } = options
  const pause = Effect.suspend(() =>
    Effect.flatMap(Random.nextBetween(0.8, 1.2), (jitter) => Effect.sleep(options.interval * jitter))
  )
  const task = <E>(what: string, once: Effect.Effect<unknown, E>, wait: Effect.Effect<unknown> = pause) => {
    const episode = Episode.make(what)
    return Effect.andThen(wait, Effect.andThen(once, episode.succeeded)).pipe(
      Effect.catchCause((cause) => Effect.andThen(episode.failed(cause), Effect.sleep("200 millis"))),
      Effect.forever
    )
  }
  let audited: string | undefined
  return [
    task("the rescue of lost jobs", Effect.suspend(() => options.allowed() ? rescueOnce(store, wakeup) : Effect.void)),
    task("parking", Effect.suspend(() => options.allowed() ? parkOnce(store) : Effect.void)),
    task(
      "the audit",
      Effect.suspend(() =>
        options.allowed()
          ? Effect.map(auditOnce(store, wakeup, audited), (last) => {
            audited = last
          })
          : Effect.void
      )
    ),
    task(
      "bringing parked jobs back",
      Effect.suspend(() => {
        unparking.closeUnsafe()
        return unparkOnce(store, wakeup, options.worker()).pipe(
          Effect.map(options.onUnparked),
          Effect.tapCause(() => unparking.open)
        )
      }),
      // Also from time to time: somebody may have parked a job while this worker registered.
      Effect.raceFirst(unparking.await, pause)
    )
  ]
}
