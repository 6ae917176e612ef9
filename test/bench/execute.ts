/**
 * How long `execute` takes to another process and back, beside the time from an enqueue to the start of its handler.
 *
 *     node test/bench/execute.ts
 *
 * Two processes on one machine, taken in turn, on a queue that is otherwise idle. Uses `DATABASE_URL`, or a server of its
 * own.
 */
import { PgClient } from "@effect/sql-pg"
import { Effect, Layer, Redacted, References } from "effect"
import { fork } from "node:child_process"
import { Job, JobQueue, Worker } from "../../src/index.ts"
import { startPostgres } from "../support/embedded.ts"

class Echo extends Job.make("echo") {}

/** The same clock in both processes, in milliseconds. */
const now = () => Number(process.hrtime.bigint()) / 1e6

const queueAt = (url: string) =>
  JobQueue.layer({ schema: "bench_execute" }).pipe(
    Layer.provide(PgClient.layer({ url: Redacted.make(url) })),
    Layer.provideMerge(Layer.succeed(References.MinimumLogLevel, "Warn"))
  )

const [, self, role, url] = process.argv

if (role === "worker") {
  process.on("disconnect", () => process.exit())
  const Handler = Echo.toLayer(() => Effect.sync(() => void process.send!(now())))
  const Main = Worker.layer({ jobs: [Echo] }).pipe(Layer.provide(Handler), Layer.provide(queueAt(url!)))
  Effect.runFork(Effect.andThen(
    Effect.provide(Echo.enqueue(), queueAt(url!)),
    Layer.launch(Main)
  ))
} else {
  const rounds = Number(process.env["ROUNDS"] ?? 300)
  const server = process.env["DATABASE_URL"] === undefined ? await startPostgres() : undefined
  const databaseUrl = process.env["DATABASE_URL"] ?? server!.url
  const worker = fork(self!, ["worker", databaseUrl])
  const started = () => new Promise<number>((resolve) => worker.once("message", (at) => resolve(at as number)))
  const quantile = (all: ReadonlyArray<number>, part: number) =>
    all.toSorted((a, b) => a - b)[Math.floor(all.length * part)]!.toFixed(2)

  await started()
  const starts: Array<number> = []
  const trips: Array<number> = []
  const round = Effect.gen(function*() {
    yield* Effect.sleep(20)
    const begun = now()
    const start = started()
    yield* Echo.enqueue()
    starts.push((yield* Effect.promise(() => start)) - begun)
    yield* Effect.sleep(20)
    const sent = now()
    const other = started()
    yield* Echo.execute(undefined)
    trips.push(now() - sent)
    yield* Effect.promise(() => other)
  })
  await Effect.runPromise(
    Effect.forEach(Array.from({ length: rounds + 20 }), () => round, { discard: true }).pipe(
      Effect.provide(queueAt(databaseUrl))
    )
  )
  for (const all of [starts, trips]) all.splice(0, 20)
  console.log(`enqueue to start  p50 ${quantile(starts, 0.5)} ms  p95 ${quantile(starts, 0.95)} ms`)
  console.log(`execute           p50 ${quantile(trips, 0.5)} ms  p95 ${quantile(trips, 0.95)} ms`)
  console.log(`ratio of the p50s ${(Number(quantile(trips, 0.5)) / Number(quantile(starts, 0.5))).toFixed(2)}`)
  worker.disconnect()
  await server?.stop()
}
