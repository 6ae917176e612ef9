/**
 * When a worker looks at its queues again: at once when it is woken, when the next job it knows of is due, and by
 * itself from time to time. Polling is the truth: one small query for all queues of the process.
 *
 * @since 0.1.0
 */
import * as Clock from "effect/Clock"
import * as Effect from "effect/Effect"
import * as Latch from "effect/Latch"
import * as Bounded from "./Bounded.ts"
import * as Episode from "./Episode.ts"
import * as Line from "./Line.ts"
import * as Store from "./Store.ts"

/** A queue that has just run dry is looked at once more after this many milliseconds, for what is due later. */
const settleDown = 20

/** A query on a dead link never answers. */
const lookBound = 15_000

/**
 * The timekeeper of one worker. Times are milliseconds of the monotonic clock.
 */
export interface Timekeeper {
  /** Something may be due in a queue in `delay` milliseconds; in every queue when none is named. */
  readonly due: (queue: string | undefined, delay: number) => void
  /** A claim of a queue found less than it asked for, whether it read from the front or not. */
  readonly fellShort: (queue: string) => void
  /** The last claim of a queue, from the front and sent at `sentAt`, found less than it asked for: it is worth a look. */
  readonly ranDry: (queue: string, sentAt: number) => void
  /** Something has changed that a tick depends on. */
  readonly poke: () => void
  /** A queue is being claimed from. */
  readonly busy: (queue: string) => void
  /** A job of a queue has ended, and a slot is free. */
  readonly freed: (queue: string) => void
  /** Whether every queue has run dry and has been looked at since. */
  readonly allDry: () => boolean
  /** Keeps time until it is interrupted. */
  readonly run: Effect.Effect<never>
}

/**
 * Makes the timekeeper of a worker.
 */
export const make = Effect.fnUntraced(function*(options: {
  readonly store: Store.Store
  readonly lines: ReadonlyArray<Line.Line>
  /** Milliseconds. */
  readonly pollInterval: number
  /** A queue may have something due. */
  readonly onDue: (queue: string) => void
  /** A look at the clock: the time to hand back what is stuck. Returns when to call again. */
  readonly onTick: (now: number) => number
}) {
  const clock = yield* Clock.Clock
  const now = () => Bounded.monotonic(clock)
  const names = options.lines.map((line) => line.queue)
  /** When the next job of a queue is due, as far as is known. */
  const dueAt = new Map<string, number>()
  /** Since when a queue is dry, and when the claim was sent that found it so. */
  const dry = new Map<string, { readonly since: number; readonly sentAt: number }>()
  /** Queues of which the last claim fell short. */
  const short = new Set<string>()
  const episode = Episode.make("looking for jobs")
  let lookedAt = -Infinity
  /** How much longer a look may be under way than the claim before it was, and miss nothing. */
  let margin = settleDown
  const poke = Latch.makeUnsafe(false)

  const dueIn = (queue: string, delay: number): void => {
    const at = now() + delay
    if (at < (dueAt.get(queue) ?? Infinity)) {
      dueAt.set(queue, at)
      poke.openUnsafe()
    }
  }

  const look = Effect.gen(function*() {
    const at = now()
    const polls = at - lookedAt >= options.pollInterval
    if (!polls && ![...dry.values()].some(({ since }) => since > lookedAt && at - since >= settleDown)) return
    lookedAt = at
    // A poll asks for whatever is due. After a queue has run dry only what became due since that claim was sent is news:
    // the rest is not for this worker, and claiming again for it would be a busy loop.
    // The look is under way for a while, too, and what becomes due between the two moments at which claim and look reach
    // the server must not fall through.
    const news = names.map((name) => polls ? Store.everything : at - (dry.get(name)?.sentAt ?? at) + margin)
    const looked = yield* Bounded.bounded(options.store.look(names, Line.everyLane, news), lookBound)
    const took = now() - at
    // It came later than was allowed for: nobody knows what it has missed.
    const doubtful = !polls && took > margin
    for (const { due, queue, wait } of looked) {
      if (wait !== null) dueIn(queue, Math.max(0, wait))
      if (due || (doubtful && dry.has(queue))) options.onDue(queue)
    }
    // On a slow link every look is late, and must not lead to a claim each time.
    margin = Math.max(settleDown, 2 * took)
    yield* episode.succeeded
  })

  const tick = Effect.gen(function*() {
    const at = now()
    for (const [queue, due] of dueAt) {
      if (due <= at) {
        dueAt.delete(queue)
        options.onDue(queue)
      }
    }
    yield* look
    poke.closeUnsafe()
    const next = Math.min(
      options.onTick(now()),
      lookedAt + options.pollInterval,
      ...dueAt.values(),
      ...[...dry.values()].filter(({ since }) => since > lookedAt).map(({ since }) => since + settleDown)
    )
    yield* Effect.timeoutOption(poke.await, Math.max(1, Math.ceil(next - now())))
  })

  const timekeeper: Timekeeper = {
    due: (queue, delay) => {
      for (const name of names) {
        if (queue !== undefined && queue !== name) continue
        if (delay > 0) dueIn(name, delay)
        else options.onDue(name)
      }
    },
    fellShort: (queue) => void short.add(queue),
    ranDry: (queue, sentAt) => {
      dry.set(queue, { since: now(), sentAt })
      poke.openUnsafe()
    },
    poke: () => void poke.openUnsafe(),
    busy: (queue) => {
      dry.delete(queue)
      short.delete(queue)
    },
    freed: (queue) => {
      // Where nothing more was due a moment ago there is no haste: the settlement of the job that has ended goes first, on a
      // machine where a claim would compete with it.
      if (short.has(queue)) dueIn(queue, settleDown)
      else options.onDue(queue)
    },
    // A job that has just ended may have brought in others that nobody has told of: its queue is to be claimed from first.
    allDry: () =>
      dry.size === names.length && lookedAt > Math.max(...[...dry.values()].map(({ since }) => since)) &&
      ![...dueAt.values()].some((at) => at <= now() + settleDown),
    run: episode.forever(tick)
  }
  return timekeeper
})
