/** What many scenarios do and ask: to processes, sessions and servers, and with a queue of their own. */
import { PgClient } from "@effect/sql-pg"
import { assert } from "@effect/vitest"
import { Effect, Layer, Redacted } from "effect"
import { readFileSync } from "node:fs"
import { JobQueue } from "../../src/index.ts"
import type * as Queue from "../../src/JobQueue.ts"
import { probeText } from "../../src/Store.ts"
import type { EmbeddedPostgres } from "../support/embedded.ts"
import { serverProcesses } from "../support/processes.ts"
import { now, until } from "../support/queue.ts"
import { theirs } from "./invariants.ts"
import type { Actor, Stage } from "./stage.ts"

/** Fails when one of them has ended. */
export const allRun = (actors: ReadonlyArray<Actor>): void => {
  for (const { name, output, running } of actors) assert.isTrue(running(), `${name} has ended:\n${output()}`)
}

/** Terminates every session of the processes, so many times, 2 s apart. */
export const terminating = (stage: Stage, rounds = 1) =>
  stage.during(
    "terminating",
    Effect.gen(function*() {
      for (let round = 0; round < rounds; round++) {
        if (round > 0) yield* Effect.sleep(2000)
        const ended = yield* stage.value(
          `select count(pg_terminate_backend(pid))::int from pg_stat_activity where ${theirs}`
        )
        assert.isAtLeast(ended, 1)
      }
    })
  )

/** Their sessions that listen, by what these last sent: LISTEN, or the look whether their link is still there. */
export const listening = `${theirs} and (query ilike 'listen %' or query = '${probeText}')`

/** Waits until no job of this kind is left, while those of others come and go. */
export const untilNoneLeft = (stage: Stage, kind: string) =>
  until(
    `no job "${kind}" is left`,
    Effect.map(
      stage.value("select count(*)::int from pgqueue.job where kind = $1", [kind]),
      (left) => left === 0
    ),
    { within: 60_000, every: 100 }
  )

/** A queue at a URL with a client of its own, in the current scope: a process, so to speak. */
export const queueAt = (url: string, pool: Omit<PgClient.PgPoolConfig, "url"> = {}, options: Queue.Options = {}) =>
  Layer.build(Layer.fresh(
    JobQueue.layer(options).pipe(Layer.provideMerge(PgClient.layer({ url: Redacted.make(url), ...pool })))
  ))

/** How long after its enqueue each job of a kind has started, in milliseconds. */
export const waits = Effect.fnUntraced(function*(stage: Stage, kind: string) {
  const started = yield* stage.ledger.query<{ job: string; at: number }>(
    "select job::text, (extract(epoch from min(at)) * 1000)::float8 as at from ledger where phase = 'start' group by job"
  )
  const enqueued = yield* stage.rows<{ id: string; at: number }>(
    `select id::text, (extract(epoch from enqueued_at) * 1000)::float8 as at from pgqueue.finished where kind = $1
     union all select id::text, (extract(epoch from enqueued_at) * 1000)::float8 from pgqueue.job where kind = $1 order by 2`,
    [kind]
  )
  const at = new Map(started.map((one) => [one.job, one.at]))
  return enqueued.flatMap((one) => at.has(one.id) ? [at.get(one.id)! - one.at] : [])
})

/** Runs an effect and returns what it took in milliseconds. */
export const timed = <A, E, R>(effect: Effect.Effect<A, E, R>) =>
  Effect.gen(function*() {
    const begun = yield* now
    yield* effect
    return (yield* now) - begun
  })

/** How much of a core a process has used while an effect ran, in percent. */
export const cpuDuring = Effect.fnUntraced(function*<A, E, R>(pid: number, effect: Effect.Effect<A, E, R>) {
  /** User and system time, in ticks of 10 ms. */
  const used = () => {
    const fields = readFileSync(`/proc/${pid}/stat`, "utf8").replace(/^.*\) /s, "").split(" ")
    return Number(fields[11]) + Number(fields[12])
  }
  const before = used()
  const took = yield* timed(effect)
  return (used() - before) * 10 / took * 100
})

/** The ids of jobs that were enqueued. */
export const idsOf = (jobs: ReadonlyArray<{ readonly id: string }>): ReadonlyArray<string> => jobs.map(({ id }) => id)

const signalServer = (server: EmbeddedPostgres, signal: NodeJS.Signals) => {
  for (const pid of serverProcesses(server.dataDir)) {
    try {
      process.kill(pid, signal)
    } catch {
      // It has ended by itself.
    }
  }
}

/** Freezes all processes of a server, in the current scope. */
export const frozen = (server: EmbeddedPostgres) =>
  Effect.acquireRelease(
    Effect.sync(() => signalServer(server, "SIGSTOP")),
    () => Effect.sync(() => signalServer(server, "SIGCONT"))
  )
