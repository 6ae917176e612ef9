/** An enqueue is answered: nobody waits for a dead link, a layer that has closed, or a stranger's transaction without need. */
import { PgClient } from "@effect/sql-pg"
import { assert, describe, it } from "@effect/vitest"
import { Cause, Context, Effect, Exit, Fiber, Layer, Option, Redacted, Schema, Scope } from "effect"
import { SqlClient } from "effect/sql"
import { Job, JobQueue } from "../src/index.ts"
import { clientLayer } from "./support/database.ts"
import { makeLink } from "./support/link.ts"
import {
  allInPlace,
  assertRows,
  databaseUrl,
  databaseWithLedger,
  queueLayer,
  rows,
  stranger,
  untilValue,
  value,
  withQueue
} from "./support/queue.ts"

class Note extends Job.make("note", { payload: { n: Schema.Number } }) {}
class Visit extends Job.make("visit", { payload: { key: Schema.String }, unique: ({ key }) => key }) {}

const id = "0190aaaa-0000-7000-8000-000000000001"

/** Starts an enqueue apart from everything else, so that one that hangs is left behind. */
const start = <A, E, R>(enqueue: Effect.Effect<A, E, R>) => Effect.forkDetach(enqueue, { startImmediately: true })

/** How something ended that must end. */
const ended = <A, E>(fiber: Fiber.Fiber<A, E>, within = 10_000) =>
  Effect.map(
    Effect.timeoutOption(Fiber.await(fiber), within),
    Option.getOrThrowWith(() => new Error(`not answered within ${within} ms`))
  )

/** Waits until so many sessions wait for a lock. */
const blocked = (count: number) =>
  untilValue(
    "select count(*)::int from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'",
    count
  )

describe("an enqueue whose request is lost on a dead link", () => {
  it.live("is sent again on another, and holds up those behind it no longer than that takes", () =>
    withQueue(Effect.gen(function*() {
      const link = yield* makeLink(yield* databaseUrl)
      const queue = yield* Layer.build(Layer.fresh(
        Layer.provideMerge(JobQueue.layer(), PgClient.layer({ url: Redacted.make(link.url) }))
      ))
      link.loseRequestWith(`"n":1`, "first key")
      const enqueue = <A, E>(effect: Effect.Effect<A, E, JobQueue>) =>
        start(Effect.provideContext(effect, Context.pick(JobQueue)(queue)))
      const fibers = [yield* enqueue(Note.enqueue({ n: 1 })), yield* enqueue(Visit.enqueue({ key: "first key" }))]
      yield* Effect.sleep(300)
      fibers.push(yield* enqueue(Note.enqueue({ n: 2 })), yield* enqueue(Visit.enqueue({ key: "second key" })))
      for (const fiber of fibers) {
        const exit = yield* ended(fiber, 15_000)
        assert.strictEqual(Exit.isSuccess(exit) && exit.value.status, "inserted")
      }
      assert.strictEqual(link.dead(), 2)
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.job"), 4)
      yield* allInPlace
    })))
})

describe("an enqueue while the client is broken", () => {
  it.live("sees the client's defect, and the next one goes through", () => {
    let broken = false
    // Not a `PgClient`, so that the queue uses it as it is.
    const anonymous = Layer.effect(
      SqlClient.SqlClient,
      Effect.map(PgClient.PgClient, (client) => {
        const disguised = (target: PgClient.PgClient): SqlClient.SqlClient =>
          new Proxy(target, {
            has: (target, key) => key !== PgClient.TypeId && key in target,
            get: (target, key) => {
              if (key === PgClient.TypeId || key === "config") return undefined
              if (key === "withoutTransforms") return () => disguised(target)
              if (key === "unsafe" && broken) throw new Error("the client is broken")
              return Reflect.get(target, key)
            }
          }) as SqlClient.SqlClient
        return disguised(client)
      })
    ).pipe(Layer.provide(clientLayer()))
    return Effect.scoped(Effect.gen(function*() {
      yield* Note.enqueue({ n: 0 })
      broken = true
      const fibers = [
        yield* start(Note.enqueue({ n: 1 })),
        yield* start(Note.enqueue({ n: 2 })),
        yield* start(Visit.enqueue({ key: "k" })),
        yield* start(Note.enqueue({ n: 3 }, { id }))
      ]
      for (const fiber of fibers) {
        const exit = yield* ended(fiber)
        assert.match(Exit.isFailure(exit) ? Cause.pretty(exit.cause) : "", /the client is broken/)
      }
      broken = false
      for (const enqueue of [Note.enqueue({ n: 4 }), Visit.enqueue({ key: "k" }), Note.enqueue({ n: 5 }, { id })]) {
        const exit = yield* ended(yield* start(enqueue))
        assert.strictEqual(Exit.isSuccess(exit) && exit.value.status, "inserted")
      }
      yield* allInPlace
    })).pipe(
      Effect.provide(JobQueue.layer().pipe(Layer.provideMerge(anonymous), Layer.provideMerge(databaseWithLedger())))
    )
  })
})

