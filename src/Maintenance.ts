/**
 * What the processes do for all of them: rescue, cleanup, audit; and what they agree on for it.
 *
 * @since 0.1.0
 */
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import type { SqlError } from "effect/sql/SqlError"
import * as Bounded from "./Bounded.ts"
import * as Cleanup from "./Cleanup.ts"
import * as Contact from "./Contact.ts"
import * as Database from "./Database.ts"
import * as Enqueue from "./Enqueue.ts"
import * as Episode from "./Episode.ts"
import { JobQueue, JobQueueError } from "./JobQueue.ts"
import * as Tasks from "./Tasks.ts"

/**
 * How long finished jobs are kept, by how they ended: more than 0, `"Infinity"` for ever.
 *
 * @category models
 * @since 0.1.0
 */
export interface Retention {
  /** Default 1 day. */
  readonly completed?: Duration.Input | undefined
  /** Default 1 week. */
  readonly cancelled?: Duration.Input | undefined
  /** Default 1 week. */
  readonly discarded?: Duration.Input | undefined
}

/**
 * How often a task is done, by one process after the other.
 *
 * @category models
 * @since 0.1.0
 */
export interface TaskOptions {
  /** At least this long from one turn to the next in all processes together, and up to a fifth more. */
  readonly interval?: Duration.Input | undefined
}

/**
 * The options of maintenance. What is left out is left to the other processes, and to the defaults.
 *
 * @category models
 * @since 0.1.0
 */
export interface Options {
  /** Removes finished jobs whose retention is over. Every minute by default. */
  readonly cleanup?:
    | TaskOptions & {
      /** One for all, or one for each way to end. */
      readonly retention?: Duration.Input | Retention | undefined
      /** `"archive"` moves them to the table `archive`, and keeps their attempts. Default `"delete"`. */
      readonly strategy?: "delete" | "archive" | undefined
    }
    | undefined
  /** Declares silent workers dead and takes their jobs back. Every 15 s by default. */
  readonly rescue?: TaskOptions | undefined
  /** Parks jobs of kinds that no live worker lists. Every 15 s by default. */
  readonly parking?: TaskOptions | undefined
  /** Looks, 5 000 jobs a turn, for jobs in no place and puts them back in line. Every 15 s by default. */
  readonly audit?: TaskOptions | undefined
  /** Removes unique keys whose period is over. Every minute by default. */
  readonly keys?: TaskOptions | undefined
}

/** For a process without a worker: the same lease that a worker has by default, and how often to look, in milliseconds. */
const lease = 30_000
const contactInterval = 5000

/**
 * Says what all processes do for each other, and takes part in it for as long as the layer lives, also in a process without
 * a worker.
 *
 * **Details**
 *
 * Every worker takes part anyway, with the defaults. What is said here is stored, and every process goes by it from its next
 * statement on: once the layer is built, nothing is deleted any more that it says to archive. Options that are left out
 * change nothing. Of two processes that say different things, the one that started last has said it; that holds for
 * each option, and each status of `retention`, by itself. What was said stays said when the process ends.
 *
 * Each task has a span `Maintenance.<task>` and the metrics of `Telemetry`.
 *
 * Fails with `JobQueueError` (`InvalidOption`) when an option is out of range, and with `SqlError`. Waits while there is no
 * database.
 *
 * **Gotchas**
 *
 * An option that is no longer given stays as it was last given, until somebody gives another. What is stored is in the table
 * `setting`.
 *
 * **Example** (Keeping what was discarded for a month, and everything in the archive)
 *
 * ```ts
 * import { Layer } from "effect"
 * import { JobQueue, Maintenance } from "effect-pgqueue"
 *
 * const MaintenanceLive = Maintenance.layer({
 *   cleanup: { retention: { completed: "1 hour", discarded: "30 days" }, strategy: "archive" }
 * }).pipe(Layer.provide(JobQueue.layer()))
 * ```
 *
 * @category layers
 * @since 0.1.0
 */
