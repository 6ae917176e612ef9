/**
 * The run of a transactional handler: what it writes and its settlement commit together, or not at all.
 *
 * @since 0.1.0
 */
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import { isSqlError } from "effect/sql/SqlError"
import type * as Current from "./Current.ts"
import * as Database from "./Database.ts"
import type * as Run from "./Run.ts"
import type * as Settlement from "./Settlement.ts"
import type * as Store from "./Store.ts"

/**
 * Runs a handler in a transaction of the queue's client in which it is settled, too. `complete` makes the settlement, or
 * fails with why it cannot be made.
 */
export type Transactional = (
  running: Run.Running,
  handler: Effect.Effect<Current.Ended, Current.Unhandled>,
  complete: (value: unknown) => Effect.Effect<Settlement.Entry, string>
) => Effect.Effect<Current.Ended, Current.Unhandled>

/**
 * Whether a run has ended because it was told to stop. Rollbacks may have failed then, those to a savepoint of the handler's
 * own, too: the connection was gone.
 */
const isTold = (cause: Cause.Cause<unknown>): boolean =>
  Cause.hasInterrupts(cause) &&
  cause.reasons.every((reason) =>
    Cause.isInterruptReason(reason) || (Cause.isDieReason(reason) && isSqlError(reason.defect))
  )

/** How long to wait for somebody who has locked the job's row, in milliseconds. */
const busyPause = 50

/**
 * Makes the runner of transactional handlers.
 */
export const make = (options: {
  readonly database: Database.Database
  readonly store: Store.Store
  readonly worker: () => string
  /** Milliseconds. */
  readonly lease: number
  /** Gives the job a lease of its own; `false` when it is no longer this worker's. */
  readonly detach: (running: Run.Running) => Effect.Effect<boolean>
}): Transactional =>
(running, handler, complete) => {
  const { database, store } = options

  const lost = Effect.suspend(() => {
    running.interruption ??= "lost"
    return Effect.interrupt
  })

  /** The last statement before the commit: it holds if the job is still in its lease, and locks the lease until then. */
  const settle = (entry: Settlement.Entry): Effect.Effect<void, unknown> =>
    Effect.flatMap(store.completeHere(options.worker(), entry), ([answer]) => {
      switch (answer?.state) {
        case "gone":
          return lost
        case "busy":
          return Effect.andThen(Effect.sleep(busyPause), settle(entry))
        default:
          // Only when it has committed: until then nothing has been settled.
          return database.app.afterCommit(Effect.sync(() => {
            running.settled = { entry, answer }
          }))
      }
    })

  const run = Effect.suspend(() => {
    /** Why nothing is to be committed: the handler's own failure, as it is, or a defect of what is around it. */
    let failure: Cause.Cause<Current.Unhandled> | undefined
    const transaction = Database.transaction(
      database.app,
      Effect.gen(function*() {
        // A process that freezes must not keep its locks: after the lease others run the job, and would wait for them.
        yield* Effect.orDie(store.boundIdle(Math.max(options.lease, running.row.timeout_ms ?? 0)))
        // Its scope closes inside: finalizers may use the transaction.
        const value = yield* Effect.scoped(handler)
        // From here on it holds locks of the queue, and has nothing to wait for but the commit.
        if ((running.row.timeout_ms ?? 0) > options.lease) yield* Effect.orDie(store.boundIdle(options.lease))
        const entry = yield* Effect.catch(complete(value), (message) => Effect.die(new Error(message)))
        yield* Effect.orDie(settle(entry))
        return value
      }).pipe(Effect.onError((cause) =>
        Effect.sync(() => {
          failure = cause
        })
      ))
    )
    // Uninterruptible, because who has been told to stop handles nothing else.
    return Effect.uninterruptibleMask((restore) =>
      Effect.catchCause(restore(transaction), (cause) => {
        // A rollback on a connection that is gone hides it, and that the run had been told to stop.
        if (isTold(failure ?? cause)) return Effect.interrupt
        // What fails around the handler is no error of its type. Whether a commit whose answer was lost has taken place, the
        // lease tells: if it has, the attempt that is now reported as failed is no longer in it, and changes nothing.
        return failure === undefined ? Effect.orDie(Effect.failCause(cause)) : Effect.failCause(failure)
      })
    )
  })

  return Effect.flatMap(options.detach(running), (mine) => mine ? run : lost)
}
