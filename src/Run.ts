/**
 * The run of one job, from its payload to its exit: decode, span, middleware, timeout, handler. What its exit comes to is
 * in `Ending`.
 *
 * @since 0.1.0
 */
import * as Clock from "effect/Clock"
import * as Context from "effect/Context"
import * as DateTime from "effect/DateTime"
import * as Effect from "effect/Effect"
import type * as Fiber from "effect/Fiber"
import * as Option from "effect/Option"
import type * as Schema from "effect/Schema"
import * as Bounded from "./Bounded.ts"
import * as Current from "./Current.ts"
import * as Ending from "./Ending.ts"
import type * as Handling from "./Handling.ts"
import type * as Job from "./Job.ts"
import type * as Outcome from "./Outcome.ts"
import * as Report from "./Report.ts"
import type * as RetryPolicy from "./RetryPolicy.ts"
import type * as Settlement from "./Settlement.ts"
import type * as Store from "./Store.ts"
import * as Surroundings from "./Surroundings.ts"
import type * as Transactional from "./Transactional.ts"

/** A claimed job and what the worker knows of its run. */
export interface Running {
  readonly row: Store.ClaimedRow
  /** Changes once, when a transactional handler gets a lease of its own. */
  lease: string
  readonly queue: string
  /** When it was claimed, by this process's monotonic clock, in milliseconds. */
  readonly claimedAt: number
  fiber: Fiber.Fiber<unknown, unknown> | undefined
  /** Why the worker interrupted it, if it did. */
  interruption: Outcome.Interruption | undefined
  /** Set when the run has ended. */
  entry: Settlement.Entry | undefined
  /** Set when the run has been settled by its handler's own transaction, which has committed. */
  settled: { readonly entry: Settlement.Entry; readonly answer: Settlement.Answer | undefined } | undefined
}

/** A timed-out handler that has not stopped after this long is reported. */
const stubborn = "5 seconds"

/** What a handler can know of its run, and do to it. Most do not ask. */
class Subject implements Surroundings.Subject, Current.Control {
  intent: Outcome.Intent | undefined = undefined
  readonly #fiber: Fiber.Fiber<unknown, unknown>
  readonly #running: Running
  readonly #history: ReadonlyArray<RetryPolicy.Attempt<unknown>>
  readonly #progress: (running: Running, value: string) => Effect.Effect<void>
  #info: Job.Info | undefined = undefined

