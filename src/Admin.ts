/**
 * Looking at jobs and acting on them from outside: get, attempts, cancel, retry, delete, redrive.
 *
 * Inside `sql.withTransaction` of the queue's client, what is done here is part of that transaction.
 *
 * @since 0.1.0
 */
import * as DateTime from "effect/DateTime"
import type * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Option from "effect/Option"
import * as Schema from "effect/Schema"
import type { SqlError } from "effect/sql/SqlError"
import * as Database from "./Database.ts"
import * as Enqueue from "./Enqueue.ts"
import { announce, here, type JobQueue, JobQueueError } from "./JobQueue.ts"
import * as Outcome from "./Outcome.ts"
import type { Failure } from "./RetryPolicy.ts"

/**
 * The job is not, or no longer, in a state in which this can be done; nothing was changed.
 *
 * **Details**
 *
 * Cancel needs a job that has not ended, retry and delete one that has. `status` is what it was when looked at again,
 * `None` when there is no such job.
 *
 * @category errors
 * @since 0.1.0
 */
export class Stale extends Schema.TaggedError<Stale>()("Stale", {
  id: Schema.String,
  operation: Schema.Literals(["cancel", "retry", "delete"]),
  status: Schema.Option(Schema.String)
}) {
  override get message() {
    return Option.match(this.status, {
      onNone: () => `cannot ${this.operation} ${this.id}: there is no such job`,
      onSome: (status) => `cannot ${this.operation} ${this.id}: it is ${status}`
    })
  }
}

/**
 * Where a job is in its life.
 *
 * @category models
 * @since 0.1.0
 */
export type Status = "scheduled" | "available" | "running" | "retryable" | "completed" | "cancelled" | "discarded"

/**
 * Everything that is stored of a job.
 *
 * @category models
 * @since 0.1.0
 */
export interface Details {
  readonly id: Enqueue.JobId
  readonly kind: string
  readonly queue: string
  readonly priority: number
  /** `running` from the claim on, which may be a moment before the handler starts. */
  readonly status: Status
  /** Why it was cancelled or discarded, where somebody said so. */
  readonly reason: Option.Option<string>
  /** Whether it has been cancelled and its worker has not yet stopped it. */
  readonly cancelling: boolean
  /** How many attempts have ended that count. */
  readonly attempt: number
  readonly maxAttempts: number
  /** How often its worker was lost. */
  readonly rescued: number
  readonly snoozed: number
  readonly enqueuedAt: DateTime.Utc
  readonly scheduledFor: DateTime.Utc
  /** When it is due; `None` once it has ended. */
  readonly runAt: Option.Option<DateTime.Utc>
  /** When it was claimed, or when its last run began. */
  readonly startedAt: Option.Option<DateTime.Utc>
  readonly finishedAt: Option.Option<DateTime.Utc>
  /** The worker that holds it or held it last. */
  readonly worker: Option.Option<string>
  readonly metadata: Enqueue.Metadata
  /** As it is stored: encoded. */
  readonly payload: Schema.Json
  /** What its handler last said with `Job.progress`. */
  readonly progress: Option.Option<Schema.Json>
  /** As it is stored: encoded. */
  readonly result: Option.Option<Schema.Json>
}

/**
 * One attempt that failed.
 *
 * @category models
 * @since 0.1.0
 */
export interface FailedAttempt {
  /**
   * 1 on the first attempt, and again on the first after a retry from outside. The first loss of a worker does not count: it
   * has the number of the attempt that it cut short, and so has the one after it.
   */
  readonly attempt: number
  /** What it failed with. */
  readonly tag: Failure<unknown>["_tag"]
  /** The error as text, at most 8 KiB. */
  readonly message: string
  /** The typed error as it is stored: encoded. */
  readonly error: Option.Option<Schema.Json>
  readonly worker: Option.Option<string>
  readonly startedAt: Option.Option<DateTime.Utc>
  readonly endedAt: DateTime.Utc
}

/** How many jobs a redrive brings back in one statement. */
const chunk = 500

const time = (millis: number | null): Option.Option<DateTime.Utc> =>
  Option.map(Option.fromNullOr(millis), (at) => DateTime.makeUnsafe(at))
// Sound: the storage's own text.
const json = (text: string | null): Option.Option<Schema.Json> =>
  Option.map(Option.fromNullOr(text), (text) => JSON.parse(text) as Schema.Json)

