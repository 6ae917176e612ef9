/**
 * When a failed job is tried again: an Effect `Schedule`, replayed over the attempts that are stored. Pure.
 *
 * @since 0.1.0
 */
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Option from "effect/Option"
import * as Schedule from "effect/Schedule"

/**
 * Why an attempt did not succeed.
 *
 * **Details**
 *
 * - `Failed`: the handler failed with its typed error.
 * - `Defect`: it died. The message is the pretty-printed cause, at most 8 KiB.
 * - `TimedOut`: it ran longer than the job's timeout.
 * - `Interrupted`: it was interrupted by something of its own, not by the worker.
 * - `Undecodable`: the payload, or a stored error, does not fit its schema.
 * - `Lost`: the worker that ran it was lost.
 *
 * @category models
 * @since 0.1.0
 */
export type Failure<E> =
  | { readonly _tag: "Failed"; readonly error: E }
  | { readonly _tag: "Defect" | "Undecodable"; readonly message: string }
  | { readonly _tag: "TimedOut" | "Interrupted" | "Lost" }

/**
 * A retry policy: a `Schedule` over the failures, or the form of `Effect.retry`, whose predicates see only typed errors.
 *
 * **Details**
 *
 * The job is discarded when the schedule ends, when a predicate says so, or when its attempts are used up.
 *
 * @category models
 * @since 0.1.0
 */
export type Retry<E> = Schedule.Schedule<unknown, Failure<E>> | {
  /** Default: `defaultSchedule`. */
  readonly schedule?: Schedule.Schedule<unknown, Failure<E>> | undefined
  /** Try again only while this holds for the typed error. Other failures are tried again. */
  readonly while?: ((error: E) => boolean) | undefined
  /** Try again until this holds for the typed error. Other failures are tried again. */
  readonly until?: ((error: E) => boolean) | undefined
}

/** The longest delay, in milliseconds: about 3 000 years ahead, a date that JavaScript and PostgreSQL both can hold. */
export const longestDelay = 100_000_000_000_000

/** One failed attempt and when it ended, in milliseconds since the epoch. */
export interface Attempt<E> {
  readonly at: number
  readonly failure: Failure<E>
}

/**
 * The policy of a definition that names none: 1 s, 4 s, 16 s … up to half an hour, each ±20 %.
 *
 * @category constructors
 * @since 0.1.0
 */
export const defaultSchedule: Schedule.Schedule<unknown> = Schedule.min([
  Schedule.exponential("1 second", 4),
  Schedule.spaced("30 minutes")
]).pipe(Schedule.jittered)

/**
 * Returns how long to wait before the next attempt, or `None` when there shall be none.
 *
 * **Details**
 *
 * The schedule is stepped through every failed attempt with the time at which it really ended, so it may count, stop on
 * an error or stop on elapsed time. A policy that throws ends the job like one that stops.
 */
export const next = <E>(
  policy: Retry<E> | undefined,
  attempts: ReadonlyArray<Attempt<E>>
): Effect.Effect<Option.Option<number>> =>
  Effect.gen(function*() {
    const { schedule = defaultSchedule, until, while: whilst } = Schedule.isSchedule(policy)
      // Sound: `isSchedule` narrows to an unknown input; the policy's type says what it is.
      ? { schedule: policy as Schedule.Schedule<unknown, Failure<E>> }
      : policy ?? {}
    const last = attempts[attempts.length - 1]?.failure
    if (last?._tag === "Failed" && (until?.(last.error) === true || whilst?.(last.error) === false)) {
      return Option.none<number>()
    }
    const step = yield* Schedule.toStep(schedule)
    let delay = Duration.zero
    for (const { at, failure } of attempts) {
      ;[, delay] = yield* step(at, failure)
    }
    const millis = Duration.toMillis(delay)
    // A delay that never ends is a schedule that has ended.
    return millis <= longestDelay ? Option.some(Math.max(0, millis)) : Option.none()
  }).pipe(
    Effect.exit,
    Effect.map((exit) => Exit.isSuccess(exit) ? exit.value : Option.none())
  )
