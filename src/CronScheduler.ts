/**
 * Cron schedules: jobs that are enqueued at certain times, once for each, however many processes see to it.
 *
 * Schedules are rows. Those declared in code are written when their layer is built, others at run time, and every scheduler
 * sees all of them. Inside `sql.withTransaction` of the queue's client, what is done to a schedule is part of that
 * transaction; in one of another client it fails with `EnqueueError` (`ForeignTransaction`), because it would not be.
 *
 * @since 0.1.0
 */
import { SecureRandom } from "effect/crypto"
import * as DateTime from "effect/DateTime"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Option from "effect/Option"
import * as Predicate from "effect/Predicate"
import * as Result from "effect/Result"
import * as Schema from "effect/Schema"
import type { SqlError } from "effect/sql/SqlError"
import * as Bounded from "./Bounded.ts"
import * as Database from "./Database.ts"
import * as Enqueue from "./Enqueue.ts"
import { type Entry, nextOf, type Overlap, type Resolved, TypeId } from "./Entry.ts"
import * as Firing from "./Firing.ts"
import { announce, here, JobQueue, JobQueueError } from "./JobQueue.ts"
import * as Report from "./Report.ts"
import type * as Schedules from "./Schedules.ts"
import type * as Store from "./Store.ts"
import * as Ticker from "./Ticker.ts"
import * as Ticks from "./Ticks.ts"

export { type Entry, make, type Options, type Overlap, type Policy, type Schedulable, type When } from "./Entry.ts"

/**
 * There is no schedule of this name.
 *
 * @category errors
 * @since 0.1.0
 */
export class NoSuchSchedule extends Schema.TaggedError<NoSuchSchedule>()("NoSuchSchedule", {
  name: Schema.String
}) {
  override get message() {
    return `there is no schedule "${this.name}"`
  }
}

/** As `here`, for what changes something: in a transaction of another client it would not be part of that. */
const writing = Effect.flatMap(
  JobQueue,
  ({ internal }) => Effect.map(internal.inTransaction(() => ""), (inside) => ({ ...internal, inside }))
)

/** Adds the first ticks, by the database's clock. */
const registrations = Effect.fnUntraced(function*(
  store: Store.Store,
  resolved: ReadonlyArray<Resolved>,
  inside: boolean
) {
  const now = Number(yield* store.clock(inside)) / 1000
  return yield* Effect.forEach(resolved, ({ row, ticks }) => Effect.map(ticks(now), (next) => ({ ...row, next })))
})

/** How many schedules are written in one statement. */
const chunk = 1000

/**
 * The options of a scheduler.
 *
 * @category models
 * @since 0.1.0
 */
export interface LayerOptions {
  /** How often it looks by itself. Ticks that it knows of are on time. Default 5 s, or 1 s when it cannot LISTEN. */
  readonly pollInterval?: Duration.Input | undefined
}

/**
 * Runs a scheduler for as long as the layer lives, and declares schedules.
 *
 * **Details**
 *
 * It fires every schedule of the queue, whoever wrote it, and needs no handler for any. Any number of them run at once;
 * none leads.
 *
 * The schedules that are listed are written when the layer is built, where they differ from their rows. Times that do not
 * change keep the next tick, so that a deploy loses none; times that change begin after the last tick there was. A paused
 * schedule stays paused. When two versions of the code run at once, the higher `version` of a schedule has its way, and
 * without one the process that started last. A schedule that no running process declares any more goes on; after a quarter
 * of an hour it is marked (`undeclaredAt`) and a warning logged. {@link remove} removes it.
 *
 * Fails with `EnqueueError` when something is wrong with an entry, with `JobQueueError` when it is the interval, and with
 * `SqlError`. Waits while there is no database.
 *
 * **Example** (A process that schedules)
 *
 * ```ts
 * import { NodeRuntime } from "@effect/platform-node"
 * import { PgClient } from "@effect/sql-pg"
 * import { Config, Layer } from "effect"
 * import { CronScheduler, Job, JobQueue } from "effect-pgqueue"
 *
 * class Sweep extends Job.make("sweep") {}
 *
 * const PgLive = PgClient.layerConfig({ url: Config.Redacted("DATABASE_URL") })
 * const QueueLive = JobQueue.layer().pipe(Layer.provideMerge(PgLive))
 *
 * const Main = CronScheduler.layer([
 *   CronScheduler.make("hourly-sweep", { cron: "@hourly", job: Sweep })
 * ]).pipe(Layer.provide(QueueLive))
 *
 * NodeRuntime.runMain(Layer.launch(Main))
 * ```
 *
 * @category layers
 * @since 0.1.0
 */
