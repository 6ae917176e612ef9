/** What a uniqueness rule says besides the key: how long it holds, and what an enqueue does that meets a holder. */
import { assert, describe, it } from "@effect/vitest"
import { Deferred, Effect, Fiber, Layer, Schedule, Schema } from "effect"
import { SqlClient } from "effect/sql"
import { Job, JobQueue, Worker } from "../src/index.ts"
import {
  allInPlace,
  allInPlaceButKeys,
  counting,
  rows,
  running,
  strangerDoes,
  untilAllEnded,
  untilValue,
  value,
  withQueue
} from "./support/queue.ts"

class Sync extends Job.make("sync", { payload: { n: Schema.Number }, retry: { while: () => false } }) {}

/** The waiting job as the line and its row tell it. */
const waiting = rows<{ n: number; lane: number; run_at: string; in_step: boolean; attempts: number }>(
  `select (j.payload ->> 'n')::int as n, r.lane::int as lane, j.run_at::text, j.run_at = r.run_at as in_step, j.max_attempts as attempts
   from pgqueue.job j join pgqueue.ready r using (id)`
)

describe("onConflict", () => {
  it.live("keep leaves the holder as it is", () =>
    withQueue(Effect.gen(function*() {
      const first = yield* Sync.enqueue({ n: 1 }, { unique: "k", delay: "1 hour" })
      const before = yield* waiting
      const second = yield* Sync.enqueue({ n: 2 }, { unique: "k", priority: "high" })
      assert.deepStrictEqual(second, { id: first.id, status: "existing" })
      assert.deepStrictEqual(yield* waiting, before)
      yield* allInPlace
    })))

  it.live("replace gives a waiting holder the new payload and options, and keeps its due time", () =>
    withQueue(Effect.gen(function*() {
      const first = yield* Sync.enqueue({ n: 1 }, { unique: "k", delay: "1 hour" })
      const [before] = yield* waiting
      const second = yield* Sync.enqueue({ n: 2 }, {
        unique: { key: "k", onConflict: "replace" },
        priority: "high",
        maxAttempts: 9,
        delay: "1 second"
      })
      assert.deepStrictEqual(second, { id: first.id, status: "replaced" })
      assert.deepStrictEqual(yield* waiting, [{ n: 2, lane: 2, run_at: before!.run_at, in_step: true, attempts: 9 }])
      yield* allInPlace
    })))

  it.live("debounce starts the delay again", () =>
    withQueue(Effect.gen(function*() {
      const rule = { unique: { key: "k", onConflict: "debounce" }, delay: "1 hour" } as const
      const first = yield* Sync.enqueue({ n: 1 }, rule)
      const [before] = yield* waiting
      assert.deepStrictEqual(yield* Sync.enqueue({ n: 2 }, rule), { id: first.id, status: "replaced" })
      const [after] = yield* waiting
      assert.strictEqual(after!.n, 2)
      assert.isTrue(after!.in_step)
      assert.isTrue(yield* value<boolean>("select $1::timestamptz > $2::timestamptz", [after!.run_at, before!.run_at]))
      yield* allInPlace
    })))

  it.live("debounce begins the period again, replace does not", () =>
    withQueue(Effect.gen(function*() {
      const expiry = value<string>("select expires_at::text from pgqueue.unique_key")
      const rule = (onConflict: "replace" | "debounce") =>
        ({ unique: { key: "k", period: "1 hour", onConflict }, delay: "2 hours" }) as const
      yield* Sync.enqueue({ n: 1 }, rule("replace"))
      const first = yield* expiry
      yield* Sync.enqueue({ n: 2 }, rule("replace"))
      assert.strictEqual(yield* expiry, first)
      assert.strictEqual((yield* Sync.enqueue({ n: 3 }, rule("debounce"))).status, "replaced")
      assert.isTrue(yield* value<boolean>("select $1::timestamptz > $2::timestamptz", [yield* expiry, first]))
    })))

  it.live("replace in a transaction that rolls back changes nothing", () =>
    withQueue(Effect.gen(function*() {
      const sql = yield* SqlClient.SqlClient
      yield* Sync.enqueue({ n: 1 }, { unique: "k", delay: "1 hour" })
      const before = yield* waiting
      yield* Effect.flip(sql.withTransaction(Effect.andThen(
        Sync.enqueue({ n: 2 }, { unique: { key: "k", onConflict: "replace" } }),
        Effect.fail("undo")
      )))
      assert.deepStrictEqual(yield* waiting, before)
      yield* allInPlace
    })))

  it.live("a holder that runs is left alone", () =>
    withQueue(Effect.gen(function*() {
      const started = yield* Deferred.make<void>()
      const go = yield* Deferred.make<void>()
      const seen: Array<number> = []
      const handler = Sync.toLayer(({ n }) =>
        Effect.gen(function*() {
          seen.push(n)
          yield* Deferred.succeed(started, undefined)
          yield* Deferred.await(go)
        })
      )
      yield* running(Worker.layer({ jobs: [Sync] }).pipe(Layer.provide(handler)))
      const first = yield* Sync.enqueue({ n: 1 }, { unique: "k" })
      yield* Deferred.await(started)
      const second = yield* Sync.enqueue({ n: 2 }, { unique: { key: "k", onConflict: "debounce" } })
      assert.deepStrictEqual(second, { id: first.id, status: "existing" })
      yield* Deferred.succeed(go, undefined)
      yield* untilAllEnded()
      assert.deepStrictEqual(seen, [1])
      yield* allInPlace
    })))

  it.live("many replacements against a worker that claims: every job runs once, with a payload that somebody sent", () =>
    withQueue(Effect.gen(function*() {
      const seen = new Map<string, number>()
      const handler = Sync.toLayer(({ n }) =>
        Effect.map(Job.Current, ({ id }) => void seen.set(`${id} ${n}`, (seen.get(`${id} ${n}`) ?? 0) + 1))
      )
      yield* running(Worker.layer({ jobs: [Sync] }).pipe(Layer.provide(handler)))
      const results = yield* Effect.forEach(
        Array.from({ length: 2000 }, (_, n) => n),
        (n) => Sync.enqueue({ n }, { unique: { key: `k${n % 5}`, onConflict: "replace" } }),
        { concurrency: 16 }
      )
      yield* untilAllEnded()
      const inserted = results.filter(({ status }) => status === "inserted").length
      assert.strictEqual(seen.size, inserted)
      assert.isTrue([...seen.values()].every((times) => times === 1))
      yield* untilValue("select count(*)::int from pgqueue.finished where status = 'completed'", inserted)
      yield* untilValue("select count(*)::int from pgqueue.unique_key", 0)
      yield* allInPlace
    })))
})

