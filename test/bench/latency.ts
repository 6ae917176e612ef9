/** The time from an enqueue in one process to the handler in another, on a queue that is otherwise idle. */
import type { Bench, Values } from "./bench.ts"
import { sleep } from "./clock.ts"
import { checked } from "./drain.ts"
import type { Profile } from "./peer.ts"
import { spread } from "./statistics.ts"

/** How long the queue is left alone between two jobs, in milliseconds. */
const gap = 10

/** Jobs before it counts. */
const warm = 20

/** `count` jobs one after the other, each sent when the one before has been handled and `gap` has passed. */
export const latency = (profile: Profile, count: number, cap: number) => async (bench: Bench): Promise<Values> => {
  const worker = bench.worker(profile, { each: true })
  const producer = bench.producer({ kind: "told" })
  await Promise.all([worker.next("ready", 60_000), producer.next("ready", 60_000)])
  producer.send("go")
  await sleep(1500)
  let handled = (): void => {}
  worker.on((told) => {
    if ("handled" in told) handled()
  })
  const most = bench.jobs(count, 30)
  const begun = performance.now()
  let sent = 0
  // Those that look every second or two are given a few jobs, without a warm-up.
  while (sent < most + warm && performance.now() - begun < cap * 1000) {
    const next = new Promise<void>((resolve) => {
      handled = resolve
    })
    producer.send("one")
    sent++
    await next
    await sleep(gap)
  }
  worker.send("report")
  const report = checked(await worker.next("report", 10_000), sent)
  if (report.handled !== sent) throw new Error(`refused: ${report.handled} of ${sent} jobs were handled`)
  const counted = report.latencies.length > 2 * warm ? report.latencies.slice(warm) : report.latencies
  return { ...spread(counted) }
}
