/** Insert: nothing lost, nothing twice, one holder per key, whoever comes late or sends again. */
import { assert, layer } from "@effect/vitest"
import { Duration, Effect } from "effect"
import * as Database from "../src/Database.ts"
import {
  blocked,
  claim,
  claimed,
  count,
  entry,
  failure,
  job,
  jobs,
  join,
  keyed,
  makeDue,
  query,
  rule,
  session,
  stateOf,
  Storage,
  uuid,
  value,
  worker
} from "./support/storage.ts"

const keysHeldBy = Effect.map(
  query<{ job: string }>("select job::text as job from pgqueue.unique_key order by job"),
  (rows) => rows.map((row) => row.job)
)
/** Who holds the keys of the jobs, in their order. */
const holdersOf = Effect.fnUntraced(function*(all: Parameters<Storage["Service"]["store"]["holders"]>[0]) {
  const { store } = yield* Storage
  const rows = new Map((yield* store.holders(all, false)).map((row) => [row.id, row]))
  return all.map((one) => rows.get(one.id)?.holder)
})
/** Claims everything due and completes it. */
const finishAll = Effect.gen(function*() {
  const { store } = yield* Storage
  const me = yield* worker()
  const { ids, lease } = yield* claim(me)
  yield* store.settle(me, ids.map((id) => entry(lease, id, "completed")))
})

