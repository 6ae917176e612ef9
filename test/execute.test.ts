/** Waiting for the result of a job, and looking once how it ended. */
import { PgClient } from "@effect/sql-pg"
import { assert, describe, it } from "@effect/vitest"
import {
  Cause,
  Deferred,
  Duration,
  Effect,
  Exit,
  Fiber,
  Layer,
  Option,
  Redacted,
  Schedule,
  Schema,
  Scope
} from "effect"
import { SqlClient } from "effect/sql"
import * as Awaiting from "../src/Awaiting.ts"
import { Admin, Job, JobQueue, Worker } from "../src/index.ts"
import { ownServer } from "./support/database.ts"
import { makeLink } from "./support/link.ts"
import {
  assertRows,
  databaseUrl,
  pollingQueueLayer,
  queueLayer,
  rows,
  running,
  until,
  untilValue,
  value,
  withPolling,
  withQueue
} from "./support/queue.ts"

class Refused extends Schema.TaggedError<Refused>()("Refused", { code: Schema.Finite }) {}

const epoch = new Date(0)

class Answer extends Job.make("answer", {
  payload: { question: Schema.String },
  success: Schema.Struct({ at: Schema.Date, text: Schema.String }),
  error: Refused,
  retry: Schedule.recurs(0)
}) {}

const AnswerHandler = Answer.toLayer(({ question }) => {
  switch (question) {
    case "refuse":
      return new Refused({ code: 7 })
    case "die":
      return Effect.die(new Error("broken"))
    case "cancel":
      return Job.cancel("no longer asked")
    case "discard":
      return Job.discard("a silly question")
    default:
      return Effect.succeed({ at: epoch, text: `${question}!` })
  }
})

/** A worker on a queue and a pool of its own, as in another process; NOTIFY is all that connects it. */
const elsewhere = <E>(worker: Layer.Layer<never, E, JobQueue>) => running(worker.pipe(Layer.provide(queueLayer())))

const answering = elsewhere(Worker.layer({ jobs: [Answer] }).pipe(Layer.provide(AnswerHandler)))

const failureOf = <A, E>(exit: Exit.Exit<A, E>) =>
  Exit.isFailure(exit) ? Option.getOrUndefined(Cause.findErrorOption(exit.cause)) : undefined

