/** The jobs of the demo. The producer imports this file only; `worker.ts` handles them. */
import { Schedule, Schema } from "effect"
import { CronScheduler, Job } from "../../src/index.ts"

/** The schema that holds the queue. */
export const schema = "pgqueue_demo"

// Short, because the demo is; the default begins with a second and ends with half an hour.
const soon = Schedule.spaced("200 millis")

/** Enqueued in the transaction that inserts the order; some of these roll back. */
export class ConfirmOrder extends Job.make("order.confirm", {
  payload: { order: Schema.Int },
  priority: "high"
}) {}

/** A queue of its own, so that letters never wait for images. */
export class SendEmail extends Job.make("email.send", {
  payload: { to: Schema.String, subject: Schema.String },
  queue: "mail",
  retry: soon
}) {}

/** Slow and in no hurry. */
export class ResizeImage extends Job.make("image.resize", {
  payload: { image: Schema.Int, width: Schema.Int },
  priority: "low"
}) {}

/** Enqueued with a delay. */
export class SendReminder extends Job.make("reminder.send", {
  payload: { user: Schema.Int }
}) {}

export class Unreachable extends Schema.TaggedError<Unreachable>()("Unreachable", { url: Schema.String }) {}

/** Fails until its third attempt. */
export class DeliverWebhook extends Job.make("webhook.deliver", {
  payload: { url: Schema.String },
  error: Unreachable,
  retry: soon
}) {}

/** Poisoned: it always dies. */
export class PrintInvoice extends Job.make("invoice.print", {
  payload: { invoice: Schema.Int },
  maxAttempts: 3,
  retry: soon
}) {}

/** Does nothing: what is measured with it is the queue. */
export class Ping extends Job.make("ping", { queue: "pings" }) {}

/** Enqueued every second, by whichever of the worker processes is first. */
export class CountStock extends Job.make("stock.count") {}

export const everySecond = CronScheduler.make("stock", { every: "1 second", job: CountStock })
