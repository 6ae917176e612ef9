/**
 * A job queue for Effect applications on the PostgreSQL they already run.
 *
 * @since 0.1.0
 */

/** Look at jobs and act on them: cancel, retry, delete, redrive. */
export * as Admin from "./Admin.ts"
/** What a job is: define it, enqueue it, handle it. */
export * as Job from "./Job.ts"
/** The service producers use, and its layer. */
export { JobQueue, JobQueueError, type Options as JobQueueOptions, type Stats } from "./JobQueue.ts"
/** What the processes do for all of them, and how long finished jobs are kept. */
export * as Maintenance from "./Maintenance.ts"
/** Runs the jobs of one process. */
export * as Worker from "./Worker.ts"
/** What the queue measures of itself. */
export * as Telemetry from "./Telemetry.ts"
/** Enqueues jobs at certain times, once for each. */
export * as CronScheduler from "./CronScheduler.ts"
