/** Schedulers as an application sees them. */
import { PgClient } from "@effect/sql-pg"
import { assert, describe, it } from "@effect/vitest"
import {
  Context,
  DateTime,
  Deferred,
  Duration,
  Effect,
  Exit,
  Layer,
  Logger,
  Option,
  Redacted,
  Schema,
  Scope
} from "effect"
import { SqlClient, type SqlError } from "effect/sql"
import { CronScheduler, Job, JobQueue, Worker } from "../src/index.ts"
import { clientLayer, TestDatabase } from "./support/database.ts"
import { Ledger } from "./support/ledger.ts"
import { makeLink } from "./support/link.ts"
import { makeProxy } from "./support/proxy.ts"
import {
  allInPlace,
  allInPlaceButKeys,
  assertRows,
  databaseUrl,
  now,
  pollingQueueLayer,
  quantile,
  queueLayer,
  rows,
  running,
  until,
  untilValue,
  value,
  withPolling,
  withQueue
} from "./support/queue.ts"
import { statements } from "./support/wire.ts"

class Tick extends Job.make("tick") {}
class Report extends Job.make("report", {
  payload: { days: Schema.Int, title: Schema.String.pipe(Schema.withConstructorDefault(Effect.succeed("none"))) },
  queue: "reports",
  priority: "low",
  maxAttempts: 7,
  timeout: "90 seconds"
}) {}
class Reports extends Job.family("reports:", { payload: { days: Schema.Int } }) {}
class Once extends Job.make("once", { unique: () => "only one" }) {}

/** One more scheduler, with a queue of its own: a second process, so to speak. */
const scheduling = <const E extends ReadonlyArray<CronScheduler.Entry<never>>>(
  entries: E,
  options?: CronScheduler.LayerOptions,
  queue = queueLayer()
) => running(CronScheduler.layer(entries, options).pipe(Layer.provide(queue)))

const everySecond = (name: string, options: object = {}) =>
  CronScheduler.make(name, { every: "1 second", job: Tick, ...options })
const noDate = new Date(NaN)
const yearly = (name: string) => CronScheduler.make(name, { cron: "0 0 1 1 *", job: Tick })

const info = (name: string) => Effect.map(CronScheduler.list, (all) => all.find((one) => one.name === name)!)
/** Puts the next tick of a schedule to so many seconds ago. */
const overdue = (name: string, interval: string) =>
  rows(`update pgqueue.schedule set next_at = date_trunc('minute', clock_timestamp()) - $2::interval where name = $1`, [
    name,
    interval
  ])
const lateness = (name: string) =>
  Effect.map(
    rows<{ late: number }>(
      `select (extract(epoch from enqueued_at - scheduled_for) * 1000)::float8 as late from pgqueue.job where metadata->>'schedule' = $1`,
      [name]
    ),
    (found) => found.map(({ late }) => late)
  )
const countOf = (name: string) =>
  value("select count(*)::int from pgqueue.job where metadata->>'schedule' = $1", [name])
const untilTicks = (name: string, count: number) =>
  until(`${count} ticks of ${name}`, Effect.map(countOf(name), (n) => n >= count), { within: 45_000 })

/** What is logged, as text. */
const listening = () => {
  const logged: Array<string> = []
  const layer = Logger.layer([
    Logger.make(({ logLevel, message }) => void logged.push(`${logLevel} ${String(message)}`))
  ])
  return { logged, layer }
}

/** A stranger's transaction that has done something, until it is told to go back; fails when it cannot do it. */
const stranger = Effect.fnUntraced(function*(text: string) {
  const { sql } = yield* Ledger
  const done = yield* Deferred.make<void, SqlError.SqlError | "back">()
  const leave = yield* Deferred.make<void>()
  yield* Effect.forkScoped(
    sql.withTransaction(
      sql.unsafe(text).pipe(
        Effect.andThen(Deferred.succeed(done, undefined)),
        Effect.andThen(Deferred.await(leave)),
        Effect.andThen(Effect.fail("back" as const))
      )
    ).pipe(Effect.tapError((error) => Deferred.fail(done, error)), Effect.ignore)
  )
  yield* Deferred.await(done)
  return Deferred.succeed(leave, undefined)
})

