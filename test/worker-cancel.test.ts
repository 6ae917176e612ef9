/** Jobs that are cancelled from outside, wherever they are, and runs that are stopped from a fiber of their own. */
import { assert, describe, it } from "@effect/vitest"
import { Deferred, Effect, Fiber, Layer, Option, Schedule } from "effect"
import { SqlClient } from "effect/sql"
import { Admin, Job, type JobQueue, Worker } from "../src/index.ts"
import {
  allInPlace,
  assertRows,
  now,
  pollingQueueLayer,
  queueLayer,
  rows,
  running,
  until,
  untilAllEnded,
  untilValue,
  value,
  withPolling,
  withQueue
} from "./support/queue.ts"

class Long extends Job.make("long", { retry: Schedule.recurs(0) }) {}

/** A worker in a process of its own, so to speak, whose heartbeat alone would come far too late. */
const working = <E, R>(handler: Effect.Effect<void, never, Job.Current | R>, queue: Layer.Layer<JobQueue, E, R>) =>
  running(
    Worker.layer({ jobs: [Long], heartbeat: "20 seconds", lease: "60 seconds" }).pipe(
      Layer.provide(Long.toLayer(() => handler)),
      Layer.provide(queue)
    )
  )

const leased = untilValue("select count(*)::int from pgqueue.lease", 1)

