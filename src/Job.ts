/**
 * What a job is: one value that names a kind of work, its payload, errors and result. Producers enqueue it, workers
 * handle it.
 *
 * @since 0.1.0
 */
import * as Context from "effect/Context"
import type * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Layer from "effect/Layer"
import * as Option from "effect/Option"
import * as Schema from "effect/Schema"
import type * as Scope from "effect/Scope"
import type { SqlError } from "effect/sql/SqlError"
import { ExecuteError } from "./Awaiting.ts"
import type { Current, Ended, Unhandled } from "./Current.ts"
import * as Enqueue from "./Enqueue.ts"
import { JobQueue } from "./JobQueue.ts"
import type { Retry } from "./RetryPolicy.ts"
import type * as Store from "./Store.ts"

export { ExecuteError } from "./Awaiting.ts"
export {
  cancel,
  Current,
  discard,
  type Ended,
  type Info,
  type Middleware,
  progress,
  snooze,
  type Unhandled
} from "./Current.ts"
export {
  type Enqueued,
  EnqueueError,
  type EnqueueOptions,
  type JobId,
  type Metadata,
  type Priority,
  type Unique
} from "./Enqueue.ts"
export { defaultSchedule, type Failure, type Retry } from "./RetryPolicy.ts"

const TypeId = "~effect-pgqueue/Job"

// -----------------------------------------------------------------------------
// Definitions
// -----------------------------------------------------------------------------

/**
 * The handler of one kind, as a service that a worker requires.
 *
 * @category models
 * @since 0.1.0
 */
export interface Handler<Kind extends string> {
  readonly _: unique symbol
  readonly kind: Kind
}

/**
 * The handler of every kind with a prefix, as a service that a worker requires.
 *
 * @category models
 * @since 0.1.0
 */
export interface FamilyHandler<Prefix extends string> {
  readonly _: unique symbol
  readonly prefix: Prefix
}

type Fields = Schema.Struct.Fields
type In<P extends Schema.Top> = P["~type.make.in"]
type MayOmit<I> = void extends I ? true : {} extends I ? true : false
type Arguments<P extends Schema.Top> = MayOmit<In<P>> extends true ? [payload?: In<P>, options?: Enqueue.EnqueueOptions]
  : [payload: In<P>, options?: Enqueue.EnqueueOptions]
type Run<P extends Schema.Top, A extends Schema.Top, E extends Schema.Top, R, X extends ReadonlyArray<unknown> = []> = (
  payload: P["Type"],
  ...extra: X
) => Effect.Effect<A["Type"], E["Type"], R>
type Client<P extends Schema.Top, A extends Schema.Top, E extends Schema.Top> =
  | P["EncodingServices"]
  | A["DecodingServices"]
  | E["DecodingServices"]
type Server<P extends Schema.Top, A extends Schema.Top, E extends Schema.Top> =
  | P["DecodingServices"]
  | A["EncodingServices"]
  | E["EncodingServices"]
  | E["DecodingServices"]
type HandlerLayer<H, R, P extends Schema.Top, A extends Schema.Top, E extends Schema.Top> = Layer.Layer<
  H,
  never,
  Exclude<R, Current | Scope.Scope> | Server<P, A, E>
>
type AsSchema<P> = P extends Schema.Top ? P : P extends Fields ? Schema.Struct<P> : never

/**
 * The options of a definition.
 *
 * @category models
 * @since 0.1.0
 */