describe("a scheduler", () => {
  it.live("enqueues each tick when it is due, and a worker elsewhere has it at once and knows its tick", () =>
    withQueue(Effect.gen(function*() {
      const seen: Array<{ readonly at: number; readonly schedule: string | undefined }> = []
      yield* running(
        Worker.layer({ jobs: [Tick], pollInterval: "30 seconds" }).pipe(
          Layer.provide(Tick.toLayer(() =>
            Effect.gen(function*() {
              const { metadata, scheduledFor } = yield* Job.Current
              yield* Effect.flatMap(Ledger, ({ record }) => record("start"))
              seen.push({ at: DateTime.toEpochMillis(scheduledFor), schedule: metadata["schedule"] })
            })
          )),
          Layer.provide(queueLayer())
        )
      )
      yield* scheduling([everySecond("often", { metadata: { a: "b" } })])
      yield* until("five ticks", Effect.sync(() => seen.length >= 5))
      yield* untilValue("select count(*) >= 5 from pgqueue.finished", true)
      yield* CronScheduler.pause("often")
      const ticks = seen.map(({ at }) => at)
      assert.deepStrictEqual(ticks, ticks.map((_, n) => ticks[0]! + n * 1000))
      assert.isTrue(ticks.every((at) => at % 1000 === 0))
      assert.isTrue(seen.every(({ schedule }) => schedule === "often"))
      const waits = yield* rows<{ late: number; wait: number }>(
        `select (extract(epoch from f.enqueued_at - f.scheduled_for) * 1000)::float8 as late,
          (extract(epoch from l.at - f.enqueued_at) * 1000)::float8 as wait
         from pgqueue.finished f join ledger l on l.job = f.id`
      )
      assert.isAtLeast(waits.length, 5)
      for (const { late, wait } of waits) {
        assert.isAtLeast(late, 0)
        assert.isBelow(late, 2500)
        assert.isBelow(wait, 2500)
      }
      yield* allInPlace
    })))

  it.live("stores what the definition says, resolved, and needs no code to enqueue it", () =>
    withQueue(Effect.gen(function*() {
      yield* CronScheduler.schedule(
        CronScheduler.make("report", { every: "1 second", job: Report, payload: { days: 3 }, metadata: { by: "me" } })
      )
      yield* CronScheduler.schedule(CronScheduler.make("other", {
        every: "1 second",
        job: Report,
        payload: { days: 4, title: "x" },
        queue: "own",
        priority: 0,
        maxAttempts: 2,
        timeout: 1500
      }))
      yield* CronScheduler.schedule(
        CronScheduler.make("member", { every: "1 second", job: Reports.of("reports:daily"), payload: { days: 5 } })
      )
      // It declares nothing and knows none of these jobs.
      yield* scheduling([])
      for (const name of ["report", "other", "member"]) yield* untilTicks(name, 1)
      yield* assertRows(
        `select distinct metadata->>'schedule' as name, kind, queue, priority::int, max_attempts::int, timeout_ms::int, payload::text,
          metadata->>'by' as by from pgqueue.job order by 1`,
        [
          {
            name: "member",
            kind: "reports:daily",
            queue: "default",
            priority: 5,
            max_attempts: 5,
            timeout_ms: null,
            payload: `{"days":5}`,
            by: null
          },
          {
            name: "other",
            kind: "report",
            queue: "own",
            priority: 0,
            max_attempts: 2,
            timeout_ms: 1500,
            payload: `{"days":4,"title":"x"}`,
            by: null
          },
          {
            name: "report",
            kind: "report",
            queue: "reports",
            priority: 8,
            max_attempts: 7,
            timeout_ms: 90_000,
            payload: `{"days":3,"title":"none"}`,
            by: "me"
          }
        ]
      )
    })))

  it.live("makes up what was missed in three hours: nothing, the latest, the latest ten in their order", () =>
    withQueue(Effect.gen(function*() {
      const policies = { skip: "skip", latest: "latest", ten: { all: 10 }, short: { all: 10 } } as const
      for (const [name, missed] of Object.entries(policies)) {
        yield* CronScheduler.schedule(CronScheduler.make(name, {
          cron: "* * * * *",
          job: Tick,
          missed,
          missedWindow: name === "short" ? "130 seconds" : undefined
        }))
        yield* overdue(name, "3 hours")
      }
      // Ticks are counted from the minute it is now, and that is not about to be over.
      yield* untilValue("select extract(second from clock_timestamp()) < 50", true)
      const [{ begun }] = (yield* rows<{ begun: number }>(
        "select floor(extract(epoch from clock_timestamp()) / 60)::int as begun"
      )) as [{ begun: number }]
      yield* scheduling([])
      for (const name of Object.keys(policies)) {
        yield* untilValue("select (next_at > clock_timestamp()) from pgqueue.schedule where name = $1", true, {
          params: [name]
        })
      }
      const ticks = (name: string) =>
        Effect.map(
          rows<{ minute: number }>(
            `select (extract(epoch from scheduled_for) / 60)::int as minute from pgqueue.job where metadata->>'schedule' = $1 order by id`,
            [name]
          ),
          (found) => found.map(({ minute }) => minute - begun)
        )
      const last = (count: number) => Array.from({ length: count }, (_, n) => n - count + 1)
      assert.deepStrictEqual(yield* ticks("skip"), [])
      assert.deepStrictEqual(yield* ticks("latest"), last(1))
      assert.deepStrictEqual(yield* ticks("ten"), last(10))
      assert.includeDeepMembers([last(2), last(3)], [yield* ticks("short")])
    })))

  it.live("makes up very much in statements that are no larger for it", () =>
    withQueue(Effect.gen(function*() {
      yield* Effect.forEach(
        Array.from({ length: 8 }, (_, n) => n),
        (n) => CronScheduler.schedule(everySecond(`s${n}`, { missed: { all: 1000 } }))
      )
      yield* rows("update pgqueue.schedule set next_at = next_at - interval '1 hour'")
      yield* scheduling([])
      yield* untilValue("select count(*) >= 8000 from pgqueue.job", true)
      // Those of one transaction have the same xmin.
      assert.isAtMost(
        yield* value("select max(count)::int from (select count(*) from pgqueue.job group by xmin::text) t"),
        3000
      )
      yield* allInPlace
    })))

  it.live("sees what others schedule, whatever code they have", () =>
    withQueue(Effect.gen(function*() {
      yield* scheduling([everySecond("first")])
      const second = yield* Scope.make()
      yield* Scope.provide(scheduling([everySecond("second"), yearly("third")]), second)
      assert.deepStrictEqual((yield* CronScheduler.list).map(({ name }) => name), ["first", "second", "third"])
      yield* untilTicks("second", 1)
      // Whoever declared it is gone.
      yield* Scope.close(second, Exit.void)
      yield* untilTicks("second", (yield* countOf("second")) + 2)
      const all = yield* rows<{ twice: number }>(
        "select count(*)::int - count(distinct (metadata->>'schedule', scheduled_for))::int as twice from pgqueue.job"
      )
      assert.deepStrictEqual(all, [{ twice: 0 }])
    })))

  it.live("works by polling where nobody can LISTEN", () =>
    withPolling(Effect.gen(function*() {
      yield* scheduling([everySecond("often")], {}, pollingQueueLayer() as never)
      yield* untilTicks("often", 4)
      assert.isBelow(Math.max(...(yield* lateness("often"))), 3000)
      yield* CronScheduler.trigger("often")
      yield* CronScheduler.pause("often")
    })))

  it.live("goes on after every session was terminated, and loses no tick", () =>
    withQueue(Effect.gen(function*() {
      yield* scheduling([everySecond("often")], {}, queueLayer({ pool: { applicationName: "scheduler" } }))
      for (let n = 1; n <= 5; n++) {
        yield* untilTicks("often", n)
        yield* rows("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'scheduler'")
      }
      yield* untilTicks("often", 7)
      yield* assertRows(
        "select count(*)::int = extract(epoch from max(scheduled_for) - min(scheduled_for))::int + 1 as complete from pgqueue.job",
        [{ complete: true }]
      )
    })))

  it.live("ends at once, also when the database does not answer", () =>
    withQueue(Effect.gen(function*() {
      const link = yield* makeLink(yield* databaseUrl)
      const queue = yield* Layer.build(Layer.fresh(Layer.provideMerge(
        JobQueue.layer(),
        PgClient.layer({ url: Redacted.make(link.url), maxConnections: 3 })
      )))
      for (const text of ["as unset", "for update skip locked"]) {
        const scope = yield* Scope.make()
        const dead = link.dead()
        link.loseRequestWith(text)
        yield* Scope.provide(scheduling([everySecond("often")], {}, Layer.succeedContext(queue) as never), scope)
        yield* until("it asks in vain", Effect.sync(() => link.dead() > dead))
        const begun = yield* now
        yield* Scope.close(scope, Exit.void)
        assert.isBelow((yield* now) - begun, 3000)
      }
    })))

  it.live("is on time while it makes up tens of thousands of missed ticks, and lets others run", () =>
    withQueue(Effect.gen(function*() {
      yield* rows(
        `insert into pgqueue.schedule (name, spec, time_zone, kind, next_at, missed)
         select 'late ' || n, '* * * * *', 'Europe/Berlin', 'k', date_trunc('minute', clock_timestamp() - interval '2 days'), 500
         from generate_series(1, 40) n`
      )
      // For as long as this process computed: a machine that gives it no time is not what is looked for.
      let stoodStill = 0
      yield* Effect.forkScoped(Effect.forever(Effect.gen(function*() {
        const begun = yield* now
        const computed = process.cpuUsage()
        yield* Effect.sleep(20)
        const { system, user } = process.cpuUsage(computed)
        stoodStill = Math.max(stoodStill, Math.min((yield* now) - begun - 20, (system + user) / 1000))
      })))
      yield* scheduling([everySecond("free")])
      yield* untilTicks("free", 4)
      assert.isBelow(Math.max(...(yield* lateness("free"))), 4000)
      yield* untilValue("select count(*)::int from pgqueue.job where kind = 'k'", 20_000, {
        // Counting is work too: looked at without a pause, it took most of the server from what it waits for.
        every: 500,
        within: 50_000
      })
      assert.isBelow(stoodStill, 1000)
    })))
})

