/**
 * A schedule as it is declared: what its options are, and what is stored of them.
 *
 * @since 0.1.0
 */
import type * as Cron from "effect/Cron"
import type * as DateTime from "effect/DateTime"
import type * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Predicate from "effect/Predicate"
import * as Result from "effect/Result"
import * as Definition from "./Definition.ts"
import * as Enqueue from "./Enqueue.ts"
import type * as Job from "./Job.ts"
import { longestDelay } from "./RetryPolicy.ts"
import type * as Schedules from "./Schedules.ts"
import * as Ticks from "./Ticks.ts"

/**
 * A definition that can be scheduled: of one kind, not of a family; `family.of(kind)` is one.
 *
 * @category models
 * @since 0.1.0
 */
export type Schedulable = Job.Any & { readonly enqueue: unknown }

/**
 * What happens to a tick while the job of an earlier one has not ended. `"allow"`: its job runs beside it. `"skip"`: there is
 * no job for it. `"queue"`: its job is enqueued when the one before has ended, however it ended; up to 10 000 ticks wait.
 *
 * @category models
 * @since 0.1.0
 */
export type Overlap = Schedules.Overlap

/**
 * When a schedule fires.
 *
 * @category models
 * @since 0.1.0
 */
export type When = {
  /**
   * A cron expression of five fields, or of six with seconds in front; one of `@yearly`, `@monthly`, `@weekly`, `@daily`,
   * `@hourly`, `@minutely`; or a `Cron` of Effect. Behind an expression, `dst=both`, `dst=earlier` or `dst=later` says which
   * of two equal times of day count, and `days=and` that the day of the month and that of the week must both match. Of a
   * `Cron`, `onDstOverlap: "earlier"` says nothing: it is Effect's default.
   */
  readonly cron: string | Cron.Cron
  readonly every?: undefined
  /** The zone in which the fields are read, by its IANA name or as an offset. Default `"UTC"`, or that of the `Cron`. */
  readonly timeZone?: string | DateTime.TimeZone | undefined
} | {
  /**
   * The multiples of this since 1970 in UTC, so that a deploy does not move them. From a second to ten years, in whole
   * milliseconds.
   */
  readonly every: Duration.Input
  readonly cron?: undefined
  readonly timeZone?: undefined
}

/**
 * How the ticks of a schedule become jobs.
 *
 * @category models
 * @since 0.1.0
 */
export interface Policy {
  /**
   * What is made up of ticks at which no scheduler was there: nothing, the latest, or the latest `all` (1 to 1 000), in their
   * order. That is so when the first tick that is due is more than 30 s late; until then they are only late, and all fire.
   * Default `"latest"`.
   */
  readonly missed?: "skip" | "latest" | { readonly all: number } | undefined
  /** Missed ticks that are older are not made up. Default 7 days. */
  readonly missedWindow?: Duration.Input | undefined
  /** What happens while an earlier job has not ended. Default `"allow"`. */
  readonly overlap?: Overlap | undefined
  /** Start each job up to so much later, at random. `scheduledFor` is the tick all the same. Default 0. */
  readonly jitter?: Duration.Input | undefined
  /** Default: the definition's. */
  readonly queue?: string | undefined
  /** Default: the definition's. */
  readonly priority?: Enqueue.Priority | undefined
  /** Default: the definition's. */
  readonly maxAttempts?: number | undefined
  /** Default: the definition's. */
  readonly timeout?: Duration.Input | undefined
  /** Travels with each job. `schedule`, the name, is added unless it is given here. At most 64 KiB as JSON. */
  readonly metadata?: Enqueue.Metadata | undefined
  /** Of two processes with different definitions the higher version has its way; of equal ones, the last to start. Default 0. */
  readonly version?: number | undefined
}

/**
 * The options of a schedule.
 *
 * @category models
 * @since 0.1.0
 */
export type Options<J extends Schedulable> =
  & When
  & Policy
  & {
    /** The job to enqueue. No process needs a handler for it to schedule it. */
    readonly job: J
  }
  & (Definition.MayOmit<Definition.In<J["payloadSchema"]>> extends true
    ? { readonly payload?: Definition.In<J["payloadSchema"]> }
    : { readonly payload: Definition.In<J["payloadSchema"]> })

/** Where an entry keeps what is not for everybody. */
export const TypeId = "~effect-pgqueue/CronScheduler/Entry"

/** What is stored of a schedule, but for its first tick. */
export interface Resolved {
  readonly row: Omit<Schedules.Registration, "next">
  readonly ticks: (now: number) => Effect.Effect<number, Enqueue.EnqueueError>
}

/**
 * A schedule as it is declared. Needs what encodes its payload.
 *
 * @category models
 * @since 0.1.0
 */
export interface Entry<out R> {
  readonly name: string
  /** @internal */
  readonly [TypeId]: Effect.Effect<Resolved, Enqueue.EnqueueError, R>
}

