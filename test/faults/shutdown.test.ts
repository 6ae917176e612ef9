/** Processes that are told to stop: idle, at work, with handlers that do not stop, without a database, more than once. */
import { assert } from "@effect/vitest"
import { Effect } from "effect"
import { Admin } from "../../src/index.ts"
import { Pay } from "../programs/actor.ts"
import { Count, Step } from "../programs/jobs.ts"
import type { EmbeddedPostgres } from "../support/embedded.ts"
import { now, until } from "../support/queue.ts"
import { statements } from "../support/wire.ts"
import { full, limit } from "./form.ts"
import { frozen, idsOf } from "./inside.ts"
import { scenarios } from "./scenario.ts"
import { type Actor, fullBuffer, rescuedWithin, type Stage, timing } from "./stage.ts"

const { claim: claiming } = statements
const hour = 3_600_000

const startedBy = (stage: Stage, actor: Actor) =>
  stage.recorded("select count(*)::int from ledger where phase = 'start' and boot = $1", [actor.boot])

const untilStartedBy = (stage: Stage, actor: Actor, count: number) =>
  until(`${actor.name} has started ${count}`, Effect.map(startedBy(stage, actor), (started) => started >= count))

/** What a process has left in the database. */
const leftBy = (stage: Stage, actor: Actor) =>
  stage.value(
    `select ((select count(*) from pgqueue.worker where name = $1) + (select count(*) from pgqueue.lease l join watch.beat b
      on b.worker = l.worker and b.name = $1))::int`,
    [actor.boot]
  )

/** Nobody waits for these: they would take an hour. */
const cancel = (stage: Stage, ids: ReadonlyArray<string>) =>
  stage.here(Effect.forEach(ids, (id) => Admin.cancel(id), { discard: true }))

const enqueueHours = (stage: Stage, count: number) =>
  Effect.map(stage.here(Step.enqueueAll(Array.from({ length: count }, () => ({ millis: hour })))), idsOf)

/** A worker with jobs that take an hour. */
const busy = Effect.fnUntraced(function*(stage: Stage, count: number) {
  const worker = yield* stage.worker("worker 1")
  const ids = yield* enqueueHours(stage, count)
  yield* untilStartedBy(stage, worker, count)
  return { worker, ids }
})

/** Another one starts all of them again, and ends when they are cancelled. */
const inherits = Effect.fnUntraced(function*(stage: Stage, heir: Actor, ids: ReadonlyArray<string>) {
  yield* untilStartedBy(stage, heir, ids.length)
  yield* cancel(stage, ids)
  assert.strictEqual((yield* heir.end()).code, 0, heir.output())
})

