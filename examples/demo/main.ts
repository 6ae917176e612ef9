/**
 * The demo: two worker processes and a producer do a few thousand jobs, and every one of them is accounted for.
 *
 *     npm run demo
 *
 * It uses the database at `DATABASE_URL`, in schemas of its own that it drops at the end, or without one a PostgreSQL
 * of its own. It exits with 0, or with 1 and the reason.
 */
import { NodeRuntime, NodeServices } from "@effect/platform-node"
import { Cause, Config, Console, Effect, Layer, Predicate } from "effect"
import { CronScheduler, JobQueue } from "../../src/index.ts"
import { type Check, holds, runChecks } from "./checks.ts"
import { DatabaseLive, DemoFailed } from "./database.ts"
import { everySecond, schema } from "./jobs.ts"
import { Ledger } from "./ledger.ts"
import { latency, throughput } from "./numbers.ts"
import { startWorker } from "./processes.ts"
import { enqueueBurst, enqueueMix, enqueuePings } from "./producer.ts"
import { during, untilEmpty } from "./progress.ts"
import { count, seconds, step, View } from "./view.ts"

const scale = Config.Number("DEMO_SCALE").pipe(Config.withDefault(1))

/** Pings until each of the worker processes has answered. */
const warmUp = Effect.gen(function*() {
  const { startsByProcess } = yield* Ledger
  while ((yield* startsByProcess).size < 2) yield* enqueuePings("warm-up", 10)
  // Code that runs for the first time is slow.
  yield* enqueuePings("warm-up", 20)
}).pipe(
  Effect.timeoutOrElse({
    duration: "30 seconds",
    orElse: () => new DemoFailed({ message: "the worker processes did not answer" })
  })
)

const demo = Effect.gen(function*() {
  const size = yield* scale
  yield* Ledger.use(({ createTables }) => createTables)

  const workers = yield* Effect.all([startWorker(), startWorker()])
  const work = Effect.gen(function*() {
    yield* step(
      "two worker processes start",
      warmUp,
      () => `two worker processes have started: ${workers.map(({ pid }) => pid).join(" and ")}`
    )
    yield* step(
      "100 jobs, one after the other",
      enqueuePings("latency", 100),
      () => "100 jobs, one after the other"
    )
    yield* step(
      "many jobs of six kinds",
      Effect.tap(during(enqueueMix(size)), untilEmpty),
      (jobs) => `${count(jobs)} jobs of six kinds: urgent, slow, delayed, failing, poisoned, rolled back`
    )
    yield* step(
      "the schedule is paused",
      Effect.andThen(CronScheduler.pause(everySecond.name), untilEmpty),
      () => "the schedule is paused"
    )
    yield* step(
      "many jobs at once",
      Effect.tap(during(enqueueBurst(size)), untilEmpty),
      (jobs) => `${count(jobs)} jobs at once that only note their start`
    )
  })
  yield* Effect.raceAllFirst([work, ...workers.map(({ neverEnds }) => neverEnds)])
  const exitCodes = yield* step(
    "the worker processes stop",
    Effect.all(workers.map(({ stop }) => stop), { concurrency: "unbounded" }),
    () => "the worker processes have stopped"
  )

  const checks = [...yield* runChecks, {
    claim: "told to stop, both processes ended with code 0",
    about: exitCodes.length,
    wrong: exitCodes.filter((code) => code !== 0).length
  }]
  yield* report(checks)
  const failed = checks.filter((check) => !holds(check))
  if (failed.length > 0) {
    return yield* new DemoFailed({ message: `these did not hold: ${failed.map(({ claim }) => claim).join("; ")}` })
  }
})

const report = Effect.fnUntraced(function*(checks: ReadonlyArray<Check>) {
  const { line } = yield* View
  yield* line("")
  for (const check of checks) {
    const found = holds(check) ? count(check.about) : `not for ${count(check.wrong)} of ${count(check.about)}`
    yield* line(`${holds(check) ? "✓" : "✗"} ${check.claim.padEnd(55)} ${found.padStart(6)}`)
  }

  const [idle, mix, burst] = yield* Effect.all([latency, throughput("mix"), throughput("burst")])
  const perSecond = count(Math.round(burst.jobs / burst.millis * 1000))
  yield* line("")
  yield* line(
    `latency     ${idle.p50.toFixed(1)} ms p50, ${idle.p99.toFixed(1)} ms p99, from enqueue to start on an idle queue`
  )
  yield* line(
    `throughput  ${perSecond} jobs/s: ${count(burst.jobs)} at once in ${
      seconds(burst.millis)
    }, from the enqueue to the last end`
  )
  yield* line(
    `the mix     ${count(mix.jobs)} jobs in ${seconds(mix.millis)}; its handlers sleep, and some jobs wait by design`
  )
})

const Services = Layer.merge(JobQueue.layer({ schema, onUnavailable: "fail" }), Ledger.layer).pipe(
  Layer.provideMerge(DatabaseLive),
  Layer.provideMerge([View.layer, NodeServices.layer])
)

/** What an error says, and what caused it says, and so on. */
const messages = (error: unknown): ReadonlyArray<string> =>
  Predicate.isError(error)
    ? [error.message, ...error.cause === undefined ? [] : messages(error.cause)]
    : [String(error)]

const reason = (error: unknown) => [...new Set(messages(error))].join(": ")

demo.pipe(
  Effect.scoped,
  Effect.provide(Services),
  Effect.tapCause((cause) =>
    Cause.hasInterruptsOnly(cause) ? Effect.void : Console.error(`✗ the demo failed: ${reason(Cause.squash(cause))}`)
  ),
  NodeRuntime.runMain({ disableErrorReporting: true })
)
