/** One row that a trigger of the application refuses, with a code of its own or by a mistake in it, among others. */
import { assert, describe, it } from "@effect/vitest"
import { Effect, Exit, Layer, Schema } from "effect"
import { CronScheduler, Job, Worker } from "../src/index.ts"
import {
  allInPlace,
  assertRows,
  queueLayer,
  refusing,
  rows,
  running,
  untilAllEnded,
  untilValue,
  value,
  withQueue
} from "./support/queue.ts"

class Answer extends Job.make("answer", { payload: { n: Schema.Finite }, success: Schema.Finite }) {}
const AnswerHandler = Answer.toLayer(({ n }) => Effect.succeed(n))
const numbers = (count: number) => Array.from({ length: count }, (_, n) => ({ n }))

const ways = [
  ["raises an exception", "raise exception 'refused';"],
  ["has a code of its own", "raise exception 'refused' using errcode = 'ZZ123';"],
  ["reads what is not there", "perform 1 from public.nowhere;"],
  ["may not do what it does", "raise exception 'refused' using errcode = '42501';"]
] as const

// Together: they wait for what is refused to be tried again.
describe.concurrent("a trigger that refuses one row and", () => {
  for (const [what, body] of ways) {
    it.live(`${what} keeps no other job from its end, and this one keeps its result until it is let in`, () =>
      withQueue(Effect.gen(function*() {
        yield* refusing("finished", "new.result::text = '7'", body)
        yield* running(Worker.layer({ jobs: [Answer], gracePeriod: 0 }).pipe(Layer.provide(AnswerHandler)))
        yield* Answer.enqueueAll(numbers(100))
        yield* untilValue("select count(*)::int from pgqueue.finished", 99)
        yield* assertRows("select (payload ->> 'n')::int as n from pgqueue.job", [{ n: 7 }])
        yield* rows("drop trigger refuse on pgqueue.finished")
        yield* untilAllEnded({ within: 20_000 })
        yield* assertRows(
          "select status, attempt::int, count(*)::int as count, count(distinct result::text)::int as results from pgqueue.finished group by 1, 2",
          [{ status: "completed", attempt: 1, count: 100, results: 100 }]
        )
        yield* allInPlace
      })))

    it.live(`${what} fails one enqueue, and none of those that go with it`, () =>
      withQueue(Effect.gen(function*() {
        yield* refusing("job", "new.payload ->> 'n' = '7'", body)
        const exits = yield* Effect.forEach(numbers(30), (payload) => Effect.exit(Answer.enqueue(payload)), {
          concurrency: "unbounded"
        })
        assert.deepStrictEqual(exits.flatMap((exit, n) => Exit.isFailure(exit) ? [n] : []), [7])
        assert.strictEqual(yield* value("select count(*)::int from pgqueue.job"), 29)
        yield* allInPlace
      })))
  }

  for (const [what, body] of ways) {
    it.live(`${what} keeps no other schedule from its ticks, and this one goes on when it is let in`, () =>
      withQueue(Effect.gen(function*() {
        class Good extends Job.make("good") {}
        class Bad extends Job.make("bad") {}
        yield* refusing("job", "new.kind = 'bad'", body)
        yield* running(
          CronScheduler.layer([
            CronScheduler.make("good", { every: "1 second", job: Good }),
            CronScheduler.make("bad", { every: "1 second", job: Bad })
          ]).pipe(Layer.provide(queueLayer()))
        )
        yield* untilValue("select count(*) >= 3 from pgqueue.job where kind = 'good'", true)
        yield* rows("drop trigger refuse on pgqueue.job")
        yield* untilValue("select count(*) >= 2 from pgqueue.job where kind = 'bad'", true)
        yield* assertRows("select name from pgqueue.schedule where problem is not null", [])
      })))
  }
})

