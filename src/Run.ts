/**
 * The run of one job, from its payload to its settlement: decode, span, middleware, timeout, handler, exit, outcome.
 *
 * @since 0.1.0
 */
import * as Cause from "effect/Cause"
import * as Clock from "effect/Clock"
import * as Context from "effect/Context"
import * as DateTime from "effect/DateTime"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import type * as Fiber from "effect/Fiber"
import * as Option from "effect/Option"
import * as Schema from "effect/Schema"
import * as Bounded from "./Bounded.ts"
import * as Current from "./Current.ts"
import type * as Definition from "./Definition.ts"
import { jsonText } from "./Enqueue.ts"
import type * as Job from "./Job.ts"
import { maxPayloadBytes } from "./Migrations.ts"
import * as Outcome from "./Outcome.ts"
import * as RetryPolicy from "./RetryPolicy.ts"
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

/** A handler ready to run: its codecs are made once. */
export interface Handling {
  readonly definition: Definition.Definition
  readonly registered: Definition.Registered
  readonly decode: Codec
  readonly encodeSuccess: Codec
  readonly encodeError: Codec
  readonly decodeError: Codec
}

type Codec = (value: unknown) => Effect.Effect<unknown, Schema.SchemaError | Bounded.TimedOut>

/** Prepares a definition and its registered handler. */
export const handling = (definition: Definition.Definition, registered: Definition.Registered): Handling => ({
  definition,
  registered,
  // Sound: the services of these codecs are requirements of the handler's layer, whose context every run is given.
  decode: Schema.decodeUnknownEffect(Schema.toCodecJson(definition.payloadSchema)) as Codec,
  encodeSuccess: answering(Schema.encodeUnknownEffect(Schema.toCodecJson(definition.successSchema)) as Codec),
  encodeError: answering(Schema.encodeUnknownEffect(Schema.toCodecJson(definition.errorSchema)) as Codec),
  decodeError: answering(Schema.decodeUnknownEffect(Schema.toCodecJson(definition.errorSchema)) as Codec)
})

/** Bounds a codec that runs where nothing can interrupt it. Most answer at once, and cost nothing here. */
const answering = (codec: Codec): Codec => (value) => {
  const answer = codec(value)
  return Exit.isExit(answer) ? answer : Bounded.bounded(answer, undecided)
}

/** Whether there is nothing to wait for: codecs answer most values at once, with an exit. */
const isDone = <A, E>(effect: Effect.Effect<A, E>): effect is Exit.Success<A, E> =>
  Exit.isExit(effect) && Exit.isSuccess(effect)

/** The most that is kept of an encoded typed error, in bytes. */
const maxErrorBytes = 65_536

/** A timed-out handler that has not stopped after this long is reported. */
const stubborn = "5 seconds"

/** A retry policy or a codec that has not answered after this long, in milliseconds, counts as one that throws. */
const undecided = 5000

