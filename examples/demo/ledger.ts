/**
 * What the application writes down for itself, beside the queue: what it expects of every job, and every start. The
 * checks compare the two with what the queue says.
 */
import { Context, Effect, Layer, Schema } from "effect"
import { SqlClient, type SqlError, SqlResolver } from "effect/sql"
import { Job } from "../../src/index.ts"

/** The schema that holds the demo's own tables. */
export const schema = "pgqueue_demo_app"

/** What shall become of a job. `nothing` is for one whose transaction rolled back. */
export interface Plan {
  readonly job: string
  readonly phase: "warm-up" | "latency" | "mix" | "burst"
  readonly kind: string
  readonly expected: "completed" | "discarded" | "nothing"
  /** How often its handler starts. */
  readonly starts: number
  /** Milliseconds it was delayed by. */
  readonly delay: number
}

const Start = Schema.Struct({
  job: Schema.String,
  attempt: Schema.Int,
  pid: Schema.Int
})

export class Ledger extends Context.Service<Ledger, {
  readonly createTables: Effect.Effect<void, SqlError.SqlError>
  readonly plan: (plans: ReadonlyArray<Plan>) => Effect.Effect<void, SqlError.SqlError>
  /** Writes down that a handler has started, before it does anything else. */
  readonly started: Effect.Effect<void, never, Job.Current>
  readonly startsByProcess: Effect.Effect<ReadonlyMap<number, number>, SqlError.SqlError>
}>()("effect-pgqueue/examples/demo/ledger") {
  static readonly layer = Layer.effect(
    Ledger,
    Effect.gen(function*() {
      const sql = yield* SqlClient.SqlClient
      const planned = sql(`${schema}.planned`)
      const started = sql(`${schema}.started`)
      const order = sql(`${schema}.order`)

      const createTables = Effect.gen(function*() {
        yield* sql`create schema ${sql(schema)}`
        yield* sql`create table ${order} (number int primary key, job uuid not null)`
        yield* sql`create table ${planned} (job uuid primary key, phase text, kind text, expected text, starts int, delay int)`
        yield* sql`create table ${started} (job uuid, attempt int, pid int, at timestamptz default clock_timestamp())`
      })

      // Handlers that start at the same time share one insert; each waits until it is committed.
      const recordStart = SqlResolver.request(
        SqlResolver.void({
          Request: Start,
          execute: (starts) => sql`insert into ${started} ${sql.insert(starts)}`
        })
      )

      return Ledger.of({
        createTables,
        plan: (plans) =>
          Effect.asVoid(sql`
            insert into ${planned} select * from json_populate_recordset(null::${planned}, ${
            JSON.stringify(plans)
          }::json)
          `),
        started: Effect.flatMap(
          Job.Current,
          ({ attempt, id }) => Effect.orDie(recordStart({ job: id, attempt, pid: process.pid }))
        ),
        startsByProcess: Effect.map(
          sql<{ pid: number; starts: number }>`select pid, count(*)::int as starts from ${started} group by pid`,
          (rows) => new Map(rows.map(({ pid, starts }) => [pid, starts]))
        )
      })
    })
  )
}
