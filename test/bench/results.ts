/** What a run has found, and the middles of it. */
import type { Values } from "./bench.ts"
import type { Name } from "./peer.ts"
import { median } from "./statistics.ts"

/** One measurement. */
export interface Measurement {
  readonly case: string
  readonly peer: Name
  readonly round: number
  readonly at: string
  /** How busy the machine was before it, as processes in the last minute. */
  readonly load: number
  /** How long it took, in seconds. */
  readonly took: number
  readonly values?: Values
  /** Why there are no values. */
  readonly failed?: string
}

/** A run. */
export interface Results {
  readonly machine: Readonly<Record<string, string | number>>
  readonly software: Readonly<Record<string, string>>
  readonly options: Readonly<Record<string, string | number>>
  readonly measurements: ReadonlyArray<Measurement>
}

/** The values of a number, by round. */
const byRound = (results: Results, name: string, peer: Name, value: string): ReadonlyMap<number, number> =>
  new Map(
    results.measurements.flatMap(({ case: its, peer: one, round, values }) => {
      const found = its === name && one === peer ? values?.[value] : undefined
      return found === undefined || !Number.isFinite(found) ? [] : [[round, found] as const]
    })
  )

/** The middle, least and greatest of some numbers. */
export interface Middle {
  readonly median: number
  readonly least: number
  readonly most: number
}

const middleOf = (values: ReadonlyArray<number>): Middle | undefined =>
  values.length === 0 ? undefined : { median: median(values), least: Math.min(...values), most: Math.max(...values) }

/** A number over all rounds. */
export const middle = (results: Results, name: string, peer: Name, value: string): Middle | undefined =>
  middleOf([...byRound(results, name, peer, value).values()])

/** A number of ours over another: round by round, because those two were measured one after the other. */
export const ratio = (
  results: Results,
  ours: { readonly case: string; readonly value: string },
  other: { readonly case: string; readonly peer: Name }
): Middle | undefined => {
  const others = byRound(results, other.case, other.peer, ours.value)
  return middleOf(
    [...byRound(results, ours.case, "ours", ours.value)].flatMap(([round, value]) => {
      const base = others.get(round)
      return base === undefined || base === 0 ? [] : [value / base]
    })
  )
}
