/**
 * What the queue measures of itself, as Effect metrics.
 *
 * @since 0.1.0
 */
import type * as Duration from "effect/Duration"
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
 * How full the server's queue of notifications is, from 0 to 1. From a half on it is logged: somebody listens and holds a
 * transaction open, and when it is full, jobs are found by polling alone.
 *
 * @category metrics
 * @since 0.1.0
 */
export const notificationQueueUsage: Metric.Gauge<number> = Metric.gauge("effect_pgqueue_notification_queue_usage", {
  description: "How full the server's queue of notifications is, from 0 to 1"
})

/**
 * Turns of the tasks that the processes share, taken by this one. The attribute `task` of this and the next three says which:
 * `rescue`, `parking`, `audit`, `cleanup` or `keys`.
 *
 * @category metrics
 * @since 0.1.0
 */
export const taskRuns: Metric.Counter<number> = Metric.counter("effect_pgqueue_task_runs", {
  description: "Turns of shared tasks that this process has taken",
  incremental: true
})

/**
 * Turns that failed. What they have left is done by the next one.
 *
 * @category metrics
 * @since 0.1.0
 */
export const taskFailures: Metric.Counter<number> = Metric.counter("effect_pgqueue_task_failures", {
  description: "Turns of shared tasks that failed",
  incremental: true
})

/**
 * Jobs that were rescued, parked or found in no place, finished jobs and unique keys that were removed.
 *
 * @category metrics
 * @since 0.1.0
 */
export const taskRows: Metric.Counter<number> = Metric.counter("effect_pgqueue_task_rows", {
  description: "Rows that shared tasks have dealt with",
  incremental: true
})

/**
 * How long turns that succeeded took, in milliseconds.
 *
 * @category metrics
 * @since 0.1.0
 */
export const taskDuration: Metric.Histogram<Duration.Duration> = Metric.timer("effect_pgqueue_task_duration", {
  description: "How long turns of shared tasks took"
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
