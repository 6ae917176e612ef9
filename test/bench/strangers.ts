/**
 * What 500 000 due jobs of a kind that nobody handles cost the others: latency and throughput without them, while they
 * stand in front, and once they are parked.
 *
 *     node test/bench/strangers.ts
 *
 * One process, one server of its own (or `DATABASE_URL`, in the schema `bench_strangers`).
 */
import { PgClient } from "@effect/sql-pg"
import { Deferred, Effect, Layer, Redacted, References } from "effect"
import { SqlClient } from "effect/sql"
import { Job, JobQueue, Worker } from "../../src/index.ts"
import { startPostgres } from "../support/embedded.ts"

class Known extends Job.make("known") {}
class Strange extends Job.make("strange", { priority: "high" }) {}

const strangers = Number(process.env["STRANGERS"] ?? 500_000)
const server = process.env["DATABASE_URL"] === undefined ? await startPostgres() : undefined
const PgLive = PgClient.layer({ url: Redacted.make(process.env["DATABASE_URL"] ?? server!.url) })
const QueueLive = JobQueue.layer({ schema: "bench_strangers" }).pipe(
  Layer.provideMerge(PgLive),
  Layer.provideMerge(Layer.succeed(References.MinimumLogLevel, "Warn"))
)

let onStart = (): void => {}
const WorkerLive = Worker.layer({
  jobs: [Known],
  concurrency: 50,
  heartbeat: "1 second",
  lease: "3 seconds",
  rescueInterval: "1 second"
}).pipe(Layer.provide(Known.toLayer(() => Effect.sync(() => onStart()))))

const median = (all: ReadonlyArray<number>) => all.toSorted((a, b) => a - b)[all.length >> 1]!

/** Waits until a number of jobs have started, and returns how long that took from `begin`, in milliseconds. */
const took = <E, R>(count: number, begin: Effect.Effect<unknown, E, R>) =>
  Effect.gen(function*() {
    const all = yield* Deferred.make<void>()
    let left = count
    onStart = () => {
      if (--left === 0) Deferred.doneUnsafe(all, Effect.void)
    }
    const begun = performance.now()
    yield* begin
    yield* Deferred.await(all)
    return performance.now() - begun
  })

const measure = Effect.fnUntraced(function*(what: string) {
  const latencies: Array<number> = []
  for (let n = 0; n < 200; n++) {
    latencies.push(yield* took(1, Known.enqueue()))
    yield* Effect.sleep(5)
  }
  const drains: Array<number> = []
  for (let n = 0; n < 3; n++) {
    drains.push(yield* took(20_000, Known.enqueueAll(Array.from({ length: 20_000 }, () => undefined))))
  }
  console.log(
    `${what.padEnd(26)} latency p50 ${median(latencies).toFixed(2)} ms, 20 000 jobs in ${
      (median(drains) / 1000).toFixed(2)
    } s`
  )
})

const main = Effect.gen(function*() {
  const sql = yield* SqlClient.SqlClient
  const parked = Effect.map(
    sql<{ count: number }>`select count(*)::int as count from bench_strangers.ready where lane >= 200`,
    ([row]) => row!.count
  )
  const vacuumed = Effect.map(
    sql<{ at: Date | null }>`select last_autovacuum as at from pg_stat_user_tables
      where schemaname = 'bench_strangers' and relname = 'ready'`,
    ([row]) => row!.at ?? new Date(0)
  )
  yield* measure("without them")
  for (let n = 0; n < strangers; n += 10_000) {
    yield* Strange.enqueueAll(Array.from({ length: Math.min(10_000, strangers - n) }, () => undefined))
  }
  const begun = performance.now()
  while ((yield* parked) < strangers) yield* Effect.sleep("1 second")
  const parkedAt = Date.now()
  console.log(`${strangers} of them were parked within ${Math.round((performance.now() - begun) / 1000)} s`)
  yield* measure("with them, just parked")
  // Where they stood is dead until autovacuum has been there, within a minute by default.
  while ((yield* vacuumed) < new Date(parkedAt)) yield* Effect.sleep("1 second")
  console.log(`vacuumed within ${Math.round((performance.now() - begun) / 1000)} s`)
  yield* measure("with them")
  yield* sql`delete from bench_strangers.ready where lane >= 200`
  yield* sql`delete from bench_strangers.job where kind = 'strange'`
  yield* sql`vacuum bench_strangers.ready, bench_strangers.job`
  yield* measure("without them again")
})

await Effect.runPromise(
  Effect.scoped(Effect.andThen(Layer.build(WorkerLive), main)).pipe(Effect.provide(QueueLive))
)
await server?.stop()
