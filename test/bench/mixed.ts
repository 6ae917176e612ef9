/** Enqueue and work at the same time, in two processes. */
import { type Bench, refuse, type Values } from "./bench.ts"
import { sleep } from "./clock.ts"
import { checked } from "./drain.ts"
import type { Orders } from "./producer.ts"
import { spread } from "./statistics.ts"

/** Jobs are counted from the second second on; in the end every one that was sent must have been handled. */
const mixed = (task: Orders["task"], seconds: number) => async (bench: Bench): Promise<Values> => {
  const worker = bench.worker("best", { count: true })
  const producer = bench.producer(task)
  await Promise.all([worker.next("ready", 60_000), producer.next("ready", 60_000)])
  let handled = 0
  worker.on((told) => {
    if (!("handled" in told)) return
    handled = told.handled
    producer.send(told)
  })
  producer.send("go")
  await sleep(1000)
  worker.send("report")
  const before = await worker.next("report", 10_000)
  worker.send("clear")
  const cpuBefore = bench.serverCpu()
  await sleep(bench.seconds(seconds, 2) * 1000)
  worker.send("report")
  const after = await worker.next("report", 10_000)
  const serverCpu = bench.serverCpu() - cpuBefore
  producer.send("stop")
  const sent = await producer.next("sent", 30_000)
  const deadline = performance.now() + 30_000
  while (handled < sent) {
    if (performance.now() > deadline) refuse(`${sent - handled} of ${sent} jobs were not handled`)
    await sleep(20)
  }
  worker.send("report")
  checked(await worker.next("report", 10_000), sent)
  const counted = after.handled - before.handled
  return {
    perSecond: counted / (after.elapsed - before.elapsed) * 1000,
    ...spread(after.latencies),
    cpuPerThousand: (after.cpu - before.cpu) / counted * 1000,
    serverCpuPerThousand: serverCpu / counted * 1000,
    memory: after.peakMemory
  }
}

/** 32 callers, each with its next job when the last is in, at most 1 000 jobs in flight. */
export const closed = (seconds: number) => mixed({ kind: "closed", callers: 32, outstanding: 1000 }, seconds)

/** So many jobs a second, whatever comes of them. */
export const rate = (perSecond: number, seconds: number) => mixed({ kind: "rate", perSecond }, seconds)
