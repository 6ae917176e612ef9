/** What the people do who share the database with the queue. */
import { PgClient } from "@effect/sql-pg"
import { assert } from "@effect/vitest"
import { Context, Effect, Layer, Redacted } from "effect"
import { SqlClient } from "effect/sql"
import { JobQueue, Worker } from "../../src/index.ts"
import { Work } from "../programs/actor.ts"
import { makeDatabase } from "../support/database.ts"
import { until } from "../support/queue.ts"
import { full } from "./form.ts"
import { allRun } from "./inside.ts"
import { scenarios } from "./scenario.ts"
import { load, type Stage, Victim } from "./stage.ts"

/** Somebody's transaction, held for a while on a connection of its own. */
const transaction = Effect.fnUntraced(function*(stage: Stage, millis: number, ...texts: ReadonlyArray<string>) {
  const Somebody = PgClient.layer({ url: Redacted.make(stage.url), applicationName: "somebody", maxConnections: 1 })
  const sql = Context.get(yield* Layer.build(Layer.fresh(Somebody)), SqlClient.SqlClient)
  yield* sql.withTransaction(Effect.andThen(Effect.forEach(texts, (text) => sql.unsafe(text)), Effect.sleep(millis)))
}, Effect.scoped)

scenarios("users", (scenario) => {
  const held = full ? 10_000 : 1500

  scenario(
    "U1",
    "a transaction holds locks on rows of every table, again and again",
    { short: true },
    (stage) =>
      Effect.gen(function*() {
        const { workers } = yield* stage.fleet()
        const before = yield* stage.runsEnded
        yield* stage.during(
          "locks",
          Effect.forEach(
            ["job", "ready", "lease", "worker", "unique_key", "schedule", "queue", "setting"],
            (table) =>
              Effect.andThen(
                transaction(stage, held / 4, `select 1 from pgqueue.${table} limit 50 for update`),
                transaction(stage, held / 4, `select 1 from pgqueue.${table} for share skip locked`)
              )
          )
        )
        const meanwhile = (yield* stage.runsEnded) - before
        assert.isAbove(meanwhile, held * 4 / 1000 * load / 4, "it went on with what nobody had locked")
        allRun(workers)
        return { meanwhile, ...yield* stage.finish() }
      })
  )

  scenario(
    "U2",
    "a table is locked as a whole, as DDL does, for longer than a lease",
    {},
    (stage) =>
      Effect.gen(function*() {
        const { workers } = yield* stage.fleet()
        for (const table of ["job", "ready", "lease", "worker", "finished"]) {
          yield* stage.during(table, transaction(stage, 4000, `lock table pgqueue.${table} in access exclusive mode`))
          yield* stage.goesOn
        }
        allRun(workers)
        return { ...yield* stage.recovered(5000), ...yield* stage.finish() }
      })
  )

  scenario(
    "U3",
    "a transaction is open for long, and nothing can be cleared away",
    {},
    (stage) =>
      Effect.gen(function*() {
        yield* stage.fleet()
        const begun = yield* stage.runsEnded
        yield* transaction(
          stage,
          5000,
          "set transaction isolation level repeatable read",
          "select count(*) from pgqueue.job"
        )
        const first = (yield* stage.runsEnded) - begun
        yield* stage.during(
          "held",
          transaction(
            stage,
            40_000,
            "set transaction isolation level repeatable read",
            "select count(*) from pgqueue.job"
          )
        )
        const before = yield* stage.runsEnded
        yield* transaction(
          stage,
          5000,
          "set transaction isolation level repeatable read",
          "select count(*) from pgqueue.job"
        )
        const last = (yield* stage.runsEnded) - before
        assert.isAbove(last, first * 0.9)
        return { "in the first 5 s": first, "in the last 5 s": last, ...yield* stage.finish() }
      })
  )

  scenario(
    "U4",
    "an application works two databases in one process",
    { short: true },
    (stage) =>
      Effect.gen(function*() {
        const victim = yield* Victim
        const other = yield* makeDatabase(victim.url)
        const ran: Array<string> = []
        const app = (name: string, url: Redacted.Redacted, schema: string) =>
          Worker.layer({ jobs: [Work] }).pipe(
            Layer.provide(Work.toLayer(({ key }) => Effect.sync(() => void ran.push(`${name} ${key}`)))),
            Layer.provideMerge(JobQueue.layer({ schema })),
            Layer.provideMerge(PgClient.layer({ url, applicationName: name }))
          )
        const build = (name: string, url: Redacted.Redacted, schema: string) =>
          Layer.build(Layer.fresh(app(name, url, schema)))
        yield* Effect.scoped(Effect.gen(function*() {
          const first = yield* build("first", Redacted.make(stage.url), "pgqueue")
          const second = yield* build("second", other.url, "pgqueue")
          const third = yield* build("third", other.url, "another")
          const all = { first, second, third }
          const payload = (key: string) => ({ key, millis: 0, fails: 0 })
          const expected: Array<string> = []
          for (let n = 0; n < 30; n++) {
            for (const [name, context] of Object.entries(all)) {
              const sql = Context.get(context, SqlClient.SqlClient)
              yield* Effect.provideContext(
                n % 3 === 0 ? sql.withTransaction(Work.enqueue(payload(`${n}`))) : Work.enqueue(payload(`${n}`)),
                context
              )
              expected.push(`${name} ${n}`)
            }
          }
          yield* until("each has run its own", Effect.sync(() => ran.length === expected.length))
          assert.sameMembers(ran, expected)
          // In a transaction of one, what goes to the other would not be a part of it.
          const foreign = yield* Effect.flip(
            Context.get(first, SqlClient.SqlClient).withTransaction(
              Effect.provideContext(Work.enqueue(payload("no")), Context.omit(SqlClient.SqlClient)(second))
            )
          )
          assert.propertyVal(foreign, "reason", "ForeignTransaction")
        }))
        return { ...yield* stage.finish(), jobs: ran.length }
      })
  )
})
