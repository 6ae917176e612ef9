/**
 * Concurrent enqueues share a statement: whatever arrives while the last one is in flight goes into the next.
 *
 * @since 0.1.0
 */
import type * as Cause from "effect/Cause"
import * as Clock from "effect/Clock"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as References from "effect/References"
import * as Schedule from "effect/Schedule"
import * as Semaphore from "effect/Semaphore"
import type { SqlError } from "effect/sql/SqlError"
import * as Bounded from "./Bounded.ts"
import * as Database from "./Database.ts"
import type { Enqueued } from "./Enqueue.ts"
import * as Refusals from "./Refusals.ts"
import type * as Store from "./Store.ts"
import * as Turn from "./Turn.ts"
import * as UniqueKeys from "./UniqueKeys.ts"
import type * as Wakeup from "./Wakeup.ts"

/** The most rows of one insert: beyond it nothing is gained, and one statement must not hold its locks for long. */
export const maxRows = 1000

/** How much text a job has of its own, in characters. */
export const textOf = ({ metadata, payload }: Store.NewJob): number => metadata.length + payload.length

/** Returns how many of the first of these go into one insert. */
export const fitting = (jobs: ReadonlyArray<Store.NewJob>): number => Database.fitting(jobs, maxRows, textOf)

/** How long an enqueue waits out an outage before it fails, in milliseconds. */
const outage = 10_000

/** An insert on a dead link never answers; sending it again is safe, because the ids are the same. */
const insertBound = 5000

/**
 * How long, in milliseconds, a group waits for a stranger's transaction that has taken one of its ids or keys, before it
 * is halved to find the one: seven halvings of a hundred jobs stay below 50 ms.
 */
const groupPatience = 4

/** The same for the one that was found, which waits by itself, again and again. */
const lonePatience = 100

/** A job that waits for its statement. */
interface Waiting {
  readonly job: Store.NewJob
  readonly resume: (result: Exit.Exit<Enqueued, SqlError>) => void
  /** Until when it waits out an outage, by the monotonic clock. */
  until: number
  /** It was answered, or its caller has gone. */
  over: boolean
}

/** Sends some jobs in one statement. */
type Send = (jobs: ReadonlyArray<Store.NewJob>, patience: number | undefined) => Effect.Effect<Sent, SqlError>

/** The jobs of one statement, and whether it has announced them. */
interface Sent {
  readonly enqueued: ReadonlyArray<Enqueued>
  readonly announced: boolean
}

/**
 * Makes the entrance for single enqueues outside a transaction.
 */
