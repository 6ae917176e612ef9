/** One worker process and a queue that is full when it starts. */
import { type Bench, plain, refuse, type Values } from "./bench.ts"
import type { Profile, Shape } from "./peer.ts"
import { inBulk, payloadOf } from "./producer.ts"
import type { Report } from "./worker.ts"

/** Puts jobs in line. */
export const fill = async (
  bench: Bench,
  options: {
    readonly count: number
    readonly from?: number
    readonly shape?: Shape
    /** Bytes added to each payload. */
    readonly pad?: number
    readonly later?: boolean
  }
): Promise<void> => {
  const { count, from = 0, later = false, pad = 0, shape = plain } = options
  const lines = Math.max(shape.kinds, shape.queues)
  const padding = "x".repeat(pad)
  const producer = await bench.peer.produce(bench.place, shape)
  await inBulk(
    producer,
    from,
    count,
    // Many lines take turns in small parts, so that they are mixed; large payloads in parts of a few megabytes.
    Math.max(1, Math.min(lines > 1 ? Math.ceil(count / lines / 10) : 5000, Math.floor(4_000_000 / (pad + 100)))),
    (userId) => pad === 0 ? payloadOf(userId) : { ...payloadOf(userId), pad: padding },
    later
  )
  await producer.close()
}

/** What a worker that has handled all or some of `count` jobs shows. */
export const checked = (report: Report, count: number): Report => {
  if (report.repeated > 0) refuse(`${report.repeated} jobs were handled twice`)
  if (report.handled === 0) refuse("nothing was handled")
  if (report.handled > count) refuse(`${report.handled} of ${count} jobs were handled`)
  return report
}

/**
 * The time from the call that starts the worker until it has handled all. When that takes longer than `cap` seconds, the
 * rate is that of the jobs it has handled by then.
 */
export const drain = (options: {
  readonly profile: Profile
  readonly count: number
  readonly cap: number
  readonly pad?: number
  readonly shape?: Shape
}) =>
async (bench: Bench): Promise<Values> => {
  const { cap, pad = 0, profile, shape = plain } = options
  const count = bench.jobs(options.count, 1000)
  const filling = performance.now()
  await fill(bench, { count, pad, shape })
  const filled = count / (performance.now() - filling) * 1000
  await bench.holds(count)
  await bench.vacuum()
  const cpuBefore = bench.serverCpu()
  const worker = bench.worker(profile, { expect: count, shape })
  await worker.next("ready", 60_000)
  const done = await worker.within(cap * 1000, "done")
  if (done === undefined) worker.send("report")
  const report = checked(done ?? await worker.next("report", 60_000), count)
  const serverCpu = bench.serverCpu() - cpuBefore
  const complete = report.handled === count
  const elapsed = complete ? report.last : report.elapsed
  const settling = complete ? await bench.settles() : NaN
  return {
    perSecond: report.handled / elapsed * 1000,
    // Without the start of the worker.
    steadyPerSecond: (report.handled - 1) / (report.last - report.first) * 1000,
    settledPerSecond: complete ? count / (elapsed + settling) * 1000 : NaN,
    handled: report.handled,
    of: count,
    firstAfter: report.first,
    filledPerSecond: filled,
    cpuPerThousand: report.cpu / report.handled * 1000,
    serverCpuPerThousand: serverCpu / report.handled * 1000,
    memory: report.peakMemory
  }
}
