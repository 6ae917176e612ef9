/** Schedules go by the database's clock, also when somebody moves it. */
import { assert, describe, it } from "@effect/vitest"
import { DateTime, Effect } from "effect"
import { CronScheduler, Job } from "../src/index.ts"
import { moveClock, withClock } from "./support/clock.ts"
import { rows, running, until, untilValue, value } from "./support/queue.ts"

class Tick extends Job.make("tick") {}

const hour = 3_600_000
const iso = (millis: number) => DateTime.formatIso(DateTime.makeUnsafe(millis))

const secondly = (name: string, missed: "skip" | "latest") =>
  CronScheduler.make(name, { every: "1 second", job: Tick, missed })

/** Every tick has one job, and nothing is a tick that is none. */
const assertOnce = Effect.gen(function*() {
  const [found] = yield* rows<{ jobs: number; ticks: number; odd: number }>(
    `select count(*)::int as jobs, count(distinct (metadata ->> 'schedule', scheduled_for))::int as ticks,
       count(*) filter (where extract(epoch from scheduled_for) % 1 <> 0)::int as odd from pgqueue.job`
  )
  assert.strictEqual(found!.jobs, found!.ticks)
  assert.strictEqual(found!.odd, 0)
})

const jobs = value("select count(*)::int from pgqueue.job")
const databaseClock = Effect.map(
  value<Date>("select testclock.clock_timestamp()"),
  (date) => date.getTime()
)
const nextOf = (name: string) =>
  Effect.map(
    value<Date>("select next_at from pgqueue.schedule where name = $1", [name]),
    (date) => date.getTime()
  )

describe("a database whose clock is moved", () => {
  it.live(
    "forward: ticks in between were missed, and none comes twice when it is moved back",
    () =>
      withClock(Effect.gen(function*() {
        yield* running(CronScheduler.layer([secondly("skip", "skip"), secondly("latest", "latest")]))
        yield* until("both have fired", Effect.map(jobs, (n) => n >= 2))
        yield* moveClock(hour)
        const moved = yield* databaseClock
        yield* until("both go by the new time", Effect.map(nextOf("skip"), (next) => next > moved))
        yield* until("both go by the new time", Effect.map(nextOf("latest"), (next) => next > moved))
        const made = yield* value(
          "select count(*)::int from pgqueue.job where scheduled_for > $1::timestamptz and scheduled_for <= $2::timestamptz",
          [iso(moved - hour + 5000), iso(moved - 31_000)]
        )
        // An hour of ticks: none of it is made up but the latest, and that is within the last second.
        assert.strictEqual(made, 0)
        yield* moveClock(-hour)
        const before = yield* jobs
        const next = yield* nextOf("skip")
        // The old time comes again: its ticks have had their jobs, or have been passed over.
        yield* until("a look after the move", Effect.map(databaseClock, (now) => now > moved - hour + 3000))
        assert.strictEqual(yield* jobs, before)
        assert.strictEqual(yield* nextOf("skip"), next)
        yield* assertOnce
      })),
    60_000
  )

  it.live(
    "back: no tick comes a second time, and what is scheduled meanwhile fires at once",
    () =>
      withClock(Effect.gen(function*() {
        yield* running(CronScheduler.layer([secondly("old", "latest")]))
        yield* until("it has fired", Effect.map(jobs, (n) => n >= 2))
        yield* moveClock(-hour)
        yield* until(
          "the tick that was under way",
          Effect.gen(function*() {
            const before = yield* jobs
            yield* until("a second of the new time", Effect.map(databaseClock, (now) => now % 1000 > 800))
            return before === (yield* jobs)
          })
        )
        const before = yield* jobs
        yield* CronScheduler.schedule(secondly("new", "latest"))
        yield* untilValue("select count(*)::int >= 2 from pgqueue.job where metadata ->> 'schedule' = 'new'", true)
        yield* untilValue("select count(*)::int from pgqueue.job where metadata ->> 'schedule' = 'old'", before)
        yield* assertOnce
        const list = yield* CronScheduler.list
        assert.deepStrictEqual(list.map(({ name }) => name), ["new", "old"])
        // When the time has come again, the old one goes on with the tick after its last.
        yield* moveClock(hour)
        yield* untilValue(
          "select count(*)::int > $1 from pgqueue.job where metadata ->> 'schedule' = 'old'",
          true,
          { params: [before] }
        )
        yield* assertOnce
      })),
    60_000
  )

  it.live("is asked, not the process's", () =>
    withClock(Effect.gen(function*() {
      yield* moveClock(-10 * 365 * 24 * hour)
      yield* running(CronScheduler.layer([secondly("then", "latest")]))
      yield* until("it has fired", Effect.map(jobs, (n) => n >= 2))
      const tick = yield* value<Date>("select max(scheduled_for) from pgqueue.job")
      const year = DateTime.toParts(DateTime.makeUnsafe(tick)).year
      assert.isAtMost(year, 2017)
      yield* assertOnce
    })), 60_000)
})