export const make = Effect.fnUntraced(function*(options: {
  readonly store: Store.Store
  /** What the insert of a job that comes alone is to announce. See `Wakeup.withInsert`. */
  readonly withInsert: (job: Store.NewJob) => Wakeup.Announcement | undefined
  /** Called for jobs that are in and have not been announced, before their enqueues return. */
  readonly onEnqueued: (jobs: ReadonlyArray<Store.NewJob>, enqueued: ReadonlyArray<Enqueued>) => void
}) {
  const scope = yield* Bounded.open(Effect.scope)
  const context = yield* Effect.context<never>()
  const clock = yield* Clock.Clock
  const now = () => Bounded.monotonic(clock)
  /** Everybody who waits, by sort. */
  const sorts: Array<() => ReadonlyArray<Waiting>> = []
  let closed = false
  yield* Effect.addFinalizer(() =>
    Effect.sync(() => {
      closed = true
      // Nobody must wait for an answer that will not come.
      for (const one of sorts.flatMap((waiting) => waiting())) settle(one, Exit.interrupt())
    })
  )

  // In the layer's context, not in that of whichever caller happened to be first.
  const run = Effect.runForkWith(Context.add(context, References.TracerEnabled, false))
  const start = (sender: Effect.Effect<void>): void => void Fiber.runIn(run(sender), scope)

  const settle = (one: Waiting, result: Exit.Exit<Enqueued, SqlError>): void => {
    one.over = true
    one.resume(result)
  }
  const settleAll = (group: ReadonlyArray<Waiting>, result: Exit.Exit<never, SqlError>) =>
    Effect.sync(() => {
      for (const one of group) settle(one, result)
    })
  const succeed = (
    group: ReadonlyArray<Waiting>,
    jobs: ReadonlyArray<Store.NewJob>,
    { announced, enqueued }: Sent
  ) =>
    Effect.sync(() => {
      if (!announced) options.onEnqueued(jobs, enqueued)
      group.forEach((one, index) => settle(one, Exit.succeed(enqueued[index]!)))
    })
  const fail = (group: ReadonlyArray<Waiting>, error: SqlError) => settleAll(group, Exit.fail(error))

  /** A defect of the client is its callers' to see. */
  const abandon = (group: ReadonlyArray<Waiting>, cause: Cause.Cause<never>) => settleAll(group, Exit.failCause(cause))

  // A stranger's transaction may hold many keys: those who wait for it are not to take the queue's whole pool.
  const probes = Semaphore.makeUnsafe(2)

  /** Collects and sends one sort of jobs. */
  const collect = (send: Send, patience: number | undefined) => {
    // Arrays: a set that is filled and emptied all the time keeps what was in it alive until the next full collection,
    // which was a fifth of the time of 100 callers.
    let pending: Array<Waiting> = []
    let inFlight: ReadonlyArray<Waiting> = []
    /** Who probes an id or a key that a stranger has, and who waits for the outcome, by that id or key. */
    const probed = new Map<string, Array<Waiting>>()
    let sending = false
    sorts.push(() => [...pending, ...inFlight, ...[...probed.values()].flat()])

    /**
     * Sends a group. A bad neighbour fails alone, and whoever meets an id or a key in a transaction that has not ended
     * waits alone: in both cases the group is halved until it is found.
     */
    const sendGroup = (group: ReadonlyArray<Waiting>, refusals = Refusals.make()): Effect.Effect<void> => {
      const jobs = group.map(({ job }) => job)
      const until = group.reduce((least, one) => Math.min(least, one.until), Infinity)
      return persistently(send(jobs, patience), until).pipe(
        Effect.matchEffect({
          onSuccess: (sent) => {
            Refusals.passed(refusals)
            return succeed(group, jobs, sent)
          },
          onFailure: (error) => {
            const locked = patience !== undefined && Database.isLockTimeout(error)
            if (!locked && isPassing(error)) return giveUp(group, error)
            if (!locked && (!Database.isRefusal(error) || !Refusals.isOfOne(refusals))) return fail(group, error)
            if (group.length === 1) return locked ? waitApart(group[0]!) : fail(group, error)
            const [some, others] = locked ? Refusals.halved(group) : Refusals.halves(refusals, group)
            return Effect.andThen(sendGroup(some, refusals), Effect.suspend(() => sendGroup(others, refusals)))
          }
        })
      )
    }

    /**
     * Ends the wait of all whose time is over, also of those who have not been sent: in an outage more of them come than are
     * given up a group at a time (at 250 a second the last one had waited for 20 minutes after 15). The others are sent again.
     */
    const giveUp = (group: ReadonlyArray<Waiting>, error: SqlError): Effect.Effect<void> =>
      Effect.suspend(() => {
        const at = now()
        const all = [...group, ...pending]
        pending = all.filter((one) => one.until > at)
        // At most ten times a second: each of them may be about to be over when it is sent.
        return Effect.andThen(fail(all.filter((one) => one.until <= at), error), Effect.sleep(100))
      })

    /** Waits for a stranger's transaction, apart from the others; who wants the same id or key waits for the outcome. */
    const waitApart = (one: Waiting): Effect.Effect<void> =>
      Effect.suspend(() => {
        const name = one.job.unique === undefined ? one.job.id : `${one.job.kind}\x1f${one.job.unique.key}`
        const known = probed.get(name)
        if (known !== undefined) return Effect.sync(() => void known.push(one))
        const together = [one]
        probed.set(name, together)
        return Effect.sync(() =>
          start(Effect.ensuring(
            probe(one),
            Effect.sync(() => {
              probed.delete(name)
              submit(together.slice(1))
            })
          ))
        )
      })

    const probe = (one: Waiting): Effect.Effect<void> =>
      persistently(Semaphore.withPermit(probes, send([one.job], lonePatience))).pipe(
        Effect.retry({
          while: (error) => Database.isLockTimeout(error) && !one.over,
          schedule: Schedule.jittered(Schedule.spaced("20 millis"))
        }),
        Effect.matchEffect({
          onSuccess: (sent) => succeed([one], [one.job], sent),
          onFailure: (error) => fail([one], error)
        }),
        Effect.catchCause((cause) => abandon([one], cause))
      )

    const sender = Effect.gen(function*() {
      // Whoever was woken together goes together, and one who is alone at once.
      yield* Turn.end
      while (pending.length > 0) {
        const count = Database.fitting(pending, maxRows, ({ job }) => textOf(job))
        const group = pending.slice(0, count).filter((one) => !one.over)
        pending = pending.slice(count)
        if (group.length === 0) continue
        inFlight = group
        yield* Effect.catchCause(sendGroup(group), (cause) => abandon(group, cause))
        inFlight = []
      }
    }).pipe(Effect.ensuring(Effect.sync(() => {
      sending = false
    })))

    const submit = (group: ReadonlyArray<Waiting>): void => {
      for (const one of group) {
        one.until = now() + outage
        pending.push(one)
      }
      if (sending || group.length === 0) return
      sending = true
      start(sender)
    }

    return (job: Store.NewJob): Effect.Effect<Enqueued, SqlError> =>
      Effect.callback((resume) => {
        if (closed) return resume(Effect.die(new Error("the layer of this JobQueue has been closed")))
        const one: Waiting = { job, resume, until: 0, over: false }
        submit([one])
        // Not sent yet: then it never is. Sent: the caller does not learn what became of it.
        return Effect.sync(() => {
          one.over = true
        })
      })
  }

  const answered = (enqueued: Effect.Effect<ReadonlyArray<Enqueued>, SqlError>, announced = false) =>
    Effect.map(Database.answeredWithin(insertBound)(enqueued), (enqueued): Sent => ({ enqueued, announced }))
  const plainly = (jobs: ReadonlyArray<Store.NewJob>, patience: number | undefined, carried?: Wakeup.Announcement) =>
    UniqueKeys.freshFirst((fresh) => {
      // A replay is rare, and announced when it is in.
      const announcement = fresh ? carried : undefined
      const manner = { inUserTransaction: false, patience, fresh, notification: announcement?.payload }
      const sent = answered(UniqueKeys.insertPlain(options.store, jobs, manner), announcement !== undefined)
      return announcement === undefined ? sent : Effect.onExit(sent, () => Effect.sync(announcement.done))
    })
  const alone: Send = (jobs) =>
    Effect.suspend(() => {
      const announcement = jobs.length === 1 ? options.withInsert(jobs[0]!) : undefined
      const sent = plainly(jobs, undefined, announcement)
      if (announcement === undefined) return sent
      // A stranger's NOTIFY is being committed, or a session that listens and does nothing has filled the server's queue.
      const refused = (error: SqlError) => Database.isLockTimeout(error) || Database.isFullOfNews(error)
      return Effect.catchIf(sent, refused, () => plainly(jobs, undefined))
    })
  // Of a group that is sent again, in parts, because one of it has to wait, some may be in.
  const known = new WeakMap<Store.NewJob, Enqueued>()
  const keyed: Send = (jobs, patience) =>
    answered(UniqueKeys.insertKeyed(options.store, jobs, { inUserTransaction: false, patience, known }))
  // An id that was made here cannot be in a stranger's transaction; one that the caller chose can.
  const own = collect(alone, undefined)
  const given = collect(plainly, groupPatience)
  const unique = collect(keyed, groupPatience)
  return (job: Store.NewJob): Effect.Effect<Enqueued, SqlError> =>
    job.unique !== undefined ? unique(job) : job.idGiven === true ? given(job) : own(job)
})

/** What an enqueue waits out. A lock timeout is for the caller to deal with. */
const isPassing = (error: SqlError): boolean => Database.isTransient(error) && !Database.isLockTimeout(error)

/**
 * Tries again through an outage, for a while: until a moment of the monotonic clock, if one is given. The ids are the same
 * each time, so nothing is inserted twice.
 */
export const persistently = <A, R>(
  self: Effect.Effect<A, SqlError, R>,
  until?: number
): Effect.Effect<A, SqlError, R> =>
  Effect.clockWith((clock) => {
    // Not by the time of day, which may be set.
    const end = until ?? Bounded.monotonic(clock) + outage
    return Effect.retry(self, {
      while: (error) => isPassing(error) && Bounded.monotonic(clock) < end,
      schedule: Database.backoff
    })
  })
