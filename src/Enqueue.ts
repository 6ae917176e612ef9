/**
 * What may enter the queue: payloads encoded and checked, options resolved, bad input refused with a typed error
 * before any SQL.
 *
 * @since 0.1.0
 */
import * as Cause from "effect/Cause"
import * as Clock from "effect/Clock"
import * as Context from "effect/Context"
import * as DateTime from "effect/DateTime"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import type * as Fiber from "effect/Fiber"
import * as Option from "effect/Option"
import * as Predicate from "effect/Predicate"
import * as Schema from "effect/Schema"
import type * as SchemaIssue from "effect/SchemaIssue"
import * as Tracer from "effect/Tracer"
import * as JsonText from "./JsonText.ts"
import { maxPayloadBytes } from "./Migrations.ts"
import { longestDelay } from "./RetryPolicy.ts"
import type * as Store from "./Store.ts"
import * as Uuid from "./Uuid.ts"

/**
 * An enqueue was refused where it entered; nothing was sent to the database.
 *
 * **Details**
 *
 * - `InvalidPayload`: the payload does not fit its schema, or is not JSON that PostgreSQL can hold (NUL, lone surrogates,
 *   nesting deeper than 256).
 * - `InvalidOption`: an option is out of range; the message names it.
 * - `TooLarge`: the encoded payload is over 1 MiB, or the metadata over 64 KiB.
 * - `ForeignTransaction`: the fiber is in a transaction of another `SqlClient`, so the job would not be part of it.
 *
 * @category errors
 * @since 0.1.0
 */
export class EnqueueError extends Schema.TaggedError<EnqueueError>()("EnqueueError", {
  kind: Schema.String,
  message: Schema.String,
  reason: Schema.Literals(["InvalidPayload", "InvalidOption", "TooLarge", "ForeignTransaction"])
}) {}

/**
 * The identifier of a job: a UUID, version 7 unless the caller chose another.
 *
 * @category models
 * @since 0.1.0
 */
export type JobId = string & { readonly "~JobId": never }

/**
 * What an enqueue did. `existing`: nothing was inserted, `id` is that of the job that holds the key or the id.
 * `replaced`: a waiting job got the new payload, `id` is that job's.
 *
 * @category models
 * @since 0.1.0
 */
export interface Enqueued {
  readonly id: JobId
  readonly status: "inserted" | "existing" | "replaced"
}

/**
 * Text that travels with a job and is not part of its payload: tenant, request id, source.
 *
 * @category models
 * @since 0.1.0
 */
export type Metadata = { readonly [key: string]: string }

/**
 * When a job runs among the due ones of its queue: smaller runs first. `"high"` is 2, `"normal"` 5, `"low"` 8.
 *
 * @category models
 * @since 0.1.0
 */
export type Priority = "high" | "normal" | "low" | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9

/**
 * A uniqueness rule: at most one job of the kind holds `key` at a time.
 *
 * @category models
 * @since 0.1.0
 */
export interface Unique {
  /** 1 to 1 024 characters. Stored hashed, together with the kind. */
  readonly key: string
  /** Hold the key for this long from the enqueue, whatever becomes of the job. Default: no period, see `until`. */
  readonly period?: Duration.Input | undefined
  /** Without a `period`, when the key is released: as soon as the job starts, or when it has ended. Default `"finished"`. */
  readonly until?: "started" | "finished" | undefined
  /**
   * What an enqueue does that meets a holder. `"keep"` (default) leaves it alone. `"replace"` gives a holder that is
   * still waiting the new payload and options but not a new due time. `"debounce"` also starts its delay again.
   */
  readonly onConflict?: "keep" | "replace" | "debounce" | undefined
}

/**
 * The options of one enqueue. They win over the definition's.
 *
 * @category models
 * @since 0.1.0
 */
export interface EnqueueOptions {
  /** A UUID of the caller's choice: enqueueing the same id again inserts nothing. Default: a new UUIDv7. */
  readonly id?: string | undefined
  /** Start no earlier than this from now, by the database's clock. Default 0. Not together with `runAt`. */
  readonly delay?: Duration.Input | undefined
  /** Start no earlier than this. An instant in the past means now. */
  readonly runAt?: DateTime.DateTime | Date | undefined
  /** Default: the definition's. */
  readonly priority?: Priority | undefined
  /**
   * The line to stand in: 1 to 128 characters. Default: the definition's. A worker serves the queues that the definitions of
   * its jobs name: in another one the job waits until there is such a worker.
   */
  readonly queue?: string | undefined
  /** How many attempts may fail before the job is discarded: 1 to 1 000. Default: the definition's. */
  readonly maxAttempts?: number | undefined
  /** How long one attempt may run. Default: the definition's. */
  readonly timeout?: Duration.Input | undefined
  /** A key, or a rule. Default: the definition's. */
  readonly unique?: string | Unique | undefined
  /** At most 64 KiB as JSON. */
  readonly metadata?: Metadata | undefined
}

