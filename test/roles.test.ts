/** The roles of docs/roles.sql: what each of them can do through the library, and what none of them can (S3). */
import { PgClient } from "@effect/sql-pg"
import { assert, layer } from "@effect/vitest"
import { Context, DateTime, Deferred, Effect, Exit, Layer, Logger, Option, Redacted, Schema } from "effect"
import { SqlClient, type SqlError } from "effect/sql"
import { randomBytes } from "node:crypto"
import * as Database from "../src/Database.ts"
import { Admin, CronScheduler, Job, JobQueue, Maintenance, Worker } from "../src/index.ts"
import { makeDatabase, TestDatabase } from "./support/database.ts"
import { overhear } from "./support/overheard.ts"
import { now, until } from "./support/queue.ts"
import { roleStatements } from "./support/roles.ts"

class Pay extends Job.make("pay", {
  payload: { secret: Schema.String },
  success: Schema.String,
  error: Schema.String
}) {}
const PayHandler = Pay.toLayer(({ secret }) =>
  secret === "fail" ? Effect.fail("it failed") : Effect.succeed(`paid ${secret}`)
)

type Role = "owner" | "worker" | "producer" | "replacer" | "caller" | "viewer" | "admin" | "public"
const roles: ReadonlyArray<Role> = ["owner", "worker", "producer", "replacer", "caller", "viewer", "admin", "public"]

/** A queue under the roles of the file, and a login for each. */
class Roles extends Context.Service<Roles, {
  readonly schema: string
  /** Applies the file. */
  readonly apply: Effect.Effect<void, SqlError.SqlError>
  /** As the superuser, who owns nothing here. */
  readonly rows: (text: string, params?: ReadonlyArray<unknown>) => Effect.Effect<ReadonlyArray<any>, SqlError.SqlError>
  readonly client: (role: Role) => Layer.Layer<PgClient.PgClient | SqlClient.SqlClient, SqlError.SqlError>
}>()("effect-pgqueue/test/roles.test/Roles") {
  static readonly layer = Layer.effect(
    Roles,
    Effect.gen(function*() {
      const { url } = yield* TestDatabase
      const schema = `r${randomBytes(6).toString("hex")}`
      const context = yield* Layer.build(Layer.fresh(PgClient.layer({ url, maxConnections: 2 })))
      const sql = Context.get(context, SqlClient.SqlClient)
      const rows = (text: string, params?: ReadonlyArray<unknown>) => sql.unsafe<any>(text, params)
      const apply = Effect.forEach(
        roleStatements(schema),
        (statement) => rows(statement),
        { discard: true }
      )
      const login = (role: Role) => `${schema}_login_${role}`
      yield* Effect.acquireRelease(
        Effect.gen(function*() {
          yield* apply
          for (const role of roles) {
            const group = role === "public" ? "" : `in role ${schema}_${role}`
            yield* rows(`create role ${login(role)} login password 'secret of ${role}' ${group}`)
          }
        }),
        () =>
          Effect.gen(function*() {
            const names = [
              ...roles.map(login),
              ...roles.filter((role) => role !== "public").map((role) => `${schema}_${role}`)
            ]
            for (const name of names) yield* rows(`drop owned by ${name} cascade`)
            for (const name of names) yield* rows(`drop role ${name}`)
          }).pipe(Effect.ignore({ log: "Warn" }))
      )
      return {
        schema,
        apply,
        rows,
        client: (role) => {
          const as = new URL(Redacted.value(url))
          as.username = login(role)
          as.password = `secret of ${role}`
          return Layer.fresh(PgClient.layer({ url: Redacted.make(as.href), maxConnections: 2 }))
        }
      }
    })
  )
}

const fixture = Layer.provideMerge(
  // The owner creates the storage; its tables are then handed to the group, and the others get their rights.
  Layer.effectDiscard(Effect.gen(function*() {
    const { apply, client, schema } = yield* Roles
    yield* Effect.scoped(Layer.build(Layer.fresh(JobQueue.layer({ schema })).pipe(Layer.provide(client("owner")))))
    yield* apply
  })),
  Layer.provideMerge(Roles.layer, Layer.fresh(TestDatabase.layer))
)

