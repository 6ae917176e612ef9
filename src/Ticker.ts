/**
 * The loop of a scheduler: looks which schedules are due, works out their ticks, and has them enqueued. Any number of
 * processes run it at once, and none of them leads.
 *
 * @since 0.1.0
 */
import * as Clock from "effect/Clock"
import * as Effect from "effect/Effect"
import * as Latch from "effect/Latch"
import * as Metric from "effect/Metric"
import * as Random from "effect/Random"
import * as Result from "effect/Result"
import * as Bounded from "./Bounded.ts"
import * as Episode from "./Episode.ts"
import * as HeldUp from "./HeldUp.ts"
import * as Missed from "./Missed.ts"
import * as Report from "./Report.ts"
import type * as Schedules from "./Schedules.ts"
import type * as Store from "./Store.ts"
import * as Telemetry from "./Telemetry.ts"
import * as Ticks from "./Ticks.ts"
import * as Wakeup from "./Wakeup.ts"

/** How many schedules are read, worked out and written at once: some 20 ms of computing. */
const page = 500

/** How many ticks are enqueued in one statement, which has to answer in time after any outage; or those of one schedule. */
const mostTicks = 2000

/** A statement on a dead link never answers. */
const bound = 15_000

/** How long to wait, in milliseconds, when all that is due is in somebody's hands: at first, and at most. */
const elsewhere = { first: 50, most: 1000 }

/** How many expressions are kept as they were read. */
const mostKept = 20_000

/** How often, in milliseconds, a scheduler says which schedules it declares, and after how long without that one is marked. */
const declarations = { every: 300_000, missedAfter: 900_000 }

/** Reads stored expressions, and keeps what it has read. */
const reader = () => {
  const kept = new Map<string, Result.Result<Ticks.Ticks, string>>()
  return (spec: string, timeZone: string, now: number): Result.Result<Ticks.Ticks, string> => {
    const key = `${timeZone} ${spec}`
    const known = kept.get(key)
    if (known !== undefined) return known
    const read = Ticks.parse(spec, timeZone, now)
    if (kept.size >= mostKept) kept.clear()
    kept.set(key, read)
    return read
  }
}

/**
 * Makes the loops of a scheduler, each to be run until it is interrupted.
 */