export interface Options<P, A extends Schema.Top, E extends Schema.Top, Q extends string> {
  /** A schema, or the fields of a struct. Default `Schema.Void`. */
  readonly payload?: P | undefined
  /** The schema of the result, which is kept with the finished job. Default `Schema.Void`. */
  readonly success?: A | undefined
  /** The schema of the typed errors. Default `Schema.Never`. */
  readonly error?: E | undefined
  /** The line its jobs stand in. Default `"default"`. */
  readonly queue?: Q | undefined
  /** Default `"normal"`. */
  readonly priority?: Enqueue.Priority | undefined
  /** How many attempts may fail before the job is discarded: 1 to 1 000. Default 5. */
  readonly maxAttempts?: number | undefined
  /** How long one attempt may run. Default: no limit. */
  readonly timeout?: Duration.Input | undefined
  /** When a failed attempt is followed by another. Default {@link defaultSchedule}. */
  readonly retry?: Retry<E["Type"]> | undefined
  /** A uniqueness rule for every enqueue. Default: none. */
  readonly unique?: ((payload: AsSchema<P>["Type"]) => string | Enqueue.Unique | undefined) | undefined
  /** Former names of this kind; their jobs are handled as this one's. */
  readonly aliases?: ReadonlyArray<string> | undefined
}

/** What a worker reads of a definition. @internal */
export interface Definition {
  /** The kind, or the prefix of a family. */
  readonly name: string
  readonly family: boolean
  readonly aliases: ReadonlyArray<string>
  readonly retry: Retry<unknown> | undefined
  readonly payloadSchema: Schema.Top
  readonly successSchema: Schema.Top
  readonly errorSchema: Schema.Top
  readonly key: Context.Key<unknown, Registered>
}

/** What the layer of a handler provides: the function, and the context that its layer was built in. @internal */
export interface Registered {
  readonly run: (payload: unknown, kind: string) => Effect.Effect<Ended, Unhandled>
  readonly context: Context.Context<never>
  readonly transactional: boolean
}

/**
 * The options of a handler.
 *
 * @category models
 * @since 0.1.0
 */
export interface HandlerOptions {
  /**
   * Runs the handler in a transaction of the queue's `SqlClient` in which the job is settled, too: what it writes and its
   * end commit together, or not at all. Default `false`.
   *
   * The transaction is READ COMMITTED, is rolled back when the handler fails, is stopped or has lost its job, and may be
   * idle between two statements for the worker's lease time, or the job's `timeout` if that is longer. It holds one
   * connection of the application's pool for as long as the handler runs.
   */
  readonly transactional?: boolean | undefined
}

/**
 * Any definition that a worker can list.
 *
 * @category models
 * @since 0.1.0
 */
export interface Any {
  readonly [TypeId]: { readonly handler: unknown; readonly definition: Definition }
  readonly _tag: string
  readonly payloadSchema: Schema.Top
  readonly queue: string
}

/**
 * A job definition.
 *
 * @category models
 * @since 0.1.0
 */
export interface Job<
  Kind extends string,
  P extends Schema.Top,
  A extends Schema.Top,
  E extends Schema.Top,
  Q extends string