export const layer = <const E extends ReadonlyArray<Entry<unknown>>>(
  entries: E,
  options?: LayerOptions
): Layer.Layer<
  never,
  Enqueue.EnqueueError | JobQueueError | SqlError,
  JobQueue | Effect.Services<E[number][typeof TypeId]>
> =>
  Layer.effectDiscard(
    // Sound: this is what their own types say they need.
    start(entries as ReadonlyArray<Entry<Effect.Services<E[number][typeof TypeId]>>>, options ?? {})
  )

const start = Effect.fnUntraced(function*<R>(entries: ReadonlyArray<Entry<R>>, options: LayerOptions) {
  const { internal: { store, wakeup }, mode } = yield* JobQueue
  const pollInterval = Enqueue.millisOf(options.pollInterval) ?? (mode === "listen" ? 5000 : 1000)
  if (!(pollInterval >= 10 && pollInterval <= 3_600_000)) {
    return yield* new JobQueueError({
      reason: "InvalidOption",
      message: "pollInterval must be from 10 milliseconds to an hour"
    })
  }
  const resolved = yield* Effect.forEach(entries, (entry) => entry[TypeId])
  const names = resolved.map(({ row }) => row.name)
  const twice = resolved.find(({ row }, index) => names.indexOf(row.name) !== index)
  if (twice !== undefined) {
    return yield* new Enqueue.EnqueueError({
      kind: twice.row.kind,
      reason: "InvalidOption",
      message: `the schedule "${twice.row.name}" is declared twice`
    })
  }
  const report = Effect.fnUntraced(function*({ newer, written }: Schedules.Registered) {
    if (written.length > 0) yield* Report.info(`wrote the schedules ${written.join(", ")}`)
    if (newer.length > 0) {
      yield* Report.warning(`the schedules ${newer.join(", ")} are of a newer version and stay so`)
    }
  })
  /** Writes them together if possible; one that a stranger has locked keeps no other from it. */
  const write = (some: ReadonlyArray<Schedules.Registration>): Effect.Effect<void, SqlError> =>
    Effect.flatMap(store.schedules.register(some, true, false), report).pipe(
      Effect.catchIf((error) => some.length > 1 && Database.isLockTimeout(error), () => {
        const half = some.length >> 1
        return Effect.flatMap(
          Effect.forEach([some.slice(0, half), some.slice(half)], (part) => Effect.exit(write(part))),
          ([left, right]) => Effect.andThen(left!, right!)
        )
      })
    )
  const declare = Effect.gen(function*() {
    const all = yield* registrations(store, resolved, false)
    for (let begin = 0; begin < all.length; begin += chunk) yield* write(all.slice(begin, begin + chunk))
  })
  yield* wakeup.listen
  const loops = yield* Ticker.make({ store, wakeup, pollInterval })
  // They fire what there is already: a stranger may hold up what is to be written for as long as he likes.
  // Without spans: a stream of looks that never ends belongs to nobody's trace.
  yield* Effect.withTracerEnabled(Bounded.fork([...loops, Ticker.declaring(store, names)]), false)
  yield* declare.pipe(
    Effect.tapError((error) =>
      Database.isTransient(error)
        ? Report.warning(`waiting to write the schedules (${Database.describe(error)})`)
        : Effect.void
    ),
    Effect.retry({ while: Database.isTransient, schedule: Database.backoff })
  )
  // The schedulers that run do not know yet what was written.
  wakeup.scheduled()
})