scenarios("shutdown", (scenario) => {
  scenario("C1", "an idle worker is told to stop", { short: true }, (stage) =>
    Effect.gen(function*() {
      const took: Array<number> = []
      for (let round = 0; round < (full ? 10 : 2); round++) {
        const worker = yield* stage.worker("worker 1")
        const end = yield* worker.end()
        assert.strictEqual(end.code, 0, worker.output())
        assert.strictEqual(yield* leftBy(stage, worker), 0)
        took.push(end.took)
      }
      const counts = yield* stage.finish({ faultFree: true })
      for (const millis of took) assert.isBelow(millis, limit(1000))
      return { ...counts, exit: Math.max(...took) }
    }))

  scenario(
    "C2",
    "a worker of a fleet under load is told to stop",
    { minutes: 5 },
    (stage) =>
      Effect.gen(function*() {
        const cast = yield* stage.fleet({ settings: { millis: [50, 50] } })
        const took: Array<number> = []
        for (let round = 0; round < (full ? 5 : 2); round++) {
          const worker = round === 0 ? cast.workers[0]! : yield* stage.worker(`worker 1`)
          yield* untilStartedBy(stage, worker, 20)
          const end = yield* worker.end()
          assert.strictEqual(end.code, 0, worker.output())
          assert.strictEqual(yield* leftBy(stage, worker), 0)
          took.push(end.took)
        }
        const counts = yield* stage.finish({ faultFree: true })
        assert.strictEqual(yield* stage.recorded("select count(*)::int from ledger where phase = 'interrupted'"), 0)
        for (const millis of took) assert.isBelow(millis, 2000)
        return { ...counts, exit: Math.max(...took) }
      })
  )

  scenario(
    "C3",
    "a worker whose jobs take an hour is told to stop",
    { short: true },
    (stage) =>
      Effect.gen(function*() {
        const first = yield* stage.worker("worker 1")
        const ids = yield* enqueueHours(stage, 10)
        yield* untilStartedBy(stage, first, ids.length)
        const second = yield* stage.worker("worker 2")
        const { code, took } = yield* first.end()
        assert.strictEqual(code, 0, first.output())
        yield* untilStartedBy(stage, second, ids.length)
        const [again] = yield* stage.ledger.query<{ took: number }>(
          `select (extract(epoch from max(b.at) - max(a.at)) * 1000)::float8 as took from ledger a join ledger b on b.job = a.job
         where a.phase = 'interrupted' and a.boot = $1 and b.phase = 'start' and b.boot = $2`,
          [first.boot, second.boot]
        )
        assert.deepStrictEqual(
          yield* stage.rows("select distinct attempt, rescued, snoozed from pgqueue.job"),
          [{ attempt: 0, rescued: 0, snoozed: 0 }]
        )
        yield* cancel(stage, ids)
        const counts = yield* stage.finish()
        assert.isAtLeast(took, timing.gracePeriod)
        assert.isBelow(took, limit(timing.gracePeriod + 5000))
        assert.isBelow(again!.took, limit(2000))
        return { ...counts, exit: took, elsewhere: again!.took }
      })
  )

  scenario("C4", "a worker whose handler does not stop is told to stop", {}, (stage) =>
    Effect.gen(function*() {
      const worker = yield* stage.worker("worker 1")
      const { id } = yield* stage.here(Step.enqueue({ millis: 600_000, stubborn: true }))
      yield* untilStartedBy(stage, worker, 1)
      const heir = yield* stage.worker("worker 2")
      const { code, took } = yield* worker.end()
      assert.strictEqual(code, 1, worker.output())
      assert.match(worker.output(), /1 handlers did not stop/)
      assert.isBelow(took, limit(timing.gracePeriod + 5000))
      // It is not forgotten: it comes back as after a crash.
      const lost = yield* now
      yield* untilStartedBy(stage, heir, 1)
      const elsewhere = (yield* now) - lost
      yield* cancel(stage, [id])
      yield* heir.kill("SIGKILL")
      yield* heir.ended
      const counts = yield* stage.finish()
      assert.isBelow(elsewhere, rescuedWithin)
      return { ...counts, exit: took, elsewhere }
    }))

  const gone = {
    stopped: (server: EmbeddedPostgres) =>
      Effect.acquireRelease(
        Effect.promise(() => server.pgCtl(["stop", "-m", "fast"])),
        () => Effect.promise(() => server.pgCtl(["start"]))
      ),
    frozen
  }
  scenario(
    "C5",
    "a worker is told to stop while the database is away, and while it is frozen",
    {},
    (stage) =>
      Effect.gen(function*() {
        const exits: Array<number> = []
        for (const [how, go] of Object.entries(gone)) {
          const { ids, worker } = yield* busy(stage, 5)
          const { code, took } = yield* stage.during(how, Effect.andThen(go(stage.victim), worker.end()))
          assert.strictEqual(code, 0, worker.output())
          assert.isBelow(worker.output().trim().split("\n").length, 20)
          exits.push(took)
          yield* until(
            "the stage has its database again",
            Effect.orElseSucceed(Effect.as(stage.rows("select 1"), true), () => false)
          )
          yield* inherits(stage, yield* stage.worker("worker 2"), ids)
        }
        const counts = yield* stage.finish()
        for (const took of exits) assert.isBelow(took, limit(timing.gracePeriod + 5000))
        return { ...counts, exit: Math.max(...exits) }
      })
  )

  scenario(
    "C6",
    "a worker is told to stop in a black hole, with a COMMIT under way",
    {},
    (stage) =>
      Effect.gen(function*() {
        const exits: Array<number> = []
        for (const at of ["lost", "sent"] as const) {
          const { ids, worker } = yield* busy(stage, 3)
          const committing = yield* stage.net.cut({ text: "COMMIT", process: "worker 1", at, silent: true })
          const key = crypto.randomUUID()
          const paid = yield* stage.here(Pay.enqueue({ key, millis: 50, fails: 0 }))
          yield* stage.ledger.query(
            "insert into public.intent (key, producer, outcome, job) values ($1::uuid, 'stage', 'acked', $2::uuid)",
            [key, paid.id]
          )
          yield* committing
          const { code, took } = yield* stage.during(
            `a black hole, ${at}`,
            Effect.gen(function*() {
              yield* stage.net.blackHole({ process: "worker 1", heal: "reset" })
              return yield* worker.end()
            })
          )
          // The transaction, whose COMMIT is never answered, is a handler that does not stop.
          assert.strictEqual(code, 1, worker.output())
          exits.push(took)
          const heir = yield* stage.worker("worker 2")
          yield* until(
            "it is paid for",
            Effect.map(
              stage.value("select count(*)::int from pgqueue.finished where id = $1::uuid", [paid.id]),
              (count) => count === 1
            )
          )
          yield* inherits(stage, heir, ids)
        }
        const counts = yield* stage.finish()
        for (const took of exits) assert.isBelow(took, limit(timing.gracePeriod + 5000))
        return { ...counts, exit: Math.max(...exits) }
      })
  )

  scenario(
    "C7",
    "a worker is told to stop while its claim is not answered",
    { short: true },
    (stage) =>
      Effect.gen(function*() {
        const exits: Record<string, number> = {}
        const ids: Array<string> = []
        // For 2 s, or for as long as it lives.
        for (const hidden of full ? ["2 s", "for ever"] : ["2 s"]) {
          const worker = yield* stage.worker("worker 1")
          const [warm] = idsOf(yield* stage.here(Step.enqueueAll([{ millis: 1 }])))
          yield* untilStartedBy(stage, worker, 1)
          yield* until(
            "it has nothing to do",
            Effect.map(
              stage.value("select count(*)::int from pgqueue.finished where id = $1::uuid", [warm]),
              (n) => n === 1
            )
          )
          const end = yield* Effect.scoped(Effect.gen(function*() {
            yield* Effect.forkScoped(
              Effect.scoped(Effect.andThen(
                stage.net.blackHole({ process: "worker 1", sent: claiming, way: "answers", heal: "deliver" }),
                hidden === "2 s" ? Effect.sleep(2000) : Effect.never
              )),
              { startImmediately: true }
            )
            ids.push(...idsOf(yield* stage.here(Step.enqueueAll(Array.from({ length: 20 }, () => ({ millis: 1 }))))))
            yield* until(
              "it holds them and does not know",
              Effect.map(stage.value("select count(*)::int from pgqueue.lease"), (count) => count > 0)
            )
            return yield* worker.end()
          }))
          assert.strictEqual(end.code, 0, worker.output())
          assert.strictEqual(yield* leftBy(stage, worker), 0)
          exits[`exit, ${hidden}`] = end.took
        }
        yield* stage.worker("worker 2")
        const counts = yield* stage.finish()
        for (const took of Object.values(exits)) assert.isBelow(took, limit(timing.gracePeriod + 5000))
        assert.strictEqual(counts.again, 0)
        assert.deepStrictEqual(yield* stage.rows("select distinct attempt, rescued from pgqueue.finished"), [{
          attempt: 1,
          rescued: 0
        }])
        return { ...counts, ...exits }
      })
  )

  scenario(
    "C8",
    "workers are replaced one after the other, 2 s apart",
    { minutes: 10 },
    (stage) =>
      Effect.gen(function*() {
        const cast = yield* stage.fleet()
        const workers = [...cast.workers]
        const exits: Array<number> = []
        const begun = yield* stage.value<string>("select clock_timestamp()::text")
        for (let round = 0; round < (full ? 25 : 5); round++) {
          const from = yield* now
          const at = round % workers.length
          const { code, took } = yield* workers[at]!.end()
          assert.strictEqual(code, 0, workers[at]!.output())
          exits.push(took)
          workers[at] = yield* stage.worker(workers[at]!.name)
          yield* Effect.sleep(Math.max(0, 2000 - ((yield* now) - from)))
        }
        // Of what came in, in the two seconds in which least of it was done; a machine that has other work is slow for those who
        // enqueue, too.
        const worst = yield* stage.recorded(
          `select (100.0 * min(done / greatest(1, come)))::float8 from (
          select (select count(*)::float8 from ledger where phase = 'end' and at >= s.at and at < s.at + interval '2 seconds') as done,
            (select count(*) from intent where outcome = 'acked' and answered_at >= s.at and answered_at < s.at + interval '2 seconds') as come
          from generate_series($1::timestamptz, clock_timestamp() - interval '2 seconds', interval '500 milliseconds') s(at)) windows`,
          [begun]
        )
        const counts = yield* stage.finish({ faultFree: true })
        assert.isAtMost(counts.again, counts.jobs / 1000)
        assert.isAbove(worst, 70)
        return {
          ...counts,
          restarts: exits.length,
          exit: Math.max(...exits),
          dip: `${Math.round(100 - worst)} %`
        }
      })
  )

  scenario(
    "C10",
    "a worker is told to stop while its listener is there, comes back, or hears nothing",
    {},
    (stage) =>
      Effect.gen(function*() {
        const exits: Record<string, number> = {}
        const listener = { process: "worker", sent: "LISTEN" }
        const states = {
          connected: Effect.void,
          reconnecting: Effect.forkScoped(Effect.forever(Effect.andThen(stage.net.reset(listener), Effect.sleep(5)))),
          "half open": stage.net.blackHole({ ...listener, heal: "reset" })
        }
        for (let round = 0; round < (full ? 3 : 1); round++) {
          for (const [state, begin] of Object.entries(states)) {
            const worker = yield* stage.worker("worker 1")
            yield* until("it listens", Effect.sync(() => stage.net.sessions(listener) > 0))
            const { code, took } = yield* Effect.scoped(
              Effect.andThen(begin, Effect.andThen(Effect.sleep(300), worker.end()))
            )
            assert.strictEqual(code, 0, worker.output())
            exits[state] = Math.max(exits[state] ?? 0, took)
          }
        }
        const counts = yield* stage.finish({ faultFree: true })
        for (const took of Object.values(exits)) assert.isBelow(took, 2000)
        return { ...counts, ...exits }
      })
  )

  scenario(
    "C11",
    "a worker is told to stop twice, and a third time",
    {},
    (stage) =>
      Effect.gen(function*() {
        const settings = { gracePeriod: 60_000 }
        const stopped = (worker: Actor, count: number) =>
          until(
            "its handlers are interrupted",
            Effect.map(
              stage.recorded("select count(*)::int from ledger where phase = 'interrupted' and boot = $1", [
                worker.boot
              ]),
              (interrupted) => interrupted === count
            )
          )

        // Twice: at once, and everything is handed back.
        const first = yield* stage.worker("worker 1", settings)
        const ids = yield* enqueueHours(stage, 5)
        yield* untilStartedBy(stage, first, ids.length)
        yield* first.kill("SIGTERM")
        // As somebody does who has waited for long enough; all the while nothing is interrupted.
        yield* Effect.sleep(1000)
        assert.strictEqual(yield* stage.recorded("select count(*)::int from ledger where phase = 'interrupted'"), 0)
        assert.isTrue(first.running(), first.output())
        const twice = yield* first.end("SIGTERM")
        assert.strictEqual(twice.code, 0, first.output())
        yield* stopped(first, ids.length)
        assert.strictEqual(yield* leftBy(stage, first), 0)
        assert.deepStrictEqual(yield* stage.rows("select distinct attempt, rescued from pgqueue.job"), [{
          attempt: 0,
          rescued: 0
        }])

        // A third time: whatever still runs.
        const second = yield* stage.worker("worker 2", settings)
        yield* untilStartedBy(stage, second, ids.length)
        const stubborn = yield* stage.here(Step.enqueue({ millis: hour, stubborn: true }))
        yield* untilStartedBy(stage, second, ids.length + 1)
        yield* second.kill("SIGTERM")
        yield* Effect.sleep(300)
        yield* second.kill("SIGTERM")
        const interrupted = yield* stopped(second, ids.length)
        yield* Effect.sleep(Math.max(0, 200 - interrupted))
        const thrice = yield* second.end("SIGINT")
        assert.strictEqual(thrice.code, 130, second.output())

        yield* cancel(stage, [...ids, stubborn.id])
        const counts = yield* stage.finish()
        assert.isBelow(twice.took, limit(2000))
        // At once, on a machine that is busy with others.
        assert.isBelow(interrupted, limit(1000))
        assert.isBelow(thrice.took, limit(500))
        return { ...counts, twice: twice.took, interrupted, thrice: thrice.took }
      })
  )

  scenario(
    "C12",
    "a worker is told to stop with a full buffer and a slow database",
    {},
    (stage) =>
      Effect.gen(function*() {
        const total = 8000
        const ids = idsOf(yield* stage.here(Count.enqueueAll(Array.from({ length: total }, (_, n) => ({ n })))))
        const lock = yield* stage.locker("select id from pgqueue.job for update")
        const worker = yield* stage.worker("worker 1", { concurrency: 50 })
        // It starts no more, though there is more: that is what a full buffer means.
        let last = -1
        yield* until(
          "its buffer is full",
          Effect.gen(function*() {
            const started = yield* startedBy(stage, worker)
            const stands = started === last && started >= fullBuffer
            last = started
            return stands
          }),
          { every: 500, within: 60_000 }
        )
        assert.isBelow(last, total)
        const end = yield* Effect.scoped(Effect.gen(function*() {
          yield* stage.net.slow({ process: "worker 1", delay: 450 })
          yield* lock.release
          return yield* worker.end()
        }))
        const settled = yield* stage.value("select count(*)::int from pgqueue.finished")
        const counts = yield* stage.finish()
        assert.strictEqual(end.code, 0, worker.output())
        assert.isBelow(end.took, timing.gracePeriod + 5000)
        assert.strictEqual(
          yield* stage.value("select count(*)::int from pgqueue.finished where id = any ($1::uuid[])", [ids]),
          total
        )
        assert.strictEqual(counts.again, 0)
        assert.isAtLeast(settled, last)
        return { ...counts, buffered: last, settled, exit: end.took }
      })
  )
})
