/**
 * What the queue measures of itself, as Effect metrics.
 *
 * @since 0.1.0
 */
import * as Metric from "effect/Metric"

/**
 * How long the event loop of this process was last held up, in milliseconds. Beyond half a heartbeat it is logged.
 *
 * @category metrics
 * @since 0.1.0
 */
export const eventLoopLag: Metric.Gauge<number> = Metric.gauge("effect_pgqueue_event_loop_lag_millis", {
  description: "How long the event loop of a worker's process was last held up"
})

/**
 * Jobs that were found in no place, neither in line nor in a lease, and put back. It must stay 0.
 *
 * @category metrics
 * @since 0.1.0
 */
export const misplacedJobs: Metric.Counter<number> = Metric.counter("effect_pgqueue_misplaced_jobs", {
  description: "Jobs that were found in no place and put back in line",
  incremental: true
})
