/**
 * How long this process has been in touch with the database, and where it expects the database's clock to be: what it needs
 * to know to judge others. A clock that was moved makes everybody look dead.
 *
 * @since 0.1.0
 */
import * as Clock from "effect/Clock"
import * as Effect from "effect/Effect"
import * as Bounded from "./Bounded.ts"
import * as Episode from "./Episode.ts"
import * as Report from "./Report.ts"
import type * as Store from "./Store.ts"

/** How far the database's clock may be from where it is expected, in milliseconds, for anybody to be declared dead. */
export const clockTolerance = 5000

/**
 * What gives a process the right to judge others.
 */
export interface Standing {
  /** Where the database's clock should be, in milliseconds since the epoch. */
  readonly clock: number
  /** For how long it has been in touch without a gap and the clock has not been moved, in milliseconds. */
  readonly watched: number
  /** By how much the clock may have been moved meanwhile all the same, in milliseconds: in steps too small to be reported. */
  readonly doubt: number
}

/**
 * What the answers of the database say about its clock.
 */
export interface Contact {
  /**
   * Takes note of an answer: when it was asked for and when it came, by this process's monotonic clock, and the database's
   * clock in between. Returns by how many milliseconds that clock was moved since the last one; 0 when it was not.
   */
  readonly heard: (sent: number, received: number, clock: number) => number
  /** Where the database's clock should be now. */
  readonly expected: (now: number) => number
  /** The sum of the smaller steps of the last while: by so much everybody may look more silent than he is. */
  readonly doubt: (now: number) => number
}

/** Less than this, in milliseconds, is the drift of two clocks. */
const smallestStep = 50
/** For how long a small step counts, in milliseconds: who beats more rarely has a lease that it does not matter to. */
const memory = 600_000

/**
 * Begins to compare the database's clock with the monotonic one of this process.
 *
 * **Details**
 *
 * An answer says where the difference of the two lies: between what it was when it was sent and when it was received. Two
 * of these that overlap may be the same difference; clocks that drift apart by a few milliseconds an hour are followed.
 */
export const make = (): Contact => {
  let low = -Infinity
  let high = Infinity
  let doubt = 0
  let doubtUntil = -Infinity
  const doubtAt = (now: number) => now < doubtUntil ? doubt : 0
  return {
    heard: (sent, received, clock) => {
      const [from, to] = [clock - received, clock - sent]
      const moved = from > high ? from - high : to < low ? to - low : 0
      const apart = moved !== 0
      low = apart ? from : Math.max(low, from)
      high = apart ? to : Math.min(high, to)
      const by = Math.abs(moved)
      if (by > clockTolerance) return moved
      if (by > smallestStep) {
        doubt = Math.min(clockTolerance, doubtAt(received) + by)
        doubtUntil = received + memory
      }
      return 0
    },
    expected: (now) => now + (low + high) / 2,
    doubt: doubtAt
  }
}

/** Says that the clock was moved. */
export const reportMove = (moved: number, wait: number): Effect.Effect<void> =>
  Report.warning(
    `the database's clock was moved by ${(moved / 1000).toFixed(1)} s; this process declares nobody dead for ${
      Math.round(wait / 1000)
    } s`
  )

/**
 * Stays in touch with the database for a process without a worker: asks for its clock every `every` milliseconds. `standing`
 * is there after unbroken contact for `lease` milliseconds.
 */
export const watch = Effect.fnUntraced(function*(options: {
  readonly store: Store.Store
  readonly lease: number
  readonly every: number
}) {
  const monotonic = yield* Clock.Clock
  const now = () => Bounded.monotonic(monotonic)
  const contact = make()
  const episode = Episode.make("contact with the database")
  let since = Infinity
  let last = -Infinity
  // Asked in time or not at all: an answer that came late says nothing of the time before.
  const inTime = () => now() - last < options.lease / 2

  const ask = Effect.gen(function*() {
    const sent = now()
    const clock = yield* Bounded.bounded(options.store.clock(false), options.lease / 3)
    if (!inTime()) since = sent
    last = sent
    const moved = contact.heard(sent, now(), Number(clock) / 1000)
    if (moved !== 0) {
      since = sent
      yield* reportMove(moved, options.lease)
    }
    yield* episode.succeeded
  }).pipe(Effect.catchCause((cause) => {
    since = Infinity
    last = -Infinity
    return episode.failed(cause)
  }))

  return {
    standing: (): Standing | undefined =>
      inTime() && now() - since >= options.lease
        ? { clock: contact.expected(now()), watched: now() - since, doubt: contact.doubt(now()) }
        : undefined,
    run: Effect.forever(Effect.andThen(ask, Effect.sleep(options.every)))
  }
})
