/** What a process leaves when it is killed: a whole lease, settlements that were not sent, a rescue that was half done. */
import { assert, describe, it } from "@effect/vitest"
import { Deferred, Effect, Layer } from "effect"
import { SqlClient } from "effect/sql"
import { Job, Worker } from "../src/index.ts"
import { Step } from "./programs/jobs.ts"
import { Ledger } from "./support/ledger.ts"
import { makeLink } from "./support/link.ts"
import { startWorker } from "./support/processes.ts"
import {
  allInPlace,
  assertRows,
  databaseUrl,
  endedTwice,
  phases,
  running,
  strangerDoes,
  until,
  untilAllEnded,
  untilValue,
  value,
  watchEnds,
  withQueue
} from "./support/queue.ts"
import { statements } from "./support/wire.ts"

const lease = 3000
const sweep = 500
const timing = { heartbeat: 300, lease, rescueInterval: sweep }
const forever = 3_600_000

/** A worker in this process that ends at once what took its victims an hour, unless it is held up. */
const startHeir = (concurrency: number, hold: (id: string) => Effect.Effect<void> = () => Effect.void) =>
  running(
    Worker.layer({ jobs: [Step], name: "heir", concurrency, ...timing }).pipe(
      Layer.provide(Step.toLayer(() =>
        Effect.gen(function*() {
          yield* Effect.flatMap(Ledger, ({ record }) => record("taken over"))
          yield* hold((yield* Job.Current).id)
        })
      ))
    )
  )

/** A process that holds so many jobs, all of them started. */
const startVictim = Effect.fnUntraced(function*(url: string, count: number, millis: (n: number) => number) {
  const victim = yield* startWorker({ url, name: "victim", concurrency: count, ...timing })
  const jobs = yield* Step.enqueueAll(Array.from({ length: count }, (_, n) => ({ millis: millis(n) })))
  yield* untilValue("select count(*)::int from ledger where phase = 'start'", count)
  return { victim, ids: jobs.map(({ id }) => id) }
})

const kill = Effect.fnUntraced(function*(program: Effect.Success<ReturnType<typeof startWorker>>) {
  yield* program.kill("SIGKILL")
  yield* program.ended
})

const assertLostOnce = (count: number) =>
  Effect.gen(function*() {
    yield* assertRows(
      "select status, attempt::int, rescued::int, count(*)::int as count from pgqueue.finished group by 1, 2, 3",
      [{ status: "completed", attempt: 1, rescued: 1, count }]
    )
    yield* assertRows(
      "select tag, count(*)::int as count, count(distinct job)::int as jobs from pgqueue.attempt group by 1",
      [
        { tag: "Lost", count, jobs: count }
      ]
    )
    assert.deepStrictEqual(yield* endedTwice, [])
    yield* allInPlace
  })

describe("a lease of 500 jobs", () => {
  it.live("that is lost once burns no attempt", () =>
    withQueue(Effect.gen(function*() {
      const url = yield* databaseUrl
      yield* watchEnds
      yield* Step.enqueueAll(Array.from({ length: 500 }, () => ({ millis: forever })))
      const victim = yield* startWorker({ url, name: "victim", concurrency: 500, ...timing })
      yield* untilValue("select count(*)::int from ledger where phase = 'start'", 500)
      yield* assertRows("select cardinality(ids) as jobs from pgqueue.lease", [{ jobs: 500 }])
      yield* kill(victim)
      yield* startHeir(500)
      yield* untilAllEnded({ within: lease + sweep * 1.2 + 10_000 })
      yield* assertLostOnce(500)
      assert.strictEqual(yield* phases("taken over"), 500)
    })), 60_000)
})

describe("settlements that wait in a process that is killed", () => {
  it.live("because the jobs' rows were locked are made by the next run of each job", () =>
    withQueue(Effect.gen(function*() {
      const url = yield* databaseUrl
      yield* watchEnds
      const { victim } = yield* startVictim(url, 20, () => 2500)
      const locked = yield* strangerDoes("select id from pgqueue.job for update")
      yield* untilValue("select count(*)::int from ledger where phase = 'end'", 20)
      // They were asked for and could not be had.
      yield* untilValue(
        `select count(*) > 0 from pg_stat_activity where application_name = 'victim' and datname = current_database()
           and query like '%${statements.settle}%'`,
        true
      )
      yield* kill(victim)
      // What it asked last may still be on the server, and would find the rows free.
      yield* untilValue(
        "select count(*)::int from pg_stat_activity where application_name = 'victim' and datname = current_database()",
        0
      )
      yield* locked.commit
      yield* assertRows("select id from pgqueue.finished", [])
      yield* startHeir(20)
      yield* untilAllEnded({ within: lease + sweep * 1.2 + 10_000 })
      yield* assertLostOnce(20)
    })))

  it.live("because an answer did not come are made by the next run, but for those that the server had made", () =>
    withQueue(Effect.gen(function*() {
      const url = yield* databaseUrl
      yield* watchEnds
      const link = yield* makeLink(url)
      link.holdAnswersTo(statements.settle)
      const { victim } = yield* startVictim(link.url, 40, (n) => 10 * n)
      yield* untilValue("select count(*)::int from ledger where phase = 'end'", 40)
      const made = yield* value("select count(*)::int from pgqueue.finished")
      assert.isAbove(made, 0)
      assert.isBelow(made, 40)
      yield* kill(victim)
      yield* startHeir(40)
      yield* untilAllEnded({ within: lease + sweep * 1.2 + 10_000 })
      yield* assertRows(
        `select rescued::int, attempt::int, status, count(*)::int as count,
           (select count(distinct l.job)::int from ledger l join pgqueue.finished g on g.id = l.job
            where l.phase = 'taken over' and g.rescued = f.rescued) as again
         from pgqueue.finished f group by 1, 2, 3 order by 1`,
        [
          { rescued: 0, attempt: 1, status: "completed", count: made, again: 0 },
          { rescued: 1, attempt: 1, status: "completed", count: 40 - made, again: 40 - made }
        ]
      )
      assert.deepStrictEqual(yield* endedTwice, [])
      yield* allInPlace
    })))
})