/** Runs the body as a process that logs in as a member of this role. */
const as = <A, E, R>(role: Role, body: Effect.Effect<A, E, R>) =>
  Effect.flatMap(Roles, ({ client, schema }) =>
    Effect.scoped(body).pipe(
      Effect.provide(
        Layer.provideMerge(
          Layer.fresh(JobQueue.layer({ schema, migrate: false, onUnavailable: "fail" })),
          client(role)
        )
      )
    ))

const statement = (text: string) =>
  Effect.flatMap(
    Effect.all([SqlClient.SqlClient, Roles]),
    ([sql, { schema }]) => sql.unsafe<any>(text.replaceAll("pgqueue", schema))
  )

/** What a program can act on. */
const isDenied = (error: unknown): boolean =>
  typeof error === "object" && error !== null && "reason" in error &&
  (error as SqlError.SqlError).reason._tag === "AuthorizationError" &&
  Database.sqlState(error as SqlError.SqlError) === "42501"

/** The server allows this role none of these statements. */
const denied = Effect.fnUntraced(function*(texts: ReadonlyArray<string>) {
  for (const text of texts) {
    const exit = yield* Effect.exit(statement(text))
    assert.isTrue(Exit.isFailure(exit), `allowed: ${text}`)
    const error = yield* Effect.flip(exit)
    assert.strictEqual(Database.sqlState(error), "42501", `${text}: ${error.message} ${String(error.reason.cause)}`)
  }
})

/** The library says so, too. */
const refused = Effect.fnUntraced(function*<A, E, R>(what: string, operation: Effect.Effect<A, E, R>) {
  const exit = yield* Effect.exit(operation)
  assert.isTrue(Exit.isFailure(exit), `allowed: ${what}`)
  assert.isTrue(isDenied(yield* Effect.flip(exit)), what)
})

const secrets = [
  "payload",
  "result",
  "error",
  "message",
  "reason",
  "cancel_reason",
  "progress",
  "metadata",
  "problem",
  "trace",
  "unique_key"
]
const ddl = [
  "create table pgqueue.mine ()",
  "create function pgqueue.mine() returns int language sql as 'select 1'",
  "truncate pgqueue.job",
  "truncate pgqueue.finished",
  "drop table pgqueue.job",
  "drop schema pgqueue cascade",
  "alter table pgqueue.job add column mine int",
  "drop function pgqueue.uuid_v7()",
  "create trigger mine before insert on pgqueue.job for each row execute function pgqueue.uuid_v7()",
  "create index on pgqueue.job (kind)",
  "update pgqueue.migration set name = 'mine'",
  "delete from pgqueue.migration",
  "insert into pgqueue.migration (migration_id, name) values (99, 'mine')",
  "alter table pgqueue.job owner to current_user"
]
const reading = [
  "select payload from pgqueue.job",
  "select * from pgqueue.job",
  "select job from pgqueue.job",
  "select result from pgqueue.finished",
  "select payload from pgqueue.finished",
  "select error from pgqueue.finished",
  "select payload from pgqueue.archive",
  "select message from pgqueue.attempt",
  "select error from pgqueue.attempt",
  "select payload from pgqueue.schedule",
  "copy pgqueue.job (payload) to stdout",
  "select 1 from pgqueue.job where payload::text like '%'",
  "insert into pgqueue.job select * from pgqueue.job on conflict do nothing returning payload"
]
const writing = [
  "delete from pgqueue.job",
  "delete from pgqueue.finished",
  "delete from pgqueue.attempt",
  "delete from pgqueue.lease",
  "delete from pgqueue.worker",
  "update pgqueue.job set cancelled_at = now()",
  "update pgqueue.job set attempt = 0",
  "update pgqueue.finished set status = 'completed'",
  "update pgqueue.lease set ids = '{}'",
  "insert into pgqueue.finished (id) values (gen_random_uuid())",
  "insert into pgqueue.lease (id, worker, ids) values (gen_random_uuid(), gen_random_uuid(), '{}')",
  "insert into pgqueue.setting (name, value) values ('cleanup', '{}')",
  "insert into pgqueue.schedule (name, spec, kind) values ('a', '@daily', 'pay')"
]

