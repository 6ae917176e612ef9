/** A process with one scheduler. Its options are JSON in the first argument; it says "ready" and dies with its parent. */
import * as NodeRuntime from "@effect/platform-node/NodeRuntime"
import * as PgClient from "@effect/sql-pg/PgClient"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Redacted from "effect/Redacted"
import * as References from "effect/References"
import { CronScheduler, Job, JobQueue } from "../../src/index.ts"
import { ready } from "./ready.ts"

/** What the tests may say of a scheduler process. */
export interface SchedulerProgram {
  readonly url: string
  /** Also the `application_name` of every session of the queue and the application. */
  readonly name: string
  readonly schema?: string
  readonly pollInterval?: number
  /** How many schedules it declares itself, each for every second; the others it finds in the database. */
  readonly declares?: number
  /** Says how much processor time it has used, in seconds, every second. */
  readonly usage?: boolean
}

process.on("disconnect", () => process.kill(process.pid, "SIGKILL"))

// Sound: the tests write it from the same type.
const { declares = 0, name, schema, url, usage, ...options } = JSON.parse(process.argv[2]!) as SchedulerProgram

/** Nobody handles it here. */
class Tick extends Job.make("tick") {}

const PgLive = PgClient.layer({ url: Redacted.make(url), applicationName: name })
const QueueLive = JobQueue.layer(schema === undefined ? {} : { schema }).pipe(Layer.provideMerge(PgLive))
const SchedulerLive = CronScheduler.layer(
  Array.from(
    { length: declares },
    (_, n) => CronScheduler.make(`schedule ${n}`, { every: "1 second", job: Tick, missed: { all: 1000 } })
  ),
  options
).pipe(Layer.provide(QueueLive))
const Ready = Layer.effectDiscard(Effect.sync(() => {
  ready()
  if (usage === true) {
    setInterval(() => {
      const { system, user } = process.cpuUsage()
      process.stdout.write(`cpu ${(user + system) / 1e6}\n`)
    }, 1000)
  }
}))

NodeRuntime.runMain(
  Layer.launch(Ready.pipe(Layer.provide(SchedulerLive))).pipe(
    Effect.provideService(References.MinimumLogLevel, process.env["LOG"] === "debug" ? "Debug" : "Info")
  )
)
