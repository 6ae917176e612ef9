/** Scheduler processes that are killed and stopped: every tick of every schedule has exactly one job, and in time. */
import { assert, describe, it } from "@effect/vitest"
import { Deferred, Effect, Random } from "effect"
import type { SchedulerProgram } from "./programs/scheduler.ts"
import { long } from "./support/long.ts"
import { type Program, startProgram } from "./support/processes.ts"
import { assertRows, databaseUrl, now, quantile, rows, until, untilValue, value, withQueue } from "./support/queue.ts"

const startScheduler = (options: SchedulerProgram) => startProgram("scheduler.ts", options)

/** A scheduler that is started again whenever it ends, as a supervisor would. */
const keepScheduler = Effect.fnUntraced(function*(options: SchedulerProgram) {
  const first = yield* Deferred.make<void>()
  let current: Program | undefined
  const life = Effect.scoped(Effect.gen(function*() {
    current = yield* startScheduler(options)
    yield* Deferred.succeed(first, undefined)
    yield* current.ended
  }))
  yield* Effect.forkScoped(Effect.forever(life))
  yield* Deferred.await(first)
  return { current: () => current! }
})

/**
 * Every tick between the first and the last of each schedule, and when it was enqueued. Jobs wait in line for ever, so
 * nothing that was enqueued is missing here.
 */
const check = Effect.fnUntraced(function*(schedules: number, seconds: number) {
  const found = yield* rows<{ name: string; ticks: number; distinct: number; span: number }>(
    `select metadata->>'schedule' as name, count(*)::int as ticks, count(distinct scheduled_for)::int as distinct,
      extract(epoch from max(scheduled_for) - min(scheduled_for))::int as span
     from pgqueue.job group by 1 order by 1`
  )
  assert.strictEqual(found.length, schedules)
  // They were written together, so their first tick is the same.
  assert.strictEqual(
    yield* value(
      "select count(distinct first)::int from (select min(scheduled_for) as first from pgqueue.job group by metadata->>'schedule') f"
    ),
    1
  )
  for (const { distinct, name, span, ticks } of found) {
    assert.deepStrictEqual({ name, ticks, distinct }, { name, ticks: span + 1, distinct: span + 1 })
    assert.isAtLeast(span, seconds)
  }
  // What the schedules say they have done is what there is.
  yield* assertRows(
    `select s.name from pgqueue.schedule s
     where previous_at is distinct from (select max(scheduled_for) from pgqueue.job j where j.metadata->>'schedule' = s.name)
       or next_at <> previous_at + interval '1 second' or problem is not null`,
    []
  )
  const late = yield* rows<{ late: number }>(
    `select (extract(epoch from enqueued_at - scheduled_for) * 1000)::float8 as late from pgqueue.job`
  )
  return late.map(({ late }) => late)
})

/** Stops firing for good, so that what is there can be looked at. */
const holdStill = Effect.fnUntraced(function*(fleet: ReadonlyArray<{ readonly current: () => Program }>) {
  yield* Effect.forEach(fleet, ({ current }) => current().kill("SIGSTOP"))
  // What was on its way has arrived.
  yield* untilValue(
    "select count(*)::int from pg_stat_activity where application_name like 'scheduler%' and datname = current_database() and state <> 'idle'",
    0
  )
})