/** Enqueues in every way there is, and works off. */
const enqueueing = Effect.gen(function*() {
  const sql = yield* SqlClient.SqlClient
  const id = crypto.randomUUID()
  const key = crypto.randomUUID()
  const secret = "canary"
  assert.strictEqual((yield* Pay.enqueue({ secret })).status, "inserted")
  yield* Effect.all(Array.from({ length: 20 }, () => Pay.enqueue({ secret })), { concurrency: "unbounded" })
  assert.lengthOf(yield* Pay.enqueueAll([{ secret }, { secret }]), 2)
  assert.lengthOf(yield* Pay.enqueueAll(Array.from({ length: 1500 }, () => ({ secret }))), 1500)
  assert.strictEqual((yield* Pay.enqueue({ secret }, { id })).status, "inserted")
  assert.strictEqual((yield* Pay.enqueue({ secret }, { id })).status, "existing")
  const first = yield* Pay.enqueue({ secret }, { unique: key })
  assert.deepStrictEqual(yield* Pay.enqueue({ secret }, { unique: key }), { id: first.id, status: "existing" })
  yield* Pay.enqueueAll([{ secret }, { secret }], (_, n) => ({ unique: `${key} ${n}` }))
  // A key whose period is over is taken by the next one.
  const period = { key: `${key} period`, period: "1 millis" } as const
  yield* Pay.enqueue({ secret }, { unique: period })
  yield* Effect.sleep(5)
  assert.strictEqual((yield* Pay.enqueue({ secret }, { unique: period })).status, "inserted")
  yield* sql.withTransaction(Effect.gen(function*() {
    yield* Pay.enqueue({ secret })
    yield* Pay.enqueue({ secret }, { unique: `${key} here` })
    yield* Pay.enqueue({ secret }, { unique: `${key} here` })
    yield* Pay.enqueueAll([{ secret }, { secret }])
    yield* Effect.sleep(5)
    yield* Pay.enqueue({ secret }, { unique: period })
  }))
  yield* statement(`select pgqueue.enqueue('pay', '{"secret":"sql"}')`)
  const both = `select pgqueue.enqueue('pay', '{"secret":"sql"}', unique_key => '${key} sql')::text as id`
  assert.deepStrictEqual(yield* statement(both), yield* statement(both))
})

