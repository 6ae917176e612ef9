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
import * as References from "effect/References"
import * as Schema from "effect/Schema"
import * as Tracer from "effect/Tracer"
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

type Handler = (payload: unknown) => Effect.Effect<Current.Ended, Current.Unhandled>
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
}) =>
(running: Running, handling: Handling, kind: string): Effect.Effect<void> =>
  Effect.suspend(() => {
    const clock = Context.get(options.context, Clock.Clock)
    const startedAt = Bounded.monotonic(clock)
    const context = Context.merge(options.context, handling.registered.context)
    const handler = (payload: unknown) =>
      handling.registered.transactional
        ? options.transactional(
          running,
          handling.registered.run(payload, kind),
          (value) => {
            const endedAt = Bounded.monotonic(clock)
            return completed(value, running, handling, { ran: endedAt - startedAt, endedAt })
          }
        )
        : handling.registered.run(payload, kind)
    return Effect.gen(function*() {
      const history = yield* historyOf(running.row, handling)
      const info = infoOf(running, history)
      // Not `running.fiber`: a handler may come here before the fork has returned it.
      const fiber = yield* Effect.withFiber(Effect.succeed)
      const control: Current.Control = {
        intent: undefined,
        interrupt: () => fiber.interruptUnsafe(),
        progress: (value) => options.progress(running, value)
      }
      Current.controlled(info, control)
      const exit = yield* Effect.exit(Effect.interruptible(body(running, handling, handler, info, options.middleware)))
      const endedAt = Bounded.monotonic(clock)
      running.entry = running.settled?.entry ??
        (yield* settlement(conclude(exit, control.intent, running), running, handling, history, {
          ran: endedAt - startedAt,
          endedAt,
          // The database's clock when it was claimed and our own since then: what the stored attempts are measured with.
          at: running.row.claimed_at + endedAt - running.claimedAt
        }))
      // What middleware needs, the worker's layer required; what the handler and its codecs need, the handler's did.
    }).pipe(Effect.provideContext(context))
  })

/** The part that can be interrupted: everything of the user's. */
const body = (
  running: Running,
  handling: Handling,
  handler: Handler,
  info: Job.Info,
  middleware: ReadonlyArray<Job.Middleware>
) => {
  const wrapped = (payload: unknown) => {
    let run = running.row.timeout_ms === null
      ? handler(payload)
      : withTimeout(handler(payload), running, info, running.row.timeout_ms)
    for (let i = middleware.length - 1; i >= 0; i--) run = middleware[i]!(run, info)
    return run
  }
  return Effect.suspend(() => handling.decode(JSON.parse(running.row.payload))).pipe(
    Effect.mapError((error) => new Undecodable(error.message)),
    Effect.flatMap((payload) =>
      Effect.withSpan(Effect.scoped(wrapped(payload)), `job ${info.kind}`, {
        kind: "consumer",
        ...parentOf(running.row.trace),
        attributes: {
          "messaging.system": "effect-pgqueue",
          "messaging.destination.name": info.queue,
          "messaging.message.id": info.id,
          "job.kind": info.kind,
          "job.attempt": info.attempt
        },
        captureStackTrace: false
      })
    ),
    Effect.provideService(Current.Current, info),
    Effect.updateService(References.CurrentLogAnnotations, (annotations) => ({
      ...annotations,
      "job.id": info.id,
      "job.kind": info.kind,
      "job.queue": info.queue,
      "job.attempt": info.attempt
    }))
  )
}

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
  const entry = (verb: Settlement.Verb, more: Partial<Settlement.Entry>): Settlement.Entry => ({
    ...entryOf(running, verb),
    ran: ended.ran,
    endedAt: ended.endedAt,
    ...more
  })
  switch (outcome._tag) {
    case "Complete":
      return Effect.catch(completed(outcome.value, running, handling, ended), (message) =>
        settlement(
          { _tag: "Retry", failure: { _tag: "Defect", message }, message },
          running,
          handling,
          history,
          ended
        ))
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
): Effect.Effect<Settlement.Entry, string> =>
  Effect.flatMap(
    handling.encodeSuccess(value),
    (encoded) => jsonText(encoded, maxPayloadBytes, () => (message) => ({ message }), "the result")
  ).pipe(
    Effect.map((result): Settlement.Entry => ({
      ...entryOf(running, "completed"),
      ran: ended.ran,
      endedAt: ended.endedAt,
      result: result === "null" ? undefined : result
    })),
    // Whatever the codec does, a run ends with a settlement.
    Effect.catchCause((cause) => Effect.fail(Outcome.sanitize(`the result cannot be stored: ${messageOf(cause)}`)))
  )

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
  ran: 0
})

/** An error that does not fit its schema, or is too large, is kept as text only. */
const encodeError = (handling: Handling, error: unknown): Effect.Effect<string | undefined> =>
  Effect.flatMap(
    handling.encodeError(error),
    (value) => jsonText(value, maxErrorBytes, () => (message) => message, "the error")
  ).pipe(Effect.catchCause(() => Effect.undefined))

const historyOf = (
  row: Store.ClaimedRow,
  handling: Handling
): Effect.Effect<ReadonlyArray<RetryPolicy.Attempt<unknown>>> =>
  row.history === null
    ? Effect.succeed([])
    : Effect.forEach(JSON.parse(row.history) as ReadonlyArray<Store.AttemptRow>, (attempt) =>
      Effect.map(failureOf(attempt, handling), (failure) => ({ at: attempt.at, failure })))

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
    enqueuedAt: DateTime.makeUnsafe(row.enqueued_at),
    scheduledFor: DateTime.makeUnsafe(row.scheduled_for),
    metadata: JSON.parse(row.metadata) as Job.Metadata,
    lastFailure: Option.map(Option.fromUndefinedOr(history[history.length - 1]), ({ failure }) => failure),
    progress: row.progress === null ? Option.none() : Option.some(JSON.parse(row.progress) as Schema.Json)
  }
}

const parentOf = (trace: string | null): { readonly parent?: Tracer.ExternalSpan; readonly root?: true } => {
  const found = trace === null ? null : /^00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})$/.exec(trace)
  return found === null
    ? { root: true }
    : { parent: Tracer.externalSpan({ traceId: found[1]!, spanId: found[2]!, sampled: found[3] === "01" }) }
}
