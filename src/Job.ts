/**
 * What a job is: one value that names a kind of work, its payload, errors and result. Producers enqueue it, workers
 * handle it.
 *
 * @since 0.1.0
 */
import type * as Duration from "effect/Duration"
import type * as Effect from "effect/Effect"
import type * as Exit from "effect/Exit"
import type * as Layer from "effect/Layer"
import type * as Option from "effect/Option"
import type * as Schema from "effect/Schema"
import type * as Scope from "effect/Scope"
import type { SqlError } from "effect/sql/SqlError"
import type { ExecuteError } from "./Awaiting.ts"
import type { Current } from "./Current.ts"
import * as Definition from "./Definition.ts"
import type * as Enqueue from "./Enqueue.ts"
import type { JobQueue } from "./JobQueue.ts"

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
export type { HandlerOptions, Options } from "./Definition.ts"
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

type In<P extends Schema.Top> = Definition.In<P>
type Arguments<P extends Schema.Top, O> = Definition.MayOmit<In<P>> extends true ? [payload?: In<P>, options?: O]
  : [payload: In<P>, options?: O]
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

/**
 * Any definition that a worker can list.
 *
 * @category models
 * @since 0.1.0
 */
export interface Any {
  readonly [Definition.TypeId]: { readonly handler: unknown; readonly definition: Definition.Definition }
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
  readonly [Definition.TypeId]: { readonly handler: Handler<Kind>; readonly definition: Definition.Definition }
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
    ...args: Arguments<P, Enqueue.EnqueueOptions>
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
   * Takes the options of {@link enqueue}, and `wait`: how long to wait for the end of the job, by default without end. The
   * enqueue comes before that, and in an outage takes up to ten seconds of its own. A job that already holds the key or
   * the id is waited for in place of a new one. Interrupting the wait does not stop the job.
   *
   * Fails with the job's typed error when it was discarded with one, with {@link ExecuteError} when it ended otherwise,
   * was not over in time, or when the fiber is in an open transaction (it would wait for itself).
   *
   * **Gotchas**
   *
   * A handler that executes a job of its own queue keeps its slot while it waits: with all slots so taken, nobody runs the
   * job.
   */
  readonly execute: (
    ...args: Arguments<P, Enqueue.EnqueueOptions & { readonly wait?: Duration.Input | undefined }>
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
   * Takes any text, as it comes from a route or from {@link ExecuteError}; what is no id is that of no job.
   *
   * The failure is the job's typed error when it was discarded with one, and {@link ExecuteError} otherwise; `Pruned`
   * when there is no such job of this kind. A stored result that no longer fits its schema is a defect of the exit. Inside
   * `sql.withTransaction` of the queue's client it sees what that has enqueued.
   */
  readonly poll: (
    id: string
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
   *
   * **Gotchas**
   *
   * That check sees the `SqlClient` the layer was built with, not one inside a service that the handler calls, or one that
   * it provides itself: what is written there is not part of the transaction.
   */
  readonly toLayer: <R>(
    handler: Run<P, A, E, R>,
    options?: Definition.HandlerOptions
  ) => HandlerLayer<Handler<Kind>, R, P, A, E>
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
  readonly [Definition.TypeId]: { readonly handler: FamilyHandler<Prefix>; readonly definition: Definition.Definition }
  readonly _tag: `${Prefix}${string}`
  readonly prefix: Prefix
  readonly queue: Q
  readonly payloadSchema: P

  /** Returns the definition of one kind of this family, to enqueue it or to handle it by itself. */
  of<const Kind extends `${Prefix}${string}`>(kind: Kind): Job<Kind, P, A, E, Q>

  /** Builds the layer that handles every kind with this prefix, except those with a handler or a longer prefix. */
  readonly toLayer: <R>(
    handler: Run<P, A, E, R, [kind: `${Prefix}${string}`]>,
    options?: Definition.HandlerOptions
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
  P extends Definition.Fields | Schema.Top = typeof Schema.Void,
  A extends Schema.Top = typeof Schema.Void,
  E extends Schema.Top = typeof Schema.Never,
  const Q extends string = "default"
>(kind: Kind, options?: Definition.Options<P, A, E, Q>): Job<Kind, Definition.AsSchema<P>, A, E, Q> =>
  // Sound: `Definition.make` builds exactly the members of `Job`; the type parameters are phantom at run time.
  Definition.make(kind, false, options ?? {}) as unknown as Job<Kind, Definition.AsSchema<P>, A, E, Q>

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
  P extends Definition.Fields | Schema.Top = typeof Schema.Void,
  A extends Schema.Top = typeof Schema.Void,
  E extends Schema.Top = typeof Schema.Never,
  const Q extends string = "default"
>(prefix: Prefix, options?: Definition.Options<P, A, E, Q>): Family<Prefix, Definition.AsSchema<P>, A, E, Q> => {
  const codecs = Definition.codecs(options ?? {})
  const self = Definition.make(prefix, true, options ?? {}, codecs)
  const kindOf = (kind: string) => {
    // What stands for the prefix of the family stands for that of each of its kinds.
    const aliases = options?.aliases?.map((alias) => alias + kind.slice(prefix.length))
    return Definition.make(kind, false, { ...options, aliases }, codecs)
  }
  // Sound: as in `make`; a kind of a family is the same definition under its own name.
  return Object.assign(self, { prefix, of: kindOf }) as unknown as Family<Prefix, Definition.AsSchema<P>, A, E, Q>
}
