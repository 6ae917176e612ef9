/** Enqueueing from one process: one by one, many at once, in bulk. */
import type { Bench, Values } from "./bench.ts"

const run = async (
  bench: Bench,
  task: { readonly kind: "single"; readonly count: number; readonly concurrent: number } | {
    readonly kind: "bulk"
    readonly count: number
    readonly chunk: number
  }
): Promise<Values> => {
  const producer = bench.producer(task)
  await producer.next("ready", 60_000)
  const cpuBefore = bench.serverCpu()
  producer.send("go")
  const { count, cpu, elapsed, peakMemory } = await producer.next("done", 300_000)
  const serverCpu = bench.serverCpu() - cpuBefore
  producer.send("stop")
  await producer.next("sent", 30_000)
  await bench.holds(count)
  return {
    perSecond: task.count / elapsed * 1000,
    cpuPerThousand: cpu / task.count * 1000,
    serverCpuPerThousand: serverCpu / task.count * 1000,
    memory: peakMemory
  }
}

/** `count` calls, `concurrent` at a time. */
export const single = (count: number, concurrent: number) => (bench: Bench) =>
  run(bench, { kind: "single", count: bench.jobs(count), concurrent })

/** `count` jobs, 1 000 in each call. */
export const bulk = (count: number) => (bench: Bench) =>
  run(bench, { kind: "bulk", count: bench.jobs(count, 2000), chunk: 1000 })