describe("an enqueue whose queue's layer", () => {
  const closing = Effect.gen(function*() {
    const scope = yield* Scope.make()
    const queue = yield* Layer.buildWithScope(queueLayer(), scope)
    return {
      enqueue: <A, E>(effect: Effect.Effect<A, E, JobQueue>) =>
        start(Effect.provideContext(effect, Context.pick(JobQueue)(queue))),
      close: Scope.close(scope, Exit.void)
    }
  })

  it.live("has closed dies and says so", () =>
    withQueue(Effect.gen(function*() {
      const { close, enqueue } = yield* closing
      yield* ended(yield* enqueue(Note.enqueue({ n: 0 })))
      yield* close
      for (const late of [Note.enqueue({ n: 1 }), Note.enqueue({ n: 2 }), Visit.enqueue({ key: "k" })]) {
        const exit = yield* ended(yield* enqueue(late))
        assert.isTrue(Exit.isFailure(exit) && Cause.hasDies(exit.cause))
        assert.match(Exit.isFailure(exit) ? Cause.pretty(exit.cause) : "", /JobQueue has been closed/)
      }
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.job"), 1)
    })))

  it.live("closes while it is on its way is answered or interrupted", () =>
    withQueue(Effect.gen(function*() {
      for (let round = 0; round < 5; round++) {
        const { close, enqueue } = yield* closing
        const fibers = yield* Effect.forEach(
          Array.from({ length: 200 }, (_, n) => n),
          (n) => enqueue(n % 2 === 0 ? Note.enqueue({ n }) : Visit.enqueue({ key: `${round} ${n}` }))
        )
        yield* Effect.sleep(round * 5)
        yield* close
        for (const fiber of fibers) {
          const exit = yield* ended(fiber)
          assert.isTrue(Exit.isSuccess(exit) || Cause.hasInterruptsOnly(exit.cause))
        }
      }
      yield* allInPlace
    })))

  it.live("closes while it waits for a stranger's key or id is interrupted", () =>
    withQueue(Effect.gen(function*() {
      const key = yield* stranger(Effect.andThen(Visit.enqueue({ key: "k" }), Note.enqueue({ n: 0 }, { id })))
      const { close, enqueue } = yield* closing
      const fibers = [yield* enqueue(Visit.enqueue({ key: "k" })), yield* enqueue(Note.enqueue({ n: 1 }, { id }))]
      yield* Effect.sleep(500)
      yield* close
      for (const fiber of fibers) {
        const exit = yield* ended(fiber)
        assert.isTrue(Exit.isFailure(exit) && Cause.hasInterruptsOnly(exit.cause))
      }
      yield* key.rollback
    })))
})

describe("an id that a stranger's open transaction has taken", () => {
  it.live("is waited for by those who want it, and by no other", () =>
    withQueue(
      Effect.gen(function*() {
        const taken = yield* stranger(Note.enqueue({ n: 0 }, { id }))
        const waiting = yield* start(Note.enqueue({ n: 0 }, { id }))
        yield* Effect.sleep(200)
        // Together with those who choose their ids, and those who do not.
        const fibers = yield* Effect.forEach(
          Array.from({ length: 100 }, (_, n) => n),
          (n) =>
            start(
              n % 2 === 0
                ? Note.enqueue({ n })
                : Note.enqueue({ n }, { id: `0190bbbb-0000-7000-8000-${String(n).padStart(12, "0")}` })
            )
        )
        const again = yield* start(Note.enqueue({ n: 0 }, { id }))
        for (const fiber of fibers) {
          const exit = yield* ended(fiber)
          assert.strictEqual(Exit.isSuccess(exit) && exit.value.status, "inserted")
        }
        assert.deepStrictEqual([waiting.pollUnsafe(), again.pollUnsafe()], [undefined, undefined])
        yield* taken.commit
        for (const fiber of [waiting, again]) {
          assert.deepStrictEqual(yield* Fiber.join(fiber), { id, status: "existing" } as any)
        }
        yield* allInPlace
      }),
      { pool: { maxConnections: 4 } }
    ))

  it.live("goes to who waits for it when that transaction rolls back", () =>
    withQueue(Effect.gen(function*() {
      const taken = yield* stranger(Note.enqueue({ n: 0 }, { id }))
      const waiting = yield* start(Note.enqueue({ n: 1 }, { id }))
      yield* Effect.sleep(200)
      yield* taken.rollback
      const exit = yield* ended(waiting)
      assert.deepStrictEqual(Exit.isSuccess(exit) && exit.value, { id, status: "inserted" } as any)
      yield* assertRows("select (payload ->> 'n')::int as n from pgqueue.job", [{ n: 1 }])
    })))
})

