/** What was measured, by the database's clock alone. */
import { Effect } from "effect"
import { SqlClient } from "effect/sql"
import * as jobs from "./jobs.ts"
import * as ledger from "./ledger.ts"

/** Milliseconds from the enqueue to the first statement of the handler, one job at a time. */
export const latency = Effect.gen(function*() {
  const sql = yield* SqlClient.SqlClient
  const [row] = yield* sql<{ jobs: number; p50: number; p99: number }>`
    select count(*)::int as jobs,
      percentile_cont(0.5) within group (order by millis) as p50,
      percentile_cont(0.99) within group (order by millis) as p99
    from (
      select (extract(epoch from s.at - f.enqueued_at) * 1000)::float8 as millis
      from ${sql(`${ledger.schema}.planned`)} p
        join ${sql(`${ledger.schema}.started`)} s on s.job = p.job
        join ${sql(`${jobs.schema}.finished`)} f on f.id = p.job
      where phase = 'latency'
    ) l
  `
  return row!
})

/** How many jobs of one phase there were, and milliseconds from the first enqueue to the last end. */
export const throughput = Effect.fnUntraced(function*(phase: "mix" | "burst") {
  const sql = yield* SqlClient.SqlClient
  const [row] = yield* sql<{ jobs: number; millis: number }>`
    select count(*)::int as jobs,
      (extract(epoch from max(f.finished_at) - min(f.enqueued_at)) * 1000)::float8 as millis
    from ${sql(`${ledger.schema}.planned`)} p join ${sql(`${jobs.schema}.finished`)} f on f.id = p.job
    where phase = ${phase}
  `
  return row!
})
