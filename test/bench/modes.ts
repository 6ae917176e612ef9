/** What is measured: every case, what it shows, and of which queues. */
import { backlog } from "./backlog.ts"
import type { Bench, Values } from "./bench.ts"
import { drain } from "./drain.ts"
import { bulk, single } from "./enqueue.ts"
import { held } from "./held.ts"
import { idle } from "./idle.ts"
import { latency } from "./latency.ts"
import { closed, rate } from "./mixed.ts"
import { type Name, names, type Profile } from "./peer.ts"
import type { Kind } from "./server.ts"
import { startup } from "./startup.ts"

/** A number that a case shows. */
export interface Row {
  /** Which of the values. */
  readonly value: string
  readonly title: string
  readonly unit: "jobs/s" | "ms" | "MB" | "/s" | "×"
  readonly better: "more" | "less"
}

/** One way to measure. */
export interface Case {
  readonly name: string
  /** The names by which it can be asked for, beside its own. */
  readonly modes: ReadonlyArray<string>
  readonly peers: ReadonlyArray<Name>
  /** A queue without this profile is left out. */
  readonly profile: Profile
  readonly server: Kind
  readonly rows: ReadonlyArray<Row>
  readonly run: (bench: Bench) => Promise<Values>
}

const perSecond = (title: string): Row => ({ value: "perSecond", title, unit: "jobs/s", better: "more" })
const millis = (value: string, title: string): Row => ({ value, title, unit: "ms", better: "less" })

const all: Pick<Case, "peers" | "profile" | "server"> = {
  peers: names,
  profile: "best",
  server: { version: "18", counting: false }
}
const ours = { ...all, peers: ["ours"] as const }

const amounts = {
  "10k": { title: "10 000 waiting", amount: {} },
  waiting: { title: "1 000 000 waiting", amount: { waiting: 1_000_000 } },
  finished: { title: "1 000 000 finished", amount: { finished: 1_000_000 } },
  future: { title: "500 000 due tomorrow with a higher priority", amount: { future: 500_000 } }
}

const backlogs = (["18", "15"] as const).flatMap((version) =>
  Object.entries(amounts).map(([name, { amount, title }]): Case => ({
    ...ours,
    name: `backlog-${name}-pg${version}`,
    modes: ["backlog", `backlog-pg${version}`],
    server: { version, counting: false },
    rows: [
      millis("claim", `claim, ${title}, PostgreSQL ${version}`),
      ...("waiting" in amount
        ? []
        : [millis("claimAlone", `claim of a single job after ${title}, PostgreSQL ${version}`)])
    ],
    run: backlog(amount)
  }))
)

/** The cases, in the order of the table. */
export const cases: ReadonlyArray<Case> = [
  {
    ...all,
    name: "sequential",
    modes: ["enqueue"],
    rows: [perSecond("enqueue, one by one")],
    run: single(3000, 1)
  },
  {
    ...all,
    name: "concurrent",
    modes: ["enqueue"],
    rows: [perSecond("enqueue, 100 at once")],
    run: single(30_000, 100)
  },
  { ...all, name: "bulk", modes: [], rows: [perSecond("enqueue, 1 000 per call")], run: bulk(100_000) },
  {
    ...all,
    name: "drain-best",
    modes: ["drain", "memory"],
    rows: [
      perSecond("drain, best settings"),
      { value: "memory", title: "drain, best settings: memory", unit: "MB", better: "less" },
      // Steadier than any rate where the machine is not quite quiet.
      millis("cpuPerThousand", "drain, best settings: CPU of the process per 1 000 jobs"),
      millis("serverCpuPerThousand", "drain, best settings: CPU of the server per 1 000 jobs")
    ],
    run: drain({ profile: "best", count: 100_000, cap: 30 })
  },
  {
    ...all,
    name: "drain-kept",
    modes: ["drain", "kept"],
    profile: "kept",
    rows: [perSecond("drain, finished jobs kept")],
    run: drain({ profile: "kept", count: 100_000, cap: 30 })
  },
  {
    ...all,
    name: "drain-slots",
    modes: ["drain", "slots"],
    profile: "slots",
    rows: [perSecond("drain, 24 slots")],
    run: drain({ profile: "slots", count: 50_000, cap: 12 })
  },
  {
    ...all,
    name: "drain-stock",
    modes: ["drain", "stock"],
    profile: "stock",
    rows: [perSecond("drain, stock defaults")],
    run: drain({ profile: "stock", count: 100_000, cap: 8 })
  },
  {
    ...all,
    name: "latency",
    modes: [],
    rows: [millis("p50", "idle latency, p50"), millis("p99", "idle latency, p99")],
    run: latency("best", 500, 60)
  },
  {
    ...all,
    name: "latency-stock",
    modes: ["latency", "stock"],
    profile: "stock",
    rows: [millis("p50", "idle latency with stock defaults, p50")],
    run: latency("stock", 500, 20)
  },
  {
    ...all,
    name: "mixed-closed",
    modes: ["mixed"],
    rows: [perSecond("enqueue and work at once, closed loop"), millis("p99", "… its latency, p99")],
    run: closed(15)
  },
  {
    ...all,
    name: "mixed-rate",
    modes: ["mixed"],
    rows: [millis("p50", "latency at 200 jobs/s, p50"), millis("p99", "latency at 200 jobs/s, p99")],
    run: rate(200, 10)
  },
  {
    ...all,
    name: "startup",
    modes: [],
    rows: [millis("millis", "start of the process to its first job")],
    run: startup(5)
  },
  {
    ...all,
    name: "idle",
    modes: [],
    peers: names.filter((name) => name !== "bullmq-redis"),
    profile: "stock",
    server: { version: "18", counting: true },
    rows: [{ value: "statementsPerSecond", title: "statements of an idle worker", unit: "/s", better: "less" }],
    run: idle(60)
  },
  ...backlogs,
  {
    ...ours,
    name: "held",
    modes: [],
    rows: [
      millis("first", "claim at 4 000 jobs/s, first sixth of a held transaction"),
      millis("last", "claim at 4 000 jobs/s, last sixth"),
      { value: "ratio", title: "… the one by the other", unit: "×", better: "less" }
    ],
    run: held(60, 4000)
  },
  ...[{ name: "60b", title: "60 bytes", pad: 0, count: 50_000 }, {
    name: "1600b",
    title: "1.6 KB",
    pad: 1540,
    count: 50_000
  }, { name: "64k", title: "64 KB", pad: 65_476, count: 5000 }].map(({ count, name, pad, title }): Case => ({
    ...ours,
    name: `payload-${name}`,
    modes: ["payload"],
    rows: [perSecond(`drain, payload of ${title}`)],
    run: drain({ profile: "best", count, cap: 60, pad })
  })),
  ...[{ name: "one", title: "one queue, one kind", shape: { kinds: 1, queues: 1 } }, {
    name: "queues",
    title: "100 queues",
    shape: { kinds: 1, queues: 100 }
  }, { name: "kinds", title: "1 000 kinds", shape: { kinds: 1000, queues: 1 } }].map((
    { name, shape, title }
  ): Case => ({
    ...ours,
    name: `many-${name}`,
    modes: ["many", name],
    profile: "stock",
    rows: [perSecond(`drain, stock defaults, ${title}`)],
    run: drain({ profile: "stock", count: 50_000, cap: 60, shape })
  }))
]

export const caseNamed = (name: string): Case => {
  const found = cases.find((one) => one.name === name)
  if (found === undefined) throw new Error(`there is no case "${name}"`)
  return found
}
