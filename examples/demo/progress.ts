/** What the queue is doing, as it can be seen from any process. */
import { Effect } from "effect"
import { JobQueue } from "../../src/index.ts"
import { DemoFailed } from "./database.ts"
import { Ledger } from "./ledger.ts"
import { count, type Moment, View } from "./view.ts"

const statuses = ["scheduled", "available", "running", "retryable", "completed", "discarded"] as const

/** Reads the queue, shows it, and returns how many jobs have not ended. */
const look = Effect.gen(function*() {
  const view = yield* View
  const queue = yield* JobQueue
  const ledger = yield* Ledger

  const kinds = (yield* queue.stats).map((stats) => {
    const ended = stats.completed + stats.cancelled + stats.discarded
    const open = stats.scheduled + stats.available + stats.running + stats.retryable
    return { ...stats, ended, all: ended + open, open }
  })
  const total = (of: (kind: (typeof kinds)[number]) => number) => kinds.reduce((sum, kind) => sum + of(kind), 0)

  const width = Math.max(10, Math.min(40, (yield* view.columns) - 44))
  const inStatuses = statuses.map((status) => `${status} ${count(total((kind) => kind[status]))}`).join(" · ")
  const starts = [...yield* ledger.startsByProcess].map(([pid, starts]) => `worker ${pid}: ${count(starts)} starts`)
  const moment: Moment = {
    block: [
      "",
      ...kinds.map(({ all, ended, kind }) => {
        const filled = Math.floor(width * ended / all)
        const bar = "█".repeat(filled) + "░".repeat(width - filled)
        return `  ${kind.padEnd(16)} ${bar} ${count(ended).padStart(6)} of ${count(all)}`
      }),
      "",
      `  ${inStatuses}`,
      `  ${starts.join(" · ")}`
    ],
    summary: `  ${count(total(({ ended }) => ended))} of ${count(total(({ all }) => all))} ended: ${inStatuses}`
  }
  yield* view.show(moment)
  return total(({ open }) => open)
})

/** Shows the queue until every job in it has ended. */
export const untilEmpty = Effect.gen(function*() {
  while ((yield* look) > 0) yield* Effect.sleep("100 millis")
}).pipe(
  Effect.timeoutOrElse({
    duration: "90 seconds",
    orElse: () => new DemoFailed({ message: "jobs are still open after 90 seconds" })
  })
)

/** Shows the queue for as long as an effect runs. */
export const during = <A, E, R>(effect: Effect.Effect<A, E, R>) =>
  Effect.raceFirst(effect, Effect.forever(Effect.delay(look, "100 millis")))
