/** A transactional handler: what it writes and the end of its job commit together, or not at all. */
import assert from "node:assert/strict"
import "./support/database.ts"
import { NodeRuntime } from "@effect/platform-node"
import { PgClient } from "@effect/sql-pg"
import { Config, Effect, Layer, Schema } from "effect"
import { SqlClient } from "effect/sql"
import { Job, JobQueue, Worker } from "../src/index.ts"

const PgLive = PgClient.layerConfig({ url: Config.Redacted("DATABASE_URL") })
const QueueLive = JobQueue.layer().pipe(Layer.provideMerge(PgLive))

// #region transactional
class Transfer extends Job.make("transfer", {
  payload: { from: Schema.String, to: Schema.String, amount: Schema.Int },
  maxAttempts: 1
}) {}

const TransferHandler = Transfer.toLayer(
  Effect.fn("Transfer")(function*({ amount, from, to }) {
    const sql = yield* SqlClient.SqlClient
    yield* sql`update example_account set balance = balance + ${amount} where name = ${to}`
    // The constraint refuses an overdraft: the attempt fails, and nothing of it is left.
    yield* sql`update example_account set balance = balance - ${amount} where name = ${from}`
  }, Effect.orDie),
  { transactional: true }
)
// #endregion

const main = Effect.gen(function*() {
  const sql = yield* SqlClient.SqlClient
  yield* sql`drop table if exists example_account`
  yield* sql`create table example_account (name text primary key, balance int not null check (balance >= 0))`
  yield* sql`insert into example_account values ('ada', 100), ('bob', 0)`

  yield* Transfer.enqueue({ from: "ada", to: "bob", amount: 60 })
  yield* Transfer.enqueue({ from: "ada", to: "bob", amount: 60 })
  const { completed, failed } = yield* Worker.runUntilEmpty({ jobs: [Transfer], concurrency: 1 })

  const accounts = yield* sql<
    { name: string; balance: number }
  >`select name, balance from example_account order by name`
  yield* Effect.log(
    `${completed} completed, ${failed} failed: ${accounts.map((a) => `${a.name} ${a.balance}`).join(", ")}`
  )
  assert.deepEqual([completed, failed], [1, 1])
  assert.deepEqual(accounts.map(({ balance }) => balance), [40, 60])
})

main.pipe(Effect.provide(Layer.provideMerge(TransferHandler, QueueLive)), NodeRuntime.runMain)
