/**
 * Who must be woken, and when: marked after the commit, told to the listeners of this process directly and to the others
 * by one coalesced NOTIFY, or by the insert of a job that comes alone. Only a hint: polling is the truth.
 *
 * @since 0.1.0
 */
import type * as PgConnection from "@effect/sql-pg/PgConnection"
import * as Clock from "effect/Clock"
import * as Effect from "effect/Effect"
import * as Latch from "effect/Latch"
import * as Queue from "effect/Queue"
import * as Scheduler from "effect/Scheduler"
import type * as Scope from "effect/Scope"
import * as Bounded from "./Bounded.ts"
import * as Database from "./Database.ts"
import * as Episode from "./Episode.ts"
import * as Store from "./Store.ts"
import * as Turn from "./Turn.ts"

/** Whoever wants to hear: a worker, or somebody who waits for a job. */
export interface Listener {
  /** Whether it works this queue. */
  readonly works: (queue: string) => boolean
  /** A queue has something due in `delay` milliseconds; no queue means: look at everything, something may have been missed. */
  readonly onDue: (queue: string | undefined, delay: number) => void
  /** A running job may have been cancelled. */
  readonly onCancel: (job: string) => void
  /** A job may have ended. */
  readonly onEnd: (job: string) => void
  /** A schedule may have a tick sooner than is known. */
  readonly onSchedule: () => void
  /** The session that listened was lost: the first sign of an outage. */
  readonly onLost: () => void
}

/** Hears nothing. */
export const deaf: Listener = {
  works: () => false,
  onDue: () => {},
  onCancel: () => {},
  onEnd: () => {},
  onSchedule: () => {},
  onLost: () => {}
}

/** What is told of one job. */
export type News = "cancel" | "end"

/** What an insert announces with its commit. */
export interface Announcement {
  readonly payload: string
  /** The insert has been answered, or has failed. */
  readonly done: () => void
}

/**
 * Wakes workers.
 */
export interface Wakeup {
  /** Announces that a queue has something due in `delay` milliseconds. Returns at once and never fails. */
  readonly mark: (queue: string, delay: number) => void
  /**
   * Lets the insert of a job that comes alone carry its NOTIFY, which spares those who hear it a round trip. `undefined`:
   * the queue is to be marked once the job is in.
   */
  readonly withInsert: (queue: string, delay: number) => Announcement | undefined
  /** Announces that something has happened to a job that somebody has to know of. Returns at once and never fails. */
  readonly tell: (news: News, job: string) => void
  /** The same for this process alone: the others have been told. */
  readonly tellHere: (news: News, job: string) => void
  /** Announces that a schedule was written. Returns at once and never fails. */
  readonly scheduled: () => void
  /** Registers a listener of this process until the scope closes. */
  readonly subscribe: (listener: Listener) => Effect.Effect<void, never, Scope.Scope>
  /** Begins to hear the other processes, once for all listeners of this one; reconnects for ever. */
  readonly listen: Effect.Effect<void>
}

/** What is announced when a schedule was written. */
const scheduleWritten = "schedule"

/**
 * Rounds of NOTIFY are let through by a token bucket: a round is saved up every so many milliseconds, and so many are kept.
 * An enqueue that is alone is told at once (p50 1.8 ms at 200/s; 3.4 ms with a pause after each round), and enqueues that
 * come fast share a round: a NOTIFY for each took four fifths of their rate, and every worker has to hear it.
 */
const roundEvery = 4
const mostAtOnce = 20

/**
 * An insert carries its NOTIFY after so many milliseconds in which this process has enqueued nothing. Where one enqueue
 * follows the other they do not: the round trip that it spares who hears it is not worth the lock.
 */
const lull = 1

/**
 * NOTIFY holds a lock that all databases of the server share until its commit is on disk: where many processes insert with
 * it, they wait for each other. So many inserts in a row that took so many milliseconds, the wait for a connection included,
 * are a sign of that, or of a slow disk; then none carries a NOTIFY for a while, in milliseconds.
 */
const slowInsert = 5
const slowInARow = 3
const apartFor = 2000

/** How long the end of a process waits for what is still to be announced, in milliseconds. */
const lastWord = 300

/**
 * How often at most a notification that says nothing makes this process look, in milliseconds: NOTIFY asks for no right, so
 * anybody who can connect can send as many as he likes.
 */
const strangeEvery = 1000

/** A worker that waits longer than this looks again by itself, so a NOTIFY for a later job would be noise. */
const horizon = 10_000

/**
 * Starts the notifier of one queue.
 */
