/** Maintenance: what the processes agree on, whose turn it is, and what happens when the database's clock is moved. */
import { assert, describe, it } from "@effect/vitest"
import { Deferred, Effect, Exit, Fiber, Layer, Logger, Metric, Redacted, Scope, Tracer } from "effect"
import { Job, JobQueueError, Maintenance, Telemetry, Worker } from "../src/index.ts"
import { moveClock, withClock } from "./support/clock.ts"
import { TestDatabase } from "./support/database.ts"
import { makeLink } from "./support/link.ts"
import {
  allInPlace,
  assertRows,
  databaseUrl,
  pollingQueueLayer,
  queueLayer,
  rows,
  running,
  until,
  untilValue,
  value,
  withQueue
} from "./support/queue.ts"

class Note extends Job.make("note") {}
class Never extends Job.make("never", { queue: "never" }) {}

const NoteHandler = Note.toLayer(() => Effect.void)
const NeverHandler = Never.toLayer(() => Effect.never)

const hour = 3_600_000
const day = 24 * hour

/** Jobs that ended so long ago. */
const finished = (count: number, millis: number, status = "completed") =>
  rows(
    `insert into pgqueue.finished (id, kind, queue, priority, status, attempt, max_attempts, rescued, snoozed, metadata,
        enqueued_at, scheduled_for, finished_at, payload)
      select pgqueue.uuid_v7(), 'note', 'default', 5, $3::text, 1, 5, 0, 0, '{}', now(), now(),
        clock_timestamp() - $2::float8 * interval '1 millisecond', 'null' from generate_series(1, $1::int4)`,
    [count, millis, status]
  )
const left = "select count(*)::int from pgqueue.finished"
const archived = "select count(*)::int from pgqueue.archive"
const policy = (name = "cleanup") => value<unknown>("select value from pgqueue.setting where name = $1::text", [name])

/** Collects what is logged at a level. */
const collecting = (level: string) => {
  const logged: Array<string> = []
  return {
    logged,
    layer: Logger.layer([Logger.make(({ logLevel, message }) => {
      if (logLevel === level) logged.push(String(message))
    })])
  }
}

/** Collects the spans that begin. */
const tracing = () => {
  const spans: Array<Tracer.Span> = []
  return {
    spans,
    layer: Layer.succeed(
      Tracer.Tracer,
      Tracer.make({
        span: (options) => {
          const span = new Tracer.NativeSpan(options)
          spans.push(span)
          return span
        }
      })
    )
  }
}

