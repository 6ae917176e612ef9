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
  /** Begins the span, as a child of the trace the job was enqueued in, and opens the scope. */
  readonly begin: (informed: Context.Context<never>, info: Info, trace: string | null) => Surrounding
  /** Ends the span. The scope has been closed. */
  readonly end: (surrounding: Surrounding, exit: Exit.Exit<unknown, unknown>) => void
}

/** Says of which job a span is. */
const tell = (info: Info, attribute: (key: string, value: unknown) => void): void => {
  attribute("messaging.system", "effect-pgqueue")
  attribute("messaging.destination.name", info.queue)
  attribute("messaging.message.id", info.id)
  attribute("job.kind", info.kind)
  attribute("job.attempt", info.attempt)
}

const tellAll = (annotations: Readonly<Record<string, unknown>>, attribute: (key: string, value: unknown) => void) => {
  for (const key in annotations) attribute(key, annotations[key])
}

/** A span that nobody exports: it is said of which job it is when somebody asks. */
class Unseen extends Tracer.NativeSpan {
  readonly #tell: (attribute: (key: string, value: unknown) => void) => void

  constructor(
    options: ConstructorParameters<typeof Tracer.NativeSpan>[0],
    tell: (attribute: (key: string, value: unknown) => void) => void
  ) {
    super(options)
    this.#tell = tell
  }

  override get attributes(): Map<string, unknown> {
    if (this._attributes === undefined) {
      const attributes = this._attributes = new Map()
      this.#tell((key, value) => attributes.set(key, value))
    }
    return this._attributes
  }
}

const parentOf = (trace: string | null): Option.Option<Tracer.AnySpan> => {
  const found = trace === null ? null : /^00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})$/.exec(trace)
  return found === null
    ? Option.none()
    : Option.some(Tracer.externalSpan({ traceId: found[1]!, spanId: found[2]!, sampled: found[3] === "01" }))
}

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
  const spanOf = (name: string, info: Info, trace: string | null): Tracer.Span => {
    const parent = parentOf(trace)
    const root = Option.isNone(parent)
    // Tracing is off, and Effect has a span that stands for none.
    if (tracer === undefined) {
      return Effect.runSyncWith(context)(Effect.makeSpan(name, { root, parent: Option.getOrUndefined(parent) }))
    }
    const options = {
      name,
      parent,
      annotations: Context.empty(),
      links: links.slice(),
      startTime: time(),
      kind: "consumer",
      root,
      sampled: root ? sampled : parent.value.sampled && sampled
    } as const
    if (tracer === Tracer.nativeTracer) {
      return new Unseen(options, (attribute) => {
        tellAll(annotations, attribute)
        tell(info, attribute)
      })
    }
    const span = tracer.span(options)
    const attribute = (key: string, value: unknown) => span.attribute(key, value)
    tellAll(annotations, attribute)
    tell(info, attribute)
    return span
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
    begin: (informed, info, trace) => {
      const name = `job ${info.kind}`
      const span = spanOf(name, info, trace)
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
    end: ({ span }, exit) => {
      if (span.status._tag !== "Ended") span.end(time(), exit)
    }
  }
}
