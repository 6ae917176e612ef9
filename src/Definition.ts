/**
 * What a definition does: encodes and enqueues payloads, reads results, registers handlers. Its types are those of `Job`.
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
import { ExecuteError } from "./Awaiting.ts"
import type { Ended, Unhandled } from "./Current.ts"
import * as Database from "./Database.ts"
import * as Enqueue from "./Enqueue.ts"
import { JobQueue } from "./JobQueue.ts"
import type { Retry } from "./RetryPolicy.ts"
import type * as Store from "./Store.ts"

/** Where a definition keeps what is not for everybody. */
export const TypeId = "~effect-pgqueue/Job"

/** The fields of a struct. */
export type Fields = Schema.Struct.Fields

/** The schema that an option stands for. */
export type AsSchema<P> = P extends Schema.Top ? P : P extends Fields ? Schema.Struct<P> : never

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
  /**
   * Whether a job that has completed is kept until the cleanup. Default `true`.
   *
   * Off, it leaves nothing behind, which is a third less work for the server. Jobs that `execute` waits for are kept all
   * the same, and so are those that are cancelled or discarded. What is not kept is not found by `Admin` or `poll`, and its
   * id can be used again: sent again after its end, because an answer was lost, or as the backfill of a tick, it is a new
   * job. The worker's definition says, not that of whoever enqueues.
   */
  readonly keepCompleted?: boolean | undefined
}

/** What a payload is made of. */
export type In<P extends Schema.Top> = P["~type.make.in"]

/** Whether a payload may be left out. */
export type MayOmit<I> = void extends I ? true : {} extends I ? true : false

/** What a worker and a scheduler read of a definition. @internal */
export interface Definition {
  /** The kind, or the prefix of a family. */
  readonly name: string
  readonly family: boolean
  readonly aliases: ReadonlyArray<string>
  readonly keepCompleted: boolean
  readonly retry: Retry<unknown> | undefined
  readonly payloadSchema: Schema.Top
  readonly successSchema: Schema.Top
  readonly errorSchema: Schema.Top
  readonly key: Context.Key<unknown, Registered>
  /** Builds the job to insert. Needs what encodes the payload. */
  readonly resolve: (
    payload: unknown,
    own: Enqueue.EnqueueOptions | ((payload: unknown) => Enqueue.EnqueueOptions)
  ) => Effect.Effect<Store.NewJob, Enqueue.EnqueueError, unknown>
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
   * connection of the application's pool for as long as the handler runs. It must not `commit` or `rollback` by SQL, and
   * after a `set local role` that role must be one that may settle.
   */
  readonly transactional?: boolean | undefined
}

type AnyOptions = Options<Fields | Schema.Top, Schema.Top, Schema.Top, string>

/**
 * Makes the schemas and codecs of a definition: once for all kinds of a family, because making them costs more than an
 * enqueue (70 µs of 86 for a payload of three fields).
 */
export const codecs = (options: AnyOptions) => {
  const payloadSchema: Schema.Top = options.payload === undefined
    ? Schema.Void
    : Schema.isSchema(options.payload)
    // Sound: the bound of P leaves only schemas and fields.
    ? options.payload as Schema.Top
    : Schema.Struct(options.payload as Fields)
  const successSchema = options.success ?? Schema.Void
  const errorSchema = options.error ?? Schema.Never
  return {
    payloadSchema,
    successSchema,
    errorSchema,
    // What may be left out is `undefined` where the schema takes that, as Void does, and no fields otherwise.
    takesUndefined: Schema.is(payloadSchema)(undefined),
    encode: Schema.encodeEffect(Schema.toCodecJson(payloadSchema)),
    decodeSuccess: Schema.decodeUnknownEffect(Schema.toCodecJson(successSchema)),
    decodeError: Schema.decodeUnknownEffect(Schema.toCodecJson(errorSchema))
  }
}

/**
 * Builds what a definition is at run time: the members of `Job.Job`, untyped.
 */
export const make = (
  name: string,
  isFamily: boolean,
  options: AnyOptions,
  { decodeError, decodeSuccess, encode, errorSchema, payloadSchema, successSchema, takesUndefined } = codecs(options)
) => {
  const defaults: Enqueue.Defaults = {
    queue: options.queue ?? "default",
    priority: options.priority ?? "normal",
    maxAttempts: options.maxAttempts ?? 5,
    timeout: options.timeout,
    // Sound: it is called with a payload of this definition only.
    unique: options.unique as Enqueue.Defaults["unique"]
  }
  const jobs = Enqueue.resolver({ kind: name, schema: payloadSchema, encode, takesUndefined, defaults })
  const definition: Definition = {
    name,
    family: isFamily,
    aliases: options.aliases ?? [],
    keepCompleted: options.keepCompleted ?? true,
    retry: options.retry as Retry<unknown> | undefined,
    payloadSchema,
    successSchema,
    errorSchema,
    key: Context.Service<unknown, Registered>(`effect-pgqueue/Job/Handler/${isFamily ? "*" : "="}${name}`),
    resolve: jobs.one
  }

  /** An id may come from anywhere: what ended as another kind has no result of this one. */
  const isOurs = (end: Store.EndRow): boolean => end.kind === name || definition.aliases.includes(end.kind)
  const pruned = (id: string) => new ExecuteError({ id, reason: "Pruned", message: "there is no such job" })

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
    successSchema,
    errorSchema,
    enqueue: (payload: unknown, own?: Enqueue.EnqueueOptions) =>
      Effect.flatMap(JobQueue, (queue) => queue.enqueue(jobs.one(payload, own))),
    enqueueAll: (
      payloads: Iterable<unknown>,
      own?: Enqueue.EnqueueOptions | ((payload: unknown, index: number) => Enqueue.EnqueueOptions)
    ) => Effect.flatMap(JobQueue, (queue) => queue.enqueueAll(jobs.all(payloads, own))),
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
        const end = yield* queue.execute(jobs.one(payload, own), millis)
        return yield* isOurs(end) ? resultOf(end) : Effect.fail(pruned(end.id))
      }),
    poll: (id: string) =>
      Effect.gen(function*() {
        const { database, store } = (yield* JobQueue).internal
        if (!Enqueue.isJobId(id)) return Option.some(Exit.fail(pruned(id)))
        const [end] = yield* store.ends([id], yield* Database.inside(database))
        if (end === undefined || !isOurs(end)) return Option.some(Exit.fail(pruned(id)))
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