describe("a maintenance layer", () => {
  it.live("cleans up in a process without a worker, by the defaults, and changes nothing that it does not name", () =>
    withQueue(Effect.gen(function*() {
      yield* finished(3, 2 * day)
      yield* finished(2, 2 * day, "discarded")
      yield* finished(2, 8 * day, "cancelled")
      yield* running(Maintenance.layer({ cleanup: { interval: 50 } }))
      yield* untilValue(left, 2)
      assert.deepStrictEqual(yield* policy(), { interval: 50 })
      assert.strictEqual(yield* value(archived), 0)
      yield* running(Maintenance.layer())
      assert.deepStrictEqual(yield* policy(), { interval: 50 })
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.setting"), 1)
    })))

  it.live("archives by its own retention for each status, and keeps for ever", () =>
    withQueue(Effect.gen(function*() {
      yield* running(
        Maintenance.layer({
          cleanup: {
            interval: 50,
            strategy: "archive",
            retention: { completed: "1 hour", cancelled: "Infinity", discarded: { days: 3 } }
          }
        })
      )
      assert.deepStrictEqual(yield* policy(), {
        interval: 50,
        strategy: "archive",
        retention: { completed: hour, cancelled: "Infinity", discarded: 3 * day }
      })
      yield* finished(3, 2 * hour)
      yield* finished(3, 1000 * day, "cancelled")
      yield* finished(3, 2 * day, "discarded")
      yield* finished(3, 4 * day, "discarded")
      yield* untilValue(archived, 6)
      yield* assertRows("select status, count(*)::int from pgqueue.finished group by status order by 1", [
        { status: "cancelled", count: 3 },
        { status: "discarded", count: 3 }
      ])
      yield* running(Maintenance.layer({ cleanup: { retention: { days: 2 } } }))
      assert.deepInclude(yield* policy(), {
        retention: { completed: 2 * day, cancelled: 2 * day, discarded: 2 * day }
      })
    })))

  it.live("removes expired keys and leaves the others", () =>
    withQueue(Effect.gen(function*() {
      yield* running(Maintenance.layer({ keys: { interval: 50 } }))
      yield* Note.enqueue(undefined, { unique: { key: "over", period: "1 hour" } })
      yield* Note.enqueue(undefined, { unique: { key: "running", period: "1 hour" } })
      yield* rows("update pgqueue.unique_key set expires_at = 'epoch' where key = pgqueue.hash_key('note', 'over')")
      yield* untilValue("select count(*)::int from pgqueue.unique_key", 1)
      yield* untilValue("select count(*)::int from pgqueue.unique_key where expires_at > clock_timestamp()", 1)
    })))

  it.live("refuses options that are out of range, and then says nothing", () =>
    withQueue(Effect.gen(function*() {
      const wrong: ReadonlyArray<Maintenance.Options> = [
        { cleanup: { interval: 0 } },
        { cleanup: { interval: "Infinity" } },
        { rescue: { interval: "2 days" } },
        { audit: { interval: -1 } },
        { keys: { interval: NaN } },
        { parking: { interval: "soon" as "1 second" } },
        { cleanup: { strategy: "keep" as "delete" } },
        { cleanup: { retention: "-1 days" } },
        { cleanup: { retention: 0 } },
        { cleanup: { retention: "a day" as "1 day" } },
        { cleanup: { retention: { complete: "1 day" } as Maintenance.Retention } },
        { cleanup: { retention: { completed: "1 day", minutes: 3 } } },
        { cleanup: { strategy: "archive", retention: { completed: "1 day", discarded: NaN } } }
      ]
      for (const options of wrong) {
        const error = yield* Effect.flip(Effect.scoped(Layer.build(Maintenance.layer(options)))).pipe(
          Effect.tapCause(() => Effect.die(new Error(JSON.stringify(options))))
        )
        assert.instanceOf(error, JobQueueError, JSON.stringify(options))
        assert.deepInclude(error, { reason: "InvalidOption" })
      }
      yield* assertRows("select name, value from pgqueue.setting", [{ name: "cleanup", value: {} }])
    })))

  it.live("waits for a database that does not store for a while what it says", () =>
    withQueue(Effect.gen(function*() {
      const { layer, logged } = collecting("Warn")
      yield* rows(`create function public.refuse() returns trigger language plpgsql as
        $$ begin raise 'the database system is starting up' using errcode = '57P03'; end $$`)
      yield* rows(
        "create trigger refuse before insert or update on pgqueue.setting for each row execute function public.refuse()"
      )
      const built = yield* Effect.forkScoped(
        running(Maintenance.layer({ cleanup: { strategy: "archive" } })).pipe(Effect.provide(layer))
      )
      yield* until("it is said", Effect.sync(() => logged.length > 0))
      assert.match(logged.join(), /the maintenance policy does not go through/)
      yield* rows("drop function public.refuse cascade")
      yield* Fiber.join(built)
      assert.deepStrictEqual(yield* policy(), { strategy: "archive" })
      assert.strictEqual(logged.length, 1)
    })))

  it.live("fails when trying again does not mend it, and says what it was", () =>
    withQueue(Effect.gen(function*() {
      const { layer, logged } = collecting("Warn")
      yield* rows("alter table pgqueue.setting rename to hidden")
      const error = yield* Effect.flip(
        Effect.scoped(Layer.build(Maintenance.layer({ cleanup: { strategy: "archive" } }))).pipe(Effect.provide(layer))
      )
      assert.strictEqual(error._tag, "SqlError")
      assert.match(logged.join(), /the maintenance policy does not go through/)
      yield* rows("alter table pgqueue.hidden rename to setting")
    })))
})

