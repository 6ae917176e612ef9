/** Waiting for the typed result of a job, wherever it runs, and reading how far it is. */
import assert from "node:assert/strict"
import "./support/database.ts"
import { NodeRuntime } from "@effect/platform-node"
import { PgClient } from "@effect/sql-pg"
import { Config, Effect, Exit, Layer, Option, Schema } from "effect"
import { Admin, Job, JobQueue, Worker } from "../src/index.ts"

// #region execute
class NoSuchCity extends Schema.TaggedError<NoSuchCity>()("NoSuchCity", { city: Schema.String }) {}

class Forecast extends Job.make("forecast", {
  payload: { city: Schema.String },
  success: Schema.Struct({ celsius: Schema.Finite }),
  error: NoSuchCity,
  retry: { while: () => false }
}) {}

const ForecastHandler = Forecast.toLayer(
  Effect.fn("Forecast")(function*({ city }) {
    yield* Job.progress({ done: "half" })
    if (city === "Atlantis") return yield* new NoSuchCity({ city })
    return { celsius: 21 }
  })
)

const ask = Effect.fn("ask")(function*(city: string) {
  // Enqueues, and waits for the end: with a result, the job's typed error, or ExecuteError.
  const { celsius } = yield* Forecast.execute({ city }, { wait: "30 seconds" })
  return `${celsius} degrees in ${city}`
}, Effect.catchTag("NoSuchCity", ({ city }) => Effect.succeed(`there is no ${city}`)))
// #endregion

const PgLive = PgClient.layerConfig({ url: Config.Redacted("DATABASE_URL") })
const QueueLive = JobQueue.layer().pipe(Layer.provideMerge(PgLive))
const WorkerLive = Worker.layer({ jobs: [Forecast] }).pipe(Layer.provide(ForecastHandler))

// #region poll
const look = Effect.fn("look")(function*(id: Job.JobId) {
  const end = yield* Forecast.poll(id) // None until it has ended
  const job = Option.getOrThrow(yield* Admin.get(id)) // everything that is stored of it
  return { end, progress: job.progress, status: job.status }
})
// #endregion

const main = Effect.gen(function*() {
  const answers = yield* Effect.forEach(["Rome", "Atlantis"], ask)
  yield* Effect.forEach(answers, (answer) => Effect.log(answer))
  assert.deepEqual(answers, ["21 degrees in Rome", "there is no Atlantis"])

  const { id } = yield* Forecast.enqueue({ city: "Oslo" }, { delay: "1 hour" })
  const before = yield* look(id)
  assert.deepEqual([before.end._tag, before.progress._tag, before.status], ["None", "None", "scheduled"])
  yield* Admin.cancel(id, { reason: "the trip is off" })
  const { end, status } = yield* look(id)
  yield* Effect.log(`Oslo was ${status}`)
  assert.ok(Option.isSome(end) && Exit.isFailure(end.value))
})

main.pipe(Effect.provide(Layer.provideMerge(WorkerLive, QueueLive)), NodeRuntime.runMain)
