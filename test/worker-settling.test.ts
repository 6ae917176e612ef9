/** How a job ends when the database, the policy or the codec of the result gets in the way. */
import { assert, describe, it } from "@effect/vitest"
import { Effect, Layer, Schedule, Schema, SchemaGetter } from "effect"
import { Job, Worker } from "../src/index.ts"
import { Ledger } from "./support/ledger.ts"
import {
  allInPlace,
  assertRows,
  queueLayer,
  refusing,
  rows,
  running,
  strangerDoes,
  untilAllEnded,
  untilValue,
  value,
  withQueue
} from "./support/queue.ts"

class Note extends Job.make("note", { payload: { n: Schema.Number } }) {}
const NoteHandler = Note.toLayer(() => Effect.flatMap(Ledger, ({ record }) => record("start")))
const numbers = (count: number) => Array.from({ length: count }, (_, n) => ({ n }))

/** Puts what stands in line into leases of a worker that is gone. */
const abandon = (leases: number) =>
  rows(
    `with line as (delete from pgqueue.ready returning id)
     insert into pgqueue.lease (id, worker, ids)
     select gen_random_uuid(), '00000000-0000-4000-8000-000000000009', array_agg(id)
     from (select id, row_number() over () % $1::int as part from line) x group by part`,
    [leases]
  )

/** Timing of a worker that soon looks for what the dead have left. */
const watchful = { lease: 1000, heartbeat: 200, rescueInterval: 200 } as const

describe("time limits that the application's database sets", () => {
  /** A worker whose sessions would be cancelled after 50 ms, in front of a table that takes longer than that. */
  const limited = Effect.fnUntraced(function*(slow: string) {
    yield* rows(`do $$ begin
      execute format('alter database %I set statement_timeout = ''50ms''', current_database());
      execute format('alter database %I set lock_timeout = ''50ms''', current_database());
    end $$`)
    yield* rows(`create function public.slow() returns trigger language plpgsql as
      $$ begin perform pg_sleep(0.1); return null; end $$`)
    yield* rows(`create trigger slow after ${slow} for each statement execute function public.slow()`)
    return Layer.succeedContext(yield* Layer.build(queueLayer()))
  })

  it.live("do not keep a backlog from being settled", () =>
    withQueue(Effect.gen(function*() {
      class Padded extends Job.make("padded", { payload: { n: Schema.Number }, success: Schema.String }) {}
      const PaddedHandler = Padded.toLayer(() => Effect.succeed("x".repeat(1000)))
      yield* Padded.enqueueAll(numbers(3000))
      const queue = yield* limited("insert on pgqueue.finished")
      yield* running(
        Worker.layer({ jobs: [Padded], concurrency: 300 }).pipe(Layer.provide(PaddedHandler), Layer.provide(queue))
      )
      yield* untilAllEnded({ within: 20_000, every: 50 })
      yield* assertRows("select status, attempt::int, count(*)::int as count from pgqueue.finished group by 1, 2", [
        { status: "completed", attempt: 1, count: 3000 }
      ])
      yield* allInPlace
    })))

  it.live("do not end the session of a settlement, where they are for whole transactions", () =>
    withQueue(Effect.gen(function*() {
      // From PostgreSQL 17 on.
      if ((yield* value("select current_setting('server_version_num')::int")) >= 170_000) {
        yield* rows(`do $$ begin
          execute format('alter database %I set transaction_timeout = ''300ms''', current_database());
        end $$`)
      }
      yield* rows(`create function public.slow() returns trigger language plpgsql as
        $$ begin perform pg_sleep(0.5); return null; end $$`)
      yield* rows("create trigger slow after insert on pgqueue.finished for each row execute function public.slow()")
      yield* running(
        Worker.layer({ jobs: [Note] }).pipe(Layer.provide(NoteHandler), Layer.provide(queueLayer()))
      )
      yield* Note.enqueueAll(numbers(3))
      yield* untilAllEnded({ within: 10_000 })
      yield* allInPlace
    })))

  it.live("do not keep the jobs of a dead worker from being rescued", () =>
    withQueue(Effect.gen(function*() {
      yield* Note.enqueueAll(numbers(5000))
      yield* abandon(10)
      const queue = yield* limited("insert on pgqueue.ready")
      yield* running(
        Worker.layer({ jobs: [Note], concurrency: 1, ...watchful, gracePeriod: 0 }).pipe(
          Layer.provide(NoteHandler),
          Layer.provide(queue)
        )
      )
      yield* untilValue(
        "select count(*)::int from pgqueue.lease where not exists (select 1 from pgqueue.worker w where w.id = worker)",
        0,
        { within: 20_000, every: 50 }
      )
      yield* assertRows(
        "select distinct rescued::int from (select rescued from pgqueue.job union all select rescued from pgqueue.finished) j",
        [{ rescued: 1 }]
      )
      yield* allInPlace
    })))
})

