/**
 * Whether this process may run jobs: its identity, its heartbeat, and the comparison of its leases with the table.
 *
 * @since 0.1.0
 */
import * as Cause from "effect/Cause"
import * as Clock from "effect/Clock"
import { SecureRandom } from "effect/crypto"
import * as Effect from "effect/Effect"
import * as Latch from "effect/Latch"
import * as Metric from "effect/Metric"
import type * as Scope from "effect/Scope"
import { isSqlError, type SqlError } from "effect/sql/SqlError"
import * as Bounded from "./Bounded.ts"
import * as Contact from "./Contact.ts"
import * as Database from "./Database.ts"
import * as Episode from "./Episode.ts"
import * as Report from "./Report.ts"
import * as Store from "./Store.ts"
import * as Telemetry from "./Telemetry.ts"

/**
 * The life of one worker as the database sees it.
 */
export interface Liveness {
  /** The identity under which to claim. It changes when this process was declared dead. */
  readonly id: () => string
  /** Whether a job may be started now; `at` is for whoever has just asked for the time. */
  readonly alive: (at?: number) => boolean
  /** There once this process has been alive, without a gap, for a whole lease time: only then may it judge others. */
  readonly standing: () => Contact.Standing | undefined
  /** Says that a connection was lost: nothing starts until the leases have been compared. */
  readonly doubt: () => void
  /** Asks for the next beat to come at once: it may have something to tell. */
  readonly hurry: () => void
  /** The worker is about to be unregistered: it is not to be registered again. */
  readonly retire: () => void
  /** Beats until it is interrupted. */
  readonly run: Effect.Effect<void>
}

/** Whether a beat has failed of what no handler of this process can have brought about. */
const isNobodysFault = (error: unknown): boolean =>
  isSqlError(error) && !Database.isStatementTimeout(error) && !Database.isLockTimeout(error)

/** Leases that are in the table, ours, unknown and older than this were claimed by a statement whose answer was lost. */
const forgotten = 5000

/**
 * Makes the liveness of a worker.
 */
