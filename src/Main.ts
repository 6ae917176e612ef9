/**
 * The end of a process that works, as its signals ask for it.
 *
 * @since 0.1.0
 */
import * as Cause from "effect/Cause"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import type * as Fiber from "effect/Fiber"
import * as Latch from "effect/Latch"
import * as Runtime from "effect/Runtime"

/**
 * What the workers of a process and its runner know of each other.
 */
export interface Stop {
  /** Open when nothing is to be waited for any more. */
  readonly urgent: Latch.Latch
  /**
   * Open when the process was told to end, all workers have ended, and something may keep it for ever: handlers of theirs that
   * have not stopped, or statements without an answer.
   */
  readonly stuck: Latch.Latch
  /** Whether handlers of workers that have ended have still not stopped. */
  readonly isStuck: () => boolean
  /** Whether they have left a statement behind that has no answer. */
  readonly isSilent: () => boolean
  /** The process was told to end. A worker alone may end, or fail, and whatever else there is goes on. */
  readonly end: () => void
  /**
   * A worker begins. The returned function is for its end: the handlers that have not stopped, and whether a statement
   * that it leaves behind in a pool of the application has no answer yet.
   */
  readonly begin: () => (left: ReadonlyArray<Fiber.Fiber<unknown, unknown>>, isSilent: () => boolean) => void
}

const make = (): Stop => {
  const stuck = Latch.makeUnsafe(false)
  let working = 0
  let handlers = 0
  let silent: ReadonlyArray<() => boolean> = []
  const isSilent = () => {
    silent = silent.filter((one) => one())
    return silent.length > 0
  }
  let ending = false
  const check = () => {
    // Workers that have not ended have a grace period of their own.
    if (ending && working === 0 && (handlers > 0 || isSilent())) stuck.openUnsafe()
  }
  return {
    urgent: Latch.makeUnsafe(false),
    stuck,
    isStuck: () => handlers > 0,
    isSilent,
    end: () => {
      ending = true
      check()
    },
    begin: () => {
      working++
      return (left, isUnanswered) => {
        working--
        if (isUnanswered()) silent = [...silent, isUnanswered]
        handlers += left.length
        for (const handler of left) handler.addObserver(() => handlers--)
        check()
      }
    }
  }
}

/** Where nobody says more, nothing is ever urgent. */
export const Stop = Context.Reference<Stop>("effect-pgqueue/Main/Stop", {
  defaultValue: make
})

/** Signals that follow each other this closely are one, in milliseconds: what the terminal sends to all, npm passes on. */
const together = 100

/**
 * How long the rest of the program may take to close when a handler did not stop: it may keep what the others wait for. A
 * pool waits without end for a connection on which a COMMIT is not answered.
 */
const patience = "1 second"

/**
 * Ends the process with code 0 when it was told to stop and did; for `NodeRuntime.runMain(…, { teardown })`.
 *
 * @category running
 * @since 0.1.0
 */
export const teardown: Runtime.Teardown = (exit, onExit) =>
  onExit(Exit.isSuccess(exit) || Cause.hasInterruptsOnly(exit.cause) ? 0 : 1)

/**
 * Runs the program of a process that works, in place of `NodeRuntime.runMain`: who tells it to stop again is heard.
 *
 * **Details**
 *
 * The first SIGTERM or SIGINT stops the program: its workers give their handlers the grace period. The second one ends
 * that: handlers are interrupted at once, and their jobs handed back without spending an attempt. The third one ends the
 * process with code 130, and whatever it still held is rescued after the lease time. Signals within 100 ms count as one.
 *
 * The exit code is 0 when it was told to stop and did, and 1 when it failed or a handler did not stop. With a `teardown` of
 * your own it is what that says.
 *
 * When the program was told to stop and a handler did not, the process ends one second after its last worker has: such a
 * handler may hold a connection, its COMMIT on a dead link for one, and a pool waits for that without end. A `teardown` of
 * your own is given a defect then. It also ends so, and as if it had stopped, when there is no `PgClient` and the queue has a
 * statement in the application's pool that a silent database has not answered.
 *
 * **Gotchas**
 *
 * A program that ends by itself, or fails, waits for the connections that such handlers hold, until a signal comes: what
 * else it may still want to do cannot be known.
 *
 * **Example** (A process that can be hurried)
 *
 * ```ts
 * import { PgClient } from "@effect/sql-pg"
 * import { Config, Effect, Layer } from "effect"
 * import { Job, JobQueue, Worker } from "effect-pgqueue"
 *
 * class Sweep extends Job.make("sweep") {}
 *
 * const SweepHandler = Sweep.toLayer(() => Effect.log("swept"))
 * const PgLive = PgClient.layerConfig({ url: Config.Redacted("DATABASE_URL") })
 * const QueueLive = JobQueue.layer().pipe(Layer.provideMerge(PgLive))
 *
 * const Main = Worker.layer({ jobs: [Sweep] }).pipe(Layer.provide([SweepHandler, QueueLive]))
 *
 * Worker.runMain(Layer.launch(Main))
 * ```
 *
 * @category running
 * @since 0.1.0
 */
export const runMain = <A, E>(
  effect: Effect.Effect<A, E>,
  options?: {
    /** Logs nothing when the program fails. Default `false`. */
    readonly disableErrorReporting?: boolean | undefined
    /** Chooses the exit code. */
    readonly teardown?: Runtime.Teardown | undefined
  }
): void => {
  const stop = make()
  const chooseCode = options?.teardown ??
    ((exit, onExit) => teardown(exit, (code) => onExit(stop.isStuck() ? 1 : code)))
  const watchdog = Effect.gen(function*() {
    yield* stop.stuck.await
    yield* Effect.sleep(patience)
    if (!stop.isStuck() && !stop.isSilent()) return
    // Without a handler it is the database that does not answer, and the worker has stopped as it was told to.
    chooseCode(
      stop.isStuck() ? Exit.die(new Error("effect-pgqueue: a handler did not stop")) : Exit.interrupt(),
      (code) => process.exit(code)
    )
  })
  const run = Runtime.makeRunMain(({ fiber, teardown }) => {
    let signals = 0
    let last = -Infinity
    const onSignal = () => {
      const at = performance.now()
      if (at - last < together) return
      last = at
      signals++
      if (signals === 1) {
        stop.end()
        fiber.interruptUnsafe(fiber.id)
      } else if (signals === 2) stop.urgent.openUnsafe()
      else process.exit(130)
    }
    process.on("SIGINT", onSignal)
    process.on("SIGTERM", onSignal)
    fiber.addObserver((exit) => {
      process.off("SIGINT", onSignal)
      process.off("SIGTERM", onSignal)
      teardown(exit, (code) => {
        if (signals > 0 || code !== 0) process.exit(code)
      })
    })
  })
  Effect.runFork(watchdog)
  run(Effect.provideService(effect, Stop, stop), { ...options, teardown: chooseCode })
}
