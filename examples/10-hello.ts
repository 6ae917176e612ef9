/** Define a job, enqueue it, handle it. */
import assert from "node:assert/strict"
import "./support/database.ts"
// #region hello
import { NodeRuntime } from "@effect/platform-node"
import { PgClient } from "@effect/sql-pg"
import { Config, Effect, Layer, Schema } from "effect"
import { Job, JobQueue, Worker } from "../src/index.ts"

class Greet extends Job.make("greet", { payload: { name: Schema.String } }) {}

const GreetHandler = Greet.toLayer(
  Effect.fn("Greet")(function*({ name }) {
    const job = yield* Job.Current
    yield* Effect.log(`Hello, ${name}! (attempt ${job.attempt} of ${job.maxAttempts})`)
  })
)

const PgLive = PgClient.layerConfig({ url: Config.Redacted("DATABASE_URL") })
const QueueLive = JobQueue.layer().pipe(Layer.provideMerge(PgLive))

const main = Effect.gen(function*() {
  const { id, status } = yield* Greet.enqueue({ name: "world" })
  yield* Effect.log(`${status} ${id}`)

  // Works until nothing is due. A process that goes on uses Worker.layer.
  const { completed, failed } = yield* Worker.runUntilEmpty({ jobs: [Greet] })
  yield* Effect.log(`${completed} completed, ${failed} failed`)
  // #endregion
  assert(completed >= 1)
  // #region hello
})

main.pipe(Effect.provide([GreetHandler, QueueLive]), NodeRuntime.runMain)
// #endregion