describe("what several processes say", () => {
  it.live("stays said: a hundred rounds beside one with defaults delete nothing that another has told to archive", () =>
    withQueue(Effect.gen(function*() {
      const each = { interval: 10 }
      yield* running(
        Maintenance.layer({ cleanup: { ...each, retention: "1 hour", strategy: "archive" } }).pipe(
          Layer.provide(queueLayer())
        )
      )
      // A worker without any settings, and layers that come and go.
      yield* running(
        Worker.layer({ jobs: [Note], heartbeat: 20, lease: 60, rescueInterval: 20 }).pipe(
          Layer.provide(NoteHandler),
          Layer.provide(queueLayer())
        )
      )
      yield* running(Maintenance.layer({ cleanup: { retention: { discarded: "2 hours" } } }))
      const runs = Metric.withAttributes(Telemetry.taskRuns, { task: "cleanup" })
      const before = Number((yield* Metric.value(runs)).count)
      let jobs = 0
      for (let round = 0; round < 100; round++) {
        const scope = yield* Scope.make()
        yield* Layer.buildWithScope(
          Layer.fresh(round % 2 === 0 ? Maintenance.layer() : Maintenance.layer({ cleanup: each })),
          scope
        )
        yield* finished(5, 2 * day)
        jobs += 5
        yield* untilValue(left, 0, { every: 2 })
        yield* Scope.close(scope, Exit.void)
      }
      assert.strictEqual(yield* value(archived), jobs)
      assert.isAtLeast(Number((yield* Metric.value(runs)).count) - before, 100)
      assert.deepStrictEqual(yield* policy(), {
        ...each,
        strategy: "archive",
        retention: { completed: hour, cancelled: hour, discarded: 2 * hour }
      })
    })))

  it.live("contradicts: the last one has said it, for each option by itself", () =>
    withQueue(Effect.gen(function*() {
      yield* running(Maintenance.layer({ cleanup: { strategy: "archive", retention: { completed: 1000 } } }))
      yield* running(Maintenance.layer({ cleanup: { strategy: "delete", retention: { cancelled: 2000 } } }))
      yield* running(Maintenance.layer({ cleanup: { retention: { completed: 3000 } }, rescue: { interval: 77 } }))
      assert.deepStrictEqual(yield* policy(), { strategy: "delete", retention: { completed: 3000, cancelled: 2000 } })
      assert.deepStrictEqual(yield* policy("rescue"), { interval: 77 })
    })))
})

