/** What happens while somebody keeps a transaction open that holds back vacuum: ours only. */
import { Client } from "pg"
import { type Bench, refuse, type Values } from "./bench.ts"
import { sleep } from "./clock.ts"
import { checked } from "./drain.ts"
import { claimsSince, mark } from "./statements.ts"
import { quantile } from "./statistics.ts"

/** A snapshot is held for so many seconds, while so many jobs a second come in and are handled. */
export const held = (seconds: number, perSecond: number) => async (bench: Bench): Promise<Values> => {
  const length = bench.seconds(seconds, 6) * 1000
  const part = length / 6
  const worker = bench.worker("kept", { count: true, logged: true })
  const producer = bench.producer({ kind: "rate", perSecond })
  await Promise.all([worker.next("ready", 60_000), producer.next("ready", 60_000)])
  let handled = 0
  worker.on((told) => {
    if ("handled" in told) handled = told.handled
  })
  producer.send("go")
  await sleep(2000)
  const holder = new Client({ connectionString: bench.place.postgres })
  await holder.connect()
  await holder.query("begin isolation level repeatable read")
  await holder.query("select pg_current_xact_id(), count(*) from pg_class")
  worker.send("clear")
  const from = mark(bench)
  const begun = Date.now()
  await sleep(length)
  worker.send("report")
  const report = await worker.next("report", 10_000)
  producer.send("stop")
  const sent = await producer.next("sent", 30_000)
  const behind = sent - handled
  const deadline = performance.now() + 60_000
  while (handled < sent) {
    if (performance.now() > deadline) refuse(`${sent - handled} of ${sent} jobs were not handled`)
    await sleep(20)
  }
  worker.send("report")
  checked(await worker.next("report", 10_000), sent)
  await holder.query("rollback")
  await holder.end()
  const claims = await claimsSince(bench, from)
  const within = (n: number) =>
    claims.filter(({ at }) => at >= begun + n * part && at < begun + (n + 1) * part).map(({ millis }) => millis)
  const first = quantile(within(0), 0.5)
  const last = quantile(within(5), 0.5)
  return {
    first,
    last,
    ratio: last / first,
    claims: claims.length,
    behind,
    perSecond: sent / (length + 2000) * 1000,
    p50: quantile(report.latencies, 0.5),
    p99: quantile(report.latencies, 0.99)
  }
}