describe("a stranger that has the turn of the rescue locked", () => {
  it.live("does not keep the jobs of the dead", () =>
    withQueue(Effect.gen(function*() {
      yield* Note.enqueueAll(numbers(5))
      yield* abandon(1)
      yield* rows("insert into pgqueue.task (name) values ('rescue')")
      const locked = yield* strangerDoes("select name from pgqueue.task for update")
      yield* running(
        Worker.layer({ jobs: [Note], ...watchful }).pipe(Layer.provide(NoteHandler), Layer.provide(queueLayer()))
      )
      yield* untilAllEnded({ within: 15_000 })
      yield* locked.commit
    })))
})

describe("a database that refuses a settlement", () => {
  const refusingEnds = (condition: string, state: string) =>
    refusing("finished", condition, `raise exception 'refused' using errcode = '${state}';`)

  // The last is of the class of bad data, and these jobs have left none: it is that of somebody's trigger.
  for (
    const [what, state] of [["raises", "P0001"], ["forbids it", "42501"], ["misses a partition", "23514"]] as const
  ) {
    it.live(`for reasons of its own (${what}) is asked again until it takes it`, () =>
      withQueue(Effect.gen(function*() {
        yield* refusingEnds("true", state)
        yield* running(Worker.layer({ jobs: [Note], gracePeriod: 0 }).pipe(Layer.provide(NoteHandler)))
        yield* Note.enqueueAll(numbers(30))
        yield* untilValue("select count(*)::int from ledger", 30)
        yield* Effect.sleep(1500)
        yield* rows("drop trigger refuse on pgqueue.finished")
        yield* untilAllEnded({ within: 20_000 })
        yield* assertRows("select status, attempt::int, count(*)::int as count from pgqueue.finished group by 1, 2", [
          { status: "completed", attempt: 1, count: 30 }
        ])
        assert.strictEqual(yield* value("select count(*)::int from ledger"), 30, "and nothing runs again")
        yield* allInPlace
      })))
  }

  it.live("because of the data of one job fails that attempt, and its neighbours complete", () =>
    withQueue(Effect.gen(function*() {
      class Answer extends Job.make("answer", { payload: { n: Schema.Finite }, success: Schema.Finite }) {}
      const AnswerHandler = Answer.toLayer(({ n }) => Effect.succeed(n))
      yield* refusingEnds("new.result::text = '7'", "22000")
      yield* running(Worker.layer({ jobs: [Answer], gracePeriod: 0 }).pipe(Layer.provide(AnswerHandler)))
      yield* Answer.enqueueAll(numbers(100))
      yield* untilValue("select count(*)::int from pgqueue.finished", 99)
      yield* untilValue("select count(*)::int from pgqueue.attempt", 1)
      yield* assertRows(
        `select (j.payload ->> 'n')::int as n, j.attempt::int, a.tag, a.message ~ 'refused' as refused
         from pgqueue.job j join pgqueue.attempt a on a.job = j.id join pgqueue.ready r on r.id = j.id`,
        [{ n: 7, attempt: 1, tag: "Defect", refused: true }]
      )
      yield* assertRows("select distinct status from pgqueue.finished", [{ status: "completed" }])
      yield* allInPlace
    })))
})

describe("a delay that is no delay", () => {
  it.live("in a policy ends the job as what it failed with, and holds up no other", () =>
    withQueue(Effect.gen(function*() {
      class Hopeless extends Job.make("hopeless", {
        payload: { n: Schema.Number },
        error: Schema.String,
        retry: Schedule.spaced(Infinity)
      }) {}
      yield* running(
        Worker.layer({ jobs: [Note, Hopeless], gracePeriod: 0 }).pipe(
          Layer.provide([NoteHandler, Hopeless.toLayer(() => Effect.fail("for good"))])
        )
      )
      yield* Hopeless.enqueueAll(numbers(30))
      yield* Note.enqueueAll(numbers(30))
      yield* untilAllEnded({ within: 10_000 })
      yield* assertRows(
        `select kind, status, error ->> 'tag' as tag, error ->> 'error' as error, count(*)::int as count
         from pgqueue.finished group by 1, 2, 3, 4 order by 1`,
        [
          { kind: "hopeless", status: "discarded", tag: "Failed", error: "for good", count: 30 },
          { kind: "note", status: "completed", tag: null, error: null, count: 30 }
        ]
      )
      yield* allInPlace
    })))

  it.live("in Job.snooze is a failed attempt", () =>
    withQueue(Effect.gen(function*() {
      const delays = [Infinity, NaN, -1]
      class Snoozing extends Job.make("snoozing", { payload: { n: Schema.Number }, retry: Schedule.recurs(0) }) {}
      yield* running(
        Worker.layer({ jobs: [Snoozing], gracePeriod: 0 }).pipe(
          Layer.provide(Snoozing.toLayer(({ n }) => Job.snooze(delays[n]!)))
        )
      )
      yield* Snoozing.enqueueAll(numbers(3))
      yield* untilAllEnded({ within: 10_000 })
      yield* assertRows(
        `select (payload ->> 'n')::int as n, status, error ->> 'tag' as tag, error ->> 'message' ~ 'snooze' as told, attempt::int
         from pgqueue.finished order by 1`,
        delays.map((_, n) => ({ n, status: "discarded", tag: "Defect", told: true, attempt: 1 }))
      )
    })))
})

