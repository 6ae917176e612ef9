/** In which order one worker with one slot runs what is in line: priority, due time, id, and never before the due time. */
import { assert, describe, it } from "@effect/vitest"
import { Effect, Layer, Schema } from "effect"
import { SecureRandom } from "effect/crypto"
import { Job, Worker } from "../src/index.ts"
import { Ledger } from "./support/ledger.ts"
import {
  allInPlace,
  assertRows,
  rows,
  running,
  untilAllEnded,
  untilQuiet,
  untilValue,
  withQueue
} from "./support/queue.ts"

class Note extends Job.make("note", { payload: { n: Schema.Number } }) {}

const NoteHandler = Note.toLayer(() => Effect.flatMap(Ledger, ({ record }) => record("start")))
const oneSlot = Worker.layer({ jobs: [Note], concurrency: 1 }).pipe(Layer.provide(NoteHandler))

const priorities = ["high", "normal", "low", 0, 1, 2, 3, 4, 5, 6, 7, 8, 9] as const

/** Jobs in the order in which they ended, and in the order in which they had to. */
const order = Effect.gen(function*() {
  const started = yield* rows<{ job: string }>("select job::text from ledger order by at, run")
  const expected = yield* rows<{ job: string }>(
    "select id::text as job from pgqueue.finished order by priority, scheduled_for, id"
  )
  return { started: started.map(({ job }) => job), expected: expected.map(({ job }) => job) }
})

/** Nothing starts before it is due; 1 ms for what a timestamp loses on its way through JavaScript. */
const nothingEarly = assertRows(
  `select l.job from ledger l join pgqueue.finished f on f.id = l.job where l.at < f.scheduled_for - interval '1 ms'`,
  []
)

describe("one worker with one slot", () => {
  it.live("runs 2 000 due jobs exactly by priority, due time and id", () =>
    withQueue(Effect.gen(function*() {
      // Many share a due time, few are in the order of their ids, and some were due long ago.
      yield* Note.enqueueAll(Array.from({ length: 2000 }, (_, n) => ({ n })), ({ n }) => ({
        id: SecureRandom.uuidV4Unsafe(),
        priority: priorities[(n * 7) % priorities.length]!,
        delay: (n * 31) % 40
      }))
      yield* untilValue("select count(*)::int from pgqueue.ready where run_at > clock_timestamp()", 0)
      yield* running(oneSlot)
      yield* untilAllEnded({ within: 60_000 })
      const { expected, started } = yield* order
      assert.deepStrictEqual(started, expected)
      assert.lengthOf(started, 2000)
      yield* nothingEarly
      yield* allInPlace
    })), 90_000)

  it.live("starts future jobs of every priority in the order of their due times, and none early", () =>
    withQueue(Effect.gen(function*() {
      yield* running(oneSlot)
      // 15 ms apart: more than a run takes, so that each is alone when it is due.
      yield* Note.enqueueAll(Array.from({ length: 100 }, (_, n) => ({ n })), ({ n }) => ({
        priority: priorities[(n * 5) % priorities.length]!,
        delay: 1000 + ((n * 37) % 100) * 40
      }))
      yield* untilAllEnded({ within: 30_000 })
      yield* nothingEarly
      assert.strictEqual((yield* order).started.length, 100)
      // By the database's clock it was never long either.
      const late = yield* rows<{ ms: number }>(
        `select (extract(epoch from percentile_disc(0.5) within group (order by l.at - f.scheduled_for)) * 1000)::float8 as ms
         from ledger l join pgqueue.finished f on f.id = l.job`
      )
      assert.isBelow(late[0]!.ms, 500)
    })))

  it.live("finds a job that becomes due just after another was claimed, and does not wait for its next poll", () =>
    withQueue(Effect.gen(function*() {
      yield* running(
        Worker.layer({ jobs: [Note], pollInterval: "1 hour" }).pipe(Layer.provide(NoteHandler))
      )
      yield* untilValue("select count(*)::int from pgqueue.worker", 1)
      for (let later = 0; later < 40; later += 2) {
        yield* untilQuiet("effect-pgqueue")
        yield* Note.enqueue({ n: 1 }, { delay: 100 })
        yield* Note.enqueue({ n: 2 }, { delay: 100 + later })
        yield* untilAllEnded({ within: 5000 })
      }
      yield* nothingEarly
    })))

  it.live("takes an urgent job that arrives late before everything that has not started", () =>
    withQueue(Effect.gen(function*() {
      class Slow extends Job.make("slow", { payload: { n: Schema.Number } }) {}
      yield* running(
        Worker.layer({ jobs: [Slow], concurrency: 1 }).pipe(
          Layer.provide(
            Slow.toLayer(({ n }) =>
              Effect.flatMap(Ledger, ({ record }) => Effect.andThen(record("start", String(n)), Effect.sleep(300)))
            )
          )
        )
      )
      yield* Slow.enqueueAll([1, 2, 3, 4, 5].map((n) => ({ n })), { priority: "low" })
      yield* untilValue("select count(*)::int from ledger", 1)
      yield* Slow.enqueue({ n: 0 }, { priority: "high" })
      yield* untilAllEnded()
      const notes = (yield* rows<{ note: string }>("select note from ledger order by at")).map(({ note }) => note)
      assert.isAtMost(notes.indexOf("0"), 2, notes.join(" "))
    })))
})