describe("until", () => {
  it.live("started releases the key when the job starts, and the end of that job leaves the next holder alone", () =>
    withQueue(Effect.gen(function*() {
      const started = yield* Deferred.make<void>()
      const go = yield* Deferred.make<void>()
      const handler = Sync.toLayer(({ n }) =>
        n === 1 ? Effect.andThen(Deferred.succeed(started, undefined), Deferred.await(go)) : Effect.void
      )
      yield* running(Worker.layer({ jobs: [Sync] }).pipe(Layer.provide(handler)))
      const rule = { unique: { key: "k", until: "started" } } as const
      const first = yield* Sync.enqueue({ n: 1 }, rule)
      yield* Deferred.await(started)
      const second = yield* Sync.enqueue({ n: 2 }, { ...rule, delay: "1 hour" })
      assert.strictEqual(second.status, "inserted")
      assert.notStrictEqual(second.id, first.id)
      yield* Deferred.succeed(go, undefined)
      yield* untilValue("select count(*)::int from pgqueue.finished", 1)
      assert.deepStrictEqual(yield* Sync.enqueue({ n: 3 }, rule), { id: second.id, status: "existing" })
      yield* allInPlace
    })))

  it.live("a retry of a job that gave its key back cannot collide with the next holder", () =>
    withQueue(Effect.gen(function*() {
      class Twice extends Job.make("twice", { payload: { n: Schema.Number }, error: Schema.String }) {}
      const retried = yield* Deferred.make<void>()
      const rule = { unique: { key: "k", until: "started" } } as const
      const queue = yield* JobQueue
      const handler = Twice.toLayer(({ n }) =>
        Effect.gen(function*() {
          const { attempt } = yield* Job.Current
          if (n === 1 && attempt === 1) {
            yield* Effect.orDie(
              Effect.provideService(Twice.enqueue({ n: 2 }, { ...rule, delay: "1 hour" }), JobQueue, queue)
            )
            return yield* Effect.fail("again")
          }
          yield* Deferred.succeed(retried, undefined)
        })
      )
      yield* running(Worker.layer({ jobs: [Twice] }).pipe(Layer.provide(handler)))
      yield* Twice.enqueue({ n: 1 }, rule)
      yield* Deferred.await(retried)
      yield* untilValue("select count(*)::int from pgqueue.finished", 1)
      yield* untilValue("select count(*)::int from pgqueue.unique_key", 1)
      yield* allInPlace
    })))

  it.live("a job that waits for its retry is as it should be, though the key that its row names is nobody's", () =>
    withQueue(Effect.gen(function*() {
      class Later extends Job.make("later", { error: Schema.String, retry: Schedule.spaced("1 hour") }) {}
      yield* running(
        Worker.layer({ jobs: [Later] }).pipe(Layer.provide(Later.toLayer(() => Effect.fail("again"))))
      )
      const rule = { unique: { key: "k", until: "started" } } as const
      yield* Later.enqueue(undefined, rule)
      yield* untilValue("select count(*)::int from pgqueue.ready where attempt = 1", 1)
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.job where unique_key is not null"), 1)
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.unique_key"), 0)
      yield* allInPlaceButKeys
      // The key is free for the next one, and the strict check is content when it has a holder.
      assert.strictEqual((yield* Later.enqueue(undefined, { ...rule, delay: "1 hour" })).status, "inserted")
      yield* allInPlace
    })))

  /** Has the period of every key be over. */
  const overdue = rows("update pgqueue.unique_key set expires_at = clock_timestamp() - interval '1 second'")

  it.live("a period holds the key after the end, and lets it go when it is over", () =>
    withQueue(Effect.gen(function*() {
      yield* running(Worker.layer({ jobs: [Sync] }).pipe(Layer.provide(Sync.toLayer(() => Effect.void))))
      const rule = { unique: { key: "k", period: "1 hour" } } as const
      const first = yield* Sync.enqueue({ n: 1 }, rule)
      yield* untilAllEnded()
      assert.deepStrictEqual(yield* Sync.enqueue({ n: 2 }, rule), { id: first.id, status: "existing" })
      yield* overdue
      assert.strictEqual((yield* Sync.enqueue({ n: 3 }, rule)).status, "inserted")
    })))

  for (const inside of [false, true]) {
    it.live(
      `a key whose period is over and that a stranger has locked is waited for${inside ? ", in a transaction" : ""}`,
      () =>
        withQueue(Effect.gen(function*() {
          const sql = yield* SqlClient.SqlClient
          yield* running(Worker.layer({ jobs: [Sync] }).pipe(Layer.provide(Sync.toLayer(() => Effect.void))))
          const rule = { unique: { key: "k", period: "1 hour" } } as const
          yield* Sync.enqueue({ n: 1 }, rule)
          yield* untilAllEnded()
          yield* overdue
          yield* counting("delete", "unique_key")
          const locked = yield* strangerDoes("select key from pgqueue.unique_key for update")
          const enqueue = Sync.enqueue({ n: 2 }, rule)
          // In one statement with it, which is sent again without it.
          const id = crypto.randomUUID()
          const neighbour = yield* Effect.forkScoped(Sync.enqueue({ n: 4 }, { unique: "free", id }))
          const waits = yield* Effect.forkScoped(inside ? sql.withTransaction(enqueue) : enqueue)
          // Neither the neighbours nor the server have anything of it.
          assert.strictEqual((yield* Fiber.join(neighbour)).status, "inserted")
          assert.strictEqual((yield* Sync.enqueue({ n: 3 }, { unique: "another" })).status, "inserted")
          yield* Effect.sleep(1000)
          assert.isAtMost(yield* value("select last_value::int from public.tries"), 30)
          yield* locked.commit
          assert.strictEqual((yield* Fiber.join(waits)).status, "inserted")
        }))
    )
  }

  it.live("keys of two kinds, and two keys of one kind, have nothing to do with each other", () =>
    withQueue(Effect.gen(function*() {
      class Other extends Job.make("other") {}
      assert.strictEqual((yield* Sync.enqueue({ n: 1 }, { unique: "k" })).status, "inserted")
      assert.strictEqual((yield* Other.enqueue(undefined, { unique: "k" })).status, "inserted")
      assert.strictEqual((yield* Sync.enqueue({ n: 1 }, { unique: "l" })).status, "inserted")
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.unique_key where key::text like '%k%'"), 0)
      yield* allInPlace
    })))
})