describe("the attempts of a job", () => {
  it.live("are not spent by its first rescue, and neither is its policy", () =>
    withQueue(Effect.gen(function*() {
      class Flaky extends Job.make("flaky", { error: Schema.String, retry: Schedule.recurs(1) }) {}
      const FlakyHandler = Flaky.toLayer(() =>
        Effect.gen(function*() {
          const { record } = yield* Ledger
          const { attempt } = yield* Job.Current
          yield* record("start")
          if (attempt === 1) return yield* Effect.fail("once")
        })
      )
      yield* Flaky.enqueue()
      yield* abandon(1)
      yield* running(
        Worker.layer({ jobs: [Flaky], ...watchful, gracePeriod: 0 }).pipe(Layer.provide(FlakyHandler))
      )
      yield* untilAllEnded()
      yield* assertRows("select status, attempt::int, rescued::int from pgqueue.finished", [
        { status: "completed", attempt: 2, rescued: 1 }
      ])
      yield* assertRows("select tag from pgqueue.attempt order by id", [{ tag: "Lost" }, { tag: "Failed" }])
      assert.strictEqual(yield* value("select count(*)::int from ledger"), 2)
    })))

  it.live("fail, as its policy says, when the codec of its result throws", () =>
    withQueue(Effect.gen(function*() {
      let encoded = 0
      const Result = Schema.String.pipe(Schema.decodeTo(Schema.String, {
        decode: SchemaGetter.passthrough(),
        encode: SchemaGetter.transform((text: string) => {
          if (++encoded < 3) throw new Error("the codec is broken")
          return text
        })
      }))
      class Encoding extends Job.make("encoding", { success: Result, retry: Schedule.recurs(5) }) {}
      yield* running(
        Worker.layer({ jobs: [Encoding], gracePeriod: 0 }).pipe(
          Layer.provide(Encoding.toLayer(() => Effect.succeed("done")))
        )
      )
      yield* Encoding.enqueue()
      yield* untilAllEnded({ within: 10_000 })
      yield* assertRows("select status, attempt::int, result #>> '{}' as result from pgqueue.finished", [
        { status: "completed", attempt: 3, result: "done" }
      ])
      yield* assertRows(
        "select n::int, tag, message ~ 'the codec is broken' as told from pgqueue.attempt order by id",
        [
          { n: 1, tag: "Defect", told: true },
          { n: 2, tag: "Defect", told: true }
        ]
      )
    })))

  it.live("fail, and their worker goes on, when the codec of their result never answers", () =>
    withQueue(Effect.gen(function*() {
      const Result = Schema.String.pipe(Schema.decodeTo(Schema.String, {
        decode: SchemaGetter.passthrough(),
        encode: SchemaGetter.transformEffect((text: string) => text === "silent" ? Effect.never : Effect.succeed(text))
      }))
      class Encoding extends Job.make("encoding", {
        payload: { text: Schema.String },
        success: Result,
        retry: Schedule.recurs(0)
      }) {}
      yield* running(
        Worker.layer({ jobs: [Encoding], gracePeriod: 0, concurrency: 1 }).pipe(
          Layer.provide(Encoding.toLayer(({ text }) => Effect.succeed(text)))
        )
      )
      yield* Encoding.enqueue({ text: "silent" })
      yield* Encoding.enqueue({ text: "loud" })
      yield* untilAllEnded()
      yield* assertRows(
        "select status, result #>> '{}' as result, error ->> 'message' ~ 'no answer in time' as told from pgqueue.finished order by status",
        [
          { status: "completed", result: "loud", told: null },
          { status: "discarded", result: null, told: true }
        ]
      )
    })))
})
