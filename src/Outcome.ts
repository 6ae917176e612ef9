/**
 * What the end of a run means: an `Exit` and what is known about it become an outcome. Pure.
 *
 * @since 0.1.0
 */
import * as Cause from "effect/Cause"
import * as Exit from "effect/Exit"
import type { Failure } from "./RetryPolicy.ts"

/**
 * How a run ended.
 *
 * - `Complete`: with a result.
 * - `Retry`: failed; tried again when the policy and the attempts allow, else discarded.
 * - `Snooze`: back in line after a delay, no attempt spent.
 * - `Cancel`, `Discard`: ended on purpose, with a reason.
 * - `Release`: back in line as if it had not been claimed; `lost`, as after the loss of its worker.
 */
export type Outcome<A, E> =
  | { readonly _tag: "Complete"; readonly value: A }
  | { readonly _tag: "Retry"; readonly failure: Failure<E>; readonly message: string }
  | Intent
  | { readonly _tag: "Release"; readonly lost: boolean }

/** What a handler asked for with `Job.cancel`, `Job.discard` or `Job.snooze`. */
export type Intent =
  | { readonly _tag: "Cancel"; readonly reason: string }
  | { readonly _tag: "Discard"; readonly reason: string }
  | { readonly _tag: "Snooze"; readonly delay: number }

/** Why the worker interrupted a run. */
export type Interruption = "shutdown" | "lost" | "unheard" | "cancelled" | "timeout"

/**
 * Decides the outcome of a run.
 *
 * **Details**
 *
 * A recorded intent, and an interruption by the worker, count only when the run ended by interruption alone: a handler
 * that fails or succeeds all the same has the last word. An interruption that nobody claims is the handler's own (it
 * joined an interrupted child) and is a failed attempt, or it would loop for ever.
 */
export const fromExit = <A, E>(
  exit: Exit.Exit<A, E>,
  known: { readonly intent: Intent | undefined; readonly interruption: Interruption | undefined }
): Outcome<A, E> => {
  if (Exit.isSuccess(exit)) return { _tag: "Complete", value: exit.value }
  const cause = exit.cause
  if (Cause.hasInterruptsOnly(cause)) {
    if (known.intent !== undefined) return known.intent
    switch (known.interruption) {
      case "shutdown":
      case "lost":
        return { _tag: "Release", lost: false }
      // One of the jobs that ran here may have kept the process from its heartbeats: as little is known as after a crash.
      case "unheard":
        return { _tag: "Release", lost: true }
      case "cancelled":
        return { _tag: "Cancel", reason: "" }
      case "timeout":
        return {
          _tag: "Retry",
          failure: { _tag: "TimedOut" },
          message: "the attempt ran longer than the job's timeout"
        }
      case undefined:
        return { _tag: "Retry", failure: { _tag: "Interrupted" }, message: "the handler was interrupted" }
    }
  }
  const message = describe(cause)
  const failed = cause.reasons.find(Cause.isFailReason)
  return {
    _tag: "Retry",
    failure: failed === undefined ? { _tag: "Defect", message } : { _tag: "Failed", error: failed.error },
    message
  }
}

/** The most text that is kept of an error, in bytes. */
const maxText = 8192

/**
 * Makes text fit to be stored: no NUL, well-formed, at most 8 KiB.
 */
export const sanitize = (text: string): string => {
  const clean = text.slice(0, maxText).replaceAll("\0", "\uFFFD").toWellFormed()
  // As many whole characters as fit.
  return clean.slice(0, new TextEncoder().encodeInto(clean, new Uint8Array(maxText)).read)
}

/**
 * Describes a cause as text that a user can read. Never throws, whatever was thrown.
 */
export const describe = (cause: Cause.Cause<unknown>): string => {
  try {
    return sanitize(Cause.pretty(cause))
  } catch {
    return "the error could not be described"
  }
}