describe("a process that rescues", () => {
  it.live(
    "and is stopped half-way is replaced by another one, and does no harm when it goes on",
    () =>
      withQueue(Effect.gen(function*() {
        const url = yield* databaseUrl
        yield* watchEnds
        const { ids, victim } = yield* startVictim(url, 20, () => forever)
        const dead = yield* value<string>("select id::text from pgqueue.worker")
        const link = yield* makeLink(url)
        const rescuer = yield* startWorker({ url: link.url, name: "rescuer", ...timing })
        yield* untilValue("select count(*)::int from pgqueue.worker where name = 'rescuer'", 1)
        const first = yield* value<string>("select id::text from pgqueue.worker where name = 'rescuer'")
        let stopped = false
        // It has declared the victim dead, and what it holds is nobody's.
        const goOn = link.strike({ text: "delete from \"pgqueue\".worker", answer: dead, at: "answered" }, () => {
          process.kill(rescuer.pid, "SIGSTOP")
          stopped = true
        })
        yield* kill(victim)
        yield* until("it is stopped", Effect.sync(() => stopped))
        yield* assertRows("select worker::text, cardinality(ids) as jobs from pgqueue.lease", [{
          worker: dead,
          jobs: 20
        }])

        const gate = yield* Deferred.make<void>()
        const held = new Set<string>(ids.slice(0, 10))
        yield* startHeir(20, (id) => held.has(id) ? Deferred.await(gate) : Effect.void)
        // It may not judge before it has lived for a lease.
        yield* untilValue("select count(*)::int from ledger where phase = 'taken over'", 20, {
          within: lease + 2 * sweep * 1.2 + 5000
        })
        yield* untilValue("select count(*)::int from pgqueue.worker where name = 'rescuer'", 0)

        // It goes on where it was: with the rescue of a lease that is another one's by now.
        yield* Effect.sync(goOn)
        yield* rescuer.kill("SIGCONT")
        yield* untilValue(
          "select count(*)::int from pgqueue.worker where name = 'rescuer' and id <> $1::uuid and clock_timestamp() - started_at > interval '1 s'",
          1,
          { params: [first] }
        )
        yield* Deferred.succeed(gate, undefined)
        yield* untilAllEnded()
        yield* assertLostOnce(20)
        assert.strictEqual(yield* phases("taken over"), 20)
      })),
    90_000
  )

  it.live(
    "and is killed in the middle of its statement leaves the jobs to another one, unchanged",
    () =>
      withQueue(Effect.gen(function*() {
        const url = yield* databaseUrl
        yield* watchEnds
        const sql = yield* SqlClient.SqlClient
        yield* sql`create table public.gate (id int primary key)`
        yield* sql`insert into public.gate values (1)`
        yield* sql`create function public.pass() returns trigger language plpgsql as
        $$ begin perform 1 from public.gate for share; return new; end $$`
        yield* sql`create trigger pass before insert on pgqueue.attempt for each row execute function public.pass()`
        const closed = yield* strangerDoes("select id from public.gate for update")

        const { victim } = yield* startVictim(url, 20, () => forever)
        const rescuer = yield* startWorker({ url, name: "rescuer", ...timing })
        yield* kill(victim)
        const stuck = `from pg_stat_activity where datname = current_database() and application_name = 'rescuer'
        and wait_event_type = 'Lock'`
        yield* untilValue(`select count(*)::int ${stuck}`, 1)
        yield* kill(rescuer)
        // The other one finds the lease locked, and goes by.
        yield* startHeir(20)
        yield* untilValue("select count(*)::int from pgqueue.worker where name = 'rescuer'", 0)
        assert.strictEqual(yield* phases("taken over"), 0)
        // As the server does when it finds out that its client is gone.
        yield* value(`select count(pg_terminate_backend(pid))::int ${stuck}`)
        yield* untilValue(`select count(*)::int ${stuck}`, 0)
        yield* closed.commit
        yield* untilAllEnded({ within: 2 * sweep * 1.2 + 5000 })
        yield* assertLostOnce(20)
        assert.strictEqual(yield* phases("taken over"), 20)
      })),
    90_000
  )
})
