/** What is left of a job of which nothing is to be kept when it has completed. */
import { assert, describe, it } from "@effect/vitest"
import { Effect, Exit, Layer, Option, Schedule, Schema } from "effect"
import { Admin, Job, JobQueue, Worker } from "../src/index.ts"
import { allInPlace, assertRows, running, untilAllEnded, withPolling, withQueue } from "./support/queue.ts"

class Count extends Job.make("count", {
  payload: { n: Schema.Int },
  success: Schema.Int,
  error: Schema.String,
  retry: Schedule.recurs(0),
  keepCompleted: false
}) {}
class Kept extends Job.make("kept", { payload: { n: Schema.Int } }) {}

const worker = (transactional: boolean) =>
  running(
    Worker.layer({ jobs: [Count, Kept] }).pipe(Layer.provide([
      Count.toLayer(({ n }) => n < 0 ? Effect.fail("negative") : Effect.succeed(n + 1), { transactional }),
      Kept.toLayer(() => Effect.void)
    ]))
  )

const test = (transactional: boolean) =>
  Effect.gen(function*() {
    const [first] = yield* Count.enqueueAll(Array.from({ length: 20 }, (_, n) => ({ n })))
    yield* Count.enqueue({ n: -1 })
    yield* Kept.enqueue({ n: 0 })
    yield* worker(transactional)
    yield* untilAllEnded()
    const left = [{ kind: "count", status: "discarded" }, { kind: "kept", status: "completed" }]
    yield* assertRows("select kind, status from pgqueue.finished order by kind", left)
    assert.deepStrictEqual(yield* Admin.get(first!.id), Option.none())
    assert.deepStrictEqual(
      (yield* Effect.flatMap(JobQueue, (queue) => queue.stats)).map(({ completed, discarded, kind }) => ({
        kind,
        completed,
        discarded
      })),
      [{ kind: "count", completed: 0, discarded: 1 }, { kind: "kept", completed: 1, discarded: 0 }]
    )
    yield* allInPlace
  })

describe("a job that is not to be kept", () => {
  it.live("leaves nothing when it completes, and all when it is discarded", () => withQueue(test(false)))

  it.live("and settles in its handler's transaction leaves nothing either", () => withQueue(test(true)))

  it.live("leaves nothing with a client that only polls", () => withPolling(test(false)))

  it.live("tells its result to whoever waits for it, and is kept then", () =>
    withQueue(Effect.gen(function*() {
      yield* worker(false)
      assert.strictEqual(yield* Count.execute({ n: 41 }), 42)
      const failed = yield* Effect.exit(Count.execute({ n: -1 }))
      assert.isTrue(Exit.isFailure(failed))
      yield* assertRows("select status, result from pgqueue.finished order by status", [
        { status: "completed", result: 42 },
        { status: "discarded", result: null }
      ])
    })))
})
