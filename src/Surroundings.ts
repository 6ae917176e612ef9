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

/** Whose run it is. */
export interface Subject {
  readonly info: Info
  readonly kind: string
  /** Of whoever enqueued it. */
  readonly trace: string | null
}

/** What is around all runs of one handler. */
export interface Surroundings {
  /** The worker's context and the handler's own. */
  readonly context: Context.Context<never>
  /** That, with the job: what decodes its payload sees it. */
  readonly informed: (subject: Subject) => Context.Context<never>
  /** Begins the span, as a child of the trace the job was enqueued in. `at` is now. */
  readonly begin: (subject: Subject, at: number) => Services
  /** Ends the span. The scope has been closed. `at` is now. */
  readonly end: (services: Services, exit: Exit.Exit<unknown, unknown>, at: number) => void
}

/** Says on a span of which job it is. */
const annotate = (span: Tracer.Span, info: Info): void => {
  span.attribute("messaging.system", "effect-pgqueue")
  span.attribute("messaging.destination.name", info.queue)
  span.attribute("messaging.message.id", info.id)
  span.attribute("job.kind", info.kind)
  span.attribute("job.attempt", info.attempt)
}

/** The log annotations of a run: which job it is. */
const annotationsOf = (logged: Readonly<Record<string, unknown>>, info: Info): Readonly<Record<string, unknown>> => ({
  ...logged,
  "job.id": info.id,
  "job.kind": info.kind,
  "job.queue": info.queue,
  "job.attempt": info.attempt
})

/**
 * The services of one run, as the map of its context: its own over those that all runs of its handler have.
 *
 * What few handlers ask for is made when it is asked for. As five `Context.add` they cost 0.9 µs and 1.9 KB a run.
 */
export class Services implements ReadonlyMap<string, unknown> {
  readonly size: number
  readonly span: Tracer.Span
  readonly #base: ReadonlyMap<string, unknown>
  readonly #logged: Readonly<Record<string, unknown>>
  readonly #frame: References.StackFrame
  readonly #subject: Subject
  #annotations: Readonly<Record<string, unknown>> | undefined = undefined
  #scope: Scope.Closeable | undefined = undefined
  #exit: Exit.Exit<unknown, unknown> | undefined = undefined
  #map: ReadonlyMap<string, unknown> | undefined = undefined

  constructor(
    base: ReadonlyMap<string, unknown>,
    size: number,
    logged: Readonly<Record<string, unknown>>,
    frame: References.StackFrame,
    span: Tracer.Span,
    subject: Subject
  ) {
    this.#base = base
    this.size = size
    this.#logged = logged
    this.#frame = frame
    this.span = span
    this.#subject = subject
  }

  /** Closes the scope. */
  close(exit: Exit.Exit<unknown, unknown>): Effect.Effect<void> | undefined {
    this.#exit = exit
    return this.#scope === undefined ? undefined : Scope.closeUnsafe(this.#scope, exit)
  }

  get(key: string): unknown {
    switch (key) {
      case Tracer.ParentSpan.key:
        return this.span
      case References.CurrentStackFrame.key:
        return this.#frame
      case Current.key:
        return this.#subject.info
      case References.CurrentLogAnnotations.key:
        return this.#annotations ??= annotationsOf(this.#logged, this.#subject.info)
      case Scope.Scope.key:
        return this.#scope ??= this.#open()
      default:
        return this.#base.get(key)
    }
  }

  #open(): Scope.Closeable {
    const scope = Scope.makeUnsafe()
    // Asked for by something that has outlived the run.
    if (this.#exit !== undefined) Scope.closeUnsafe(scope, this.#exit)
    return scope
  }

  has(key: string): boolean {
    return own.has(key) || this.#base.has(key)
  }

  get #all(): ReadonlyMap<string, unknown> {
    if (this.#map === undefined) {
      const map = new Map(this.#base)
      for (const key of own) map.set(key, this.get(key))
      this.#map = map
    }
    return this.#map
  }

  entries(): MapIterator<[string, unknown]> {
    return this.#all.entries()
  }
  keys(): MapIterator<string> {
    return this.#all.keys()
  }
  values(): MapIterator<unknown> {
    return this.#all.values()
  }
  forEach(each: (value: unknown, key: string, map: ReadonlyMap<string, unknown>) => void): void {
    this.#all.forEach(each)
  }
  [Symbol.iterator](): MapIterator<[string, unknown]> {
    return this.#all[Symbol.iterator]()
  }
}

/** The services that each run has of its own. */
const own: ReadonlySet<string> = new Set([
  Tracer.ParentSpan.key,
  References.CurrentStackFrame.key,
  Current.key,
  References.CurrentLogAnnotations.key,
  Scope.Scope.key
])

/** Makes the spans of one handler's runs. */
interface Spans {
  readonly make: (subject: Subject, begun: bigint) => Tracer.Span
  /** What the wall clock showed at a moment of the monotonic one. */
  readonly nanosAt: (at: number) => bigint
}

/**
 * A span that nobody exports, made when somebody looks at it: made at once, with its times and what it says of its job, it
 * costs 0.6 µs a run.
 */
class LazySpan implements Tracer.Span {
  readonly _tag = "Span"
  readonly name: string
  readonly #spans: Spans
  readonly #subject: Subject
  readonly #begunAt: number
  #end: { readonly at: number; readonly exit: Exit.Exit<unknown, unknown> } | undefined = undefined
  #made: Tracer.Span | undefined = undefined

  constructor(name: string, spans: Spans, subject: Subject, begunAt: number) {
    this.name = name
    this.#spans = spans
    this.#subject = subject
    this.#begunAt = begunAt
  }

  get #span(): Tracer.Span {
    if (this.#made === undefined) {
      this.#made = this.#spans.make(this.#subject, this.#spans.nanosAt(this.#begunAt))
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

const nameOf = ({ kind }: Subject): string => `job ${kind}`

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
  const spanOf = (name: string, subject: Subject, startTime: bigint): Tracer.Span => {
    const parent = parentOf(subject.trace)
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
    annotate(span, subject.info)
    return span
  }

  const lazy: Spans | undefined = tracer !== Tracer.nativeTracer ? undefined : {
    make: (subject, begun) => spanOf(nameOf(subject), subject, begun),
    nanosAt: (at) => timed ? time() - BigInt(Math.round((Bounded.monotonic(clock) - at) * 1_000_000)) : 0n
  }

  const base = context.mapUnsafe
  const size = new Set([...base.keys(), ...own]).size
  return {
    context,
    informed: (subject) =>
      Context.add(
        Context.add(context, References.CurrentLogAnnotations, annotationsOf(logged, subject.info)),
        Current,
        subject.info
      ),
    begin: (subject, at) => {
      const name = nameOf(subject)
      const span = lazy === undefined ? spanOf(name, subject, time()) : new LazySpan(name, lazy, subject, at)
      return new Services(base, size, logged, { name, stack: noStack, parent: frame }, span, subject)
    },
    end: ({ span }, exit, at) => {
      try {
        if (span instanceof LazySpan) span.endAt(at, exit)
        else if (span.status._tag !== "Ended") span.end(time(), exit)
      } catch {
        // What the application's tracer cannot take is no reason to run a job again.
      }
    }
  }
}