/**
 * Writes a schedule at run time: creates it, or changes it as a layer does at start.
 *
 * **Details**
 *
 * Nobody declares it, so nobody misses it when the code changes. One of a lower `version` than its row changes nothing.
 * Fails with `EnqueueError` when something is wrong with it.
 *
 * **Example** (A report for each customer who wants one)
 *
 * ```ts
 * import { Schema } from "effect"
 * import { CronScheduler, Job } from "effect-pgqueue"
 *
 * class Report extends Job.make("report", { payload: { customer: Schema.String } }) {}
 *
 * const subscribe = (customer: string, cron: string, timeZone: string) =>
 *   CronScheduler.schedule(
 *     CronScheduler.make(`report:${customer}`, { cron, timeZone, job: Report, payload: { customer } })
 *   )
 * ```
 *
 * @category schedules
 * @since 0.1.0
 */
export const schedule = Effect.fn("CronScheduler.schedule")(
  function*<R>(entry: Entry<R>): Effect.fn.Return<void, Enqueue.EnqueueError | SqlError, JobQueue | R> {
    const { inside, store, wakeup } = yield* writing
    const resolved = yield* entry[TypeId]
    const [one] = yield* registrations(store, [resolved], inside)
    yield* store.schedules.register([one!], false, inside)
    yield* announce(wakeup.scheduled)
  }
)

/**
 * A schedule as it is stored.
 *
 * @category models
 * @since 0.1.0
 */
export interface Info {
  readonly name: string
  /** As it is stored: an expression, a name such as `@hourly`, or, of `every`, `@every 90s`. */
  readonly cron: string
  readonly timeZone: string
  readonly kind: string
  readonly queue: string
  readonly priority: number
  readonly maxAttempts: number
  readonly timeout: Option.Option<Duration.Duration>
  /** As it is stored: encoded. */
  readonly payload: Schema.Json
  readonly metadata: Enqueue.Metadata
  readonly missed: "skip" | "latest" | { readonly all: number }
  readonly missedWindow: Duration.Duration
  readonly overlap: Overlap
  readonly jitter: Duration.Duration
  readonly version: number
  /** The next tick; `None` while it is paused or has a problem, and for a moment after somebody wrote it by hand. */
  readonly next: Option.Option<DateTime.Utc>
  /** The last tick that has passed, with a job or without. */
  readonly previous: Option.Option<DateTime.Utc>
  /** The job of the last tick that had one. */
  readonly lastJob: Option.Option<Enqueue.JobId>
  /** How many ticks wait for that job to end. */
  readonly waiting: number
  readonly pausedAt: Option.Option<DateTime.Utc>
  /** Why it does not fire. {@link resume} it when that is mended. */
  readonly problem: Option.Option<string>
  /** Whether it was written by a layer. */
  readonly declared: boolean
  /** Since when no running process declares it. */
  readonly undeclaredAt: Option.Option<DateTime.Utc>
}

/** What somebody has written by hand may be no time that a `DateTime` can hold. */
const time = (millis: number | null) => Option.flatMap(Option.fromNullOr(millis), (at) => DateTime.make(at))

/**
 * Reads all schedules of the queue, by name.
 *
 * **Example** (What an operator should see)
 *
 * ```ts
 * import { Effect, Option } from "effect"
 * import { CronScheduler } from "effect-pgqueue"
 *
 * const broken = Effect.map(CronScheduler.list, (all) => all.filter(({ problem }) => Option.isSome(problem)))
 * ```
 *
 * @category schedules
 * @since 0.1.0
 */
