/**
 * Who waits for the end of a job: woken by the worker that settles it, and looking again every second, because a wake-up is
 * only a hint.
 *
 * @since 0.1.0
 */
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Latch from "effect/Latch"
import * as Schema from "effect/Schema"
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
 * The waiting of one process.
 */
export interface Awaiting {
  /**
   * Waits until a job has ended, however long the database is away; `undefined` when it is nowhere. `now`: it may have ended
   * already.
   */
  readonly ended: (id: string, now: boolean) => Effect.Effect<Store.EndRow | undefined>
}

/** How often to look, whatever is heard, in milliseconds. */
const interval = 1000

/** How many jobs to look for in one statement. */
const most = 1000

/** A query on a dead link never answers. */
const lookBound = 15_000

/**
 * Starts the waiting of one queue in the current scope. Nothing is asked of the database while nobody waits.
 */
export const make = Effect.fnUntraced(function*(store: Store.Store, wakeup: Wakeup.Wakeup) {
  type Waiter = Deferred.Deferred<Store.EndRow | undefined>
  const waiting = new Map<string, Set<Waiter>>()
  const urgent = new Set<string>()
  const poke = Latch.makeUnsafe(false)
  const episode = Episode.make("waiting for the end of jobs")

  const hurry = (ids: Iterable<string>): void => {
    for (const id of ids) urgent.add(id)
    poke.openUnsafe()
  }
  yield* wakeup.subscribe({
    ...Wakeup.deaf,
    onEnd: (id) => {
      if (waiting.has(id)) hurry([id])
    },
    // The session that listens is back: what was told meanwhile was not heard.
    onDue: (queue) => {
      if (queue === undefined) hurry(waiting.keys())
    }
  })

  const look = Effect.fnUntraced(function*(ids: ReadonlyArray<string>) {
    const found = new Map((yield* Bounded.bounded(store.ends(ids), lookBound)).map((row) => [row.id, row]))
    for (const id of ids) {
      const row = found.get(id)
      if (row?.status === "open") continue
      for (const waiter of waiting.get(id) ?? []) Deferred.doneUnsafe(waiter, Effect.succeed(row))
      waiting.delete(id)
    }
    yield* episode.succeeded
  })

  const loop = Effect.gen(function*() {
    // Only while somebody waits is there anything to look for by the clock.
    if (waiting.size === 0) yield* poke.await
    else if (urgent.size === 0) yield* Effect.timeoutOption(poke.await, interval)
    poke.closeUnsafe()
    const ids = urgent.size > 0 ? [...urgent] : [...waiting.keys()]
    urgent.clear()
    for (let start = 0; start < ids.length; start += most) yield* look(ids.slice(start, start + most))
  }).pipe(
    Effect.catchCause((cause) => Effect.andThen(episode.failed(cause), Effect.sleep("200 millis"))),
    Effect.forever
  )
  yield* Effect.withTracerEnabled(Bounded.fork([loop]), false)

  const awaiting: Awaiting = {
    ended: (id, now) =>
      Effect.suspend(() => {
        const waiter: Waiter = Deferred.makeUnsafe()
        const others = waiting.get(id)
        if (others === undefined) waiting.set(id, new Set([waiter]))
        else others.add(waiter)
        if (now) urgent.add(id)
        poke.openUnsafe()
        return Effect.ensuring(
          Effect.andThen(wakeup.listen, Deferred.await(waiter)),
          Effect.sync(() => {
            const all = waiting.get(id)
            all?.delete(waiter)
            if (all?.size === 0) waiting.delete(id)
          })
        )
      })
  }
  return awaiting
})