// Together: they wait for others to let go.
describe.concurrent("a scheduler, while somebody holds what it needs,", () => {
  it.live("is on time with the others while a stranger has a schedule locked, and does not ask all the time", () =>
    withQueue(Effect.gen(function*() {
      const proxy = yield* makeProxy(yield* databaseUrl)
      const queue = Layer.provideMerge(JobQueue.layer(), PgClient.layer({ url: Redacted.make(proxy.url) }))
      yield* scheduling([everySecond("locked"), everySecond("free")], {}, queue as never)
      yield* untilTicks("free", 1)
      const leave = yield* stranger("select 1 from pgqueue.schedule where name = 'locked' for update")
      const before = yield* countOf("locked")
      const free = yield* countOf("free")
      const [begun, requests] = [yield* now, proxy.requests()]
      yield* untilTicks("free", free + 4)
      const perSecond = (proxy.requests() - requests) / ((yield* now) - begun) * 1000
      assert.isBelow(perSecond, 150)
      assert.isAtMost(yield* countOf("locked"), before + 1)
      yield* leave
      yield* untilTicks("locked", before + 4)
      yield* assertRows(
        `select distinct count(*)::int = extract(epoch from max(scheduled_for) - min(scheduled_for))::int + 1 as complete
         from pgqueue.job group by metadata->>'schedule'`,
        [{ complete: true }]
      )
      // On time, and not by looking again and again for the one that is locked.
      assert.isBelow(quantile(yield* lateness("free"), 0.5), 300)
    })))

  it.live("is on time with other keys while a stranger's transaction has taken hundreds", () =>
    withQueue(Effect.gen(function*() {
      const Free = Job.make("free", { unique: () => ({ key: "free", period: "1 millis" }) })
      yield* scheduling([CronScheduler.make("free", { every: "1 second", job: Free })])
      yield* untilTicks("free", 1)
      const leave = yield* stranger(
        `insert into pgqueue.unique_key (key, job, until)
         select pgqueue.hash_key('k', n::text), gen_random_uuid(), 'finished' from generate_series(1, 300) n`
      )
      // All of them at a time at which the free one is due, too.
      yield* rows(
        `insert into pgqueue.schedule (name, spec, time_zone, kind, unique_key, next_at)
         select 'taken ' || n, '@hourly', 'UTC', 'k', pgqueue.hash_key('k', n::text), date_trunc('second', clock_timestamp()) + interval '2 seconds'
         from generate_series(1, 300) n`
      )
      yield* untilTicks("free", (yield* countOf("free")) + 12)
      assert.isBelow(Math.max(...(yield* lateness("free"))), 10_000)
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.job where kind = 'k'"), 0)
      yield* leave
      yield* untilValue("select count(*)::int from pgqueue.job where kind = 'k'", 300)
    })))

  it.live("that starts while a stranger has a schedule locked that is to be written fires and writes the others", () =>
    withQueue(Effect.gen(function*() {
      yield* CronScheduler.schedule(everySecond("locked"))
      yield* CronScheduler.schedule(everySecond("old"))
      const leave = yield* stranger("select 1 from pgqueue.schedule where name = 'locked' for update")
      yield* Effect.forkScoped(
        scheduling([everySecond("locked", { priority: "high" }), everySecond("new"), everySecond("newer")])
      )
      yield* untilTicks("old", 4)
      yield* untilTicks("new", 1)
      yield* untilTicks("newer", 1)
      assert.isBelow(Math.max(...(yield* lateness("old"))), 4000)
      yield* leave
      yield* untilValue("select count(*)::int > 0 from pgqueue.job where priority = 2", true)
    })))

  it.live("is on time while a process is frozen that has written the schedules and not committed", () =>
    withQueue(Effect.gen(function*() {
      const link = yield* makeLink(yield* databaseUrl)
      const queue = Layer.provideMerge(JobQueue.layer(), PgClient.layer({ url: Redacted.make(link.url) }))
      const names = Array.from({ length: 5 }, (_, n) => `s${n}`)
      yield* scheduling(names.map((name) => everySecond(name)))
      yield* untilTicks("s0", 1)
      const frozen = yield* Deferred.make<void>()
      link.strike({ text: "written as (", at: "sent" }, () => Deferred.doneUnsafe(frozen, Effect.void))
      yield* Effect.forkScoped(
        scheduling(names.map((name) => everySecond(name, { priority: "high" })), {}, queue as never)
      )
      yield* Deferred.await(frozen)
      yield* untilTicks("s0", 8)
      assert.isBelow(Math.max(...(yield* lateness("s0"))), 5000)
    })))

  it.live("is on time while a process is frozen that fires without a PgClient and has not committed", () =>
    withQueue(Effect.gen(function*() {
      const link = yield* makeLink(yield* databaseUrl)
      const through = Layer.succeed(TestDatabase, { name: "through the link", url: Redacted.make(link.url) })
      yield* scheduling([everySecond("s0")])
      yield* untilTicks("s0", 1)
      const frozen = yield* Deferred.make<void>()
      link.strike({ text: statements.tick, at: "sent", nth: 2 }, () => Deferred.doneUnsafe(frozen, Effect.void))
      yield* scheduling([], { pollInterval: 10 }, Layer.provide(pollingQueueLayer(), through) as never)
      yield* Deferred.await(frozen)
      // A tick waits for the server to end that transaction at worst, and is the late one of these.
      yield* untilTicks("s0", (yield* countOf("s0")) + 4)
      assert.isBelow(Math.max(...(yield* lateness("s0"))), 8000)
    })))

  it.live("is on time with the others while a stranger's transaction has taken the key of one", () =>
    withQueue(Effect.gen(function*() {
      yield* Effect.forEach(
        Array.from({ length: 40 }, (_, n) => n),
        (n) =>
          CronScheduler.schedule(CronScheduler.make(`keyed ${n}`, {
            every: "1 second",
            job: Job.make(`keyed ${n}`, { unique: () => "only one" })
          }))
      )
      yield* scheduling([everySecond("free")])
      yield* untilTicks("keyed 20", 1)
      yield* untilTicks("free", 1)
      const leave = yield* rows(
        "with k as (delete from pgqueue.unique_key), r as (delete from pgqueue.ready) delete from pgqueue.job"
      ).pipe(
        Effect.andThen(stranger(
          `insert into pgqueue.unique_key (key, job, until)
           select pgqueue.hash_key('keyed ' || n, 'only one'), gen_random_uuid(), 'finished' from generate_series(0, 39, 13) n`
        )),
        // A tick between the two has them first.
        Effect.retry({ times: 10 })
      )
      yield* untilTicks("free", 6)
      assert.isBelow(Math.max(...(yield* lateness("free"))), 3000)
      yield* leave
      yield* untilTicks("keyed 0", 1)
      yield* allInPlaceButKeys
    })))
})

