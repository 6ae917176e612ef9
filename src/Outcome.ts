/**
 * What the end of a run means: an `Exit` and what is known about it become an outcome. Pure.
 *
 * @since 0.1.0
 */
import * as Cause from "effect/Cause"
import * as Exit from "effect/Exit"
import * as Formatter from "effect/Formatter"
import * as Redactable from "effect/Redactable"
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

/** The most text that is kept of an error, and the longest reason, in bytes. */
export const maxTextBytes = 8192

/**
 * Makes text fit to be stored: no NUL, well-formed, at most 8 KiB.
 */
export const sanitize = (text: string): string => {
  const clean = text.slice(0, maxTextBytes).replaceAll("\0", "\uFFFD").toWellFormed()
  // As many whole characters as fit.
  return clean.slice(0, new TextEncoder().encodeInto(clean, new Uint8Array(maxTextBytes)).read)
}

/** The most links of a chain of causes, levels of an object, and interruptions that are described: more do not fit. */
const maxDepth = 100

const indescribable = "the error could not be described"

/**
 * Describes a cause as text that a user can read. Never throws, whatever was thrown, and is never empty.
 *
 * **Details**
 *
 * The text is that of `Cause.pretty`, as far as it is kept. What was thrown is the user's and of any size, so no more is
 * looked at and copied than can be kept.
 */
export const describe = (cause: Cause.Cause<unknown>): string => {
  const errors = cause.reasons.filter((reason) => !Cause.isInterruptReason(reason))
  if (errors.length === 0) return sanitize(pretty(() => cause.reasons.slice(0, maxDepth)) || indescribable)
  const texts: Array<string> = []
  for (let i = 0, length = 0; i < errors.length && length < maxTextBytes; i++) {
    const reason = errors[i]!
    const text = pretty(() => {
      const thrown = excerpt(Cause.isFailReason(reason) ? reason.error : reason.defect, new Set(), 4 * maxTextBytes)
      return [Cause.makeDieReason(thrown).annotate(Cause.reasonAnnotations(reason))]
    })
    length += text.length + 1
    texts.push(text)
  }
  return sanitize(texts.join("\n"))
}

const pretty = (reasons: () => ReadonlyArray<Cause.Reason<unknown>>): string => {
  try {
    return Cause.pretty(Cause.fromReasons(reasons()))
  } catch {
    return indescribable
  }
}

/** What `Cause.pretty` looks at of something thrown, cut to what can be kept; `room` is for it and its causes. */
const excerpt = (thrown: unknown, seen: Set<unknown>, room: number): unknown => {
  if (typeof thrown === "string") return thrown.slice(0, maxTextBytes)
  if (typeof thrown !== "object" || thrown === null) return thrown
  seen.add(thrown)
  const message = keptMessageOf(thrown)
  const ownName = read(thrown, "name")
  const name = typeof ownName === "string" ? ownName.slice(0, maxTextBytes) : undefined
  // It begins with name and message, and the first to read it copies them; with the value, where the message has one.
  const readable = !quotesValues(thrown) && (name ?? "").length + message.length < maxTextBytes
  const stack = readable ? read(thrown, "stack") : undefined
  const cause = read(thrown, "cause")
  const left = room - message.length - (typeof stack === "string" ? stack.length : 0)
  return {
    message,
    name,
    stack: typeof stack === "string" ? stack.slice(0, 3 * maxTextBytes) : undefined,
    cause: left > 0 && seen.size < maxDepth && !seen.has(cause) ? excerpt(cause, seen, left) : undefined
  }
}

/**
 * Whether this is an error of PostgreSQL. Of what it says only the message, the code and the constraint are kept: everything
 * else may carry values (`detail`, `hint`, `where`).
 */
const isServerError = (thrown: object): boolean => {
  const code = read(thrown, "code")
  return typeof code === "string" && /^[0-9A-Z]{5}$/.test(code) && typeof read(thrown, "severity") === "string"
}

/** Of what is at fault with data (class 22) the value is a part of the message. */
const quotesValues = (thrown: object): boolean => isServerError(thrown) && String(read(thrown, "code")).startsWith("22")

const keptMessageOf = (thrown: object): string =>
  quotesValues(thrown) ? withoutValues(messageOf(thrown)) : messageOf(thrown)

/** What comes before the first quotation mark of any language, without bytes that are shown as such. */
const withoutValues = (message: string): string =>
  message.replace(/["'`\u00ab\u00bb\u2018-\u201f\u2039\u203a\u300c-\u300f\uff02][^]*$/, "…").replace(
    /\b0x[0-9a-f]+/gi,
    "…"
  )

const messageOf = (thrown: object): string => {
  const message = read(thrown, "message")
  if (typeof message === "string") return message.slice(0, maxTextBytes)
  try {
    const print = read(thrown, "toString")
    return typeof print === "function" && !printsNothing.has(print) && !ArrayBuffer.isView(thrown)
      ? String(print.call(thrown)).slice(0, maxTextBytes)
      : Formatter.formatJson(brief(thrown, { left: maxTextBytes }, []))
  } catch {
    return indescribable
  }
}

const printsNothing: ReadonlySet<unknown> = new Set([Object.prototype.toString, Array.prototype.toString])

const read = (thrown: object, property: string): unknown => {
  try {
    return (thrown as Record<string, unknown>)[property]
  } catch {
    return undefined
  }
}

/** The first parts of a value, as JSON shows it. */
const brief = (value: unknown, room: { left: number }, inside: ReadonlyArray<unknown>): unknown => {
  room.left--
  if (typeof value === "string") {
    const text = value.slice(0, Math.max(0, room.left))
    room.left -= text.length
    return text
  }
  // What is redacted is left to the formatter.
  if (typeof value !== "object" || value === null || Redactable.isRedactable(value)) return value
  if (inside.includes(value)) return undefined
  if (inside.length === maxDepth) return "…"
  if (ArrayBuffer.isView(value)) return `${value.byteLength} bytes`
  const within = [...inside, value]
  const toJSON = read(value, "toJSON")
  if (typeof toJSON === "function") return brief(toJSON.call(value), room, within)
  if (Array.isArray(value)) {
    const items: Array<unknown> = []
    for (let i = 0; i < value.length && room.left > 0; i++) items.push(brief(value[i], room, within))
    return items
  }
  const copy: Record<string, unknown> = {}
  const isServers = isServerError(value)
  for (const key of isServers ? ["code", "constraint"] : Object.keys(value)) {
    if (room.left <= 0) break
    copy[key.slice(0, maxTextBytes)] = brief(read(value, key), room, within)
    room.left -= key.length
  }
  if (!isServers && !(value instanceof Error)) return copy
  return { ...copy, name: read(value, "name"), message: brief(keptMessageOf(value), room, within) }
}
