/**
 * A process of the fault scenarios: a worker, a producer or a scheduler. Its options are JSON in the first argument; it says
 * "ready" and dies with its parent.
 */
import * as PgClient from "@effect/sql-pg/PgClient"
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Random from "effect/Random"
import * as Reactivity from "effect/reactivity/Reactivity"
import * as Redacted from "effect/Redacted"
import * as References from "effect/References"
import * as Schema from "effect/Schema"
import * as SqlClient from "effect/sql/SqlClient"
import { isSqlError, type SqlError } from "effect/sql/SqlError"
import { randomUUID } from "node:crypto"
import { getHeapSpaceStatistics, setFlagsFromString } from "node:v8"
import { runInNewContext } from "node:vm"
import { CronScheduler, Job, JobQueue, type JobQueueError, Worker } from "../../src/index.ts"
import type * as Queue from "../../src/JobQueue.ts"
import { Ledger } from "../support/ledger.ts"
import * as Jobs from "./jobs.ts"
import { ready } from "./ready.ts"

/** Works for `millis`, and fails the first `fails` times. `key` is what its producer knows it by. */
export class Work extends Job.make("work", {
  payload: { key: Schema.String, millis: Schema.Finite, fails: Schema.Finite },
  retry: {}
}) {}

/** A statement of a handler failed, or the handler was to fail. */
class Unpaid extends Schema.TaggedError<Unpaid>()("Unpaid", { why: Schema.String }) {}

/** The same in a transaction, in which it pays, once before its work and once after it. */
export class Pay extends Job.make("pay", {
  payload: { key: Schema.String, millis: Schema.Finite, fails: Schema.Finite },
  error: Unpaid
}) {}

/** What a schedule enqueues. */
export class Tick extends Job.make("tick") {}

/** What the scenarios may say of a process. */
export interface ActorProgram {
  readonly role: "worker" | "producer" | "scheduler"
  readonly url: string
  readonly ledgerUrl: string
  /** Also the `application_name` of every session of the queue and the application. */
  readonly name: string
  readonly queue?: Queue.Options
  /** The server's own address, for what is between it and `url`. */
  readonly directUrl?: string
  /** The application's pool. */
  readonly connections?: number
  /** It prepares its statements, unless told otherwise. */
  readonly prepare?: boolean
  readonly concurrency?: number
  readonly gracePeriod?: number
  readonly heartbeat?: number
  readonly lease?: number
  readonly rescueInterval?: number
  readonly pollInterval?: number
  /** Jobs a second that a producer enqueues. */
  readonly rate?: number
  /** A producer has no transactions, and no jobs that run in one. */
  readonly withoutTransactions?: boolean
  /** How long its jobs take, from and to. */
  readonly millis?: readonly [number, number]
  /** It goes on when a promise is rejected, or an error thrown, and nobody was there to hear of it. */
  readonly forgiving?: boolean
  /** It says every ten seconds how much memory it needs once everything else has been collected, first without compiled code. */
  readonly tellsMemory?: boolean
  /** How many schedules a scheduler declares, each for every second. */
  readonly schedules?: number
}

const record = (phase: string, key: string) => Effect.flatMap(Ledger, (ledger) => ledger.record(phase, key))
/** Who is interrupted says so, and waits for nobody to hear it. */
const interrupted = Effect.onInterrupt(() => Effect.flatMap(Ledger, (ledger) => ledger.mention("interrupted")))

const WorkHandler = Work.toLayer(Effect.fnUntraced(function*({ fails, key, millis }) {
  yield* record("start", key)
  yield* Effect.sleep(millis)
  const failing = (yield* Job.Current).attempt <= fails
  yield* record(failing ? "failed" : "end", key)
  if (failing) return yield* Effect.die("it fails at first")
}, interrupted))

const PayHandler = Pay.toLayer(
  Effect.fnUntraced(
    function*({ fails, key, millis }) {
      const { attempt, id } = yield* Job.Current
      const sql = yield* SqlClient.SqlClient
      yield* record("start", key)
      yield* sql`insert into public.paid (job, part) values (${id}::uuid, 1)`
      yield* Effect.sleep(millis)
      yield* sql`insert into public.paid (job, part) values (${id}::uuid, 2)`
      const failing = attempt <= fails
      yield* record(failing ? "failed" : "end", key)
      if (failing) return yield* new Unpaid({ why: "it fails at first" })
    },
    Effect.catchTag("SqlError", ({ reason }) => new Unpaid({ why: reason._tag })),
    interrupted
  ),
  { transactional: true }
)

