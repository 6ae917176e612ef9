/** What workers do for all of them besides rescue: kinds that nobody handles are parked, jobs in no place come back. */
import { assert, describe, it } from "@effect/vitest"
import { Effect, Exit, Layer, Logger, Metric, Scope } from "effect"
import { Job, JobQueue, Telemetry, Worker } from "../src/index.ts"
import {
  allInPlace,
  assertRows,
  queueLayer,
  rows,
  running,
  until,
  untilAllEnded,
  untilValue,
  value,
  withQueue
} from "./support/queue.ts"

class Known extends Job.make("known") {}
class Strange extends Job.make("strange") {}
class Family extends Job.family("strange:") {}

const timing = { heartbeat: 100, lease: 300, rescueInterval: 100, gracePeriod: 0 } as const

const worker = Worker.layer({ ...timing, jobs: [Known] }).pipe(Layer.provide(Known.toLayer(() => Effect.void)))
const working = running(worker)

const parked = "select count(*)::int from pgqueue.ready where lane >= 200"

describe("jobs of a kind that no worker handles", () => {
  it.live("leave the way of the others, stay visible, and run when somebody comes who handles them", () =>
    withQueue(Effect.gen(function*() {
      yield* Strange.enqueueAll(Array.from({ length: 6000 }, () => undefined), { priority: "high" })
      yield* Family.of("strange:x").enqueueAll(Array.from({ length: 50 }, () => undefined), { priority: 0 })
      const later = yield* Strange.enqueue(undefined, { delay: "1 hour" })
      yield* working
      yield* untilValue(parked, 6050)
      yield* Known.enqueueAll(Array.from({ length: 500 }, () => undefined), { priority: "low" })
      yield* untilValue("select count(*)::int from pgqueue.finished", 500)
      const queue = yield* JobQueue
      const stats = yield* queue.stats
      assert.deepInclude(stats.find(({ kind }) => kind === "strange"), {
        available: 6000,
        scheduled: 1,
        handled: false
      })
      yield* assertRows("select queue, kind from pgqueue.parked order by kind", [
        { queue: "default", kind: "strange" },
        { queue: "default", kind: "strange:x" }
      ])
      yield* allInPlace

      yield* running(
        // Its jobs are not to be lost when a beat takes 50 ms.
        Worker.layer({ ...timing, lease: 3000, jobs: [Strange, Family], concurrency: 50 }).pipe(
          Layer.provide([Strange.toLayer(() => Effect.void), Family.toLayer(() => Effect.void)])
        )
      )
      yield* untilValue("select count(*)::int from pgqueue.finished", 6550)
      yield* untilValue("select count(*)::int from pgqueue.parked", 0)
      yield* assertRows("select id::text, lane::int from pgqueue.ready", [{ id: later.id, lane: 5 }])
      yield* assertRows("select distinct attempt::int, rescued::int from pgqueue.finished", [{
        attempt: 1,
        rescued: 0
      }])
    })))

  it.live("are all found by a worker that runs until empty", () =>
    withQueue(Effect.gen(function*() {
      yield* Strange.enqueueAll(Array.from({ length: 3000 }, () => undefined))
      const scope = yield* Scope.make()
      yield* Layer.buildWithScope(Layer.fresh(worker), scope)
      yield* untilValue(parked, 3000)
      yield* Scope.close(scope, Exit.void)
      const { completed } = yield* Worker.runUntilEmpty({ jobs: [Strange], concurrency: 50 }).pipe(
        Effect.provide(Strange.toLayer(() => Effect.void))
      )
      assert.strictEqual(completed, 3000)
    })))

  it.live("that nobody works beside are left where they are", () =>
    withQueue(Effect.gen(function*() {
      class Aside extends Job.make("aside", { queue: "aside" }) {}
      yield* Aside.enqueue()
      yield* Strange.enqueue()
      yield* working
      yield* untilValue(parked, 1)
      yield* assertRows("select kind, lane::int from pgqueue.ready order by kind", [
        { kind: "aside", lane: 5 },
        { kind: "strange", lane: 205 }
      ])
    })))
})

describe("a job in no place", () => {
  it.live("is found, reported and put back in line", () =>
    withQueue(Effect.gen(function*() {
      const logged: Array<unknown> = []
      const listening = Logger.layer([Logger.make(({ logLevel, message }) => {
        if (logLevel === "Error") logged.push(message)
      })])
      const { id } = yield* Known.enqueue()
      yield* rows("delete from pgqueue.ready")
      const before = (yield* Metric.value(Telemetry.misplacedJobs)).count
      yield* Effect.provide(working, listening)
      yield* untilAllEnded()
      yield* assertRows("select id::text, status from pgqueue.finished", [{ id, status: "completed" }])
      assert.strictEqual((yield* Metric.value(Telemetry.misplacedJobs)).count, before + 1)
      assert.include(JSON.stringify(logged), id)
    })))

  it.live("is never found where all is well", () =>
    withQueue(Effect.gen(function*() {
      const before = (yield* Metric.value(Telemetry.misplacedJobs)).count
      yield* running(worker.pipe(Layer.provide(queueLayer())))
      yield* working
      yield* Known.enqueueAll(Array.from({ length: 5000 }, () => undefined))
      yield* untilAllEnded()
      assert.strictEqual((yield* Metric.value(Telemetry.misplacedJobs)).count, before)
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.finished where attempt = 1"), 5000)
    })))
})

describe("an event loop that stands still", () => {
  it.live("is measured and reported before it costs the lease", () =>
    withQueue(Effect.gen(function*() {
      const logged: Array<string> = []
      const listening = Logger.layer([Logger.make(({ message }) => void logged.push(String(message)))])
      class Blocking extends Job.make("blocking") {}
      yield* Effect.provide(
        running(
          Worker.layer({ ...timing, heartbeat: 400, lease: 4000, jobs: [Blocking] }).pipe(
            Layer.provide(Blocking.toLayer(() =>
              Effect.sync(() => {
                const end = performance.now() + 700
                while (performance.now() < end) { /* as a long computation would */ }
              })
            ))
          )
        ),
        listening
      )
      yield* Blocking.enqueue()
      yield* untilAllEnded()
      yield* until(
        "it is reported",
        Effect.sync(() => logged.some((line) => /the event loop stood still for/.test(line)))
      )
      yield* assertRows("select status, rescued::int from pgqueue.finished", [{ status: "completed", rescued: 0 }])
    })))
})
