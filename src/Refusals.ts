/**
 * Taking apart what the database refuses together, to find the rows that are why.
 *
 * @since 0.1.0
 */

/**
 * How many refusals in a row may be those of single rows, once these are spread: among a thousand, halving finds one in ten.
 * More, without anything that goes through, are of everything, or nearly.
 */
const most = 60

/** How far what is refused together has been taken apart. */
export interface Refusals {
  /** How many more in a row are taken for those of single rows. */
  left: number
  isSpread: boolean
}

/** Nothing has been refused. */
export const make = (): Refusals => ({ left: most, isSpread: false })

/** Notes that a part went through. */
export const passed = (refusals: Refusals): void => {
  refusals.left = most
}

/** Counts one more, and returns whether a single row may be why. */
export const isOfOne = (refusals: Refusals): boolean => --refusals.left >= 0

/** Two halves of what is to be tried in parts. */
export const halved = <A>(all: ReadonlyArray<A>): readonly [ReadonlyArray<A>, ReadonlyArray<A>] => {
  const middle = all.length >> 1
  return [all.slice(0, middle), all.slice(middle)]
}

/**
 * Two halves of what was refused, the first time spread before: rows that are refused for the same reason often stand
 * together, and halving would find nothing else.
 */
export const halves = <A>(
  refusals: Refusals,
  all: ReadonlyArray<A>
): readonly [ReadonlyArray<A>, ReadonlyArray<A>] => {
  if (refusals.isSpread) return halved(all)
  refusals.isSpread = true
  return halved(
    all.map((one, index) => ({ one, at: index * 0.618_033_988_75 % 1 })).toSorted((a, b) => a.at - b.at)
      .map(({ one }) => one)
  )
}
