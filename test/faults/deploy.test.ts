/** Schemas that come to be, change and move while processes start and work. */
import { PgClient } from "@effect/sql-pg"
import { assert } from "@effect/vitest"
import { Context, Effect, Layer, Redacted, Schedule } from "effect"
import { Migrator, SqlClient } from "effect/sql"
import { isSqlError } from "effect/sql/SqlError"
import { execFileSync } from "node:child_process"
import * as Database from "../../src/Database.ts"
import { Admin, JobQueue, JobQueueError } from "../../src/index.ts"
import * as Migrations from "../../src/Migrations.ts"
import { Work } from "../programs/actor.ts"
import { Count, Flaky, Step } from "../programs/jobs.ts"
import { makeDatabase } from "../support/database.ts"
import { startProgram } from "../support/processes.ts"
import { now, quantile, until } from "../support/queue.ts"
import { roleStatements } from "../support/roles.ts"
import { full, limit } from "./form.ts"
import { allRun, queueAt, terminating, timed } from "./inside.ts"
import { makeNet } from "./net.ts"
import { scenarios } from "./scenario.ts"
import { load, type Stage, Victim } from "./stage.ts"

/** How the catalog looks from outside, and in how many transactions it was made. */
const shape = (url: string) =>
  Effect.scoped(Effect.gen(function*() {
    const sql = Context.get(yield* queueless(url), SqlClient.SqlClient)
    const version = yield* Migrations.current(sql, "pgqueue")
    const count = (text: string) => Effect.map(sql.unsafe<{ n: number }>(text), ([row]) => row!.n)
    return {
      version,
      tables: yield* count(
        "select count(*)::int as n from pg_class where relnamespace = to_regnamespace('pgqueue') and relkind = 'r'"
      ),
      // What is written down of each migration is when its transaction began.
      transactions: version === 0
        ? 0
        : yield* count("select count(distinct created_at)::int as n from pgqueue.migration")
    }
  }))

/** A client, and no queue. */
const queueless = (url: string) =>
  Layer.build(Layer.fresh(PgClient.layer({ url: Redacted.make(url), maxConnections: 1 })))

/** DDL as a careful hand does it: it waits for nobody for long, and tries again. */
const alter = (stage: Stage, text: string) =>
  stage.rows(`do $$ begin set local lock_timeout = '1s'; ${text}; end $$`).pipe(
    Effect.retry({ while: Database.isLockTimeout, schedule: Schedule.spaced("50 millis") })
  )