/** What a definition says of its jobs, resolved. */
export interface Defaults {
  readonly queue: string
  readonly priority: Priority
  readonly maxAttempts: number
  readonly timeout: Duration.Input | undefined
  readonly unique: ((payload: never) => string | Unique | undefined) | undefined
}

const uuidPattern = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/i
/** Whether a text can be the id of a job: a UUID. */
export const isJobId = (id: string): id is JobId => uuidPattern.test(id)

/** 9999-12-31, well inside what both JavaScript and PostgreSQL can hold. */
const latest = 253_402_214_400_000

const priorities = { high: 2, normal: 5, low: 8 } as const

/** What the options of an enqueue come to: the same for all jobs that share them. */
interface Terms extends Omit<Store.NewJob, "id" | "payload" | "trace" | "unique" | "awaited"> {
  /** `undefined`: one is made. */
  readonly id: string | undefined
  /** `undefined`: the definition's. */
  readonly unique: string | Unique | undefined
}

/** What all jobs of one call have from their caller. */
interface Origin {
  readonly trace: string | undefined
  readonly clock: Clock.Clock
}

/** Encodes payloads of one kind and resolves their options. */
export interface Resolver<P extends Schema.Top> {
  /** Builds the job to insert, or fails with what is wrong. */
  readonly one: (
    input: P["~type.make.in"],
    own?: EnqueueOptions | ((payload: P["Type"]) => EnqueueOptions)
  ) => Effect.Effect<Store.NewJob, EnqueueError, P["EncodingServices"]>
  /** The same for many, of which the first that is wrong is told. */
  readonly all: (
    inputs: Iterable<P["~type.make.in"]>,
    own?: EnqueueOptions | ((payload: P["Type"], index: number) => EnqueueOptions)
  ) => Effect.Effect<ReadonlyArray<Store.NewJob>, EnqueueError, P["EncodingServices"]>
}

/**
 * How much of a bulk is encoded before others have their turn, in characters of JSON: what takes some 4 ms. Each job counts
 * for more than its text.
 */
const charactersPerTurn = 262_144
const charactersPerJob = 200

/**
 * Makes what turns payloads and options into jobs to insert.
 *
 * **Details**
 *
 * No effect is run, and no fiber involved, for a schema that answers at once, as all do that need neither services nor
 * time: of a bulk of 1 000 that is 2 of the 6 µs which each job cost before it was sent.
 */
