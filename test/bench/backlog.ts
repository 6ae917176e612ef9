/** What a claim costs when there is a lot in the database: ours only. */
import { type Bench, refuse, type Values } from "./bench.ts"
import { sleep } from "./clock.ts"
import { checked, fill } from "./drain.ts"
import { payloadOf } from "./producer.ts"
import { claimsSince, mark } from "./statements.ts"
import { quantile } from "./statistics.ts"

/** How many jobs are handled while claims are timed. */
const handledCount = 10_000

/**
 * Times the claims of the first 10 000 jobs, and then those of single jobs on a queue that is idle, over so many jobs that
 * wait behind them, have finished, or are due tomorrow with a higher priority.
 */
export const backlog =
  (amount: { readonly waiting?: number; readonly finished?: number; readonly future?: number }) =>
  async (bench: Bench): Promise<Values> => {
    const count = bench.jobs(handledCount, 2000)
    const scaled = (jobs: number | undefined) => jobs === undefined ? 0 : bench.jobs(jobs, 5000)
    const finished = scaled(amount.finished)
    const waiting = scaled(amount.waiting)
    const future = scaled(amount.future)
    if (finished > 0) {
      await fill(bench, { count: finished })
      const before = bench.worker("kept", { expect: finished })
      checked(await before.next("done", 600_000), finished)
      await bench.settles()
      before.send("stop")
      await before.next("stopped", 60_000)
      before.end()
    }
    await fill(bench, { count: count + waiting })
    if (future > 0) await fill(bench, { count: future, from: count + waiting, later: true })
    await bench.holds(count + waiting + future)
    await bench.vacuum()

    const from = mark(bench)
    const worker = bench.worker("kept", { expect: count, logged: true })
    const report = await worker.next("done", 300_000)
    await sleep(20)
    const loaded = (await claimsSince(bench, from)).map(({ millis }) => millis)
    if (loaded.length === 0) refuse("no claim was seen in the log of the server")

    // One by one, for as long as nothing else is in line.
    const alone: Array<number> = []
    if (waiting === 0) {
      await worker.next("ready", 1000)
      const producer = await bench.peer.produce(bench.place, { kinds: 1, queues: 1 })
      await sleep(1500)
      const begin = mark(bench)
      const enqueues: Array<number> = []
      for (let n = 0; n < 100; n++) {
        enqueues.push(Date.now())
        await producer.enqueue(payloadOf(count + n))
        await sleep(20)
      }
      await producer.close()
      worker.send("report")
      const { handled } = checked(await worker.next("report", 10_000), count + 100)
      if (handled !== count + 100) refuse(`${handled} of ${count + 100} jobs were handled`)
      // The first after each enqueue; those that come then look whether there is more.
      const claims = await claimsSince(bench, begin)
      for (const [n, from] of enqueues.entries()) {
        const first = claims.find(({ at }) => at >= from && at < (enqueues[n + 1] ?? Infinity))
        if (first !== undefined) alone.push(first.millis)
      }
    }
    return {
      claim: quantile(loaded, 0.5),
      claimAlone: quantile(alone, 0.5),
      claims: loaded.length,
      perSecond: count / report.last * 1000
    }
  }