> {
  new(_: never): {}
  readonly [TypeId]: { readonly handler: Handler<Kind>; readonly definition: Definition }
  readonly _tag: Kind
  readonly queue: Q
  readonly payloadSchema: P
  readonly successSchema: A
  readonly errorSchema: E

  /**
   * Enqueues one job; inside `sql.withTransaction` of the queue's client, as part of that transaction.
   *
   * **Details**
   *
   * The payload is built with the schema's defaults, encoded and checked before any SQL. Concurrent enqueues outside a
   * transaction travel together. An outage is waited out for up to ten seconds: the id is made first, so sending it
   * again cannot insert it twice.
   *
   * Fails with {@link EnqueueError} for bad input and with `SqlError` for the database.
   */
  readonly enqueue: (
    ...args: Arguments<P>
  ) => Effect.Effect<Enqueue.Enqueued, Enqueue.EnqueueError | SqlError, JobQueue | P["EncodingServices"]>

  /**
   * Enqueues many jobs, all or none, in statements of at most 1 000 and one transaction.
   *
   * **Details**
   *
   * `options` are the same for all, or a function of the payload and its index.
   *
   * **Gotchas**
   *
   * A unique key that a transaction holds which has not ended is waited for, for about 15 s; then the whole bulk fails.
   */
  readonly enqueueAll: (
    payloads: Iterable<In<P>>,
    options?:
      | Omit<Enqueue.EnqueueOptions, "id" | "unique">
      | ((payload: P["Type"], index: number) => Enqueue.EnqueueOptions)
  ) => Effect.Effect<
    ReadonlyArray<Enqueue.Enqueued>,
    Enqueue.EnqueueError | SqlError,
    JobQueue | P["EncodingServices"]
  >

  /**
   * Enqueues one job and waits for its result, wherever it is run.
   *
   * **Details**
   *
   * Takes the options of {@link enqueue}, and `wait`: how long to wait, by default without end. A job that already holds
   * the key or the id is waited for in place of a new one. Interrupting the wait does not stop the job.
   *
   * Fails with the job's typed error when it was discarded with one, with {@link ExecuteError} when it ended otherwise,
   * was not over in time, or when the fiber is in an open transaction (it would wait for itself).
   */
  readonly execute: (
    payload: In<P>,
    options?: Enqueue.EnqueueOptions & { readonly wait?: Duration.Input | undefined }
  ) => Effect.Effect<
    A["Type"],
    E["Type"] | ExecuteError | Enqueue.EnqueueError | SqlError,
    JobQueue | Client<P, A, E>
  >

  /**
   * Looks once how a job has ended: `None` when it has not.
   *
   * **Details**
   *
   * The failure is the job's typed error when it was discarded with one, and {@link ExecuteError} otherwise; `Pruned`
   * when there is no such job. A stored result that no longer fits its schema is a defect of the exit.
   */
  readonly poll: (
    id: Enqueue.JobId
  ) => Effect.Effect<
    Option.Option<Exit.Exit<A["Type"], E["Type"] | ExecuteError>>,
    SqlError,
    JobQueue | Client<P, A, E>
  >

  /**
   * Builds the layer that handles this kind.
   *
   * **Details**
   *
   * The handler runs in the context its layer was built in, with {@link Current} and a `Scope` that is closed when the
   * run ends. To need something while building, wrap it in `Layer.unwrap`.
   *
   * With `transactional: true` it runs in the transaction that settles its job. Its `SqlClient` must be the queue's: a
   * worker with a handler built on another one does not start (`ForeignClient`).
   */
  readonly toLayer: <R>(handler: Run<P, A, E, R>, options?: HandlerOptions) => HandlerLayer<Handler<Kind>, R, P, A, E>
}

/**
 * A definition of all kinds with one prefix.
 *
 * @category models
 * @since 0.1.0
 */
export interface Family<
  Prefix extends string,
  P extends Schema.Top,
  A extends Schema.Top,
  E extends Schema.Top,
  Q extends string
> {
  new(_: never): {}
  readonly [TypeId]: { readonly handler: FamilyHandler<Prefix>; readonly definition: Definition }
  readonly _tag: `${Prefix}${string}`
  readonly prefix: Prefix
  readonly queue: Q
  readonly payloadSchema: P

  /** Returns the definition of one kind of this family, to enqueue it or to handle it by itself. */
  of<const Kind extends `${Prefix}${string}`>(kind: Kind): Job<Kind, P, A, E, Q>

  /** Builds the layer that handles every kind with this prefix, except those with a handler or a longer prefix. */
  readonly toLayer: <R>(
    handler: Run<P, A, E, R, [kind: `${Prefix}${string}`]>,
    options?: HandlerOptions
  ) => HandlerLayer<FamilyHandler<Prefix>, R, P, A, E>
}

