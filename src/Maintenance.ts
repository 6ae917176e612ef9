/**
 * What every worker does for all of them: takes back the jobs of workers that died.
 *
 * @since 0.1.0
 */
import * as Effect from "effect/Effect"
import * as Random from "effect/Random"
import * as Bounded from "./Bounded.ts"
import * as Episode from "./Episode.ts"
import type * as Store from "./Store.ts"
import type * as Wakeup from "./Wakeup.ts"

/** Leases taken back in one statement: a few thousand jobs at most, so that no statement holds its locks for long. */
const batch = 10

/**
 * Takes back, once, what dead workers left: first their registration, then, in a later statement, their jobs.
 */
export const rescueOnce = Effect.fnUntraced(function*(store: Store.Store, wakeup: Wakeup.Wakeup) {
  const dead = yield* Bounded.bounded(store.reapWorkers(), 10_000)
  let jobs = 0
  let after: string | undefined
  while (true) {
    const taken = yield* Bounded.bounded(store.rescue(batch, after), 30_000)
    for (const queue of taken.queues) wakeup.mark(queue, 0)
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
 * Sweeps until it is interrupted, with jitter, so that the processes of a fleet do not sweep in step.
 */
export const sweep = (options: {
  readonly store: Store.Store
  readonly wakeup: Wakeup.Wakeup
  /** Milliseconds. */
  readonly interval: number
  /** Whether this process may judge others. */
  readonly allowed: () => boolean
}): Effect.Effect<never> => {
  const episode = Episode.make("the rescue of lost jobs")
  return Effect.gen(function*() {
    yield* Effect.sleep(options.interval * (yield* Random.nextBetween(0.8, 1.2)))
    if (options.allowed()) yield* rescueOnce(options.store, options.wakeup)
    yield* episode.succeeded
  }).pipe(Effect.catchCause(episode.failed), Effect.forever)
}