export const layer = (options: Options = {}): Layer.Layer<never, JobQueueError | SqlError, JobQueue> =>
  Layer.effectDiscard(Effect.gen(function*() {
    const policies = yield* resolve(options)
    const { store, wakeup } = (yield* JobQueue).internal
    const episode = Episode.make("the maintenance policy")
    for (const [task, policy] of policies) {
      yield* Effect.suspend(() => store.mergePolicy(task, policy)).pipe(
        Database.answeredWithin(Database.answerBound),
        Effect.tapCause((cause) => episode.failed(cause)),
        Effect.retry({ while: Database.isTransient, schedule: Database.backoff })
      )
    }
    yield* episode.succeeded
    const intervals = policies.flatMap(([task, { interval }]) => interval === undefined ? [] : [[task, interval]])
    const contact = yield* Contact.watch({ store, lease, every: contactInterval })
    yield* Bounded.fork([
      Effect.withTracerEnabled(contact.run, false),
      ...Tasks.loops({
        store,
        wakeup,
        intervals: { ...Tasks.defaults, ...Object.fromEntries(intervals) },
        standing: contact.standing,
        stopping: () => false
      })
    ])
  }))

const names = ["rescue", "parking", "audit", "cleanup", "keys"] as const

/** Checks the options and returns what they say, task by task. */
const resolve = Effect.fnUntraced(function*(options: Options) {
  const invalid = (message: string) => new JobQueueError({ reason: "InvalidOption", message })
  const policies: Array<readonly [task: keyof Tasks.Intervals, policy: Cleanup.Policy]> = []
  for (const name of names) {
    const given: NonNullable<Options["cleanup"]> = options[name] ?? {}
    const policy: { -readonly [K in keyof Cleanup.Policy]: Cleanup.Policy[K] } = {}
    const interval = Enqueue.millisOf(given.interval)
    if (interval !== undefined) {
      if (!(interval >= 10 && interval <= 86_400_000)) {
        return yield* invalid(`the interval of ${name} must be from 10 milliseconds to a day`)
      }
      policy.interval = interval
    }
    if (name === "cleanup" && given.strategy !== undefined) {
      if (given.strategy !== "delete" && given.strategy !== "archive") {
        return yield* invalid(`the strategy must be "delete" or "archive"`)
      }
      policy.strategy = given.strategy
    }
    if (name === "cleanup" && given.retention !== undefined) {
      const { retention } = given
      const each = isPerStatus(retention)
        ? retention
        : Object.fromEntries(Cleanup.endings.map((ending) => [ending, retention]))
      const said: { [E in Cleanup.Ending]?: number } = {}
      for (const [ending, input] of Object.entries(each)) {
        if (!isEnding(ending)) return yield* invalid(`retention has no "${ending}"`)
        const millis = Enqueue.millisOf(input)
        if (millis === undefined) continue
        // 0 would remove everything at once.
        if (!(millis > 0)) {
          return yield* invalid(`the retention of ${ending} jobs must be a duration of more than 0`)
        }
        said[ending] = millis
      }
      if (Object.keys(said).length > 0) policy.retention = said
    }
    if (Object.keys(policy).length > 0) policies.push([name, policy])
  }
  return policies
})

const isEnding = (name: string): name is Cleanup.Ending => Cleanup.endings.some((ending) => ending === name)

const parts = new Set(["weeks", "days", "hours", "minutes", "seconds", "milliseconds", "microseconds", "nanoseconds"])

/**
 * A `Duration.Input` may be an object too, with the names of its parts. One with a word misspelt is neither, and one with both
 * is refused for the part: as a duration it would count for every status.
 */
const isPerStatus = (retention: Duration.Input | Retention): retention is Retention =>
  typeof retention === "object" && !Duration.isDuration(retention) && !Array.isArray(retention) &&
  (Object.keys(retention).some(isEnding) || !Object.keys(retention).some((name) => parts.has(name)))
