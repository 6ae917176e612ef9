/** Workers outlive their connections and their database. */
import { assert, describe, it } from "@effect/vitest"
import { Context, Effect, Exit, Fiber, Layer } from "effect"
import { Count, Step } from "./programs/jobs.ts"
import { ownServer } from "./support/database.ts"
import { Ledger } from "./support/ledger.ts"
import { startWorker } from "./support/processes.ts"
import {
  allInPlace,
  assertRows,
  burnt,
  databaseUrl,
  databaseWithLedger,
  endedTwice,
  now,
  phases,
  rows,
  startedTwice,
  until,
  untilAllEnded,
  untilValue,
  value,
  watchEnds,
  withQueue
} from "./support/queue.ts"

const long = process.env["LONG"] !== undefined

describe("a worker whose every session is terminated every 2 s", () => {
  const rounds = long ? 30 : 10

  it.live(`goes on within 2 s, ${rounds} times, and starts nothing twice`, () =>
    withQueue(Effect.gen(function*() {
      const url = yield* databaseUrl
      const worker = yield* startWorker({ url, name: "harassed", concurrency: 20, heartbeat: 500, lease: 10_000 })
      let enqueued = 0
      let producing = true
      const producer = yield* Effect.forkChild(Effect.gen(function*() {
        while (producing) {
          // From this process, whose sessions are left alone.
          if ((yield* value("select count(*)::int from pgqueue.ready")) < 500) {
            yield* Step.enqueueAll(Array.from({ length: 500 }, () => ({ millis: 5 })))
            enqueued += 500
          }
          yield* Effect.sleep(50)
        }
      }))
      yield* until("it works", Effect.map(phases("end"), (n) => n > 100))
      const recovered: Array<number> = []
      for (let round = 0; round < rounds; round++) {
        const terminated = yield* value(
          "select count(pg_terminate_backend(pid))::int from pg_stat_activity where application_name = 'harassed'"
        )
        assert.isAtLeast(terminated, 3, "the listener, the heartbeat and the pool at least")
        const cut = yield* value("select count(*)::int from pgqueue.finished")
        // More than what was on its way: it claims and settles again.
        recovered.push(
          yield* until(
            "it goes on",
            Effect.map(value("select count(*)::int from pgqueue.finished"), (n) => n > cut + 200),
            {
              within: 15_000
            }
          )
        )
        assert.isTrue(worker.running(), worker.output())
        yield* Effect.sleep(Math.max(0, 2000 - recovered[round]!))
      }
      // Not interrupted: what it is just enqueueing counts.
      producing = false
      yield* Fiber.join(producer)
      yield* untilAllEnded({ within: 30_000 })
      assert.isTrue(worker.running(), worker.output())
      // The machine of a test run may be busy; what matters is that no round waits for a poll, a lease or a back-off.
      assert.isBelow(
        recovered.toSorted((a, b) => a - b)[Math.floor(rounds / 2)]!,
        2000,
        recovered.map(Math.round).join(" ")
      )

      assert.deepStrictEqual(yield* startedTwice, [])
      yield* assertRows("select status, attempt::int, count(*)::int as count from pgqueue.finished group by 1, 2", [
        { status: "completed", attempt: 1, count: enqueued }
      ])
      yield* allInPlace
    })), 180_000)
})

describe("a server that crashes under load", () => {
  const rounds = long ? 20 : 2

  it.live("loses no acknowledged enqueue, and no job ends twice", () =>
    Effect.gen(function*() {
      const server = yield* ownServer()
      yield* withQueue(
        Effect.gen(function*() {
          const url = yield* databaseUrl
          const timing = { heartbeat: 500, lease: 5000, rescueInterval: 500 }
          yield* watchEnds
          const workers = yield* Effect.forEach(
            ["one", "two"],
            (name) => startWorker({ url, name, concurrency: 10, ...timing }),
            { concurrency: 2 }
          )
          const acknowledged: Array<string> = []
          let refused = 0
          const producer = yield* Effect.forkChild(Effect.forEach([1, 2, 3, 4], () =>
            Effect.forever(Effect.gen(function*() {
              const exit = yield* Effect.exit(Step.enqueue({ millis: 2 }))
              if (Exit.isSuccess(exit)) acknowledged.push(exit.value.id)
              else refused++
              yield* Effect.sleep(1)
            })), { concurrency: "unbounded" }))

          const crashes: Array<number> = []
          for (let round = 0; round < rounds; round++) {
            const before = acknowledged.length
            yield* until(
              "it is under load",
              Effect.sync(() =>
                acknowledged.length > before + 300
              )
            )
            yield* Effect.promise(() => server.pgCtl(["stop", "-m", "immediate"]))
            crashes.push(acknowledged.length)
            yield* Effect.promise(() => server.pgCtl(["start"]))
          }
          const last = acknowledged.length
          yield* until("producers go on", Effect.sync(() => acknowledged.length > last + 300), { within: 30_000 })
          yield* Fiber.interrupt(producer)
          yield* untilAllEnded({ within: 60_000 })

          for (const worker of workers) assert.isTrue(worker.running(), worker.output())
          const finished = new Set(
            (yield* rows<{ id: string }>("select id::text from pgqueue.finished where status = 'completed'"))
              .map(({ id }) => id)
          )
          assert.deepStrictEqual(acknowledged.filter((id) => !finished.has(id)), [])
          assert.strictEqual(new Set(acknowledged).size, acknowledged.length)
          // An enqueue that failed may have gone through, one per client and crash: its answer is what was lost.
          assert.isAtMost(finished.size, acknowledged.length + refused + 4)
          yield* assertRows("select status from pgqueue.finished where status <> 'completed'", [])
          assert.deepStrictEqual(yield* endedTwice, [])
          assert.deepStrictEqual(yield* burnt, [])
          // Only claims of the last instant before a crash may be forgotten.
          const twice = yield* startedTwice
          assert.isBelow(twice.length, rounds * 2 * 100)
          yield* allInPlace
        }),
        { serverUrl: server.url }
      )
    }), 180_000)

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