describe("keys that a stranger's open transaction has taken", () => {
  it.live("are waited for by those who want them, however many, and one who gives up takes no other along", () =>
    withQueue(Effect.gen(function*() {
      const keys = Array.from({ length: 30 }, (_, n) => ({ key: `taken ${n}` }))
      const taken = yield* stranger(Visit.enqueueAll(keys))
      const waiting = yield* Effect.forEach([...keys, keys[0]!, keys[0]!], (key) => start(Visit.enqueue(key)))
      yield* Effect.sleep(300)
      const fibers = yield* Effect.forEach(
        Array.from({ length: 60 }, (_, n) => n),
        (n) => n % 2 === 0 ? start(Note.enqueue({ n })) : start(Visit.enqueue({ key: `free ${n}` }))
      )
      for (const fiber of fibers) {
        const exit = yield* ended(fiber)
        assert.strictEqual(Exit.isSuccess(exit) && exit.value.status, "inserted")
      }
      // Three wait for the first key.
      yield* Fiber.interrupt(waiting[0]!)
      assert.isTrue(waiting.slice(1).every((fiber) => fiber.pollUnsafe() === undefined))
      yield* taken.rollback
      const statuses: Array<string> = []
      for (const fiber of waiting.slice(1)) {
        const exit = yield* ended(fiber, 20_000)
        statuses.push(Exit.isSuccess(exit) ? exit.value.status : "failed")
      }
      assert.deepStrictEqual(statuses.slice(0, 29), Array.from({ length: 29 }, () => "inserted"))
      // Whoever gave up may have been inserted all the same.
      assert.include(["inserted existing", "existing inserted", "existing existing"], statuses.slice(29).join(" "))
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.job"), 90)
      yield* allInPlace
    })))
})

describe("two bulks with the same keys in opposite orders", () => {
  it.live("in two transactions of the application do not deadlock", () =>
    withQueue(
      Effect.gen(function*() {
        const sql = yield* SqlClient.SqlClient
        // In the order in which a statement takes them.
        const keys = (yield* rows<{ key: string }>(
          "select key from unnest($1::text[]) as k(key) order by pgqueue.hash_key('visit', key)",
          [Array.from({ length: 2000 }, (_, n) => `k${n}`)]
        )).map((row) => ({ key: row.key }))
        const [first, second] = keys
        // Statements of a thousand: the one holds the keys in the middle when it comes to the first two, the other holds
        // the second key when it comes to those in the middle.
        const one = [...keys.slice(2), first!, second!]
        const other = [...keys.slice(1), first!]
        const taken = yield* stranger(Visit.enqueue(first!))
        const bulk = (all: ReadonlyArray<{ readonly key: string }>) => start(sql.withTransaction(Visit.enqueueAll(all)))
        const fibers = [yield* bulk(one)]
        yield* blocked(1)
        fibers.push(yield* bulk(other))
        yield* blocked(2)
        yield* taken.rollback
        const statuses: Array<string> = []
        for (const fiber of fibers) {
          const exit = yield* ended(fiber, 20_000)
          if (Exit.isFailure(exit)) assert.fail(Cause.pretty(exit.cause))
          statuses.push([...new Set(exit.value.map(({ status }) => status))].join())
        }
        assert.deepStrictEqual(statuses.toSorted(), ["existing", "inserted"])
        assert.strictEqual(yield* value("select count(*)::int from pgqueue.job"), 2000)
        yield* allInPlace
      }),
      { pool: { maxConnections: 4 } }
    ))
})
