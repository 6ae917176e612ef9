/**
 * What a loop says of its failures: a warning when they begin, and when they have ended; in between nothing. When they come and
 * go all the time it says so every ten seconds.
 *
 * @since 0.1.0
 */
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import * as Bounded from "./Bounded.ts"
import * as Database from "./Database.ts"
import * as Outcome from "./Outcome.ts"
import * as Report from "./Report.ts"

/**
 * The failures of one loop.
 */
export interface Episode {
  readonly failed: (cause: Cause.Cause<unknown>) => Effect.Effect<void>
  readonly succeeded: Effect.Effect<void>
  /** Waits after a failure, as `forever` does: 200 ms, then twice as long each time, and a second at most. */
  readonly rest: Effect.Effect<void>
  /**
   * Runs one round after the other until it is interrupted; after one that failed, not for `rest` milliseconds, by default
   * 200, then twice as long each time, and a second at most: what cannot be reached is not to cost a process much. When a round has `succeeded` it says itself: some end before they have asked the database for anything.
   */
  readonly forever: <E, R>(round: Effect.Effect<unknown, E, R>, rest?: number) => Effect.Effect<never, never, R>
}

const shortest = 200
const longest = 1000

/**
 * How often a loop says that failures begin: so many times, and again every so many milliseconds. On a disk that was nearly
 * full a worker claimed in vain, and not in vain, thirty times a second.
 */
const saidAtOnce = 3
const saidEvery = 10_000

/**
 * Begins to watch a loop, named by what it does.
 */
export const make = (what: string): Episode => {
  let failing = false
  /** Whether those that go on now have been told of. */
  let said = false
  /** When all that it has told of is forgotten. */
  let told = -Infinity
  /** How long the next rest is, in milliseconds. */
  let pause = shortest
  const rest = Effect.suspend(() => {
    const millis = pause
    pause = Math.min(longest, 2 * pause)
    return Effect.sleep(millis)
  })
  const failed: Episode["failed"] = (cause) =>
    Effect.clockWith((clock) => {
      failing = true
      const at = Bounded.monotonic(clock)
      if (said || told > at + (saidAtOnce - 1) * saidEvery) {
        return Report.debug(`${what} still does not go through`, Outcome.describe(cause))
      }
      said = true
      told = Math.max(at, told) + saidEvery
      const error = cause.reasons.find(Cause.isFailReason)?.error ?? Cause.squash(cause)
      return Report.warning(`${what} does not go through (${Database.describe(error)})`)
    })
  return {
    failed,
    rest,
    forever: (round, millis) =>
      Effect.forever(
        Effect.catchCause(round, (cause) =>
          Effect.andThen(failed(cause), millis === undefined ? rest : Effect.sleep(millis)))
      ),
    succeeded: Effect.suspend(() => {
      if (!failing) return Effect.void
      failing = false
      pause = shortest
      if (!said) return Effect.void
      said = false
      return Report.info(`${what} goes through again`)
    })
  }
}
