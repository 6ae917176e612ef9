/** A bulk of several statements is in altogether or not at all, whatever the client, and sent again it is in once. */
import { PgClient } from "@effect/sql-pg"
import { assert, describe, it } from "@effect/vitest"
import { Cause, Deferred, Effect, Exit, Fiber, Layer, Redacted, Schema } from "effect"
import { SqlClient } from "effect/sql"
import { Job, JobQueue } from "../src/index.ts"
import { makeLink } from "./support/link.ts"
import {
  allInPlace,
  databaseUrl,
  now,
  refusing,
  rows,
  stranger,
  untilValue,
  value,
  withPolling,
  withQueue
} from "./support/queue.ts"

class Note extends Job.make("note", { payload: { n: Schema.Int } }) {}
class Keyed extends Job.make("keyed", { payload: { n: Schema.Int }, unique: ({ n }) => String(n) }) {}
class Large extends Job.make("large", { payload: { text: Schema.String } }) {}

const payloads = Array.from({ length: 2500 }, (_, n) => ({ n }))
const inserted = value("select count(*)::int from pgqueue.job")

/** Has the database refuse one of the jobs of the last statement. */
const refuseOne = refusing("job", "new.payload ->> 'n' = '2400'", "raise exception 'refused' using errcode = '22023';")

const allOrNone = (job: typeof Note | typeof Keyed) =>
  Effect.gen(function*() {
    yield* refuseOne
    assert.isTrue(Exit.isFailure(yield* Effect.exit(job.enqueueAll(payloads))))
    assert.strictEqual(yield* inserted, 0)
    yield* rows("drop trigger refuse on pgqueue.job")
    const done = yield* job.enqueueAll(payloads)
    assert.isTrue(done.every(({ status }) => status === "inserted"))
    assert.strictEqual(yield* inserted, payloads.length)
    yield* allInPlace
  })

for (const job of [Note, Keyed]) {
  describe(`a bulk of ${job === Note ? "" : "keyed "}jobs of which one is refused`, () => {
    it.live("leaves none", () => withQueue(allOrNone(job)))
    it.live("leaves none with a client that only polls", () => withPolling(allOrNone(job)))
  })
}

describe("a bulk of large jobs", () => {
  it.live("is sent in several statements", () =>
    withQueue(Effect.gen(function*() {
      yield* rows("create table public.insertion (jobs int not null)")
      yield* rows(`create function public.counted() returns trigger language plpgsql as
        $$ begin insert into public.insertion select count(*) from added; return null; end $$`)
      yield* rows(`create trigger counted after insert on pgqueue.job referencing new table as added
        for each statement execute function public.counted()`)
      const text = "x".repeat(1_000_000)
      const done = yield* Large.enqueueAll(Array.from({ length: 20 }, () => ({ text })))
      assert.strictEqual(new Set(done.map(({ id }) => id)).size, 20)
      assert.strictEqual(yield* value("select sum(jobs)::int from insertion"), 20)
      assert.isAtMost(yield* value("select max(jobs)::int from insertion"), 5)
      yield* allInPlace
    })))
})

describe("a bulk in a transaction whose session is lost", () => {
  it.live("fails with that", () =>
    withQueue(Effect.gen(function*() {
      const sql = yield* SqlClient.SqlClient
      const held = yield* stranger(Keyed.enqueue({ n: 1 }))
      const ended = yield* Deferred.make<Exit.Exit<unknown, unknown>>()
      const waiting = yield* Effect.forkScoped(Effect.exit(sql.withTransaction(
        Effect.onExit(Keyed.enqueueAll([{ n: 1 }]), (exit) => Deferred.succeed(ended, exit))
      )))
      yield* untilValue(
        `select count(pg_terminate_backend(pid))::int from pg_stat_activity
         where datname = current_database() and wait_event_type = 'Lock'`,
        1
      )
      // What becomes of the application's transaction is its own.
      yield* Fiber.join(waiting)
      const exit = yield* Deferred.await(ended)
      assert.isTrue(Exit.isFailure(exit) && exit.cause.reasons.every(Cause.isFailReason), String(exit))
      yield* held.commit
    })))
})

describe("a bulk whose answer was lost", () => {
  for (const count of [700, 2500]) {
    it.live(`is in once when it has ${count} jobs`, () =>
      withQueue(Effect.gen(function*() {
        const link = yield* makeLink(yield* databaseUrl)
        const queue = yield* Layer.build(Layer.fresh(
          Layer.provideMerge(JobQueue.layer(), PgClient.layer({ url: Redacted.make(link.url) }))
        ))
        // The one statement has committed, or the transaction of several has.
        const last = count > 1000 ? "COMMIT" : "refuse_ended"
        let struck = false
        // BEGIN names the level READ COMMITTED.
        link.strike({ text: last, nth: count > 1000 ? 2 : 1, at: "answered" }, () => {
          struck = true
          link.cut(last)
        })
        const done = yield* Effect.provideContext(Note.enqueueAll(payloads.slice(0, count)), queue)
        assert.isTrue(struck)
        assert.strictEqual(new Set(done.map(({ id }) => id)).size, count)
        assert.isTrue(done.every(({ status }) => status === "inserted"))
        assert.strictEqual(yield* inserted, count)
        yield* allInPlace
      })))
  }
})

describe("bulks that wait for a stranger's transaction", () => {
  for (const [maxConnections, count] of [[2, 1], [8, 4]] as const) {
    it.live(`leave connections to the others: ${count} with ${maxConnections} connections`, () =>
      withQueue(
        Effect.gen(function*() {
          const taken = yield* stranger(Keyed.enqueueAll(payloads.slice(0, count)))
          const waiting = yield* Effect.forEach(
            payloads.slice(0, count),
            (payload) => Effect.forkChild(Keyed.enqueueAll([payload]), { startImmediately: true })
          )
          // As many as are let wait at once.
          yield* untilValue(
            "select count(*)::int from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'",
            Math.min(2, count)
          )
          const begun = yield* now
          yield* Note.enqueue({ n: 1 })
          yield* Note.enqueueAll([{ n: 2 }, { n: 3 }])
          assert.isBelow((yield* now) - begun, 3000)
          yield* taken.commit
          const statuses = (yield* Effect.forEach(waiting, Fiber.join)).flat().map(({ status }) => status)
          assert.deepStrictEqual(statuses, statuses.map(() => "existing"))
          yield* allInPlace
        }),
        { queue: { maxConnections } }
      ))
  }
})

it.live("300 enqueues of 1 MB at once are all in", () =>
  withQueue(Effect.gen(function*() {
    const enqueue = Large.enqueue({ text: "x".repeat(1_000_000) })
    yield* Effect.forEach(Array.from({ length: 300 }), () => enqueue, { concurrency: "unbounded" })
    assert.strictEqual(yield* inserted, 300)
  })))
