/**
 * The job that a fiber runs: what its handler can know of it and ask for, and what may wrap the run.
 *
 * @since 0.1.0
 */
import * as Context from "effect/Context"
import type * as DateTime from "effect/DateTime"
import type * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import type * as Option from "effect/Option"
import * as Enqueue from "./Enqueue.ts"
import type { Intent } from "./Outcome.ts"
import { type Failure, longestDelay } from "./RetryPolicy.ts"

/**
 * What a handler can know about the job it runs.
 *
 * @category models
 * @since 0.1.0
 */
export interface Info {
  readonly id: Enqueue.JobId
  readonly kind: string
  readonly queue: string
  readonly priority: number
  /** 1 on the first attempt. */
  readonly attempt: number
  readonly maxAttempts: number
  readonly enqueuedAt: DateTime.Utc
  /** When it was first due; the tick, for a job of a cron schedule. */
  readonly scheduledFor: DateTime.Utc
  readonly metadata: Enqueue.Metadata
  /** Why the previous attempt did not succeed. */
  readonly lastFailure: Option.Option<Failure<unknown>>
}

/**
 * The job that this fiber runs.
 *
 * @category services
 * @since 0.1.0
 */
export class Current extends Context.Service<Current, Info>()("effect-pgqueue/Current") {}

/** What handlers have asked for, by the run's `Info`. */
const intents = new WeakMap<Info, Intent>()

/** Reads what the handler of this run asked for. @internal */
export const intentOf = (info: Info): Intent | undefined => intents.get(info)

const stop = (intent: Intent): Effect.Effect<never, never, Current> =>
  Effect.flatMap(Current, (info) =>
    Effect.interruptible(Effect.callback<never>(() => {
      intents.set(info, intent)
      const fiber = Fiber.getCurrent()!
      fiber.interruptUnsafe(fiber.id)
    })))

/**
 * Ends the job as `cancelled`, with a reason, and stops the run.
 *
 * **Details**
 *
 * Records the outcome and interrupts the calling fiber, so no `catch` or `retry` gets in the way and an enclosing
 * transaction rolls back.
 *
 * **Gotchas**
 *
 * The outcome counts when the run ends by interruption alone: a handler that recovers and succeeds has completed.
 *
 * **Example** (Leaving a job that is no longer wanted)
 *
 * ```ts
 * import { Effect, Schema } from "effect"
 * import { Job } from "effect-pgqueue"
 *
 * class SendEmail extends Job.make("email.send", { payload: { to: Schema.String } }) {}
 *
 * const SendEmailHandler = SendEmail.toLayer(Effect.fn("SendEmail")(function*({ to }) {
 *   if (to.endsWith("@example.com")) return yield* Job.cancel("suppressed")
 *   yield* Effect.log(`to ${to}`)
 * }))
 * ```
 *
 * @category running
 * @since 0.1.0
 */
export const cancel = (reason: string): Effect.Effect<never, never, Current> => stop({ _tag: "Cancel", reason })

/**
 * Ends the job as `discarded`, with a reason, and stops the run. See {@link cancel}.
 *
 * @category running
 * @since 0.1.0
 */
export const discard = (reason: string): Effect.Effect<never, never, Current> => stop({ _tag: "Discard", reason })

/**
 * Puts the job back in line after a delay without spending an attempt, and stops the run. See {@link cancel}.
 *
 * **Gotchas**
 *
 * A delay that is negative, infinite or not a number is a defect: a failed attempt.
 *
 * **Example** (Waiting for something else)
 *
 * ```ts
 * import { Effect } from "effect"
 * import { Job } from "effect-pgqueue"
 *
 * declare const ready: Effect.Effect<boolean>
 *
 * class Publish extends Job.make("publish") {}
 *
 * const PublishHandler = Publish.toLayer(() =>
 *   Effect.flatMap(ready, (yes) => yes ? Effect.log("published") : Job.snooze("10 minutes"))
 * )
 * ```
 *
 * @category running
 * @since 0.1.0
 */
export const snooze = (delay: Duration.Input): Effect.Effect<never, never, Current> => {
  const millis = Enqueue.millisOf(delay) ?? NaN
  return millis >= 0 && millis <= longestDelay
    ? stop({ _tag: "Snooze", delay: millis })
    : Effect.die(new Error("Job.snooze: the delay must not be negative and must be finite"))
}

// -----------------------------------------------------------------------------
// Middleware
// -----------------------------------------------------------------------------

/**
 * The end of a run, opaque to middleware.
 *
 * @category models
 * @since 0.1.0
 */
export interface Ended {
  readonly _: unique symbol
}

/**
 * The failure of a run, opaque to middleware.
 *
 * @category models
 * @since 0.1.0
 */
export interface Unhandled {
  readonly _: unique symbol
}

/**
 * Wraps every run of a worker. It may add requirements, it cannot swallow or change the result.
 *
 * @category models
 * @since 0.1.0
 */
export interface Middleware<out R = never> {
  (run: Effect.Effect<Ended, Unhandled>, job: Info): Effect.Effect<Ended, Unhandled, R>
}
