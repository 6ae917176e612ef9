/**
 * The settle buffer: what has ended is settled in batches, one statement at a time, until the database has answered for
 * every entry.
 *
 * @since 0.1.0
 */
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import * as Latch from "effect/Latch"
import { isSqlError } from "effect/sql/SqlError"
import * as Bounded from "./Bounded.ts"
import * as Database from "./Database.ts"
import type * as Settlement from "./Settlement.ts"
import type * as Store from "./Store.ts"

/** The most jobs of one settle: linear up to here (28-33 ms over 4 leases), and one statement holds its locks briefly. */
const maxEntries = 1000

/** Beyond this many unsettled jobs nothing is claimed: a database that cannot settle shall not be asked for more. */
const backPressure = 5000

/** How long a job whose row somebody has locked waits for the next round, in milliseconds. */
const busyPause = 50

/**
 * The settle buffer of one worker.
 */
export interface Settler {
  readonly push: (entry: Settlement.Entry) => void
  /** Entries that are not settled yet. */
  readonly size: () => number
  readonly full: () => boolean
  /** Settles until it is interrupted. */
  readonly run: Effect.Effect<never>
  /** Waits until nothing is left to settle. */
  readonly drained: Effect.Effect<void>
}

/**
 * Makes the settle buffer of a worker.
 */
export const make = (options: {
  readonly store: Store.Store
  readonly worker: () => string
  /** The connection failed in the middle of a settle. */
  readonly onDoubt: () => void
  /** An entry has been answered: `undefined` when it was settled as asked. */
  readonly onSettled: (entry: Settlement.Entry, answer: Settlement.Answer | undefined) => void
  /** The buffer was full and no longer is. */
  readonly onRelief: () => void
}): Settler => {
  let waiting: Array<Settlement.Entry> = []
  let inFlight = 0
  let full = false
  const some = Latch.makeUnsafe(false)
  const empty = Latch.makeUnsafe(true)

  const push = (entry: Settlement.Entry): void => {
    waiting.push(entry)
    full ||= waiting.length + inFlight >= backPressure
    empty.closeUnsafe()
    some.openUnsafe()
  }
  const again = (entries: ReadonlyArray<Settlement.Entry>): void => {
    waiting = [...entries, ...waiting]
    some.openUnsafe()
  }

  /** Sends a batch; when the data of one is refused, halves it until that one is alone. */
  const send = (entries: ReadonlyArray<Settlement.Entry>): Effect.Effect<void> =>
    Bounded.bounded(options.store.settle(options.worker(), entries), 15_000).pipe(
      Effect.flatMap((answers) => {
        const found = new Map(answers.map((answer) => [answer.lease + answer.id, answer]))
        const busy: Array<Settlement.Entry> = []
        for (const entry of entries) {
          const answer = found.get(entry.lease + entry.id)
          if (answer?.state === "busy") busy.push(entry)
          else options.onSettled(entry, answer)
        }
        if (busy.length === 0) return Effect.void
        // Apart from the others: they are not to wait for somebody's open transaction.
        inFlight += busy.length
        return Effect.asVoid(Effect.forkDetach(Effect.andThen(
          Effect.sleep(busyPause),
          Effect.sync(() => {
            inFlight -= busy.length
            again(busy)
          })
        )))
      }),
      Effect.catchCause((cause) => {
        const error = cause.reasons.find(Cause.isFailReason)?.error
        if (isSqlError(error) && !Database.isTransient(error)) {
          if (entries.length > 1) {
            const middle = entries.length >> 1
            return Effect.andThen(send(entries.slice(0, middle)), send(entries.slice(middle)))
          }
          return refused(entries[0]!, Database.sqlState(error))
        }
        // Sent again as it is: a settle that did get through finds nothing left to change.
        options.onDoubt()
        again(entries)
        return Effect.andThen(
          Effect.logDebug("effect-pgqueue: a settle did not go through, it is sent again", Cause.pretty(cause)),
          Effect.sleep("200 millis")
        )
      })
    )

  /** What the database will not store, it may store without the values that came from the handler. */
  const refused = (entry: Settlement.Entry, state: string | undefined): Effect.Effect<void> => {
    const message = `the database refused what the handler left (${state ?? "unknown"})`
    if (entry.failure?.message === message) {
      return Effect.andThen(
        Effect.logError(`effect-pgqueue: job ${entry.id} cannot be settled (${state ?? "unknown"})`),
        Effect.andThen(Effect.sleep("1 second"), Effect.sync(() => again([entry])))
      )
    }
    again([{
      ...entry,
      verb: "failed",
      result: undefined,
      reason: undefined,
      failure: { tag: "Defect", message, error: undefined }
    }])
    return Effect.void
  }

  return {
    push,
    size: () => waiting.length + inFlight,
    full: () => full,
    run: Effect.gen(function*() {
      yield* some.await
      const batch = waiting.splice(0, maxEntries)
      if (batch.length === 0) {
        some.closeUnsafe()
        if (inFlight === 0) empty.openUnsafe()
        return
      }
      inFlight += batch.length
      yield* Effect.ensuring(
        send(batch),
        Effect.sync(() => {
          inFlight -= batch.length
          if (full && waiting.length + inFlight < backPressure / 2) {
            full = false
            options.onRelief()
          }
        })
      )
    }).pipe(Effect.forever),
    drained: empty.await
  }
}