describe.concurrent("a row that is invalid", () => {
  it.live("stops alone, with a problem that is seen, and goes on when it is mended and resumed", () =>
    withQueue(Effect.gen(function*() {
      const { layer, logged } = listening()
      yield* Effect.provide(scheduling([everySecond("good")]), layer)
      yield* rows(
        `insert into pgqueue.schedule (name, spec, time_zone, kind, next_at, previous_at, jitter_ms, waiting, updated_at) values
          ('bad spec', 'every day', 'UTC', 'tick', null, null, 0, '{}', clock_timestamp()),
          ('bad zone', '* * * * *', 'Europe/Nowhere', 'tick', clock_timestamp(), null, 0, '{}', clock_timestamp()),
          ('bad jitter', '* * * * *', 'UTC', 'tick', clock_timestamp(), null, 9000000000000000000, '{}', clock_timestamp()),
          ('bad past', '* * * * *', 'UTC', 'tick', null, 'infinity', 0, '{}', clock_timestamp()),
          ('bad waiting', '* * * * *', 'UTC', 'tick', clock_timestamp() + interval '1 hour', null, 0, array[null::timestamptz], clock_timestamp()),
          ('good too', '* * * * *', 'UTC', 'tick', clock_timestamp(), null, 0, '{}', 'infinity')`
      )
      const bad = ["bad jitter", "bad past", "bad spec", "bad waiting", "bad zone"]
      yield* until(
        "all of them have stopped",
        Effect.map(
          CronScheduler.list,
          (all) => all.filter(({ problem }) => Option.isSome(problem)).length === bad.length
        )
      )
      yield* untilTicks("good", (yield* countOf("good")) + 3)
      const all = yield* CronScheduler.list
      assert.deepStrictEqual(all.filter(({ problem }) => Option.isSome(problem)).map(({ name }) => name), bad)
      assert.isTrue(all.every(({ next, problem }) => Option.isSome(next) !== Option.isSome(problem)))
      for (const name of bad) {
        assert.strictEqual(
          logged.filter((line) => line.startsWith("Error") && line.includes(`"${name}"`)).length,
          1,
          logged.join("\n")
        )
      }
      assert.isBelow(Math.max(...(yield* lateness("good"))), 3000)
      assert.strictEqual(yield* countOf("good too"), 0)
      // More than one when a minute has begun meanwhile.
      yield* untilValue(
        "select count(*) > 0 from pgqueue.job where kind = 'tick' and metadata->>'schedule' is null",
        true
      )

      // Still wrong, then right.
      yield* CronScheduler.resume("bad spec")
      assert.isTrue(Option.isSome((yield* info("bad spec")).problem))
      yield* rows("update pgqueue.schedule set spec = '@every 1s' where name = 'bad spec'")
      yield* CronScheduler.resume("bad spec")
      assert.isTrue(Option.isSome((yield* info("bad spec")).next))
      assert.isTrue(Option.isNone((yield* info("bad spec")).problem))
      yield* untilValue("select previous_at is not null from pgqueue.schedule where name = 'bad spec'", true)
    })))

  it.live("that somebody has locked holds up no other", () =>
    withQueue(Effect.gen(function*() {
      yield* CronScheduler.schedule(everySecond("bad"))
      yield* rows("update pgqueue.schedule set spec = 'every day'")
      const { layer, logged } = listening()
      const leave = yield* stranger("select 1 from pgqueue.schedule where name = 'bad' for update")
      yield* Effect.provide(scheduling([everySecond("good")]), layer)
      yield* untilTicks("good", 4)
      assert.isAtMost(logged.filter((line) => line.startsWith("Error")).length, 1)
      assert.isBelow(Math.max(...(yield* lateness("good"))), 3000)
      yield* leave
      yield* until("it has stopped", Effect.map(info("bad"), ({ problem }) => Option.isSome(problem)))
      yield* until("it is said once", Effect.sync(() => logged.filter((line) => line.startsWith("Error")).length === 1))
    })))
})

