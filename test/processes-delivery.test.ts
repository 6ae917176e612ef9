/** What happens to every job when several processes work: started once, finished once, none lost. */
import { assert, describe, it } from "@effect/vitest"
import { Effect } from "effect"
import { Count, Step } from "./programs/jobs.ts"
import { startWorker } from "./support/processes.ts"
import {
  allInPlace,
  assertRows,
  databaseUrl,
  rows,
  untilAllEnded,
  untilValue,
  value,
  withQueue
} from "./support/queue.ts"

const scale = Number(process.env["SCALE"] ?? 1)

describe("four worker processes", () => {
  const total = 200_000 * scale

  it.live(`start each of ${total} jobs exactly once`, () =>
    withQueue(Effect.gen(function*() {
      const url = yield* databaseUrl
      for (let n = 0; n < total; n += 10_000) {
        yield* Count.enqueueAll(Array.from({ length: Math.min(10_000, total - n) }, (_, i) => ({ n: n + i })))
      }
      yield* Effect.forEach([1, 2, 3, 4], (n) => startWorker({ url, name: `worker ${n}`, concurrency: 100 }), {
        concurrency: "unbounded"
      })
      yield* untilAllEnded({ within: 240_000, every: 200 })

      const [ledger] = yield* rows("select count(*)::int as starts, count(distinct job)::int as jobs from ledger")
      assert.deepStrictEqual(ledger, { starts: total, jobs: total })
      assert.strictEqual(
        yield* value("select count(*)::int from pgqueue.finished where status = 'completed' and attempt = 1"),
        total
      )
      assert.isAtLeast(yield* value("select min(n)::int from (select count(*) as n from ledger group by boot) b"), 1)
      yield* allInPlace
    })), 300_000)
})

describe("a worker process whose slots are full", () => {
  it.live("leaves what it has claimed ahead to another process that is idle", () =>
    withQueue(Effect.gen(function*() {
      const url = yield* databaseUrl
      yield* startWorker({ url, name: "busy", concurrency: 4, gracePeriod: 0 })
      // It has learned that handlers are quick, and claims ahead.
      yield* Count.enqueueAll(Array.from({ length: 3000 }, (_, n) => ({ n })))
      yield* untilAllEnded()
      yield* startWorker({ url, name: "idle", concurrency: 4, gracePeriod: 0 })
      // What does not end is due together with what is quick, and before it.
      yield* Step.enqueueAll([1, 2, 3, 4].map(() => ({ millis: 3_600_000 })), { priority: "high", delay: 1000 })
      yield* Count.enqueueAll(Array.from({ length: 400 }, (_, n) => ({ n })), { priority: "low", delay: 1000 })
      yield* untilValue("select count(*)::int from pgqueue.ready where run_at > clock_timestamp()", 0)
      const took = yield* untilValue("select count(*)::int from pgqueue.finished", 3400)
      assert.isBelow(took, 3000)
      yield* assertRows("select count(*)::int as running from ledger l join pgqueue.job j on j.id = l.job", [{
        running: 4
      }])
      yield* allInPlace
    })), 120_000)
})
