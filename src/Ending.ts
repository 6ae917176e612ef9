/**
 * The end of a run: from its exit, by its outcome, to what the storage is told.
 *
 * @since 0.1.0
 */
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import type * as Exit from "effect/Exit"
import * as Option from "effect/Option"
import * as Predicate from "effect/Predicate"
import * as Bounded from "./Bounded.ts"
import * as Handling from "./Handling.ts"
import * as JsonText from "./JsonText.ts"
import { maxErrorBytes, maxPayloadBytes } from "./Migrations.ts"
import * as Outcome from "./Outcome.ts"
import * as RetryPolicy from "./RetryPolicy.ts"
import type * as Run from "./Run.ts"
import type * as Settlement from "./Settlement.ts"

/** The payload does not fit: carried in the failure channel of a run, apart from every typed error. */
export class Undecodable {
  readonly message: string
  constructor(message: string) {
    this.message = message
  }
}

/** When a run has ended, by the monotonic clock of this process, and how long it took; in milliseconds. */
export interface Times {
  readonly ran: number
  readonly endedAt: number
}

/** What the exit of a run means for its job. */
export const conclude = (
  exit: Exit.Exit<unknown, unknown>,
  intent: Outcome.Intent | undefined,
  running: Run.Running
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

/** Encodes an outcome as what the storage is told. `at` is when the run has ended by the clock of the database. */
export const settlement = (
  outcome: Outcome.Outcome<unknown, unknown>,
  running: Run.Running,
  handling: Handling.Handling,
  history: ReadonlyArray<RetryPolicy.Attempt<unknown>>,
  ended: Times & { readonly at: number }
): Effect.Effect<Settlement.Entry> => {
  if (outcome._tag === "Complete") {
    const entry = completed(outcome.value, running, handling, ended)
    if (Bounded.isDone(entry)) return Effect.succeed(entry.value)
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
          Handling.undecided
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
export const completed = (
  value: unknown,
  running: Run.Running,
  handling: Handling.Handling,
  ended: Times
): Effect.Effect<Settlement.Entry, string> => {
  const encoded = handling.encodeSuccess(value)
  // Most have no result.
  if (Bounded.isDone(encoded) && encoded.value === null) {
    return Effect.succeed(completion(running, handling, undefined, ended))
  }
  return Effect.flatMap(
    encoded,
    (encoded) => JsonText.orFail(encoded, maxPayloadBytes, "the result")
  ).pipe(
    Effect.map((result) => completion(running, handling, result === "null" ? undefined : result, ended)),
    // Whatever the codec does, a run ends with a settlement.
    Effect.catchCause((cause) => Effect.fail(Outcome.sanitize(`the result cannot be stored: ${messageOf(cause)}`)))
  )
}

/** Written out, because all that succeed come here. */
const completion = (
  running: Run.Running,
  handling: Handling.Handling,
  result: string | undefined,
  { endedAt, ran }: Times
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

const messageOf = (cause: Cause.Cause<string | { readonly message: string }>): string => {
  const error = cause.reasons.find(Cause.isFailReason)?.error
  return Predicate.isString(error) ? error : error?.message ?? Outcome.describe(cause)
}

/** The first rescue of a job is free: it spends no attempt, and none of the schedule. */
const withoutFreeRescue = (history: ReadonlyArray<RetryPolicy.Attempt<unknown>>) => {
  const first = history.findIndex(({ failure }) => failure._tag === "Lost")
  return history.filter((_, index) => index !== first)
}

/** The bare entry of one verb. */
export const entryOf = (running: Run.Running, verb: Settlement.Verb): Settlement.Entry => ({
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
const encodeError = (handling: Handling.Handling, error: unknown): Effect.Effect<string | undefined> =>
  Effect.flatMap(
    handling.encodeError(error),
    (value) => JsonText.orFail(value, maxErrorBytes, "the error")
  ).pipe(Effect.catchCause(() => Effect.undefined))
