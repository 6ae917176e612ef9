/** What must hold at the end, asked of the database. */
import { Effect } from "effect"
import { SqlClient, type Statement } from "effect/sql"
import * as jobs from "./jobs.ts"
import * as ledger from "./ledger.ts"

/** A claim about a number of things. It holds when there are some, and none of them is wrong. */
export interface Check {
  readonly claim: string
  readonly about: number
  readonly wrong: number
}

export const holds = ({ about, wrong }: Check): boolean => about > 0 && wrong === 0

/** Compares what was planned and what was started with how the queue says that it ended. */
export const runChecks = Effect.gen(function*() {
  const sql = yield* SqlClient.SqlClient
  const queue = (table: string) => sql(`${jobs.schema}.${table}`)
  const app = (table: string) => sql(`${ledger.schema}.${table}`)

  const check = (claim: string, counted: Statement.Statement<{ about: number; wrong: number }>) =>
    Effect.map(counted, ([row]): Check => ({ claim, about: row?.about ?? 0, wrong: row?.wrong ?? 0 }))

  const starts = sql`(select job, count(*)::int as times, min(at) as first from ${app("started")} group by job)`
  const outcome = sql`
    ${app("planned")} p left join ${queue("finished")} f on f.id = p.job left join ${starts} s on s.job = p.job
  `
  const each = (claim: string, about: Statement.Fragment, right: Statement.Fragment) =>
    check(
      claim,
      sql`
        select count(*)::int as about, count(*) filter (where (${right}) is not true)::int as wrong
        from ${outcome} where ${about}
      `
    )

  return yield* Effect.all([
    each("every committed job has ended", sql`expected <> 'nothing'`, sql`f.id is not null`),
    each("… as it should: completed or discarded", sql`expected <> 'nothing'`, sql`f.status = expected`),
    each(
      "… after as many starts as it should",
      sql`expected <> 'nothing'`,
      sql`coalesce(s.times, 0) = starts`
    ),
    each(
      "orders that rolled back: no job, no start",
      sql`expected = 'nothing'`,
      sql`f.id is null and s.job is null`
    ),
    check(
      "orders that committed are confirmed",
      sql`
        select count(*)::int as about, count(*) filter (where f.status is distinct from 'completed')::int as wrong
        from ${app("order")} o left join ${queue("finished")} f on f.id = o.job
      `
    ),
    each(
      "delayed jobs did not start early",
      sql`delay > 0`,
      sql`s.first >= f.enqueued_at + delay * interval '1 millisecond'`
    ),
    each(
      "failing webhooks completed on their third attempt",
      sql`p.kind = ${jobs.DeliverWebhook._tag}`,
      sql`f.status = 'completed' and f.attempt = 3`
    ),
    each(
      "poisoned invoices were discarded after three attempts",
      sql`p.kind = ${jobs.PrintInvoice._tag}`,
      sql`f.status = 'discarded' and f.attempt = 3 and f.error ->> 'tag' = 'Defect'`
    ),
    each(
      "the unreadable payload was discarded",
      sql`p.kind = ${jobs.SendEmail._tag} and expected = 'discarded'`,
      sql`f.status = 'discarded' and f.error ->> 'tag' = 'Undecodable' and s.job is null`
    ),
    check(
      "every second has one job, from two schedulers",
      sql`
        select count(*)::int as about,
          (count(*) - count(distinct scheduled_for) + abs(1 + extract(epoch from max(scheduled_for) - min(scheduled_for)) - count(*)))::int as wrong
        from ${queue("finished")} where kind = ${jobs.CountStock._tag}
      `
    ),
    check(
      "no attempt was started twice",
      sql`
        select count(*)::int as about, count(*) filter (where times > 1)::int as wrong
        from (select count(*) as times from ${app("started")} group by job, attempt) a
      `
    ),
    check(
      "urgent orders overtook the images (medians)",
      sql`
        select count(s.job) filter (where p.kind = ${jobs.ConfirmOrder._tag})::int as about, (
          percentile_cont(0.5) within group (order by s.first - f.enqueued_at) filter (where p.kind = ${jobs.ConfirmOrder._tag})
          >= percentile_cont(0.5) within group (order by s.first - f.enqueued_at) filter (where p.kind = ${jobs.ResizeImage._tag})
        )::int as wrong
        from ${outcome}
      `
    ),
    check(
      "both processes have worked",
      sql`select count(*)::int as about, greatest(0, 2 - count(distinct pid))::int as wrong from ${app("started")}`
    ),
    check(
      "nothing is left in line or under way",
      sql`
        select (select count(*) from ${queue("finished")})::int as about,
          ((select count(*) from ${queue("job")}) + (select count(*) from ${queue("ready")})
            + (select count(*) from ${queue("lease")}))::int as wrong
      `
    )
  ])
})