export const resolver = <P extends Schema.Top>(options: {
  readonly kind: string
  readonly schema: P
  readonly encode: (value: P["Type"]) => Effect.Effect<unknown, Schema.SchemaError, P["EncodingServices"]>
  /** A payload that is left out is `undefined`, not an empty struct. */
  readonly takesUndefined: boolean
  readonly defaults: Defaults
}): Resolver<P> => {
  const { defaults, encode, kind, schema, takesUndefined } = options
  const refuse = (reason: EnqueueError["reason"]) => (message: string) => new EnqueueError({ kind, reason, message })
  const invalid = refuse("InvalidOption")
  const misfit = refuse("InvalidPayload")
  // An issue has no text of its own; the error around it has.
  const misfitIssue = (issue: SchemaIssue.Issue) => misfit(new Schema.SchemaError(issue).message)
  const misfitError = (error: Schema.SchemaError) => misfit(error.message)

  const unreadable = (cause: unknown) =>
    Effect.fail(misfit(`the payload cannot be read: ${cause instanceof Error ? cause.message : typeof cause}`))
  /** A getter of the input may throw: a throw, or what the codec makes of it. */
  const reading = <A, R>(read: () => Effect.Effect<A, EnqueueError, R>): Effect.Effect<A, EnqueueError, R> => {
    try {
      const result = read()
      const died = isExit(result) && Exit.isFailure(result) ? result.cause.reasons.find(Cause.isDieReason) : undefined
      return died === undefined ? result : unreadable(died.defect)
    } catch (cause) {
      return unreadable(cause)
    }
  }

  const termsOf = (own: EnqueueOptions): Terms | EnqueueError => {
    const queue = own.queue ?? defaults.queue
    const nameProblem = problemOfName("kind", kind, 200) ?? problemOfName("queue", queue, 128)
    if (nameProblem !== undefined) return invalid(nameProblem)
    if (own.id !== undefined && !isJobId(own.id)) return invalid("id must be a UUID")

    const priority = own.priority ?? defaults.priority
    const level = Predicate.isString(priority) ? priorities[priority] : priority
    if (!Number.isInteger(level) || level < 0 || level > 9) {
      return invalid(`priority must be "high", "normal", "low" or an integer from 0 to 9`)
    }
    const maxAttempts = own.maxAttempts ?? defaults.maxAttempts
    if (!Number.isInteger(maxAttempts) || maxAttempts < 1 || maxAttempts > 1000) {
      return invalid("maxAttempts must be an integer from 1 to 1000")
    }
    const timeout = millisOf(own.timeout ?? defaults.timeout)
    if (timeout !== undefined && !(timeout >= 1 && timeout <= longestDelay)) {
      return invalid("timeout must be at least a millisecond and finite")
    }
    if (own.delay !== undefined && own.runAt !== undefined) {
      return invalid("delay and runAt exclude each other")
    }
    const delay = millisOf(own.delay) ?? 0
    if (!(delay >= 0 && delay <= longestDelay)) return invalid("delay must not be negative and must be finite")
    const runAt = own.runAt === undefined ? undefined : epochMillis(own.runAt)
    if (runAt !== undefined && !(Math.abs(runAt) <= latest)) {
      return invalid("runAt must be a valid date before the year 10000")
    }

    if (own.metadata !== undefined && !isMetadata(own.metadata)) {
      return misfit("metadata must be an object whose values are text")
    }
    const metadata = own.metadata === undefined ? "{}" : JsonText.of(own.metadata, 65_536, "metadata")
    if (!Predicate.isString(metadata)) return refuse(metadata.reason)(metadata.message)
    return {
      id: own.id?.toLowerCase(),
      kind,
      queue,
      priority: level,
      delay,
      runAt,
      maxAttempts,
      timeout,
      metadata,
      unique: own.unique,
      idGiven: own.id !== undefined
    }
  }
  let standard: Terms | undefined
  const standardTerms = (): Terms | EnqueueError => {
    if (standard !== undefined) return standard
    const terms = termsOf({})
    // A refusal is made anew each time: it has a stack.
    return terms instanceof EnqueueError ? terms : standard = terms
  }

  const jobOf = (
    payload: P["Type"],
    encoded: unknown,
    termsFor: (payload: P["Type"]) => Terms | EnqueueError,
    { clock, trace }: Origin
  ): Store.NewJob | EnqueueError => {
    const json = JsonText.of(encoded, maxPayloadBytes, "the payload")
    if (!Predicate.isString(json)) return refuse(json.reason)(json.message)
    const terms = termsFor(payload)
    if (terms instanceof EnqueueError) return terms
    const rule = terms.unique ??
      // Sound: the rule of this very definition.
      (defaults.unique as ((payload: P["Type"]) => string | Unique | undefined) | undefined)?.(payload)
    const unique = rule === undefined ? undefined : resolveUnique(rule)
    if (Predicate.isString(unique)) return invalid(unique)
    return {
      id: terms.id ?? Uuid.next(clock.currentTimeMillisUnsafe()),
      kind,
      queue: terms.queue,
      priority: terms.priority,
      delay: terms.delay,
      runAt: terms.runAt,
      maxAttempts: terms.maxAttempts,
      timeout: terms.timeout,
      payload: json,
      metadata: terms.metadata,
      trace,
      unique,
      idGiven: terms.idGiven === true
    }
  }

  /** An `Exit` when the schema answers at once. */
  const build = (
    input: P["~type.make.in"],
    termsFor: (payload: P["Type"]) => Terms | EnqueueError,
    origin: Origin
  ): Effect.Effect<Store.NewJob, EnqueueError, P["EncodingServices"]> =>
    Effect.flatMapEager(
      reading(() =>
        Effect.mapErrorEager(schema.makeEffect(input === undefined && !takesUndefined ? {} : input), misfitIssue)
      ),
      (payload) =>
        Effect.flatMapEager(reading(() => Effect.mapErrorEager(encode(payload), misfitError)), (encoded) => {
          const job = jobOf(payload, encoded, termsFor, origin)
          return job instanceof EnqueueError ? Effect.fail(job) : Effect.succeed(job)
        })
    )

  return {
    one: (input, own) =>
      Effect.withFiber((fiber) =>
        build(
          input,
          Predicate.isNullish(own)
            ? standardTerms
            : (payload) => termsOf(Predicate.isFunction(own) ? own(payload) : own),
          originOf(fiber)
        )
      ),
    all: (inputs, own) =>
      Effect.withFiber((fiber) => {
        const all = Array.isArray(inputs) ? inputs : Array.from(inputs)
        const jobs: Array<Store.NewJob> = []
        const origin = originOf(fiber)
        let shared: Terms | EnqueueError | undefined
        const termsFor = Predicate.isFunction(own)
          ? (payload: P["Type"]) => termsOf(own(payload, jobs.length))
          : () => shared ??= termsOf(own ?? {})
        const go = (): Effect.Effect<ReadonlyArray<Store.NewJob>, EnqueueError, P["EncodingServices"]> => {
          let characters = 0
          while (jobs.length < all.length) {
            if (characters > charactersPerTurn) return Effect.flatMap(Effect.yieldNow, go)
            const built = build(all[jobs.length], termsFor, origin)
            if (!isExit(built)) {
              return Effect.flatMap(built, (job) => {
                jobs.push(job)
                return go()
              })
            }
            if (Exit.isFailure(built)) return Exit.failCause(built.cause)
            jobs.push(built.value)
            characters += built.value.payload.length + charactersPerJob
          }
          return Effect.succeed(jobs)
        }
        return go()
      })
  }
}