describe("the tasks", () => {
  it.live("are done once an interval by eight processes", () =>
    withQueue(Effect.gen(function*() {
      const runs = Metric.withAttributes(Telemetry.taskRuns, { task: "cleanup" })
      yield* rows("create table public.turn (at timestamptz not null)")
      yield* rows(`create function public.note_turn() returns trigger language plpgsql as
        $$ begin
          -- Not a turn that is kept by one that takes long.
          if new.name = 'cleanup' and current_query() like '%taken as (%' then insert into public.turn values (new.ran_at); end if;
          return new;
        end $$`)
      yield* rows(
        "create trigger note_turn after insert or update on pgqueue.task for each row execute function public.note_turn()"
      )
      const before = Number((yield* Metric.value(runs)).count)
      for (let n = 0; n < 8; n++) {
        yield* running(Maintenance.layer({ cleanup: { interval: 200 } }).pipe(Layer.provide(queueLayer())))
      }
      yield* untilValue("select count(*)::int >= 15 from turn", true)
      yield* assertRows(
        `select * from (select extract(epoch from at - lag(at) over (order by at)) * 1000 as gap from turn) t where gap < 200`,
        []
      )
      assert.isAtLeast(Number((yield* Metric.value(runs)).count) - before, 14)
    })))

  it.live("are done by others while a process without a PgClient is frozen that has not committed its turn", () =>
    withQueue(Effect.gen(function*() {
      const link = yield* makeLink(yield* databaseUrl)
      const through = Layer.succeed(TestDatabase, { name: "through the link", url: Redacted.make(link.url) })
      const frozen = yield* Deferred.make<void>()
      link.strike(
        { text: "taken as (", param: "cleanup", at: "sent" },
        () => Deferred.doneUnsafe(frozen, Effect.void)
      )
      yield* running(
        Maintenance.layer({ cleanup: { interval: 50 } }).pipe(
          Layer.provide(pollingQueueLayer()),
          Layer.provide(through)
        )
      )
      yield* Deferred.await(frozen)
      yield* finished(3, 2 * day)
      yield* running(Maintenance.layer())
      yield* untilValue(left, 0, { within: 10_000 })
    })))

  it.live("that take longer than their interval are taken over by nobody", () =>
    withQueue(Effect.gen(function*() {
      const trace = tracing()
      yield* finished(500, 2 * day)
      // A batch and the rest after it take 4.5 s, longer than the interval.
      yield* rows(`create function public.slow() returns trigger language plpgsql as
        $$ begin perform pg_sleep(0.5); return null; end $$`)
      yield* rows(
        "create trigger slow after insert on pgqueue.archive for each statement execute function public.slow()"
      )
      for (let n = 0; n < 3; n++) {
        yield* running(
          Maintenance.layer({ cleanup: { interval: 3000, strategy: "archive" } }).pipe(
            Layer.provide(queueLayer()),
            Layer.provide(trace.layer)
          )
        )
      }
      yield* untilValue(left, 0)
      yield* until(
        "it has ended",
        Effect.sync(() => trace.spans.some((span) => Number(span.attributes.get("rows")) > 0))
      )
      assert.deepStrictEqual(
        trace.spans.flatMap((span) => span.name === "Maintenance.cleanup" ? [span.attributes.get("rows")] : []),
        [500]
      )
    })))

  it.live("fail apart, and have a span and metrics each", () =>
    withQueue(Effect.gen(function*() {
      const { layer, logged } = collecting("Warn")
      const trace = tracing()
      const of = Effect.fnUntraced(function*(task: string) {
        const one = (metric: Metric.Counter<number>) =>
          Effect.map(Metric.value(Metric.withAttributes(metric, { task })), ({ count }) => Number(count))
        const { count } = yield* Metric.value(Metric.withAttributes(Telemetry.taskDuration, { task }))
        return {
          runs: yield* one(Telemetry.taskRuns),
          failures: yield* one(Telemetry.taskFailures),
          rows: yield* one(Telemetry.taskRows),
          timed: count
        }
      })
      const before = { cleanup: yield* of("cleanup"), keys: yield* of("keys") }
      yield* finished(4, 2 * day)
      yield* finished(3, 8 * day, "discarded")
      // One status does not go through: not even its own task stops there.
      yield* rows(`create function public.refuse() returns trigger language plpgsql as
        $$ begin if new.status = 'completed' then raise 'no'; end if; return new; end $$`)
      yield* rows(
        "create trigger refuse before insert on pgqueue.archive for each row execute function public.refuse()"
      )
      yield* running(
        Maintenance.layer({ cleanup: { interval: 50, strategy: "archive" }, keys: { interval: 50 } }).pipe(
          Layer.provide([layer, trace.layer])
        )
      ).pipe(Effect.withSpan("the start of the process"))
      yield* untilValue(archived, 3)
      yield* Note.enqueue(undefined, { unique: { key: "over", period: "1 hour" } })
      yield* rows("update pgqueue.unique_key set expires_at = 'epoch'")
      yield* untilValue("select count(*)::int from pgqueue.unique_key", 0)
      yield* until(
        "it has failed twice",
        Effect.map(of("cleanup"), ({ failures }) => failures >= before.cleanup.failures + 2)
      )
      assert.strictEqual(yield* value(left), 4)
      assert.strictEqual(logged.filter((line) => line.includes("the cleanup of finished jobs does not go")).length, 1)
      yield* rows("drop function public.refuse cascade")
      yield* untilValue(left, 0)
      yield* until("it is counted", Effect.map(of("cleanup"), ({ rows }) => rows === before.cleanup.rows + 4))
      yield* until("it is counted", Effect.map(of("keys"), ({ rows }) => rows === before.keys.rows + 1))
      const after = { cleanup: yield* of("cleanup"), keys: yield* of("keys") }
      assert.isAbove(after.cleanup.timed, before.cleanup.timed)
      assert.isAtLeast(after.cleanup.runs, after.cleanup.timed - before.cleanup.timed + 2)
      assert.strictEqual(after.keys.failures, before.keys.failures)

      const names = new Set(trace.spans.map(({ name }) => name))
      assert.isTrue(names.has("Maintenance.cleanup") && names.has("Maintenance.keys"))
      const done = trace.spans.filter((span) => span.attributes.get("rows") === 4)
      assert.deepStrictEqual(done.map(({ name, parent }) => [name, parent._tag]), [["Maintenance.cleanup", "None"]])
      assert.isTrue(
        trace.spans.some(({ name, status }) =>
          name === "Maintenance.cleanup" && status._tag === "Ended" && Exit.isFailure(status.exit)
        )
      )
    })))

  it.live("are done by a worker too, with a span and by its own interval", () =>
    withQueue(Effect.gen(function*() {
      const trace = tracing()
      yield* running(
        Worker.layer({ jobs: [Note], heartbeat: 20, lease: 60, rescueInterval: 50 }).pipe(
          Layer.provide(NoteHandler),
          Layer.provide(trace.layer)
        )
      )
      yield* until(
        "each has had its turn",
        Effect.sync(() => {
          const names = new Set(trace.spans.map(({ name }) => name))
          return ["rescue", "parking", "audit"].every((task) => names.has(`Maintenance.${task}`))
        })
      )
      assert.isFalse(trace.spans.some(({ name }) => name.startsWith("sql")))
    })))

  it.live("audit page by page, whoever has the turn", () =>
    withQueue(Effect.gen(function*() {
      const mine = { jobs: [Note], heartbeat: 20, lease: 60, rescueInterval: 30 } as const
      yield* Never.enqueueAll(Array.from({ length: 6000 }, () => undefined))
      const last = yield* value<string>("select id::text from pgqueue.job order by id desc limit 1")
      yield* rows("delete from pgqueue.ready where id = $1::uuid", [last])
      for (let n = 0; n < 2; n++) {
        yield* running(Worker.layer(mine).pipe(Layer.provide(NoteHandler), Layer.provide(queueLayer())))
      }
      yield* untilValue("select count(*)::int from pgqueue.ready where id = $1::uuid", 1, { params: [last] })
      yield* allInPlace
    })))
})

