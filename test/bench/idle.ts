/** What a worker process asks of the server while there is nothing to do. */
import { ask } from "./ask.ts"
import type { Bench, Values } from "./bench.ts"
import { sleep } from "./clock.ts"

/** Statements in this database, as the server counts them. */
const statements = async (bench: Bench) => {
  const database = new URL(bench.place.postgres).pathname.slice(1)
  const [row] = await ask<{ calls: number }>(
    bench.server.url,
    `select coalesce(sum(calls), 0)::float8 as calls from pg_stat_statements s
       join pg_database d on d.oid = s.dbid where d.datname = $1`,
    [database]
  )
  return row!.calls
}

/** One worker with stock defaults, left alone for five seconds and then counted. */
export const idle = (seconds: number) => async (bench: Bench): Promise<Values> => {
  const worker = bench.worker("stock")
  await worker.next("ready", 60_000)
  await sleep(5000)
  const cpuBefore = bench.serverCpu()
  worker.send("report")
  const before = await worker.next("report", 10_000)
  const callsBefore = await statements(bench)
  const length = bench.seconds(seconds, 10)
  await sleep(length * 1000)
  const calls = await statements(bench) - callsBefore
  worker.send("report")
  const after = await worker.next("report", 10_000)
  return {
    statementsPerSecond: calls / length,
    cpuPercent: (after.cpu - before.cpu) / (after.elapsed - before.elapsed) * 100,
    serverCpuPercent: (bench.serverCpu() - cpuBefore) / length / 10,
    memory: after.peakMemory
  }
}
