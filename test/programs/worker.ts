/** A process with one worker. Its options are JSON in the first argument; it says "ready" and dies with its parent. */
import * as NodeRuntime from "@effect/platform-node/NodeRuntime"
import * as PgClient from "@effect/sql-pg/PgClient"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Redacted from "effect/Redacted"
import * as References from "effect/References"
import * as SqlClient from "effect/sql/SqlClient"
import { JobQueue, Worker } from "../../src/index.ts"
import { hidden } from "../support/hidden.ts"
import { Ledger } from "../support/ledger.ts"
import * as Jobs from "./jobs.ts"
import { ready } from "./ready.ts"

/** What the tests may say of a worker process. */
export interface WorkerProgram {
  readonly url: string
  /** The server's own address, where `url` is that of a pooler. */
  readonly directUrl?: string
  /** Where the handlers write what they do, when that is not the queue's database. */
  readonly ledgerUrl?: string
  /** Also the `application_name` of every session of the queue and the application. */
  readonly name: string
  readonly concurrency?: number
  readonly gracePeriod?: number
  readonly heartbeat?: number
  readonly lease?: number
  readonly rescueInterval?: number
  readonly pollInterval?: number
  /** Its client is not a `PgClient`, and it runs under `Worker.runMain`. */
  readonly hidden?: boolean
}

process.on("disconnect", () => process.kill(process.pid, "SIGKILL"))

// Sound: the tests write it from the same type.
const { directUrl, hidden: isHidden = false, name, url, ledgerUrl = url, ...options } = JSON.parse(
  process.argv[2]!
) as WorkerProgram

const PgLive = PgClient.layer({ url: Redacted.make(url), applicationName: name })
const SqlLive = isHidden
  ? Layer.effect(SqlClient.SqlClient, Effect.map(PgClient.PgClient, hidden)).pipe(Layer.provide(PgLive))
  : PgLive
const QueueLive = JobQueue.layer({
  directUrl: directUrl === undefined ? undefined : Redacted.make(directUrl)
}).pipe(Layer.provideMerge(SqlLive))
const WorkerLive = Worker.layer({ ...options, name, jobs: Jobs.all }).pipe(
  Layer.provide(Jobs.handlers),
  Layer.provide(Ledger.layer(ledgerUrl, name)),
  Layer.provide(QueueLive)
)
const Ready = Layer.effectDiscard(Effect.sync(ready))

const Main = Layer.launch(Ready.pipe(Layer.provide(WorkerLive))).pipe(
  Effect.provideService(References.MinimumLogLevel, process.env["LOG"] === "debug" ? "Debug" : "Info")
)
if (isHidden) Worker.runMain(Main)
else NodeRuntime.runMain(Main, { teardown: Worker.teardown })
