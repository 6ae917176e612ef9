/** A unique key has one holder, whoever asks for it at the same time, and a transaction that holds one stops nobody else. */
import { assert, describe, it } from "@effect/vitest"
import { Context, Deferred, Effect, Exit, Fiber, Layer, Schema } from "effect"
import { SqlClient } from "effect/sql"
import { Job, JobQueue, Worker } from "../src/index.ts"
import { long } from "./support/long.ts"
import {
  allInPlace,
  assertRows,
  now,
  quantile,
  queueLayer,
  rows,
  running,
  untilAllEnded,
  value,
  withQueue
} from "./support/queue.ts"

class Visit extends Job.make("visit", { payload: { key: Schema.String }, unique: ({ key }) => key }) {}
class Plain extends Job.make("plain") {}

class Undo extends Schema.TaggedError<Undo>()("Undo", {}) {}

/** Queues of their own, on pools of their own. */
const processes = (count: number) =>
  Effect.forEach(Array.from({ length: count }), () =>
    Effect.map(
      Layer.build(queueLayer({ pool: { maxConnections: 8 } })),
      (context) => Context.pick(JobQueue, SqlClient.SqlClient)(context)
    ))

describe("64 clients on 100 unique keys", () => {
  const total = long ? 50_000 : 15_000

  it.live(
    `leave one holder a key after ${total} enqueues, and tell each loser who it is`,
    () =>
      withQueue(Effect.gen(function*() {
        const queues = yield* processes(6)
        const holders = new Map<string, Set<string>>()
        let lost = 0
        const note = (key: string, id: string) => {
          holders.set(key, (holders.get(key) ?? new Set()).add(id))
        }
        const client = Effect.fnUntraced(function*(c: number) {
          const sql = yield* SqlClient.SqlClient
          for (let n = c; n < total; n += 64) {
            const key = `key ${(n + Math.floor(n / 100)) % 100}`
            const enqueue = Visit.enqueue({ key })
            // Every tenth enqueue in a transaction, and half of these roll back.
            if (n % 10 === 3 && n % 20 === 3) {
              yield* Effect.ignore(sql.withTransaction(Effect.andThen(enqueue, Effect.fail(new Undo()))))
              lost++
            } else {
              const { id } = yield* n % 10 === 3 ? sql.withTransaction(enqueue) : enqueue
              note(key, id)
            }
          }
        })
        yield* Effect.forEach(
          Array.from({ length: 64 }, (_, c) => c),
          (c) => Effect.provideContext(client(c), queues[c % queues.length]!),
          { concurrency: "unbounded", discard: true }
        )
        assert.isAbove(lost, 0)
        yield* assertRows(
          "select count(*)::int as jobs, count(distinct payload ->> 'key')::int as keys from pgqueue.job",
          [
            { jobs: 100, keys: 100 }
          ]
        )
        const live = new Map(
          (yield* rows<{ key: string; id: string }>("select payload ->> 'key' as key, id::text from pgqueue.job"))
            .map(({ id, key }) => [key, id])
        )
        for (const [key, ids] of holders) assert.deepStrictEqual([...ids], [live.get(key)], key)
        yield* allInPlace
      })),
    180_000
  )

  it.live(
    "never have two holders at once while workers end them as fast as they come",
    () =>
      withQueue(Effect.gen(function*() {
        const queues = yield* processes(3)
        const holding = new Map<string, string>()
        const doubles: Array<string> = []
        const VisitHandler = Visit.toLayer(({ key }) =>
          Effect.gen(function*() {
            const { id } = yield* Job.Current
            const other = holding.get(key)
            if (other !== undefined) doubles.push(`${key}: ${other} and ${id}`)
            holding.set(key, id)
            yield* Effect.sleep(2)
            holding.delete(key)
          })
        )
        for (const queue of queues) {
          yield* running(
            Worker.layer({ jobs: [Visit], concurrency: 20 }).pipe(
              Layer.provide(VisitHandler),
              Layer.provide(Layer.succeedContext(queue))
            )
          )
        }
        const outcomes = yield* Effect.forEach(
          Array.from({ length: 4000 }, (_, n) => n),
          (n) => Effect.provideContext(Visit.enqueue({ key: `key ${n % 20}` }), queues[n % 3]!),
          { concurrency: 64 }
        )
        yield* untilAllEnded({ within: 30_000 })
        assert.deepStrictEqual(doubles, [])
        const inserted = outcomes.filter(({ status }) => status === "inserted").map(({ id }) => id)
        const finished = (yield* rows<{ id: string }>("select id::text from pgqueue.finished order by 1")).map((
          { id }
        ) => id)
        assert.deepStrictEqual(finished, inserted.toSorted())
        // Whoever lost, lost to a job that was really there.
        const there = new Set(finished)
        assert.isTrue(outcomes.every(({ id }) => there.has(id)))
        yield* allInPlace
      })),
    90_000
  )
})

describe("a transaction that has taken a key and does not end", () => {
  it.live("delays nobody who wants other keys or none", () =>
    withQueue(Effect.gen(function*() {
      const sql = yield* SqlClient.SqlClient
      const taken = yield* Deferred.make<void>()
      const end = yield* Deferred.make<void>()
      const transaction = yield* Effect.forkChild(sql.withTransaction(
        Visit.enqueue({ key: "held" }).pipe(
          Effect.andThen(Deferred.succeed(taken, undefined)),
          Effect.andThen(Deferred.await(end)),
          Effect.andThen(Effect.fail(new Undo()))
        )
      ))
      yield* Deferred.await(taken)
      const waiting = yield* Effect.forEach([1, 2, 3], () => Effect.forkChild(Visit.enqueue({ key: "held" })))
      const measured: Array<number> = []
      const measure = <A, E, R>(self: Effect.Effect<A, E, R>) =>
        Effect.gen(function*() {
          const begun = yield* now
          yield* self
          measured.push((yield* now) - begun)
        })
      for (let n = 0; n < 60; n++) {
        yield* Effect.all([measure(Visit.enqueue({ key: `free ${n}` })), measure(Plain.enqueue())], {
          concurrency: "unbounded"
        })
      }
      assert.isTrue(waiting.every((fiber) => fiber.pollUnsafe() === undefined), "they wait for the key")
      assert.isBelow(quantile(measured, 0.95), 250, `${measured.map(Math.round).join(" ")}`)
      yield* Deferred.succeed(end, undefined)
      assert.isTrue(Exit.isFailure(yield* Fiber.await(transaction)))
      const enqueued = yield* Effect.forEach(waiting, Fiber.join)
      assert.deepStrictEqual(enqueued.map(({ status }) => status).toSorted(), ["existing", "existing", "inserted"])
      assert.lengthOf([...new Set(enqueued.map(({ id }) => id))], 1)
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.job where payload ->> 'key' = 'held'"), 1)
    })))
})