describe("a job that is cancelled", () => {
  it.live("while it waits has ended and never starts", () =>
    withQueue(Effect.gen(function*() {
      let runs = 0
      const { id } = yield* Long.enqueue(undefined, { unique: "key" })
      const later = yield* Long.enqueue(undefined, { delay: "1 hour" })
      assert.strictEqual(yield* Admin.cancel(id, { reason: "a\0b" }), "cancelled")
      assert.strictEqual(yield* Admin.cancel(later.id.toUpperCase()), "cancelled")
      yield* working(Effect.sync(() => void runs++), queueLayer())
      // Its key is free.
      const { status } = yield* Long.enqueue(undefined, { unique: "key" })
      assert.strictEqual(status, "inserted")
      yield* untilAllEnded()
      assert.strictEqual(runs, 1)
      yield* assertRows("select status, reason, attempt::int from pgqueue.finished order by status, reason", [
        { status: "cancelled", reason: "a\ufffdb", attempt: 0 },
        { status: "cancelled", reason: null, attempt: 0 },
        { status: "completed", reason: null, attempt: 1 }
      ])
      yield* allInPlace
    })))

  it.live("while it runs in another process is interrupted there within a second", () =>
    withQueue(Effect.gen(function*() {
      const interrupted = yield* Deferred.make<void>()
      yield* working(Effect.onInterrupt(Effect.never, () => Deferred.succeed(interrupted, undefined)), queueLayer())
      const { id } = yield* Long.enqueue()
      yield* leased
      const begun = yield* now
      assert.strictEqual(yield* Admin.cancel(id, { reason: "enough" }), "cancelling")
      yield* Deferred.await(interrupted)
      // It was told: a beat comes every 20 s.
      assert.isBelow((yield* now) - begun, 5000)
      yield* untilAllEnded()
      yield* assertRows("select status, reason from pgqueue.finished", [{ status: "cancelled", reason: "enough" }])
    })))

  it.live("while it runs where nobody can LISTEN is interrupted within a poll", () =>
    withPolling(Effect.gen(function*() {
      const interrupted = yield* Deferred.make<void>()
      yield* working(
        Effect.onInterrupt(Effect.never, () => Deferred.succeed(interrupted, undefined)),
        pollingQueueLayer()
      )
      const { id } = yield* Long.enqueue()
      yield* leased
      const begun = yield* now
      yield* Admin.cancel(id)
      yield* Deferred.await(interrupted)
      // A poll is a second, and the machine may be busy.
      assert.isBelow((yield* now) - begun, 5000)
      yield* untilAllEnded()
    })))

  it.live("while it waits in the buffer of a worker is not started", () =>
    withQueue(Effect.gen(function*() {
      const gate = yield* Deferred.make<void>()
      const ran: Array<string> = []
      yield* working(
        Effect.gen(function*() {
          ran.push((yield* Job.Current).id)
          yield* Deferred.await(gate)
        }),
        queueLayer()
      )
      const ids = yield* Effect.forEach(Array.from({ length: 10 }), () => Long.enqueue())
      yield* until("the slots are full", Effect.sync(() => ran.length === 10))
      const { id } = yield* Long.enqueue()
      yield* Admin.cancel(id)
      yield* Deferred.succeed(gate, undefined)
      yield* untilAllEnded()
      assert.sameMembers(ran, ids.map(({ id }) => id))
      yield* assertRows("select id::text from pgqueue.finished where status = 'cancelled'", [{ id }])
    })))

  it.live("and completes before its worker hears of it has completed", () =>
    withQueue(Effect.gen(function*() {
      const started = yield* Deferred.make<void>()
      const gate = yield* Deferred.make<void>()
      yield* working(Effect.andThen(Deferred.succeed(started, undefined), Deferred.await(gate)), queueLayer())
      const { id } = yield* Long.enqueue()
      yield* Deferred.await(started)
      // What a cancel writes, told to nobody: the next heartbeat is far away.
      yield* rows("update pgqueue.job set cancelled_at = clock_timestamp(), cancel_reason = 'too late'")
      const details = Option.getOrThrow(yield* Admin.get(id))
      assert.deepInclude(details, { status: "running", cancelling: true })
      yield* Deferred.succeed(gate, undefined)
      yield* untilAllEnded()
      yield* assertRows("select status, reason from pgqueue.finished", [{ status: "completed", reason: null }])
    })))

  it.live("and cannot be interrupted ends as cancelled, when it ends", () =>
    withQueue(Effect.gen(function*() {
      const started = yield* Deferred.make<void>()
      const gate = yield* Deferred.make<void>()
      yield* working(
        Effect.uninterruptible(Effect.andThen(Deferred.succeed(started, undefined), Deferred.await(gate))),
        queueLayer()
      )
      const { id } = yield* Long.enqueue()
      yield* Deferred.await(started)
      const before = yield* value<string>("select max(beat_at)::text from pgqueue.worker")
      assert.strictEqual(yield* Admin.cancel(id, { reason: "enough" }), "cancelling")
      // The heartbeat that brings the mark has been answered when the next one is sent.
      for (let beat = 0; beat < 2; beat++) {
        const since = beat === 0 ? before : yield* value<string>("select max(beat_at)::text from pgqueue.worker")
        if (beat === 1) yield* Admin.cancel(id)
        yield* untilValue("select max(beat_at) > $1::timestamptz from pgqueue.worker", true, { params: [since] })
      }
      yield* Deferred.succeed(gate, undefined)
      yield* untilAllEnded()
      yield* assertRows("select status, reason from pgqueue.finished", [{ status: "cancelled", reason: "enough" }])
    })))

  it.live("in a transaction that rolls back goes on, and nobody hears of it", () =>
    withQueue(Effect.gen(function*() {
      const sql = yield* SqlClient.SqlClient
      const gate = yield* Deferred.make<void>()
      let interrupted = false
      yield* working(
        Effect.onInterrupt(Deferred.await(gate), () =>
          Effect.sync(() => {
            interrupted = true
          })),
        queueLayer()
      )
      const { id } = yield* Long.enqueue()
      yield* leased
      const exit = yield* Effect.exit(sql.withTransaction(Effect.andThen(Admin.cancel(id), Effect.fail("no"))))
      assert.strictEqual(exit._tag, "Failure")
      yield* Deferred.succeed(gate, undefined)
      yield* untilAllEnded()
      assert.isFalse(interrupted)
      yield* assertRows("select status from pgqueue.finished", [{ status: "completed" }])
    })))

  it.live("by a transaction that saw it elsewhere does not start", () =>
    withQueue(Effect.gen(function*() {
      const sql = yield* SqlClient.SqlClient
      const { id } = yield* Long.enqueue()
      // A worker holds it, and hands it back unchanged after the snapshot of the transaction was taken.
      yield* rows(`with line as (delete from pgqueue.ready returning id)
        insert into pgqueue.lease (id, worker, ids) select gen_random_uuid(), gen_random_uuid(), array[id] from line`)
      yield* sql.withTransaction(Effect.gen(function*() {
        yield* sql`set transaction isolation level repeatable read`
        yield* sql`select 1 from pgqueue.job`
        yield* rows(`with held as (delete from pgqueue.lease returning ids[1] as id)
          insert into pgqueue.ready (queue, lane, run_at, id, kind, attempt)
          select j.queue, j.priority, j.run_at, j.id, j.kind, j.attempt from pgqueue.job j join held using (id)`)
        assert.strictEqual(yield* Admin.cancel(id), "cancelling")
      }))
      let runs = 0
      yield* working(Effect.sync(() => void runs++), queueLayer())
      yield* untilAllEnded()
      yield* assertRows("select status, attempt::int from pgqueue.finished", [{ status: "cancelled", attempt: 0 }])
      assert.strictEqual(runs, 0)
    })))

  it.live("beside many others that somebody has locked holds up nobody else", () =>
    withQueue(Effect.gen(function*() {
      const sql = yield* SqlClient.SqlClient
      class Echo extends Job.make("echo") {}
      yield* running(Worker.layer({ jobs: [Echo] }).pipe(Layer.provide(Echo.toLayer(() => Effect.void))))
      const jobs = yield* Long.enqueueAll(Array.from({ length: 20 }, () => undefined))
      const [locked, end] = [yield* Deferred.make<void>(), yield* Deferred.make<void>()]
      yield* Effect.forkChild(sql.withTransaction(
        Effect.forEach(jobs, ({ id }) => Admin.cancel(id)).pipe(
          Effect.andThen(Deferred.succeed(locked, undefined)),
          Effect.andThen(Deferred.await(end))
        )
      ))
      yield* Deferred.await(locked)
      const others = yield* Effect.forkChild(
        Effect.forEach(jobs, ({ id }) => Effect.exit(Admin.cancel(id)), { concurrency: "unbounded" })
      )
      yield* untilValue(
        "select count(*)::int > 0 from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()",
        true
      )
      // An enqueue, a claim and a settle, all of them through the pool that those wait in.
      yield* Effect.timeout(Echo.execute(), "4 seconds")
      yield* Deferred.succeed(end, undefined)
      yield* Fiber.join(others)
    })))

  it.live("again and again by forged announcements goes on", () =>
    withQueue(Effect.gen(function*() {
      const gate = yield* Deferred.make<void>()
      yield* working(Deferred.await(gate), queueLayer())
      const { id } = yield* Long.enqueue()
      yield* leased
      for (let n = 0; n < 200; n++) {
        yield* rows("select pg_notify('effect_pgqueue_pgqueue', 'cancel ' || $1)::text", [id])
      }
      yield* rows("select pg_notify('effect_pgqueue_pgqueue', 'cancel 0190b5a0-0000-7000-8000-000000000001')::text")
      yield* Deferred.succeed(gate, undefined)
      yield* untilAllEnded()
      yield* assertRows("select status from pgqueue.finished", [{ status: "completed" }])
    })))

  it.live("a hundred times at any moment ends each time, as cancelled or as completed", () =>
    withQueue(Effect.gen(function*() {
      yield* working(Effect.sleep(3), queueLayer())
      const ends = yield* Effect.forEach(Array.from({ length: 100 }, (_, n) => n), (n) =>
        Effect.gen(function*() {
          const { id } = yield* Long.enqueue()
          yield* Effect.sleep(n % 10)
          return yield* Effect.exit(Admin.cancel(id))
        }), { concurrency: 4 })
      yield* untilAllEnded()
      const late = ends.filter((end) => end._tag === "Failure").length
      const cancelled = yield* value("select count(*)::int from pgqueue.finished where status = 'cancelled'")
      const completed = yield* value("select count(*)::int from pgqueue.finished where status = 'completed'")
      assert.strictEqual(cancelled + completed, 100)
      assert.isAtLeast(completed, late)
      yield* allInPlace
    })))
})

