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
import type * as Schema from "effect/Schema"
import * as Enqueue from "./Enqueue.ts"
import * as JsonText from "./JsonText.ts"
import { maxProgressBytes } from "./Migrations.ts"
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
  /** What an earlier attempt last said with {@link progress}. */
  readonly progress: Option.Option<Schema.Json>
}

/**
 * The job that this fiber runs.
 *
 * @category services
 * @since 0.1.0
 */
export class Current extends Context.Service<Current, Info>()("effect-pgqueue/Current") {}

/** What a handler can do to its run. @internal */
export interface Control {
  /** What it has asked for. */
  intent: Intent | undefined
  /** Interrupts the run. */
  readonly interrupt: () => void
  /** Stores what it says of its progress, as JSON text. */
  readonly progress: (value: string) => Effect.Effect<void>
}

const controls = new WeakMap<Info, Control>()

/** Gives a run its control. @internal */
export const controlled = (info: Info, control: Control): void => void controls.set(info, control)

const stop = (intent: Intent): Effect.Effect<never, never, Current> =>
  Effect.flatMap(Current, (info) =>
    Effect.interruptible(Effect.callback<never>(() => {
      const control = controls.get(info)
      if (control !== undefined) control.intent = intent
      const fiber = Fiber.getCurrent()!
      fiber.interruptUnsafe(fiber.id)
      // Called in a fiber that nobody joins, it is the run that has to stop.
      control?.interrupt()
    })))

/**
 * Says how far the job is; anybody can read it with `Admin.get`, and the next attempt in `Job.Current`.
 *
 * **Details**
 *
 * The value is written at once, outside any transaction of the handler, and kept with the job, through retries and with
 * its end. Each call is a small write: say it every second or so, not for every row. When the database does not
 * answer for five seconds the handler goes on without; when the job has gone to another worker, nothing is written.
 *
 * **Gotchas**
 *
 * A value that is not JSON, or over 64 KiB, is a defect: a failed attempt.
 *
 * **Example** (Telling how far an import is, and going on from there)
 *
 * ```ts
 * import { Effect, Option, Schema } from "effect"
 * import { Job } from "effect-pgqueue"
 *
 * declare const importPage: (page: number) => Effect.Effect<void>
 *
 * class Import extends Job.make("import", { payload: { pages: Schema.Int } }) {}
 *
 * const ImportHandler = Import.toLayer(Effect.fn("Import")(function*({ pages }) {
 *   const { progress } = yield* Job.Current
 *   for (let page = Option.isSome(progress) ? Number(progress.value) : 0; page < pages; page++) {
 *     yield* importPage(page)
 *     yield* Job.progress(page + 1)
 *   }
 * }))
 * ```
 *
 * @category running
 * @since 0.1.0
 */
export const progress = (value: Schema.Json): Effect.Effect<void, never, Current> =>
  Effect.flatMap(
    Current,
    (info) =>
      Effect.matchEffect(
        JsonText.orFail(value, maxProgressBytes, "Job.progress: the value"),
        {
          onFailure: (message) => Effect.die(new Error(message)),
          onSuccess: (text) => controls.get(info)?.progress(text) ?? Effect.void
        }
      )
  )

/**
 * Ends the job as `cancelled`, with a reason, and stops the run.
 *
 * **Details**
 *
 * Records the outcome and interrupts the run and the calling fiber, which may be one that the handler has forked. So no
 * `catch` or `retry` gets in the way, and an enclosing transaction rolls back.
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
