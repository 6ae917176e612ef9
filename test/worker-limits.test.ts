/** What a worker does not go beyond: its slots, its limit, the timeout of a job, the patience of a shutdown. */
import { PgClient } from "@effect/sql-pg"
import { assert, describe, it } from "@effect/vitest"
import { Cause, Deferred, Effect, Exit, Fiber, Layer, Option, Redacted, Schedule, Schema, Scope } from "effect"
import { Job, JobQueue, Worker } from "../src/index.ts"
import { TestDatabase } from "./support/database.ts"
import { Ledger } from "./support/ledger.ts"
import {
  allInPlace,
  assertRows,
  databaseUrl,
  now,
  queueLayer,
  rows,
  running,
  untilAllEnded,
  untilValue,
  value,
  withQueue
} from "./support/queue.ts"

class Note extends Job.make("note", { payload: { n: Schema.Number } }) {}
class Mail extends Job.make("mail", { payload: { n: Schema.Number }, queue: "mail" }) {}

const record = (phase: string) => Effect.flatMap(Ledger, ({ record }) => record(phase))
const handlers = [Note.toLayer(() => record("start")), Mail.toLayer(() => record("start"))] as const
const numbers = (count: number) => Array.from({ length: count }, (_, n) => ({ n }))

describe("Worker.runUntilEmpty", () => {
  it.live("starts exactly its limit, from however many queues", () =>
    withQueue(Effect.gen(function*() {
      yield* Note.enqueueAll(numbers(100))
      yield* Mail.enqueueAll(numbers(100))
      let started = 0
      for (const limit of [1, 7, 25, 40]) {
        const { completed } = yield* Worker.runUntilEmpty({ jobs: [Note, Mail], limit }).pipe(
          Effect.provide([...handlers])
        )
        started += limit
        assert.strictEqual(completed, limit)
        assert.strictEqual(yield* value("select count(*)::int from ledger"), started)
        assert.strictEqual(yield* value("select count(*)::int from pgqueue.ready where attempt = 0"), 200 - started)
      }
      yield* allInPlace
    })))

  it.live("fails when it may not claim, and does not try for ever", () =>
    withQueue(Effect.gen(function*() {
      const { name } = yield* TestDatabase
      const role = `role_${name}`
      yield* Effect.acquireRelease(
        rows(`create role ${role} login password 'secret'`),
        () => Effect.ignore(Effect.andThen(rows(`drop owned by ${role}`), rows(`drop role ${role}`)), { log: "Warn" })
      )
      for (
        const what of ["usage on schema", "all on all tables in schema", "execute on all functions in schema"]
      ) yield* rows(`grant ${what} pgqueue to ${role}`)
      const url = new URL(yield* databaseUrl)
      url.username = role
      url.password = "secret"
      const restricted = Layer.fresh(JobQueue.layer({ migrate: false })).pipe(
        Layer.provide(Layer.fresh(PgClient.layer({ url: Redacted.make(url.href) })))
      )
      const run = Worker.runUntilEmpty({ jobs: [Note] }).pipe(Effect.provide([...handlers]), Effect.provide(restricted))
      yield* Note.enqueueAll(numbers(10))
      yield* rows(`revoke delete on pgqueue.ready from ${role}`)
      const fiber = yield* Effect.forkScoped(run)
      const exit = yield* Effect.timeoutOption(Fiber.await(fiber), "15 seconds")
      assert.isTrue(Option.isSome(exit), "it goes on trying")
      if (Option.isSome(exit)) {
        assert.isTrue(Exit.isFailure(exit.value))
        const error = Exit.isFailure(exit.value) ? Cause.squash(exit.value.cause) : undefined
        assert.propertyVal(error, "_tag", "SqlError")
      }
      yield* rows(`grant delete on pgqueue.ready to ${role}`)
      assert.deepStrictEqual(yield* run, { completed: 10, failed: 0 })
    })))
})