layer(Storage.layer, { excludeTestServices: true })("enqueue", (it) => {
  it.effect(
    "a batch stands in line in the order of its ids, with every column resolved",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const all = jobs(50)
      assert.strictEqual((yield* store.insert(all, false)).size, 50)
      assert.strictEqual(yield* value("select count(distinct run_at)::int4 from pgqueue.ready"), 1)
      assert.deepStrictEqual((yield* claim(yield* worker(), { limit: 50 })).ids, all.map((one) => one.id))
    }))
  )

  it.effect(
    "due times: a delay by the database's clock, an instant, and never before now",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const [delayed, instant, past] = [job({ delay: 90_500 }), job({ runAt: 4_000_000_000_123 }), job({ runAt: 5 })]
      yield* store.insert([delayed, instant, past], false)
      const wait = (id: string) =>
        value<number>(
          "select (extract(epoch from run_at - enqueued_at) * 1000)::float8 from pgqueue.job where id = $1::uuid and scheduled_for = run_at",
          [id]
        )
      assert.closeTo(yield* wait(delayed.id), 90_500, 1000)
      assert.closeTo(yield* wait(past.id), 0, 1000)
      assert.strictEqual(
        yield* value("select (extract(epoch from run_at) * 1000)::float8 from pgqueue.job where id = $1::uuid", [
          instant.id
        ]),
        4_000_000_000_123
      )
    }))
  )

  it.effect(
    "an insert whose answer was lost inserts nothing when it is sent again, wherever the job is by then",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const lost = jobs(3)
      const again = (expected: number, added = job()) =>
        Effect.gen(function*() {
          const inserted = yield* store.insert([...lost, added], false)
          assert.deepStrictEqual([...inserted], [added.id])
          assert.strictEqual((yield* count("job")) + (yield* count("finished")), expected)
        })
      yield* store.insert(lost, false)
      yield* again(4)
      const me = yield* worker()
      const { lease } = yield* claim(me, { limit: 3 })
      yield* again(5)
      yield* store.settle(me, [
        entry(lease, lost[0]!.id, "completed"),
        entry(lease, lost[1]!.id, "failed", { delay: 60_000, failure }),
        entry(lease, lost[2]!.id, "discarded")
      ])
      yield* again(6)
      assert.deepInclude(yield* stateOf(lost[0]!.id), { status: "completed" })
      assert.deepInclude(yield* stateOf(lost[1]!.id), { place: "ready", attempt: 1 })
    }))
  )

  it.effect(
    "an original that arrives while its job ends is refused, and dropped when sent again",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const [original, neighbour] = [job(), job()]
      const held = yield* claimed([original])
      const settling = yield* session
      yield* settling.query("begin")
      yield* settling.store.settle(held.worker, [entry(held.lease, original.id, "completed")])
      const late = yield* blocked(Effect.flip(store.insert([original, neighbour], false)))
      yield* settling.query("commit")
      const error = yield* join(late)
      assert.strictEqual(Database.sqlState(error), Database.alreadyEnded)
      assert.isTrue(Database.isTransient(error))
      assert.strictEqual(yield* count("job"), 0)
      assert.deepStrictEqual([...(yield* store.insert([original, neighbour], false))], [neighbour.id])
      assert.deepInclude(yield* stateOf(original.id), { place: "finished", status: "completed" })
    }))
  )

  it.effect(
    "a keyed original whose job came, ran and ended while it waited for a key is refused, and dropped when sent again",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const [first, second] = yield* query<{ key: string }>(
        "select key from unnest(array['a', 'b']) as key order by pgqueue.hash_key('k', key)"
      )
      const [neighbour, original] = [keyed(first!.key), keyed(second!.key)]
      const stranger = yield* session
      yield* stranger.query("begin")
      yield* stranger.store.insertUnique([keyed(first!.key)], false, undefined)
      const late = yield* blocked(Effect.flip(store.insertUnique([original, neighbour], false, undefined)))
      yield* store.insertUnique([original], false, undefined)
      yield* finishAll
      yield* stranger.query("rollback")
      assert.strictEqual(Database.sqlState(yield* join(late)), Database.alreadyEnded)
      assert.strictEqual(yield* count("job"), 0)
      assert.deepStrictEqual([...(yield* store.insertUnique([original, neighbour], false, undefined))], [neighbour.id])
      assert.deepStrictEqual(yield* holdersOf([original, neighbour]), [original.id, neighbour.id])
    }))
  )

  it.effect(
    "a keyed original that arrives while its job ends finds itself without waiting",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const original = keyed("a")
      const held = yield* claimed([original])
      const settling = yield* session
      yield* settling.query("begin")
      yield* settling.store.settle(held.worker, [entry(held.lease, original.id, "completed")])
      const again = Effect.gen(function*() {
        assert.strictEqual((yield* store.insertUnique([original], false, 5)).size, 0)
        assert.deepStrictEqual(yield* holdersOf([original]), [original.id])
      })
      yield* again
      yield* settling.query("commit")
      yield* again
    }))
  )

  for (const unique of [false, true]) {
    const insert = (store: Storage["Service"]["store"], all: Parameters<typeof store.insert>[0]) =>
      unique ? store.insertUnique(all, false, undefined) : store.insert(all, false)
    const make = () => unique ? keyed(uuid()) : job()

    it.effect(
      `two inserts of one id at once: the second waits and inserts nothing (${unique ? "keyed" : "plain"})`,
      rule(Effect.gen(function*() {
        const { store } = yield* Storage
        const twice = make()
        const first = yield* session
        yield* first.query("begin")
        assert.strictEqual((yield* insert(first.store, [twice])).size, 1)
        const second = yield* blocked(insert(store, [twice]))
        yield* first.query("commit")
        assert.strictEqual((yield* join(second)).size, 0)
        assert.strictEqual(yield* count("job"), 1)
      }))
    )

    it.effect(
      `an insert that waited for one that rolled back goes in (${unique ? "keyed" : "plain"})`,
      rule(Effect.gen(function*() {
        const { store } = yield* Storage
        const twice = make()
        const first = yield* session
        yield* first.query("begin")
        yield* insert(first.store, [twice])
        const second = yield* blocked(insert(store, [twice]))
        yield* first.query("rollback")
        assert.strictEqual((yield* join(second)).size, 1)
      }))
    )
  }

  it.effect(
    "an id that is in the batch twice is inserted once",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const twice = job()
      assert.deepStrictEqual([...(yield* store.insert([twice, job(), twice], false))].length, 2)
      assert.strictEqual(yield* count("ready"), 2)
    }))
  )

  it.effect(
    "inside the application's transaction a job is there if and only if it commits",
    rule(Effect.gen(function*() {
      const { sql, store } = yield* Storage
      const insertBoth = Effect.andThen(store.insert([job()], true), store.insertUnique([keyed("a")], true, undefined))
      yield* Effect.flip(sql.withTransaction(Effect.andThen(insertBoth, Effect.fail("no"))))
      assert.deepStrictEqual([yield* count("job"), yield* count("ready"), yield* count("unique_key")], [0, 0, 0])
      yield* sql.withTransaction(insertBoth)
      assert.deepStrictEqual([yield* count("job"), yield* count("ready"), yield* count("unique_key")], [2, 2, 1])
    }))
  )

  it.effect(
    "a settled history that grew while sessions were open is still looked up, not read through",
    rule(Effect.gen(function*() {
      const { sql, store } = yield* Storage
      yield* query("analyze pgqueue.finished")
      // A session of the application, on which a plan may be kept: made while the history is empty.
      yield* sql.withTransaction(Effect.gen(function*() {
        for (let i = 0; i < 8; i++) yield* store.insert([job()], true)
        yield* query(
          `insert into pgqueue.finished (id, kind, queue, priority, status, attempt, max_attempts, rescued, snoozed, metadata,
            enqueued_at, scheduled_for, payload)
          select gen_random_uuid(), 'k', 'default', 5, 'completed', 1, 5, 0, 0, '{}', now(), now(), '{}' from generate_series(1, 20000)`
        )
        yield* store.insert(jobs(10), true)
        const read = yield* sql<
          { read: number }
        >`select pg_stat_get_xact_tuples_returned('pgqueue.finished'::regclass)::int4 as read`
        assert.isBelow(read[0]!.read, 1000)
      }))
    }))
  )

  // ---------------------------------------------------------------------------
  // Keys
  // ---------------------------------------------------------------------------

  it.effect(
    "fifty contenders for one key: one is inserted, the others read its id",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      for (const key of ["a", "b", "c"]) {
        const contenders = Array.from({ length: 50 }, () => keyed(key))
        const inserted = yield* Effect.forEach(contenders, (one) => store.insertUnique([one], false, undefined), {
          concurrency: "unbounded"
        })
        const winners = inserted.flatMap((ids) => [...ids])
        assert.strictEqual(winners.length, 1)
        assert.deepStrictEqual(yield* holdersOf(contenders), contenders.map(() => winners[0]))
      }
    }))
  )

  it.effect(
    "batches with the same keys in different orders neither deadlock nor share a key",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const batch = (keys: ReadonlyArray<number>) => keys.map((key) => keyed(`key-${key}`))
      const keys = Array.from({ length: 100 }, (_, i) => i)
      const inserted = yield* Effect.forEach(
        Array.from({ length: 12 }, (_, i) => batch(i % 2 === 0 ? keys : keys.toReversed())),
        (all) => store.insertUnique(all, false, undefined),
        { concurrency: "unbounded" }
      )
      assert.strictEqual(inserted.flatMap((ids) => [...ids]).length, 100)
      assert.strictEqual(yield* count("job"), 100)
    }))
  )

  it.effect(
    "a batch takes its keys in their own order, so a batch that waits holds no key that comes later",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const [first, second] = yield* query<{ key: string }>(
        "select key from unnest(array['a', 'b']) as key order by pgqueue.hash_key('k', key)"
      )
      const batch = [keyed(second!.key), keyed(first!.key)]
      const stranger = yield* session
      yield* stranger.query("begin")
      yield* stranger.store.insertUnique([keyed(first!.key)], false, undefined)
      const waiting = yield* blocked(store.insertUnique(batch, false, undefined))
      assert.strictEqual((yield* store.insertUnique([keyed(second!.key)], false, 100)).size, 1)
      yield* stranger.query("commit")
      assert.strictEqual((yield* join(waiting)).size, 0)
    }))
  )

  it.effect(
    "one batch: the smallest id wins a key, and keys are scoped to the kind",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const [a1, a2, b, other] = [keyed("a"), keyed("a"), keyed("b"), keyed("a", { kind: "other" })]
      const inserted = yield* store.insertUnique([a2, other, b, a1], false, undefined)
      assert.sameMembers([...inserted], [a1.id, b.id, other.id])
      assert.deepStrictEqual(yield* holdersOf([a1, a2, b, other]), [a1.id, a1.id, b.id, other.id])
    }))
  )

  it.effect(
    "a key is held through retry, snooze, release and rescue, and free when the job has ended",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const holder = keyed("a")
      yield* store.insertUnique([holder], false, undefined)
      const contend = (expected: boolean) =>
        Effect.gen(function*() {
          const contender = keyed("a")
          const inserted = yield* store.insertUnique([contender], false, undefined)
          assert.strictEqual(inserted.size, expected ? 1 : 0)
          assert.deepStrictEqual(yield* holdersOf([contender]), [expected ? contender.id : holder.id])
        })
      for (const verb of ["failed", "snoozed", "released", "completed"] as const) {
        yield* makeDue
        const me = yield* worker()
        const { lease } = yield* claim(me)
        yield* contend(false)
        yield* store.settle(me, [entry(lease, holder.id, verb, { delay: 1, failure })])
        yield* contend(verb === "completed")
        if (verb === "released") {
          yield* claim(me)
          yield* store.unregister(me)
          yield* store.rescue(10)
          yield* contend(false)
        }
      }
    }))
  )

  it.effect(
    "a key with a period outlives its job and is free when the period is over",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const first = keyed("a", {}, 3_600_000)
      yield* store.insertUnique([first], false, undefined)
      yield* finishAll
      const second = keyed("a", {}, 3_600_000)
      assert.strictEqual((yield* store.insertUnique([second], false, undefined)).size, 0)
      const ask = store.holders([second], false)
      assert.deepStrictEqual(yield* ask, [{ id: second.id, holder: first.id, expired: false }])
      yield* store.expireKeys([second], false, undefined)
      assert.deepStrictEqual(yield* keysHeldBy, [first.id])

      yield* query("update pgqueue.unique_key set expires_at = clock_timestamp()")
      assert.deepStrictEqual(yield* ask, [{ id: second.id, holder: first.id, expired: true }])
      yield* store.expireKeys([second], false, undefined)
      assert.strictEqual((yield* store.insertUnique([second], false, undefined)).size, 1)
      assert.deepStrictEqual(yield* ask, [{ id: second.id, holder: second.id, expired: false }])
    }))
  )

  it.effect(
    "a period that ends before its job lets the next one in, and the end of the first leaves the key of the second alone",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const [first, second] = [keyed("a", {}, 1), keyed("a")]
      const held = yield* claimed([first])
      yield* Effect.repeat(
        Effect.andThen(store.expireKeys([second], false, undefined), store.insertUnique([second], false, undefined)),
        { until: (inserted) => inserted.size === 1 }
      )
      yield* store.settle(held.worker, [entry(held.lease, first.id, "completed")])
      assert.deepStrictEqual(yield* keysHeldBy, [second.id])
    }))
  )

  it.effect(
    "a replay of a keyed insert finds itself: in line, held, ended, and when another job has the key by then",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const lost = keyed("a")
      const replay = Effect.gen(function*() {
        assert.strictEqual((yield* store.insertUnique([lost], false, undefined)).size, 0)
        assert.deepStrictEqual(yield* store.holders([lost], false), [{ id: lost.id, holder: lost.id, expired: false }])
      })
      yield* store.insertUnique([lost], false, undefined)
      yield* replay
      const me = yield* worker()
      const { lease } = yield* claim(me)
      yield* replay
      yield* store.settle(me, [entry(lease, lost.id, "completed")])
      yield* replay
      yield* store.insertUnique([keyed("a")], false, undefined)
      yield* replay
    }))
  )

  it.effect(
    "an id that is there under another key takes no second key with it",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const first = keyed("a")
      const same = keyed("b", { id: first.id })
      yield* store.insertUnique([first], false, undefined)
      assert.strictEqual((yield* store.insertUnique([same], false, undefined)).size, 0)
      assert.deepStrictEqual(yield* holdersOf([same]), [first.id])
      assert.strictEqual(yield* count("unique_key"), 1)

      const [third, fourth] = [keyed("c"), keyed("d")]
      assert.strictEqual((yield* store.insertUnique([third, { ...fourth, id: third.id }], false, undefined)).size, 1)
      assert.strictEqual(yield* count("unique_key"), 2)
      yield* finishAll
      assert.strictEqual(yield* count("unique_key"), 0)
    }))
  )

  it.effect(
    "an id that comes in under another key at the same time is refused, and finds itself when sent again",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const one = keyed("a")
      const same = keyed("b", { id: one.id })
      const first = yield* session
      yield* first.query("begin")
      yield* first.store.insertUnique([one], false, undefined)
      const second = yield* blocked(Effect.flip(store.insertUnique([same], false, undefined)))
      yield* first.query("commit")
      assert.strictEqual(Database.sqlState(yield* join(second)), Database.alreadyEnded)
      assert.strictEqual((yield* store.insertUnique([same], false, undefined)).size, 0)
      assert.deepStrictEqual(yield* holdersOf([same]), [one.id])
      assert.strictEqual(yield* count("unique_key"), 1)
    }))
  )

  it.effect(
    "patience ends the wait for a stranger's key quickly, and leaves the session as it was",
    rule(Effect.gen(function*() {
      const stranger = yield* session
      yield* stranger.query("begin")
      yield* stranger.store.insertUnique([keyed("a")], false, undefined)
      const patient = yield* session
      yield* patient.query("set lock_timeout = '7654ms'")
      const [took, error] = yield* Effect.timed(Effect.flip(patient.store.insertUnique([keyed("a")], false, 5)))
      assert.strictEqual(Database.sqlState(error), "55P03")
      assert.isBelow(Duration.toMillis(took), 4000)
      const lockTimeout = Effect.map(patient.query("show lock_timeout"), (rows) => rows[0]?.["lock_timeout"])
      assert.strictEqual(yield* lockTimeout, "7654ms")
      assert.strictEqual((yield* patient.store.insertUnique([keyed("b")], false, 5)).size, 1)
      assert.strictEqual(yield* lockTimeout, "7654ms")
      yield* stranger.query("rollback")
      assert.strictEqual((yield* patient.store.insertUnique([keyed("a")], false, 5)).size, 1)
    }))
  )

  it.effect(
    "a key is never decided by a transaction that has not ended: when it rolls back, the waiting contender has the key",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const stranger = yield* session
      yield* stranger.query("begin")
      yield* stranger.store.insertUnique([keyed("a")], false, undefined)
      const contender = keyed("a")
      const waiting = yield* blocked(store.insertUnique([contender], false, undefined))
      yield* stranger.query("rollback")
      assert.deepStrictEqual([...(yield* join(waiting))], [contender.id])
    }))
  )

  it.effect(
    "keys are stored hashed",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* store.insertUnique([keyed("ada@example.com")], false, undefined)
      const clear = yield* value<number>(
        "select count(*)::int4 from pgqueue.unique_key k, pgqueue.job j where position('ada'::bytea in k.key || j.unique_key) > 0"
      )
      assert.strictEqual(clear, 0)
    }))
  )
})