/**
 * Declares a schedule, for {@link layer} or {@link schedule}.
 *
 * **Details**
 *
 * A tick is enqueued and the schedule moved on in one statement, so there is at most one job for each tick, for ever, and one
 * if any scheduler is there before the window for missed ticks is over. The handler reads its tick from
 * `Job.Current.scheduledFor`.
 *
 * When clocks change, expressions whose hours begin with `*` fire at every real time that they match; others fire once for
 * every time of day that they name, also on the day that skips it, then moved by the change, and on the day that repeats it.
 *
 * What is wrong with the options is said where it is used: {@link layer} and {@link schedule} fail with `EnqueueError`, also
 * for an expression that will never fire.
 *
 * **Gotchas**
 *
 * The definition's `unique` rule applies: a tick that meets a holder of the key has no job, whatever `onConflict` says.
 *
 * **Example** (Every night, and every quarter of an hour)
 *
 * ```ts
 * import { Schema } from "effect"
 * import { CronScheduler, Job } from "effect-pgqueue"
 *
 * class Report extends Job.make("report", { payload: { days: Schema.Int } }) {}
 * class Sync extends Job.make("sync") {}
 *
 * const nightly = CronScheduler.make("nightly-report", {
 *   cron: "0 3 * * *",
 *   timeZone: "Europe/Berlin",
 *   job: Report,
 *   payload: { days: 1 }
 * })
 * const often = CronScheduler.make("sync", { every: "15 minutes", job: Sync, missed: "skip", overlap: "skip" })
 * ```
 *
 * @category constructors
 * @since 0.1.0
 */
export const make = <J extends Schedulable>(
  name: string,
  options: Options<J>
): Entry<J["payloadSchema"]["EncodingServices"]> => ({
  name,
  [TypeId]: resolve(name, options) as Effect.Effect<
    Resolved,
    Enqueue.EnqueueError,
    // Sound: this is all that `resolve` needs, and it is called with a payload of that definition.
    J["payloadSchema"]["EncodingServices"]
  >
})

/** Checks the options of a schedule and makes of them what is stored. */
const resolve = Effect.fnUntraced(function*(
  name: string,
  options: When & Policy & { readonly job: Schedulable; readonly payload?: unknown }
) {
  const { definition } = options.job[Definition.TypeId]
  // Of a layer with many schedules, which one it is.
  const refuse = (reason: Enqueue.EnqueueError["reason"], message: string) =>
    new Enqueue.EnqueueError({ kind: definition.name, reason, message: `the schedule "${name}": ${message}` })
  const invalid = (message: string) => refuse("InvalidOption", message)
  const nameProblem = Enqueue.problemOfName("its name", name, 200)
  if (nameProblem !== undefined) return yield* invalid(nameProblem)
  if (definition.family) return yield* invalid("a family is no job; schedule one of its kinds")
  const found = Ticks.specOf(options)
  if (Result.isFailure(found)) return yield* invalid(found.failure)
  const { spec, timeZone } = found.success

  const { missed = "latest", overlap = "allow", version = 0 } = options
  const count = missed === "skip" ? 0 : missed === "latest" ? 1 : Predicate.isObject(missed) ? missed.all : NaN
  if (!Number.isInteger(count) || count < 0 || count > 1000 || (count === 0 && missed !== "skip")) {
    return yield* invalid(`missed must be "skip", "latest" or { all: 1 to 1000 }`)
  }
  if (overlap !== "allow" && overlap !== "skip" && overlap !== "queue") {
    return yield* invalid(`overlap must be "allow", "skip" or "queue"`)
  }
  if (!Number.isInteger(version) || Math.abs(version) > 2_147_483_647) {
    return yield* invalid("version must be an integer of at most 2147483647")
  }
  const missedWindow = Enqueue.millisOf(options.missedWindow) ?? 604_800_000
  if (!(missedWindow >= 1)) return yield* invalid("missedWindow must be at least a millisecond")
  const jitter = Enqueue.millisOf(options.jitter) ?? 0
  if (!(jitter >= 0 && jitter <= longestDelay)) return yield* invalid("jitter must not be negative and must be finite")

  const job = yield* definition.resolve(options.payload, {
    queue: options.queue,
    priority: options.priority,
    maxAttempts: options.maxAttempts,
    timeout: options.timeout,
    metadata: { schedule: name, ...options.metadata }
  }).pipe(Effect.mapError(({ message, reason }) => refuse(reason, message)))
  const row: Resolved["row"] = {
    name,
    spec,
    timeZone,
    kind: job.kind,
    queue: job.queue,
    priority: job.priority,
    maxAttempts: job.maxAttempts,
    timeout: job.timeout,
    missedWindow: Math.min(missedWindow, longestDelay),
    jitter,
    uniquePeriod: job.unique?.period,
    payload: job.payload,
    metadata: job.metadata,
    missed: count,
    overlap,
    uniqueKey: job.unique?.key,
    uniqueUntil: job.unique?.until ?? "finished",
    version
  }
  return {
    row,
    ticks: (now: number) => {
      const next = nextOf(spec, timeZone, now)
      return "next" in next ? Effect.succeed(next.next) : Effect.fail(invalid(next.problem))
    }
  }
})

/** The next tick of a stored expression, or why there is none. */
export const nextOf = (
  spec: string,
  timeZone: string,
  after: number
): { readonly next: number } | { readonly problem: string } => {
  const ticks = Ticks.parse(spec, timeZone, after)
  if (Result.isFailure(ticks)) return { problem: ticks.failure }
  const next = Ticks.next(ticks.success, after)
  return next === undefined ? { problem: Ticks.over } : { next }
}