describe("Job.cancel, Job.discard and Job.snooze in a fiber that the handler has forked", () => {
  const stops = [
    ["cancel", Job.cancel("x"), "cancelled"],
    ["discard", Job.discard("x"), "discarded"]
  ] as const
  const forks: ReadonlyArray<
    readonly [string, (stop: Effect.Effect<never, never, Job.Current>) => Effect.Effect<unknown, never, Job.Current>]
  > = [
    ["that nobody joins", (stop) => Effect.andThen(Effect.forkChild(stop), Effect.never)],
    ["that is detached", (stop) => Effect.andThen(Effect.forkDetach(stop), Effect.never)],
    ["that lost a race", (stop) => Effect.race(Effect.andThen(Effect.sleep(10), stop), Effect.never)],
    [
      "whose end is looked at",
      (stop) => Effect.andThen(Effect.flatMap(Effect.forkChild(stop), Fiber.await), Effect.never)
    ]
  ]
  for (const [where, fork] of forks) {
    it.live(`${where} stop the run`, () =>
      withQueue(Effect.gen(function*() {
        let handler: Effect.Effect<unknown, never, Job.Current> = Effect.void
        yield* working(Effect.suspend(() => Effect.asVoid(handler)), queueLayer())
        for (const [, stop, status] of stops) {
          handler = fork(stop)
          const { id } = yield* Long.enqueue()
          yield* untilAllEnded()
          yield* assertRows("select status, reason from pgqueue.finished where id = $1::uuid", [{
            status,
            reason: "x"
          }], [id])
        }
        let runs = 0
        handler = Effect.suspend(() => ++runs < 3 ? fork(Job.snooze(10)) : Effect.void)
        const { id } = yield* Long.enqueue()
        yield* untilAllEnded()
        yield* assertRows(
          "select status, snoozed::int from pgqueue.finished where id = $1::uuid",
          [{ status: "completed", snoozed: 2 }],
          [id]
        )
      })))
  }

  it.live("that lives longer than the run change nothing", () =>
    withQueue(Effect.gen(function*() {
      const gate = yield* Deferred.make<void>()
      const done = yield* Deferred.make<void>()
      yield* working(
        Effect.asVoid(Effect.forkDetach(
          Effect.ensuring(Effect.andThen(Deferred.await(gate), Job.cancel("late")), Deferred.succeed(done, undefined))
        )),
        queueLayer()
      )
      yield* Long.enqueue()
      yield* untilAllEnded()
      yield* Deferred.succeed(gate, undefined)
      yield* Deferred.await(done)
      yield* Long.enqueue()
      yield* untilAllEnded()
      yield* assertRows("select distinct status from pgqueue.finished", [{ status: "completed" }])
    })))
})