/** The payload does not fit: carried in the failure channel of a run, apart from every typed error. */
class Undecodable {
  readonly message: string
  constructor(message: string) {
    this.message = message
  }
}

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
  const surroundings = new Map<Handling, Surroundings.Surroundings>()
  const around = (handling: Handling): Surroundings.Surroundings => {
    const found = surroundings.get(handling)
    if (found !== undefined) return found
    const made = Surroundings.make(Context.merge(options.context, handling.registered.context))
    surroundings.set(handling, made)
    return made
  }

  /** The handler, inside its timeout, inside the middleware. */
  const wrapped = (
    payload: unknown,
    running: Running,
    handling: Handling,
    kind: string,
    startedAt: number,
    subject: Subject
  ) => {
    let run = handling.registered.run(payload, kind)
    if (handling.registered.transactional) {
      run = options.transactional(running, run, (value) => {
        const endedAt = Bounded.monotonic(clock)
        return completed(value, running, handling, { ran: endedAt - startedAt, endedAt })
      })
    }
    const millis = running.row.timeout_ms
    if (millis !== null) run = withTimeout(run, running, subject.info, millis)
    for (let i = options.middleware.length - 1; i >= 0; i--) run = options.middleware[i]!(run, subject.info)
    return run
  }

  /** `startedAt` is now, for whoever has just asked for the time. */
  return (
    running: Running,
    handling: Handling,
    kind: string,
    startedAt: number = Bounded.monotonic(clock)
  ): Effect.Effect<void> => {
    const { row } = running
    const its = around(handling)

    // In one piece and without a generator: a handler that does not wait, and codecs that do not, are done in one go.
    const start = (history: ReadonlyArray<RetryPolicy.Attempt<unknown>>) =>
      Effect.withFiber((fiber) => {
        const subject = new Subject(fiber, running, history, options.progress)
        const before = fiber.context
        let surrounding: Surroundings.Surrounding | undefined

        const handle = (payload: unknown, at: number) => {
          const run = wrapped(payload, running, handling, kind, startedAt, subject)
          const own = surrounding = its.begin(subject, at)
          fiber.setContext(Context.makeUnsafe(own))
          return Effect.onExit(run, (exit) => own.close(exit) ?? Effect.void)
        }
        /** Everything of the user's. */
        const body = Effect.suspend(() => {
          fiber.setContext(its.context)
          const decoded = handling.decode(JSON.parse(row.payload))
          if (isDone(decoded)) return handle(decoded.value, startedAt)
          fiber.setContext(its.informed(subject))
          return Effect.flatMap(
            Effect.mapError(decoded, (error) => new Undecodable(error.message)),
            (payload) => handle(payload, Bounded.monotonic(clock))
          )
        })

        return Effect.flatMap(Effect.exit(Effect.interruptible(body)), (exit) => {
          const endedAt = Bounded.monotonic(clock)
          if (surrounding !== undefined) its.end(surrounding, exit, endedAt)
          fiber.setContext(before)
          if (running.settled !== undefined) {
            running.entry = running.settled.entry
            return Effect.void
          }
          const settling = settlement(conclude(exit, subject.intent, running), running, handling, history, {
            ran: endedAt - startedAt,
            endedAt,
            // The database's clock when it was claimed and our own since then: what the stored attempts are measured with.
            at: row.claimed_at + endedAt - running.claimedAt
          })
          if (isDone(settling)) {
            running.entry = settling.value
            return Effect.void
          }
          return Effect.setContext(
            Effect.map(settling, (entry) => {
              running.entry = entry
            }),
            its.context
          )
        })
      })

    return row.history === null
      ? start(none)
      : Effect.flatMap(Effect.setContext(historyOf(row.history, handling), its.context), start)
  }
}

const none: ReadonlyArray<never> = []

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
      yield* Effect.logWarning(
        `effect-pgqueue: job ${info.id} (${info.kind}) was told to stop after its timeout and still runs`
      )
    })
    // Detached: as a child it would be interrupted together with the run it reports on.
    const fiber = yield* Effect.forkDetach(timer)
    return yield* Effect.ensuring(self, Effect.sync(() => fiber.interruptUnsafe()))
  })

const conclude = (
  exit: Exit.Exit<unknown, unknown>,
  intent: Outcome.Intent | undefined,
  running: Running
): Outcome.Outcome<unknown, unknown> => {
  const outcome = Outcome.fromExit(exit, { intent, interruption: running.interruption })
  return outcome._tag === "Retry" && outcome.failure._tag === "Failed" && outcome.failure.error instanceof Undecodable
    ? {
      _tag: "Retry",
      failure: { _tag: "Undecodable", message: outcome.failure.error.message },
      message: Outcome.sanitize(outcome.failure.error.message)
    }
    : outcome
}

/** Encodes an outcome as what the storage is told. */
const settlement = (
  outcome: Outcome.Outcome<unknown, unknown>,
  running: Running,
  handling: Handling,
  history: ReadonlyArray<RetryPolicy.Attempt<unknown>>,
  ended: { readonly ran: number; readonly endedAt: number; readonly at: number }
): Effect.Effect<Settlement.Entry> => {
  if (outcome._tag === "Complete") {
    const entry = completed(outcome.value, running, handling, ended)
    if (isDone(entry)) return Effect.succeed(entry.value)
    return Effect.catch(
      entry,
      (message) =>
        settlement({ _tag: "Retry", failure: { _tag: "Defect", message }, message }, running, handling, history, ended)
    )
  }
  const entry = (verb: Settlement.Verb, more: Partial<Settlement.Entry>): Settlement.Entry => ({
    ...entryOf(running, verb),
    ran: ended.ran,
    endedAt: ended.endedAt,
    ...more
  })
  switch (outcome._tag) {
    case "Retry":
      return Effect.gen(function*() {
        const delay = yield* Bounded.bounded(
          RetryPolicy.next(handling.definition.retry, [
            ...withoutFreeRescue(history),
            { at: ended.at, failure: outcome.failure }
          ]),
          undecided
        ).pipe(Effect.orElseSucceed(() => Option.none()))
        const failure = outcome.failure
        const error = failure._tag === "Failed" ? yield* encodeError(handling, failure.error) : undefined
        return entry("failed", {
          delay: Option.getOrUndefined(delay),
          failure: { tag: failure._tag, message: outcome.message, error }
        })
      })
    case "Snooze":
      return Effect.succeed(entry("snoozed", { delay: outcome.delay }))
    case "Cancel":
      return Effect.succeed(entry("cancelled", { reason: Outcome.sanitize(outcome.reason) }))
    case "Discard":
      return Effect.succeed(entry("discarded", { reason: Outcome.sanitize(outcome.reason) }))
    case "Release":
      return Effect.succeed(
        outcome.lost
          ? entry("lost", {
            failure: { tag: "Lost", message: "the worker was not heard of for its lease time", error: undefined }
          })
          : entry("released", {})
      )
  }
}