describe("a database clock that was moved", () => {
  // Between the move and the next beat there is time to judge, by the old clock.
  const timing = { heartbeat: 400, lease: 4000, rescueInterval: 20, pollInterval: 400, gracePeriod: 0 } as const

  for (const by of [hour, -hour]) {
    it.live(`by ${by / hour} h: no worker is declared dead, no job rescued, and later the dead are`, () =>
      withClock(Effect.gen(function*() {
        const { layer, logged } = collecting("Warn")
        yield* Never.enqueueAll(Array.from({ length: 20 }, () => undefined))
        yield* running(
          Worker.layer({ ...timing, jobs: [Never], concurrency: 20 }).pipe(
            Layer.provide(NeverHandler),
            Layer.provide(layer)
          )
        )
        // Another one that beats too rarely for the first one to have heard of it by the time it judges again.
        yield* running(
          Worker.layer({ ...timing, heartbeat: 5000, lease: 10_000, pollInterval: 5000, jobs: [Note] }).pipe(
            Layer.provide(NoteHandler)
          )
        )
        // And one that beats after the first one, as a rule.
        yield* running(
          Worker.layer({ ...timing, heartbeat: 1000, pollInterval: 1000, jobs: [Note] }).pipe(
            Layer.provide(NoteHandler)
          )
        )
        yield* untilValue("select count(*)::int from pgqueue.ready", 0)
        yield* untilValue("select count(*)::int from pgqueue.worker", 3)
        const workers = yield* rows("select id::text from pgqueue.worker order by id")
        const judged = (since: string) =>
          untilValue(`select count(*)::int from pgqueue.task where name = 'rescue' and ran_at > $1::timestamptz`, 1, {
            params: [since]
          })
        const clock = value<string>("select testclock.clock_timestamp()::text")
        yield* judged("-infinity")
        yield* moveClock(by)
        // From when nobody may judge until both do again, and some more rounds.
        const noticed = () =>
          logged.filter((line) => line.includes(`the database's clock was moved by ${by / 1000}`)).length
        yield* until("the move is noticed", Effect.sync(() => noticed() > 0))
        for (let round = 0; round < 10; round++) yield* judged(yield* clock)
        yield* assertRows("select id::text from pgqueue.worker order by id", workers)
        assert.strictEqual(yield* value("select coalesce(sum(rescued), 0)::int from pgqueue.job"), 0)
        assert.strictEqual(noticed(), 1)
        // One that died before and one that dies now.
        yield* rows(
          `insert into pgqueue.worker (id, name, queues, kinds, prefixes, lease_ms, beat_at)
           values (gen_random_uuid(), 'now', '{}', '{}', '{}', 1000, testclock.clock_timestamp()),
             (gen_random_uuid(), 'before', '{}', '{}', '{}', 1000, testclock.clock_timestamp() - $1::float8 * interval '1 millisecond')`,
          [by]
        )
        yield* untilValue("select count(*)::int from pgqueue.worker", 3)
        yield* assertRows("select id::text from pgqueue.worker order by id", workers)
      })))
  }

  // Short leases are outlived by steps that nobody reports.
  for (const by of [4500, -4500]) {
    it.live(`by ${by / 1000} s: no worker with a shorter lease is declared dead, and later the dead are`, () =>
      withClock(Effect.gen(function*() {
        const short = { ...timing, heartbeat: 1000, lease: 3000, pollInterval: 400 } as const
        yield* Never.enqueueAll(Array.from({ length: 20 }, () => undefined))
        for (let n = 0; n < 2; n++) {
          yield* running(Worker.layer({ ...short, jobs: [Never] }).pipe(Layer.provide(NeverHandler)))
        }
        yield* untilValue("select count(*)::int from pgqueue.ready", 0)
        yield* untilValue("select count(*)::int from pgqueue.task where name = 'rescue'", 1)
        const workers = yield* rows("select id::text from pgqueue.worker order by id")
        assert.strictEqual(workers.length, 2)
        const beats = value<string>("select max(beat_at)::text from pgqueue.worker")
        for (let round = 0; round < 2; round++) {
          const beat = yield* beats
          yield* until("a beat", Effect.map(beats, (last) => last !== beat))
        }
        yield* moveClock(by)
        yield* Effect.sleep(4000)
        yield* assertRows("select id::text from pgqueue.worker order by id", workers)
        assert.strictEqual(yield* value("select coalesce(sum(rescued), 0)::int from pgqueue.job"), 0)
        yield* rows(
          `insert into pgqueue.worker (id, name, queues, kinds, prefixes, lease_ms, beat_at)
           values (gen_random_uuid(), 'dies', '{}', '{}', '{}', 1000, testclock.clock_timestamp())`
        )
        yield* untilValue("select count(*)::int from pgqueue.worker", 2)
        yield* assertRows("select id::text from pgqueue.worker order by id", workers)
      })))
  }
})
