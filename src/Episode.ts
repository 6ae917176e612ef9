/**
 * What a loop says of its failures: a warning when they begin, and when they have ended; in between nothing.
 *
 * @since 0.1.0
 */
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import * as Database from "./Database.ts"
import * as Outcome from "./Outcome.ts"

/**
 * The failures of one loop.
 */
export interface Episode {
  readonly failed: (cause: Cause.Cause<unknown>) => Effect.Effect<void>
  readonly succeeded: Effect.Effect<void>
  /**
   * Runs one round after the other until it is interrupted; after one that failed, not for `rest` milliseconds, 200 by
   * default. When a round has `succeeded` it says itself: some end before they have asked the database for anything.
   */
  readonly forever: <E, R>(round: Effect.Effect<unknown, E, R>, rest?: number) => Effect.Effect<never, never, R>
}

/**
 * Begins to watch a loop, named by what it does.
 */
export const make = (what: string): Episode => {
  let failing = false
  const failed: Episode["failed"] = (cause) =>
    Effect.suspend(() => {
      if (failing) return Effect.logDebug(`effect-pgqueue: ${what} still does not go through`, Outcome.describe(cause))
      failing = true
      const error = cause.reasons.find(Cause.isFailReason)?.error ?? Cause.squash(cause)
      return Effect.logWarning(`effect-pgqueue: ${what} does not go through (${Database.describe(error)})`)
    })
  return {
    failed,
    forever: (round, rest = 200) =>
      Effect.forever(Effect.catchCause(round, (cause) => Effect.andThen(failed(cause), Effect.sleep(rest)))),
    succeeded: Effect.suspend(() => {
      if (!failing) return Effect.void
      failing = false
      return Effect.logInfo(`effect-pgqueue: ${what} goes through again`)
    })
  }
}
