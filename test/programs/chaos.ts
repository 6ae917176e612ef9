/** A worker process for the test of everything at once. Its options are JSON in the first argument; see `worker.ts`. */
import * as NodeRuntime from "@effect/platform-node/NodeRuntime"
import * as PgClient from "@effect/sql-pg/PgClient"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Random from "effect/Random"
import * as Redacted from "effect/Redacted"
import * as Schedule from "effect/Schedule"
import * as Schema from "effect/Schema"
import * as SqlClient from "effect/sql/SqlClient"
import { Job, JobQueue, Worker } from "../../src/index.ts"
import { ready } from "./ready.ts"

const definition = {
  payload: { millis: Schema.Number, how: Schema.Number },
  success: Schema.Number,
  retry: Schedule.spaced("50 millis")
}

/** Its handler is transactional. */
export class Paid extends Job.make("paid", definition) {}
/** Its handler is not. */
export class Plain extends Job.make("plain", definition) {}
/** As `Plain`, and not every process has a handler of it: it is parked now and then. */
export class Rare extends Job.make("rare", definition) {}

const kinds = { paid: Paid, plain: Plain, rare: Rare }

/** What the test may say of the process. */
export interface ChaosProgram {
  readonly url: string
  /** Also the `application_name` of every session of the queue and the application. */
  readonly name: string
  readonly kinds: ReadonlyArray<keyof typeof kinds>
}

/** Pays, and does now and then whatever else a handler may do; `how` decides. */
const handler = Effect.fnUntraced(function*({ how, millis }: { readonly how: number; readonly millis: number }) {
  const { attempt, id, kind } = yield* Job.Current
  const sql = yield* SqlClient.SqlClient
  if (how % 7 === 1) yield* Job.progress(how)
  if (how % 11 === 2) yield* Effect.forkChild(Effect.forever(Effect.andThen(Job.progress(how), Effect.sleep(5))))
  yield* Effect.sleep(millis)
  if (how % 13 === 3 && attempt < 3) return yield* Effect.die("no")
  if (how % 17 === 4 && (yield* Random.nextBoolean)) return yield* Job.snooze(30)
  if (how % 19 === 5) return yield* Job.cancel("enough")
  if (how % 23 === 6) yield* Effect.forkDetach(Job.discard("enough"))
  if (how % 29 === 7) yield* Effect.andThen(Effect.forkChild(Effect.sleep(1)), Effect.sleep(30))
  yield* Effect.orDie(sql`insert into public.paid (job, kind) values (${id}::uuid, ${kind})`)
  return how
})

if (process.argv[1]?.endsWith("chaos.ts") === true) {
  process.on("disconnect", () => process.kill(process.pid, "SIGKILL"))
  // Sound: the test writes it from the same type.
  const options = JSON.parse(process.argv[2]!) as ChaosProgram
  const PgLive = PgClient.layer({
    url: Redacted.make(options.url),
    maxConnections: 6,
    applicationName: options.name
  })
  const WorkerLive = Worker.layer({
    jobs: options.kinds.map((kind) => kinds[kind]),
    concurrency: 10,
    heartbeat: 400,
    lease: 2500,
    rescueInterval: 400,
    gracePeriod: 300
  }).pipe(
    Layer.provide([Paid.toLayer(handler, { transactional: true }), Plain.toLayer(handler), Rare.toLayer(handler)]),
    Layer.provide(JobQueue.layer({ migrate: false }).pipe(Layer.provideMerge(PgLive)))
  )
  const Ready = Layer.effectDiscard(Effect.sync(ready))
  NodeRuntime.runMain(Layer.launch(Ready.pipe(Layer.provide(WorkerLive))), { teardown: Worker.teardown })
}
