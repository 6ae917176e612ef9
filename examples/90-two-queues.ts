/** Two queues in one application: each is a layer of its own, and what uses it gets it provided right there. */
import assert from "node:assert/strict"
import "./support/database.ts"
import { NodeRuntime } from "@effect/platform-node"
import { PgClient } from "@effect/sql-pg"
import { Config, Effect, Layer, Queue, Schema } from "effect"
import { Job, JobQueue, Maintenance, Worker } from "../src/index.ts"

class Charge extends Job.make("charge", { payload: { cents: Schema.Int } }) {}
class Send extends Job.make("send", { payload: { to: Schema.String } }) {}

const done = Effect.runSync(Queue.unbounded<string>())
const ChargeHandler = Charge.toLayer(({ cents }) => Queue.offer(done, `charged ${cents}`))
const SendHandler = Send.toLayer(({ to }) => Queue.offer(done, `sent to ${to}`))

// #region queues
// One constant each, and everything that uses a queue is built on its constant. Two databases would be two clients.
const PgLive = PgClient.layerConfig({ url: Config.Redacted("DATABASE_URL") })
const Billing = JobQueue.layer({ schema: "billing" }).pipe(Layer.provideMerge(PgLive))
const Mail = JobQueue.layer({ schema: "mail" }).pipe(Layer.provideMerge(PgLive))

const BillingLive = Layer.merge(
  Worker.layer({ jobs: [Charge] }).pipe(Layer.provide(ChargeHandler)),
  Maintenance.layer({ cleanup: { strategy: "archive" } }) // of this queue only
).pipe(Layer.provide(Billing))
const MailLive = Worker.layer({ jobs: [Send] }).pipe(Layer.provide(SendHandler), Layer.provide(Mail))

// Two services in one context would be the same service: provide each where it is used.
const produce = Effect.all([
  Charge.enqueue({ cents: 990 }).pipe(Effect.provide(Billing)),
  Send.enqueue({ to: "ada" }).pipe(Effect.provide(Mail))
])
// #endregion

const main = Effect.gen(function*() {
  yield* produce
  const all = [yield* Queue.take(done), yield* Queue.take(done)].toSorted()
  yield* Effect.log(all.join(", "))
  assert.deepEqual(all, ["charged 990", "sent to ada"])
})

main.pipe(Effect.provide(Layer.merge(BillingLive, MailLive)), NodeRuntime.runMain)