/** Whether an effect has its outcome already. */
const isExit = <A, E, R>(effect: Effect.Effect<A, E, R>): effect is Exit.Exit<A, E> => Exit.isExit(effect)

const originOf = (fiber: Fiber.Fiber<unknown, unknown>): Origin => ({
  trace: traceParent(fiber.context),
  clock: fiber.getRef(Clock.Clock)
})

/**
 * Returns why a name cannot be used, or `undefined` when it can.
 */
export const problemOfName = (what: string, name: string, limit: number): string | undefined =>
  !Predicate.isString(name) || name.length === 0 || name.length > limit || !name.isWellFormed() ||
    // eslint-disable-next-line no-control-regex -- control characters are what is looked for
    /[\u0000-\u001f\u007f]/.test(name)
    ? `${what} must be 1 to ${limit} characters without control characters`
    : undefined

/** Milliseconds of an option; `NaN` when it is not a duration. */
export const millisOf = (input: Duration.Input | undefined): number | undefined => {
  if (input === undefined) return undefined
  // Duration takes NaN for zero; what comes of `Number(undefined)` must not pass as "now".
  if (Number.isNaN(input)) return NaN
  return Option.match(Duration.fromInput(input), { onNone: () => NaN, onSome: Duration.toMillis })
}

/** Milliseconds since the epoch; `NaN` when it is no date. */
export const epochMillis = (date: DateTime.DateTime | Date): number =>
  DateTime.isDateTime(date) ? DateTime.toEpochMillis(date) : Predicate.isDate(date) ? date.getTime() : NaN

const isMetadata = (metadata: unknown): boolean =>
  Predicate.isObject(metadata) && Object.values(metadata).every(Predicate.isString)

const resolveUnique = (rule: string | Unique): Store.UniqueRule | string => {
  const { key, onConflict = "keep", period, until = "finished" } = Predicate.isString(rule) ? { key: rule } : rule
  if (!Predicate.isString(key) || key.length === 0 || key.length > 1024 || !key.isWellFormed() || key.includes("\0")) {
    return "unique.key must be 1 to 1024 characters without NUL or lone surrogates"
  }
  const held = millisOf(period)
  if (held !== undefined && !(held >= 1 && held <= longestDelay)) {
    return "unique.period must be at least a millisecond and finite"
  }
  if (until !== "started" && until !== "finished") return `unique.until must be "started" or "finished"`
  if (onConflict !== "keep" && onConflict !== "replace" && onConflict !== "debounce") {
    return `unique.onConflict must be "keep", "replace" or "debounce"`
  }
  return { key, period: held, until, onConflict }
}

/** The enqueuer's span as a W3C traceparent, so that the run is its child. */
const traceParent = (context: Context.Context<never>): string | undefined => {
  const span = Context.getOption(context, Tracer.ParentSpan)
  return Option.isSome(span) && /^[0-9a-f]{32}$/.test(span.value.traceId) && /^[0-9a-f]{16}$/.test(span.value.spanId)
    ? `00-${span.value.traceId}-${span.value.spanId}-${span.value.sampled ? "01" : "00"}`
    : undefined
}
