/**
 * JSON as the text that PostgreSQL stores: whatever it could not hold, or would change without a word, is refused.
 *
 * @since 0.1.0
 */
import * as Effect from "effect/Effect"
import * as Predicate from "effect/Predicate"

const maxDepth = 256

/** Why there is no text. */
export interface Refusal {
  readonly reason: "InvalidPayload" | "TooLarge"
  readonly message: string
}

/**
 * Writes a JSON value as text, once, or says why JSON or PostgreSQL could not hold it as it is. `what` it is goes into the
 * message; `limit` is in bytes.
 */
export const of = (value: unknown, limit: number, what: string): string | Refusal => {
  const invalid = (problem: string): Refusal => ({ reason: "InvalidPayload", message: `${what} ${problem}` })
  let text: string
  try {
    const problem = problemOfValue(value, 1)
    if (problem !== undefined) return invalid(problem)
    text = JSON.stringify(value)
  } catch (cause) {
    return invalid(`cannot be written as JSON: ${String(cause)}`)
  }
  // Only control characters and lone surrogates are written as \uXXXX, so a text without one needs no closer look.
  if (text.includes("\\u") && /(?<!\\)(?:\\\\)*\\u(?:0000|d[89a-f])/i.test(text)) {
    return invalid("holds a NUL character or a lone surrogate")
  }
  if (text.length > limit || (text.length * 3 > limit && new TextEncoder().encode(text).length > limit)) {
    return { reason: "TooLarge", message: `${what} is over ${limit} bytes` }
  }
  return text
}

/** Says what JSON would change without a word: a codec of `Schema.Any` lets everything through. */
const problemOfValue = (value: unknown, depth: number): string | undefined => {
  switch (typeof value) {
    case "string":
    case "boolean":
      return undefined
    case "number":
      return Number.isFinite(value) ? undefined : `holds ${value}, which JSON cannot`
    case "object": {
      if (value === null) return undefined
      if (depth > maxDepth) return `is nested deeper than ${maxDepth}`
      // What was looked at would not be what is written.
      if ("toJSON" in value && typeof value.toJSON === "function") return "holds an object with a toJSON of its own"
      if (Array.isArray(value)) {
        for (const item of value) {
          const problem = problemOfValue(item, depth + 1)
          if (problem !== undefined) return problem
        }
        return undefined
      }
      const prototype = Object.getPrototypeOf(value)
      if (prototype !== Object.prototype && prototype !== null) return "holds an object that is not a plain one"
      // By key, because `Object.values` costs 0.2 µs a job.
      for (const key in value) {
        // Sound: a key of this very object. A field that is undefined is a field that is left out.
        const item = value[key as keyof typeof value] as unknown
        const problem = item === undefined ? undefined : problemOfValue(item, depth + 1)
        if (problem !== undefined) return problem
      }
      return undefined
    }
    default:
      return `holds a ${typeof value}, which JSON cannot`
  }
}

/**
 * The same as an effect, which fails with the message.
 */
export const orFail = (value: unknown, limit: number, what: string): Effect.Effect<string, string> =>
  Effect.suspend(() => {
    const text = of(value, limit, what)
    return Predicate.isString(text) ? Effect.succeed(text) : Effect.fail(text.message)
  })