describe.concurrent("overlap", () => {
  /** Starts and ends by the database's clock, in milliseconds. */
  const working = Effect.fnUntraced(function*(millis: number) {
    yield* running(
      Worker.layer({ jobs: [Tick], concurrency: 5, pollInterval: "30 seconds" }).pipe(
        Layer.provide(Tick.toLayer(() =>
          Effect.gen(function*() {
            const { record } = yield* Ledger
            yield* record("start")
            yield* Effect.sleep(millis)
            yield* record("end")
          })
        )),
        Layer.provide(queueLayer())
      )
    )
  })
  const runs = rows<{ begin: number; end: number | null; tick: number }>(
    `select (extract(epoch from b.at) * 1000)::float8 as begin, (extract(epoch from e.at) * 1000)::float8 as end,
      extract(epoch from coalesce(j.scheduled_for, f.scheduled_for))::int as tick
     from ledger b left join ledger e on e.run = b.run and e.phase = 'end'
     left join pgqueue.job j on j.id = b.job left join pgqueue.finished f on f.id = b.job where b.phase = 'start' order by b.at`
  )
  const ended = (count: number) =>
    untilValue("select count(*) >= $1::int from ledger where phase = 'end'", true, { params: [count] })

  it.live("queue: one runs after the other, every tick in its turn, and at once when the one before has ended", () =>
    withQueue(Effect.gen(function*() {
      yield* working(1300)
      yield* scheduling([everySecond("often", { overlap: "queue" })])
      yield* ended(6)
      yield* CronScheduler.pause("often")
      const all = (yield* runs).filter(({ end }) => end !== null)
      all.slice(1).forEach(({ begin, tick }, n) => {
        const gap = begin - all[n]!.end!
        assert.isAtLeast(gap, 0)
        assert.isBelow(gap, 2500)
        assert.strictEqual(tick, all[n]!.tick + 1)
      })
      assert.isAbove((yield* info("often")).waiting, 0)
    })))

  it.live("skip: no tick while the one before runs", () =>
    withQueue(Effect.gen(function*() {
      yield* working(1500)
      yield* scheduling([everySecond("often", { overlap: "skip" })])
      yield* ended(3)
      const all = yield* runs
      all.slice(1).forEach(({ begin, tick }, n) => {
        assert.isAtLeast(begin - all[n]!.end!, 0)
        assert.isAbove(tick, all[n]!.tick)
      })
      // One may follow the other where the scheduler came late to it, not all.
      assert.isAbove(all.at(-1)!.tick - all[0]!.tick, all.length - 1)
      assert.strictEqual((yield* info("often")).waiting, 0)
    })))

  it.live("allow: they run beside each other", () =>
    withQueue(Effect.gen(function*() {
      yield* working(5000)
      yield* scheduling([everySecond("often")])
      yield* ended(2)
      const all = yield* runs
      assert.isBelow(all[1]!.begin, all[0]!.end!)
    })))

  it.live("queue: a tick whose turn it is finds a key free whose period is over", () =>
    withQueue(Effect.gen(function*() {
      class Brief extends Job.make("brief", { unique: () => ({ key: "brief", period: "1 hour" }) }) {}
      yield* CronScheduler.schedule(CronScheduler.make("brief", { every: "1 hour", job: Brief, overlap: "queue" }))
      yield* rows(
        `update pgqueue.schedule set waiting = array[date_trunc('hour', clock_timestamp()) - interval '5 hours']`
      )
      yield* rows(
        `insert into pgqueue.unique_key (key, job, until, expires_at)
         values (pgqueue.hash_key('brief', 'brief'), gen_random_uuid(), 'finished', clock_timestamp() - interval '1 second')`
      )
      yield* scheduling([])
      yield* untilValue("select cardinality(waiting) from pgqueue.schedule", 0)
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.job where kind = 'brief'"), 1)
    })))
})

