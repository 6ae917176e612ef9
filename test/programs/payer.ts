/** A process whose transactional handlers write a row each. Its options are JSON in the first argument; see `worker.ts`. */
import * as NodeRuntime from "@effect/platform-node/NodeRuntime"
import * as PgClient from "@effect/sql-pg/PgClient"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Redacted from "effect/Redacted"
import * as Schema from "effect/Schema"
import * as SqlClient from "effect/sql/SqlClient"
import { Job, JobQueue, Worker } from "../../src/index.ts"
import { ready } from "./ready.ts"

/** Pays twice, with a pause in between: both or neither. */
export class Pay extends Job.make("pay", { payload: { millis: Schema.Number } }) {}

/** What the test may say of the process. */
export interface PayerProgram {
  readonly url: string
}

const PayHandler = Pay.toLayer(
  Effect.fnUntraced(function*({ millis }) {
    const { id } = yield* Job.Current
    const sql = yield* SqlClient.SqlClient
    yield* sql`insert into public.paid (job, part) values (${id}::uuid, 1)`
    yield* Effect.sleep(millis)
    yield* sql`insert into public.paid (job, part) values (${id}::uuid, 2)`
  }, Effect.orDie),
  { transactional: true }
)

if (process.argv[1]?.endsWith("payer.ts") === true) {
  process.on("disconnect", () => process.kill(process.pid, "SIGKILL"))
  // Sound: the test writes it from the same type.
  const { url } = JSON.parse(process.argv[2]!) as PayerProgram
  const PgLive = PgClient.layer({ url: Redacted.make(url), maxConnections: 10 })
  const WorkerLive = Worker.layer({
    jobs: [Pay],
    concurrency: 10,
    heartbeat: 300,
    lease: 1500,
    rescueInterval: 300
  }).pipe(Layer.provide(PayHandler), Layer.provide(JobQueue.layer().pipe(Layer.provideMerge(PgLive))))
  const Ready = Layer.effectDiscard(Effect.sync(ready))
  NodeRuntime.runMain(Layer.launch(Ready.pipe(Layer.provide(WorkerLive))), { teardown: Worker.teardown })
}
