/** When a failed attempt is followed by another, and how long an attempt may take. */
import assert from "node:assert/strict"
import "./support/database.ts"
import { NodeRuntime } from "@effect/platform-node"
import { PgClient } from "@effect/sql-pg"
import { Config, Effect, Layer, Option, Ref, Schedule, Schema } from "effect"
import { Job, JobQueue, Worker } from "../src/index.ts"

// #region retries
class Refused extends Schema.TaggedError<Refused>()("Refused", { code: Schema.Finite }) {}

class Charge extends Job.make("charge", {
  payload: { card: Schema.String },
  error: Refused,
  maxAttempts: 5,
  timeout: "500 millis", // of one attempt
  retry: {
    schedule: Schedule.exponential("100 millis"),
    while: (error) => error.code !== 402 // "no funds": trying again is pointless
  }
}) {}

const ChargeHandler = Charge.toLayer(
  Effect.fn("Charge")(function*({ card }) {
    const { attempt, lastFailure } = yield* Job.Current
    const before = Option.isSome(lastFailure) ? lastFailure.value._tag : "nothing"
    yield* note(`${card}: attempt ${attempt}, after ${before}`)
    if (card === "empty") return yield* new Refused({ code: 402 })
    if (attempt === 1) return yield* new Refused({ code: 503 })
    if (attempt === 2) return yield* Effect.never // interrupted by the timeout
  })
)
// #endregion

const notes = Ref.makeUnsafe<ReadonlyArray<string>>([])
const note = (text: string) => Effect.andThen(Effect.log(text), Ref.update(notes, (all) => [...all, text]))

const PgLive = PgClient.layerConfig({ url: Config.Redacted("DATABASE_URL") })
const QueueLive = JobQueue.layer().pipe(Layer.provideMerge(PgLive))

const main = Effect.gen(function*() {
  yield* Charge.enqueue({ card: "empty" })
  yield* Charge.enqueue({ card: "flaky" })
  // Each run ends when nothing is due; what is due later needs another, or a worker that stays.
  const { completed } = yield* Worker.runUntilEmpty({ jobs: [Charge] }).pipe(
    Effect.repeat({ schedule: Schedule.spaced("100 millis"), until: ({ completed }) => completed === 1 })
  )
  assert.equal(completed, 1)
  assert.deepEqual(yield* Ref.get(notes), [
    "empty: attempt 1, after nothing",
    "flaky: attempt 1, after nothing",
    "flaky: attempt 2, after Failed",
    "flaky: attempt 3, after TimedOut"
  ])
  yield* Effect.log("flaky completed on its third attempt, empty was discarded after its first")
})

main.pipe(Effect.timeout("20 seconds"), Effect.provide([ChargeHandler, QueueLive]), NodeRuntime.runMain)