describe("handlers that do not end", () => {
  it.live("keep nothing in the buffer behind them, now or later, and another worker gets it", () =>
    withQueue(Effect.gen(function*() {
      class Mixed extends Job.make("mixed", { payload: { slow: Schema.Boolean } }) {}
      const worker = (name: string, slow: Effect.Effect<void>) =>
        Worker.layer({ jobs: [Mixed], name, concurrency: 4, pollInterval: 30_000, gracePeriod: 0 }).pipe(
          Layer.provide(Mixed.toLayer((payload) => payload.slow ? slow : Effect.void))
        )
      // Claimed ahead of the quick ones, the slow ones take every slot in front of what has been claimed.
      const quick = (count: number) => Array.from({ length: count }, () => ({ slow: false }))
      yield* Mixed.enqueueAll([...quick(1500), ...Array.from({ length: 4 }, () => ({ slow: true })), ...quick(1500)])
      yield* running(worker("busy", Effect.never))
      const leased = value("select coalesce(sum(cardinality(ids)), 0)::int from pgqueue.lease")
      yield* untilValue("select (count(*) >= 1500)::text from pgqueue.finished", "true")
      yield* untilValue("select coalesce(sum(cardinality(ids)), 0)::int from pgqueue.lease", 4, { within: 10_000 })
      const waiting = yield* value("select count(*)::int from pgqueue.ready")
      assert.strictEqual(waiting, 1500)
      // It is woken and has no use for it.
      for (let n = 0; n < 20; n++) {
        yield* Mixed.enqueue({ slow: false })
        yield* Effect.sleep(50)
        assert.strictEqual(yield* leased, 4)
      }
      const other = yield* Layer.build(queueLayer())
      yield* running(Layer.provide(worker("idle", Effect.void), Layer.succeedContext(other)))
      yield* untilValue("select count(*)::int from pgqueue.ready", 0, { within: 15_000 })
      yield* untilValue("select count(*)::int from pgqueue.job", 4)
      yield* assertRows("select attempt::int, rescued::int from pgqueue.finished group by 1, 2", [
        { attempt: 1, rescued: 0 }
      ])
      yield* allInPlace
    })))
})

describe("the timeout of a job", () => {
  it.live("does not include what middleware does around the handler", () =>
    withQueue(Effect.gen(function*() {
      class Timed extends Job.make("timed", { timeout: 700, retry: Schedule.recurs(0) }) {}
      const patient = Worker.middleware((run) =>
        Effect.andThen(Effect.sleep(1000), Effect.tap(run, () => Effect.sleep(1000)))
      )
      yield* running(
        Worker.layer({ jobs: [Timed], middleware: [patient] }).pipe(Layer.provide(Timed.toLayer(() => Effect.void)))
      )
      yield* Timed.enqueue()
      yield* untilAllEnded()
      yield* assertRows("select status, attempt::int from pgqueue.finished", [{ status: "completed", attempt: 1 }])
    })))

  it.live("does not let a shutdown wait for a handler that has not stopped at it", () =>
    withQueue(Effect.gen(function*() {
      class Stubborn extends Job.make("stubborn", { timeout: 200 }) {}
      const end = yield* Deferred.make<void>()
      const scope = yield* Scope.make()
      yield* Layer.buildWithScope(
        Layer.fresh(
          Worker.layer({ jobs: [Stubborn], gracePeriod: "20 seconds" }).pipe(
            Layer.provide(
              Stubborn.toLayer(() => Effect.andThen(record("start"), Effect.uninterruptible(Deferred.await(end))))
            )
          )
        ),
        scope
      )
      yield* Stubborn.enqueue()
      yield* untilValue("select count(*)::int from ledger", 1)
      yield* Effect.sleep(800)
      const begun = yield* now
      yield* Scope.close(scope, Exit.void)
      assert.isBelow((yield* now) - begun, 12_000)
      // It keeps its lease, so that nobody starts it as long as it may still run.
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.lease"), 1)
      yield* Deferred.succeed(end, undefined)
    })))
})

describe("a worker that is closed by its own handler", () => {
  it.live("before that handler has come to wait for anything stops it and hands its job back", () =>
    withQueue(Effect.gen(function*() {
      const scope = yield* Scope.make()
      const stop = yield* Deferred.make<void>()
      let interrupted = false
      const handler = Effect.suspend(() => {
        // Whoever waits for this goes on at once, in the middle of this handler.
        Deferred.doneUnsafe(stop, Effect.void)
        return Effect.onInterrupt(Effect.never, () =>
          Effect.sync(() => {
            interrupted = true
          }))
      })
      yield* Layer.buildWithScope(
        Layer.fresh(Worker.layer({ jobs: [Note], gracePeriod: 0 }).pipe(Layer.provide(Note.toLayer(() => handler)))),
        scope
      )
      yield* Note.enqueue({ n: 1 })
      yield* Deferred.await(stop)
      yield* Scope.close(scope, Exit.void)
      assert.isTrue(interrupted)
      yield* assertRows("select attempt::int, rescued::int from pgqueue.job", [{ attempt: 0, rescued: 0 }])
      yield* assertRows("select name from pgqueue.worker", [])
      yield* allInPlace
    })))
})
