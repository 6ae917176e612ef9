/** `Worker.runUntilEmpty` works until nothing is due, whoever has enqueued it: a statement of a handler, too. */
import { assert, it } from "@effect/vitest"
import { Effect, Schema } from "effect"
import { SqlClient } from "effect/sql"
import { Job, Worker } from "../src/index.ts"
import { allInPlace, assertRows, rows, value, withQueue } from "./support/queue.ts"

class Step extends Job.make("step", { payload: { n: Schema.Int } }) {}

it.live(
  "runUntilEmpty runs what a handler has brought in by SQL before it ended",
  () =>
    withQueue(Effect.gen(function*() {
      const ran: Array<number> = []
      const handlers = Step.toLayer(({ n }) =>
        Effect.gen(function*() {
          ran.push(n)
          // Longer than a queue that has run dry is looked at once more.
          yield* Effect.sleep(60)
          const sql = yield* SqlClient.SqlClient
          if (n < 3) yield* Effect.orDie(sql`select pgqueue.enqueue('step', ${JSON.stringify({ n: n + 1 })}::json)`)
        })
      )
      yield* Step.enqueue({ n: 0 })
      const counts = yield* Worker.runUntilEmpty({ jobs: [Step] }).pipe(Effect.provide(handlers))
      const due = yield* value("select count(*)::int from pgqueue.ready where run_at <= clock_timestamp()")
      assert.deepStrictEqual({ due, ran, completed: counts.completed }, { due: 0, ran: [0, 1, 2, 3], completed: 4 })
      yield* allInPlace
    })),
  20_000
)

it.live(
  "runUntilEmpty starts as many as it may, though some of what it had claimed went back",
  () =>
    withQueue(Effect.gen(function*() {
      const handlers = Step.toLayer(({ n }) => Effect.sleep(n))
      const quick = Array.from({ length: 1000 }, () => ({ n: 0 }))
      // What has been claimed behind these goes back while they fill all slots.
      yield* Step.enqueueAll([...quick, ...Array.from({ length: 4 }, () => ({ n: 3000 })), ...quick])
      const counts = yield* Worker.runUntilEmpty({ jobs: [Step], concurrency: 4, limit: 1500 }).pipe(
        Effect.provide(handlers)
      )
      assert.strictEqual(counts.completed, 1500)
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.ready"), 504)
      yield* allInPlace
    })),
  30_000
)

it.live(
  "runUntilEmpty takes back what a dead one has left, where nobody else is there to do it",
  () =>
    withQueue(Effect.gen(function*() {
      yield* Step.enqueue({ n: 0 })
      const dead = "00000000-0000-4000-8000-000000000009"
      yield* rows(
        `insert into pgqueue.worker (id, name, queues, kinds, prefixes, lease_ms, beat_at)
         values ($1::uuid, 'dead', '{}', '{}', '{}', 1000, clock_timestamp() - interval '1 minute')`,
        [dead]
      )
      yield* rows(
        "with gone as (delete from pgqueue.ready returning id) insert into pgqueue.lease (id, worker, ids) select gen_random_uuid(), $1::uuid, array_agg(id) from gone",
        [dead]
      )
      const timing = { lease: 1000, heartbeat: 200, rescueInterval: 200 }
      const counts = yield* Worker.runUntilEmpty({ jobs: [Step], ...timing }).pipe(
        Effect.provide(Step.toLayer(() => Effect.void))
      )
      assert.strictEqual(counts.completed, 1)
      yield* assertRows("select status, rescued::int from pgqueue.finished", [{ status: "completed", rescued: 1 }])
      yield* allInPlace
    })),
  30_000
)