export const make = Effect.fnUntraced(function*(options: {
  readonly database: Database.Database
  readonly store: Store.Store
  readonly worker: Omit<Parameters<Store.Store["register"]>[0], "id" | "lease">
  /** Milliseconds. */
  readonly lease: number
  readonly beat: number
  /** The leases this process knows of, with whether the answer to their claim has arrived. */
  readonly leases: () => ReadonlyMap<string, { readonly confirmed: boolean }>
  /**
   * These leases are no longer ours; all of them when `undefined`. `unheard`: the database was there and heard nothing of
   * this process, and one of its jobs may be the reason.
   */
  readonly onLost: (leases: ReadonlyArray<string> | undefined, unheard: boolean) => void
  /** These jobs are marked as cancelled. */
  readonly onCancelled: (jobs: ReadonlyArray<string>) => void
  /** The worker may start jobs again. */
  readonly onAlive: () => void
  /** The worker has been registered, for the first time or again under a new id. */
  readonly onRegistered: () => void
}) {
  const clock = yield* Clock.Clock
  const now = () => Bounded.monotonic(clock)
  // Handlers must have stopped before the lease can end elsewhere: one that has to clean up has as long as a heartbeat, where
  // that leaves room for one beat that gets no answer, and another one.
  const margin = Math.max(options.lease / 6, Math.min(options.beat, options.lease * 2 / 3 - options.beat))
  const patience = options.lease / 6
  const kick = Latch.makeUnsafe(false)
  const episode = Episode.make("the heartbeat")
  const contact = Contact.make()
  let id = SecureRandom.uuidV4Unsafe()
  let registered = false
  /** When the last beat that succeeded was sent, and since when every one has. */
  let lastBeat = -Infinity
  let aliveSince = Infinity
  /** When a connection was last lost. */
  let doubted = -Infinity
  /** When this worker was last declared dead. */
  let declaredDead = -Infinity
  /** When the database last could not be reached, or refused a beat. */
  let unreachable = -Infinity
  let retired = false
  let lost = true

  /** When handlers are interrupted, unless a beat gets through before. */
  const deadline = () => lastBeat + options.lease - margin
  const inTime = (at = now()) => at < deadline()

  /**
   * How far the time of day is ahead of the monotonic clock, which stands still while a machine is suspended: others have
   * had the jobs of this process meanwhile. Where the clock was only set, a beat more has been sent.
   */
  let ahead = Infinity
  const aheadAt = (at: number) => clock.currentTimeMillisUnsafe() - at
  const wasSuspended = (at: number): boolean => {
    const found = aheadAt(at)
    if (found - ahead < margin) return false
    ahead = found
    doubt()
    return true
  }
  const doubt = (): void => {
    doubted = now()
    kick.openUnsafe()
  }
  const alive = (at = now()) => registered && inTime(at) && !wasSuspended(at) && lastBeat > doubted

  const loseAll = (unheard: boolean) => {
    aliveSince = Infinity
    lost = true
    options.onLost(undefined, unheard)
  }

  const register = Effect.gen(function*() {
    if (registered || retired) return
    yield* Bounded.bounded(options.store.register({ ...options.worker, id, lease: options.lease }), options.lease / 3)
    registered = true
    options.onRegistered()
  })

  const beat = (
    send: (text: string, params: ReadonlyArray<unknown>) => Effect.Effect<ReadonlyArray<unknown>, SqlError>
  ) =>
    Effect.gen(function*() {
      yield* register
      // Before the beat is sent: a doubt that comes while it is out wants another one.
      kick.closeUnsafe()
      const sent = now()
      const aheadThen = aheadAt(sent)
      // Judged are only leases whose claim was answered before the comparison was sent.
      const confirmed = [...options.leases()].filter(([, lease]) => lease.confirmed).map(([lease]) => lease)
      const rows = yield* Bounded.bounded(send(options.store.beatText, [id]), patience)
      // Sound: the columns of `beatText`.
      const answer = Store.readBeat(rows as Parameters<typeof Store.readBeat>[0])
      if (!answer.alive) {
        if (retired) return
        yield* Report.warning(
          `worker ${id} was declared dead; its jobs are interrupted, it starts again under a new id`
        )
        loseAll(false)
        id = SecureRandom.uuidV4Unsafe()
        registered = false
        // At once, but not again and again: somebody may keep every beat from its row.
        if (now() - declaredDead >= options.beat) kick.openUnsafe()
        declaredDead = now()
        return
      }
      const here = new Set(answer.leases.map((lease) => lease.id))
      const missing = confirmed.filter((lease) => !here.has(lease))
      if (missing.length > 0) options.onLost(missing, false)
      if (answer.cancelled.length > 0) options.onCancelled(answer.cancelled)
      lastBeat = sent
      ahead = aheadThen
      if (lost) aliveSince = sent
      lost = false
      const moved = answer.clock === undefined ? 0 : contact.heard(sent, now(), answer.clock)
      if (moved !== 0) {
        // Others may not have beaten since.
        aliveSince = sent
        yield* Contact.reportMove(moved, options.lease)
      }
      if (alive()) options.onAlive()
      const known = options.leases()
      const unknown = answer.leases.filter((lease) => !known.has(lease.id) && lease.age > forgotten)
      if (unknown.length > 0) {
        // What cannot be handed back now is found again by the next beat.
        yield* Effect.ignoreCause(
          Bounded.bounded(options.store.release(id, unknown.map((lease) => lease.id)), options.lease / 3)
        )
      }
      yield* episode.succeeded
    })

  const pause = Effect.timeoutOption(kick.await, options.beat)

  // Over a connection of its own: handlers and claims must not be able to hold up the beat.
  const life: Effect.Effect<never, SqlError | Bounded.TimedOut, Scope.Scope> = Effect.flatMap(
    options.database.alone,
    (send) => Effect.forever(Effect.andThen(beat(send), pause))
  )

  /** When this process last went on after it had stood still. */
  let thawedAt = -Infinity
  /** When a blocked event loop was last reported. */
  let blockedAt = -Infinity
  const reportLag = (lag: number) =>
    Effect.suspend(() => {
      if (lag < options.beat / 2 || now() - blockedAt < options.lease) return Effect.void
      blockedAt = now()
      return Report.warning(
        `the event loop stood still for ${
          Math.round(lag)
        } ms; a heartbeat is due every ${options.beat} ms, and after ${options.lease} ms without one the jobs of this process go to others. Does a handler compute without a pause?`
      )
    })

  const step = Math.max(50, Math.min(margin / 4, options.beat / 4))
  // Decided by this process's own monotonic clock, never by waiting for an answer.
  const watch = Effect.gen(function*() {
    const begun = now()
    const wait = begun < deadline() ? Math.min(step, deadline() - begun) : step
    yield* Effect.sleep(wait)
    const lag = Math.max(0, now() - begun - wait)
    yield* Metric.update(Telemetry.eventLoopLag, lag)
    yield* reportLag(lag)
    if (lag > step) thawedAt = now()
    // A process that stood still had no chance to beat. It gets it now, for as long as nobody can have taken its jobs.
    const until = now() - thawedAt < margin ? lastBeat + options.lease - step : deadline()
    if (lost || now() < until) return
    yield* Report.warning(
      `no heartbeat of worker ${id} got through in time; its jobs are interrupted`
    )
    loseAll(unreachable < lastBeat)
  }).pipe(Effect.forever)

  const liveness: Liveness = {
    id: () => id,
    alive,
    standing: () =>
      !lost && inTime() && now() - aliveSince >= options.lease
        ? { clock: contact.expected(now()), watched: now() - aliveSince, doubt: contact.doubt(now()) }
        : undefined,
    doubt,
    hurry: () => void kick.openUnsafe(),
    retire: () => {
      retired = true
    },
    run: Effect.raceFirst(
      watch,
      Bounded.scoped(life).pipe(
        Effect.sandbox,
        Effect.tapError((cause) => {
          doubted = now()
          // Not when a beat waits in vain, for an answer or for a lock: a handler that holds what it waits for, its table for
          // one, must spend its attempts. What the server refuses is no handler's doing.
          if (cause.reasons.some((reason) => Cause.isFailReason(reason) && isNobodysFault(reason.error))) {
            unreachable = doubted
          }
          return episode.failed(cause)
        }),
        Effect.retry(Database.backoff),
        Effect.orDie
      )
    )
  }
  return liveness
})
