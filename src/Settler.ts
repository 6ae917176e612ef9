/**
 * The settle buffer: what has ended is settled in batches, one statement at a time, until the database has answered for
 * every entry.
 *
 * @since 0.1.0
 */
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import * as Latch from "effect/Latch"
import { isSqlError, type SqlError } from "effect/sql/SqlError"
import * as Bounded from "./Bounded.ts"
import * as Database from "./Database.ts"
import type * as Episode from "./Episode.ts"
import * as Refusals from "./Refusals.ts"
import * as Report from "./Report.ts"
import * as Settlement from "./Settlement.ts"
import type * as Store from "./Store.ts"

/**
 * The most jobs of one settle, so that one statement holds its locks briefly: 5 to 13 ms where all have completed, 36 ms where
 * all go back in line.
 */
const maxEntries = 1000

/** In batches of so many, those that have completed are settled apart from the others, at a half of the price. */
const splitFrom = 16

/** Beyond this many unsettled jobs in one buffer nothing is claimed: a database that cannot settle shall not be asked for more. */
const backPressure = 2500

/** How much text of its handler travels with an entry, in characters. */
const textOf = ({ failure, result }: Settlement.Entry): number =>
  (result?.length ?? 0) + (failure?.message.length ?? 0) + (failure?.error?.length ?? 0)

/** A settle on a dead link never answers. */
const settleBound = 15_000

const refusal = "the database refused what the handler left"

/** How long a job whose row somebody has locked waits for the next round, in milliseconds. */
const busyPause = 50

/** How long a job that the database refuses to settle waits before it is tried again, in milliseconds. */
const refusedPause = 10_000

/**
 * A settle buffer of one worker.
 */
export interface Settler {
  readonly push: (entry: Settlement.Entry) => void
  /** Entries that are not settled yet. */
  readonly size: () => number
  readonly full: () => boolean
  /** Whether a statement has no answer yet. */
  readonly sending: () => boolean
  /** Settles until it is interrupted. */
  readonly run: Effect.Effect<never>
  /** Waits until nothing is left to settle. */
  readonly drained: Effect.Effect<void>
}

/**
 * Makes a settle buffer of a worker.
 */
