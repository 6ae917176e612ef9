/**
 * The end of what runs now, where others wait for the next turn of the event loop: behind all that is due in it.
 *
 * @since 0.1.0
 */
import * as Effect from "effect/Effect"
import * as Scheduler from "effect/Scheduler"

/**
 * Waits until everything has run that runs now: whoever was woken together has had a say, and nothing else comes in
 * between.
 */
export const end: Effect.Effect<void> = Effect.callback<void>((resume) => queueMicrotask(() => resume(Effect.void)))

/**
 * Lets fibers go on at the end of what runs now. For those that wait for something else each time, or nothing else has a
 * turn any more.
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
