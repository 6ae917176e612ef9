/** The whole of it, with `npm run faults` and its soak; otherwise the short form, as a part of `npm test`. */
export const full = process.env["FAULTS"] !== undefined

/**
 * How long something may take, in milliseconds. The figures are those of the full form, whose results are looked at; the short
 * one runs on machines that have other things to do, and is to fail for what is wrong.
 */
export const limit = (millis: number): number => full ? millis : 4 * millis
