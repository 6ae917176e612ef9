/**
 * A process with two workers under `Worker.runMain`: the handler of the first never ends, that of the second takes its time.
 * Its options are JSON in the first argument; see `worker.ts`.
 */
import * as PgClient from "@effect/sql-pg/PgClient"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Redacted from "effect/Redacted"
import * as SqlClient from "effect/sql/SqlClient"
import { Job, JobQueue, Worker } from "../../src/index.ts"
import { ready } from "./ready.ts"

export class Stubborn extends Job.make("stubborn", { queue: "first" }) {}
export class Patient extends Job.make("patient", { queue: "second" }) {}

/** What the test may say of the process. */
export interface StubbornProgram {
  readonly url: string
  /**
   * Once both run it waits for a signal (`waits`), fails, or lets go of the first worker alone, goes on for longer than any
   * patience, says so, and waits for a signal (`goes on`).
   */
  readonly does: "waits" | "fails" | "goes on"
}

if (process.argv[1]?.endsWith("stubborn.ts") === true) {
  process.on("disconnect", () => process.kill(process.pid, "SIGKILL"))
  // Sound: the test writes it from the same type.
  const { does, url } = JSON.parse(process.argv[2]!) as StubbornProgram
  const QueueLive = JobQueue.layer().pipe(Layer.provideMerge(PgClient.layer({ url: Redacted.make(url) })))
  let begun = 0
  const begins = Effect.sync(() => {
    begun++
  })
  // With a connection, which the pool waits for when it is closed.
  const StubbornHandler = Stubborn.toLayer(
    Effect.fnUntraced(
      function*() {
        const sql = yield* SqlClient.SqlClient
        yield* sql.reserve
        yield* begins
        return yield* Effect.never
      },
      Effect.orDie,
      Effect.scoped,
      Effect.uninterruptible
    )
  )
  const PatientHandler = Patient.toLayer(() => Effect.andThen(begins, Effect.sleep(4000)))
  const StubbornLive = Worker.layer({ jobs: [Stubborn], gracePeriod: 0 }).pipe(Layer.provide(StubbornHandler))
  const PatientLive = Worker.layer({ jobs: [Patient], gracePeriod: "20 seconds" }).pipe(Layer.provide(PatientHandler))
  const bothRun = Effect.gen(function*() {
    while (begun < 2) yield* Effect.sleep(10)
    ready()
  })
  const Program = {
    waits: Effect.andThen(bothRun, Effect.never).pipe(Effect.provide(Layer.merge(StubbornLive, PatientLive))),
    fails: Effect.andThen(bothRun, Effect.fail("enough")).pipe(Effect.provide(Layer.merge(StubbornLive, PatientLive))),
    "goes on": Effect.gen(function*() {
      yield* bothRun.pipe(Effect.provide(StubbornLive))
      yield* Effect.sleep(3000)
      process.stdout.write("it has gone on")
      return yield* Effect.never
    }).pipe(Effect.provide(PatientLive))
  }[does]
  Worker.runMain(Effect.provide(Program, QueueLive), { disableErrorReporting: true })
}