export const list: Effect.Effect<ReadonlyArray<Info>, SqlError, JobQueue> = Effect.gen(function*() {
  const { inside, store } = yield* here
  return (yield* store.schedules.list(inside)).map((row): Info => ({
    name: row.name,
    cron: row.spec,
    timeZone: row.time_zone,
    kind: row.kind,
    queue: row.queue,
    priority: row.priority,
    maxAttempts: row.max_attempts,
    timeout: Option.map(Option.fromNullOr(row.timeout_ms), Duration.millis),
    payload: JSON.parse(row.payload) as Schema.Json,
    // Sound: enqueue checks that its values are text, and who writes it by hand is told so.
    metadata: JSON.parse(row.metadata) as Enqueue.Metadata,
    missed: row.missed === 0 ? "skip" : row.missed === 1 ? "latest" : { all: row.missed },
    missedWindow: Duration.millis(row.missed_window_ms),
    overlap: row.overlap,
    jitter: Duration.millis(row.jitter_ms),
    version: row.version,
    next: time(row.next),
    previous: time(row.previous),
    // Sound: the storage's ids are jobs'.
    lastJob: Option.fromNullOr(row.last_job as Enqueue.JobId | null),
    waiting: row.waiting,
    pausedAt: time(row.paused),
    problem: Option.fromNullOr(row.problem),
    declared: row.declared,
    undeclaredAt: time(row.undeclared)
  }))
}).pipe(Effect.withSpan("CronScheduler.list"))

const found = (name: string, there: boolean) => there ? Effect.void : Effect.fail(new NoSuchSchedule({ name }))

/**
 * Stops a schedule until it is resumed, also over deploys. Its jobs go on.
 *
 * **Details**
 *
 * Ticks meanwhile are not missed: they have no job, and are not made up. Ticks that wait for a job go on waiting. Fails with
 * {@link NoSuchSchedule}.
 *
 * @category schedules
 * @since 0.1.0
 */
export const pause = Effect.fn("CronScheduler.pause")(
  function*(name: string): Effect.fn.Return<void, NoSuchSchedule | Enqueue.EnqueueError | SqlError, JobQueue> {
    const { inside, store } = yield* writing
    yield* found(name, yield* store.schedules.pause(name, inside))
  }
)

/**
 * Lets a schedule fire again that is paused, or has stopped because of a problem; from its next tick on.
 *
 * **Details**
 *
 * A problem that is still there is there again afterwards: see {@link list}. One that neither is paused nor has a problem is
 * left as it is. Fails with {@link NoSuchSchedule}.
 *
 * @category schedules
 * @since 0.1.0
 */
export const resume = Effect.fn("CronScheduler.resume")(
  function*(name: string): Effect.fn.Return<void, NoSuchSchedule | Enqueue.EnqueueError | SqlError, JobQueue> {
    const { inside, store, wakeup } = yield* writing
    const next = (row: Schedules.OneRow) => nextOf(row.spec, row.time_zone, Math.max(row.now, row.previous ?? row.now))
    yield* found(name, yield* store.schedules.resume(name, next, inside))
    yield* announce(wakeup.scheduled)
  }
)

/**
 * Enqueues a job of a schedule now, beside those of its ticks, also while it is paused.
 *
 * **Details**
 *
 * `scheduledFor` is now. It does not wait for the job of an earlier tick; with `overlap: "skip"` or `"queue"` the ticks that
 * follow heed it, unless an earlier job is there to be heeded. With a unique key that somebody holds, the answer is
 * `existing` and his job. Fails with {@link NoSuchSchedule}.
 *
 * @category schedules
 * @since 0.1.0
 */
export const trigger = Effect.fn("CronScheduler.trigger")(
  function*(
    name: string
  ): Effect.fn.Return<Enqueue.Enqueued, NoSuchSchedule | Enqueue.EnqueueError | SqlError, JobQueue> {
    const { inside, store, wakeup } = yield* writing
    while (true) {
      const id = SecureRandom.uuidV7Unsafe()
      const done = yield* store.schedules.trigger(name, id, inside)
      if (done === undefined) return yield* new NoSuchSchedule({ name })
      if (done.inserted) {
        yield* announce(() => wakeup.mark(done.queue, 0))
        // Sound: the id of a job that there is, here and below.
        return { id: id as Enqueue.JobId, status: "inserted" }
      }
      // Without a holder, the key has just been given back.
      if (done.holder !== null) return { id: done.holder as Enqueue.JobId, status: "existing" }
    }
  }
)