describe("a trigger that refuses every row", () => {
  it.live("is asked no more often than is needed to find one among others", () =>
    withQueue(Effect.gen(function*() {
      yield* rows("create sequence public.tries")
      yield* rows(`create function public.refuse() returns trigger language plpgsql as
        $$ begin perform nextval('public.tries'); raise exception 'closed'; end $$`)
      for (const table of ["job", "finished"]) {
        yield* rows(
          `create trigger refuse before insert on pgqueue.${table} for each statement execute function public.refuse()`
        )
      }
      const tries = value("select last_value::int from public.tries")
      const exits = yield* Effect.forEach(numbers(1000), (payload) => Effect.exit(Answer.enqueue(payload)), {
        concurrency: "unbounded"
      })
      assert.isTrue(exits.every(Exit.isFailure))
      assert.isBelow(yield* tries, 200)
      yield* rows("drop trigger refuse on pgqueue.job")
      yield* Answer.enqueueAll(numbers(500))
      yield* rows("select setval('public.tries', 1)")
      yield* running(Worker.layer({ jobs: [Answer], concurrency: 500 }).pipe(Layer.provide(AnswerHandler)))
      yield* untilValue("select last_value > 1 from public.tries", true)
      yield* Effect.sleep(5000)
      assert.isBelow(yield* tries, 600)
      yield* rows("drop trigger refuse on pgqueue.finished")
      yield* untilAllEnded({ within: 20_000 })
      yield* assertRows("select status, attempt::int, count(*)::int as count from pgqueue.finished group by 1, 2", [
        { status: "completed", attempt: 1, count: 500 }
      ])
    })))
})

describe("jobs whose kind was changed while they stood in line", () => {
  it.live("hold up no other, cost no slot, and are run by whoever handles the new one", () =>
    withQueue(Effect.gen(function*() {
      class Renamed extends Job.make("renamed", { payload: { n: Schema.Finite } }) {}
      yield* Answer.enqueueAll(numbers(5))
      yield* rows("update pgqueue.job set kind = 'renamed' where (payload ->> 'n')::int < 3")
      yield* running(
        Worker.layer({ jobs: [Answer], concurrency: 2, rescueInterval: 200 }).pipe(Layer.provide(AnswerHandler))
      )
      yield* Answer.enqueueAll(numbers(10))
      yield* untilValue("select count(*)::int from pgqueue.finished", 12)
      yield* running(
        Worker.layer({ jobs: [Renamed], rescueInterval: 200 }).pipe(
          Layer.provide(Renamed.toLayer(() => Effect.void)),
          Layer.provide(queueLayer())
        )
      )
      yield* untilAllEnded()
      yield* assertRows(
        "select kind, attempt::int, count(*)::int as count from pgqueue.finished group by 1, 2 order by 1",
        [
          { kind: "answer", attempt: 1, count: 12 },
          { kind: "renamed", attempt: 1, count: 3 }
        ]
      )
      yield* allInPlace
    })))
})

describe("a server that has no room for a statement", () => {
  /** As with `temp_file_limit`: more than so many rows at once are too much. */
  const limiting = (table: string, most: number) =>
    rows(`create function public.limited() returns trigger language plpgsql as $$ begin
        if (select sum(${table === "lease" ? "cardinality(ids)" : "1"}) from added) > ${most} then
          raise exception 'temporary file size exceeds temp_file_limit' using errcode = '53400';
        end if;
        return null;
      end $$`).pipe(Effect.andThen(
      rows(`create trigger limited after insert on pgqueue.${table} referencing new table as added
        for each statement execute function public.limited()`)
    ))

  for (const table of ["lease", "finished"]) {
    it.live(`is asked for less (${table})`, () =>
      withQueue(Effect.gen(function*() {
        yield* limiting(table, 3)
        yield* running(Worker.layer({ jobs: [Answer], concurrency: 40 }).pipe(Layer.provide(AnswerHandler)))
        yield* Answer.enqueueAll(numbers(200))
        yield* untilAllEnded({ within: 40_000 })
        yield* assertRows("select status, attempt::int, count(*)::int as count from pgqueue.finished group by 1, 2", [
          { status: "completed", attempt: 1, count: 200 }
        ])
      })), 60_000)
  }
})
