/** At most one job holds a key; and any SQL client can enqueue, for instance a trigger. */
import assert from "node:assert/strict"
import "./support/database.ts"
import { NodeRuntime } from "@effect/platform-node"
import { PgClient } from "@effect/sql-pg"
import { Config, Effect, Layer, Ref, Schema } from "effect"
import { SqlClient } from "effect/sql"
import { Job, JobQueue, Worker } from "../src/index.ts"

class Digest extends Job.make("digest", { payload: { user: Schema.String, text: Schema.String } }) {}

const PgLive = PgClient.layerConfig({ url: Config.Redacted("DATABASE_URL") })
const QueueLive = JobQueue.layer().pipe(Layer.provideMerge(PgLive))

// #region unique
const enqueueThrice = Effect.gen(function*() {
  const first = yield* Digest.enqueue({ user: "ada", text: "1 message" }, { unique: "ada" })
  // The key is held until the job has ended: this inserts nothing and returns the holder's id.
  const second = yield* Digest.enqueue({ user: "ada", text: "never sent" }, { unique: "ada" })
  // This gives the waiting holder a new payload.
  const third = yield* Digest.enqueue(
    { user: "ada", text: "2 messages, 1 mention" },
    { unique: { key: "ada", onConflict: "replace" } }
  )
  return { first, second, third }
})
// #endregion

const main = Effect.gen(function*() {
  const sent = yield* Ref.make<ReadonlyArray<string>>([])
  const DigestHandler = Digest.toLayer(({ text }) =>
    Effect.andThen(Effect.log(`digest: ${text}`), Ref.update(sent, (texts) => [...texts, text]))
  )

  const { first, second, third } = yield* enqueueThrice
  yield* Effect.log(`first ${first.status}, second ${second.status}, third ${third.status}`)
  assert.deepEqual([first.status, second.status, third.status], ["inserted", "existing", "replaced"])

  const sql = yield* SqlClient.SqlClient
  const [fromSql] = yield* sql<{ id: string }>`
    select pgqueue.enqueue('digest', '{"user": "ada", "text": "never sent"}', unique_key => 'ada')::text as id
  `
  assert.deepEqual([second.id, third.id, fromSql?.id], [first.id, first.id, first.id])

  yield* Effect.provide(Worker.runUntilEmpty({ jobs: [Digest] }), DigestHandler)
  assert.deepEqual(yield* Ref.get(sent), ["2 messages, 1 mention"])
})

main.pipe(Effect.provide(QueueLive), NodeRuntime.runMain)
