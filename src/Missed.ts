/**
 * Which ticks of a schedule that is due become jobs: the ones that are on time, and of those that were missed as many as the
 * schedule says.
 *
 * @since 0.1.0
 */
import * as Ticks from "./Ticks.ts"

/**
 * A tick later than this, in milliseconds, was missed: nobody was there when it was due. Long enough for another scheduler to
 * step in for one that died or is stopped.
 */
export const grace = 30_000

/** More ticks than come in the grace time. */
const most = 1000

/** What is known of a schedule that is due. Times are milliseconds since the epoch. */
export interface Due {
  /** The tick that is due; `null` when none has been computed yet. */
  readonly due: number | null
  readonly previous: number | null
  readonly now: number
  /** How many missed ticks are made up, the latest. */
  readonly missed: number
  /** How old, in milliseconds, a missed tick may be that is made up. */
  readonly missedWindow: number
}

/** Whether the tick that is due was missed, and others may have been. */
export const isLate = ({ due, now }: Pick<Due, "due" | "now">): boolean => due !== null && now - due > grace

/** What to do with it. */
export interface Plan {
  /** The ticks that become jobs, in order. */
  readonly ticks: ReadonlyArray<number>
  /** The latest tick that has passed; `undefined` when none has. */
  readonly previous: number | undefined
  /** The next one; `undefined` when there will be none. */
  readonly next: number | undefined
  /** Whether ticks were missed. */
  readonly missed: boolean
}

/**
 * Decides what becomes of the ticks of a schedule up to now.
 *
 * **Details**
 *
 * The stored tick is one whatever the expression says of it: it was promised. When it is on time, so is every one after it.
 */
export const plan = (ticks: Ticks.Ticks, row: Due): Plan => {
  const { due, now } = row
  if (due === null) {
    return {
      ticks: [],
      previous: undefined,
      next: Ticks.next(ticks, Math.max(now, row.previous ?? now)),
      missed: false
    }
  }
  const next = Ticks.next(ticks, now)
  if (!isLate(row)) {
    const fired = [due, ...Ticks.between(ticks, due, now, most)]
    return { ticks: fired, previous: fired[fired.length - 1], next, missed: false }
  }
  const wanted = Math.max(1, row.missed)
  const later = Ticks.last(ticks, due, now, wanted)
  const passed = later.length < wanted ? [due, ...later] : later
  const made = row.missed === 0 ? [] : passed.filter((tick) => tick >= now - row.missedWindow)
  return { ticks: made, previous: passed[passed.length - 1], next, missed: true }
}
