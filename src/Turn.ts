/**
 * The end of this turn of the event loop, for what must not wait for the next one and for all that is due in it.
 *
 * @since 0.1.0
 */
import * as Effect from "effect/Effect"
import * as Scheduler from "effect/Scheduler"

/**
 * Waits until everything has run that was woken together with this fiber, and no longer: nothing else comes in between.
 */
export const end: Effect.Effect<void> = Effect.callback<void>((resume) => queueMicrotask(() => resume(Effect.void)))

/**
 * Lets fibers go on at the end of this turn. Only for those that wait each time for something from outside: any other
 * would go on for ever, and nothing else have a turn any more.
 */
export const scheduler: Scheduler.Scheduler = new Scheduler.MixedScheduler("async", (task) => {
  let wanted = true
  queueMicrotask(() => {
    if (wanted) task()
  })
  return () => {
    wanted = false
  }
})