const TickHandler = Tick.toLayer(() => record("start", "tick"))

/** What a producer knows of each of its enqueues, in the ledger: written before it is sent, and after it was answered. */
const makeIntents = Effect.fnUntraced(function*(url: string, producer: string) {
  const sql = yield* PgClient.make({ url: Redacted.make(url), applicationName: "intents", maxConnections: 2 }).pipe(
    Effect.provideServiceEffect(Reactivity.Reactivity, Reactivity.make)
  )
  return {
    begin: (keys: ReadonlyArray<string>) =>
      Effect.orDie(sql.unsafe(
        "insert into public.intent (key, producer, outcome) select key, $2, 'pending' from unnest($1::uuid[]) as k(key)",
        [keys, producer]
      )),
    end: (ended: ReadonlyArray<{ readonly key: string; readonly outcome: string; readonly job: string }>) =>
      Effect.orDie(sql.unsafe(
        `update public.intent i set outcome = e.outcome, job = nullif(e.job, '')::uuid, answered_at = clock_timestamp()
         from unnest($1::uuid[], $2::text[], $3::text[]) as e(key, outcome, job) where i.key = e.key`,
        [ended.map(({ key }) => key), ended.map(({ outcome }) => outcome), ended.map(({ job }) => job)]
      ))
  }
})

class RolledBack extends Schema.TaggedError<RolledBack>()("RolledBack", {}) {}

/** Enqueues one job in one of the ways there are, and tells what has become of it. */
const produce = Effect.fnUntraced(function*(key: string, n: number, options: ActorProgram) {
  const { millis = [5, 50], withoutTransactions = false } = options
  const sql = yield* SqlClient.SqlClient
  const payload = {
    key,
    millis: yield* Random.nextIntBetween(millis[0], millis[1] + 1),
    // Some of each kind.
    fails: n % 10 === 3 || n % 100 === 1 ? 1 : 0
  }
  const enqueue = (): Effect.Effect<
    Job.Enqueued,
    Job.EnqueueError | RolledBack | SqlError,
    JobQueue | SqlClient.SqlClient
  > => {
    switch (withoutTransactions && [1, 2, 6, 7].includes(n % 20) ? 0 : n % 20) {
      case 1:
      case 2:
        return Pay.enqueue(payload)
      case 4:
        return Work.enqueue(payload, { unique: `${n % 400}` })
      case 5:
        return Work.enqueue(payload, { id: key })
      case 6:
        return sql.withTransaction(Work.enqueue(payload))
      case 7:
        return sql.withTransaction(Effect.andThen(Work.enqueue(payload), new RolledBack()))
      case 8:
        return Effect.map(Work.enqueueAll([payload]), ([one]) => one!)
      default:
        return Work.enqueue(payload)
    }
  }
  return yield* enqueue().pipe(
    Effect.map(({ id }) => ({ key, outcome: "acked", job: id as string })),
    Effect.catchCause((cause) => {
      const failure = cause.reasons.find(Cause.isFailReason)?.error
      // Where the connection of a transaction of the application's own is lost, it cannot be rolled back, and Effect makes a
      // defect of that, and of what the transaction failed with.
      const defects = cause.reasons.filter(Cause.isDieReason).map(({ defect }) => defect)
      const cut = (n % 20 === 6 || n % 20 === 7) && defects.some(isSqlError)
      const rejected = failure instanceof RolledBack || (cut && defects.some((one) => one instanceof RolledBack))
      // An enqueue that was not answered may have gone in. Any other defect is none of what may happen.
      const outcome = rejected ? "rejected" : defects.length > 0 && !cut ? "defect" : "unknown"
      const note = outcome === "defect" ? Effect.logError("an enqueue died", cause) : Effect.void
      return Effect.as(note, { key, outcome, job: "" })
    })
  )
})

