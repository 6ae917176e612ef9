/** Claim: what is taken, in which order, by whom, and what the cursor may skip. */
import { assert, layer } from "@effect/vitest"
import { Duration, Effect, Schedule } from "effect"
import * as Store from "../src/Store.ts"
import {
  bury,
  claim,
  claimOptions,
  entry,
  failure,
  job,
  jobs,
  makeDue,
  query,
  rule,
  session,
  Storage,
  uuid,
  value,
  worker
} from "./support/storage.ts"

const lanes = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9].map(Store.laneStart)
const line = Effect.map(
  query<{ id: string }>("select id::text as id from pgqueue.ready order by lane, run_at, id"),
  (rows) => rows.map((row) => row.id)
)
const inLine = value<number>("select count(*)::int4 from pgqueue.ready")
/** Waits until everything in line is due by the clock of the database. */
const allDue = value<number>("select count(*)::int4 from pgqueue.ready where run_at > clock_timestamp()").pipe(
  Effect.filterOrFail((future) => future === 0),
  Effect.retry(Schedule.spaced("5 millis")),
  Effect.orDie
)
/** The cursor after the last row of each lane. */
const after = (cursors: ReadonlyArray<Store.LaneCursor>, rows: ReadonlyArray<Store.ClaimedRow>) =>
  cursors.map((cursor) => {
    const last = rows.findLast((row) => row.lane === cursor.lane)
    return last === undefined ? cursor : { lane: cursor.lane, runAt: last.run_at, id: last.id }
  })

/** 240 jobs of all priorities, in several batches, with due times that coincide and that differ. */
const mixedLine = Effect.gen(function*() {
  const { store } = yield* Storage
  for (let batch = 0; batch < 4; batch++) {
    const all = Array.from({ length: 60 }, (_, i) => job({ priority: (i * 7 + batch) % 10, delay: (i * 13) % 29 }))
    yield* store.insert(all, false)
  }
  yield* allDue
})