describe("scheduler processes", () => {
  const seconds = long ? 120 : 10
  const every = long ? 15_000 : 4000

  it.live(
    `eight of them enqueue every tick of 50 schedules once, for ${seconds} s in which they are killed and stopped`,
    () =>
      withQueue(Effect.gen(function*() {
        const url = yield* databaseUrl
        const fleet = yield* Effect.forEach(
          Array.from({ length: 8 }, (_, n) => `scheduler ${n}`),
          (name) => keepScheduler({ url, name, declares: 50 }),
          { concurrency: 4 }
        )
        // A machine that has just started eight processes is not what is measured.
        const begun = yield* now
        const from = yield* value<string>("select clock_timestamp()::text")
        let victim = 0
        while ((yield* now) - begun < seconds * 1000) {
          const [first, second, third] = [0, 1, 2].map((n) => fleet[(victim + n) % 8]!)
          victim += 3
          const stopped = third!.current()
          yield* first!.current().kill("SIGKILL")
          yield* stopped.kill("SIGSTOP")
          yield* Effect.sleep(every / 2)
          yield* second!.current().kill("SIGKILL")
          yield* stopped.kill("SIGCONT")
          yield* Effect.sleep(every / 2)
        }
        yield* holdStill(fleet)
        const all = yield* check(50, seconds - 1)
        const late = (yield* rows<{ late: number }>(
          `select (extract(epoch from enqueued_at - scheduled_for) * 1000)::float8 as late from pgqueue.job where scheduled_for > $1::timestamptz`,
          [from]
        )).map(({ late }) => late)
        yield* Effect.log(
          `${all.length} ticks, late by p50 ${quantile(late, 0.5).toFixed(0)} ms, p99 ${
            quantile(late, 0.99).toFixed(0)
          } ms, max ${Math.max(...late).toFixed(0)} ms`
        )
        // Where the machine stands still for a second, a tenth of the ticks of the short form is that late.
        assert.isBelow(quantile(late, 0.99), long ? 1000 : 3500)
        assert.isAtLeast(Math.min(...late), 0)
      })),
    seconds * 1000 + 120_000
  )

  it.live(
    "one that was stopped over several ticks doubles none when it goes on",
    () =>
      withQueue(Effect.gen(function*() {
        const url = yield* databaseUrl
        const fleet = yield* Effect.forEach(
          ["scheduler 0", "scheduler 1"],
          (name) => startScheduler({ url, name, declares: 20 })
        )
        const ticks = (more: number) =>
          Effect.flatMap(value("select count(*)::int from pgqueue.job"), (before) =>
            until(
              "ticks",
              Effect.map(value("select count(*)::int from pgqueue.job"), (n) => n >= before + more)
            ))
        yield* ticks(20)
        for (let n = 0; n < (long ? 20 : 2); n++) {
          const stopped = fleet[n % 2]!
          // At any moment, also in the middle of a statement.
          yield* Effect.flatMap(Random.nextBetween(0, 1000), (pause) => Effect.sleep(pause))
          yield* stopped.kill("SIGSTOP")
          yield* ticks(60)
          yield* stopped.kill("SIGCONT")
          yield* ticks(20)
        }
        yield* holdStill(fleet.map((one) => ({ current: () => one })))
        yield* check(20, 3)
      })),
    long ? 240_000 : 60_000
  )

  it.live("with the same name share nothing else", () =>
    withQueue(Effect.gen(function*() {
      const url = yield* databaseUrl
      const fleet = yield* Effect.forEach(
        [0, 1, 2],
        () => startScheduler({ url, name: "scheduler", declares: 20 }),
        { concurrency: "unbounded" }
      )
      yield* untilValue(
        "select count(*) >= 100 from pgqueue.job",
        true
      )
      yield* holdStill(fleet.map((one) => ({ current: () => one })))
      yield* check(20, 3)
    })))

  const kills = long ? 200 : 8
  it.live(
    `two of them lose and double no tick while one is killed at any moment, ${kills} times`,
    () =>
      withQueue(Effect.gen(function*() {
        const url = yield* databaseUrl
        const fleet = yield* Effect.forEach(
          [0, 1],
          (n) => keepScheduler({ url, name: `scheduler ${n}`, declares: 20, pollInterval: 50 })
        )
        for (let kill = 0; kill < kills; kill++) {
          const kept = fleet[kill % 2]!
          // Around a full second, when it fires: 40 ms before it to 60 ms after it.
          const [wait] = yield* rows<{ wait: number }>(
            "select ((1 - extract(epoch from clock_timestamp()) % 1) * 1000)::float8 as wait"
          )
          yield* Effect.flatMap(
            Random.nextBetween(-40, 60),
            (offset) => Effect.sleep(Math.max(0, wait!.wait + offset))
          )
          const victim = kept.current()
          yield* victim.kill("SIGKILL")
          yield* victim.ended
          yield* until("it is there again", Effect.sync(() => kept.current() !== victim && kept.current().running()))
        }
        yield* holdStill(fleet)
        yield* check(20, 3)
      })),
    kills * 5000 + 60_000
  )
})
