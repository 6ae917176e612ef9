/** A worker process that is killed at one point or another in the life of a job: nothing is lost, nothing ends twice. */
import { assert, describe, it } from "@effect/vitest"
import { Effect } from "effect"
import { Flaky, Step } from "./programs/jobs.ts"
import { makeLink, type Strike } from "./support/link.ts"
import { long } from "./support/long.ts"
import { startWorker } from "./support/processes.ts"
import {
  allInPlace,
  assertRows,
  burnt,
  databaseUrl,
  endedTwice,
  rows,
  startedForNothing,
  untilAllEnded,
  untilValue,
  value,
  watchEnds,
  withQueue
} from "./support/queue.ts"
import { statements } from "./support/wire.ts"

const timing = { heartbeat: 300, lease: 3000, rescueInterval: 500 }
const total = 60
const rounds = long ? 50 : 1

/** By what the requests of a worker are known on a link. */
const { claim, settle } = statements
const beat = "beat_at = clock_timestamp() where id = $1"
const ledger = "insert into public.ledger"

/** In front of what it is at. */
const failures = Flaky.enqueueAll(Array.from({ length: 10 }, () => undefined), { priority: "high" })

const points = [
  ["a claim is on its way", { text: claim, at: "sent" }],
  ["a claim was answered and it has not heard of it", { text: claim, at: "answered" }],
  ["handlers are about to start", { text: ledger, param: "start", at: "lost" }],
  ["handlers have ended and nothing is settled", { text: settle, at: "lost" }],
  ["a settlement is on its way", { text: settle, at: "sent" }],
  ["a settlement was acknowledged", { text: settle, at: "acknowledged" }],
  ["the settlement of a failure is on its way", { text: settle, param: "failed", at: "sent" }, failures],
  ["a heartbeat is on its way", { text: beat, at: "sent" }]
] satisfies ReadonlyArray<readonly [when: string, strike: Strike, more?: typeof failures]>

// Together: they mostly wait for leases to end.
describe.concurrent("a worker process that is killed when", () => {
  for (const [when, strike, more] of points) {
    it.live(`${when} loses no job, and ends none twice`, () =>
      withQueue(Effect.gen(function*() {
        const url = yield* databaseUrl
        const link = yield* makeLink(url)
        yield* watchEnds
        for (let round = 1; round <= rounds; round++) {
          yield* Effect.scoped(Effect.gen(function*() {
            const name = `victim ${round}`
            const victim = yield* startWorker({ url: link.url, name, concurrency: 10, ...timing })
            yield* Step.enqueueAll(Array.from({ length: total }, () => ({ millis: 150 })))
            // In the middle of its work: it has claimed, and more is waiting.
            yield* untilValue("select count(*) > 0 from ledger where boot = $1", true, { params: [name] })
            link.strike({ ...strike, nth: 1 + (round - 1) % 2 }, () => process.kill(victim.pid, "SIGKILL"))
            if (more !== undefined) yield* more
            const { signal } = yield* Effect.timeoutOrElse(victim.ended, {
              duration: "30 seconds",
              orElse: () => Effect.die(new Error(`still running:\n${victim.output()}`))
            })
            assert.strictEqual(signal, "SIGKILL", victim.output())
            const before = yield* endedAndStarted
            if (strike.at === "acknowledged") assert.isAbove(before.length, (round - 1) * total)

            yield* startWorker({ url, name: `heir ${round}`, concurrency: 10, ...timing })
            yield* untilAllEnded({ within: 40_000 })
            // What had ended was over.
            assert.deepStrictEqual(
              yield* value<unknown>(
                `select count(*)::int from jsonb_to_recordset($1::jsonb) as b(id uuid, starts int)
                 where starts <> (select count(*) from ledger where job = b.id and phase = 'start')`,
                [JSON.stringify(before)]
              ),
              0
            )
          }))
        }
        yield* assertRows("select status, count(*)::int as count from pgqueue.finished group by 1", [
          { status: "completed", count: rounds * (total + (more === undefined ? 0 : 10)) }
        ])
        assert.deepStrictEqual(yield* endedTwice, [])
        assert.deepStrictEqual(yield* startedForNothing, [])
        // One process, one loss: it was free.
        assert.deepStrictEqual(yield* burnt, [])
        yield* assertRows("select id from pgqueue.finished where rescued > 1", [])
        yield* assertRows(
          "select count(distinct worker)::int as victims from pgqueue.attempt where tag = 'Lost'",
          [{ victims: rounds }]
        )
        yield* allInPlace
      })), rounds * 20_000 + 60_000)
  }
})

/** How often those jobs have been started that have ended. */
const endedAndStarted = rows<{ id: string; starts: number }>(
  `select f.id::text, (select count(*)::int from ledger where job = f.id and phase = 'start') as starts
   from pgqueue.finished f`
)
