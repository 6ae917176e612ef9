/** One handler for all kinds with a prefix, and what wraps every run. */
import assert from "node:assert/strict"
import "./support/database.ts"
import { NodeRuntime } from "@effect/platform-node"
import { PgClient } from "@effect/sql-pg"
import { Config, Effect, Layer, Ref, References, Schema } from "effect"
import { Job, JobQueue, Worker } from "../src/index.ts"

const notes = Ref.makeUnsafe<ReadonlyArray<string>>([])
const note = Effect.fn(function*(text: string) {
  const { tenant } = yield* References.CurrentLogAnnotations
  yield* Effect.log(text)
  yield* Ref.update(notes, (all) => [...all, `${tenant}: ${text}`])
})

// #region family
class Reports extends Job.family("report:", { payload: { day: Schema.Int }, queue: "reports" }) {}

const ReportsHandler = Reports.toLayer(({ day }, kind) => note(`${kind} of day ${day}`))

const enqueueReports = Effect.all([
  Reports.of("report:sales").enqueue({ day: 1 }, { metadata: { tenant: "acme" } }),
  Reports.of("report:stock").enqueue({ day: 2 }, { metadata: { tenant: "acme" } })
])
// #endregion

// #region middleware
// It gets the run and what is known of the job. It may add requirements, but cannot change the result.
const tenant = Worker.middleware((run, job) => Effect.annotateLogs(run, "tenant", job.metadata["tenant"] ?? "nobody"))

const work = Worker.runUntilEmpty({
  jobs: [Reports],
  queues: { reports: { concurrency: 1 } },
  middleware: [tenant, Worker.logged] // outermost first
})
// #endregion

const PgLive = PgClient.layerConfig({ url: Config.Redacted("DATABASE_URL") })
const QueueLive = JobQueue.layer().pipe(Layer.provideMerge(PgLive))

const main = Effect.gen(function*() {
  yield* enqueueReports
  yield* work
  assert.deepEqual(yield* Ref.get(notes), ["acme: report:sales of day 1", "acme: report:stock of day 2"])
})

main.pipe(Effect.provide([ReportsHandler, QueueLive]), NodeRuntime.runMain)
