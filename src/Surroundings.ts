/**
 * What is around a run: the context its handler sees, with the job, a span, log annotations and a scope of its own.
 *
 * By hand, and not by `withSpan`, `scoped` and `provideService` around each run, because that is most of what a job costs
 * its process. What does not change from run to run is looked up once.
 *
 * @since 0.1.0
 */
import * as Clock from "effect/Clock"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import type * as Exit from "effect/Exit"
import * as LogLevel from "effect/LogLevel"
import * as Option from "effect/Option"
import * as References from "effect/References"
import * as Scope from "effect/Scope"
import * as Tracer from "effect/Tracer"
import * as Bounded from "./Bounded.ts"
import { Current, type Info } from "./Current.ts"

/** What is around one run. */
export interface Surrounding {
  /** That of {@link Surroundings.informed}, with the span and the scope. */
  readonly context: Context.Context<never>
  readonly scope: Scope.Closeable
  readonly span: Tracer.Span
}

/** What is around all runs of one handler. */
export interface Surroundings {
  /** The worker's context and the handler's own. */
  readonly context: Context.Context<never>
  /** That, with the job: what decodes its payload sees it. */
  readonly informed: (info: Info) => Context.Context<never>
  /** Begins the span, as a child of the trace the job was enqueued in, and opens the scope. `at` is now. */
  readonly begin: (informed: Context.Context<never>, info: Info, trace: string | null, at: number) => Surrounding
  /** Ends the span. The scope has been closed. `at` is now. */
  readonly end: (surrounding: Surrounding, exit: Exit.Exit<unknown, unknown>, at: number) => void
}

/** Says of which job a span is. */
const tell = (span: Tracer.Span, info: Info): void => {
  span.attribute("messaging.system", "effect-pgqueue")
  span.attribute("messaging.destination.name", info.queue)
  span.attribute("messaging.message.id", info.id)
  span.attribute("job.kind", info.kind)
  span.attribute("job.attempt", info.attempt)
}

/** Makes the spans of one handler's runs. */
interface Spans {
  readonly make: (info: Info, trace: string | null, begun: bigint) => Tracer.Span
  /** What the wall clock showed at a moment of the monotonic one. */
  readonly nanosAt: (at: number) => bigint
}

/**
 * A span that nobody exports. It is made when somebody looks at it: made at once, with its times and what it says of its
 * job, it costs 0.6 µs a run.
 */
class Unseen implements Tracer.Span {
  readonly _tag = "Span"
  readonly name: string
  readonly #spans: Spans
  readonly #info: Info
  readonly #trace: string | null
  readonly #begunAt: number
  #end: { readonly at: number; readonly exit: Exit.Exit<unknown, unknown> } | undefined = undefined
  #made: Tracer.Span | undefined = undefined

  constructor(name: string, spans: Spans, info: Info, trace: string | null, begunAt: number) {
    this.name = name
    this.#spans = spans
    this.#info = info
    this.#trace = trace
    this.#begunAt = begunAt
  }

  get #span(): Tracer.Span {
    if (this.#made === undefined) {
      this.#made = this.#spans.make(this.#info, this.#trace, this.#spans.nanosAt(this.#begunAt))
      if (this.#end !== undefined) this.#made.end(this.#spans.nanosAt(this.#end.at), this.#end.exit)
    }
    return this.#made
  }