describe("execute", () => {
  it.live("returns the typed result of a job that another process runs", () =>
    withQueue(Effect.gen(function*() {
      yield* answering
      assert.deepStrictEqual(yield* Answer.execute({ question: "why" }), { at: epoch, text: "why!" })
      // Well before it would look again by itself.
      const times = yield* Effect.forEach(
        Array.from({ length: 20 }),
        () => Effect.map(Effect.timed(Answer.execute({ question: "when" })), ([took]) => Duration.toMillis(took))
      )
      assert.isBelow(times.toSorted((a, b) => a - b)[10]!, 500)
    })))

  it.live("fails with the typed error, and says how else a job can end", () =>
    withQueue(Effect.gen(function*() {
      yield* answering
      const ended = (question: string) => Effect.map(Effect.exit(Answer.execute({ question })), failureOf)
      const refused = yield* ended("refuse")
      assert.instanceOf(refused, Refused)
      assert.strictEqual((refused as Refused).code, 7)
      const of = (error: unknown) => {
        assert.instanceOf(error, Job.ExecuteError)
        const { message, reason } = error as Job.ExecuteError
        return [reason, message.split("\n")[0]]
      }
      assert.deepStrictEqual(of(yield* ended("cancel")), ["Cancelled", "no longer asked"])
      assert.deepStrictEqual(of(yield* ended("discard")), ["Discarded", "a silly question"])
      const [reason, message] = of(yield* ended("die"))
      assert.strictEqual(reason, "Discarded")
      assert.include(message, "broken")
    })))

  it.live("hears of a job that is cancelled while it waits in line", () =>
    withQueue(Effect.gen(function*() {
      const waiting = yield* Effect.forkChild(Effect.exit(Answer.execute({ question: "x" }, { delay: "1 hour" })))
      yield* untilValue("select count(*)::int from pgqueue.job where awaited", 1)
      const id = yield* value<string>("select id::text from pgqueue.job")
      // From another process.
      yield* Effect.provide(Admin.cancel(id, { reason: "enough" }), queueLayer())
      const error = failureOf(yield* Fiber.join(waiting))
      assert.instanceOf(error, Job.ExecuteError)
      assert.deepInclude(error, { id, reason: "Cancelled", message: "enough" })
    })))

  it.live("stops waiting after `wait`, and the job goes on", () =>
    withQueue(Effect.gen(function*() {
      const error = failureOf(
        yield* Effect.exit(Answer.execute({ question: "slow" }, { delay: "50 millis", wait: "100 millis" }))
      ) as Job.ExecuteError
      assert.strictEqual(error.reason, "WaitTimedOut")
      const { id } = error
      assert.isTrue(Option.isNone(yield* Answer.poll(id)))
      yield* answering
      yield* untilValue("select count(*)::int from pgqueue.finished", 1)
      const end = yield* Answer.poll(id)
      assert.isTrue(Option.isSome(end) && Exit.isSuccess(end.value) && end.value.value.text === "slow!")
    })))

  it.live("is refused inside an open transaction, and enqueues nothing", () =>
    withQueue(Effect.gen(function*() {
      const sql = yield* SqlClient.SqlClient
      const error = failureOf(yield* Effect.exit(sql.withTransaction(Answer.execute({ question: "x" }))))
      assert.deepInclude(error, { _tag: "ExecuteError", reason: "InTransaction" })
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.job"), 0)
    })))

  it.live("refuses a wait that is no duration", () =>
    withQueue(Effect.gen(function*() {
      for (const wait of [NaN, -1]) {
        const error = failureOf(yield* Effect.exit(Answer.execute({ question: "x" }, { wait })))
        assert.deepInclude(error, { _tag: "EnqueueError", reason: "InvalidOption" })
      }
    })))

  it.live("waits for the job that holds its key, though somebody else enqueued it and it runs already", () =>
    withQueue(Effect.gen(function*() {
      const go = yield* Deferred.make<void>()
      let runs = 0
      yield* elsewhere(
        Worker.layer({ jobs: [Answer] }).pipe(Layer.provide(Answer.toLayer(() =>
          Effect.suspend(() => {
            const text = `run ${++runs}`
            return Effect.as(Deferred.await(go), { at: epoch, text })
          })
        )))
      )
      const { id } = yield* Answer.enqueue({ question: "a" }, { unique: "key" })
      yield* until("it runs", Effect.sync(() => runs === 1))
      const waiting = yield* Effect.forkChild(Answer.execute({ question: "b" }, { unique: "key" }))
      yield* untilValue("select awaited from pgqueue.job where id = $1::uuid", true, { params: [id] })
      yield* Deferred.succeed(go, undefined)
      assert.strictEqual((yield* Fiber.join(waiting)).text, "run 1")
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.finished"), 1)
    })))

  it.live("waits no longer than asked for, and with no other error, when that job cannot be marked", () =>
    withQueue(Effect.gen(function*() {
      yield* Answer.enqueue({ question: "a" }, { unique: "key" })
      const link = yield* makeLink(yield* databaseUrl)
      link.loseRequestWith("set awaited = true")
      const execute = Answer.execute({ question: "b" }, { unique: "key", wait: "1 second" })
      const [took, exit] = yield* Effect.timed(Effect.exit(execute)).pipe(
        Effect.provide(Layer.fresh(
          JobQueue.layer().pipe(Layer.provide(PgClient.layer({ url: Redacted.make(link.url) })))
        )),
        Effect.timeout("10 seconds")
      )
      assert.deepInclude(failureOf(exit), { _tag: "ExecuteError", reason: "WaitTimedOut" })
      assert.isBelow(Duration.toMillis(took), 3000)
      assert.strictEqual(link.dead(), 1)
    })))

  it.live("returns at once for an id that has ended", () =>
    withQueue(Effect.gen(function*() {
      yield* answering
      const id = "0190b5a0-0000-7000-8000-000000000001"
      yield* Answer.execute({ question: "one" }, { id })
      assert.strictEqual((yield* Answer.execute({ question: "two" }, { id })).text, "one!")
    })))

  it.live("finds the end by looking when nobody can tell it", () =>
    withQueue(Effect.gen(function*() {
      const waiting = yield* Effect.forkChild(Answer.execute({ question: "x" }))
      yield* untilValue("select count(*)::int from pgqueue.job", 1)
      // Neither a worker nor a person: somebody who writes the end and says nothing.
      yield* rows("delete from pgqueue.ready")
      yield* rows(`with gone as (delete from pgqueue.job returning *)
        insert into pgqueue.finished (id, kind, queue, priority, status, result, attempt, max_attempts, rescued, snoozed, metadata,
          enqueued_at, scheduled_for, payload)
        select id, kind, queue, priority, 'completed', '{"at":"1970-01-01T00:00:00.000Z","text":"found"}', 1, 5, 0, 0, '{}',
          enqueued_at, scheduled_for, payload from gone`)
      assert.strictEqual((yield* Fiber.join(waiting)).text, "found")
    })))

  it.live("says so when the job is deleted while it waits", () =>
    withQueue(Effect.gen(function*() {
      const waiting = yield* Effect.forkChild(Effect.exit(Answer.execute({ question: "x" })))
      yield* untilValue("select count(*)::int from pgqueue.job", 1)
      yield* rows("delete from pgqueue.ready")
      yield* rows("delete from pgqueue.job")
      assert.deepInclude(failureOf(yield* Fiber.join(waiting)), { _tag: "ExecuteError", reason: "Pruned" })
    })))

  it.live("ends with its wait, though the link is dead when it asks for the end of somebody else's job", () =>
    withQueue(Effect.gen(function*() {
      const link = yield* makeLink(yield* databaseUrl)
      const queue = Layer.fresh(
        Layer.provideMerge(JobQueue.layer(), PgClient.layer({ url: Redacted.make(link.url), maxConnections: 3 }))
      )
      yield* Answer.enqueue({ question: "a" }, { unique: "key" })
      link.loseRequestWith("set awaited = true")
      const context = yield* Layer.build(queue)
      const exit = yield* Answer.execute({ question: "b" }, { unique: "key", wait: "1 second" }).pipe(
        Effect.provideContext(context),
        Effect.exit,
        Effect.timeout("6 seconds")
      )
      assert.deepInclude(failureOf(exit), { _tag: "ExecuteError", reason: "WaitTimedOut" })
      assert.strictEqual(link.dead(), 1)
    })))

  it.live("gets its result though nobody can be told: the server's queue of notifications is full", () =>
    Effect.scoped(Effect.gen(function*() {
      // PostgreSQL 17 and newer can be given a small one.
      const server = yield* ownServer({ version: "18", settings: { max_notify_queue_pages: 64 } })
      yield* withQueue(
        Effect.gen(function*() {
          yield* answering
          // Somebody listens, sleeps in a transaction, and keeps everything that is announced.
          const sql = yield* SqlClient.SqlClient
          const session = yield* sql.reserve
          for (const text of ["listen other", "begin", "select 1"]) {
            yield* session.executeUnprepared(text, [], undefined)
          }
          const fill = rows("select pg_notify('other', clock_timestamp() || repeat('x', 7900))::text")
          assert.isTrue(Exit.isFailure(yield* Effect.exit(Effect.forever(fill))))
          assert.strictEqual((yield* Answer.execute({ question: "still" })).text, "still!")
          yield* assertRows("select status, attempt::int from pgqueue.finished", [{ status: "completed", attempt: 1 }])
          yield* session.executeUnprepared("rollback", [], undefined)
        }),
        { serverUrl: server.url }
      )
    })))

  it.live("is interrupted when its layer closes, whether it has begun to wait or is about to", () =>
    withQueue(Effect.gen(function*() {
      const { internal } = yield* JobQueue
      const scope = yield* Scope.make()
      const awaiting = yield* Scope.provide(Awaiting.make(internal.store, internal.wakeup), scope)
      const { id } = yield* Answer.enqueue({ question: "never" })
      const wait = Effect.scoped(Effect.flatMap(awaiting.open(id), ({ ended }) => ended(false)))
      const early = yield* Effect.forkChild(wait, { startImmediately: true })
      yield* Scope.close(scope, Exit.void)
      for (const end of [Fiber.await(early), Effect.exit(wait)]) {
        const exit = yield* Effect.timeout(end, "5 seconds")
        assert.isTrue(Exit.isFailure(exit) && Cause.hasInterruptsOnly(exit.cause))
      }
    })))

  it.live("works by polling alone", () =>
    withPolling(Effect.gen(function*() {
      yield* running(
        Worker.layer({ jobs: [Answer] }).pipe(Layer.provide(AnswerHandler), Layer.provide(pollingQueueLayer()))
      )
      assert.strictEqual((yield* Answer.execute({ question: "poll" })).text, "poll!")
    })))
})