scenarios("a deploy", (scenario) => {
  // Four processes that start four queues each, every one with a client of its own, at one word.
  scenario(
    "J1",
    "sixteen start at once on an empty database",
    { short: true, minutes: 5 },
    (stage) =>
      Effect.gen(function*() {
        const victim = yield* Victim
        const rounds = full ? 20 : 2
        const name = (round: number) => `boot_${process.pid}_${round}`
        const urls = Array.from({ length: rounds }, (_, round) => {
          const url = new URL(victim.url)
          url.pathname = `/${name(round)}`
          return url.href
        })
        const expected = yield* shape(stage.url)
        assert.strictEqual(expected.transactions, 1)
        yield* stage.ledger.query("create table public.booted (round int, took float8, error text)")
        const control = Context.get(yield* queueless(stage.ledgerUrl), SqlClient.SqlClient)
        for (let round = 0; round < rounds; round++) yield* control`select pg_advisory_lock(${round})`
        const booters = yield* Effect.forEach(
          [1, 2, 3, 4],
          (n) => startProgram("booter.ts", { controlUrl: stage.ledgerUrl, name: `boot ${n}`, urls, queues: 4 })
        )
        for (let round = 0; round < rounds; round++) {
          yield* stage.rows(`create database ${name(round)}`)
          yield* Effect.addFinalizer(() =>
            Effect.ignore(stage.rows(`drop database if exists ${name(round)} with (force)`))
          )
          yield* control`select pg_advisory_unlock(${round})`
          yield* until(
            "all have started",
            Effect.map(stage.recorded("select count(*)::int from booted where round = $1", [round]), (n) => n === 16),
            { within: 60_000 }
          )
          assert.deepStrictEqual(yield* shape(urls[round]!), expected)
          yield* stage.rows(`drop database ${name(round)} with (force)`)
        }
        for (const booter of booters) assert.strictEqual((yield* booter.ended).code, 0, booter.output())
        const booted = yield* stage.ledger.query<{ took: number; error: string | null }>(
          "select took, error from booted"
        )
        yield* stage.finish()
        assert.deepStrictEqual(booted.filter(({ error }) => error !== null), [])
        const took = booted.map((one) => one.took)
        const longest = took.reduce((a, b) => Math.max(a, b))
        assert.isBelow(longest, limit(10_000))
        return { rounds: `${rounds} of 16`, p50: quantile(took, 0.5), longest }
      })
  )

  scenario(
    "J2",
    "a migration is cut off, or its process killed, at every statement",
    { short: true, minutes: 6 },
    (stage) =>
      Effect.gen(function*() {
        const victim = yield* Victim
        const expected = yield* shape(stage.url)
        const net = yield* makeNet(victim.url)
        yield* stage.ledger.query("create table public.booted (round int, took float8, error text)")
        const control = Context.get(yield* queueless(stage.ledgerUrl), SqlClient.SqlClient)
        const through = (url: Redacted.Redacted) => {
          const led = new URL(Redacted.value(url))
          led.port = new URL(net.url).port
          return led.href
        }
        /** Never half: all of it in one transaction, or nothing. Then the next one completes it. */
        const completes = Effect.fnUntraced(function*(url: string, when: string) {
          const left = yield* shape(url)
          assert.deepStrictEqual(left, left.version === 0 ? { version: 0, tables: 0, transactions: 0 } : expected, when)
          yield* Effect.scoped(
            Effect.flatMap(queueAt(url), (queue) => Effect.provideContext(Count.enqueue({ n: 1 }), queue))
          )
          assert.deepStrictEqual(yield* shape(url), expected, when)
          return left.version
        })
        let cuts = 0
        let kills = 0
        let left = 0
        // Inside a transaction nothing more comes of it that an answer is still on its way.
        const at = ["lost", "sent"] as const
        for (let nth = 1; nth < 200; nth += full ? 2 : 15) {
          // The library itself goes on after a cut.
          const { url } = yield* makeDatabase(victim.url)
          const hit = yield* net.cut({ text: "", process: "cut", nth, at: at[(nth >> 1) % 2]! })
          yield* Effect.scoped(queueAt(through(url), { applicationName: "cut" }))
          const struck = yield* Effect.timeoutOption(hit, 20)
          yield* completes(Redacted.value(url), `cut at request ${nth}`)
          if (struck._tag === "None") break
          cuts++
          if (!full) continue
          const { url: other } = yield* makeDatabase(victim.url)
          yield* control`select pg_advisory_lock(0)`
          const booter = yield* startProgram("booter.ts", {
            controlUrl: stage.ledgerUrl,
            name: "killed",
            urls: [through(other)],
            queues: 1
          })
          // At the statements between.
          yield* Effect.asVoid(net.cut(
            { text: "", process: "killed", nth: nth + 1, at: at[(nth >> 1) % 2]! },
            () => process.kill(booter.pid, "SIGKILL")
          ))
          yield* control`select pg_advisory_unlock(0)`
          // Without one it had no more to send.
          if ((yield* booter.ended).signal === null) break
          kills++
          yield* until(
            "its session is gone",
            Effect.map(
              stage.value("select count(*)::int from pg_stat_activity where application_name = 'killed'"),
              (n) => n === 0
            )
          )
          if ((yield* completes(Redacted.value(other), `killed at request ${nth + 1}`)) === 0) left++
        }
        assert.isAtLeast(cuts, full ? 20 : 4)
        assert.isAtLeast(kills, full ? 20 : 0)
        yield* stage.finish()
        return { cuts: `${cuts}`, kills: `${kills}`, "of them without a schema": `${left}` }
      })
  )

  // Nothing was released before this: a newer schema is one that a further migration would make, additive as all are.
  scenario(
    "J3",
    "the schema becomes newer than the workers that run on it",
    { minutes: 4 },
    (stage) =>
      Effect.gen(function*() {
        const cast = yield* stage.fleet()
        yield* stage.during(
          "migration",
          Effect.gen(function*() {
            for (const table of ["job", "ready", "lease", "finished", "worker", "attempt", "schedule"]) {
              yield* alter(
                stage,
                `alter table pgqueue.${table} add column later text, add column later_count int not null default 7`
              )
            }
            yield* stage.rows("create table pgqueue.later (id uuid primary key)")
            yield* stage.rows("insert into pgqueue.migration (migration_id, name) values ($1::int, 'later')", [
              Migrations.version + 1
            ])
          })
        )
        const ended = yield* stage.runsEnded
        yield* stage.during("kill", cast.workers[0]!.kill("SIGKILL"))
        yield* Effect.sleep(15_000)
        assert.isAbove(yield* stage.runsEnded, ended + 300)
        const refused = String(yield* Effect.exit(stage.worker("worker late")))
        assert.match(refused, /is at version \d+, newer than this library/)
        assert.match(refused, /ended with 1/)
        assert.strictEqual((yield* shape(stage.url)).version, Migrations.version + 1)
        const counts = yield* stage.finish()
        return { ...counts, "who starts later": "refused, Unsupported" }
      })
  )

  scenario("J4", "workers start on an older schema", { short: true }, (stage) =>
    Effect.gen(function*() {
      const { url: redacted } = yield* makeDatabase((yield* Victim).url)
      const url = Redacted.value(redacted)
      const sql = Context.get(yield* queueless(url), SqlClient.SqlClient)
      const older = Migrations.migrations.slice(0, -1)
      yield* sql`create schema pgqueue`
      yield* Migrator.make({})({
        table: "pgqueue.migration",
        loader: Effect.succeed(older.map(([id, name, statements]) =>
          [
            id,
            name,
            Effect.succeed(
              Effect.forEach(statements(`"pgqueue"`, Database.channelOf("pgqueue")), (text) => sql.unsafe(text), {
                discard: true
              })
            )
          ] as const
        ))
      }).pipe(Effect.provideService(SqlClient.SqlClient, sql))
      yield* sql`select pgqueue.enqueue('count', '{"n":1}') from generate_series(1, 100)`
      const before = yield* shape(url)
      assert.strictEqual(before.version, Migrations.version - 1)

      const refused = yield* Effect.flip(Effect.scoped(queueAt(url, {}, { migrate: false })))
      assert.instanceOf(refused, JobQueueError)
      assert.deepInclude(refused, { reason: "NotMigrated" })
      assert.match(refused.message, /is at version \d+, this library needs \d+/)
      const late = String(yield* Effect.exit(stage.worker("worker denied", { url, queue: { migrate: false } })))
      assert.match(late, /is at version \d+, this library needs \d+/)
      // Neither has changed anything.
      assert.deepStrictEqual(yield* shape(url), before)
      assert.deepStrictEqual(yield* sql`select count(*)::int as n from pgqueue.ready`, [{ n: 100 }])

      // Those that may, bring it up to date, several at once, and work.
      const workers = yield* Effect.forEach([1, 2, 3], (n) => stage.worker(`worker ${n}`, { url }), { concurrency: 3 })
      yield* until(
        "the jobs have run",
        Effect.map(
          sql<
            { n: number }
          >`select count(*)::int as n from pgqueue.finished where status = 'completed' and attempt = 1`,
          ([row]) => row?.n === 100
        )
      )
      for (const worker of workers) assert.strictEqual((yield* worker.end()).code, 0, worker.output())
      assert.strictEqual((yield* shape(url)).version, Migrations.version)
      yield* stage.finish()
      return { jobs: "100", "who may not migrate": "refused, NotMigrated" }
    }))

  scenario(
    "J9",
    "each process logs in with the rights of its role and no others",
    {},
    (stage) =>
      Effect.gen(function*() {
        yield* Effect.forEach(roleStatements(), (text) => stage.rows(text))
        const logins = ["owner", "worker", "producer", "viewer"] as const
        const login = (role: typeof logins[number]) => `${role}_${process.pid}`
        yield* Effect.acquireRelease(
          Effect.forEach(
            logins,
            (role) => stage.rows(`create role ${login(role)} login password 'secret' in role pgqueue_${role}`)
          ),
          () =>
            Effect.ignore(
              Effect.forEach(
                logins,
                (role) =>
                  Effect.andThen(stage.rows(`drop owned by ${login(role)}`), stage.rows(`drop role ${login(role)}`))
              )
            )
        )
        // What is the scenario's own: the table of the handlers, and what its triggers write.
        yield* stage.rows("grant insert on public.paid to pgqueue_worker")
        yield* stage.rows("grant usage on schema watch to public")
        yield* stage.rows("grant insert on all tables in schema watch to public")
        yield* stage.rows("grant usage on all sequences in schema watch to public")
        const as = (role: typeof logins[number], address: string) => {
          const url = new URL(address)
          url.username = login(role)
          url.password = "secret"
          return url.href
        }

        const working = { url: as("worker", stage.net.url), queue: { migrate: false } }
        const producing = { url: as("producer", stage.net.url), queue: { migrate: false } }
        const workers = yield* Effect.forEach(
          ["worker 1", "worker 2", "worker 3"],
          (name) => stage.worker(name, working)
        )
        const scheduler = yield* stage.scheduler("scheduler", working)
        const producer = yield* stage.producer("producer", { ...producing, rate: load })
        yield* until("they work", Effect.map(stage.runsEnded, (ended) => ended > load))
        // What the dead have left is taken back with the same rights.
        yield* stage.during("a kill", workers[0]!.kill("SIGKILL"))
        yield* terminating(stage)
        const figures = yield* stage.recovered(3000)
        yield* Effect.sleep(10_000)
        allRun([workers[1]!, workers[2]!, scheduler, producer])

        /** What the server lets nobody of this role do, and the library says so. */
        const denied = Effect.fnUntraced(function*(
          role: typeof logins[number],
          what: string,
          operation: Effect.Effect<unknown, unknown, JobQueue | SqlClient.SqlClient>
        ) {
          const queue = yield* queueAt(as(role, stage.url), { applicationName: role }, { migrate: false })
          const error = yield* Effect.flip(Effect.provideContext(operation, queue))
          assert.isTrue(
            isSqlError(error) && error.reason._tag === "AuthorizationError",
            `${role} ${what}: ${String(error)}`
          )
        }, Effect.scoped)
        const sql = (text: string) => Effect.flatMap(SqlClient.SqlClient, (client) => client.unsafe(text))
        const enqueue = Work.enqueue({ key: crypto.randomUUID(), millis: 0, fails: 0 })
        for (const role of ["worker", "producer", "viewer"] as const) {
          yield* denied(role, "creates", sql("create table pgqueue.mine ()"))
          yield* denied(role, "alters", sql("alter table pgqueue.job add column mine int"))
        }
        yield* denied("producer", "reads", sql("select payload from pgqueue.job"))
        yield* denied("producer", "gets", Admin.get(crypto.randomUUID()))
        yield* denied("producer", "cancels", Admin.cancel(crypto.randomUUID()))
        yield* denied("viewer", "enqueues", enqueue)
        yield* denied("viewer", "reads", sql("select payload from pgqueue.finished"))
        const counted = yield* Effect.scoped(Effect.gen(function*() {
          const viewer = yield* queueAt(as("viewer", stage.url), { applicationName: "viewer" }, { migrate: false })
          return yield* Context.get(viewer, JobQueue).stats
        }))
        assert.isNotEmpty(counted)
        yield* Effect.scoped(queueAt(as("owner", stage.url), { applicationName: "owner" }))
        return { ...figures, ...yield* stage.finish() }
      })
  )

  scenario(
    "J5",
    "columns come, go and change their type under load",
    { minutes: 4 },
    (stage) =>
      Effect.gen(function*() {
        const cast = yield* stage.fleet()
        let altered = 0
        const begun = yield* now
        while ((yield* now) - begun < 20_000) {
          for (const table of ["job", "ready", "lease", "finished", "attempt", "worker"]) {
            yield* alter(stage, `alter table pgqueue.${table} add column passing int default 1`)
            yield* alter(stage, `alter table pgqueue.${table} drop column passing`)
          }
          for (const type of ["varchar", "text"]) {
            yield* alter(stage, `alter table pgqueue.job alter column trace type ${type}`)
            yield* alter(stage, `alter table pgqueue.finished alter column reason type ${type}`)
          }
          for (const type of ["bigint", "integer"]) {
            yield* alter(stage, `alter table pgqueue.job alter column snoozed type ${type}`)
          }
          altered += 18
          yield* Effect.sleep(100)
        }
        const counts = yield* stage.finish()
        for (const { name, output } of [...cast.workers, ...cast.producers, ...cast.schedulers]) {
          assert.notMatch(output(), /0A000|cached plan/, name)
        }
        const outcomes = yield* stage.ledger.query<{ outcome: string }>(
          "select distinct outcome from intent order by 1"
        )
        assert.deepStrictEqual(
          outcomes.map(({ outcome }) => outcome),
          ["acked", "rejected"]
        )
        return { ...counts, alterations: `${altered}` }
      })
  )
})