  get spanId(): string {
    return this.#span.spanId
  }
  get traceId(): string {
    return this.#span.traceId
  }
  get parent(): Option.Option<Tracer.AnySpan> {
    return this.#span.parent
  }
  get annotations(): Context.Context<never> {
    return this.#span.annotations
  }
  get status(): Tracer.SpanStatus {
    return this.#span.status
  }
  get attributes(): ReadonlyMap<string, unknown> {
    return this.#span.attributes
  }
  get links(): ReadonlyArray<Tracer.SpanLink> {
    return this.#span.links
  }
  get sampled(): boolean {
    return this.#span.sampled
  }
  get kind(): Tracer.SpanKind {
    return this.#span.kind
  }
  end(endTime: bigint, exit: Exit.Exit<unknown, unknown>): void {
    this.#span.end(endTime, exit)
  }
  /** Ends it for whoever looks at it from now on. */
  endAt(at: number, exit: Exit.Exit<unknown, unknown>): void {
    if (this.#made === undefined) this.#end = { at, exit }
    else this.#made.end(this.#spans.nanosAt(at), exit)
  }
  attribute(key: string, value: unknown): void {
    this.#span.attribute(key, value)
  }
  event(name: string, startTime: bigint, attributes?: Record<string, unknown>): void {
    this.#span.event(name, startTime, attributes)
  }
  addLinks(links: ReadonlyArray<Tracer.SpanLink>): void {
    this.#span.addLinks(links)
  }
}

const parentOf = (trace: string | null): Option.Option<Tracer.AnySpan> => {
  const found = trace === null ? null : /^00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})$/.exec(trace)
  return found === null
    ? Option.none()
    : Option.some(Tracer.externalSpan({ traceId: found[1]!, spanId: found[2]!, sampled: found[3] === "01" }))
}

const nameOf = (info: Info): string => `job ${info.kind}`

const noStack = () => undefined

/**
 * Looks up in a context what is around every run in it.
 */
export const make = (context: Context.Context<never>): Surroundings => {
  const clock = Context.get(context, Clock.Clock)
  const logged = Context.get(context, References.CurrentLogAnnotations)
  const frame = Context.get(context, References.CurrentStackFrame)
  const tracer = Context.get(context, References.TracerEnabled) ? Context.get(context, Tracer.Tracer) : undefined
  const timed = Context.get(context, References.TracerTimingEnabled)
  const annotations = Context.get(context, References.TracerSpanAnnotations)
  const links = Context.get(context, References.TracerSpanLinks)
  const sampled = !LogLevel.isGreaterThan(
    Context.get(context, Tracer.MinimumTraceLevel),
    Context.get(context, Tracer.CurrentTraceLevel)
  )
  const time = () => timed ? clock.currentTimeNanosUnsafe() : 0n

  /** What `Effect.makeSpan` makes in this context. */
  const spanOf = (name: string, info: Info, trace: string | null, startTime: bigint): Tracer.Span => {
    const parent = parentOf(trace)
    const root = Option.isNone(parent)
    // Tracing is off, and Effect has a span that stands for none.
    if (tracer === undefined) {
      return Effect.runSyncWith(context)(Effect.makeSpan(name, { root, parent: Option.getOrUndefined(parent) }))
    }
    const span = tracer.span({
      name,
      parent,
      annotations: Context.empty(),
      links: links.slice(),
      startTime,
      kind: "consumer",
      root,
      sampled: sampled && (root || parent.value.sampled)
    })
    for (const key in annotations) span.attribute(key, annotations[key])
    tell(span, info)
    return span
  }

  const unseen: Spans | undefined = tracer !== Tracer.nativeTracer ? undefined : {
    make: (info, trace, begun) => spanOf(nameOf(info), info, trace, begun),
    nanosAt: (at) => timed ? time() - BigInt(Math.round((Bounded.monotonic(clock) - at) * 1_000_000)) : 0n
  }

  return {
    context,
    informed: (info) =>
      Context.add(
        Context.add(context, References.CurrentLogAnnotations, {
          ...logged,
          "job.id": info.id,
          "job.kind": info.kind,
          "job.queue": info.queue,
          "job.attempt": info.attempt
        }),
        Current,
        info
      ),
    begin: (informed, info, trace, at) => {
      const name = nameOf(info)
      const span = unseen === undefined
        ? spanOf(name, info, trace, time())
        : new Unseen(name, unseen, info, trace, at)
      const scope = Scope.makeUnsafe()
      return {
        span,
        scope,
        context: Context.add(
          Context.add(
            Context.add(informed, References.CurrentStackFrame, { name, stack: noStack, parent: frame }),
            Tracer.ParentSpan,
            span
          ),
          Scope.Scope,
          scope
        )
      }
    },
    end: ({ span }, exit, at) => {
      if (span instanceof Unseen) span.endAt(at, exit)
      else if (span.status._tag !== "Ended") span.end(time(), exit)
    }
  }
}