/**
 * Removes a schedule. Its jobs stay; ticks that wait for one have none.
 *
 * **Gotchas**
 *
 * One that is still declared is there again when the next process starts that declares it.
 *
 * Fails with {@link NoSuchSchedule}.
 *
 * @category schedules
 * @since 0.1.0
 */
export const remove = Effect.fn("CronScheduler.remove")(
  function*(name: string): Effect.fn.Return<void, NoSuchSchedule | Enqueue.EnqueueError | SqlError, JobQueue> {
    const { inside, store } = yield* writing
    yield* found(name, yield* store.schedules.remove(name, inside))
  }
)

/**
 * Enqueues the ticks of a schedule in a span of the past, from `from` on and before `to`, in their order.
 *
 * **Details**
 *
 * Ticks whose job is there, finished and archived ones included, have no second one; those whose finished job has been deleted
 * have. With `overlap: "queue"` they wait for each other and for the job of an earlier tick, otherwise they
 * run at once. What is not past yet is left to the schedule. At most 10 000 ticks, all or none.
 *
 * `ticks` is how many there are in that span, `enqueued` how many of them have a new job, `waiting` how many wait for one.
 *
 * Fails with {@link NoSuchSchedule}, and with `EnqueueError` when the span is not one, holds too many ticks, or the schedule's
 * expression is invalid.
 *
 * **Example** (The days before there was a schedule)
 *
 * ```ts
 * import { DateTime } from "effect"
 * import { CronScheduler } from "effect-pgqueue"
 *
 * const january = CronScheduler.backfill("nightly-report", {
 *   from: DateTime.makeUnsafe("2026-01-01T00:00:00Z"),
 *   to: DateTime.makeUnsafe("2026-02-01T00:00:00Z")
 * })
 * ```
 *
 * @category schedules
 * @since 0.1.0
 */
export const backfill = Effect.fn("CronScheduler.backfill")(
  function*(
    name: string,
    span: {
      readonly from: DateTime.DateTime | Date
      readonly to: DateTime.DateTime | Date
    }
  ): Effect.fn.Return<
    { readonly ticks: number; readonly enqueued: number; readonly waiting: number },
    NoSuchSchedule | Enqueue.EnqueueError | SqlError,
    JobQueue
  > {
    const { inside, store, wakeup } = yield* writing
    const [from, to] = [Enqueue.epochMillis(span.from), Enqueue.epochMillis(span.to)]
    const invalid = (message: string) =>
      new Enqueue.EnqueueError({ kind: "", reason: "InvalidOption", message: `the schedule "${name}": ${message}` })
    if (!(from <= to)) return yield* invalid("from and to must be dates, and to must not be before from")
    let count = 0
    const fired = yield* store.schedules.backfill(name, (row) => {
      const ticks = Ticks.parse(row.spec, row.time_zone, row.now)
      if (Result.isFailure(ticks)) return ticks.failure
      const most = Firing.mostWaiting - (row.overlap === "queue" ? row.waiting : 0)
      const past = Ticks.between(ticks.success, Math.ceil(from) - 1, Math.min(to - 1, row.now), most + 1)
      count = past.length
      return past.length > most ? `there are more than ${most} ticks in that span` : past
    }, inside)
    if (fired === undefined) return yield* new NoSuchSchedule({ name })
    if (Predicate.isString(fired)) return yield* invalid(fired)
    yield* announce(() => {
      for (const one of fired) if (one.enqueued > 0) wakeup.mark(one.queue, one.delay)
    })
    const sum = (of: (one: Schedules.Fired) => number) => fired.reduce((all, one) => all + of(one), 0)
    return { ticks: count, enqueued: sum((one) => one.enqueued), waiting: sum((one) => one.waiting) }
  }
)
