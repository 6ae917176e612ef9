/** Slow handlers, full workers and strangers' locks hold up nobody else. */
import { assert, describe, it } from "@effect/vitest"
import { Deferred, Effect, Fiber, Layer, Schema } from "effect"
import { SqlClient } from "effect/sql"
import { Job, Worker } from "../src/index.ts"
import { Ledger } from "./support/ledger.ts"
import {
  allInPlace,
  assertRows,
  now,
  phases,
  quantile,
  queueLayer,
  rows,
  running,
  untilAllEnded,
  untilValue,
  value,
  withQueue
} from "./support/queue.ts"

class Fast extends Job.make("fast", { payload: { n: Schema.Number } }) {}
class Slow extends Job.make("slow") {}
class SlowAside extends Job.make("slow.aside", { queue: "aside" }) {}

const FastHandler = Fast.toLayer(({ n }) => Effect.flatMap(Ledger, ({ record }) => record("fast", String(n))))
/** Never ends, until it is told to. */
const endless = Effect.flatMap(Ledger, ({ record }) => Effect.andThen(record("slow"), Effect.never))
const SlowHandler = Slow.toLayer(() => endless)
const SlowAsideHandler = SlowAside.toLayer(() => endless)

const many = (count: number) => Array.from({ length: count }, (_, n) => ({ n }))

/** Enqueues one job at a time, and returns how long each took until it was settled. */
const settleTimes = Effect.fnUntraced(function*(count: number) {
  const took: Array<number> = []
  for (let n = 0; n < count; n++) {
    const begun = yield* now
    const { id } = yield* Fast.enqueue({ n })
    yield* untilValue("select count(*)::int from pgqueue.finished where id = $1::uuid", 1, { params: [id], every: 2 })
    took.push((yield* now) - begun)
  }
  return took
})

describe("handlers that do not end", () => {
  it.live("hold up no other queue of their worker, though they fill their own", () =>
    withQueue(Effect.gen(function*() {
      yield* running(
        Worker.layer({
          jobs: [Fast, SlowAside],
          queues: { aside: { concurrency: 3 }, default: { concurrency: 2 } },
          gracePeriod: 0
        })
          .pipe(
            Layer.provide([FastHandler, SlowAsideHandler])
          )
      )
      yield* SlowAside.enqueueAll(Array.from({ length: 10 }, () => undefined))
      yield* untilValue("select count(*)::int from ledger where phase = 'slow'", 3)
      const took = yield* settleTimes(40)
      assert.isBelow(quantile(took, 0.5), 250, took.map(Math.round).join(" "))
      yield* Fast.enqueueAll(many(1000))
      yield* untilValue("select count(*)::int from pgqueue.finished", 1040)
      assert.strictEqual(yield* phases("slow"), 3)
    })))

  it.live("hold up no other job of their queue while slots are free", () =>
    withQueue(Effect.gen(function*() {
      yield* running(
        Worker.layer({ jobs: [Fast, Slow], concurrency: 4, gracePeriod: 0 }).pipe(
          Layer.provide([FastHandler, SlowHandler])
        )
      )
      yield* Slow.enqueueAll(Array.from({ length: 3 }, () => undefined))
      yield* untilValue("select count(*)::int from ledger where phase = 'slow'", 3)
      const took = yield* settleTimes(40)
      assert.isBelow(quantile(took, 0.5), 250, took.map(Math.round).join(" "))
      yield* Fast.enqueueAll(many(1000))
      yield* untilValue("select count(*)::int from pgqueue.finished", 1040)
    })))

  it.live("keep no job waiting in the buffer of a busy worker while another is idle", () =>
    withQueue(Effect.gen(function*() {
      const worker = (name: string) =>
        Worker.layer({ jobs: [Fast, Slow], name, concurrency: 4, pollInterval: 30_000, gracePeriod: 0 }).pipe(
          Layer.provide([FastHandler, SlowHandler])
        )
      // In one line: enough for it to learn that handlers are quick, what fills its slots, and what it has then claimed
      // ahead already.
      yield* Fast.enqueueAll(many(3000), { priority: "high" })
      yield* Slow.enqueueAll(Array.from({ length: 4 }, () => undefined))
      yield* Fast.enqueueAll(many(400), { priority: "low" })
      yield* running(worker("busy"))
      yield* untilValue("select count(*)::int from ledger where phase = 'slow'", 4)
      const idle = yield* Layer.build(queueLayer())
      yield* running(Layer.provide(worker("idle"), Layer.succeedContext(idle)))
      const took = yield* untilValue("select count(*)::int from pgqueue.finished", 3400, { within: 15_000 })
      assert.isBelow(took, 10_000)
      yield* assertRows("select attempt::int, rescued::int from pgqueue.finished group by 1, 2", [
        { attempt: 1, rescued: 0 }
      ])
      assert.strictEqual(yield* phases("slow"), 4)
    })))
})

