/** Jobs that take their process down, each in its way: they end discarded, and everybody else's jobs complete. */
import { assert, describe, it } from "@effect/vitest"
import { Effect } from "effect"
import { Poison, Step } from "./programs/jobs.ts"
import { keepWorker } from "./support/processes.ts"
import {
  allInPlace,
  assertRows,
  burnt,
  databaseUrl,
  endedTwice,
  startedForNothing,
  untilAllEnded,
  value,
  watchEnds,
  withQueue
} from "./support/queue.ts"

const timing = { heartbeat: 300, lease: 2000, rescueInterval: 500, gracePeriod: 0 }

/** With how the process of each is seen to end. */
const ways = [
  ["exit", "calls process.exit", { code: 3, signal: null }],
  ["abort", "calls process.abort", { code: null, signal: "SIGABRT" }],
  ["SIGKILL", "kills its process", { code: null, signal: "SIGKILL" }],
  ["heap", "takes more memory than there is", { code: null, signal: "SIGABRT" }]
] as const

// Together: they mostly wait for leases to end.
describe.concurrent("a job that", () => {
  for (const [how, what, end] of ways) {
    it.live(
      `${what} ends discarded after one start more than its attempts, and its neighbours complete`,
      () =>
        withQueue(Effect.gen(function*() {
          const url = yield* databaseUrl
          yield* watchEnds
          const { id } = yield* Poison.enqueue({ how }, { maxAttempts: 1, priority: "high" })
          const neighbours = 4
          yield* Step.enqueueAll(Array.from({ length: neighbours }, () => ({ millis: 300 })))
          const kept = yield* keepWorker(
            { url, name: "kept", concurrency: 10, ...timing },
            ["--max-old-space-size=64"]
          )
          yield* untilAllEnded({ within: 100_000 })

          const starts = yield* value("select count(*)::int from ledger where job = $1::uuid and phase = 'start'", [id])
          assert.isAtMost(starts, 2)
          assert.deepStrictEqual(
            kept.ends().map(({ code, signal }) => ({ code, signal })),
            Array.from({ length: starts }, () => end)
          )
          yield* assertRows(
            "select kind, status, error ->> 'tag' as tag, count(*)::int as count from pgqueue.finished group by 1, 2, 3 order by 1",
            [
              { kind: "poison", status: "discarded", tag: "Lost", count: 1 },
              { kind: "step", status: "completed", tag: null, count: neighbours }
            ]
          )
          // Neighbours they were: it took them all down with it.
          yield* assertRows("select id from pgqueue.finished where rescued = 0", [])
          assert.deepStrictEqual(yield* endedTwice, [])
          assert.deepStrictEqual(yield* startedForNothing, [])
          assert.deepStrictEqual(yield* burnt, [])
          yield* allInPlace
        })),
      130_000
    )
  }
})

describe.concurrent("five jobs that kill any process", () => {
  it.live(
    "end discarded in a fleet of four, which completes everything else",
    () =>
      withQueue(Effect.gen(function*() {
        const url = yield* databaseUrl
        yield* watchEnds
        const healthy = 2000
        for (let n = 0; n < 5; n++) {
          yield* Step.enqueueAll(Array.from({ length: healthy / 5 }, (_, n) => ({ millis: 5 + n % 46 })))
          yield* Poison.enqueue({ how: "SIGKILL" }, { maxAttempts: 1 })
        }
        const fleet = yield* Effect.forEach(
          [1, 2, 3, 4],
          (n) => keepWorker({ url, name: `worker ${n}`, concurrency: 10, ...timing })
        )
        yield* untilAllEnded({ within: 100_000 })

        yield* assertRows(
          "select kind, status, count(*)::int as count from pgqueue.finished group by 1, 2 order by 1",
          [
            { kind: "poison", status: "discarded", count: 5 },
            { kind: "step", status: "completed", count: healthy }
          ]
        )
        // One start more than their attempts, and less for one that stood beside another one.
        yield* assertRows(
          `select job from ledger l join pgqueue.finished f on f.id = l.job
           where kind = 'poison' and phase = 'start' group by job having count(*) > 2`,
          []
        )
        const ends = fleet.flatMap((kept) => kept.ends())
        assert.isAbove(ends.length, 0)
        assert.isAtMost(ends.length, 10)
        assert.isTrue(ends.every(({ signal }) => signal === "SIGKILL"))
        // A job that stood beside one of them when it killed for the second time has lost its worker twice, too, and pays
        // for that with an attempt. Those are few: from then on suspects run alone.
        assert.isAtMost(yield* value("select count(*)::int from pgqueue.finished where rescued > 1"), healthy / 10)
        assert.deepStrictEqual(yield* endedTwice, [])
        assert.deepStrictEqual(yield* startedForNothing, [])
        assert.deepStrictEqual(yield* burnt, [])
        yield* allInPlace
      })),
    130_000
  )
})