describe.concurrent("people", () => {
  it.live("see a schedule as it is", () =>
    withQueue(Effect.gen(function*() {
      yield* CronScheduler.schedule(CronScheduler.make("report", {
        cron: "0 3 * * *",
        timeZone: "Europe/Berlin",
        job: Report,
        payload: { days: 1 },
        missed: { all: 3 },
        missedWindow: "2 hours",
        overlap: "skip",
        jitter: "5 seconds",
        version: 4,
        metadata: { by: "me" }
      }))
      const [one] = yield* CronScheduler.list
      assert.deepStrictEqual({ ...one!, next: Option.isSome(one!.next) }, {
        name: "report",
        cron: "0 3 * * *",
        timeZone: "Europe/Berlin",
        kind: "report",
        queue: "reports",
        priority: 8,
        maxAttempts: 7,
        timeout: Option.some(Duration.seconds(90)),
        payload: { days: 1, title: "none" },
        metadata: { schedule: "report", by: "me" },
        missed: { all: 3 },
        missedWindow: Duration.hours(2),
        overlap: "skip",
        jitter: Duration.seconds(5),
        version: 4,
        next: true,
        previous: Option.none(),
        lastJob: Option.none(),
        waiting: 0,
        pausedAt: Option.none(),
        problem: Option.none(),
        declared: false,
        undeclaredAt: Option.none()
      })
    })))

  it.live("pause and resume: ticks meanwhile have no job, and are not made up", () =>
    withQueue(Effect.gen(function*() {
      yield* scheduling([everySecond("often", { missed: { all: 100 } }), everySecond("other")])
      yield* untilTicks("often", 2)
      yield* CronScheduler.pause("often")
      const count = yield* countOf("often")
      const other = yield* countOf("other")
      assert.isTrue(Option.isSome((yield* info("often")).pausedAt))
      assert.isTrue(Option.isNone((yield* info("often")).next))
      yield* untilTicks("other", other + 3)
      assert.strictEqual(yield* countOf("often"), count)
      // Also over a deploy.
      yield* scheduling([everySecond("often", { missed: { all: 100 }, priority: 1 })])
      assert.isTrue(Option.isSome((yield* info("often")).pausedAt))
      const resumed = yield* value<string>("select clock_timestamp()::text")
      yield* CronScheduler.resume("often")
      yield* untilTicks("often", count + 2)
      assert.strictEqual(
        yield* value(
          `select count(*)::int from pgqueue.job where metadata->>'schedule' = 'often' and enqueued_at > $1::timestamptz
           and scheduled_for <= $1::timestamptz`,
          [resumed]
        ),
        0
      )
    })))

  it.live("trigger an extra job, also of a paused schedule, once for a key", () =>
    withQueue(Effect.gen(function*() {
      yield* CronScheduler.schedule(yearly("rare"))
      yield* CronScheduler.schedule(CronScheduler.make("once", { cron: "@hourly", job: Once }))
      yield* CronScheduler.pause("rare")
      const first = yield* CronScheduler.trigger("rare")
      assert.strictEqual(first.status, "inserted")
      assert.notStrictEqual((yield* CronScheduler.trigger("rare")).id, first.id)
      assert.strictEqual(
        yield* value<boolean>(
          "select clock_timestamp() - scheduled_for < interval '5 seconds' from pgqueue.job where id = $1::uuid",
          [first.id]
        ),
        true
      )
      const keyed = yield* CronScheduler.trigger("once")
      assert.deepStrictEqual(yield* CronScheduler.trigger("once"), { id: keyed.id, status: "existing" })
      yield* allInPlace
    })))

  it.live("remove a schedule; its jobs stay", () =>
    withQueue(Effect.gen(function*() {
      yield* CronScheduler.schedule(yearly("rare"))
      yield* CronScheduler.trigger("rare")
      yield* CronScheduler.remove("rare")
      assert.deepStrictEqual(yield* CronScheduler.list, [])
      assert.strictEqual(yield* countOf("rare"), 1)
    })))

  it.live("backfill a span: each tick once, in order, and not what is to come", () =>
    withQueue(Effect.gen(function*() {
      const at = (text: string) => DateTime.makeUnsafe(`2026-01-${text}Z`)
      yield* CronScheduler.schedule(CronScheduler.make("daily", { cron: "0 3 * * *", job: Tick }))
      yield* CronScheduler.schedule(CronScheduler.make("queued", { cron: "0 3 * * *", job: Tick, overlap: "queue" }))
      const january = { from: at("01T03:00:00"), to: at("10T03:00:00") }
      assert.deepStrictEqual(yield* CronScheduler.backfill("daily", january), { ticks: 9, enqueued: 9, waiting: 0 })
      assert.deepStrictEqual(yield* CronScheduler.backfill("daily", january), { ticks: 9, enqueued: 0, waiting: 0 })
      assert.deepStrictEqual(
        yield* CronScheduler.backfill("daily", {
          from: DateTime.makeUnsafe(at("10T03:00:00")),
          to: at("11T03:00:00.001")
        }),
        { ticks: 2, enqueued: 2, waiting: 0 }
      )
      assert.deepStrictEqual(yield* CronScheduler.backfill("queued", january), { ticks: 9, enqueued: 1, waiting: 8 })
      yield* assertRows(
        `select to_char(scheduled_for at time zone 'UTC', 'DD HH24') as at from pgqueue.job where metadata->>'schedule' = 'daily' order by id`,
        Array.from({ length: 11 }, (_, n) => ({ at: `${String(n + 1).padStart(2, "0")} 03` }))
      )
      const empty = { from: at("01T03:00:00"), to: at("01T03:00:00") }
      assert.deepStrictEqual(yield* CronScheduler.backfill("daily", empty), { ticks: 0, enqueued: 0, waiting: 0 })
      const future = { from: DateTime.makeUnsafe("2190-01-01"), to: DateTime.makeUnsafe("2191-01-01") }
      assert.deepStrictEqual(yield* CronScheduler.backfill("daily", future), { ticks: 0, enqueued: 0, waiting: 0 })
      yield* CronScheduler.schedule(CronScheduler.make("minutely", { cron: "* * * * *", job: Tick }))
      for (
        const [name, span] of [
          ["daily", { from: at("02T00:00:00"), to: at("01T00:00:00") }],
          ["daily", { from: noDate, to: at("01T00:00:00") }],
          ["minutely", { from: at("01T00:00:00"), to: DateTime.makeUnsafe("2026-02-01") }]
        ] as const
      ) {
        const error = yield* Effect.flip(CronScheduler.backfill(name, span))
        assert.strictEqual(error._tag, "EnqueueError")
      }
      assert.strictEqual(yield* countOf("minutely"), 0)
    })))

  it.live("are refused in a transaction of another client, which would not undo it", () =>
    withQueue(Effect.gen(function*() {
      yield* CronScheduler.schedule(everySecond("s"))
      const other = Context.get(yield* Layer.build(Layer.fresh(clientLayer())), SqlClient.SqlClient)
      const span = { from: DateTime.makeUnsafe(0), to: DateTime.makeUnsafe(1) }
      const acts: ReadonlyArray<Effect.Effect<unknown, { readonly _tag: string }, JobQueue>> = [
        CronScheduler.schedule(everySecond("t")),
        CronScheduler.pause("s"),
        CronScheduler.resume("s"),
        CronScheduler.remove("s"),
        CronScheduler.trigger("s"),
        CronScheduler.backfill("s", span)
      ]
      for (const act of acts) {
        assert.propertyVal(yield* Effect.flip(other.withTransaction(act)), "reason", "ForeignTransaction")
      }
      assert.strictEqual((yield* other.withTransaction(CronScheduler.list)).length, 1)
    })))

  it.live("are told when there is no such schedule", () =>
    withQueue(Effect.gen(function*() {
      const span = { from: DateTime.makeUnsafe(0), to: DateTime.makeUnsafe(1) }
      const acts: ReadonlyArray<Effect.Effect<unknown, { readonly _tag: string; readonly name: string }, JobQueue>> = [
        CronScheduler.pause("nobody"),
        CronScheduler.resume("nobody"),
        CronScheduler.remove("nobody"),
        CronScheduler.trigger("nobody"),
        CronScheduler.backfill("nobody", span)
      ]
      for (const act of acts) {
        const error = yield* Effect.flip(act)
        assert.deepInclude(error, { _tag: "NoSuchSchedule", name: "nobody" })
      }
    })))

  it.live("take part in a transaction: all of it or nothing, and workers hear of it after the commit", () =>
    withQueue(Effect.gen(function*() {
      const sql = yield* SqlClient.SqlClient
      yield* CronScheduler.schedule(yearly("old"))
      const all = Effect.gen(function*() {
        yield* CronScheduler.schedule(yearly("new"))
        yield* CronScheduler.trigger("new")
        yield* CronScheduler.pause("old")
        yield* CronScheduler.backfill("old", {
          from: DateTime.makeUnsafe("2020-06-01"),
          to: DateTime.makeUnsafe("2022-06-01")
        })
        assert.strictEqual((yield* CronScheduler.list).length, 2)
      })
      yield* Effect.exit(sql.withTransaction(Effect.andThen(all, Effect.fail("back"))))
      assert.deepStrictEqual((yield* CronScheduler.list).map(({ name }) => name), ["old"])
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.job"), 0)
      yield* sql.withTransaction(all)
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.job"), 3)
      assert.isTrue(Option.isSome((yield* info("old")).pausedAt))
      yield* allInPlace
    })))
})

