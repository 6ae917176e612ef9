/**
 * The leases of one worker, as it knows them: which jobs it holds under which lease.
 *
 * @since 0.1.0
 */
import { SecureRandom } from "effect/crypto"
import * as Effect from "effect/Effect"
import * as Bounded from "./Bounded.ts"
import type * as Run from "./Run.ts"
import type * as Store from "./Store.ts"

/** A lease this worker knows of: `confirmed` when the statement that made it has been answered. */
export interface Lease {
  readonly id: string
  /** How many were opened before. */
  readonly nth: number
  confirmed: boolean
  readonly jobs: Map<string, Run.Running>
}

/**
 * The leases of one worker.
 */
export interface Leases {
  readonly all: ReadonlyMap<string, Lease>
  /** Opens a lease under a new id, before the statement that makes it is sent. */
  readonly open: (jobs?: Iterable<Run.Running>) => Lease
  /** Forgets a lease: it is empty, lost, or its statement has failed. */
  readonly forget: (lease: string) => void
  /** Takes a job that has been settled out of its lease. */
  readonly settled: (lease: string, job: string) => Run.Running | undefined
  /** Finds the runs of a job, of whatever lease. */
  readonly find: (job: string) => ReadonlyArray<Run.Running>
  /**
   * Gives a job a lease of its own; `false` when it is no longer this worker's, or that is unknown. Then the run is handed
   * back under its old lease, and a new one that nobody knows is found by the next heartbeats.
   */
  readonly detach: (running: Run.Running) => Effect.Effect<boolean>
}

/**
 * Makes the leases of a worker.
 */
export const make = (options: {
  readonly store: Store.Store
  /** How long to wait for a statement, in milliseconds. */
  readonly bound: number
  /** A statement failed, and whether it took effect is unknown. */
  readonly onFailed: (error: unknown) => void
}): Leases => {
  const all = new Map<string, Lease>()
  let opened = 0
  const open = (jobs: Iterable<Run.Running> = []): Lease => {
    const id = SecureRandom.uuidV7Unsafe()
    const lease: Lease = { id, nth: opened++, confirmed: false, jobs: new Map() }
    for (const running of jobs) lease.jobs.set(running.row.id, running)
    all.set(id, lease)
    return lease
  }
  const forget = (lease: string): void => void all.delete(lease)
  const settled: Leases["settled"] = (id, job) => {
    const lease = all.get(id)
    const running = lease?.jobs.get(job)
    lease?.jobs.delete(job)
    if (lease?.jobs.size === 0) forget(id)
    return running
  }
  return {
    all,
    open,
    forget,
    settled,
    find: (job) => [...all.values()].flatMap(({ jobs }) => jobs.get(job) ?? []),
    detach: (running) =>
      Effect.gen(function*() {
        // The others of its lease have been settled.
        if (all.get(running.lease)?.jobs.size === 1) return true
        const own = open([running])
        const done = yield* Bounded.bounded(
          options.store.detach(running.lease, running.row.id, own.id),
          options.bound
        ).pipe(
          Effect.catch((error) =>
            Effect.sync(() => {
              options.onFailed(error)
              return "gone" as const
            })
          )
        )
        if (done !== "moved") {
          forget(own.id)
          return done === "alone"
        }
        settled(running.lease, running.row.id)
        running.lease = own.id
        own.confirmed = true
        return true
        // Its answer decides under which lease the run is handed back: an interruption waits for it.
      }).pipe(Effect.uninterruptible)
  }
}
