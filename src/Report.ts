/**
 * What the queue says, under its name, in the application's log. A logger that throws, for want of a file or of memory, is
 * not to end the loop that has an outage to report.
 *
 * @since 0.1.0
 */
import * as Effect from "effect/Effect"

const unfailing = (say: (...message: ReadonlyArray<unknown>) => Effect.Effect<void>) =>
(
  what: string,
  ...more: ReadonlyArray<unknown>
): Effect.Effect<void> => Effect.ignoreCause(say(`effect-pgqueue: ${what}`, ...more))

/** Reports what only somebody wants to know who looks for a cause. */
export const debug = unfailing(Effect.logDebug)

/** Reports what has been done. */
export const info = unfailing(Effect.logInfo)

/** Reports what goes on all the same. */
export const warning = unfailing(Effect.logWarning)

/** Reports what somebody has to mend. */
export const error = unfailing(Effect.logError)
