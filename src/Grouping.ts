/**
 * Concurrent enqueues share a statement: whatever arrives while the last one is in flight goes into the next.
 *
 * @since 0.1.0
 */
import type * as Cause from "effect/Cause"
import type * as Context from "effect/Context"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Schedule from "effect/Schedule"
import * as Semaphore from "effect/Semaphore"
import type { SqlError } from "effect/sql/SqlError"
import * as Bounded from "./Bounded.ts"
import * as Database from "./Database.ts"
import type { Enqueued } from "./Enqueue.ts"
import type * as Store from "./Store.ts"
import * as UniqueKeys from "./UniqueKeys.ts"

/** The most rows of one insert: beyond it nothing is gained, and one statement must not hold its locks for long. */
export const maxRows = 1000

/** How long an enqueue waits out an outage before it fails. */
const outage = "10 seconds"

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
  readonly result: Deferred.Deferred<Enqueued, SqlError>
}

/** Sends some jobs in one statement. */
type Send = (
  jobs: ReadonlyArray<Store.NewJob>,
  patience: number | undefined
) => Effect.Effect<ReadonlyArray<Enqueued>, SqlError>

/**
 * Makes the entrance for single enqueues outside a transaction.
 */
export const make = Effect.fnUntraced(function*(options: {
  readonly store: Store.Store
  /** Called for every job that is in, before its enqueue returns. */
  readonly onEnqueued: (job: Store.NewJob, enqueued: Enqueued) => void
}) {
  const scope = yield* Bounded.open(Effect.scope)
  const context = yield* Effect.context<never>()
  const waiting = new Set<Waiting>()
  let closed = false
  yield* Effect.addFinalizer(() =>
    Effect.sync(() => {
      closed = true
      // Nobody must wait for an answer that will not come.
      for (const { result } of waiting) Deferred.doneUnsafe(result, Effect.interrupt)
    })
  )

  // In the layer's context, not in that of whichever caller happened to be first.
  const fork = (sender: Effect.Effect<void>) =>
    Effect.forkIn(
      Effect.updateContext(Effect.withTracerEnabled(sender, false), (_caller: Context.Context<never>) => context),
      scope
    )

  const settle = (one: Waiting, result: Effect.Effect<Enqueued, SqlError>) => {
    waiting.delete(one)
    Deferred.doneUnsafe(one.result, result)
  }
  const succeed = (group: ReadonlyArray<Waiting>, enqueued: ReadonlyArray<Enqueued>) =>
    Effect.sync(() =>
      group.forEach((one, index) => {
        options.onEnqueued(one.job, enqueued[index]!)
        settle(one, Effect.succeed(enqueued[index]!))
      })
    )
  const fail = (group: ReadonlyArray<Waiting>, error: SqlError) =>
    Effect.sync(() => group.forEach((one) => settle(one, Effect.fail(error))))

  /** A defect of the client is its callers' to see. */
  const abandon = (group: ReadonlyArray<Waiting>, cause: Cause.Cause<never>) =>
    Effect.sync(() => group.forEach((one) => settle(one, Effect.failCause(cause))))

  // A stranger's transaction may hold many keys: those who wait for it are not to take the queue's whole pool.
  const probes = Semaphore.makeUnsafe(2)

  /** Collects and sends one sort of jobs. */
  const collect = (send: Send, patience: number | undefined) => {
    const pending = new Set<Waiting>()
    /** Who waits for an id or a key that somebody probes already. */
    const probed = new Map<string, Array<Waiting>>()
    let sending = false

    /**
     * Sends a group. A bad neighbour fails alone, and whoever meets an id or a key in a transaction that has not ended
     * waits alone: in both cases the group is halved until it is found.
     */
    const sendGroup = (group: ReadonlyArray<Waiting>): Effect.Effect<void> =>
      persistently(send(group.map(({ job }) => job), patience)).pipe(
        Effect.matchEffect({
          onSuccess: (enqueued) => succeed(group, enqueued),
          onFailure: (error) => {
            const locked = patience !== undefined && Database.sqlState(error) === lockTimeout
            if (!locked && !Database.isDataFault(error)) return fail(group, error)
            if (group.length === 1) return locked ? waitApart(group[0]!) : fail(group, error)
            const middle = group.length >> 1
            return Effect.andThen(sendGroup(group.slice(0, middle)), sendGroup(group.slice(middle)))
          }
        })
      )

    /** Waits for a stranger's transaction, apart from the others; who wants the same id or key waits for the outcome. */
    const waitApart = (one: Waiting): Effect.Effect<void> =>
      Effect.suspend(() => {
        const name = one.job.unique === undefined ? one.job.id : `${one.job.kind}\x1f${one.job.unique.key}`
        const known = probed.get(name)
        if (known !== undefined) return Effect.sync(() => void known.push(one))
        const others: Array<Waiting> = []
        probed.set(name, others)
        return Effect.asVoid(fork(Effect.ensuring(
          probe(one),
          Effect.suspend(() => {
            probed.delete(name)
            return submit(others.filter((other) => waiting.has(other)))
          })
        )))
      })

    const probe = (one: Waiting): Effect.Effect<void> =>
      persistently(Semaphore.withPermit(probes, send([one.job], lonePatience))).pipe(
        Effect.retry({
          while: (error) => Database.sqlState(error) === lockTimeout && waiting.has(one),
          schedule: Schedule.jittered(Schedule.spaced("20 millis"))
        }),
        Effect.matchEffect({
          onSuccess: (enqueued) => succeed([one], enqueued),
          onFailure: (error) => fail([one], error)
        }),
        Effect.catchCause((cause) => abandon([one], cause))
      )

    const sender = Effect.gen(function*() {
      while (pending.size > 0) {
        const group = [...take(pending, maxRows)]
        yield* Effect.catchCause(sendGroup(group), (cause) => abandon(group, cause))
      }
    }).pipe(Effect.ensuring(Effect.sync(() => {
      sending = false
    })))

    const submit = (group: ReadonlyArray<Waiting>): Effect.Effect<void> =>
      Effect.suspend(() => {
        for (const one of group) pending.add(one)
        if (sending || pending.size === 0) return Effect.void
        sending = true
        return Effect.asVoid(fork(sender))
      })

    return (job: Store.NewJob): Effect.Effect<Enqueued, SqlError> =>
      Effect.suspend(() => {
        if (closed) return Effect.die(new Error("the layer of this JobQueue has been closed"))
        const one: Waiting = { job, result: Deferred.makeUnsafe() }
        waiting.add(one)
        return Effect.andThen(
          submit([one]),
          Effect.onInterrupt(Deferred.await(one.result), () =>
            Effect.sync(() => {
              // Not sent yet: then it never is. Sent: the caller does not learn what became of it.
              pending.delete(one)
              waiting.delete(one)
            }))
        )
      })
  }

  const answered = Database.answeredWithin(insertBound)
  const plainly: Send = (jobs, patience) =>
    UniqueKeys.freshFirst((fresh) =>
      answered(UniqueKeys.insertPlain(options.store, jobs, { inUserTransaction: false, patience, fresh }))
    )
  const keyed: Send = (jobs, patience) =>
    answered(UniqueKeys.insertKeyed(options.store, jobs, { inUserTransaction: false, patience }))
  // An id that was made here cannot be in a stranger's transaction; one that the caller chose can.
  const own = collect(plainly, undefined)
  const given = collect(plainly, groupPatience)
  const unique = collect(keyed, groupPatience)
  return (job: Store.NewJob): Effect.Effect<Enqueued, SqlError> =>
    job.unique !== undefined ? unique(job) : job.idGiven === true ? given(job) : own(job)
})

const lockTimeout = "55P03"

/** Takes the first elements out of a set. */
function* take<A>(from: Set<A>, most: number) {
  let taken = 0
  for (const one of from) {
    if (taken++ >= most) return
    from.delete(one)
    yield one
  }
}

/**
 * Tries again through an outage, for a while. The ids are the same each time, so nothing is inserted twice.
 */
export const persistently = <A, R>(self: Effect.Effect<A, SqlError, R>): Effect.Effect<A, SqlError, R> =>
  Effect.retry(self, {
    // A lock timeout is for the caller to deal with.
    while: (error) => Database.isTransient(error) && Database.sqlState(error) !== lockTimeout,
    schedule: Schedule.upTo(Database.backoff, { duration: outage })
  })
