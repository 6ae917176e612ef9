/** What an operator does: look at a job and its attempts, cancel, retry, redrive after an outage, delete. */
import assert from "node:assert/strict"
import "./support/database.ts"
import { NodeRuntime } from "@effect/platform-node"
import { PgClient } from "@effect/sql-pg"
import { Config, DateTime, Effect, Layer, Option, Schema } from "effect"
import { Admin, Job, JobQueue, Worker } from "../src/index.ts"

class Unavailable extends Schema.TaggedError<Unavailable>()("Unavailable", { status: Schema.Finite }) {}

class Deliver extends Job.make("deliver", { payload: { to: Schema.String }, error: Unavailable, maxAttempts: 1 }) {}

let outage = true
const DeliverHandler = Deliver.toLayer(
  Effect.fn("Deliver")(function*({ to }) {
    if (outage) return yield* new Unavailable({ status: 503 })
    yield* Effect.log(`delivered to ${to}`)
  })
)

const PgLive = PgClient.layerConfig({ url: Config.Redacted("DATABASE_URL") })
const QueueLive = JobQueue.layer().pipe(Layer.provideMerge(PgLive))

// #region look
const report = Effect.fn("report")(function*(id: string) {
  const job = Option.getOrThrow(yield* Admin.get(id))
  yield* Effect.log(`${job.kind} is ${job.status} after ${job.attempt} of ${job.maxAttempts} attempts`)
  for (const { endedAt, error, message, tag } of yield* Admin.attempts(id)) {
    yield* Effect.log(`${DateTime.formatIso(endedAt)} ${tag}: ${message.split("\n")[0]}`, Option.getOrNull(error))
  }
})
// #endregion

// #region act
const operate = Effect.fn("operate")(function*(waiting: string, discarded: string) {
  yield* Admin.cancel(waiting, { reason: "no longer wanted" }) // a running one is interrupted, on any node
  yield* Admin.retry(discarded) // one job, with all its attempts
  const more = yield* Admin.redrive({ kind: "deliver", within: "1 day" }) // every other discarded one
  yield* Admin.delete(waiting) // what has ended
  return more
}, Effect.catchTag("Stale", (stale) => Effect.die(stale))) // it was not in a state for that any more
// #endregion

const main = Effect.gen(function*() {
  const first = yield* Deliver.enqueue({ to: "ada" })
  yield* Deliver.enqueue({ to: "bob" })
  const later = yield* Deliver.enqueue({ to: "eve" }, { delay: "1 day" })
  yield* Worker.runUntilEmpty({ jobs: [Deliver] })
  yield* report(first.id)
  assert.equal((yield* Admin.attempts(first.id))[0]?.tag, "Failed")

  outage = false
  const more = yield* operate(later.id, first.id)
  const { completed } = yield* Worker.runUntilEmpty({ jobs: [Deliver] })
  yield* Effect.log(`${more} redriven, ${completed} completed`)
  assert.deepEqual([more, completed], [1, 2])
  assert.ok(Option.isNone(yield* Admin.get(later.id)))
})

main.pipe(Effect.provide([DeliverHandler, QueueLive]), NodeRuntime.runMain)
