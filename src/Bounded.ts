/**
 * Waiting that ends: on a dead link neither a statement nor the close of a connection ever answers.
 *
 * @since 0.1.0
 */
import type * as Clock from "effect/Clock"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Scope from "effect/Scope"

/** The answer did not come in time; whether the statement took effect is unknown. */
export class TimedOut extends Error {
  readonly _tag = "TimedOut"
  override readonly name = "TimedOut"
  override readonly message = "no answer in time"
}

/**
 * Runs an effect, but waits at most `millis` for it.
 *
 * **Details**
 *
 * `Effect.timeout` waits until the interrupted statement has drained, which on a dead link takes seconds to minutes.
 * This one leaves it behind.
 */
export const bounded = <A, E, R>(self: Effect.Effect<A, E, R>, millis: number): Effect.Effect<A, E | TimedOut, R> =>
  Effect.gen(function*() {
    const result = Deferred.makeUnsafe<A, E | TimedOut>()
    const fiber = yield* Effect.forkDetach(Effect.onExit(self, (exit) => Deferred.done(result, exit)), {
      startImmediately: true
    })
    if (Deferred.isDoneUnsafe(result)) return yield* Deferred.await(result)
    const abandon = () => fiber.interruptUnsafe()
    // A fiber of its own, not a race: a race inside an uninterruptible region waits for its loser.
    const timer = yield* Effect.forkDetach(Effect.andThen(
      Effect.sleep(millis),
      Effect.sync(() => {
        Deferred.doneUnsafe(result, Effect.fail(new TimedOut()))
        abandon()
      })
    ))
    return yield* Deferred.await(result).pipe(
      Effect.onInterrupt(() => Effect.sync(abandon)),
      Effect.ensuring(Effect.sync(() => timer.interruptUnsafe()))
    )
  })

/** Whether there is nothing to wait for: most codecs answer at once, and what they return is an exit. */
export const isDone = <A, E, R>(effect: Effect.Effect<A, E, R>): effect is Exit.Success<A, E> =>
  Exit.isExit(effect) && Exit.isSuccess(effect)

/** The monotonic clock of this process, in milliseconds: what every wait goes by. */
export const monotonic = (clock: Clock.Clock): number => Number(clock.monotonicTimeNanosUnsafe()) / 1_000_000

/** How long a close may take before it is left behind, in milliseconds. */
const patience = 500

const close = (scope: Scope.Closeable, exit: Exit.Exit<unknown, unknown>) =>
  Effect.ignoreCause(bounded(Scope.close(scope, exit), patience))

/**
 * Opens something in the current scope, whose close is not waited for longer than half a second.
 *
 * **Details**
 *
 * A pool waits for every borrowed connection without limit, and a statement on a dead link never gives its back.
 */
export const open = <A, E, R>(self: Effect.Effect<A, E, R>): Effect.Effect<A, E, R | Scope.Scope> =>
  Effect.flatMap(Effect.acquireRelease(Scope.make(), close), (scope) => Scope.provide(self, scope))

/**
 * `Effect.scoped` with a close that is not waited for longer than half a second.
 */
export const scoped = <A, E, R>(self: Effect.Effect<A, E, R>): Effect.Effect<A, E, Exclude<R, Scope.Scope>> =>
  Effect.acquireUseRelease(Scope.make(), (scope) => Scope.provide(self, scope), close)

/**
 * Runs loops in the background until the current scope closes: they are interrupted together, and left behind after half
 * a second.
 */
export const fork = <R>(
  loops: ReadonlyArray<Effect.Effect<unknown, never, R>>
): Effect.Effect<void, never, R | Scope.Scope> =>
  Effect.asVoid(Effect.acquireRelease(
    Effect.forEach(loops, (loop) => Effect.forkDetach(loop)),
    (fibers) => Effect.ignoreCause(bounded(Fiber.interruptAll(fibers), patience))
  ))
