/** Middles and edges. */

const sorted = (values: Iterable<number>) => Float64Array.from(values).toSorted()

/** The value below which this part of all lies; NaN of nothing. */
export const quantile = (values: Iterable<number>, part: number): number => {
  const all = sorted(values)
  return all.length === 0 ? NaN : all[Math.min(all.length - 1, Math.floor(part * all.length))]!
}

/** The middle value, or the mean of the two middle ones. */
export const median = (values: Iterable<number>): number => {
  const all = sorted(values)
  return all.length === 0 ? NaN : (all[(all.length - 1) >> 1]! + all[all.length >> 1]!) / 2
}

/** Three significant digits. */
export const round = (value: number): number => value === 0 ? 0 : Number(value.toPrecision(3))

/** The quantiles that latencies are reported with. */
export const spread = (values: ReadonlyArray<number>) => ({
  count: values.length,
  p50: round(quantile(values, 0.5)),
  p95: round(quantile(values, 0.95)),
  p99: round(quantile(values, 0.99)),
  max: round(values.length === 0 ? NaN : quantile(values, 1))
})
