/** Workers outlive their database. What the scenarios of `test/faults` do to it is not done again here. */
import { assert, describe, it } from "@effect/vitest"
import { Context, Duration, Effect, Fiber, Layer } from "effect"
import { Count, Step } from "./programs/jobs.ts"
import { ownServer } from "./support/database.ts"
import { Ledger } from "./support/ledger.ts"
import { long } from "./support/long.ts"
import { startWorker } from "./support/processes.ts"
import {
  allInPlace,
  assertRows,
  databaseUrl,
  databaseWithLedger,
  endedTwice,
  now,
  phases,
  until,
  untilAllEnded,
  untilValue,
  watchEnds,
  withQueue
} from "./support/queue.ts"

describe("a server that crashes under load", () => {
  const forgotten = long ? 20 : 1

  it.live(
    "forgets claims, whose jobs run again and whose first run is interrupted",
    () =>
      Effect.gen(function*() {
        // What nobody waits for it writes to its disk when it has time, and here it has none.
        const server = yield* ownServer({ settings: { wal_writer_delay: "10s", autovacuum: "off" } })
        // What handlers have done is kept elsewhere: it neither vanishes in the crash nor makes this server write.
        const elsewhere = yield* Layer.build(databaseWithLedger())
        const ledger = Context.get(elsewhere, Ledger)
        const runs = (phase: string, jobs: ReadonlyArray<string>) =>
          Effect.map(
            ledger.query<{ count: number }>(
              "select count(*)::int as count from ledger where phase = $1 and job = any ($2::uuid[])",
              [phase, jobs]
            ),
            ([row]) => row!.count
          )
        const ledgerUrl = yield* Effect.provideContext(databaseUrl, elsewhere)
        yield* withQueue(
          Effect.gen(function*() {
            const url = yield* databaseUrl
            yield* watchEnds
            // Nor does a heartbeat come in between.
            const timing = { heartbeat: 60_000, lease: 180_000, rescueInterval: 60_000 }
            const worker = yield* startWorker({ url, ledgerUrl, name: "worker", concurrency: 20, ...timing })
            for (let round = 1; round <= forgotten; round++) {
              yield* untilValue("select count(*)::int from pgqueue.worker", 1)
              const jobs = (yield* Step.enqueueAll([1, 2, 3, 4, 5].map(() => ({ millis: 8000 })))).map(({ id }) => id)
              yield* until("it runs them", Effect.map(runs("start", jobs), (n) => n === 5))
              yield* Effect.promise(() => server.pgCtl(["stop", "-m", "immediate"]))
              yield* Effect.promise(() => server.pgCtl(["start"]))
              yield* until("it has stopped", Effect.map(runs("interrupted", jobs), (n) => n === 5), { within: 7000 })
              yield* until("it runs them again", Effect.map(runs("start", jobs), (n) => n === 10))
              yield* untilAllEnded()
              assert.strictEqual(yield* runs("end", jobs), 5)
            }
            assert.isTrue(worker.running(), worker.output())
            // Nobody was lost, and nothing was spent.
            yield* assertRows(
              "select status, attempt::int, rescued::int, count(*)::int as count from pgqueue.finished group by 1, 2, 3",
              [{ status: "completed", attempt: 1, rescued: 0, count: 5 * forgotten }]
            )
            assert.deepStrictEqual(yield* endedTwice, [])
            yield* allInPlace
          }),
          { serverUrl: server.url }
        )
      }),
    30_000 * forgotten + 60_000
  )
})

describe("enqueues while the server is down", () => {
  it.live("fail after ten seconds or a little more, however many there are", () =>
    Effect.gen(function*() {
      const server = yield* ownServer()
      yield* withQueue(
        Effect.gen(function*() {
          yield* Effect.promise(() => server.pgCtl(["stop", "-m", "fast"]))
          const waits = yield* Effect.forEach(
            Array.from({ length: 5000 }, (_, n) => n),
            (n) =>
              Effect.gen(function*() {
                // Over two seconds, so that they do not give up together.
                yield* Effect.sleep(n % 2000)
                return yield* Effect.timed(Effect.flip(Count.enqueue({ n })))
              }),
            { concurrency: "unbounded" }
          )
          yield* Effect.promise(() => server.pgCtl(["start"]))
          const millis = waits.map(([took]) => Duration.toMillis(took))
          assert.isAtLeast(Math.min(...millis), 9000)
          assert.isBelow(Math.max(...millis), 18_000)
          assert.isTrue(waits.every(([, error]) => error._tag === "SqlError"))
          yield* untilValue("select count(*)::int from pgqueue.job", 0)
        }),
        { serverUrl: server.url }
      )
    }), 120_000)
})

describe("workers that are started before their database", () => {
  it.live("wait for it and then work", () =>
    Effect.gen(function*() {
      const server = yield* ownServer()
      yield* withQueue(
        Effect.gen(function*() {
          const url = yield* databaseUrl
          yield* Count.enqueueAll([{ n: 1 }, { n: 2 }])
          yield* Effect.promise(() => server.pgCtl(["stop", "-m", "fast"]))
          const starting = yield* Effect.forkChild(startWorker({ url, name: "early" }))
          const begun = yield* now
          yield* until("it has tried for a while", Effect.map(now, (at) => at - begun > 2500))
          assert.isUndefined(starting.pollUnsafe(), "it neither gave up nor started")
          yield* Effect.promise(() => server.pgCtl(["start"]))
          const worker = yield* Fiber.join(starting)
          assert.match(worker.output(), /waiting for the database/)
          yield* untilAllEnded()
          assert.strictEqual(yield* phases("start"), 2)
        }),
        { serverUrl: server.url }
      )
    }), 120_000)
})
