/** A job that belongs in front of a long line and gets there late. */
import { assert, describe, it } from "@effect/vitest"
import { Deferred, Effect, Fiber } from "effect"
import { SqlClient } from "effect/sql"
import { Count, Step } from "./programs/jobs.ts"
import { startWorker } from "./support/processes.ts"
import { databaseUrl, until, untilValue, value, withQueue } from "./support/queue.ts"

describe("a job of high priority that is committed late", () => {
  it.live(
    "starts within 2 s in front of 100 000 waiting ones that are being worked on",
    () =>
      withQueue(Effect.gen(function*() {
        const url = yield* databaseUrl
        const sql = yield* SqlClient.SqlClient
        const waiting = 100_000
        for (let n = 0; n < waiting; n += 10_000) {
          yield* Step.enqueueAll(Array.from({ length: 10_000 }, () => ({ millis: 20 })), { priority: "low" })
        }
        const gate = yield* Deferred.make<void>()
        const enqueued = yield* Deferred.make<string>()
        const late = yield* Effect.forkChild(sql.withTransaction(Effect.gen(function*() {
          const { id } = yield* Count.enqueue({ n: 0 }, { priority: "high" })
          yield* Deferred.succeed(enqueued, id)
          yield* Deferred.await(gate)
        })))
        const id = yield* Deferred.await(enqueued)
        yield* Effect.forEach([1, 2], (n) => startWorker({ url, name: `worker ${n}`, concurrency: 10, gracePeriod: 0 }))
        yield* until("both work", Effect.map(value("select count(distinct boot)::int from ledger"), (n) => n === 2))
        // Whoever went on from the last high one that he has seen would never look where the late one stands.
        yield* Count.enqueueAll(Array.from({ length: 200 }, (_, n) => ({ n })), { priority: "high" })
        yield* untilValue("select count(*)::int from pgqueue.finished where kind = 'count'", 200)
        assert.isAbove(yield* value("select count(*)::int from pgqueue.ready"), 0.9 * waiting)

        yield* Deferred.succeed(gate, undefined)
        yield* Fiber.join(late)
        yield* untilValue("select count(*)::int from ledger where job = $1::uuid", 1, { params: [id], within: 10_000 })
        assert.isAbove(yield* value("select count(*)::int from pgqueue.ready"), 0.9 * waiting)
      })),
    90_000
  )
})