export const make = Effect.fnUntraced(function*(options: {
  readonly store: Store.Store
  readonly wakeup: Wakeup.Wakeup
  /** Milliseconds. */
  readonly pollInterval: number
}) {
  const { store, wakeup } = options
  const clock = yield* Clock.Clock
  const read = reader()
  const poke = Latch.makeUnsafe(false)
  /** The jobs that ticks wait for. */
  let awaited: ReadonlySet<string> = new Set()
  yield* wakeup.subscribe({
    ...Wakeup.deaf,
    onSchedule: () => void poke.openUnsafe(),
    onEnd: (job) => {
      if (awaited.has(job)) poke.openUnsafe()
    }
  })

  const disable = Effect.fnUntraced(function*(name: string, updatedAt: string | undefined, problem: string) {
    // Said by who has done it, once: it may be locked, and is then looked at again and again.
    if (yield* Bounded.bounded(store.schedules.disable(name, updatedAt, problem), bound)) {
      yield* Report.error(`the schedule "${name}" has stopped: ${problem}`)
    }
  })

  const heldUp = HeldUp.make({ now: () => Bounded.monotonic(clock), onLeft: () => void poke.openUnsafe() })
  const expireKeys = (some: ReadonlyArray<{ readonly name: string }>) =>
    Bounded.bounded(store.schedules.expireKeys(some.map(({ name }) => name)), bound)

  /** What to do with a row; or why nothing can be, also when somebody has written what no calendar knows. */
  const planOf = (row: Schedules.DueRow): Result.Result<Missed.Plan, string> =>
    Result.flatMap(read(row.spec, row.time_zone, row.now), (ticks) =>
      Result.try({
        try: () => Missed.plan(ticks, { ...row, missedWindow: row.missed_window_ms }),
        catch: (error) => `its next tick cannot be computed: ${String(error)}`
      }))

  interface Planned extends Schedules.Advance {
    readonly name: string
    readonly missed: boolean
  }

  /** Has schedules written, and returns how many of them were this process's to fire. */
  const write = Effect.fnUntraced(function*(all: ReadonlyArray<Planned>, patience?: number) {
    let fired = 0
    for (let begin = 0; begin < all.length;) {
      let [end, ticks] = [begin + 1, all[begin]!.ticks.length]
      while (end < all.length && (ticks += all[end]!.ticks.length) <= mostTicks) end++
      fired += yield* writeTogether(all.slice(begin, end), patience)
      begin = end
    }
    return fired
  })

  const writeTogether = Effect.fnUntraced(function*(some: ReadonlyArray<Planned>, patience?: number) {
    const planned = new Map(some.map((one) => [one.name, one]))
    const written = yield* heldUp.inParts(
      some,
      store.schedules.fire,
      ({ name, row }, problem) => disable(name, row.updated_at, problem),
      patience
    )
    for (const one of written) {
      const { missed, row, ticks } = planned.get(one.name)!
      if (row.due !== null) yield* Metric.update(Telemetry.tickLateness, Math.max(0, row.now - row.due))
      if (missed) {
        yield* Report.info(
          `the schedule "${one.name}" is late; ${ticks.length} missed ticks are made up`
        )
      }
      yield* Metric.update(Telemetry.enqueuedTicks, one.enqueued)
      if (one.enqueued > 0) wakeup.mark(one.queue, one.delay)
      if (one.skipped > 0) {
        yield* Metric.update(Telemetry.skippedTicks, one.skipped)
        yield* Report.debug(`${one.skipped} ticks of the schedule "${one.name}" are skipped`)
      }
    }
    return written.length
  })

  const keyed = heldUp.beside<Planned>(
    "firing schedules with a unique key",
    (some, patience) => Effect.andThen(expireKeys(some), write(some, patience))
  )
  const following = heldUp.beside<Schedules.Look["waiting"][number]>(
    "enqueueing ticks that waited",
    (some, patience) =>
      expireKeys(some).pipe(
        Effect.andThen(
          heldUp.inParts(
            some,
            store.schedules.follow,
            ({ name }, problem) => disable(name, undefined, problem),
            patience
          )
        ),
        Effect.map((queues) => {
          for (const queue of queues) wakeup.mark(queue, 0)
        })
      )
  )

  /** Works out one row: what is to be written of it, if anything. */
  const worked = Effect.fnUntraced(function*(row: Schedules.DueRow) {
    const found = planOf(row)
    if (Result.isFailure(found)) {
      yield* disable(row.name, row.updated_at, found.failure)
      return undefined
    }
    const { missed, next, previous, ticks } = found.success
    if (next === undefined && ticks.length === 0) {
      yield* disable(row.name, row.updated_at, Ticks.over)
      return undefined
    }
    return { name: row.name, row, ticks, previous, next, missed }
  })

  // A thousand missed ticks of each of many schedules are minutes of work, of this process and of the database.
  const late = heldUp.beside<Schedules.DueRow>("making up missed ticks", (some) =>
    Effect.gen(function*() {
      let part: Array<Planned> = []
      let ticks = 0
      for (const row of some) {
        const planned = yield* worked(row)
        // Each is some 30 ms of computing: others are to have their turn.
        yield* Effect.yieldNow
        if (planned === undefined) continue
        if (row.keyed) keyed.add(planned)
        else {
          part.push(planned)
          ticks += planned.ticks.length
        }
        if (ticks >= mostTicks) {
          yield* write(part)
          part = []
          ticks = 0
        }
      }
      yield* write(part)
    }))

  /** Works out one page and has it written. Returns how many of them were this process's; of those with a key, were new to it. */
  const advance = Effect.fnUntraced(function*(rows: ReadonlyArray<Schedules.DueRow>) {
    const plain: Array<Planned> = []
    let added = 0
    for (const row of rows) {
      if (late.has(row.name) || (row.keyed && keyed.has(row.name))) continue
      if (row.missed > 1 && Missed.isLate(row)) {
        late.add(row)
        added++
        continue
      }
      const planned = yield* worked(row)
      if (planned === undefined) continue
      if (row.keyed) {
        keyed.add(planned)
        added++
      } else plain.push(planned)
    }
    return added + (yield* write(plain))
  })

  /** How long to wait when what is due is still in somebody's hands. */
  let patience = elsewhere.first
  const round = Effect.gen(function*() {
    poke.closeUnsafe()
    const look = yield* Bounded.bounded(store.schedules.look(), bound)
    awaited = new Set(look.waiting.flatMap(({ free, job }) => free || job === null ? [] : [job]))
    for (const one of look.waiting) if (one.free && !following.has(one.name)) following.add(one)
    const wait = look.wait ?? Infinity
    if (!look.unset && !look.due) {
      patience = elsewhere.first
      return wait
    }
    let after: Schedules.DueRow | undefined
    let all = 0
    while (true) {
      const rows = yield* Bounded.bounded(store.schedules.due(page, after), bound)
      const fired = yield* advance(rows)
      all += fired
      if (rows.length < page) {
        // What is due and not this process's to fire is somebody's who has it in his hands: another scheduler for a moment,
        // or a stranger for as long as he likes.
        const pause = all > 0 ? 0 : Math.min(patience, wait)
        patience = all > 0 ? elsewhere.first : Math.min(elsewhere.most, 2 * patience)
        return pause
      }
      after = rows[rows.length - 1]
      // Another process is at the same rows: let it get ahead, so that each is worked out once.
      if (fired < rows.length / 2) yield* Effect.flatMap(Random.nextBetween(5, 50), (pause) => Effect.sleep(pause))
    }
  })

  const firing = Episode.make("the scheduler")
  const fires = firing.forever(Effect.gen(function*() {
    const wait = yield* round
    yield* firing.succeeded
    // The database's clock may be moved, and others may write schedules: no wait is longer than the interval.
    const pause = Math.min(options.pollInterval, Math.max(1, Math.ceil(wait)))
    yield* Effect.timeoutOption(poke.await, pause)
  }))

  return [fires, keyed.loop, following.loop, late.loop]
})