layer(fixture, { excludeTestServices: true, timeout: "60 seconds" })("the role", (it) => {
  it.effect("worker works, fires, keeps in order, acts and enqueues, and changes nothing of the storage", () =>
    as(
      "worker",
      Effect.gen(function*() {
        yield* enqueueing
        const entry = CronScheduler.make("often", { every: "1 second", job: Pay, payload: { secret: "cron" } })
        yield* Layer.build(
          Layer.mergeAll(
            Worker.layer({
              jobs: [Pay],
              concurrency: 10,
              lease: "600 millis",
              heartbeat: "100 millis",
              rescueInterval: "100 millis"
            }),
            CronScheduler.layer([entry], { pollInterval: "50 millis" }),
            Maintenance.layer({ cleanup: { retention: "1 hour", strategy: "archive", interval: "50 millis" } })
          ).pipe(Layer.provide(PayHandler))
        )
        const schema = (yield* JobQueue).schema
        const { rows } = yield* Roles
        yield* until(
          "all have ended",
          Effect.map(rows(`select count(*)::int as n from ${schema}.job`), ([row]) => row.n === 0)
        )
        const { id } = yield* Pay.enqueue({ secret: "mine" })
        assert.strictEqual(yield* Pay.execute({ secret: "mine" }), "paid mine")
        yield* until("it has ended", Effect.map(Pay.poll(id), Option.isSome))
        yield* Admin.retry(id)
        yield* until(
          "it has ended again",
          Effect.map(Admin.get(id), (job) => Option.getOrThrow(job).status === "completed")
        )
        yield* Admin.delete(id)
        const later = yield* Pay.enqueue({ secret: "later" }, { delay: "1 hour" })
        yield* Admin.cancel(later.id)
        yield* Admin.redrive({ within: "1 second" })
        const { stats } = yield* JobQueue
        assert.isNotEmpty(yield* stats)
        yield* until(
          "a tick",
          Effect.map(rows(`select 1 from ${schema}.finished where metadata->>'schedule' = 'often'`), (all) =>
            all.length > 0)
        )
        yield* CronScheduler.pause("often")
        yield* CronScheduler.resume("often")
        yield* CronScheduler.trigger("often")
        yield* CronScheduler.backfill("often", { from: DateTime.makeUnsafe(1000), to: DateTime.makeUnsafe(5000) })
        yield* CronScheduler.remove("often")
        // The turns of all tasks have been taken, and none was refused.
        yield* until(
          "all tasks have run",
          Effect.map(
            rows(`select count(*)::int as n from ${schema}.task where isfinite(ran_at)`),
            ([row]) =>
              row.n >= 3
          )
        )
        yield* denied(ddl)
      })
    ))

  it.effect("producer enqueues in every way, reads nothing of a job and changes none", () =>
    as(
      "producer",
      Effect.gen(function*() {
        yield* enqueueing
        yield* denied([...ddl, ...reading, ...writing])
        yield* denied([
          "delete from pgqueue.ready",
          "select * from pgqueue.ready",
          "update pgqueue.unique_key set job = job"
        ])
        const { id } = yield* Pay.enqueue({ secret: "canary" })
        const unique = { key: "held", onConflict: "replace" } as const
        yield* Pay.enqueue({ secret: "canary" }, { unique })
        yield* refused("replace", Pay.enqueue({ secret: "canary" }, { unique }))
        yield* refused("get", Admin.get(id))
        yield* refused("attempts", Admin.attempts(id))
        yield* refused("cancel", Admin.cancel(id))
        yield* refused("retry", Admin.retry(id))
        yield* refused("delete", Admin.delete(id))
        yield* refused("redrive", Admin.redrive())
        yield* refused("poll", Pay.poll(id))
        yield* refused("stats", Effect.flatMap(JobQueue, ({ stats }) => stats))
        yield* refused("list", CronScheduler.list)
        yield* refused("pause", CronScheduler.pause("often"))
        const entry = CronScheduler.make("mine", { every: "1 second", job: Pay, payload: { secret: "cron" } })
        yield* refused("schedule", CronScheduler.schedule(entry))
        yield* refused("scheduler", Layer.build(CronScheduler.layer([entry])))
        yield* refused("maintenance", Layer.build(Maintenance.layer({ cleanup: { retention: "1 hour" } })))
        yield* refused("run", Worker.runUntilEmpty({ jobs: [Pay] }).pipe(Effect.provide(PayHandler)))
      })
    ))

  it.effect("replacer is a producer that gives jobs in line another payload, and reads none", () =>
    as(
      "replacer",
      Effect.gen(function*() {
        yield* enqueueing
        const sql = yield* SqlClient.SqlClient
        for (const onConflict of ["replace", "debounce"] as const) {
          const unique = { key: `mine ${onConflict}`, onConflict, period: "1 hour" } as const
          const { id } = yield* Pay.enqueue({ secret: "canary" }, { unique, delay: "1 hour" })
          const replaced = { id, status: "replaced" } as const
          assert.deepStrictEqual(yield* Pay.enqueue({ secret: "b" }, { unique, delay: "2 hours" }), replaced)
          assert.deepStrictEqual(yield* sql.withTransaction(Pay.enqueue({ secret: "c" }, { unique })), replaced)
        }
        yield* denied([...ddl, ...reading, ...writing, "update pgqueue.job set payload = payload returning payload"])
      })
    ))

  it.effect("caller is a producer that waits for results, and reads no payload", () =>
    Effect.gen(function*() {
      const { client, schema } = yield* Roles
      yield* Layer.build(
        Worker.layer({ jobs: [Pay], concurrency: 10 }).pipe(
          Layer.provide(PayHandler),
          Layer.provide(JobQueue.layer({ schema, migrate: false }).pipe(Layer.provideMerge(client("worker"))))
        )
      )
      yield* as(
        "caller",
        Effect.gen(function*() {
          assert.strictEqual(yield* Pay.execute({ secret: "x" }), "paid x")
          const unique = "called"
          const both = [
            Pay.execute({ secret: "y" }, { unique, delay: "100 millis" }),
            Pay.execute({ secret: "y" }, { unique })
          ]
          assert.deepStrictEqual(yield* Effect.all(both, { concurrency: 2 }), ["paid y", "paid y"])
          const { id } = yield* Pay.enqueue({ secret: "z" })
          yield* until("it has ended", Effect.map(Pay.poll(id), Option.isSome))
          yield* denied([...ddl, "select payload from pgqueue.job", "select payload from pgqueue.finished"])
          yield* denied([
            "delete from pgqueue.finished",
            "delete from pgqueue.job",
            "update pgqueue.finished set result = null"
          ])
        })
      )
    }))

  it.effect("viewer counts, and reads nothing of a job", () =>
    as(
      "viewer",
      Effect.gen(function*() {
        const { stats } = yield* JobQueue
        assert.isNotEmpty(yield* stats)
        yield* statement("select id, kind, queue, status, attempt, finished_at from pgqueue.finished")
        yield* statement("select id, kind, run_at from pgqueue.job")
        yield* statement("select name, next_at from pgqueue.schedule")
        yield* denied([
          ...ddl,
          ...reading,
          ...writing,
          "select message from pgqueue.attempt",
          "select unique_key from pgqueue.job"
        ])
        yield* denied(["select pgqueue.enqueue('pay')", "select * from pgqueue.unique_key"])
        yield* refused("enqueue", Pay.enqueue({ secret: "x" }))
        yield* refused("enqueue with a key", Pay.enqueue({ secret: "x" }, { unique: "x" }))
        yield* refused("enqueueAll", Pay.enqueueAll([{ secret: "x" }]))
        yield* refused("get", Admin.get(crypto.randomUUID()))
        yield* refused("cancel", Admin.cancel(crypto.randomUUID()))
      })
    ))

  it.effect("admin looks and acts, and does not work", () =>
    Effect.gen(function*() {
      const { id } = yield* as("producer", Pay.enqueue({ secret: "x" }, { delay: "1 hour", unique: "admin's" }))
      const entry = CronScheduler.make("monthly", { cron: "0 0 1 * *", job: Pay, payload: { secret: "cron" } })
      yield* as("worker", CronScheduler.schedule(entry))
      yield* as(
        "admin",
        Effect.gen(function*() {
          const sql = yield* SqlClient.SqlClient
          assert.isTrue(Option.isSome(yield* Admin.get(id)))
          assert.deepStrictEqual(yield* Admin.attempts(id), [])
          assert.strictEqual(yield* Admin.cancel(id), "cancelled")
          yield* Admin.retry(id)
          yield* sql.withTransaction(Admin.cancel(id))
          yield* Admin.delete(id)
          yield* Admin.redrive()
          const { stats } = yield* JobQueue
          yield* stats
          assert.isNotEmpty(yield* CronScheduler.list)
          yield* CronScheduler.pause("monthly")
          yield* CronScheduler.resume("monthly")
          yield* CronScheduler.trigger("monthly")
          yield* CronScheduler.backfill("monthly", {
            from: DateTime.makeUnsafe(0),
            to: DateTime.makeUnsafe("1970-06-01")
          })
          yield* CronScheduler.remove("monthly")
          yield* denied([
            ...ddl,
            "delete from pgqueue.lease",
            "delete from pgqueue.worker",
            "update pgqueue.setting set value = '{}'"
          ])
          yield* refused("run", Worker.runUntilEmpty({ jobs: [Pay] }).pipe(Effect.provide(PayHandler)))
        })
      )
    }))

  it.effect("none: somebody who may only connect is allowed nothing, and is told so", () =>
    Effect.gen(function*() {
      const { client, schema } = yield* Roles
      yield* Effect.provide(
        denied([
          ...ddl,
          ...reading,
          ...writing,
          "select pgqueue.enqueue('pay')",
          "select pgqueue.uuid_v7()",
          "select * from pgqueue.migration"
        ]),
        client("public")
      )
      for (const migrate of [false, true]) {
        yield* refused(
          "start",
          Effect.scoped(
            Layer.build(
              JobQueue.layer({ schema, migrate, onUnavailable: "wait" }).pipe(Layer.provide(client("public")))
            )
          )
        )
      }
      // Nor does a role that works create what is missing.
      yield* refused(
        "create",
        Effect.scoped(
          Layer.build(JobQueue.layer({ schema: "other", onUnavailable: "wait" }).pipe(Layer.provide(client("worker"))))
        )
      )
    }))

  it.effect("of each column and function is the one that was meant", () =>
    Effect.gen(function*() {
      const { rows, schema } = yield* Roles
      // Every column of every table, those of tomorrow included: a new one is nobody's until somebody thinks about it.
      const readable = (role: Role) =>
        rows(
          `select c.relname::text || '.' || a.attname::text as name from pg_class c join pg_attribute a on a.attrelid = c.oid
           where c.relnamespace = $1::regnamespace and c.relkind = 'r' and a.attnum > 0 and a.attname = any ($3::text[])
             and has_column_privilege($2, c.oid, a.attnum, 'select') order by 1`,
          [schema, `${schema}_${role}`, secrets]
        ).pipe(Effect.map((found) => found.map(({ name }) => name)))
      assert.deepStrictEqual(yield* readable("producer"), [])
      assert.deepStrictEqual(yield* readable("viewer"), [])
      assert.deepStrictEqual(yield* readable("replacer"), ["job.unique_key"])
      assert.deepStrictEqual(
        yield* readable("caller"),
        ["archive.error", "archive.reason", "archive.result", "finished.error", "finished.reason", "finished.result"]
      )
      assert.deepStrictEqual(
        yield* rows(
          `select proname::text from pg_proc where pronamespace = $1::regnamespace and (prosecdef or has_function_privilege('public', oid, 'execute'))`,
          [schema]
        ),
        []
      )
      assert.deepStrictEqual(
        yield* rows(
          `select relname::text from pg_class where relnamespace = $1::regnamespace and relkind = 'r' and relowner <> $2::regrole`,
          [schema, `${schema}_owner`]
        ),
        []
      )
    }))

  it.effect("may be made by a role with CREATEROLE that owns the database", () =>
    Effect.scoped(Effect.gen(function*() {
      const { rows: asSuperuser } = yield* Roles
      const { name, url } = yield* makeDatabase()
      const schema = `r${randomBytes(6).toString("hex")}`
      const boss = `${schema}_boss`
      yield* Effect.acquireRelease(
        Effect.andThen(
          asSuperuser(`create role ${boss} login createrole password 'secret'`),
          asSuperuser(`alter database ${name} owner to ${boss}`)
        ),
        () =>
          Effect.gen(function*() {
            const client = PgClient.layer({ url, maxConnections: 1 })
            const names = roles.filter((role) => role !== "public").map((role) => `${schema}_${role}`)
            yield* Effect.forEach(
              [...names, boss],
              (role) => SqlClient.SqlClient.use((sql) => sql.unsafe(`drop owned by ${role} cascade`))
            ).pipe(Effect.provide(Layer.fresh(client)))
            yield* asSuperuser(`alter database ${name} owner to current_user`)
            for (const role of [...names, boss]) yield* asSuperuser(`drop role ${role}`)
          }).pipe(Effect.ignore({ log: "Warn" }))
      )
      const as = new URL(Redacted.value(url))
      as.username = boss
      as.password = "secret"
      const client = Layer.fresh(PgClient.layer({ url: Redacted.make(as.href), maxConnections: 2 }))
      yield* Effect.gen(function*() {
        const sql = yield* SqlClient.SqlClient
        const apply = Effect.forEach(
          roleStatements(schema),
          (statement) => sql.unsafe(statement)
        )
        yield* apply
        yield* Effect.scoped(Layer.build(Layer.fresh(JobQueue.layer({ schema }))))
        yield* apply
        yield* apply
        assert.deepStrictEqual(
          yield* sql.unsafe(
            `select distinct pg_get_userbyid(relowner)::text as owner from pg_class where relnamespace = $1::text::regnamespace`,
            [schema]
          ),
          [{ owner: `${schema}_owner` }]
        )
      }).pipe(Effect.provide(client))
    })))

  it.effect("does not matter for NOTIFY: garbage that anybody can send costs a look a second", () =>
    Effect.gen(function*() {
      const { client, schema } = yield* Roles
      const { url } = yield* TestDatabase
      const logged: Array<string> = []
      const log = Logger.layer([Logger.make((entry) => void logged.push(JSON.stringify(entry.message)))])
      const started = yield* Deferred.make<void>()
      class Quiet extends Job.make("quiet", { queue: "quiet" }) {}
      const wire = yield* overhear(Redacted.value(url))
      const claims = () => wire.texts.filter((text) => text.startsWith("with me as")).length
      yield* Layer.build(
        Worker.layer({ jobs: [Quiet] }).pipe(
          Layer.provide(Quiet.toLayer(() => Effect.asVoid(Deferred.succeed(started, undefined)))),
          Layer.provide(JobQueue.layer({ schema, migrate: false })),
          Layer.provide(PgClient.layer({ url: Redacted.make(wire.url) })),
          Layer.provide(log)
        )
      )
      const channel = Database.channelOf(schema)
      const forge = (payload: string, seconds: number) =>
        Effect.gen(function*() {
          const sql = yield* SqlClient.SqlClient
          const before = claims()
          const begun = yield* now
          for (let round = 0; round < seconds * 10; round++) {
            yield* sql.unsafe(
              `select pg_notify('${channel}', payload) from (select i, ${payload} as payload from generate_series(${
                round * 700
              }, ${round * 700 + 699}) as i) n`
            )
            yield* Effect.sleep("100 millis")
          }
          return { looks: claims() - before, seconds: ((yield* now) - begun) / 1000 }
        }).pipe(Effect.provide(client("public")))
      yield* until("it listens and has looked", Effect.sync(() => claims() > 0))
      const heeded = yield* forge(
        `case i % 8 when 0 then 'canary ' || i when 1 then 'cancel ' || gen_random_uuid() when 2 then 'end ' || gen_random_uuid()
         when 3 then '0' when 4 then '0 not-our-queue' || i when 5 then E'\\u0001\n' || i when 6 then '12345678 quiet' || i
         else repeat('é', 3000) || i end`,
        3
      )
      // A claim for each look, and when that was from where the last one has stopped, one from the front.
      assert.isAtMost(heeded.looks, 4 + 2 * heeded.seconds)
      // What looks like one of ours cannot be told from it, and costs a claim, one at a time.
      assert.isAtMost((yield* forge("'0 quiet'", 1)).looks, 100)
      yield* forge("'schedule'", 1)
      yield* as("producer", Quiet.enqueue())
      yield* Deferred.await(started)
      assert.isNotEmpty(logged)
      assert.notMatch(logged.join("\n"), /canary|é/)
    }))

  it.effect("that rows are hidden from by a policy loses none of them: it is refused, and goes on when it is gone", () =>
    Effect.gen(function*() {
      const { rows, schema } = yield* Roles
      class Hidden extends Job.make("hidden", { queue: "hidden", payload: { n: Schema.Int } }) {}
      yield* as(
        "worker",
        Effect.gen(function*() {
          let ended = 0
          const handler = Hidden.toLayer(() => Effect.andThen(Effect.sleep(50), Effect.sync(() => void ended++)))
          const worker = Worker.layer({ jobs: [Hidden], pollInterval: "100 millis" })
          yield* Layer.build(Layer.provide(worker, handler))
          yield* Hidden.enqueueAll(Array.from({ length: 300 }, (_, n) => ({ n })))
          yield* until("some have ended", Effect.sync(() => ended > 0))
          yield* rows(`alter table ${schema}.job enable row level security`)
          yield* Effect.sleep(1000)
          yield* rows(`alter table ${schema}.job disable row level security`)
          yield* until("all have ended", Effect.sync(() => ended === 300))
        })
      )
    }))
})