  constructor(
    fiber: Fiber.Fiber<unknown, unknown>,
    running: Running,
    history: ReadonlyArray<RetryPolicy.Attempt<unknown>>,
    progress: (running: Running, value: string) => Effect.Effect<void>
  ) {
    // Not `running.fiber`: a handler may come here before the fork has returned it.
    this.#fiber = fiber
    this.#running = running
    this.#history = history
    this.#progress = progress
  }
  get kind(): string {
    // Sound: a job whose row is gone has no kind, and is never run.
    return this.#running.row.kind as string
  }
  get trace(): string | null {
    return this.#running.row.trace
  }
  get info(): Job.Info {
    if (this.#info === undefined) {
      this.#info = infoOf(this.#running, this.#history)
      Current.controlled(this.#info, this)
    }
    return this.#info
  }
  interrupt(): void {
    this.#fiber.interruptUnsafe()
  }
  progress(value: string): Effect.Effect<void> {
    return this.#progress(this.#running, value)
  }
}

/** What a program without types makes of a handler: an `async` function, for instance, would run beside its job. */
const effectOf = <A, E, R>(run: Effect.Effect<A, E, R>, whose: string): Effect.Effect<A, E, R> => {
  if (!Effect.isEffect(run)) throw new TypeError(`${whose} returned no Effect`)
  return run
}

/**
 * Runs a claimed job and leaves its settlement in `running.entry`. Never fails. To be forked uninterruptible: an
 * interruption then reaches the user's part and nothing else, and the run always ends with a settlement.
 */
export const make = (options: {
  readonly context: Context.Context<never>
  readonly middleware: ReadonlyArray<Job.Middleware>
  readonly transactional: Transactional.Transactional
  /** Stores what a handler says of its job. */
  readonly progress: (running: Running, value: string) => Effect.Effect<void>
}) => {
  const clock = Context.get(options.context, Clock.Clock)
  // What middleware needs, the worker's layer required; what the handler and its codecs need, the handler's did.
  const known = new Map<Handling.Handling, Surroundings.Surroundings>()
  const surroundingsOf = (handling: Handling.Handling): Surroundings.Surroundings => {
    const found = known.get(handling)
    if (found !== undefined) return found
    const made = Surroundings.make(Context.merge(options.context, handling.registered.context))
    known.set(handling, made)
    return made
  }

  /** The handler, inside its timeout, inside the middleware. */
  const wrapped = (
    payload: unknown,
    running: Running,
    handling: Handling.Handling,
    kind: string,
    startedAt: number,
    subject: Subject
  ) => {
    let run = effectOf(handling.registered.run(payload, kind), "the handler")
    if (handling.registered.transactional) {
      run = options.transactional(running, run, (value) => {
        const endedAt = Bounded.monotonic(clock)
        return Ending.completed(value, running, handling, { ran: endedAt - startedAt, endedAt })
      })
    }
    const millis = running.row.timeout_ms
    if (millis !== null) run = withTimeout(run, running, subject.info, millis)
    for (let i = options.middleware.length - 1; i >= 0; i--) {
      run = effectOf(options.middleware[i]!(run, subject.info), "a middleware")
    }
    return run
  }

  /** `startedAt` is now, for whoever has just asked for the time. */
  return (
    running: Running,
    handling: Handling.Handling,
    kind: string,
    startedAt: number = Bounded.monotonic(clock)
  ): Effect.Effect<void> => {
    const { row } = running
    const surroundings = surroundingsOf(handling)

    // In one piece and without a generator: a handler that does not wait, and codecs that do not, are done in one go.
    const start = (history: ReadonlyArray<RetryPolicy.Attempt<unknown>>) =>
      Effect.withFiber((fiber) => {
        const subject = new Subject(fiber, running, history, options.progress)
        const before = fiber.context
        let services: Surroundings.Services | undefined

        const handle = (payload: unknown, at: number) => {
          const run = wrapped(payload, running, handling, kind, startedAt, subject)
          const own = services = surroundings.begin(subject, at)
          fiber.setContext(Context.makeUnsafe(own))
          return Effect.onExit(run, (exit) => own.close(exit) ?? Effect.void)
        }
        /** Everything of the user's. */
        const body = Effect.suspend(() => {
          fiber.setContext(surroundings.context)
          if (row.payload === null) return Effect.fail(new Ending.Undecodable(tooLarge))
          const decoded = handling.decode(JSON.parse(row.payload))
          if (Bounded.isDone(decoded)) return handle(decoded.value, startedAt)
          fiber.setContext(surroundings.informed(subject))
          return Effect.flatMap(
            Effect.mapError(decoded, (error) => new Ending.Undecodable(error.message)),
            (payload) => handle(payload, Bounded.monotonic(clock))
          )
        })

        return Effect.flatMap(Effect.exit(Effect.interruptible(body)), (exit) => {
          const endedAt = Bounded.monotonic(clock)
          if (services !== undefined) surroundings.end(services, exit, endedAt)
          fiber.setContext(before)
          if (running.settled !== undefined) {
            running.entry = running.settled.entry
            return Effect.void
          }
          const settling = Ending.settlement(
            Ending.conclude(exit, subject.intent, running),
            running,
            handling,
            history,
            {
              ran: endedAt - startedAt,
              endedAt,
              // The database's clock when it was claimed and our own since then: what the stored attempts are measured with.
              at: row.claimed_at + endedAt - running.claimedAt
            }
          )
          if (Bounded.isDone(settling)) {
            running.entry = settling.value
            return Effect.void
          }
          return Effect.setContext(
            Effect.map(settling, (entry) => {
              running.entry = entry
            }),
            surroundings.context
          )
        })
      })

    return row.history === null
      ? start(none)
      : Effect.flatMap(Effect.setContext(historyOf(row.history, handling), surroundings.context), start)
  }
}

const none: ReadonlyArray<never> = []

const tooLarge = "the payload is larger than any may be"

/**
 * Interrupts the run when its time is over. A handler that does not stop keeps its slot and its lease, so that it never
 * runs twice at once.
 */
const withTimeout = <A, E, R>(self: Effect.Effect<A, E, R>, running: Running, info: Job.Info, millis: number) =>
  Effect.gen(function*() {
    const timer = Effect.gen(function*() {
      yield* Effect.sleep(millis)
      running.interruption ??= "timeout"
      running.fiber?.interruptUnsafe()
      yield* Effect.sleep(stubborn)
      yield* Report.warning(
        `job ${info.id} (${info.kind}) was told to stop after its timeout and still runs`
      )
    })
    // Detached: as a child it would be interrupted together with the run it reports on.
    const fiber = yield* Effect.forkDetach(timer)
    return yield* Effect.ensuring(self, Effect.sync(() => fiber.interruptUnsafe()))
  })

const historyOf = (
  history: string,
  handling: Handling.Handling
): Effect.Effect<ReadonlyArray<RetryPolicy.Attempt<unknown>>> =>
  Effect.suspend(() =>
    // Sound: what the storage wrote.
    Effect.forEach(
      JSON.parse(history) as ReadonlyArray<Store.AttemptRow>,
      (attempt) => Effect.map(failureOf(attempt, handling), (failure) => ({ at: attempt.at, failure }))
    )
  )

const failureOf = (
  attempt: Store.AttemptRow,
  handling: Handling.Handling
): Effect.Effect<Job.Failure<unknown>> => {
  const message = attempt.message ?? ""
  switch (attempt.tag) {
    case "Failed":
      return Effect.suspend(() => handling.decodeError(attempt.error)).pipe(
        Effect.map((error): Job.Failure<unknown> => ({ _tag: "Failed", error })),
        Effect.catchCause(() => Effect.succeed<Job.Failure<unknown>>({ _tag: "Undecodable", message }))
      )
    case "TimedOut":
    case "Interrupted":
    case "Lost":
      return Effect.succeed({ _tag: attempt.tag })
    case "Undecodable":
      return Effect.succeed({ _tag: "Undecodable", message })
    default:
      return Effect.succeed({ _tag: "Defect", message })
  }
}

const infoOf = (running: Running, history: ReadonlyArray<RetryPolicy.Attempt<unknown>>): Job.Info => {
  const row = running.row
  return {
    // Sound: the storage's ids are the ones that enqueue made.
    id: row.id as Job.JobId,
    // Sound: a job whose row is gone has no kind, and is never run.
    kind: row.kind as string,
    queue: running.queue,
    priority: row.priority,
    attempt: row.attempt + 1,
    maxAttempts: row.max_attempts,
    enqueuedAt: DateTime.makeUnsafe(row.enqueued_at),
    scheduledFor: DateTime.makeUnsafe(row.scheduled_for),
    metadata: row.metadata === "{}" ? {} : JSON.parse(row.metadata) as Job.Metadata,
    lastFailure: history.length === 0 ? Option.none() : Option.some(history[history.length - 1]!.failure),
    progress: row.progress === null ? Option.none() : Option.some(JSON.parse(row.progress) as Schema.Json)
  }
}
