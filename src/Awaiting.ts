/**
 * Who waits for the end of a job: woken by the worker that settles it, and looking again every second, because a wake-up is
 * only a hint.
 *
 * @since 0.1.0
 */
import * as Clock from "effect/Clock"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Latch from "effect/Latch"
import * as Schema from "effect/Schema"
import type * as Scope from "effect/Scope"
import * as Bounded from "./Bounded.ts"
import * as Episode from "./Episode.ts"
import type * as Store from "./Store.ts"
import * as Wakeup from "./Wakeup.ts"

/**
 * A job has no result to give, or not yet.
 *
 * **Details**
 *
 * - `Cancelled`: it was cancelled; the message is the reason.
 * - `Discarded`: it failed for good with something else than its typed error, or was discarded on purpose.
 * - `WaitTimedOut`: it had not ended after `wait`. It goes on, and `poll` can look again.
 * - `InTransaction`: inside an open transaction the job would not be visible to any worker; nothing was enqueued.
 * - `Pruned`: there is no such job, or no longer.
 *
 * @category errors
 * @since 0.1.0
 */
export class ExecuteError extends Schema.TaggedError<ExecuteError>()("ExecuteError", {
  /** The job; empty when none was enqueued. */
  id: Schema.String,
  reason: Schema.Literals(["Cancelled", "Discarded", "WaitTimedOut", "InTransaction", "Pruned"]),
  message: Schema.String
}) {}

/**
 * One wait for the end of a job, begun before the job is enqueued: its end may be told before the enqueue is answered.
 */
export interface Wait {
  /**
   * Waits until the job has ended, however long the database is away; `undefined` when it is nowhere. To be run once the job
   * is there; `now`: it may have ended long ago.
   */
  readonly ended: (now: boolean) => Effect.Effect<Store.EndRow | undefined>
}

/**
 * The waiting of one process.
 */
export interface Awaiting {
  /** Begins to listen for the end of a job, until the scope closes. */
  readonly open: (id: string) => Effect.Effect<Wait, never, Scope.Scope>
}

/** How often to look, whatever is heard, in milliseconds. */
const interval = 1000

/** How many jobs to look for in one statement. */
const most = 1000

/** A query on a dead link never answers. */
const lookBound = 15_000

interface Waiter {
  readonly end: Deferred.Deferred<Store.EndRow | undefined>
  /** The job is there: not to find it means something. */
  armed: boolean
  /** It has been told that the job has ended. */
  told: boolean
}

/**
 * Starts the waiting of one queue in the current scope. Nothing is asked of the database while nobody waits.
 */
export const make = Effect.fnUntraced(function*(store: Store.Store, wakeup: Wakeup.Wakeup) {
  const clock = yield* Clock.Clock
  const now = () => Bounded.monotonic(clock)
  const waiting = new Map<string, Set<Waiter>>()
  const urgent = new Set<string>()
  const some = Latch.makeUnsafe(false)
  const poke = Latch.makeUnsafe(false)
  const episode = Episode.make("waiting for the end of jobs")
  let polledAt = -Infinity
  let closed = false

  const hurry = (id: string): void => {
    urgent.add(id)
    poke.openUnsafe()
  }
  yield* wakeup.subscribe({
    ...Wakeup.deaf,
    onEnd: (id) => {
      for (const waiter of waiting.get(id) ?? []) {
        waiter.told = true
        if (waiter.armed) hurry(id)
      }
    },
    // The session that listens is back: what was told meanwhile was not heard.
    onDue: (queue) => {
      if (queue === undefined) waiting.forEach((_, id) => hurry(id))
    }
  })

  const look = Effect.fnUntraced(function*(ids: ReadonlyArray<string>) {
    const armed = ids.flatMap((id) =>
      [...waiting.get(id) ?? []].filter((waiter) => waiter.armed).map((waiter) => ({ id, waiter }))
    )
    if (armed.length === 0) return
    const asked = [...new Set(armed.map(({ id }) => id))]
    const found = new Map((yield* Bounded.bounded(store.ends(asked, false), lookBound)).map((row) => [row.id, row]))
    for (const { id, waiter } of armed) {
      const row = found.get(id)
      if (row?.status !== "open") Deferred.doneUnsafe(waiter.end, Effect.succeed(row))
    }
    yield* episode.succeeded
  })

  const loop = episode.forever(Effect.gen(function*() {
    yield* some.await
    if (urgent.size === 0) yield* Effect.timeoutOption(poke.await, Math.max(1, polledAt + interval - now()))
    poke.closeUnsafe()
    const polls = now() - polledAt >= interval
    if (polls) polledAt = now()
    const ids = polls ? [...waiting.keys()] : [...urgent]
    urgent.clear()
    for (let start = 0; start < ids.length; start += most) yield* look(ids.slice(start, start + most))
  }))
  yield* Effect.withTracerEnabled(Bounded.fork([loop]), false)
  // Nobody must wait for an answer that will not come.
  yield* Effect.addFinalizer(() =>
    Effect.sync(() => {
      closed = true
      for (const waiters of waiting.values()) {
        for (const { end } of waiters) Deferred.doneUnsafe(end, Effect.interrupt)
      }
    })
  )

  const enter = (id: string): Waiter => {
    const waiter: Waiter = { end: Deferred.makeUnsafe(), armed: false, told: false }
    if (waiting.size === 0) polledAt = now()
    const others = waiting.get(id)
    if (others === undefined) waiting.set(id, new Set([waiter]))
    else others.add(waiter)
    some.openUnsafe()
    if (closed) Deferred.doneUnsafe(waiter.end, Effect.interrupt)
    return waiter
  }
  const leave = (id: string, waiter: Waiter): void => {
    const waiters = waiting.get(id)
    waiters?.delete(waiter)
    if (waiters?.size === 0) waiting.delete(id)
    if (waiting.size === 0) some.closeUnsafe()
  }

  const awaiting: Awaiting = {
    open: (id) =>
      Effect.acquireRelease(
        Effect.map(wakeup.listen, () => enter(id)),
        (waiter) => Effect.sync(() => leave(id, waiter))
      ).pipe(
        Effect.map((waiter): Wait => ({
          ended: (now) =>
            Effect.suspend(() => {
              waiter.armed = true
              if (now || waiter.told) hurry(id)
              return Deferred.await(waiter.end)
            })
        }))
      )
  }
  return awaiting
})
