/** What the queue aims at, and a run says whether it has reached: as a ratio to another queue or another row, or as such. */
import type { Name } from "./peer.ts"

/** A bound for a value of ours. */
export interface Target {
  readonly case: string
  readonly value: string
  /** Over the same of this queue, or over this case of ours; otherwise absolute. */
  readonly over?: { readonly peer: Name; readonly case?: string } | undefined
  readonly atLeast?: number
  readonly atMost?: number
}

const claims = (["18", "15"] as const).flatMap((version): ReadonlyArray<Target> =>
  ["waiting", "finished", "future"].flatMap((amount) => {
    const [base, name] = [`backlog-10k-pg${version}`, `backlog-${amount}-pg${version}`]
    return ["claim", "claimAlone"].filter((value) => value === "claim" || amount !== "waiting").map((value) => ({
      case: name,
      value,
      over: { peer: "ours", case: base } as const,
      atMost: 1.5
    }))
  })
)

export const targets: ReadonlyArray<Target> = [
  { case: "sequential", value: "perSecond", over: { peer: "graphile" }, atLeast: 3 },
  { case: "concurrent", value: "perSecond", over: { peer: "graphile" }, atLeast: 50 },
  { case: "concurrent", value: "perSecond", over: { peer: "bullmq-redis" }, atLeast: 1.6 },
  { case: "bulk", value: "perSecond", over: { peer: "graphile" }, atLeast: 2 },
  { case: "drain-best", value: "perSecond", over: { peer: "graphile" }, atLeast: 2.3 },
  { case: "drain-best", value: "memory", over: { peer: "graphile" }, atMost: 0.9 },
  { case: "drain-kept", value: "perSecond", over: { peer: "graphile", case: "drain-best" }, atLeast: 1.8 },
  { case: "drain-stock", value: "perSecond", over: { peer: "graphile", case: "drain-best" }, atLeast: 1.5 },
  { case: "latency", value: "p50", over: { peer: "graphile" }, atMost: 0.62 },
  { case: "mixed-closed", value: "perSecond", over: { peer: "graphile" }, atLeast: 15 },
  { case: "mixed-closed", value: "perSecond", over: { peer: "bullmq-redis" }, atLeast: 1.2 },
  { case: "mixed-closed", value: "p99", atMost: 20 },
  { case: "startup", value: "millis", atMost: 450 },
  { case: "idle", value: "statementsPerSecond", atMost: 1 },
  ...claims,
  { case: "held", value: "ratio", atMost: 1.3 },
  { case: "payload-1600b", value: "perSecond", over: { peer: "ours", case: "payload-60b" }, atLeast: 0.6 }
]
