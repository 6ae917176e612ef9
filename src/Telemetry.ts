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

/**
 * How late a scheduler saw ticks, in milliseconds.
 *
 * @category metrics
 * @since 0.1.0
 */
export const tickLateness: Metric.Histogram<number> = Metric.histogram("effect_pgqueue_tick_lateness_millis", {
  description: "How late a scheduler saw ticks of cron schedules",
  boundaries: [10, 50, 100, 500, 1000, 5000, 30_000, 300_000, 3_600_000]
})

/**
 * Jobs that schedulers of this process have enqueued for ticks.
 *
 * @category metrics
 * @since 0.1.0
 */
export const enqueuedTicks: Metric.Counter<number> = Metric.counter("effect_pgqueue_enqueued_ticks", {
  description: "Jobs enqueued for ticks of cron schedules",
  incremental: true
})

/**
 * Ticks without a job, because that of an earlier one had not ended or because somebody held the unique key.
 *
 * @category metrics
 * @since 0.1.0
 */
export const skippedTicks: Metric.Counter<number> = Metric.counter("effect_pgqueue_skipped_ticks", {
  description: "Ticks of cron schedules without a job, for the job of an earlier one or a unique key",
  incremental: true
})
