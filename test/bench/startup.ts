/** From the start of a process until it has handled its first job, which is there before. */
import type { Bench, Values } from "./bench.ts"
import { checked } from "./drain.ts"
import { payloadOf } from "./producer.ts"
import { median } from "./statistics.ts"

/** The middle of `count` starts. */
export const startup = (count: number) => async (bench: Bench): Promise<Values> => {
  const took: Array<number> = []
  for (let n = 0; n < count; n++) {
    const producer = await bench.peer.produce(bench.place, { kinds: 1, queues: 1 })
    await producer.enqueue(payloadOf(n))
    await producer.close()
    await bench.holds(1)
    const begun = performance.now()
    const worker = bench.worker("best", { expect: 1 })
    const report = await worker.next("done", 60_000)
    took.push(performance.now() - begun)
    checked(report, 1)
    await worker.next("ready", 60_000)
    await bench.settles()
    worker.send("stop")
    await worker.next("stopped", 30_000)
    worker.end()
  }
  return { millis: median(took), least: Math.min(...took), most: Math.max(...took) }
}
