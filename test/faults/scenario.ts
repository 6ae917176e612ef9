/** How a scenario is written: an id, what it does, and what it measured. */
import { layer } from "@effect/vitest"
import { Effect, type Layer, type Scope } from "effect"
import { full } from "./form.ts"
import { makeStage, type Stage, type StageOptions, Victim } from "./stage.ts"

/** What a scenario has measured, as it is to be read; numbers are milliseconds. */
export type Figures = Readonly<Record<string, string | number>>

declare module "vitest" {
  interface TaskMeta {
    figures?: Figures
  }
}

/** What there is to say of a scenario. */
export interface Options {
  /** It is a part of the short form, too. */
  readonly short?: boolean
  /** What this machine is without, if it cannot be played here. */
  readonly without?: string | undefined
  /** How many minutes it may take; 3 unless told otherwise. */
  readonly minutes?: number
}

/** Registers a scenario. */
export type Scenario = (
  id: string,
  what: string,
  options: Options & StageOptions,
  body: (stage: Stage) => Effect.Effect<Figures, unknown, Scope.Scope | Victim>
) => void

/** Groups scenarios that play on one server, each with a stage of its own. */
export const scenarios = (
  title: string,
  define: (scenario: Scenario) => void,
  victim: Layer.Layer<Victim> = Victim.layer()
): void => {
  const played: Array<Parameters<Scenario>> = []
  define((...scenario) => {
    if (full || scenario[2].short === true) played.push(scenario)
  })
  // No server for nobody.
  if (played.length === 0) return
  layer(victim, { excludeTestServices: true, timeout: 60_000 })(title, (it) => {
    for (const [id, what, options, body] of played) {
      const on = options.without === undefined ? it.effect : it.effect.skip
      on(
        `${id}: ${what}`,
        (context) =>
          Effect.map(Effect.scoped(Effect.flatMap(makeStage(options), body)), (figures) => {
            context.task.meta.figures = figures
          }),
        (options.minutes ?? 3) * 60_000
      )
    }
  })
}