/**
 * Says from time to time which schedules a process declares, until it is interrupted, and marks those that nobody declares any
 * more.
 */
export const declaring = (
  store: Store.Store,
  declared: ReadonlyArray<string>
): Effect.Effect<never> => {
  const marking = Episode.make("saying which schedules are declared")
  const declare = Bounded.bounded(store.schedules.declare(declared, declarations.every / 2), bound)
  const undeclare = Effect.gen(function*() {
    const names = yield* Bounded.bounded(store.schedules.undeclare(declarations.missedAfter), bound)
    if (names.length > 0) {
      yield* Report.warning(
        `no running scheduler declares ${names.map((name) => `"${name}"`).join(", ")} any more; ${
          names.length === 1 ? "it goes" : "they go"
        } on until somebody removes ${names.length === 1 ? "it" : "them"}`
      )
    }
  })
  return marking.forever(
    Effect.gen(function*() {
      // Only who has been there for so long can tell that nobody has declared something meanwhile.
      let rounds = 0
      while (true) {
        yield* declare
        if (rounds * declarations.every > declarations.missedAfter) yield* undeclare
        yield* marking.succeeded
        rounds++
        yield* Effect.flatMap(Random.nextBetween(0.9, 1.1), (jitter) => Effect.sleep(declarations.every * jitter))
      }
    }),
    1000
  )
}