export const make = Effect.fnUntraced(function*(db: Database.Database, schema: string) {
  const channel = Database.channelOf(schema)
  const clock = yield* Clock.Clock
  const now = () => Bounded.monotonic(clock)
  const listeners = new Set<Listener>()
  const dirty = new Map<string, number>()
  const told = new Set<string>()
  const pending = Latch.makeUnsafe(false)
  /** Closed from a mark on until it has been announced. */
  const silent = Latch.makeUnsafe(true)
  /** When this process last had something to announce; later than any time while an insert carries it. */
  let quietSince = -Infinity
  let slow = 0
  let apartUntil = -Infinity

  // The session of our own notifier: its notifications were delivered to this process directly.
  let ownProcess = 0

  const mark = (queue: string, delay: number): void => {
    for (const listener of listeners) listener.onDue(queue, delay)
    quietSince = now()
    if (delay > horizon) return
    const known = dirty.get(queue)
    if (known === undefined || delay < known) dirty.set(queue, delay)
    silent.closeUnsafe()
    pending.openUnsafe()
  }

  const withInsert = (queue: string, delay: number): Announcement | undefined => {
    const at = now()
    if (!db.keepsSettings || delay > horizon || at < apartUntil || at < quietSince + lull) return undefined
    // A round is about to go, and this one goes with it.
    if (dirty.size > 0) return undefined
    // Who is here is told sooner by a mark than by any NOTIFY.
    for (const listener of listeners) if (listener.works(queue)) return undefined
    quietSince = Infinity
    return {
      payload: payloadOf(queue, delay),
      done: () => {
        const end = now()
        quietSince = end
        slow = end - at < slowInsert ? 0 : slow + 1
        if (slow < slowInARow) return
        slow = 0
        apartUntil = end + apartFor
      }
    }
  }

  const tellHere = (news: News, job: string): void => {
    for (const listener of listeners) {
      if (news === "cancel") listener.onCancel(job)
      else listener.onEnd(job)
    }
  }

  /** Has the other processes told, with the next round. */
  const say = (payload: string): void => {
    told.add(payload)
    silent.closeUnsafe()
    pending.openUnsafe()
  }

  const tell = (news: News, job: string): void => {
    tellHere(news, job)
    say(`${news} ${job}`)
  }

  const scheduledHere = (): void => {
    for (const listener of listeners) listener.onSchedule()
  }

  const scheduled = (): void => {
    scheduledHere()
    say(scheduleWritten)
  }

  const { connect } = db
  if (connect !== undefined) {
    // Nothing is lost with this session, so it commits without waiting for the disk.
    const open = connect({ synchronous_commit: "off" })
    const notifyText = db.keepsSettings ? Store.notifyText : Store.notifyLazilyText
    const notifier = (succeeded: Effect.Effect<void>) =>
      Bounded.scoped(Effect.gen(function*() {
        // Before there is anything to say: what is said first must not wait for a connection.
        const session = yield* open
        ownProcess = session.processId
        let saved = mostAtOnce
        let at = now()
        while (true) {
          yield* pending.await
          // What is marked together is said together, and costs one round.
          yield* Turn.end
          pending.closeUnsafe()
          const round = [...dirty]
          dirty.clear()
          const before = at
          at = now()
          saved = Math.min(mostAtOnce, saved + (at - before) / roundEvery) - 1
          const news = [...told]
          told.clear()
          const payloads = [...round.map(([queue, delay]) => payloadOf(queue, delay)), ...news]
          yield* Bounded.bounded(session.query(notifyText, [channel, payloads]), 5000).pipe(
            // Announced late is better than never.
            Effect.onError(() =>
              Effect.sync(() => {
                for (const [queue, delay] of round) if (!dirty.has(queue)) dirty.set(queue, delay)
                for (const one of news) told.add(one)
                pending.openUnsafe()
              })
            )
          )
          // Not before: a session that connects may still be refused every announcement.
          yield* succeeded
          if (dirty.size + told.size === 0) silent.openUnsafe()
          if (saved < 1) yield* Effect.sleep((1 - saved) * roundEvery)
        }
      }))
    yield* Bounded.fork([forever("the notifier's session", notifier)])
    // A process that enqueues and ends at once has still something to say.
    yield* Effect.addFinalizer(() => Effect.ignore(Bounded.bounded(silent.await, lastWord)))
  } else {
    // Without a session of our own there is nobody to tell the others; they poll.
    yield* Bounded.fork([Effect.forever(Effect.flatMap(pending.await, () =>
      Effect.sync(() => {
        pending.closeUnsafe()
        dirty.clear()
        told.clear()
        silent.openUnsafe()
      })))])
  }

  /** When the next notification that says nothing is heeded. */
  let strangeFrom = -Infinity
  const hearStrange = (): void => {
    const at = now()
    const delay = Math.max(0, strangeFrom - at)
    // One is being waited for already.
    if (delay >= strangeEvery) return
    strangeFrom = at + delay + strangeEvery
    for (const listener of listeners) listener.onDue(undefined, delay)
  }

  const hear = (payload: string): void => {
    if (payload === scheduleWritten) return scheduledHere()
    // Anybody may NOTIFY: whatever does not parse means no more than "look", and no news is believed without a look.
    const news = /^(cancel|end) ([0-9a-f-]{36})$/.exec(payload)
    // Sound: the words of the pattern.
    if (news !== null) return tellHere(news[1] as News, news[2]!)
    const found = /^(\d{1,7}) (.+)$/s.exec(payload)
    if (found === null) return hearStrange()
    for (const listener of listeners) listener.onDue(found[2], Number(found[1]))
  }

  const wanted = Latch.makeUnsafe(false)
  if (connect !== undefined && db.listens) {
    const listener = (succeeded: Effect.Effect<void>) =>
      listenOnce({
        connect: connect(),
        channel,
        // Whatever was announced while nobody listened is found by looking, after LISTEN is confirmed and not before.
        onReady: Effect.andThen(
          succeeded,
          Effect.sync(() => {
            for (const listener of listeners) {
              listener.onDue(undefined, 0)
              listener.onSchedule()
            }
          })
        ),
        onNotification: (notification) => {
          if (notification.processId !== ownProcess) hear(notification.payload)
        }
      }).pipe(
        Effect.tapCause(() =>
          Effect.sync(() => {
            for (const listener of listeners) listener.onLost()
          })
        )
      )
    // The driver hands notifications over by way of the fiber's scheduler.
    yield* Bounded.fork([
      Effect.andThen(wanted.await, forever("the listener's session", listener)).pipe(
        Effect.provideService(Scheduler.Scheduler, Turn.scheduler)
      )
    ])
  }

  const wakeup: Wakeup = {
    mark,
    withInsert,
    tell,
    tellHere,
    scheduled,
    listen: Effect.asVoid(wanted.open),
    subscribe: (listener) =>
      Effect.acquireRelease(
        Effect.sync(() => listeners.add(listener)),
        () => Effect.sync(() => listeners.delete(listener))
      )
  }
  return wakeup
})

