/** What a handler says of its job while it runs. */
import { assert, describe, it } from "@effect/vitest"
import { Deferred, Effect, Fiber, Layer, Option, Schedule, Schema } from "effect"
import { SqlClient } from "effect/sql"
import { Admin, Job, Worker } from "../src/index.ts"
import { assertRows, now, rows, running, until, untilAllEnded, withPolling, withQueue } from "./support/queue.ts"

class Import extends Job.make("import", { retry: Schedule.spaced(10), maxAttempts: 3 }) {}

const working = (
  handler: Effect.Effect<void, never, Job.Current>,
  options?: Job.HandlerOptions & { readonly heartbeat?: number; readonly lease?: number }
) => running(Worker.layer({ ...options, jobs: [Import] }).pipe(Layer.provide(Import.toLayer(() => handler, options))))

const progressOf = (id: string) =>
  Effect.map(Admin.get(id), (job) => Option.getOrUndefined(Option.flatMap(job, ({ progress }) => progress)))

describe("Job.progress", () => {
  const readable = (transactional: boolean) =>
    Effect.gen(function*() {
      const said = yield* Deferred.make<void>()
      const [say, go] = [yield* Deferred.make<void>(), yield* Deferred.make<void>()]
      yield* working(
        Effect.gen(function*() {
          yield* Deferred.await(say)
          yield* Job.progress(1)
          yield* Job.progress({ page: 2, of: [3, null] })
          yield* Deferred.succeed(said, undefined)
          yield* Deferred.await(go)
        }),
        { transactional }
      )
      const { id } = yield* Import.enqueue()
      assert.isUndefined(yield* progressOf(id))
      yield* Deferred.succeed(say, undefined)
      yield* Deferred.await(said)
      assert.deepStrictEqual(yield* progressOf(id), { page: 2, of: [3, null] })
      yield* Deferred.succeed(go, undefined)
      yield* untilAllEnded()
      // It stays with the finished job.
      assert.deepStrictEqual(yield* progressOf(id), { page: 2, of: [3, null] })
    })
  it.live("can be read from outside at once", () => withQueue(readable(false)))
  it.live("can be read from outside at once, though its handler is in a transaction", () => withQueue(readable(true)))
  it.live("can be read from outside at once, over a client that cannot LISTEN", () => withPolling(readable(true)))

  it.live("survives a retry, and the next attempt knows it", () =>
    withQueue(Effect.gen(function*() {
      const seen: Array<unknown> = []
      yield* working(Effect.gen(function*() {
        const { attempt, progress } = yield* Job.Current
        seen.push(Option.getOrUndefined(progress))
        yield* Job.progress(attempt)
        if (attempt < 3) return yield* Effect.die("again")
      }))
      const { id } = yield* Import.enqueue()
      yield* untilAllEnded()
      assert.deepStrictEqual(seen, [undefined, 1, 2])
      assert.strictEqual(yield* progressOf(id), 3)
      yield* Admin.retry(id)
      yield* until("it runs again", Effect.sync(() => seen.length === 4))
      assert.strictEqual(seen[3], 3)
      yield* untilAllEnded()
    })))

  const bad: ReadonlyArray<readonly [string, unknown]> = [
    ["NUL", "a\0"],
    ["a bigint", 1n],
    ["NaN", NaN],
    ["a class", new Date()],
    ["more than 64 KiB", "x".repeat(65_537)]
  ]
  it.live("that JSON or the storage cannot hold is a failed attempt", () =>
    withQueue(Effect.gen(function*() {
      for (const [what, value] of bad) {
        class Bad extends Job.make(what, { maxAttempts: 1 }) {}
        yield* Effect.scoped(Effect.gen(function*() {
          yield* running(
            // Sound: the compiler would refuse it; a program may have it from anywhere.
            Worker.layer({ jobs: [Bad] }).pipe(Layer.provide(Bad.toLayer(() => Job.progress(value as Schema.Json))))
          )
          const { id } = yield* Bad.enqueue()
          yield* untilAllEnded()
          yield* assertRows(
            "select status, error ->> 'tag' as tag, progress from pgqueue.finished where id = $1::uuid",
            [{ status: "discarded", tag: "Defect", progress: null }],
            [id]
          )
        }))
      }
    })))

  it.live("of a run that has lost its job is not written", () =>
    withQueue(Effect.gen(function*() {
      const started = yield* Deferred.make<void>()
      const go = yield* Deferred.make<void>()
      const said = yield* Deferred.make<void>()
      yield* working(Effect.uninterruptible(Effect.gen(function*() {
        yield* Job.progress("mine")
        yield* Deferred.succeed(started, undefined)
        yield* Deferred.await(go)
        yield* Job.progress("a zombie's")
        yield* Deferred.succeed(said, undefined)
      })))
      const { id } = yield* Import.enqueue()
      yield* Deferred.await(started)
      yield* rows("update pgqueue.lease set id = gen_random_uuid()")
      yield* Deferred.succeed(go, undefined)
      yield* Deferred.await(said)
      assert.strictEqual(yield* progressOf(id), "mine")
    })))

  it.live("of jobs that somebody has locked holds up no other job of the worker", () =>
    withQueue(Effect.gen(function*() {
      class Echo extends Job.make("echo", { payload: { n: Schema.Finite }, success: Schema.Finite }) {}
      const count = 20
      const [locked, end] = [yield* Deferred.make<void>(), yield* Deferred.make<void>()]
      const ran = new Set<string>()
      const said = new Set<string>()
      const importing = Effect.gen(function*() {
        const { id } = yield* Job.Current
        ran.add(id)
        yield* Deferred.await(locked)
        return yield* Effect.forever(Effect.andThen(Effect.sync(() => said.add(id)), Job.progress(1)))
      })
      yield* running(
        Worker.layer({ jobs: [Import, Echo], concurrency: 50, gracePeriod: 0 }).pipe(
          Layer.provide([Import.toLayer(() => importing), Echo.toLayer(({ n }) => Effect.succeed(n))])
        )
      )
      yield* Import.enqueueAll(Array.from({ length: count }, () => undefined))
      yield* until("they run", Effect.sync(() => ran.size === count))
      const sql = yield* SqlClient.SqlClient
      const holder = yield* sql`select 1 from pgqueue.job for update`.pipe(
        Effect.andThen(Deferred.succeed(locked, undefined)),
        Effect.andThen(Deferred.await(end)),
        sql.withTransaction,
        Effect.forkChild
      )
      yield* until("all say something", Effect.sync(() => said.size === count))
      for (let n = 0; n < 5; n++) {
        const begun = yield* now
        assert.strictEqual(yield* Echo.execute({ n }), n)
        assert.isBelow((yield* now) - begun, 3000)
      }
      yield* Deferred.succeed(end, undefined)
      yield* Fiber.join(holder)
    })))

  it.live("is given up after five seconds, and the handler goes on", () =>
    withQueue(Effect.gen(function*() {
      const sql = yield* SqlClient.SqlClient
      const started = yield* Deferred.make<void>()
      const go = yield* Deferred.make<void>()
      const said = yield* Deferred.make<void>()
      yield* working(Effect.gen(function*() {
        yield* Deferred.succeed(started, undefined)
        yield* Deferred.await(go)
        yield* Job.progress(1)
        yield* Deferred.succeed(said, undefined)
      }))
      const { id } = yield* Import.enqueue()
      yield* Deferred.await(started)
      // Somebody holds the row of the job for longer than that.
      yield* sql.withTransaction(Effect.gen(function*() {
        yield* sql`select 1 from pgqueue.job where id = ${id}::uuid for update`
        yield* Deferred.succeed(go, undefined)
        yield* Deferred.await(said)
      }))
      yield* untilAllEnded()
      yield* assertRows("select status from pgqueue.finished", [{ status: "completed" }])
    })))
})