/** Enqueues at a rate, whatever becomes of it, until it is told to stop; then waits for what is out. */
const producing = Effect.fnUntraced(function*(options: ActorProgram) {
  const { ledgerUrl, name, rate = 100 } = options
  const intents = yield* makeIntents(ledgerUrl, name)
  let out = 0
  let stopping = false
  let n = 0
  let due = 0
  const round = Effect.gen(function*() {
    due += rate / 40
    const count = Math.floor(due)
    due -= count
    // Who gets no answer does not pile up calls for ever.
    if (count === 0 || out > 20 * rate) return
    out += count
    const keys = Array.from({ length: count }, () => randomUUID())
    yield* intents.begin(keys)
    yield* Effect.forEach(keys, (key) => produce(key, n++, options), { concurrency: "unbounded" }).pipe(
      Effect.flatMap(intents.end),
      Effect.ensuring(Effect.sync(() => (out -= count))),
      Effect.forkDetach
    )
  })
  const loop = Effect.gen(function*() {
    while (!stopping) {
      yield* round
      yield* Effect.sleep(25)
    }
  })
  const done = yield* Effect.forkDetach(loop)
  yield* Effect.addFinalizer(() =>
    Effect.gen(function*() {
      stopping = true
      yield* Effect.timeoutOption(
        Effect.gen(function*() {
          while (done.pollUnsafe() === undefined || out > 0) yield* Effect.sleep(20)
        }),
        "20 seconds"
      )
    })
  )
})

const tellMemory = () => {
  setFlagsFromString("--expose-gc")
  // Sound: what that flag brings.
  const collect = runInNewContext("gc") as () => void
  setInterval(() => {
    collect()
    const { external, heapUsed } = process.memoryUsage()
    const compiled = getHeapSpaceStatistics().filter(({ space_name }) => /code|trusted/.test(space_name))
      .reduce((sum, { space_used_size }) => sum + space_used_size, 0)
    console.log(`memory ${Date.now()} ${heapUsed + external - compiled} ${heapUsed + external}`)
  }, 10_000).unref()
}

if (process.argv[1]?.endsWith("actor.ts") === true) {
  process.on("disconnect", () => process.kill(process.pid, "SIGKILL"))
  // Sound: the scenarios write it from the same type.
  const options = JSON.parse(process.argv[2]!) as ActorProgram
  if (options.forgiving === true) {
    const note = (error: unknown) => console.log(`forgiven: ${String(error)}`)
    process.on("unhandledRejection", note)
    process.on("uncaughtException", note)
  }
  if (options.tellsMemory === true) tellMemory()
  const { concurrency, connections, gracePeriod, heartbeat, lease, name, pollInterval, rescueInterval } = options
  const PgLive = PgClient.layer({
    url: Redacted.make(options.url),
    applicationName: name,
    maxConnections: connections ?? 10,
    prepare: options.prepare
  })
  const QueueLive = JobQueue.layer({
    ...options.queue,
    directUrl: options.directUrl === undefined ? undefined : Redacted.make(options.directUrl)
  }).pipe(Layer.provideMerge(PgLive))
  const boot = `${name} ${process.pid}`
  type Role = Layer.Layer<never, Job.EnqueueError | JobQueueError | SqlError, JobQueue | SqlClient.SqlClient>
  const roles: Record<ActorProgram["role"], Role> = {
    worker: Worker.layer({
      name: boot,
      jobs: [...Jobs.all, Work, Pay, Tick],
      concurrency: concurrency ?? 10,
      ...Object.fromEntries(
        Object.entries({ gracePeriod, heartbeat, lease, pollInterval, rescueInterval }).filter(([, value]) =>
          value !== undefined
        )
      )
    }).pipe(
      Layer.provide([Jobs.handlers, WorkHandler, PayHandler, TickHandler]),
      Layer.provide(Ledger.layer(options.ledgerUrl, boot))
    ),
    producer: Layer.effectDiscard(producing(options)),
    scheduler: CronScheduler.layer(
      Array.from(
        { length: options.schedules ?? 5 },
        (_, n) => CronScheduler.make(`schedule ${n}`, { every: "1 second", job: Tick, missed: { all: 1000 } })
      ),
      pollInterval === undefined ? {} : { pollInterval }
    )
  }
  const Ready = Layer.effectDiscard(Effect.sync(ready))
  Worker.runMain(
    Layer.launch(Ready.pipe(Layer.provide(roles[options.role]), Layer.provide(QueueLive))).pipe(
      Effect.provideService(References.MinimumLogLevel, process.env["LOG"] === "debug" ? "Debug" : "Info")
    )
  )
}
