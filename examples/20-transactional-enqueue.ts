/** An enqueue in a transaction is part of it: it commits, or rolls back, together with the data it is about. */
import assert from "node:assert/strict"
import "./support/database.ts"
import { NodeRuntime } from "@effect/platform-node"
import { PgClient } from "@effect/sql-pg"
import { Config, Effect, Layer, Ref, Schema } from "effect"
import { SqlClient } from "effect/sql"
import { Job, JobQueue, Worker } from "../src/index.ts"

// #region transaction
class Welcome extends Job.make("welcome", { payload: { user: Schema.String } }) {}

class NameTaken extends Schema.TaggedError<NameTaken>()("NameTaken", { user: Schema.String }) {}

const register = Effect.fn("register")(
  function*(user: string) {
    const sql = yield* SqlClient.SqlClient
    yield* Welcome.enqueue({ user })
    const inserted = yield* sql`insert into example_user (name) values (${user}) on conflict do nothing returning name`
    if (inserted.length === 0) return yield* new NameTaken({ user })
  },
  (effect) => Effect.flatMap(SqlClient.SqlClient, (sql) => sql.withTransaction(effect))
)
// #endregion

const PgLive = PgClient.layerConfig({ url: Config.Redacted("DATABASE_URL") })
const QueueLive = JobQueue.layer().pipe(Layer.provideMerge(PgLive))

const main = Effect.gen(function*() {
  const sql = yield* SqlClient.SqlClient
  const welcomed = yield* Ref.make<ReadonlyArray<string>>([])
  const WelcomeHandler = Welcome.toLayer(({ user }) =>
    Effect.andThen(Effect.log(`welcome, ${user}`), Ref.update(welcomed, (users) => [...users, user]))
  )

  yield* sql`drop table if exists example_user`
  yield* sql`create table example_user (name text primary key)`
  yield* register("ada")
  const error = yield* Effect.flip(register("ada"))
  yield* Effect.log(`the second registration failed with ${error._tag}: its job was rolled back with it`)

  yield* Effect.provide(Worker.runUntilEmpty({ jobs: [Welcome] }), WelcomeHandler)
  assert.equal(error._tag, "NameTaken")
  assert.deepEqual(yield* Ref.get(welcomed), ["ada"])
  yield* sql`drop table example_user`
})

main.pipe(Effect.provide(QueueLive), NodeRuntime.runMain)