export const make = (options: {
  readonly store: Store.Store
  readonly worker: () => string
  /** The monotonic clock, in milliseconds. */
  readonly now: () => number
  readonly episode: Episode.Episode
  /** The connection failed in the middle of a settle. */
  readonly onDoubt: () => void
  /** An entry has been answered: `undefined` when it was settled as asked. */
  readonly onSettled: (entry: Settlement.Entry, answer: Settlement.Answer | undefined) => void
  /** The buffer was full and no longer is. */
  readonly onRelief: () => void
}): Settler => {
  let waiting: Array<Settlement.Entry> = []
  let inFlight = 0
  /** Statements that have no answer yet. */
  let out = 0
  let full = false
  /** The most jobs of the next settle: fewer after one that did not come to an end in time. */
  let most = maxEntries
  const { episode } = options
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

  /** Puts entries back after a while, apart from the others. */
  const later = (entries: ReadonlyArray<Settlement.Entry>, millis: number) => {
    inFlight += entries.length
    return Effect.asVoid(Effect.forkDetach(Effect.andThen(
      Effect.sleep(millis),
      Effect.sync(() => {
        inFlight -= entries.length
        again(entries)
      })
    )))
  }

  const apart = (entries: ReadonlyArray<Settlement.Entry>) =>
    [
      entries.filter(({ verb }) => verb === "completed"),
      entries.filter(({ verb }) => verb !== "completed")
    ].filter(({ length }) => length > 0)

  /** What was tried of a batch that was refused, in parts. */
  interface Parts {
    readonly refusals: Refusals.Refusals
    /** What is not to be tried now, and why. */
    readonly rest: Array<Settlement.Entry>
    cause: Cause.Cause<unknown> | undefined
  }

  /** Sends a batch; when one is refused, halves it until that one is alone. */
  const send = (entries: ReadonlyArray<Settlement.Entry>): Effect.Effect<void> =>
    Effect.suspend(() => {
      const parts: Parts = { refusals: Refusals.make(), rest: [], cause: undefined }
      return Effect.andThen(
        sendPart(entries, parts),
        Effect.suspend(() => {
          if (parts.cause === undefined) return Effect.void
          again(parts.rest)
          return Effect.andThen(episode.failed(parts.cause), episode.rest)
        })
      )
    })

  const settle = (entries: ReadonlyArray<Settlement.Entry>) =>
    Effect.suspend(() => {
      out++
      return options.store.settle(options.worker(), entries, options.now())
    }).pipe(Effect.ensuring(Effect.sync(() => out--)))

  const sendPart = (entries: ReadonlyArray<Settlement.Entry>, parts: Parts): Effect.Effect<void> =>
    Bounded.bounded(settle(entries), settleBound).pipe(
      Effect.flatMap((answers) => {
        // Mostly there are none: what completed as asked is not answered.
        const found = answers.length === 0
          ? undefined
          : new Map(answers.map((answer) => [Settlement.keyOf(answer), answer]))
        const busy: Array<Settlement.Entry> = []
        for (const entry of entries) {
          const answer = found?.get(Settlement.keyOf(entry))
          if (answer?.state === "busy") busy.push(entry)
          else options.onSettled(entry, answer)
        }
        most = Math.min(maxEntries, most * 2)
        Refusals.passed(parts.refusals)
        // Not to wait for somebody's open transaction together with the others.
        return Effect.andThen(episode.succeeded, busy.length === 0 ? Effect.void : later(busy, busyPause))
      }),
      Effect.catchCause((cause) => {
        const error = cause.reasons.find(Cause.isFailReason)?.error
        if (isSqlError(error) && Database.isRefusal(error) && Refusals.isOfOne(parts.refusals)) {
          if (entries.length === 1) return refused(entries[0]!, error)
          const [some, others] = Refusals.halves(parts.refusals, entries)
          return Effect.andThen(sendPart(some, parts), sendPart(others, parts))
        }
        // Whatever else it is, it is not the jobs' fault. Sent again as it is, a settle that did get through finds
        // nothing left to change.
        if (error instanceof Bounded.TimedOut || Database.isConnectionLoss(error)) options.onDoubt()
        // What did not fit into the time, the memory or a message comes in smaller parts.
        if (!isSqlError(error) || Database.isTooMuch(error)) {
          most = Math.max(1, Math.min(most, entries.length) >> 1)
        }
        for (const entry of entries) parts.rest.push(entry)
        parts.cause = cause
        return Effect.void
      })
    )

  /** When it was last said that a job cannot be settled: a database may refuse thousands. */
  let complained = -Infinity

  /**
   * What the database will not store, it may store without the values that came from the handler. Where there are none, or it
   * says no for another reason, it is the database that has to be mended: by a partition for somebody's trigger, for instance.
   */
  const refused = (entry: Settlement.Entry, error: SqlError): Effect.Effect<void> => {
    const { failure, reason, result } = entry
    const bare = result === undefined && reason === undefined && (failure === undefined || failure.message === refusal)
    if (bare || !Database.isUnstorable(error)) {
      const isNews = options.now() - complained >= refusedPause
      if (isNews) complained = options.now()
      return Effect.andThen(
        isNews
          ? Report.error(`job ${entry.id} cannot be settled (${Database.describe(error)})`)
          : Effect.void,
        later([entry], refusedPause)
      )
    }
    again([{
      ...entry,
      verb: "failed",
      result: undefined,
      reason: undefined,
      // A job that succeeded has attempts left that are worth another result; what failed goes as it would have gone.
      delay: entry.verb === "failed" ? entry.delay : 60_000,
      failure: { tag: "Defect", message: refusal, error: undefined }
    }])
    return Effect.void
  }

  return {
    push,
    size: () => waiting.length + inFlight,
    full: () => full,
    sending: () => out > 0,
    run: Effect.gen(function*() {
      yield* some.await
      const batch = waiting.splice(0, Database.fitting(waiting, most, textOf))
      if (batch.length === 0) {
        some.closeUnsafe()
        if (inFlight === 0) empty.openUnsafe()
        return
      }
      inFlight += batch.length
      yield* Effect.ensuring(
        Effect.forEach(batch.length < splitFrom ? [batch] : apart(batch), (entries) => send(entries), {
          discard: true
        }),
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
