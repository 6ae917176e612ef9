/** Handlers that take longer than a lease: one that lets its process go on is never doubled, one that blocks it is. */
import { assert, describe, it } from "@effect/vitest"
import { Deferred, Effect, Layer } from "effect"
import { Job, Worker } from "../src/index.ts"
import { Aside, Block, Step } from "./programs/jobs.ts"
import { Ledger } from "./support/ledger.ts"
import { startWorker } from "./support/processes.ts"
import {
  allInPlace,
  assertRows,
  databaseUrl,
  endedTwice,
  phases,
  rows,
  running,
  until,
  untilAllEnded,
  untilValue,
  value,
  watchEnds,
  withQueue
} from "./support/queue.ts"

const lease = 3000
const timing = { heartbeat: 300, lease, rescueInterval: 500 }

// Together: they wait.
describe.concurrent("a handler", () => {
  it.live(
    "that runs for seven leases is started once, while others look for lost jobs",
    () =>
      withQueue(Effect.gen(function*() {
        const url = yield* databaseUrl
        yield* startWorker({ url, name: "one", ...timing })
        yield* startWorker({ url, name: "other", ...timing })
        yield* Step.enqueueAll(Array.from({ length: 20 }, () => ({ millis: 7 * lease })))
        // Each of them looks for what the other one may have lost.
        yield* untilValue("select count(distinct boot)::int from ledger", 2)
        yield* untilAllEnded({ within: 7 * lease + 10_000 })
        yield* assertRows(
          "select phase, count(*)::int as count, count(distinct job)::int as jobs from ledger group by 1 order by 1",
          [{ phase: "end", count: 20, jobs: 20 }, { phase: "start", count: 20, jobs: 20 }]
        )
        yield* assertRows(
          "select distinct status, attempt::int, rescued::int from pgqueue.finished",
          [{ status: "completed", attempt: 1, rescued: 0 }]
        )
        yield* allInPlace
      })),
    90_000
  )

  it.live(
    "that blocks its process for three leases ends what others have taken over, and that changes nothing",
    () =>
      withQueue(Effect.gen(function*() {
        const url = yield* databaseUrl
        yield* watchEnds
        // Takes no part in the work: it has been alive for long enough to judge.
        yield* running(
          Worker.layer({ jobs: [Aside], name: "judge", ...timing }).pipe(
            Layer.provide(Aside.toLayer(() => Effect.void))
          )
        )
        yield* untilValue("select clock_timestamp() - started_at > interval '2 s' from pgqueue.worker", true)
        const blocked = yield* startWorker({ url, name: "blocked", concurrency: 8, ...timing })
        // They end when the process can go on, whatever they are told, and want to be settled.
        const steps = yield* Step.enqueueAll([1, 2, 3].map(() => ({ millis: 2 * lease, stubborn: true })))
        yield* untilValue("select count(*)::int from ledger where phase = 'start'", 3)
        const block = yield* Block.enqueue({ millis: 3 * lease })
        yield* untilValue("select count(*)::int from ledger where phase = 'start'", 4)
        const ids = [block, ...steps].map(({ id }) => id)
        const boot = yield* value<string>("select id::text from pgqueue.worker where name = 'blocked'")

        // Two end elsewhere, two still run there when the blocked process is back.
        const gate = yield* Deferred.make<void>()
        const held = new Set(steps.slice(0, 2).map(({ id }) => id))
        const take = Effect.gen(function*() {
          const { id } = yield* Job.Current
          yield* Effect.flatMap(Ledger, ({ record }) => record("taken over"))
          if (held.has(id)) yield* Deferred.await(gate)
        })
        yield* running(
          Worker.layer({ jobs: [Step, Block], name: "heir", ...timing }).pipe(
            Layer.provide([Step.toLayer(() => take), Block.toLayer(() => take)])
          )
        )
        yield* untilValue("select count(*)::int from pgqueue.finished", 2)
        yield* untilValue("select count(*)::int from ledger where phase = 'taken over'", 4)
        const everything = Effect.gen(function*() {
          return {
            finished: yield* rows("select * from pgqueue.finished where id = any ($1::uuid[]) order by id", [ids]),
            held: yield* rows("select * from pgqueue.job where id = any ($1::uuid[]) order by id", [ids]),
            attempts: yield* rows("select * from pgqueue.attempt order by id")
          }
        })
        const before = yield* everything
        assert.strictEqual(yield* phases("end"), 0, "the process is still blocked")
        assert.isTrue(before.finished.every((job: any) => job.status === "completed" && job.worker !== boot))
        assert.lengthOf(before.held, 2)

        yield* untilValue("select count(*)::int from ledger where phase = 'end'", 4, { within: 3 * lease + 5000 })
        // It starts again under a new id, and what it settles then comes after all that it had to say about the others.
        yield* untilValue("select count(*)::int from pgqueue.worker where name = 'blocked'", 1)
        assert.notStrictEqual(yield* value<string>("select id::text from pgqueue.worker where name = 'blocked'"), boot)
        yield* until(
          "it works again",
          Effect.gen(function*() {
            yield* Aside.enqueueAll([1, 2, 3, 4].map(() => ({ millis: 0 })))
            yield* untilValue("select count(*)::int from pgqueue.job", 2)
            return (yield* value("select count(*)::int from ledger where boot = 'blocked' and phase = 'end'")) > 4
          })
        )
        assert.deepStrictEqual(yield* everything, before)
        assert.isTrue(blocked.running(), blocked.output())

        yield* Deferred.succeed(gate, undefined)
        yield* untilAllEnded()
        yield* assertRows(
          `select distinct w.name, f.status, f.attempt::int, f.rescued::int
         from pgqueue.finished f join pgqueue.worker w on w.id = f.worker where f.id = any ($1::uuid[])`,
          [{ name: "heir", status: "completed", attempt: 1, rescued: 1 }],
          [ids]
        )
        assert.deepStrictEqual(yield* endedTwice, [])
        yield* allInPlace
      })),
    90_000
  )
})