/**
 * Defines a job.
 *
 * **Example** (A job with a typed error)
 *
 * ```ts
 * import { Job } from "effect-pgqueue"
 * import { Schema } from "effect"
 *
 * class Bounced extends Schema.TaggedError<Bounced>()("Bounced", { address: Schema.String }) {}
 *
 * class SendEmail extends Job.make("email.send", {
 *   payload: { to: Schema.String, subject: Schema.String },
 *   error: Bounced,
 *   queue: "mail",
 *   timeout: "30 seconds"
 * }) {}
 * ```
 *
 * @category constructors
 * @since 0.1.0
 */
export const make = <
  const Kind extends string,
  P extends Fields | Schema.Top = typeof Schema.Void,
  A extends Schema.Top = typeof Schema.Void,
  E extends Schema.Top = typeof Schema.Never,
  const Q extends string = "default"
>(kind: Kind, options?: Options<P, A, E, Q>): Job<Kind, AsSchema<P>, A, E, Q> =>
  // Sound: `define` builds exactly the members of `Job`; the type parameters are phantom at run time.
  define(kind, false, options ?? {}) as unknown as Job<Kind, AsSchema<P>, A, E, Q>

/**
 * Defines all kinds with a prefix at once: a router.
 *
 * **Details**
 *
 * An exact kind wins over a family, the longest prefix among families.
 *
 * **Example** (One handler for all reports)
 *
 * ```ts
 * import { Effect, Schema } from "effect"
 * import { Job } from "effect-pgqueue"
 *
 * class Reports extends Job.family("report:", { payload: { day: Schema.Int } }) {}
 *
 * const ReportsHandler = Reports.toLayer(({ day }, kind) => Effect.log(`${kind} of day ${day}`))
 *
 * const enqueue = Reports.of("report:daily").enqueue({ day: 1 })
 * ```
 *
 * @category constructors
 * @since 0.1.0
 */
export const family = <
  const Prefix extends string,
  P extends Fields | Schema.Top = typeof Schema.Void,
  A extends Schema.Top = typeof Schema.Void,
  E extends Schema.Top = typeof Schema.Never,
  const Q extends string = "default"
>(prefix: Prefix, options?: Options<P, A, E, Q>): Family<Prefix, AsSchema<P>, A, E, Q> => {
  const self = define(prefix, true, options ?? {})
  // Sound: as in `make`; a kind of a family is the same definition under its own name.
  return Object.assign(self, {
    prefix,
    of: (kind: string) => define(kind, false, options ?? {})
  }) as unknown as Family<Prefix, AsSchema<P>, A, E, Q>
}