describe("what is wrong with a schedule", () => {
  const make = CronScheduler.make as (name: unknown, options: object) => CronScheduler.Entry<never>
  const good = { cron: "* * * * *", job: Tick }
  const bad = [
    ["no name", make("", good)],
    ["a long name", make("x".repeat(201), good)],
    ["a name with a control character", make("a\nb", good)],
    ["a name that is none", make(5, good)],
    ["an expression", make("n", { ...good, cron: "every day" })],
    ["a time zone", make("n", { ...good, timeZone: "Europe/Nowhere" })],
    ["a family", make("n", { ...good, job: Reports })],
    ["what is made up", make("n", { ...good, missed: "some" })],
    ["how many are made up", make("n", { ...good, missed: { all: 0 } })],
    ["too many that are made up", make("n", { ...good, missed: { all: 1001 } })],
    ["a part of one that is made up", make("n", { ...good, missed: { all: 1.5 } })],
    ["the window", make("n", { ...good, missedWindow: -1 })],
    ["the window's words", make("n", { ...good, missedWindow: "soon" })],
    ["overlap", make("n", { ...good, overlap: "maybe" })],
    ["jitter", make("n", { ...good, jitter: -1 })],
    ["jitter without end", make("n", { ...good, jitter: Infinity })],
    ["jitter that is no number", make("n", { ...good, jitter: NaN })],
    ["version", make("n", { ...good, version: 1.5 })],
    ["a large version", make("n", { ...good, version: 2 ** 31 })],
    ["priority", make("n", { ...good, priority: 10 })],
    ["queue", make("n", { ...good, queue: "" })],
    ["attempts", make("n", { ...good, maxAttempts: 0 })],
    ["timeout", make("n", { ...good, timeout: -5 })],
    ["metadata", make("n", { ...good, metadata: { a: 5 } })],
    ["large metadata", make("n", { ...good, metadata: { a: "x".repeat(70_000) } })],
    ["the payload", make("n", { ...good, job: Report, payload: { days: "x" } })]
  ] as const

  it.live("is said, whatever it is, and nothing is written", () =>
    withQueue(Effect.gen(function*() {
      for (const [what, entry] of bad) {
        const uses: ReadonlyArray<Effect.Effect<unknown, unknown, JobQueue>> = [
          Effect.scoped(Layer.build(CronScheduler.layer([yearly("good"), entry]))),
          CronScheduler.schedule(entry)
        ]
        for (const use of uses) {
          const exit = yield* Effect.exit(use)
          assert.include(String(exit), "EnqueueError", what)
          assert.include(String(exit), `the schedule "${entry.name}": `, what)
        }
        assert.strictEqual(yield* value("select count(*)::int from pgqueue.schedule"), 0, what)
      }
    })))

  it.live("is said of a name that is declared twice, and of an interval", () =>
    withQueue(Effect.gen(function*() {
      const build = (entries: ReadonlyArray<CronScheduler.Entry<never>>, pollInterval?: number | string) =>
        Effect.flip(Effect.scoped(Layer.build(CronScheduler.layer(entries, { pollInterval: pollInterval as never }))))
      assert.strictEqual((yield* build([yearly("a"), yearly("a")]))._tag, "EnqueueError")
      for (const interval of [0, 9, 3_600_001, NaN, "soon"]) {
        assert.strictEqual((yield* build([], interval))._tag, "JobQueueError")
      }
    })))
})