/** The longest news of a queue, in bytes; of one with a longer name it is said that there is something to look for. */
const longestNews = 200

const payloadOf = (queue: string, delay: number): string => {
  const payload = `${Math.ceil(delay)} ${queue}`
  return payload.length * 3 <= longestNews || new TextEncoder().encode(payload).length <= longestNews ? payload : "look"
}

/** Listens until the session fails. A half-open link is noticed by a query of its own within 15 s: TCP never tells. */
const listenOnce = (options: {
  readonly connect: Effect.Effect<PgConnection.PgConnection, unknown, Scope.Scope>
  readonly channel: string
  readonly onReady: Effect.Effect<void>
  readonly onNotification: (notification: PgConnection.Notification) => void
}) =>
  Bounded.scoped(Effect.gen(function*() {
    // Pinned first: LISTEN holds the session, and the probe must go through the same pin.
    const session = yield* Effect.flatMap(options.connect, (connection) => connection.pin)
    const notifications = yield* session.listen(options.channel)
    yield* options.onReady
    const probe = Bounded.bounded(session.query(Store.probeText), 5000).pipe(
      // With the wait for an answer a link that is cut is noticed within 15 s.
      Effect.andThen(Effect.sleep("9 seconds")),
      Effect.forever
    )
    const take = Effect.forever(Effect.map(Queue.takeAll(notifications), (all) => {
      for (const notification of all) options.onNotification(notification)
    }))
    return yield* Effect.raceFirst(take, probe)
  }))

/** Runs a background loop again whenever it ends, whatever it ended with. It says itself when it has succeeded. */
const forever = <A, E, R>(what: string, loop: (succeeded: Effect.Effect<void>) => Effect.Effect<A, E, R>) => {
  const episode = Episode.make(what)
  return loop(episode.succeeded).pipe(
    Effect.sandbox,
    Effect.tapError(episode.failed),
    // The schedule never ends, so neither does this: every cause but an interruption of this fiber is tried again.
    Effect.retry(Database.backoff),
    Effect.orDie
  )
}