const stale = (id: string, operation: Stale["operation"]): Effect.Effect<never, Stale | SqlError, JobQueue> =>
  Effect.flatMap(get(id), (job) => new Stale({ id, operation, status: Option.map(job, ({ status }) => status) }))

/**
 * Reads everything that is stored of a job; `None` when there is no such job.
 *
 * **Example** (How far is it?)
 *
 * ```ts
 * import { Effect, Option } from "effect"
 * import { Admin } from "effect-pgqueue"
 *
 * const progressOf = (id: string) =>
 *   Effect.map(Admin.get(id), Option.flatMap(({ progress }) => progress))
 * ```
 *
 * @category looking
 * @since 0.1.0
 */
export const get = Effect.fn("Admin.get")(
  function*(id: string): Effect.fn.Return<Option.Option<Details>, SqlError, JobQueue> {
    const { inside, store } = yield* here
    const row = Enqueue.isJobId(id) ? yield* store.inspect(id, inside) : undefined
    if (row === undefined) return Option.none()
    return Option.some({
      // Sound: the storage's ids are the ones that enqueue made.
      id: row.id as Enqueue.JobId,
      kind: row.kind,
      queue: row.queue,
      priority: row.priority,
      status: row.status,
      reason: Option.fromNullOr(row.reason),
      cancelling: row.cancelling,
      attempt: row.attempt,
      maxAttempts: row.max_attempts,
      rescued: row.rescued,
      snoozed: row.snoozed,
      enqueuedAt: DateTime.makeUnsafe(row.enqueued_at),
      scheduledFor: DateTime.makeUnsafe(row.scheduled_for),
      runAt: time(row.run_at),
      startedAt: time(row.started_at),
      finishedAt: time(row.finished_at),
      worker: Option.fromNullOr(row.worker),
      metadata: JSON.parse(row.metadata) as Enqueue.Metadata,
      payload: JSON.parse(row.payload) as Schema.Json,
      progress: json(row.progress),
      result: json(row.result)
    })
  }
)

/**
 * Reads the failed attempts of a job, oldest first, the last one included; empty when there is no such job.
 *
 * @category looking
 * @since 0.1.0
 */
export const attempts = Effect.fn("Admin.attempts")(
  function*(id: string): Effect.fn.Return<ReadonlyArray<FailedAttempt>, SqlError, JobQueue> {
    const { inside, store } = yield* here
    const rows = Enqueue.isJobId(id) ? yield* store.attempts(id, inside) : []
    return rows.map((row) => ({
      attempt: row.n,
      // Sound: settle and rescue write no other.
      tag: row.tag as FailedAttempt["tag"],
      message: row.message ?? "",
      error: json(row.error),
      worker: Option.fromNullOr(row.worker),
      startedAt: time(row.started_at),
      endedAt: DateTime.makeUnsafe(row.ended_at)
    }))
  }
)

/**
 * Cancels a job that has not ended, wherever it is.
 *
 * **Details**
 *
 * Returns `"cancelled"` when it was waiting: it has ended and never runs. Returns `"cancelling"` when a worker holds it:
 * the worker interrupts its handler, within a second when it can LISTEN and within a poll when it cannot, and the job ends
 * as `cancelled`. A handler that completes first has completed. Whoever cancels first gives the reason.
 *
 * Fails with {@link Stale} when it has ended or is not there.
 *
 * **Example** (An order that is withdrawn)
 *
 * ```ts
 * import { Effect } from "effect"
 * import { Admin } from "effect-pgqueue"
 *
 * const withdraw = (id: string) =>
 *   Admin.cancel(id, { reason: "the order was withdrawn" }).pipe(
 *     Effect.catchTag("Stale", (stale) => Effect.log(stale.message))
 *   )
 * ```
 *
 * @category acting
 * @since 0.1.0
 */
export const cancel = Effect.fn("Admin.cancel")(
  function*(
    id: string,
    options?: {
      /** Kept with the job, cut at 8 KiB. Default: none. */
      readonly reason?: string | undefined
    }
  ): Effect.fn.Return<"cancelled" | "cancelling", Stale | SqlError, JobQueue> {
    const { inside, store, wakeup } = yield* here
    const done = Enqueue.isJobId(id)
      ? yield* store.cancel(id, Outcome.sanitize(options?.reason ?? ""), inside)
      : undefined
    if (done === undefined) return yield* stale(id, "cancel")
    yield* announce(() => {
      if (done.status === "cancelling") wakeup.tell("cancel", id.toLowerCase())
      else if (done.awaited) wakeup.tell("end", id.toLowerCase())
    })
    return done.status
  }
)

