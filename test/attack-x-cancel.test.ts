import { assert, describe, it } from "@effect/vitest"
import { Effect, Layer } from "effect"
import { SqlClient } from "effect/sql"
import { Admin, Job, Worker } from "../src/index.ts"
import { assertRows, rows, running, untilAllEnded, withQueue } from "./support/queue.ts"

class One extends Job.make("one") {}

describe("attack", () => {
  it.live("S1 a job that was cancelled does not start, whatever the snapshot of the transaction that cancelled it", () =>
    withQueue(Effect.gen(function*() {
      const sql = yield* SqlClient.SqlClient
      const { id } = yield* One.enqueue()
      // A worker holds it, and hands it back after the transaction has begun.
      yield* rows(
        "with r as (delete from pgqueue.ready returning id) insert into pgqueue.lease (id, worker, ids) select gen_random_uuid(), gen_random_uuid(), array[id] from r"
      )
      yield* sql.withTransaction(Effect.gen(function*() {
        yield* sql`set transaction isolation level repeatable read`
        yield* sql`select 1 from pgqueue.job`
        yield* rows(
          "with l as (delete from pgqueue.lease returning ids[1] as id) insert into pgqueue.ready (queue, lane, run_at, id, kind, attempt) select j.queue, j.priority, j.run_at, j.id, j.kind, j.attempt from pgqueue.job j join l using (id)"
        )
        assert.strictEqual(yield* Admin.cancel(id), "cancelling")
      }))
      let runs = 0
      yield* running(
        Worker.layer({ jobs: [One] }).pipe(Layer.provide(One.toLayer(() => Effect.sync(() => void runs++))))
      )
      yield* untilAllEnded()
      console.log("S1 runs", runs)
      yield* assertRows("select status, attempt from pgqueue.finished", [{ status: "cancelled", attempt: 0 }])
      assert.strictEqual(runs, 0)
    })))
})
