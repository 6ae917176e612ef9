/**
 * What the cleanup of 1 000 000 finished jobs costs those that run, 1 000 a second: the 99th percentile of claims and of the
 * time from enqueue to start, in turn with the cleanup at rest and at work, for both strategies.
 *
 *     node test/bench/cleanup.ts
 *
 * One process, one server of its own (or `DATABASE_URL`, in the schema `bench_cleanup`).
 */
import { PgClient } from "@effect/sql-pg"
import { Effect, Fiber, Layer, Redacted, References, Schema } from "effect"
import { SqlClient } from "effect/sql"
import { loadavg } from "node:os"
import { Job, JobQueue, Worker } from "../../src/index.ts"
import * as Tasks from "../../src/Tasks.ts"
import { startPostgres } from "../support/embedded.ts"

class Note extends Job.make("note", { payload: { at: Schema.Finite } }) {}

const old = Number(process.env["FINISHED"] ?? 1_000_000)
const perSecond = Number(process.env["RATE"] ?? 1000)
const windowMillis = Number(process.env["WINDOW"] ?? 5000)
type Strategy = "archive" | "delete"

// Sound: whoever runs it has to name these.
const strategies = (process.env["STRATEGY"] ?? "delete,archive").split(",") as ReadonlyArray<Strategy>
const server = process.env["DATABASE_URL"] === undefined ? await startPostgres() : undefined
const PgLive = PgClient.layer({ url: Redacted.make(process.env["DATABASE_URL"] ?? server!.url) })

let claims: Array<number> = []
let starts: Array<number> = []
/** The queue, with every claim timed. */
const TimedQueue = Layer.effect(
  JobQueue,
  Effect.map(JobQueue, (queue) => {
    const { store } = queue.internal
    const claim: typeof store.claim = (options) =>
      Effect.suspend(() => {
        const begun = performance.now()
        return Effect.tap(store.claim(options), () => Effect.sync(() => claims.push(performance.now() - begun)))
      })
    return JobQueue.of({ ...queue, internal: { ...queue.internal, store: { ...store, claim } } })
  })
)
const QueueLive = TimedQueue.pipe(
  Layer.provideMerge(JobQueue.layer({ schema: "bench_cleanup" })),
  Layer.provideMerge(PgLive),
  Layer.provideMerge(Layer.succeed(References.MinimumLogLevel, "Warn"))
)
const WorkerLive = Worker.layer({ jobs: [Note], concurrency: 50 }).pipe(
  Layer.provide(Note.toLayer(({ at }) => Effect.sync(() => void starts.push(performance.now() - at))))
)

const quantile = (all: ReadonlyArray<number>, part: number) =>
  all.toSorted((a, b) => a - b)[Math.min(all.length - 1, Math.floor(all.length * part))] ?? NaN
const median = (all: ReadonlyArray<number>) => quantile(all, 0.5)

/** Enqueues at the rate asked for, ten at a time, whatever becomes of them. */
const load = Effect.gen(function*() {
  const begun = performance.now()
  let sent = 0
  while (true) {
    const due = Math.floor((performance.now() - begun) * perSecond / 1000) - sent
    if (due >= 10) {
      sent += due
      const at = performance.now()
      yield* Effect.forkDetach(Note.enqueueAll(Array.from({ length: due }, () => ({ at }))))
    }
    yield* Effect.sleep(5)
  }
})

interface Window {
  readonly claim50: number
  readonly claim99: number
  readonly start99: number
  readonly jobs: number
}

/** One window of the load. */
const observe = Effect.gen(function*() {
  claims = []
  starts = []
  yield* Effect.sleep(windowMillis)
  return {
    claim50: quantile(claims, 0.5),
    claim99: quantile(claims, 0.99),
    start99: quantile(starts, 0.99),
    jobs: starts.length * 1000 / windowMillis
  }
})

const show = (what: string, all: ReadonlyArray<Window>) => {
  const of = (key: keyof Window) => median(all.map((one) => one[key]))
  console.log(
    `${what.padEnd(24)} claim p50 ${of("claim50").toFixed(2)} p99 ${of("claim99").toFixed(2)} ms, start p99 ${
      of("start99").toFixed(1)
    } ms, ${of("jobs").toFixed(0)} jobs/s (${all.length} windows, p99s ${
      all.map((one) => one.claim99.toFixed(1)).join(" ")
    })`
  )
  return of("claim99")
}

const compare = Effect.fnUntraced(function*(strategy: Strategy) {
  const sql = yield* SqlClient.SqlClient
  const { store } = (yield* JobQueue).internal
  yield* store.mergePolicy("cleanup", { strategy, interval: 86_400_000 })
  yield* sql`insert into bench_cleanup.finished (id, kind, queue, priority, status, result, attempt, max_attempts, rescued, snoozed,
      lease, worker, metadata, enqueued_at, scheduled_for, started_at, finished_at, payload)
    select bench_cleanup.uuid_v7(), 'note', 'default', 5, 'completed', '{"ok":true}', 1, 5, 0, 0,
      gen_random_uuid(), gen_random_uuid(), '{}', now(), now(), now(), now() - interval '3 days' + i * interval '1 millisecond',
      '{"to":"somebody@example.com","subject":"sixty bytes or so","n":1}'
    from generate_series(1, ${old}) as i`
  yield* sql`vacuum analyze bench_cleanup.finished`
  yield* sql`checkpoint`
  // Nobody else cleans up today.
  yield* store.take("cleanup", 0)

  let worked = 0
  let done = false
  const running = yield* Effect.forkChild(load)
  // Warm.
  yield* Effect.sleep(3000)
  const rest: Array<Window> = []
  const work: Array<Window> = []
  while (!done) {
    rest.push(yield* observe)
    const cleaning = yield* Effect.forkChild(Tasks.cleanUpOnce(store))
    const begun = performance.now()
    const one = yield* observe
    done = cleaning.pollUnsafe() !== undefined
    worked += performance.now() - begun
    if (!done) work.push(one)
    yield* Fiber.interrupt(cleaning)
  }
  yield* Fiber.interrupt(running)
  const before = show(`${strategy}: at rest`, rest)
  const after = show(`${strategy}: at work`, work)
  console.log(
    `${strategy}: ${old} jobs in ${(worked / 1000).toFixed(0)} s of work; claim p99 ${after >= before ? "+" : ""}${
      ((after / before - 1) * 100).toFixed(0)
    } %; load average ${loadavg()[0]!.toFixed(1)}`
  )
  const [left] = yield* sql<{ archived: number }>`select count(*)::int as archived from bench_cleanup.archive`
  console.log(`${strategy}: ${left!.archived} in the archive`)
})

await Effect.runPromise(
  Effect.scoped(
    Effect.andThen(Layer.build(WorkerLive), Effect.forEach(strategies, compare, { discard: true }))
  ).pipe(Effect.provide(QueueLive))
)
await server?.stop()
