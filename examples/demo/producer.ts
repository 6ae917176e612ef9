/** The producer: enqueues the jobs, in every way there is, and writes down what shall become of each. */
import { Effect, Number, Schema } from "effect"
import { SqlClient } from "effect/sql"
import type { Job } from "../../src/index.ts"
import * as jobs from "./jobs.ts"
import * as ledger from "./ledger.ts"

const { Ledger } = ledger

class PaymentDeclined extends Schema.TaggedError<PaymentDeclined>()("PaymentDeclined", {
  /** The job that was rolled back. */
  job: Schema.String
}) {}

/** Writes a plan for each, and returns how many there are. */
const expect = Effect.fnUntraced(function*(
  definition: Job.Any,
  enqueued: ReadonlyArray<{ readonly id: string }>,
  more?: Partial<ledger.Plan>
) {
  const { plan } = yield* Ledger
  yield* plan(
    enqueued.map(({ id }) => ({
      job: id,
      phase: "mix",
      kind: definition._tag,
      expected: "completed",
      starts: 1,
      delay: 0,
      ...more
    }))
  )
  return enqueued.length
})

const range = (n: number) => Array.from({ length: Math.ceil(n) }, (_, index) => index + 1)

/** One order: its row and its job commit together, or neither does. */
const placeOrder = Effect.fn("placeOrder")(
  function*(order: number) {
    const sql = yield* SqlClient.SqlClient
    const { id } = yield* jobs.ConfirmOrder.enqueue({ order })
    yield* sql`insert into ${sql(`${ledger.schema}.order`)} (number, job) values (${order}, ${id})`
    if (order % 4 === 0) return yield* new PaymentDeclined({ job: id })
    return yield* expect(jobs.ConfirmOrder, [{ id }])
  },
  (transaction) => Effect.flatMap(SqlClient.SqlClient, (sql) => sql.withTransaction(transaction)),
  Effect.catchTag(
    "PaymentDeclined",
    ({ job }) => expect(jobs.ConfirmOrder, [{ id: job }], { expected: "nothing", starts: 0 })
  )
)

/** Enqueues everything of the main phase; `scale` 1 is a few thousand jobs. */
export const enqueueMix = Effect.fn("enqueueMix")(function*(scale: number) {
  const sql = yield* SqlClient.SqlClient

  // In bulk: all or none, in one transaction.
  const images = jobs.ResizeImage.enqueueAll(range(1500 * scale).map((image) => ({ image, width: 640 }))).pipe(
    Effect.flatMap((enqueued) => expect(jobs.ResizeImage, enqueued))
  )
  // One by one, from many fibers at once: the queue sends them together.
  const emails = Effect.forEach(
    range(1000 * scale),
    (n) => jobs.SendEmail.enqueue({ to: `user${n}@example.com`, subject: "Hello" }),
    { concurrency: "unbounded" }
  ).pipe(Effect.flatMap((enqueued) => expect(jobs.SendEmail, enqueued)))

  const orders = Effect.forEach(range(400 * scale), placeOrder, { concurrency: 5 })

  const reminders = Effect.forEach(
    [1000, 2000, 3000],
    (delay) =>
      jobs.SendReminder.enqueueAll(range(60 * scale).map((user) => ({ user })), { delay }).pipe(
        Effect.flatMap((enqueued) => expect(jobs.SendReminder, enqueued, { delay }))
      )
  )

  const webhooks = jobs.DeliverWebhook.enqueueAll(range(200 * scale).map((n) => ({ url: `https://example.com/${n}` })))
    .pipe(Effect.flatMap((enqueued) => expect(jobs.DeliverWebhook, enqueued, { starts: 3 })))

  const invoices = jobs.PrintInvoice.enqueueAll(range(20 * scale).map((invoice) => ({ invoice }))).pipe(
    Effect.flatMap((enqueued) => expect(jobs.PrintInvoice, enqueued, { expected: "discarded", starts: 3 }))
  )
  // From SQL, as a trigger or another language would, and with a payload that no handler can read.
  const undecodable = sql<{ id: string }>`
    select ${sql(jobs.schema)}.enqueue('email.send', '{"to": 42}', queue => 'mail', max_attempts => 2)::text as id
  `.pipe(Effect.flatMap((enqueued) => expect(jobs.SendEmail, enqueued, { expected: "discarded", starts: 0 })))

  const counts = yield* Effect.all([images, emails, orders, reminders, webhooks, invoices, undecodable], {
    concurrency: "unbounded"
  })
  return Number.sumAll(counts.flat())
})

/** Enqueues pings one after the other, with time for each to run before the next. */
export const enqueuePings = Effect.fn("enqueuePings")(function*(phase: "warm-up" | "latency", times: number) {
  const enqueued = yield* Effect.forEach(range(times), () => Effect.tap(jobs.Ping.enqueue(), Effect.sleep("20 millis")))
  return yield* expect(jobs.Ping, enqueued, { phase })
})

/** Enqueues pings all at once. */
export const enqueueBurst = Effect.fn("enqueueBurst")(function*(scale: number) {
  return yield* expect(jobs.Ping, yield* jobs.Ping.enqueueAll(range(5000 * scale).map(() => undefined)), {
    phase: "burst"
  })
})