layer(Storage.layer, { excludeTestServices: true })("claim", (it) => {
  for (const limit of [1, 7, 100]) {
    for (const cursors of ["from the front", "from the cursor"]) {
      it.effect(
        `takes in the order lane, due time, id: ${limit} at a time, ${cursors}`,
        rule(Effect.gen(function*() {
          yield* mixedLine
          const expected = yield* line
          const me = yield* worker()
          const got: Array<string> = []
          let at = lanes
          for (;;) {
            const { ids, rows } = yield* claim(me, { lanes: at, limit })
            if (ids.length === 0) break
            assert.isAtMost(ids.length, limit)
            got.push(...ids)
            if (cursors === "from the cursor") at = after(at, rows)
          }
          assert.deepStrictEqual(got, expected)
          assert.strictEqual(yield* inLine, 0)
        }))
      )
    }
  }

  it.effect(
    "goes through the lanes in the order they are named, one lease for all",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const [normal, suspect, high] = [job(), job({ priority: 7 }), job({ priority: 2 })]
      yield* store.insert([normal, suspect, high], false)
      const { ids, lease } = yield* claim(yield* worker(), { lanes: [7, 2, 5].map(Store.laneStart) })
      assert.deepStrictEqual(ids, [suspect.id, high.id, normal.id])
      assert.strictEqual(yield* value("select string_agg(id::text, ',') from pgqueue.lease"), lease)
    }))
  )

  it.effect(
    "never takes a job before it is due by the database's clock",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* store.insert(Array.from({ length: 50 }, (_, i) => job({ delay: 20 + i * 5 })), false)
      yield* store.insert([job({ runAt: 4e12 }), job({ delay: 1e9 })], false)
      const me = yield* worker()
      let taken = 0
      yield* Effect.repeat(
        Effect.map(claim(me), ({ ids }) => taken += ids.length),
        { until: () => taken === 50 }
      )
      const early = yield* value(`select count(*)::int4 from pgqueue.lease l cross join unnest(l.ids) as u(id)
        join pgqueue.job j on j.id = u.id where j.run_at > l.claimed_at`)
      assert.strictEqual(early, 0)
      assert.strictEqual(yield* inLine, 2)
    }))
  )

  it.effect(
    "a due time in the past means now, so nothing jumps the line",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const [first, second] = [job(), job({ runAt: 1000 })]
      yield* store.insert([first], false)
      yield* store.insert([second], false)
      assert.deepStrictEqual((yield* claim(yield* worker())).ids, [first.id, second.id])
    }))
  )

  it.effect(
    "skips rows that somebody holds and does not wait for them",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const all = jobs(10)
      yield* store.insert(all, false)
      const stranger = yield* session
      yield* stranger.query("begin")
      const held =
        (yield* stranger.query("select id::text as id from pgqueue.ready order by run_at, id limit 4 for update"))
          .map((row) => String(row["id"]))
      const me = yield* worker()
      const [took, { ids }] = yield* Effect.timed(claim(me, { limit: 10 }))
      assert.isBelow(Duration.toMillis(took), 4000)
      assert.sameMembers(ids, all.map((j) => j.id).filter((id) => !held.includes(id)))
      yield* stranger.query("rollback")
      assert.sameMembers((yield* claim(me)).ids, held)
    }))
  )

  it.effect(
    "takes only the kinds and prefixes it was given, of its queue",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const [a, report, b, other] = [
        job({ kind: "a" }),
        job({ kind: "report:daily" }),
        job({ kind: "b" }),
        job({ kind: "a", queue: "other" })
      ]
      const odd = job({ kind: "report%" })
      yield* store.insert([a, report, b, other, odd], false)
      const me = yield* worker()
      assert.deepStrictEqual((yield* claim(me, { kinds: ["nothing"] })).ids, [])
      assert.deepStrictEqual((yield* claim(me, { kinds: [], prefixes: [] })).ids, [])
      assert.deepStrictEqual((yield* claim(me, { kinds: ["a", "nothing"] })).ids, [a.id])
      assert.deepStrictEqual((yield* claim(me, { kinds: [], prefixes: ["report:", "x"] })).ids, [report.id])
      assert.deepStrictEqual(
        (yield* claim(me, { kinds: ["b"], prefixes: ["rep"] })).ids.toSorted(),
        [b.id, odd.id].toSorted()
      )
      assert.deepStrictEqual((yield* claim(me, { kinds: ["a"], queue: "other" })).ids, [other.id])
    }))
  )

  it.effect(
    "takes nothing for a worker that is not registered",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* store.insert(jobs(3), false)
      assert.deepStrictEqual((yield* claim(uuid())).ids, [])
      const me = yield* worker()
      yield* bury(me)
      assert.deepStrictEqual((yield* claim(me)).ids, [])
      assert.strictEqual(yield* value("select count(*)::int4 from pgqueue.lease"), 0)
      assert.strictEqual(yield* inLine, 3)
    }))
  )

  it.effect(
    "the cursor goes on after a row, and a sweep from the front finds what was committed late behind it",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const late = yield* session
      const behind = job()
      yield* late.query("begin")
      yield* late.store.insert([behind], false)
      const [first, second, third] = [job(), job(), job()]
      for (const one of [first, second, third]) yield* store.insert([one], false)
      const me = yield* worker()
      const one = yield* claim(me, { limit: 1 })
      assert.deepStrictEqual(one.ids, [first.id])
      const cursor = after([Store.laneStart(5)], one.rows)
      yield* late.query("commit")
      const two = yield* claim(me, { lanes: cursor })
      assert.deepStrictEqual(two.ids, [second.id, third.id])
      assert.deepStrictEqual((yield* claim(me, { lanes: after(cursor, two.rows) })).ids, [])
      yield* store.release(me, [one.lease])
      assert.deepStrictEqual((yield* claim(me, { lanes: cursor })).ids, [])
      assert.deepStrictEqual((yield* claim(me)).ids, [behind.id, first.id])
    }))
  )

  it.effect(
    "the cursor is exact to the microsecond and goes on inside one due time",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* store.insert(jobs(9), false)
      yield* query(`with line as (update pgqueue.ready set run_at = '2024-06-15 12:34:56.789013Z' returning id, run_at)
        update pgqueue.job j set run_at = line.run_at from line where line.id = j.id`)
      const expected = yield* line
      const me = yield* worker()
      let cursor = [Store.laneStart(5)]
      for (let i = 0; i < 9; i += 3) {
        const { ids, rows } = yield* claim(me, { lanes: cursor, limit: 3 })
        assert.deepStrictEqual(ids, expected.slice(i, i + 3))
        cursor = after(cursor, rows)
      }
      assert.strictEqual(cursor[0]?.runAt, "1718454896789013")
    }))
  )

  it.effect(
    "brings the job with everything it was enqueued with, and its earlier attempts",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const one = job({
        payload: `{"b" : 1, "a":"\u00e4"}`,
        metadata: `{"tenant":"x"}`,
        trace: "00-trace",
        timeout: 1500,
        maxAttempts: 7
      })
      yield* store.insert([one], false)
      const me = yield* worker()
      const first = yield* claim(me)
      assert.deepInclude(first.rows[0], {
        id: one.id,
        lane: 5,
        kind: "k",
        priority: 5,
        attempt: 0,
        max_attempts: 7,
        rescued: 0,
        timeout_ms: 1500,
        trace: "00-trace",
        metadata: one.metadata,
        payload: one.payload,
        history: null
      })
      yield* store.settle(me, [entry(first.lease, one.id, "failed", { delay: 0, failure })])
      const second = yield* claim(me)
      yield* store.settle(me, [
        entry(second.lease, one.id, "failed", { delay: 0, failure: { ...failure, message: "again" } })
      ])
      const third = (yield* claim(me)).rows[0]!
      assert.strictEqual(third.attempt, 2)
      assert.strictEqual(third.scheduled_for, first.rows[0]?.scheduled_for)
      const history: ReadonlyArray<Store.AttemptRow> = JSON.parse(third.history ?? "[]")
      assert.deepStrictEqual(history.map(({ error, message, n, tag }) => ({ n, tag, message, error })), [
        { n: 1, tag: "Failed", message: "boom", error: { _tag: "Boom" } },
        { n: 2, tag: "Failed", message: "again", error: { _tag: "Boom" } }
      ])
      assert.isTrue(third.enqueued_at <= history[0]!.at && history[0]!.at <= history[1]!.at)
    }))
  )

  it.effect(
    "an entry in line without its job is handed out once, as null, and can be settled away",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const [gone, good] = [job(), job()]
      yield* store.insert([gone, good], false)
      yield* query("delete from pgqueue.job where id = $1::uuid", [gone.id])
      const me = yield* worker()
      const { ids, lease, rows } = yield* claim(me)
      assert.deepStrictEqual(rows.map((row) => row.kind), [null, "k"])
      const answers = yield* store.settle(me, ids.map((id) => entry(lease, id, "completed")))
      assert.deepStrictEqual(answers, [{ lease, id: gone.id, state: "gone", status: null, awaited: false }])
    }))
  )

  it.effect(
    "twenty claimers at once never get the same job, and get all of them",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      for (let i = 0; i < 5; i++) yield* store.insert(jobs(1000, { priority: [2, 5, 8][i % 3]! }), false)
      const claimer = Effect.gen(function*() {
        const me = yield* worker()
        const got: Array<string> = []
        while ((yield* inLine) > 0) got.push(...(yield* claim(me, { limit: 17 })).ids)
        return got
      })
      const got = (yield* Effect.all(Array.from({ length: 20 }, () => claimer), { concurrency: 20 })).flat()
      assert.strictEqual(got.length, 5000)
      assert.strictEqual(new Set(got).size, 5000)
    }))
  )

  it.effect(
    "claimers, settlers and rescuers at once lose and double nothing",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* store.insert(jobs(2000, { maxAttempts: 1000 }), false)
      const done: Array<string> = []
      const mortal = Effect.gen(function*() {
        while (done.length < 2000) {
          const me = yield* worker()
          for (let round = 0; round < 5; round++) {
            const { ids, lease } = yield* claim(me, { limit: 20 })
            const verbs = ids.map((id, i) =>
              i % 5 === round ? entry(lease, id, "failed", { delay: 0, failure }) : entry(lease, id, "completed")
            )
            const answers = new Map((yield* store.settle(me, verbs.slice(0, 15))).map((a) => [a.id, a]))
            for (const one of verbs.slice(0, 15)) {
              if (one.verb === "completed" && !answers.has(one.id)) done.push(one.id)
            }
          }
          yield* bury(me)
        }
      })
      const sweeper = Effect.forever(Effect.andThen(store.rescue(10), makeDue))
      yield* Effect.raceFirst(Effect.all(Array.from({ length: 8 }, () => mortal), { concurrency: 8 }), sweeper)
      assert.strictEqual(done.length, 2000)
      assert.strictEqual(new Set(done).size, 2000)
      assert.strictEqual(yield* value("select count(*)::int4 from pgqueue.finished where status = 'completed'"), 2000)
    }))
  )

  it.effect(
    "look tells what is due and how long until something is",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const look = store.look(["default", "other", "empty"], [2, 5])
      yield* store.insert([
        job(),
        job({ delay: 60_000 }),
        job({ queue: "other", delay: 5_000 }),
        job({ queue: "other", priority: 9 })
      ], false)
      const seen = new Map((yield* look).map((row) => [row.queue, row]))
      assert.isTrue(seen.get("default")?.due)
      const wait = seen.get("other")?.wait ?? 0
      assert.isFalse(seen.get("other")?.due)
      assert.isTrue(wait > 0 && wait <= 5_000, `${wait} ms`)
      assert.deepStrictEqual(seen.get("empty"), { queue: "empty", due: false, wait: null })
      yield* claim(yield* worker(), { lanes: [claimOptions("").lanes[1]!] })
      assert.isFalse((yield* look).find((row) => row.queue === "default")?.due)
    }))
  )

  it.effect(
    "stats count every job once, by where it is",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* store.insert([...jobs(6), job({ delay: 60_000 }), job({ kind: "other", queue: "far" })], false)
      const me = yield* worker()
      const { ids, lease } = yield* claim(me, { limit: 5 })
      yield* store.settle(me, [
        entry(lease, ids[0]!, "completed"),
        entry(lease, ids[1]!, "cancelled"),
        entry(lease, ids[2]!, "discarded"),
        entry(lease, ids[3]!, "failed", { delay: 60_000, failure })
      ])
      const [far, near] = (yield* store.stats(false)).toSorted((a, b) => b.queue.localeCompare(a.queue))
      const { lag, ...counts } = near!
      assert.deepStrictEqual(counts, {
        queue: "default",
        kind: "k",
        available: 1,
        scheduled: 1,
        retryable: 1,
        running: 1,
        completed: 1,
        cancelled: 1,
        discarded: 1,
        handled: true
      })
      assert.isTrue(lag > 0 && lag < 60_000)
      assert.deepInclude(far, { queue: "far", kind: "other", available: 1, handled: false })
    }))
  )
})