describe("poll", () => {
  it.live("tells what has become of a job, and that there is none", () =>
    withQueue(Effect.gen(function*() {
      const { id } = yield* Answer.enqueue({ question: "later" })
      assert.isTrue(Option.isNone(yield* Answer.poll(id)))
      for (const nobody of ["0190b5a0-0000-7000-8000-000000000009", "no id"]) {
        const end = Option.getOrThrow(yield* Answer.poll(nobody))
        assert.deepInclude(failureOf(end), { _tag: "ExecuteError", reason: "Pruned" })
      }
      yield* Admin.cancel(id)
      assert.deepInclude(failureOf(Option.getOrThrow(yield* Answer.poll(id))), { reason: "Cancelled" })
      // A job of another kind is not one of these, whatever its result looks like; one under an old name is.
      class Other extends Job.make("other") {}
      class Renamed extends Job.make("renamed", { aliases: ["answer"] }) {}
      assert.deepInclude(failureOf(Option.getOrThrow(yield* Other.poll(id))), { reason: "Pruned" })
      assert.deepInclude(failureOf(yield* Effect.exit(Other.execute(undefined, { id }))), { reason: "Pruned" })
      assert.deepInclude(failureOf(Option.getOrThrow(yield* Renamed.poll(id))), { reason: "Cancelled" })
    })))

  it.live("sees what the transaction around it has enqueued, as Admin does, with its one connection", () =>
    withPolling(
      Effect.gen(function*() {
        const sql = yield* SqlClient.SqlClient
        yield* sql.withTransaction(Effect.gen(function*() {
          const { id } = yield* Answer.enqueue({ question: "later" })
          assert.isTrue(Option.isNone(yield* Answer.poll(id)))
          assert.isTrue(Option.isSome(yield* Admin.get(id)))
          yield* Admin.cancel(id)
          assert.deepInclude(failureOf(Option.getOrThrow(yield* Answer.poll(id))), { reason: "Cancelled" })
          assert.strictEqual(yield* Admin.redrive(), 0)
          assert.strictEqual((yield* Effect.flatMap(JobQueue, ({ stats }) => stats))[0]?.cancelled, 1)
        }))
      }).pipe(Effect.timeout("10 seconds")),
      { maxConnections: 1 }
    ))

  it.live("is a defect when the stored result no longer fits", () =>
    withQueue(Effect.gen(function*() {
      yield* answering
      const { id } = yield* Answer.enqueue({ question: "x" })
      yield* untilValue("select count(*)::int from pgqueue.finished", 1)
      yield* rows(`update pgqueue.finished set result = '{"text":1}'`)
      const end = Option.getOrThrow(yield* Answer.poll(id))
      assert.isTrue(Exit.isFailure(end) && Cause.hasDies(end.cause))
    })))
})