/**
 * Puts a finished job back in line, due at once, with the same id and payload and all its attempts.
 *
 * **Details**
 *
 * It stands at its own priority, and its result is gone. Its earlier attempts stay readable, and count neither for
 * `maxAttempts` nor for its retry policy. It holds no unique key: that was released at its end, and may be another
 * job's by now; only one with a `period` is still held until that is over.
 *
 * Fails with {@link Stale} when it has not ended, is archived, or is not there.
 *
 * @category acting
 * @since 0.1.0
 */
export const retry = Effect.fn("Admin.retry")(
  function*(id: string): Effect.fn.Return<void, Stale | SqlError, JobQueue> {
    const { inside, store, wakeup } = yield* here
    const { count, queues } = Enqueue.isJobId(id)
      ? yield* store.retry([id], undefined, inside)
      : { count: 0, queues: [] }
    if (count === 0) return yield* stale(id, "retry")
    yield* announce(() => queues.forEach((queue) => wakeup.mark(queue, 0)))
  }
)

const delete_ = Effect.fn("Admin.delete")(
  function*(id: string): Effect.fn.Return<void, Stale | SqlError, JobQueue> {
    const { inside, store } = yield* here
    if (!Enqueue.isJobId(id) || !(yield* store.erase(id, inside))) return yield* stale(id, "delete")
  }
)

export {
  /**
   * Deletes a finished or archived job with its attempts.
   *
   * **Details**
   *
   * Fails with {@link Stale} when it has not ended, or is not there. To get rid of one that has not ended, cancel it first.
   *
   * **Gotchas**
   *
   * An enqueue that is sent again with this id, after its answer was lost, inserts the job once more.
   *
   * @category acting
   * @since 0.1.0
   */
  delete_ as delete
}

/**
 * Puts discarded jobs back in line, as {@link retry} does, and returns how many.
 *
 * **Details**
 *
 * Takes the jobs that were discarded before it began, oldest first, in statements of 500; not all or none. Interrupt it and
 * what is back stays back. Jobs that somebody else has dealt with meanwhile are passed over and not counted.
 *
 * Fails with `JobQueueError` (`InvalidOption`) when `within` is not a duration or `limit` not a number.
 *
 * **Example** (After an outage of somebody else's service)
 *
 * ```ts
 * import { Admin } from "effect-pgqueue"
 *
 * const again = Admin.redrive({ kind: "webhook.deliver", limit: 10_000 })
 * ```
 *
 * @category acting
 * @since 0.1.0
 */
export const redrive = Effect.fn("Admin.redrive")(
  function*(
    options: {
      /** Only jobs of this kind. Default: any. */
      readonly kind?: string | undefined
      /** Only jobs of this queue. Default: any. */
      readonly queue?: string | undefined
      /** Only jobs that were discarded in this time until now. Default: any. */
      readonly within?: Duration.Input | undefined
      /** At most this many. Default: all. */
      readonly limit?: number | undefined
    } = {}
  ): Effect.fn.Return<number, JobQueueError | SqlError, JobQueue> {
    const { inside, store, wakeup } = yield* here
    const limit = Math.floor(options.limit ?? Infinity)
    const within = Enqueue.millisOf(options.within) ?? Infinity
    // What comes of `Number(undefined)` must not pass as "any".
    if (Number.isNaN(limit) || Number.isNaN(within)) {
      return yield* new JobQueueError({
        reason: "InvalidOption",
        message: "within must be a duration, and limit a number"
      })
    }
    const before = yield* store.clock(inside)
    let after = Number.isFinite(within)
      ? { at: String(BigInt(before) - BigInt(Math.ceil(within)) * 1000n), id: Database.firstId }
      : undefined
    let all = 0
    while (all < limit) {
      const page = yield* store.discarded({
        kind: options.kind,
        queue: options.queue,
        before,
        after,
        limit: Math.min(chunk, limit - all)
      }, inside)
      if (page.length === 0) break
      const { count, queues } = yield* store.retry(page.map(({ id }) => id), "discarded", inside)
      yield* announce(() => queues.forEach((queue) => wakeup.mark(queue, 0)))
      all += count
      after = page[page.length - 1]!
    }
    return all
  }
)
