/** Concurrent enqueues travel together; what is wrong with one is no concern of the others, and a lost answer is asked for again. */
import { PgClient } from "@effect/sql-pg"
import { assert, describe, it } from "@effect/vitest"
import { Context, Effect, Exit, Layer, Redacted, Schema } from "effect"
import { SqlClient } from "effect/sql"
import { Job, JobQueue } from "../src/index.ts"
import { makeProxy } from "./support/proxy.ts"
import { allInPlace, assertRows, databaseUrl, rows, value, withQueue } from "./support/queue.ts"

class Note extends Job.make("note", { payload: { n: Schema.Number } }) {}
class Visit extends Job.make("visit", { payload: { n: Schema.Number }, unique: ({ n }) => `key ${n}` }) {}

const numbers = (count: number) => Array.from({ length: count }, (_, n) => n)

/** A queue whose sessions go through a proxy. */
const behindProxy = Effect.gen(function*() {
  const proxy = yield* makeProxy(yield* databaseUrl)
  const PgLive = PgClient.layer({ url: Redacted.make(proxy.url), maxConnections: 3 })
  const context = yield* Layer.build(Layer.fresh(Layer.provideMerge(JobQueue.layer(), PgLive)))
  return { proxy, queue: Context.pick(JobQueue, SqlClient.SqlClient)(context) }
})

describe("a bad neighbour in a group of enqueues", () => {
  for (const [what, definition] of [["without keys", Note], ["with keys", Visit]] as const) {
    it.live(`fails alone, ${what}`, () =>
      withQueue(Effect.gen(function*() {
        yield* rows("alter table pgqueue.job add constraint no_sevens check ((payload ->> 'n')::int % 100 <> 7)")
        const exits = yield* Effect.forEach(numbers(1000), (n) => Effect.exit(definition.enqueue({ n })), {
          concurrency: "unbounded"
        })
        const failed = exits.flatMap((exit, n) => Exit.isFailure(exit) ? [n] : [])
        assert.deepStrictEqual(failed, numbers(1000).filter((n) => n % 100 === 7))
        const error = Exit.isFailure(exits[7]!) ? yield* Effect.flip(Effect.failCause(exits[7].cause)) : undefined
        assert.strictEqual(error?._tag, "SqlError")
        assert.strictEqual(yield* value("select count(*)::int from pgqueue.job"), 990)
        yield* allInPlace
      })))
  }

  it.live("in enqueueAll fails all of them", () =>
    withQueue(Effect.gen(function*() {
      yield* rows("alter table pgqueue.job add constraint no_sevens check ((payload ->> 'n')::int <> 2500)")
      const exit = yield* Effect.exit(Note.enqueueAll(numbers(3000).map((n) => ({ n }))))
      assert.isTrue(Exit.isFailure(exit))
      yield* assertRows("select count(*)::int as count from pgqueue.job", [{ count: 0 }])
      yield* assertRows("select count(*)::int as count from pgqueue.ready", [{ count: 0 }])
    })))
})

describe("an enqueue whose answer is lost", () => {
  for (const [what, definition] of [["without a key", Note], ["with a key", Visit]] as const) {
    it.live(`is sent again and inserted once, ${what}`, () =>
      withQueue(Effect.gen(function*() {
        const { proxy, queue } = yield* behindProxy
        for (let n = 0; n < 5; n++) {
          proxy.loseAnswerTo(`"n":`)
          const enqueued = yield* Effect.provideContext(definition.enqueue({ n }), queue)
          assert.strictEqual(enqueued.status, "inserted")
          yield* assertRows(
            "select id::text from pgqueue.job where (payload ->> 'n')::int = $1",
            [{ id: enqueued.id }],
            [n]
          )
        }
        assert.strictEqual(proxy.lost(), 5)
        assert.strictEqual(yield* value("select count(*)::int from pgqueue.job"), 5)
        yield* allInPlace
      })))
  }

  it.live("is inserted once in a crowd, while answers are lost and connections reset", () =>
    withQueue(Effect.gen(function*() {
      const { proxy, queue } = yield* behindProxy
      proxy.loseEvery(4, `"n":`)
      // Now and then all connections at once, whatever they are doing.
      const saboteur = Effect.forever(Effect.andThen(Effect.sleep(1500), Effect.sync(proxy.reset)))
      const enqueued = yield* Effect.raceFirst(
        Effect.forEach(
          numbers(2000),
          (n) => Effect.provideContext(n % 2 === 0 ? Note.enqueue({ n }) : Visit.enqueue({ n }), queue),
          {
            concurrency: 32
          }
        ),
        saboteur
      )
      assert.isAbove(proxy.lost(), 2)
      assert.isTrue(enqueued.every(({ status }) => status === "inserted"))
      const stored = (yield* rows<{ id: string }>("select id::text from pgqueue.job order by 1")).map(({ id }) => id)
      assert.deepStrictEqual(stored, enqueued.map(({ id }) => id).toSorted())
      yield* allInPlace
    })))

  it.live("inside a transaction fails that transaction and nothing else", () =>
    withQueue(Effect.gen(function*() {
      const { proxy, queue } = yield* behindProxy
      const program = Effect.gen(function*() {
        const sql = yield* SqlClient.SqlClient
        proxy.loseAnswerTo("COMMIT")
        const exit = yield* Effect.exit(sql.withTransaction(Note.enqueue({ n: 1 })))
        assert.isTrue(Exit.isFailure(exit), "nobody knows, so the caller has to decide")
        // The id is the caller's: the same enqueue again is no second one.
        const id = "0190aaaa-0000-7000-8000-000000000001"
        proxy.loseAnswerTo("COMMIT")
        yield* Effect.exit(sql.withTransaction(Note.enqueue({ n: 2 }, { id })))
        assert.deepStrictEqual(
          yield* sql.withTransaction(Note.enqueue({ n: 2 }, { id })),
          { id, status: "existing" } as any
        )
      })
      yield* Effect.provideContext(program, queue)
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.job"), 2)
      yield* allInPlace
    })))
})
