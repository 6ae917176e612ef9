/** A worker process that is killed, or frozen until others have taken its jobs: nothing is lost, nothing ends twice. */
import { assert, describe, it } from "@effect/vitest"
import { Deferred, Effect, Layer } from "effect"
import { Job, Worker } from "../src/index.ts"
import { Aside, Step } from "./programs/jobs.ts"
import { Ledger } from "./support/ledger.ts"
import { startWorker } from "./support/processes.ts"
import {
  allInPlace,
  assertRows,
  databaseUrl,
  phases,
  rows,
  running,
  until,
  untilAllEnded,
  untilValue,
  value,
  withQueue
} from "./support/queue.ts"

const lease = 3000
const timing = { heartbeat: 300, lease, rescueInterval: 500 }

describe("a worker process that is killed", () => {
  it.live("has its jobs taken over within the lease and a sweep, unburnt", () =>
    withQueue(Effect.gen(function*() {
      const url = yield* databaseUrl
      const total = 2000
      yield* Step.enqueueAll(Array.from({ length: total }, () => ({ millis: 20 })))
      const victim = yield* startWorker({ url, name: "victim", concurrency: 20, ...timing })
      // The other one has been alive for long enough to judge.
      yield* startWorker({ url, name: "heir", concurrency: 10, ...timing })
      yield* until("both work", Effect.map(value("select count(distinct boot)::int from ledger"), (n) => n === 2))
      yield* until(
        "it has some",
        Effect.map(value("select count(*)::int from ledger where boot = 'victim'"), (n) => n > 100)
      )
      yield* victim.kill("SIGKILL")
      yield* victim.ended
      // What it had sent may still be carried out.
      yield* untilValue(
        "select count(*)::int from pg_stat_activity where application_name = 'victim' and datname = current_database()",
        0
      )
      const left = yield* value(
        "select coalesce(sum(cardinality(ids)), 0)::int from pgqueue.lease l join pgqueue.worker w on w.id = l.worker where w.name = 'victim'"
      )
      assert.isAbove(left, 0)
      const beat = yield* value<string>("select beat_at::text from pgqueue.worker where name = 'victim'")
      yield* untilValue(
        "select count(*)::int from pgqueue.worker where name = 'victim'",
        0,
        { within: lease + 500 * 1.2 + 5000 }
      )
      // Not before the lease was over.
      assert.isAtLeast(
        yield* value("select (extract(epoch from clock_timestamp() - $1::timestamptz) * 1000)::float8", [beat]),
        lease
      )
      yield* untilAllEnded({ within: 60_000 })
      yield* assertRows(
        "select status, attempt::int, count(*)::int as count from pgqueue.finished group by 1, 2",
        [{ status: "completed", attempt: 1, count: total }]
      )
      yield* assertRows("select count(*)::int as rescued from pgqueue.finished where rescued > 0", [{ rescued: left }])
      // Started twice is only what was rescued, and each of these has an attempt that says so.
      yield* assertRows(
        `select l.job::text from ledger l where l.phase = 'start' group by l.job
         having count(*) > 1 and not exists (select 1 from pgqueue.attempt a where a.job = l.job and a.tag = 'Lost')`,
        []
      )
      yield* allInPlace
    })), 120_000)

  it.live(
    "counts an attempt from its second rescue on, and a job that kills every worker ends discarded",
    () =>
      withQueue(Effect.gen(function*() {
        const url = yield* databaseUrl
        yield* running(
          // Takes no part in the work: it only rescues.
          Worker.layer({ jobs: [Aside], ...timing }).pipe(Layer.provide(Aside.toLayer(() => Effect.void)))
        )
        const { id } = yield* Step.enqueue({ millis: 3_600_000 }, { maxAttempts: 2 })
        for (let crash = 1; crash <= 3; crash++) {
          const victim = yield* startWorker({ url, name: `victim ${crash}`, ...timing })
          yield* untilValue("select count(*)::int from ledger", crash, { within: 40_000 })
          yield* victim.kill("SIGKILL")
          yield* untilValue(
            `select count(*)::int from (select rescued from pgqueue.job union all select rescued from pgqueue.finished) j
           where rescued = $1`,
            1,
            { params: [crash], within: 15_000 }
          )
        }
        // As many starts as attempts, plus one for the first crash.
        yield* assertRows("select id::text, status, attempt::int, rescued::int from pgqueue.finished", [
          { id, status: "discarded", attempt: 2, rescued: 3 }
        ])
        assert.strictEqual(yield* phases("start"), 3)
        yield* allInPlace
      })),
    120_000
  )
})

