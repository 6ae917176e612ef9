/**
 * How late the ticks of 10 000 schedules are, each fired every minute, and what that costs the scheduler's processor.
 *
 *     node test/bench/cron.ts
 *
 * With one scheduler and with eight, 20 % of the schedules in the same second and then all of them. Where there is `taskset`,
 * the schedulers share one core. Uses `DATABASE_URL`, or a server of its own. No worker runs: the jobs stay in line.
 */
import { PgClient } from "@effect/sql-pg"
import { Effect, Layer, Redacted, References } from "effect"
import { SqlClient } from "effect/sql"
import { type ChildProcess, spawn, spawnSync } from "node:child_process"
import { join } from "node:path"
import { JobQueue } from "../../src/index.ts"
import type { SchedulerProgram } from "../programs/scheduler.ts"
import { startPostgres } from "../support/embedded.ts"

const schedules = Number(process.env["SCHEDULES"] ?? 10_000)
const minutes = Number(process.env["MINUTES"] ?? 2)
const schema = "bench_cron"
const server = process.env["DATABASE_URL"] === undefined ? await startPostgres() : undefined
const url = process.env["DATABASE_URL"] ?? server!.url
const pinned = spawnSync("taskset", ["-c", "0", "true"]).status === 0

const QueueLive = JobQueue.layer({ schema }).pipe(
  Layer.provideMerge(PgClient.layer({ url: Redacted.make(url) })),
  Layer.provideMerge(Layer.succeed(References.MinimumLogLevel, "Warn"))
)

const start = (n: number) => {
  const options: SchedulerProgram = { url, schema, name: `scheduler ${n}`, usage: true }
  const command = [
    process.execPath,
    join(import.meta.dirname, "..", "programs", "scheduler.ts"),
    JSON.stringify(options)
  ]
  const [file, ...args] = pinned ? ["taskset", "-c", "0", ...command] : command
  const child = spawn(file!, args, { stdio: ["ignore", "pipe", "inherit", "ipc"] })
  const process_ = { child, cpu: 0 }
  child.stdout!.on("data", (chunk: Buffer) => {
    for (const [, cpu] of chunk.toString().matchAll(/cpu ([\d.]+)/g)) process_.cpu = Number(cpu)
  })
  return Effect.as(Effect.promise(() => new Promise((resolve) => child.once("message", resolve))), process_)
}
const end = (child: ChildProcess) => Effect.sync(() => child.kill("SIGKILL"))

const measure = Effect.fnUntraced(function*(what: string, together: number, processes: number) {
  const sql = yield* SqlClient.SqlClient
  yield* sql.unsafe(
    `truncate ${schema}.schedule, ${schema}.job, ${schema}.ready, ${schema}.finished`
  )
  yield* sql.unsafe(
    `insert into ${schema}.schedule (name, spec, kind, metadata)
     select 'schedule ' || n, case when n <= $2 then 0 else n % 60 end || ' * * * * *', 'tick', json_build_object('schedule', 'schedule ' || n)
     from generate_series(1, $1::int) n`,
    [schedules, together]
  )
  const fleet = yield* Effect.forEach(Array.from({ length: processes }, (_, n) => n), start, { concurrency: 8 })
  const [{ from }] = (yield* sql.unsafe<{ from: string }>(
    `select (date_trunc('minute', clock_timestamp()) + interval '1 minute')::text as from`
  )) as [{ from: string }]
  const elapsed = sql.unsafe<{ left: number }>(
    `select extract(epoch from $1::timestamptz - clock_timestamp())::float8 as left`,
    [from]
  )
  yield* Effect.sleep(((yield* elapsed)[0]!.left - 0.5) * 1000)
  const before = fleet.map(({ cpu }) => cpu)
  yield* Effect.sleep(minutes * 60_000 + 5000)
  const used = fleet.map(({ cpu }, n) => cpu - before[n]!)
  yield* Effect.forEach(fleet, ({ child }) => end(child))
  const [row] = yield* sql.unsafe<any>(
    `select count(*)::int as count, count(distinct (metadata->>'schedule', scheduled_for))::int as ticks,
      percentile_cont(array[0.5, 0.99, 1]) within group (order by extract(epoch from enqueued_at - scheduled_for) * 1000) as late
     from ${schema}.job
     where scheduled_for >= $1::timestamptz and scheduled_for < $1::timestamptz + $2 * interval '1 minute'`,
    [from, minutes]
  )
  const expected = schedules * minutes
  const late = (row.late as ReadonlyArray<number>).map((late) => late.toFixed(0))
  console.log(
    `${what.padEnd(42)} ${row.count} of ${expected} ticks${
      row.count === row.ticks ? "" : ", SOME TWICE"
    }, late by p50 ${late[0]} ms, p99 ${late[1]} ms, max ${late[2]} ms; processor ${
      used.map((cpu) => cpu.toFixed(1)).join(" + ")
    } s in ${minutes * 60} s`
  )
})

const main = Effect.gen(function*() {
  console.log(pinned ? "the schedulers share one core" : "no taskset: the schedulers share all cores")
  for (const processes of [1, 8]) {
    const who = processes === 1 ? "one scheduler" : `${processes} schedulers`
    yield* measure(`${who}, 20 % in the same second`, schedules / 5, processes)
    yield* measure(`${who}, all in the same second`, schedules, processes)
  }
})

await Effect.runPromise(Effect.provide(main, QueueLive))
await server?.stop()
process.exit()