/** The programs of a client, when they are there and not older than the server. */
const dumps = (version: string): boolean => {
  try {
    execFileSync("psql", ["--version"])
    return Number(/(\d+)\./.exec(execFileSync("pg_dump", ["--version"], { encoding: "utf8" }))?.[1]) >= Number(version)
  } catch {
    return false
  }
}

scenarios("a move", (scenario) => {
  scenario("J8", "the database is dumped and restored elsewhere", { short: true }, (stage) =>
    Effect.gen(function*() {
      const victim = yield* Victim
      const before = yield* stage.worker("worker before")
      yield* Effect.provideContext(
        Effect.gen(function*() {
          yield* Flaky.enqueueAll(Array.from({ length: 30 }, () => undefined))
          yield* stage.untilAllEnded()
          assert.strictEqual((yield* before.end()).code, 0)
          yield* Flaky.enqueueAll(Array.from({ length: 20 }, () => undefined))
          yield* Step.enqueueAll(Array.from({ length: 20 }, () => ({ millis: 1 })), { delay: "500 millis" })
          yield* Count.enqueue({ n: 1 }, { unique: "one", delay: "500 millis" })
        }),
        stage.services
      )
      const { name, url: redacted } = yield* makeDatabase(victim.url)
      const url = Redacted.value(redacted)
      const real = dumps(victim.version)
      if (real) {
        const dump = execFileSync("pg_dump", ["--dbname", stage.straight], { maxBuffer: 2 ** 30 })
        execFileSync("psql", ["--quiet", "--set", "ON_ERROR_STOP=1", "--dbname", url], { input: dump })
      } else {
        // A template is copied only while nobody is connected to it.
        const from = new URL(stage.url).pathname.slice(1)
        const control = Context.get(yield* queueless(victim.url), SqlClient.SqlClient)
        yield* control.unsafe(`drop database ${name}`)
        yield* control.unsafe(`select pg_terminate_backend(pid) from pg_stat_activity where datname = '${from}'`)
        yield* Effect.retry(control.unsafe(`create database ${name} template ${from}`), Schedule.recurs(20))
      }
      const sql = Context.get(yield* queueless(url), SqlClient.SqlClient)
      const counted = (n: string) => Effect.map(sql.unsafe<{ n: number }>(`select (${n})::int as n`), ([row]) => row!.n)
      const migrations = yield* sql.unsafe("select * from pgqueue.migration order by 1")
      const last = yield* counted("select max(id) from pgqueue.attempt")
      assert.strictEqual(yield* counted("select count(*) from pgqueue.job"), 41)
      // The key moved with its job.
      const started = yield* timed(Effect.scoped(Effect.gen(function*() {
        const queue = yield* queueAt(url)
        const { status } = yield* Effect.provideContext(Count.enqueue({ n: 2 }, { unique: "one" }), queue)
        assert.strictEqual(status, "existing")
      })))
      const after = yield* stage.worker("worker after", { url })
      yield* until("all have ended", Effect.map(counted("select count(*) from pgqueue.job"), (n) => n === 0), {
        within: 30_000
      })
      assert.strictEqual((yield* after.end()).code, 0, after.output())
      assert.deepStrictEqual(yield* sql.unsafe("select * from pgqueue.migration order by 1"), migrations)
      assert.strictEqual(yield* counted("select count(*) from pgqueue.finished where status = 'completed'"), 71)
      // The sequence goes on where it was.
      assert.strictEqual(yield* counted(`select count(*) from pgqueue.attempt where id > ${last}`), 20)
      yield* stage.finish()
      return { how: real ? "pg_dump and psql" : "a template: no pg_dump for this server", started }
    }))
}, Victim.layer({ version: "15" }))