describe("a worker process that is frozen for three leases", () => {
  it.live(
    "changes nothing when it wakes up, stops its handlers, and works again under a new name",
    () =>
      withQueue(Effect.gen(function*() {
        const url = yield* databaseUrl
        const zombie = yield* startWorker({ url, name: "zombie", concurrency: 8, ...timing })
        // Four end after it has woken up, whatever they are told, and want to be settled; four go on for ever.
        const jobs = yield* Step.enqueueAll(
          [1, 2, 3, 4, 5, 6, 7, 8].map((n) => n <= 4 ? { millis: 1500, stubborn: true } : { millis: 3_600_000 })
        )
        yield* untilValue("select count(*)::int from ledger where phase = 'start'", 8)
        const boot = yield* value<string>("select id::text from pgqueue.worker")
        yield* zombie.kill("SIGSTOP")

        // Another one ends every second of its jobs and still runs the others when the zombie wakes up.
        const gate = yield* Deferred.make<void>()
        const held = new Set(jobs.filter((_, n) => n % 2 === 1).map(({ id }) => id))
        const HeirHandler = Step.toLayer(() =>
          Effect.gen(function*() {
            const { id } = yield* Job.Current
            yield* Effect.flatMap(Ledger, ({ record }) => record("heir"))
            if (held.has(id)) yield* Deferred.await(gate)
          })
        )
        yield* running(Worker.layer({ jobs: [Step], name: "heir", ...timing }).pipe(Layer.provide(HeirHandler)))
        yield* untilValue("select count(*)::int from pgqueue.finished", 4, { within: 3 * lease + 10_000 })
        yield* untilValue("select count(*)::int from ledger where phase = 'heir'", 8)
        yield* untilValue(
          "select extract(epoch from clock_timestamp() - max(at)) * 1000 > 3 * $1::int from ledger where phase = 'start'",
          true,
          { params: [lease] }
        )
        const everything = Effect.gen(function*() {
          const ids = [jobs.map(({ id }) => id)]
          return {
            finished: yield* rows("select * from pgqueue.finished where id = any ($1::uuid[]) order by id", ids),
            held: yield* rows("select * from pgqueue.job where id = any ($1::uuid[]) order by id", ids),
            attempts: yield* rows("select * from pgqueue.attempt order by id")
          }
        })
        const before = yield* everything
        assert.isTrue(before.finished.every((job: any) => job.status === "completed" && job.worker !== boot))
        assert.lengthOf(before.held, 4)

        yield* zombie.kill("SIGCONT")
        // Within a beat, which also finds out.
        yield* untilValue("select count(*)::int from ledger where phase = 'interrupted'", 4, { within: 5000 })
        yield* untilValue("select count(*)::int from ledger where phase = 'end'", 4, { within: 5000 })
        yield* untilValue("select count(*)::int from pgqueue.worker where name = 'zombie'", 1, { within: 10_000 })
        assert.notStrictEqual(yield* value<string>("select id::text from pgqueue.worker where name = 'zombie'"), boot)

        // It works again, and all that it had to say about the others is over.
        yield* until(
          "it works again",
          Effect.gen(function*() {
            yield* Step.enqueueAll(Array.from({ length: 50 }, () => ({ millis: 5 })))
            yield* untilValue("select count(*)::int from pgqueue.job", 4)
            return (yield* value("select count(distinct job)::int from ledger where boot = 'zombie'")) > 8
          })
        )
        assert.deepStrictEqual(yield* everything, before)
        yield* Deferred.succeed(gate, undefined)
        yield* untilAllEnded()
        yield* assertRows(
          "select distinct w.name, f.status, f.attempt::int from pgqueue.finished f join pgqueue.worker w on w.id = f.worker where f.id = any ($1::uuid[])",
          [{ name: "heir", status: "completed", attempt: 1 }],
          [jobs.map(({ id }) => id)]
        )
        yield* allInPlace
      })),
    120_000
  )

  it.live(
    "loses nothing and starts nothing twice when it wakes up within the lease",
    () =>
      withQueue(Effect.gen(function*() {
        const url = yield* databaseUrl
        const long = { heartbeat: 500, lease: 6000, rescueInterval: 500 }
        const sleeper = yield* startWorker({ url, name: "sleeper", concurrency: 5, ...long })
        yield* startWorker({ url, name: "other", concurrency: 5, ...long })
        yield* Step.enqueueAll(Array.from({ length: 600 }, () => ({ millis: 20 })))
        yield* until(
          "it works",
          Effect.map(value("select count(*)::int from ledger where boot = 'sleeper'"), (n) => n > 20)
        )
        yield* sleeper.kill("SIGSTOP")
        yield* untilValue(
          "select extract(epoch from clock_timestamp() - beat_at) > 2 from pgqueue.worker where name = 'sleeper'",
          true
        )
        yield* sleeper.kill("SIGCONT")
        yield* untilAllEnded()
        yield* assertRows("select job from ledger where phase = 'start' group by job having count(*) > 1", [])
        yield* assertRows("select status, count(*)::int as count from pgqueue.finished group by 1", [
          { status: "completed", count: 600 }
        ])
        yield* allInPlace
      })),
    90_000
  )
})
