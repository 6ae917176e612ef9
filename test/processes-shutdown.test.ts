/** A worker stops when it is told to: what has started may end, everything else goes back unburnt, the process is gone. */
import { assert, describe, it } from "@effect/vitest"
import { Effect, Layer } from "effect"
import { Worker } from "../src/index.ts"
import { Late, Step } from "./programs/jobs.ts"
import { Patient, Stubborn, type StubbornProgram } from "./programs/stubborn.ts"
import { ownServer } from "./support/database.ts"
import { type Program, serverProcesses, startProgram, startWorker } from "./support/processes.ts"
import {
  allInPlace,
  assertRows,
  databaseUrl,
  now,
  phases,
  running,
  startedTwice,
  until,
  untilAllEnded,
  untilValue,
  value,
  withQueue
} from "./support/queue.ts"

/** The grace of these workers; a process may take 5 s more. */
const gracePeriod = 1000
const most = gracePeriod + 5000
/** Without a database it takes these 5 s, all but a hair: a machine that stands still is not to be the hair. */
const mostWithout = most + 3000

/** Sends a signal and returns how the process ended, and how long that took. */
const end = Effect.fnUntraced(function*(program: Program, signal: NodeJS.Signals = "SIGTERM") {
  const told = yield* now
  yield* program.kill(signal)
  const { at, code, signal: by } = yield* Effect.timeoutOrElse(program.ended, {
    duration: "60 seconds",
    orElse: () => Effect.die(new Error(`still running:\n${program.output()}`))
  })
  return { code, by, took: at - told }
})

const nothingHeld = Effect.gen(function*() {
  yield* assertRows("select * from pgqueue.lease", [])
  yield* assertRows("select * from pgqueue.worker", [])
  yield* assertRows("select * from pgqueue.attempt", [])
  yield* allInPlace
})

describe("SIGTERM", () => {
  it.live("of an idle worker ends the process with code 0 at once", () =>
    withQueue(Effect.gen(function*() {
      const worker = yield* startWorker({ url: yield* databaseUrl, name: "idle" })
      yield* untilValue("select count(*)::int from pgqueue.worker", 1)
      const { code, took } = yield* end(worker)
      assert.strictEqual(code, 0, worker.output())
      assert.isBelow(took, 2500)
      yield* nothingHeld
    })))

  it.live(
    "under load leaves no lease, starts no job twice and spends no attempt",
    () =>
      withQueue(Effect.gen(function*() {
        const url = yield* databaseUrl
        const total = 4000
        yield* Step.enqueueAll(Array.from({ length: total }, () => ({ millis: 20 })))
        // Twice, and the third one works to the end.
        for (const name of ["first", "second"]) {
          const worker = yield* startWorker({ url, name, concurrency: 20 })
          yield* until(
            "it works",
            Effect.map(value("select count(*)::int from ledger where boot = $1", [name]), (n) => n > 200)
          )
          const { code, took } = yield* end(worker)
          assert.strictEqual(code, 0, worker.output())
          assert.isBelow(took, 5000)
          yield* nothingHeld
        }
        assert.isAbove(yield* value("select count(*)::int from pgqueue.ready"), 0)
        yield* startWorker({ url, name: "third", concurrency: 100 })
        yield* untilAllEnded({ within: 60_000 })
        assert.deepStrictEqual(yield* startedTwice, [])
        assert.strictEqual(yield* phases("interrupted"), 0)
        yield* assertRows(
          "select status, attempt::int as attempt, rescued::int as rescued, count(*)::int as count from pgqueue.finished group by 1, 2, 3",
          [
            { status: "completed", attempt: 1, rescued: 0, count: total }
          ]
        )
      })),
    120_000
  )

  it.live("interrupts what does not end in the grace period and hands it back without spending an attempt", () =>
    withQueue(Effect.gen(function*() {
      const worker = yield* startWorker({ url: yield* databaseUrl, name: "first", gracePeriod })
      yield* Step.enqueueAll([{ millis: 3_600_000 }, { millis: 3_600_000 }])
      yield* untilValue("select count(*)::int from ledger", 2)
      const { code, took } = yield* end(worker)
      assert.strictEqual(code, 0, worker.output())
      assert.isAtLeast(took, gracePeriod)
      assert.isBelow(took, most)
      yield* assertRows("select attempt, rescued, snoozed from pgqueue.job", [
        { attempt: 0, rescued: 0, snoozed: 0 },
        { attempt: 0, rescued: 0, snoozed: 0 }
      ])
      yield* assertRows("select count(*)::int as due from pgqueue.ready where run_at <= clock_timestamp()", [{
        due: 2
      }])
      yield* nothingHeld
    })))

  it.live("waits for a handler that ends within the grace period", () =>
    withQueue(Effect.gen(function*() {
      const worker = yield* startWorker({ url: yield* databaseUrl, name: "first", gracePeriod: 20_000 })
      yield* Step.enqueue({ millis: 1500 })
      yield* untilValue("select count(*)::int from ledger", 1)
      assert.strictEqual((yield* end(worker)).code, 0, worker.output())
      yield* assertRows("select status from pgqueue.finished", [{ status: "completed" }])
      assert.strictEqual(yield* phases("end"), 1)
      yield* nothingHeld
    })))

  it.live("ends the process though a handler never stops; its job is rescued and not lost", () =>
    withQueue(Effect.gen(function*() {
      const timing = { heartbeat: 300, lease: 1500, rescueInterval: 300 }
      const worker = yield* startWorker({ url: yield* databaseUrl, name: "first", gracePeriod, ...timing })
      const { id } = yield* Step.enqueue({ millis: 600_000, stubborn: true })
      yield* untilValue("select count(*)::int from ledger", 1)
      const { took } = yield* end(worker)
      assert.isBelow(took, most)
      assert.strictEqual(yield* phases("interrupted"), 0)
      // It is still the first one's until the lease is over.
      yield* running(
        Worker.layer({ jobs: [Step], ...timing, gracePeriod: 100 }).pipe(Layer.provide(Step.toLayer(() => Effect.void)))
      )
      yield* untilAllEnded()
      yield* assertRows("select id::text, status, attempt::int, rescued::int from pgqueue.finished", [
        { id, status: "completed", attempt: 1, rescued: 1 }
      ])
      yield* allInPlace
    })))

  it.live("just after a timeout leaves the handler the time to clean up, and counts its attempt", () =>
    withQueue(Effect.gen(function*() {
      const worker = yield* startWorker({ url: yield* databaseUrl, name: "first", gracePeriod: 10_000 })
      yield* Late.enqueue()
      yield* untilValue("select count(*)::int from ledger where phase = 'cleaning up'", 1)
      const { code, took } = yield* end(worker)
      assert.strictEqual(code, 0, worker.output())
      assert.isBelow(took, most)
      assert.strictEqual(yield* phases("cleaned up"), 1)
      yield* assertRows("select tag from pgqueue.attempt", [{ tag: "TimedOut" }])
      yield* assertRows("select * from pgqueue.lease", [])
    })))

  it.live("twice is as good as once", () =>
    withQueue(Effect.gen(function*() {
      const worker = yield* startWorker({ url: yield* databaseUrl, name: "first", gracePeriod })
      yield* Step.enqueue({ millis: 3_600_000 })
      yield* untilValue("select count(*)::int from ledger", 1)
      yield* worker.kill("SIGTERM")
      const { took } = yield* end(worker)
      assert.isBelow(took, most)
      yield* untilValue("select count(*)::int from pgqueue.lease", 0, { within: 1000 })
      yield* allInPlace
    })))
})

