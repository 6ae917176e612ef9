/** What is secret is where it belongs and nowhere else: not in logs, spans, metrics, notifications or stored SQL errors (S8, S9). */
import { PgClient } from "@effect/sql-pg"
import { assert, describe, it } from "@effect/vitest"
import { Effect, Exit, Layer, Logger, Metric, Queue, Redacted, References, Schedule, Schema, Tracer } from "effect"
import { SqlClient } from "effect/sql"
import { inspect } from "node:util"
import * as Database from "../src/Database.ts"
import { Admin, Job, JobQueue, Maintenance, Worker } from "../src/index.ts"
import { makeProxy } from "./support/proxy.ts"
import { databaseUrl, rows, tracing, until, untilAllEnded, withQueue } from "./support/queue.ts"

class Declined extends Schema.TaggedError<Declined>()("Declined", { why: Schema.String }) {}

class Pay extends Job.make("pay", {
  payload: { secret: Schema.String },
  success: Schema.Struct({ receipt: Schema.String }),
  error: Declined,
  retry: { schedule: Schedule.spaced("10 millis") }
}) {}

/** How each run ends, by what is in front of its payload. */
const ends: Record<
  string,
  (secret: string) => Effect.Effect<{ receipt: string }, Declined, SqlClient.SqlClient | Job.Current>
> = {
  ok: () => Effect.as(Job.progress("canary-progress"), { receipt: "canary-result" }),
  typed: () => Effect.fail(new Declined({ why: "canary-failure" })),
  defect: () => Effect.die(new Error("canary-failure")),
  discard: () => Job.discard("canary-failure"),
  duplicate: (secret) =>
    Effect.orDie(
      Effect.flatMap(SqlClient.SqlClient, (sql) =>
        Effect.as(sql`insert into public.account (name, n) values (${secret}, 1), (${secret}, 1)`, { receipt: "" }))
    ),
  syntax: (secret) =>
    Effect.orDie(
      Effect.flatMap(SqlClient.SqlClient, (sql) =>
        Effect.as(sql`insert into public.account (name, n) values ('a', (${secret}::text)::int)`, { receipt: "" }))
    ),
  missing: (secret) =>
    Effect.orDie(
      Effect.flatMap(SqlClient.SqlClient, (sql) =>
        Effect.as(sql`insert into public.account (name, n) values (${secret}, null)`, { receipt: "" }))
    ),
  check: (secret) =>
    Effect.orDie(
      Effect.flatMap(SqlClient.SqlClient, (sql) =>
        Effect.as(sql`insert into public.account (name, n) values (${secret}, -1)`, { receipt: "" }))
    ),
  raised: (secret) =>
    Effect.orDie(
      Effect.flatMap(SqlClient.SqlClient, (sql) => Effect.as(sql`select public.raising(${secret})`, { receipt: "" }))
    ),
  huge: () => Effect.succeed({ receipt: "canary-result".repeat(100_000) }),
  hang: () => Effect.never
}

/** Everything that an observer may see of a run. */
const observed = () => {
  const { spans, tracer } = tracing()
  const logs: Array<string> = []
  const logger = Logger.make((options) => {
    logs.push(
      inspect([
        options.message,
        options.fiber.getRef(References.CurrentLogAnnotations),
        options.cause
      ], {
        depth: 20,
        maxStringLength: null
      })
    )
  })
  return {
    logs,
    layer: Layer.mergeAll(
      Logger.layer([logger]),
      Layer.succeed(References.MinimumLogLevel, "All"),
      Layer.succeed(Tracer.Tracer, tracer)
    ),
    /** As exporters read spans: names, attributes, events, and the failures they ended with. */
    spans: () =>
      spans.map((span) => {
        const { status } = span
        const failure = status._tag === "Ended" && Exit.isFailure(status.exit) ? status.exit.cause : undefined
        return inspect([span.name, span.attributes, (span as Tracer.NativeSpan).events, failure], {
          depth: 20,
          maxStringLength: null
        })
      })
  }
}

/** Where in the storage each canary is: `table.column`. */
const places = Effect.gen(function*() {
  const columns = yield* rows<{ name: string; column: string }>(
    `select c.relname::text as name, a.attname::text as column from pg_class c join pg_attribute a on a.attrelid = c.oid
     where c.relnamespace = 'pgqueue'::regnamespace and c.relkind = 'r' and a.attnum > 0 and not a.attisdropped`
  )
  const found = new Map<string, Set<string>>()
  for (const { column, name } of columns) {
    for (
      const { canary } of yield* rows<{ canary: string }>(
        `select distinct m[1] as canary from pgqueue.${name} t, regexp_matches(t."${column}"::text, 'canary-[a-z]+', 'g') m`
      )
    ) {
      found.set(canary, (found.get(canary) ?? new Set()).add(`${name}.${column}`))
    }
  }
  return Object.fromEntries([...found].map(([canary, where]) => [canary, [...where].toSorted()]))
})

