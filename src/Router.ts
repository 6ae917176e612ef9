/**
 * Which handler a kind goes to: an exact kind wins over a family, the longest prefix among families.
 *
 * @since 0.1.0
 */
import type * as Context from "effect/Context"
import type * as Definition from "./Definition.ts"
import * as Handling from "./Handling.ts"
import type * as Job from "./Job.ts"

/**
 * The handlers of one worker.
 */
export interface Router {
  /** The kinds with a handler of their own, aliases included. */
  readonly kinds: ReadonlyArray<string>
  /** The prefixes of the families, longest first. */
  readonly prefixes: ReadonlyArray<string>
  readonly find: (kind: string) => Route | undefined
  /** A kind, or a prefix, that two of the listed jobs handle. */
  readonly ambiguous: string | undefined
  /** The transactional handlers, with the context that each was built in. */
  readonly transactional: ReadonlyArray<{ readonly name: string; readonly context: Context.Context<never> }>
}

/** A handler, and the kind to tell it: under the family's own prefix, where the job came in under an alias of it. */
export interface Route {
  readonly handling: Handling.Handling
  readonly kind: string
}

/**
 * Reads the handlers of the listed jobs from the context that the worker's layer was given.
 */
export const make = (jobs: ReadonlyArray<Job.Any>, context: Context.Context<never>): Router => {
  const exact = new Map<string, Route>()
  const families: Array<{ readonly prefix: string; readonly handling: Handling.Handling }> = []
  const transactional: Array<Router["transactional"][number]> = []
  let ambiguous: string | undefined
  for (const job of jobs) {
    const { definition } = job["~effect-pgqueue/Job"]
    // Sound: the layer's type requires this very key for every listed job.
    const registered = context.mapUnsafe.get(definition.key.key) as Definition.Registered
    const handling = Handling.make(definition, registered)
    if (registered.transactional) transactional.push({ name: definition.name, context: registered.context })
    for (const name of [definition.name, ...definition.aliases]) {
      if (definition.family ? families.some(({ prefix }) => prefix === name) : exact.has(name)) ambiguous = name
      if (definition.family) families.push({ prefix: name, handling })
      else exact.set(name, { handling, kind: name })
    }
  }
  families.sort((a, b) => b.prefix.length - a.prefix.length)
  return {
    kinds: [...exact.keys()],
    prefixes: families.map(({ prefix }) => prefix),
    find: (kind) => {
      const own = exact.get(kind)
      if (own !== undefined) return own
      const family = families.find(({ prefix }) => kind.startsWith(prefix))
      return family === undefined
        ? undefined
        : { handling: family.handling, kind: family.handling.definition.name + kind.slice(family.prefix.length) }
    },
    ambiguous,
    transactional
  }
}