describe.concurrent("code and rows", () => {
  it.live("times that stay keep an overdue tick over a deploy; the higher version has its way", () =>
    withQueue(Effect.gen(function*() {
      const { layer, logged } = listening()
      const version = (version: number, payload: number) =>
        CronScheduler.make("report", { cron: "0 0 1 1 *", job: Report, payload: { days: payload }, version })
      yield* scheduling([version(1, 1)])
      yield* scheduling([version(2, 2)])
      yield* Effect.provide(scheduling([version(1, 1)]), layer)
      assert.deepInclude(yield* info("report"), { version: 2, payload: { days: 2, title: "none" } })
      assert.isTrue(logged.some((line) => line.startsWith("Warn") && line.includes("report are of a newer version")))
      yield* scheduling([version(2, 3)])
      assert.deepInclude(yield* info("report"), { version: 2, payload: { days: 3, title: "none" } })

      // A month was missed and nobody was there; the deploy that comes does not forget it.
      yield* CronScheduler.schedule(
        CronScheduler.make("monthly", { cron: "0 0 1 * *", job: Tick, missedWindow: "60 days" })
      )
      yield* rows(
        "update pgqueue.schedule set next_at = date_trunc('month', clock_timestamp() at time zone 'UTC') at time zone 'UTC' where name = 'monthly'"
      )
      yield* scheduling([
        CronScheduler.make("monthly", { cron: "0 0 1 * *", job: Tick, missedWindow: "60 days", priority: "high" })
      ])
      yield* untilTicks("monthly", 1)
    })))

  it.live("a schedule that nobody declares any more goes on and is marked, and no longer when it is declared again", () =>
    withQueue(Effect.gen(function*() {
      const scope = yield* Scope.make()
      yield* Scope.provide(scheduling([everySecond("gone"), everySecond("kept")]), scope)
      yield* Scope.close(scope, Exit.void)
      yield* scheduling([everySecond("kept")])
      yield* rows("update pgqueue.schedule set declared_at = declared_at - interval '1 hour' where name = 'gone'")
      const { store } = (yield* JobQueue).internal
      // A row that is being fired just now is left for the next time.
      const marked: Array<string> = []
      yield* until(
        "it is marked",
        Effect.map(store.schedules.undeclare(900_000), (names) => {
          marked.push(...names)
          return marked.length > 0
        })
      )
      assert.deepStrictEqual(marked, ["gone"])
      assert.isTrue(Option.isSome((yield* info("gone")).undeclaredAt))
      assert.isTrue(Option.isNone((yield* info("kept")).undeclaredAt))
      yield* untilTicks("gone", (yield* countOf("gone")) + 2)
      yield* scheduling([everySecond("gone")])
      yield* until("it is declared", Effect.map(info("gone"), ({ undeclaredAt }) => Option.isNone(undeclaredAt)))
    })))
})
