/** Cron schedules: declared in code, fired once by whichever process is there, and changed at run time. */
import assert from "node:assert/strict"
import "./support/database.ts"
import { NodeRuntime } from "@effect/platform-node"
import { PgClient } from "@effect/sql-pg"
import { Config, DateTime, Effect, Layer, Option, Queue, Schema } from "effect"
import { CronScheduler, Job, JobQueue, Worker } from "../src/index.ts"

class Pulse extends Job.make("pulse") {}

/** The ticks that were handled. */
const handled = Effect.runSync(Queue.unbounded<DateTime.Utc>())

// #region declare
class Report extends Job.make("report", { payload: { days: Schema.Int } }) {}

const ReportHandler = Report.toLayer(
  Effect.fn("Report")(function*({ days }) {
    const { scheduledFor } = yield* Job.Current // the tick, however late this runs
    yield* Effect.log(`the ${days} days before ${DateTime.formatIsoDateUtc(scheduledFor)}`)
  })
)

const schedules = [
  CronScheduler.make("nightly-report", {
    cron: "0 3 * * *",
    timeZone: "Europe/Berlin",
    job: Report,
    payload: { days: 1 },
    missed: { all: 7 } // after an outage of a week, each of its reports
  }),
  CronScheduler.make("pulse", { every: "1 second", job: Pulse, missed: "skip", overlap: "skip" })
]
// #endregion

const PulseHandler = Pulse.toLayer(() => Effect.flatMap(Job.Current, (job) => Queue.offer(handled, job.scheduledFor)))

const PgLive = PgClient.layerConfig({ url: Config.Redacted("DATABASE_URL") })
const QueueLive = JobQueue.layer().pipe(Layer.provideMerge(PgLive))

// #region main
// As many processes as you like may run this: each tick has one job.
const SchedulerLive = CronScheduler.layer(schedules)
const WorkerLive = Worker.layer({ jobs: [Report, Pulse] }).pipe(Layer.provide([ReportHandler, PulseHandler]))
const Main = Layer.merge(SchedulerLive, WorkerLive).pipe(Layer.provideMerge(QueueLive))
// #endregion

// #region operate
const operate = Effect.gen(function*() {
  // A schedule for one customer, written at run time; every scheduler fires it.
  yield* CronScheduler.schedule(CronScheduler.make("report:acme", {
    cron: "30 8 * * mon-fri",
    timeZone: "America/New_York",
    job: Report,
    payload: { days: 30 }
  }))
  for (const { name, next, problem } of yield* CronScheduler.list) {
    yield* Effect.log(`${name}: ${Option.getOrElse(Option.map(next, DateTime.formatIso), () => String(problem))}`)
  }
  yield* CronScheduler.trigger("report:acme") // one job now
  yield* CronScheduler.pause("report:acme") // no ticks until it is resumed
  yield* CronScheduler.resume("report:acme")
  yield* CronScheduler.remove("report:acme")
  // The ticks of a span of the past of which no job is there.
  return yield* CronScheduler.backfill("nightly-report", {
    from: DateTime.makeUnsafe("2026-03-27T00:00:00Z"),
    to: DateTime.makeUnsafe("2026-03-30T00:00:00Z")
  })
})
// #endregion

const main = Effect.gen(function*() {
  const first = yield* Queue.take(handled)
  const second = yield* Queue.take(handled)
  const apart = DateTime.toEpochMillis(second) - DateTime.toEpochMillis(first)
  yield* Effect.log(`two pulses, ${apart} ms apart`)
  assert.equal(apart % 1000, 0)

  const { enqueued } = yield* operate
  yield* Effect.log(`${enqueued} reports made up`)
  // Three nights, one of them an hour shorter: still three reports.
  assert.equal(enqueued, 3)
  assert.equal((yield* CronScheduler.list).length, 2)
})

main.pipe(Effect.provide(Main), NodeRuntime.runMain)
