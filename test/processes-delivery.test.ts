/** What happens to every job when several processes work: started once, finished once, none lost. */
import { assert, describe, it } from "@effect/vitest"
import { Effect } from "effect"
import { Count, Step } from "./programs/jobs.ts"
import { long } from "./support/long.ts"
import { startWorker } from "./support/processes.ts"
import {
  allInPlace,
  assertRows,
  databaseUrl,
  rows,
  untilAllEnded,
  untilQuiet,
  untilValue,
  value,
  withQueue
} from "./support/queue.ts"

describe("four worker processes", () => {
  const total = long ? 200_000 : 50_000

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
      // In one line: enough for it to learn that handlers are quick, what fills its slots, and what it has then claimed
      // ahead already.
      yield* Count.enqueueAll(Array.from({ length: 3000 }, (_, n) => ({ n })), { priority: "high" })
      yield* Step.enqueueAll([1, 2, 3, 4].map(() => ({ millis: 3_600_000 })))
      yield* Count.enqueueAll(Array.from({ length: 400 }, (_, n) => ({ n })), { priority: "low" })
      yield* startWorker({ url, name: "busy", concurrency: 4, gracePeriod: 0 })
      yield* untilValue("select count(*)::int from ledger l join pgqueue.job j on j.id = l.job where kind = 'step'", 4)
      yield* startWorker({ url, name: "idle", concurrency: 4, gracePeriod: 0 })
      const took = yield* untilValue("select count(*)::int from pgqueue.finished", 3400)
      assert.isBelow(took, 4500)
      yield* assertRows("select count(*)::int as running from ledger l join pgqueue.job j on j.id = l.job", [{
        running: 4
      }])
      yield* allInPlace
    })), 120_000)
})

describe("a worker process that is idle", () => {
  it.live("hears of what is enqueued elsewhere long before it looks by itself", () =>
    withQueue(Effect.gen(function*() {
      const url = yield* databaseUrl
      const quiet = { pollInterval: 600_000, heartbeat: 300_000, lease: 900_000 }
      yield* startWorker({ url, name: "idle", ...quiet })
      yield* untilValue("select count(*)::int from pgqueue.worker", 1)
      for (let n = 0; n < 8; n++) {
        yield* untilQuiet("idle")
        const { id } = yield* Count.enqueue({ n }, { delay: (n % 4) * 40 })
        yield* untilValue("select count(*)::int from ledger where job = $1::uuid", 1, { params: [id], within: 10_000 })
      }
    })), 120_000)
})
