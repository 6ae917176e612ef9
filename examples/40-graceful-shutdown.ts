/** Told to stop, a worker lets running handlers end within the grace period and hands the rest back, unburnt. */
import assert from "node:assert/strict"
import "./support/database.ts"
import { NodeRuntime } from "@effect/platform-node"
import { PgClient } from "@effect/sql-pg"
import { Config, Effect, Latch, Layer, Ref, Schema } from "effect"
import { Job, JobQueue, Worker } from "../src/index.ts"

// #region worker
class Render extends Job.make("render", { payload: { page: Schema.String, seconds: Schema.Finite } }) {}

const RenderHandler = Render.toLayer(
  Effect.fn("Render")(
    function*({ page, seconds }) {
      yield* note(`${page}: starts`)
      yield* Effect.sleep(`${seconds} seconds`)
      yield* note(`${page}: done`)
    },
    (run, { page }) => Effect.onInterrupt(run, () => note(`${page}: interrupted`))
  )
)

const PgLive = PgClient.layerConfig({ url: Config.Redacted("DATABASE_URL") })
const QueueLive = JobQueue.layer().pipe(Layer.provideMerge(PgLive))

const Main = Worker.layer({ jobs: [Render], gracePeriod: "2 seconds" }).pipe(
  Layer.provide(RenderHandler),
  Layer.provide(QueueLive)
)
// #endregion

const notes = Ref.makeUnsafe<ReadonlyArray<string>>([])
const bothRun = Latch.makeUnsafe(false)
const note = Effect.fn(function*(text: string) {
  yield* Effect.log(text)
  const all = yield* Ref.updateAndGet(notes, (notes) => [...notes, text])
  if (all.length === 2) yield* bothRun.open
})

/** What an orchestrator does: it tells the process to stop while both jobs run. */
const story = Effect.gen(function*() {
  yield* Render.enqueue({ page: "short", seconds: 1 })
  yield* Render.enqueue({ page: "long", seconds: 600 })
  yield* bothRun.await
  process.kill(process.pid, "SIGTERM")
}).pipe(Effect.provide(QueueLive))

/** After the shutdown, as another process would see it: the long page is in line again, with no attempt spent. */
const OtherHandler = Render.toLayer(
  Effect.fn("Render")(function*({ page }) {
    const { attempt } = yield* Job.Current
    yield* note(`${page}: attempt ${attempt} at another worker`)
  })
)

const check = Effect.gen(function*() {
  yield* Worker.runUntilEmpty({ jobs: [Render] })
  assert.deepEqual((yield* Ref.get(notes)).slice(2), [
    "short: done",
    "long: interrupted",
    "long: attempt 1 at another worker"
  ])
}).pipe(Effect.provide([OtherHandler, QueueLive]))

const main = Layer.launch(Layer.merge(Main, Layer.effectDiscard(Effect.forkScoped(story)))).pipe(
  Effect.onInterrupt(() => check)
)

// Without the teardown a process that was told to stop ends with code 130, which looks like a failure.
NodeRuntime.runMain(main, { teardown: Worker.teardown })
