/**
 * Inserts of jobs, with and without unique keys: who wins a key, and what the losers do.
 *
 * @since 0.1.0
 */
import * as Effect from "effect/Effect"
import type { SqlError } from "effect/sql/SqlError"
import { createHash } from "node:crypto"
import * as Database from "./Database.ts"
import type { Enqueued, JobId } from "./Enqueue.ts"
import type * as Store from "./Store.ts"

/** How a group of jobs is inserted: in the application's transaction or not, and how long to wait for a stranger's. */
export interface Manner {
  readonly inUserTransaction: boolean
  /** Milliseconds to wait for a transaction that has taken the same id or key and not ended; no limit when undefined. */
  readonly patience: number | undefined
  /** Ids that were made here have not been sent before. Outside the application's transaction only. */
  readonly fresh?: boolean
  /** What has become of jobs that were sent before, where that failed for others. Outside the application's transaction only. */
  readonly known?: WeakMap<Store.NewJob, Enqueued>
  /** What the insert of one such job announces. */
  readonly notification?: string | undefined
}

/**
 * Inserts jobs without unique keys.
 */
export const insertPlain = (
  store: Store.Store,
  jobs: ReadonlyArray<Store.NewJob>,
  { fresh, inUserTransaction, notification, patience }: Manner
): Effect.Effect<ReadonlyArray<Enqueued>, SqlError> =>
  fresh === true && !jobs.some((job) => job.idGiven === true)
    ? Effect.as(store.insertNew(jobs, notification), jobs.map((job) => enqueuedAs(job, true)))
    : Effect.gen(function*() {
      const ids = yield* store.insert(jobs, inUserTransaction, patience)
      if (ids.size === jobs.length) return jobs.map((job) => enqueuedAs(job, true))
      yield* store.replayed(inUserTransaction)
      const inserted = new Set(ids)
      // Of two jobs with one id the first went in.
      return jobs.map((job) => enqueuedAs(job, inserted.delete(job.id)))
    })

/**
 * Sends what was not sent before, and as a replay when it turns out that it was: its answer was lost.
 */
export const freshFirst = <A>(
  send: (fresh: boolean) => Effect.Effect<A, SqlError>
): Effect.Effect<A, SqlError> => Effect.catchIf(send(true), Database.isReplay, () => send(false))

/**
 * Inserts jobs with unique keys. The losers read the holders, in a second statement, replace them where the rule says so,
 * and ask again when one has just ended.
 */
export const insertKeyed = (
  store: Store.Store,
  jobs: ReadonlyArray<Store.NewJob>,
  { inUserTransaction, known, patience }: Manner
): Effect.Effect<ReadonlyArray<Enqueued>, SqlError> => {
  const done = new Map<string, Enqueued>()
  for (const job of jobs) {
    const enqueued = known?.get(job)
    if (enqueued !== undefined) done.set(job.id, enqueued)
  }
  return Effect.gen(function*() {
    let replayed = false
    let open = done.size === 0 ? jobs : jobs.filter((job) => !done.has(job.id))
    while (open.length > 0) {
      const inserted = yield* store.insertUnique(open, inUserTransaction, patience)
      for (const job of open) if (inserted.has(job.id)) done.set(job.id, enqueuedAs(job, true))
      const losers = open.filter((job) => !inserted.has(job.id))
      if (losers.length === 0) break
      const holders = new Map(
        (yield* store.holders(losers, inUserTransaction)).map((holder) => [holder.id, holder] as const)
      )
      const expired: Array<Store.NewJob> = []
      const again: Array<Store.NewJob> = []
      for (const job of losers) {
        const holder = holders.get(job.id)
        if (holder === undefined) again.push(job)
        else if (holder.expired) expired.push(job)
        else if (holder.holder === job.id) {
          // The key is held by this very job.
          replayed = true
          done.set(job.id, enqueuedAs(job, false))
        } else {
          const replaced = job.unique!.onConflict !== "keep" &&
            (yield* store.replace(holder.holder, job, inUserTransaction))
          // Sound: the holder of a key is a job of this queue.
          done.set(job.id, { id: holder.holder as JobId, status: replaced ? "replaced" : "existing" })
        }
      }
      if (expired.length > 0) yield* store.expireKeys(expired, inUserTransaction, patience)
      open = [...again, ...expired]
    }
    if (replayed) yield* store.replayed(inUserTransaction)
    return answersOf(jobs, done).map(([, enqueued]) => enqueued)
  }).pipe(Effect.onError(() =>
    // Sent again they would meet themselves, or, if they have ended meanwhile and nothing is kept of them, run again.
    Effect.sync(() => answersOf(jobs, done).forEach(([job, enqueued]) => known?.set(job, enqueued)))
  ))
}

/** What the jobs are told of which it is known. Of two jobs with one id the first went in. */
const answersOf = (jobs: ReadonlyArray<Store.NewJob>, done: ReadonlyMap<string, Enqueued>) => {
  const answered = new Set<string>()
  return jobs.flatMap((job) => {
    const enqueued = done.get(job.id)
    if (enqueued === undefined) return []
    const again = answered.has(job.id) && enqueued.status === "inserted"
    answered.add(job.id)
    return [[job, again ? enqueuedAs(job, false) : enqueued] as const]
  })
}

/**
 * Sorts jobs by the hash of their keys, as the statements do inside: two bulks of several statements cannot deadlock.
 */
export const inKeyOrder = (jobs: ReadonlyArray<Store.NewJob>): ReadonlyArray<Store.NewJob> =>
  jobs
    .map((job) => ({ job, hash: createHash("sha256").update(`${job.kind}\x1f${job.unique?.key}`).digest("hex") }))
    .toSorted((a, b) => (a.hash < b.hash ? -1 : 1))
    .map(({ job }) => job)

const enqueuedAs = (job: Store.NewJob, inserted: boolean): Enqueued => ({
  // Sound: ids are made or checked in `Enqueue.resolver`.
  id: job.id as JobId,
  // An id of our own that is there already was inserted by an earlier send whose answer was lost.
  status: inserted || job.idGiven !== true ? "inserted" : "existing"
})