const define = (
  name: string,
  isFamily: boolean,
  options: Options<Fields | Schema.Top, Schema.Top, Schema.Top, string>
) => {
  const payloadSchema: Schema.Top = options.payload === undefined
    ? Schema.Void
    : Schema.isSchema(options.payload)
    // Sound: the bound of P leaves only schemas and fields.
    ? options.payload as Schema.Top
    : Schema.Struct(options.payload as Fields)
  const defaults: Enqueue.Defaults = {
    queue: options.queue ?? "default",
    priority: options.priority ?? "normal",
    maxAttempts: options.maxAttempts ?? 5,
    timeout: options.timeout,
    // Sound: it is called with a payload of this definition only.
    unique: options.unique as Enqueue.Defaults["unique"]
  }
  const definition: Definition = {
    name,
    family: isFamily,
    aliases: options.aliases ?? [],
    retry: options.retry as Retry<unknown> | undefined,
    payloadSchema,
    successSchema: options.success ?? Schema.Void,
    errorSchema: options.error ?? Schema.Never,
    key: Context.Service<unknown, Registered>(`effect-pgqueue/Job/Handler/${isFamily ? "*" : "="}${name}`)
  }
  const encode = Schema.encodeEffect(Schema.toCodecJson(payloadSchema))
  // What may be left out is `undefined` where the schema takes that, as Void does, and no fields otherwise.
  const takesUndefined = Schema.is(payloadSchema)(undefined)
  const resolve = (
    payload: unknown,
    own: Enqueue.EnqueueOptions | ((payload: unknown) => Enqueue.EnqueueOptions)
  ) =>
    Enqueue.resolve(
      name,
      payloadSchema,
      encode,
      defaults,
      payload === undefined && !takesUndefined ? {} : payload,
      own
    )

  const decodeSuccess = Schema.decodeUnknownEffect(Schema.toCodecJson(definition.successSchema))
  const decodeError = Schema.decodeUnknownEffect(Schema.toCodecJson(definition.errorSchema))
  /** What the end of a job is to whoever waits for it. */
  const resultOf = (end: Store.EndRow): Effect.Effect<unknown, unknown, unknown> => {
    if (end.status === "completed") {
      return Effect.orDie(Effect.suspend(() => decodeSuccess(JSON.parse(end.result ?? "null"))))
    }
    // Sound: what settle wrote.
    const error = end.error === null ? null : JSON.parse(end.error) as Omit<Store.AttemptRow, "n" | "at">
    const ended = new ExecuteError({
      id: end.id,
      reason: end.status === "cancelled" ? "Cancelled" : "Discarded",
      message: end.reason ?? error?.message ?? ""
    })
    if (end.status === "cancelled" || error?.tag !== "Failed") return Effect.fail(ended)
    // An error that no longer fits its schema is a job that was discarded, no more.
    return Effect.matchCauseEffect(decodeError(error.error), {
      onFailure: () => Effect.fail(ended),
      onSuccess: (typed) => Effect.fail(typed)
    })
  }

  // oxlint-disable-next-line typescript/no-extraneous-class -- a definition is a class to extend, with statics only
  return Object.assign(class {}, {
    [TypeId]: { definition },
    _tag: name,
    queue: defaults.queue,
    payloadSchema,
    successSchema: definition.successSchema,
    errorSchema: definition.errorSchema,
    enqueue: (payload: unknown, own?: Enqueue.EnqueueOptions) =>
      Effect.flatMap(JobQueue, (queue) => queue.enqueue(resolve(payload, own ?? {}))),
    enqueueAll: (
      payloads: Iterable<unknown>,
      own?: Enqueue.EnqueueOptions | ((payload: unknown, index: number) => Enqueue.EnqueueOptions)
    ) =>
      Effect.flatMap(
        JobQueue,
        (queue) =>
          queue.enqueueAll(Effect.forEach(payloads, (payload, index) =>
            resolve(
              payload,
              typeof own === "function"
                ? (made) => own(made, index)
                : own ?? {}
            )))
      ),
    execute: (
      payload: unknown,
      { wait, ...own }: Enqueue.EnqueueOptions & { readonly wait?: Duration.Input | undefined } = {}
    ) =>
      Effect.gen(function*() {
        const millis = Enqueue.millisOf(wait)
        if (Number.isNaN(millis) || millis! < 0) {
          return yield* new Enqueue.EnqueueError({
            kind: name,
            reason: "InvalidOption",
            message: "wait must be a duration"
          })
        }
        const queue = yield* JobQueue
        return yield* resultOf(yield* queue.execute(resolve(payload, own), millis))
      }),
    poll: (id: string) =>
      Effect.gen(function*() {
        const { store } = (yield* JobQueue).internal
        const pruned = new ExecuteError({ id, reason: "Pruned", message: "there is no such job" })
        if (!Enqueue.isJobId(id)) return Option.some(Exit.fail(pruned))
        const [end] = yield* store.ends([id])
        if (end === undefined) return Option.some(Exit.fail(pruned))
        return end.status === "open" ? Option.none() : Option.some(yield* Effect.exit(resultOf(end)))
      }),
    toLayer: (run: Registered["run"], handlerOptions?: HandlerOptions) =>
      Layer.effect(
        definition.key,
        Effect.map(Effect.context<never>(), (context): Registered => ({
          run,
          context,
          transactional: handlerOptions?.transactional === true
        }))
      )
  })
}