describe("a process with two workers, of which one has a handler that does not stop", () => {
  const rows: ReadonlyArray<readonly [what: string, does: StubbornProgram["does"]]> = [
    ["ends on a signal, and gives the other one its grace period", "waits"],
    ["waits for it when it fails, and ends on a signal", "fails"],
    ["goes on when that worker alone is stopped, and ends on a signal", "goes on"]
  ]
  for (const [what, does] of rows) {
    it.live(what, () =>
      withQueue(Effect.gen(function*() {
        yield* Stubborn.enqueue()
        yield* Patient.enqueue()
        const program: StubbornProgram = { url: yield* databaseUrl, does }
        const actor = yield* startProgram("stubborn.ts", program)
        if (does === "goes on") {
          yield* until("it goes on", Effect.sync(() => /it has gone on/.test(actor.output())), { within: 20_000 })
        }
        if (does === "fails") {
          yield* untilValue("select count(*)::int from pgqueue.finished", 1, { within: 20_000 })
          yield* until("its workers have ended", Effect.sync(() => /handlers did not stop/.test(actor.output())))
          assert.isTrue(actor.running())
        }
        yield* actor.kill("SIGTERM")
        const { code } = yield* Effect.timeoutOrElse(actor.ended, {
          duration: "20 seconds",
          orElse: () => Effect.die(new Error(`it still runs:\n${actor.output()}`))
        })
        assert.strictEqual(code, 1)
        yield* assertRows("select kind, status from pgqueue.finished", [{ kind: "patient", status: "completed" }])
        yield* assertRows("select rescued from pgqueue.job", [{ rescued: 0 }])
      })))
  }
})

describe("SIGTERM without a database", () => {
  const busy = Effect.fnUntraced(function*() {
    const worker = yield* startWorker({ url: yield* databaseUrl, name: "cut off", gracePeriod })
    yield* Step.enqueueAll([{ millis: 3_600_000 }, { millis: 3_600_000 }])
    yield* untilValue("select count(*)::int from ledger", 2)
    return worker
  })

  /** One whose statements are in the pool of the application, which waits for them when it is closed. */
  const hiddenOne = Effect.gen(function*() {
    const worker = yield* startWorker({ url: yield* databaseUrl, name: "hidden", gracePeriod, hidden: true })
    yield* Step.enqueueAll([{ millis: 3_600_000 }, { millis: 3_600_000 }])
    yield* untilValue("select count(*)::int from ledger", 2)
    return worker
  })

  it.live("ends the process in time when the server is down", () =>
    Effect.gen(function*() {
      const server = yield* ownServer()
      const took = yield* withQueue(
        Effect.gen(function*() {
          const worker = yield* busy()
          yield* Effect.promise(() => server.pgCtl(["stop", "-m", "immediate"]))
          const { took } = yield* end(worker)
          // The scope of the test wants its database back.
          yield* Effect.promise(() => server.pgCtl(["start"]))
          return took
        }),
        { serverUrl: server.url }
      )
      assert.isBelow(took, mostWithout)
    }), 120_000)

  const clients = [["", busy()], [", and the client is not a PgClient", hiddenOne]] as const
  for (const [which, starting] of clients) {
    it.live(`ends the process in time when the server does not answer${which}`, () =>
      Effect.gen(function*() {
        const server = yield* ownServer()
        const took = yield* withQueue(
          Effect.gen(function*() {
            const worker = yield* starting
            const frozen = serverProcesses(server.dataDir)
            const signal = (name: NodeJS.Signals) => Effect.sync(() => frozen.forEach((pid) => process.kill(pid, name)))
            const { took } = yield* Effect.acquireUseRelease(
              signal("SIGSTOP"),
              () => end(worker),
              () => signal("SIGCONT")
            )
            return took
          }),
          { serverUrl: server.url }
        )
        assert.isBelow(took, mostWithout)
      }), 120_000)
  }
})