/** The settlement of a run that has succeeded; fails with why its result cannot be stored. */
const completed = (
  value: unknown,
  running: Running,
  handling: Handling,
  ended: { readonly ran: number; readonly endedAt: number }
): Effect.Effect<Settlement.Entry, string> => {
  const encoded = handling.encodeSuccess(value)
  // Most have no result.
  if (isDone(encoded) && encoded.value === null) {
    return Effect.succeed(completion(running, handling, undefined, ended))
  }
  return Effect.flatMap(
    encoded,
    (encoded) => jsonText(encoded, maxPayloadBytes, () => (message) => ({ message }), "the result")
  ).pipe(
    Effect.map((result) => completion(running, handling, result === "null" ? undefined : result, ended)),
    // Whatever the codec does, a run ends with a settlement.
    Effect.catchCause((cause) => Effect.fail(Outcome.sanitize(`the result cannot be stored: ${messageOf(cause)}`)))
  )
}

const completion = (
  running: Running,
  handling: Handling,
  result: string | undefined,
  { endedAt, ran }: { readonly ran: number; readonly endedAt: number }
): Settlement.Entry => ({
  lease: running.lease,
  id: running.row.id,
  verb: "completed",
  result,
  reason: undefined,
  delay: undefined,
  failure: undefined,
  ran,
  endedAt,
  forget: !handling.definition.keepCompleted
})

const messageOf = (cause: Cause.Cause<{ readonly message: string }>): string =>
  cause.reasons.find(Cause.isFailReason)?.error.message ?? Outcome.describe(cause)

/** The first rescue of a job is free: it spends no attempt, and none of the schedule. */
const withoutFreeRescue = (history: ReadonlyArray<RetryPolicy.Attempt<unknown>>) => {
  const first = history.findIndex(({ failure }) => failure._tag === "Lost")
  return history.filter((_, index) => index !== first)
}

/** The bare entry of one verb. */
export const entryOf = (running: Running, verb: Settlement.Verb): Settlement.Entry => ({
  lease: running.lease,
  id: running.row.id,
  verb,
  result: undefined,
  reason: undefined,
  delay: undefined,
  failure: undefined,
  ran: 0,
  endedAt: undefined,
  forget: undefined
})

/** An error that does not fit its schema, or is too large, is kept as text only. */
const encodeError = (handling: Handling, error: unknown): Effect.Effect<string | undefined> =>
  Effect.flatMap(
    handling.encodeError(error),
    (value) => jsonText(value, maxErrorBytes, () => (message) => message, "the error")
  ).pipe(Effect.catchCause(() => Effect.undefined))

const historyOf = (
  history: string,
  handling: Handling
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
  handling: Handling
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
    enqueuedAt: utcOf(row.enqueued_at),
    scheduledFor: utcOf(row.scheduled_for),
    metadata: row.metadata === "{}" ? {} : JSON.parse(row.metadata) as Job.Metadata,
    lastFailure: history.length === 0 ? Option.none() : Option.some(history[history.length - 1]!.failure),
    progress: row.progress === null ? Option.none() : Option.some(JSON.parse(row.progress) as Schema.Json)
  }
}

let latest = DateTime.makeUnsafe(0)

/** Jobs come in line many in a millisecond, and are first due when they do; to make a `DateTime` takes half a microsecond. */
const utcOf = (millis: number): DateTime.Utc => {
  if (latest.epochMilliseconds !== Math.trunc(millis)) latest = DateTime.makeUnsafe(millis)
  return latest
}
