/**
 * What strangers can hold up, or what takes long: written in parts, and beside the loop of a scheduler, so that nobody else
 * waits for it.
 *
 * @since 0.1.0
 */
import * as Effect from "effect/Effect"
import * as Latch from "effect/Latch"
import type { SqlError } from "effect/sql/SqlError"
import * as Bounded from "./Bounded.ts"
import * as Database from "./Database.ts"
import * as Episode from "./Episode.ts"
import * as Refusals from "./Refusals.ts"
import * as Report from "./Report.ts"

/** How many are written at once. */
const page = 500

/** How long a schedule is let alone whose tick the database refuses, in milliseconds: those that are due with it go first. */
const refusedFor = 10_000
/** The same for those that could not be told from it. */
const suspectedFor = 1000

/** A statement on a dead link never answers. */
const bound = 15_000

/** How long, in milliseconds, a schedule is let alone whose key a stranger's transaction has taken. */
const letAlone = 2000
/** How often those that are written together are halved to find whose key that is, before they go one by one. */
const mostSplits = 10
/** How long each of these waits for it, in milliseconds: strangers may have taken hundreds. */
const hasty = 20

/** Writes some in one statement, which waits for a stranger's transaction so many milliseconds. */
type Write<A, B> = (some: ReadonlyArray<A>, patience?: number) => Effect.Effect<ReadonlyArray<B>, SqlError>
/** What becomes of one whose values the database cannot store. */
type OnFault<A> = (one: A, problem: string) => Effect.Effect<void, SqlError | Bounded.TimedOut>

/**
 * What is written beside the loop.
 */
export interface Beside<A> {
  /** Writes until it is interrupted. */
  readonly loop: Effect.Effect<never>
  /** Whether this one is about to be written, or is let alone for a while. */
  readonly has: (name: string) => boolean
  readonly add: (one: A) => void
}

/**
 * The ways of writing what can be held up.
 */
export interface HeldUp {
  /**
   * Writes schedules, together if possible: one that cannot be written stops, one that the database refuses for another
   * reason, or whose key or id somebody has locked, is left for later, and none of them keeps the others from it. When many are
   * locked, the rest go one by one, later.
   */
  readonly inParts: <A extends { readonly name: string }, B>(
    all: ReadonlyArray<A>,
    write: Write<A, B>,
    onFault: OnFault<A>,
    patience?: number
  ) => Effect.Effect<ReadonlyArray<B>, SqlError | Bounded.TimedOut>
  /**
   * Makes a loop for what goes beside, a page at a time. Those that were held up go one by one, when no other is there, so that
   * the others neither wait for them nor need be taken apart again.
   */
  readonly beside: <A extends { readonly name: string }>(
    what: string,
    write: (some: ReadonlyArray<A>, patience?: number) => Effect.Effect<void, SqlError | Bounded.TimedOut>
  ) => Beside<A>
}

/**
 * Makes them for one scheduler.
 */
export const make = ({ now, onLeft }: {
  /** Milliseconds of the monotonic clock. */
  readonly now: () => number
  /** What could not be written is still due. */
  readonly onLeft: () => void
}): HeldUp => {
  /** Schedules whose key a stranger's transaction has taken, or may have, and until when they are let alone. */
  const held = new Map<string, number>()
  const isHeld = (name: string) => (held.get(name) ?? 0) > now()
  /** Schedules whose ticks the database refuses, by somebody's trigger for instance, and until when they are let alone. */
  const refused = new Map<string, number>()
  const isRefused = (name: string) => (refused.get(name) ?? 0) > now()
  /** When it was last said that one is refused. */
  let complained = -Infinity
  const refuse = (some: ReadonlyArray<{ readonly name: string }>, error: unknown) =>
    Effect.suspend(() => {
      for (const { name } of some) refused.set(name, now() + (some.length > 1 ? suspectedFor : refusedFor))
      if (now() - complained < refusedFor) return Effect.succeed([])
      complained = now()
      return Effect.as(
        Report.error(`the database refuses ticks of the schedule "${some[0]!.name}" (${Database.describe(error)})`),
        []
      )
    })

  const parts = <A extends { readonly name: string }, B>(
    all: ReadonlyArray<A>,
    write: Write<A, B>,
    onFault: OnFault<A>,
    splits: { left: number; patience: number | undefined; readonly refusals: Refusals.Refusals }
  ): Effect.Effect<ReadonlyArray<B>, SqlError | Bounded.TimedOut> =>
    all.length === 0 ? Effect.succeed([]) : Effect.catchIf(
      Effect.tap(
        Bounded.bounded(write(all, splits.patience), bound),
        () => Effect.sync(() => Refusals.passed(splits.refusals))
      ),
      (error: SqlError | Bounded.TimedOut) => Database.isRefusal(error) || Database.isLockTimeout(error),
      (error) => {
        const locked = Database.isLockTimeout(error)
        if (!locked && !Refusals.isOfOne(splits.refusals)) return refuse(all, error)
        if (all.length > 1 && (!locked || splits.left > 0)) {
          if (locked) {
            splits.left--
            splits.patience = hasty
          }
          const [some, others] = locked ? Refusals.halved(all) : Refusals.halves(splits.refusals, all)
          return Effect.zipWith(
            parts(some, write, onFault, splits),
            parts(others, write, onFault, splits),
            (left, right) => [...left, ...right]
          )
        }
        if (!locked) {
          return Database.isUnstorable(error)
            ? Effect.as(onFault(all[0]!, Database.describe(error)), [])
            : refuse(all, error)
        }
        const until = now() + (all.length > 1 ? 0 : letAlone)
        for (const { name } of all) held.set(name, until)
        return Effect.succeed([])
      }
    )

  const beside = <A extends { readonly name: string }>(
    what: string,
    write: (some: ReadonlyArray<A>, patience?: number) => Effect.Effect<void, SqlError | Bounded.TimedOut>
  ): Beside<A> => {
    const all = new Map<string, A>()
    const there = Latch.makeUnsafe(false)
    const episode = Episode.make(what)
    const loop = episode.forever(
      Effect.gen(function*() {
        yield* there.await
        there.closeUnsafe()
        while (all.size > 0) {
          const free = [...all.values()].filter(({ name }) => !held.has(name)).slice(0, page)
          if (free.length > 0) {
            yield* write(free)
            for (const { name } of free) if (!held.has(name) || isHeld(name)) all.delete(name)
            continue
          }
          const [one] = all.values()
          if (!isHeld(one!.name)) {
            held.delete(one!.name)
            yield* write([one!], hasty)
          }
          all.delete(one!.name)
        }
        yield* episode.succeeded
      }).pipe(
        Effect.ensuring(Effect.sync(() => {
          // What could not be written is still due.
          all.clear()
          onLeft()
        }))
      )
    )
    return {
      loop,
      has: (name: string) => all.has(name) || isHeld(name) || isRefused(name),
      add: (one: A) => {
        all.set(one.name, one)
        there.openUnsafe()
      }
    }
  }

  return {
    inParts: (all, write, onFault, patience) =>
      parts(all, write, onFault, { left: mostSplits, patience, refusals: Refusals.make() }),
    beside
  }
}