describe("canaries", () => {
  it.live("are found only in the columns where they belong", () =>
    withQueue(Effect.gen(function*() {
      yield* rows("create table public.account (name text primary key, n int not null check (n > 0))")
      yield* rows(
        `create function public.raising(secret text) returns void language plpgsql as
         $$ begin raise exception 'it was refused' using detail = secret, hint = secret, errcode = 'P0001'; end $$`
      )
      const { layer, logs, spans } = observed()
      const role = `canary_${crypto.randomUUID().replaceAll("-", "")}`
      yield* Effect.acquireRelease(
        rows(`create role ${role} superuser login password 'canary-password'`),
        () => Effect.ignore(rows(`drop role ${role}`))
      )
      const proxy = yield* makeProxy(yield* databaseUrl)
      const url = new URL(proxy.url)
      url.username = role
      url.password = "canary-password"

      const heard: Array<string> = []
      const listener = yield* PgClient.PgClient
      const notifications = yield* listener.listen(Database.channelOf("pgqueue"))
      yield* Effect.forkScoped(
        Effect.forever(Effect.map(Queue.take(notifications), ({ payload }) => heard.push(payload)))
      )

      yield* Effect.scoped(Effect.gen(function*() {
        const secret = "canary-payload"
        const unique = "canary-key"
        const metadata = { tenant: "canary-metadata" }
        const sql = yield* SqlClient.SqlClient
        // Into the queue, in every way, and what is refused.
        yield* Pay.enqueue({ secret: `ok ${secret}` }, { unique, metadata })
        yield* Pay.enqueue({ secret: `ok ${secret}` }, { unique, metadata })
        yield* Pay.enqueueAll([{ secret: `ok ${secret}` }], () => ({ unique: `${unique} 2`, metadata }))
        yield* sql.withTransaction(Pay.enqueue({ secret: `ok ${secret}` }, { unique: `${unique} 3`, metadata }))
        const errors = [
          yield* Effect.flip(Pay.enqueue({ secret: `${secret}\0` })),
          yield* Effect.flip(Pay.enqueue({ secret: { secret } } as never)),
          yield* Effect.flip(Pay.enqueue({ secret: `${secret}`.repeat(100_000) })),
          yield* Effect.flip(Pay.enqueue({ secret }, { unique: `${unique}\0` })),
          yield* Effect.flip(Pay.enqueue({ secret }, { metadata: { a: "canary-metadata\0" } }))
        ]
        for (const error of errors) assert.notInclude(inspect(error, { depth: 20 }), "canary")
        for (const kind of Object.keys(ends).filter((kind) => kind !== "hang")) {
          const own = /duplicate|syntax|missing|check|raised/.test(kind) ? "canary-sql" : secret
          yield* Pay.enqueue({ secret: `${kind} ${own}` }, { maxAttempts: 2, metadata })
        }
        const undecodable = JSON.stringify({ secret: { [secret]: 1 }, x: secret })
        yield* rows("select pgqueue.enqueue('pay', $1::json, max_attempts => 1)", [undecodable])
        const hanging = yield* Pay.enqueue({ secret: `hang ${secret}` })
        const cancelled = yield* Pay.enqueue({ secret: `ok ${secret}` }, { delay: "1 hour" })
        yield* Admin.cancel(cancelled.id, { reason: "canary-failure" })
        yield* Layer.build(
          Layer.mergeAll(
            Worker.layer({
              jobs: [Pay],
              middleware: [Worker.logged],
              lease: "900 millis",
              heartbeat: "300 millis",
              gracePeriod: 0
            }),
            Maintenance.layer({ cleanup: { retention: "1 hour" } })
          ).pipe(
            Layer.provide(Pay.toLayer(({ secret }) => {
              const [end, own] = secret.split(" ")
              return ends[end!]!(own!)
            }))
          )
        )
        yield* Effect.exit(Pay.execute({ secret: `typed ${secret}` }, { maxAttempts: 1 }))
        yield* until("it hangs", Effect.map(rows("select 1 from pgqueue.lease"), (all) => all.length > 0))
        proxy.reset()
        yield* Pay.execute({ secret: `ok ${secret}` })
        yield* Admin.cancel(hanging.id)
        yield* untilAllEnded()
        yield* Effect.ignore(Admin.attempts(hanging.id))
        const { stats } = yield* JobQueue
        yield* stats
        const sessions = yield* rows("select application_name, usename from pg_stat_activity")
        assert.notInclude(JSON.stringify(sessions), "canary-")
      })).pipe(
        Effect.withSpan("the application"),
        Effect.provide(
          Layer.fresh(JobQueue.layer({ migrate: false })).pipe(
            Layer.provideMerge(Layer.fresh(PgClient.layer({ url: Redacted.make(url.href) }))),
            Layer.provideMerge(layer)
          )
        )
      )
      yield* Effect.sleep("100 millis")

      assert.deepStrictEqual(yield* places, {
        "canary-payload": ["finished.payload"],
        "canary-sql": ["finished.payload"],
        "canary-result": ["finished.result"],
        "canary-progress": ["finished.progress"],
        "canary-metadata": ["finished.metadata"],
        "canary-failure": ["attempt.error", "attempt.message", "finished.error", "finished.reason"]
      })
      assert.isAbove(logs.length, 10)
      assert.isAbove(spans().length, 10)
      assert.isAbove(heard.length, 0)
      // What a handler fails with is its own to say, SQL of its own included: its spans end with it. Nothing else of a job is
      // in any span.
      const inSpans = new Set(spans().flatMap((span) => span.match(/canary-[a-z]+/g) ?? []))
      assert.sameMembers([...inSpans], ["canary-failure", "canary-sql"])
      assert.deepStrictEqual(logs.filter((line) => line.includes("canary-")), [])
      assert.notInclude(heard.join("\n"), "canary-")
      const metrics = yield* Metric.snapshot
      assert.isNotEmpty(metrics)
      assert.notInclude(inspect(metrics, { depth: 20 }), "canary-")
      // The constraint stays: it says what happened. The last attempt may have met the lost connection instead.
      const stored = JSON.stringify(
        yield* rows(
          "select error::text as error from pgqueue.finished where error is not null union all select message from pgqueue.attempt"
        )
      )
      assert.match(stored, /account_pkey/)
      assert.match(stored, /account_n_check/)
    })), 60_000)
})