describe("a transaction that holds the row of a job", () => {
  it.live("delays the settlement of that job and of no other", () =>
    withQueue(
      Effect.gen(function*() {
        const sql = yield* SqlClient.SqlClient
        const held = yield* Deferred.make<void>()
        const end = yield* Deferred.make<void>()
        const gate = yield* Deferred.make<void>()
        class Gated extends Job.make("gated") {}
        yield* running(
          Worker.layer({ jobs: [Fast, Gated], concurrency: 10 }).pipe(
            Layer.provide([
              FastHandler,
              Gated.toLayer(() =>
                Effect.flatMap(Ledger, ({ record }) => Effect.andThen(record("start"), Deferred.await(gate)))
              )
            ])
          )
        )
        const { id } = yield* Gated.enqueue()
        yield* untilValue("select count(*)::int from ledger", 1)
        const stranger = yield* Effect.forkChild(sql.withTransaction(
          sql`select 1 from pgqueue.job where id = ${id}::uuid for update`.pipe(
            Effect.andThen(Deferred.succeed(held, undefined)),
            Effect.andThen(Deferred.await(end))
          )
        ))
        yield* Deferred.await(held)
        yield* Deferred.succeed(gate, undefined)

        const took = yield* settleTimes(60)
        assert.isBelow(quantile(took, 0.5), 250, took.map(Math.round).join(" "))
        assert.isBelow(quantile(took, 0.95), 1000, took.map(Math.round).join(" "))
        // Producers of this process are not concerned at all.
        const enqueue: Array<number> = []
        for (let n = 0; n < 40; n++) {
          const begun = yield* now
          yield* Fast.enqueue({ n })
          enqueue.push((yield* now) - begun)
        }
        assert.isBelow(quantile(enqueue, 0.95), 250, enqueue.map(Math.round).join(" "))
        assert.strictEqual(yield* value("select count(*)::int from pgqueue.job where id = $1::uuid", [id]), 1)
        yield* Deferred.succeed(end, undefined)
        yield* Fiber.join(stranger)
        yield* untilAllEnded()
        yield* assertRows("select status, attempt::int from pgqueue.finished where id = $1::uuid", [
          { status: "completed", attempt: 1 }
        ], [id])
        yield* allInPlace
      }),
      { pool: { maxConnections: 4 } }
    ))

  it.live("keeps a waiting job from being claimed by nobody but itself", () =>
    withQueue(Effect.gen(function*() {
      const sql = yield* SqlClient.SqlClient
      const enqueued = yield* Fast.enqueueAll(many(200))
      const held = enqueued[0]!.id
      const end = yield* Deferred.make<void>()
      const locked = yield* Deferred.make<void>()
      const stranger = yield* Effect.forkChild(sql.withTransaction(
        sql`select 1 from pgqueue.ready where id = ${held}::uuid for update`.pipe(
          Effect.andThen(Deferred.succeed(locked, undefined)),
          Effect.andThen(Deferred.await(end))
        )
      ))
      yield* Deferred.await(locked)
      yield* running(Worker.layer({ jobs: [Fast], concurrency: 1 }).pipe(Layer.provide(FastHandler)))
      yield* untilValue("select count(*)::int from pgqueue.finished", 199)
      yield* Deferred.succeed(end, undefined)
      yield* Fiber.join(stranger)
      yield* untilAllEnded()
      assert.lengthOf(yield* rows("select 1 from ledger"), 200)
    })))
})
