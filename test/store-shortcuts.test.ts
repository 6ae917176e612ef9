/** The short forms of insert and settle do what the long ones do, and say when they cannot. */
import { assert, layer } from "@effect/vitest"
import { Effect } from "effect"
import * as Database from "../src/Database.ts"
import type * as Store from "../src/Store.ts"
import {
  blocked,
  claimed,
  count,
  entry,
  failure,
  job,
  jobs,
  join,
  keyed,
  query,
  rule,
  session,
  stateOf,
  Storage,
  uuid
} from "./support/storage.ts"

/** What is stored of jobs but for their ids, in the order of their payloads; times as distances. */
const stored = (table: "job" | "finished") =>
  query<{ row: Record<string, unknown> }>(
    `select (to_jsonb(t) - '{id,lease,worker,run_at,enqueued_at,scheduled_for,started_at,finished_at}'::text[])
       || jsonb_build_object('wait', case when t.scheduled_for > now() + interval '1 day' then round(extract(epoch from t.scheduled_for))
           else round(extract(epoch from t.scheduled_for - t.enqueued_at) * 1000) end,
         'ran', ${
      table === "finished" ? "round(extract(epoch from t.finished_at - t.started_at) * 1000)" : "null"
    }) as row
     from pgqueue.${table} t order by payload::text`
  ).pipe(Effect.map((rows) => rows.map(({ row }) => row)))

layer(Storage.layer, { excludeTestServices: true })("shortcuts", (it) => {
  const many = (): Array<Store.NewJob> => [
    job({ payload: `{"n":0}` }),
    job({ payload: `{"n":1}`, kind: "other", queue: "q", priority: 8, delay: 5000, maxAttempts: 7, timeout: 1500 }),
    job({ payload: `{"n":2}`, runAt: 4e12, metadata: `{"a":"b,{}\\"\\\\"}`, trace: "00-1-2-01", awaited: true }),
    job({ payload: `{"n":3,"text":"\\\\ \\" , {} null é"}`, kind: `a "kind", {with} \\ all`, timeout: 1 })
  ]
  const same = () => Array.from({ length: 3 }, (_, n) => job({ payload: `{"n":${n}}`, timeout: 10, delay: 100 }))

  for (const [what, make] of [["differ", many], ["are alike", same]] as const) {
    it.effect(
      `an insert of new jobs that ${what} stores what any insert stores`,
      rule(Effect.gen(function*() {
        const { store } = yield* Storage
        const lines = query(
          `select r.queue, r.lane, r.kind, r.attempt from pgqueue.ready r join pgqueue.job j on j.id = r.id and j.run_at = r.run_at
           order by j.payload::text`
        )
        yield* store.insert(make(), false)
        const long = [yield* stored("job"), yield* lines]
        yield* query("truncate pgqueue.job, pgqueue.ready")
        yield* store.insertNew(make())
        assert.deepStrictEqual([yield* stored("job"), yield* lines], long)
        assert.lengthOf(long[0]!, make().length)
        for (
          const alone of [
            (job: Store.NewJob) => store.insertNew([job]),
            (job: Store.NewJob) => store.insertNew([job], "x")
          ]
        ) {
          yield* query("truncate pgqueue.job, pgqueue.ready")
          yield* Effect.forEach(make(), alone)
          assert.deepStrictEqual([yield* stored("job"), yield* lines], long)
        }
      }))
    )
  }

  it.effect(
    "an insert of new jobs of which one is there, or has ended, fails as a replay and inserts none",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const [there, ended] = [job(), job()]
      const held = yield* claimed([ended])
      yield* store.settle(held.worker, [entry(held.lease, ended.id, "completed")])
      yield* store.insert([there], false)
      for (const known of [there, ended]) {
        for (
          const insert of [
            store.insertNew([job(), known, job()]),
            store.insertNew([known]),
            store.insertNew([known], "x")
          ]
        ) {
          const error = yield* Effect.flip(insert)
          assert.isTrue(Database.isReplay(error), error.message)
          assert.strictEqual(yield* count("job"), 1)
        }
      }
    }))
  )

  it.effect(
    "an insert of a new job that waits while the job of its id ends is refused",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const original = job()
      const held = yield* claimed([original])
      const settling = yield* session
      yield* settling.query("begin")
      yield* settling.store.settle(held.worker, [entry(held.lease, original.id, "completed")])
      const late = yield* blocked(Effect.flip(store.insertNew([original])))
      yield* settling.query("commit")
      assert.strictEqual(Database.sqlState(yield* join(late)), Database.alreadyEnded)
      assert.strictEqual(yield* count("job"), 0)
    }))
  )

  it.effect(
    "a settle where all have completed stores what any settle stores",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const make = () => [
        ...many().map((one) => ({ ...one, delay: 0, runAt: undefined, kind: "k", queue: "default", awaited: false })),
        keyed("a key", { payload: `{"n":8}` })
      ]
      const settle = Effect.fnUntraced(function*(others: boolean) {
        const failing = job({ payload: `{"n":9}` })
        const all = make()
        const held = yield* claimed([...all, ...(others ? [failing] : [])])
        yield* query(`update pgqueue.job set cancelled_at = clock_timestamp() where payload::text = '{"n":0}'`)
        const entries = all.map((one, n) =>
          entry(held.lease, one.id, "completed", {
            ran: n * 10.5,
            endedAt: 100 - n,
            result: n === 2 ? `{"r":[1,"x"]}` : undefined
          })
        )
        yield* store.settle(
          held.worker,
          [...entries, ...(others ? [entry(held.lease, failing.id, "failed", { failure, delay: 1000 })] : [])],
          200
        )
        assert.strictEqual(yield* count("lease"), 0)
        assert.strictEqual(yield* count("unique_key"), 0)
        assert.strictEqual(yield* count("job"), others ? 1 : 0)
        const found = yield* stored("finished")
        yield* query("truncate pgqueue.job, pgqueue.ready, pgqueue.finished, pgqueue.attempt")
        return found
      })
      const long = yield* settle(true)
      assert.lengthOf(long, make().length)
      assert.deepStrictEqual(yield* settle(false), long)
    }))
  )

  for (const forget of [false, true]) {
    it.effect(
      `a settle where all have completed, ${forget ? "not " : ""}to be kept, leaves what it cannot settle as it is`,
      rule(Effect.gen(function*() {
        const { store } = yield* Storage
        const [fine, awaited, lockedRow, keyLocked, taken, deleted, never] = [
          keyed("a"),
          job({ awaited: true }),
          job(),
          keyed("b"),
          job(),
          job(),
          job()
        ]
        const held = yield* claimed([fine, awaited, lockedRow, keyLocked, taken, deleted])
        const other = uuid()
        yield* query("insert into pgqueue.lease (id, worker, ids) values ($1::uuid, $2::uuid, array[$3::uuid])", [
          other,
          held.worker,
          taken.id
        ])
        yield* query("update pgqueue.lease set ids = array_remove(ids, $2::uuid) where id = $1::uuid", [
          held.lease,
          taken.id
        ])
        yield* query("delete from pgqueue.job where id = $1::uuid", [deleted.id])
        const stranger = yield* session
        yield* stranger.query("begin")
        yield* stranger.query("select from pgqueue.job where id = $1::text::uuid for update", [lockedRow.id])
        yield* stranger.query("select from pgqueue.unique_key where job = $1::text::uuid for update", [keyLocked.id])
        const all = [fine, awaited, lockedRow, keyLocked, taken, deleted, never]
        const settle = store.settle(held.worker, all.map(({ id }) => entry(held.lease, id, "completed", { forget })))
        const answers = yield* settle
        const stateOfAnswer = new Map(answers.map(({ id, state }) => [id, state]))
        assert.deepStrictEqual(all.map(({ id }) => stateOfAnswer.get(id)), [
          undefined,
          "done",
          "busy",
          "busy",
          "gone",
          "gone",
          "gone"
        ])
        const places = Effect.forEach(all, ({ id }) => Effect.map(stateOf(id), ({ place }) => place))
        const ended = forget ? "nowhere" : "finished"
        assert.deepStrictEqual(yield* places, [ended, "finished", "lease", "lease", "lease", "nowhere", "nowhere"])
        yield* stranger.query("rollback")
        assert.deepStrictEqual(
          (yield* settle).map(({ id, state }) => [id, state]).toSorted(),
          [fine, awaited, taken, deleted, never].map(({ id }) => [id, "gone"]).toSorted()
        )
        assert.deepStrictEqual(yield* places, [ended, "finished", ended, ended, "lease", "nowhere", "nowhere"])
        assert.strictEqual(yield* count("unique_key"), 0)
        yield* store.settle(held.worker, [entry(other, taken.id, "completed", { forget })])
        assert.strictEqual(yield* count("lease"), 0)
      }))
    )
  }

  it.effect(
    "a settle where all have completed goes through although an id has ended before",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const all = jobs(3)
      const held = yield* claimed(all)
      yield* query(
        `insert into pgqueue.finished (id, kind, queue, priority, status, attempt, max_attempts, rescued, snoozed, metadata,
           enqueued_at, scheduled_for, payload)
         values ($1::uuid, 'k', 'default', 5, 'discarded', 1, 5, 0, 0, '{}', now(), now(), '{}')`,
        [all[1]!.id]
      )
      const answers = yield* store.settle(held.worker, all.map((one) => entry(held.lease, one.id, "completed")))
      assert.deepStrictEqual(answers, [])
      assert.strictEqual(yield* count("job"), 0)
      assert.strictEqual(yield* count("finished"), 3)
      assert.deepInclude(yield* stateOf(all[1]!.id), { status: "discarded" })
    }))
  )

  for (const mixed of [false, true]) {
    it.effect(
      `a job that is not to be kept leaves nothing when it completes, ${mixed ? "with" : "without"} others beside it`,
      rule(Effect.gen(function*() {
        const { store } = yield* Storage
        const [forgotten, awaited, kept, failing] = [
          keyed("key"),
          job({ awaited: true }),
          job(),
          job({ maxAttempts: 1 })
        ]
        const held = yield* claimed([forgotten, awaited, kept, failing])
        const forget = { forget: true }
        const settle = (entries: Parameters<typeof store.settle>[1]) => store.settle(held.worker, entries)
        const discarded = entry(held.lease, failing.id, "failed", { ...forget, failure })
        const answers = yield* settle([
          entry(held.lease, forgotten.id, "completed", forget),
          entry(held.lease, awaited.id, "completed", forget),
          entry(held.lease, kept.id, "completed"),
          ...(mixed ? [discarded] : [])
        ])
        assert.includeDeepMembers([...answers], [
          { lease: held.lease, id: awaited.id, state: "done", status: "completed", awaited: true }
        ])
        if (!mixed) yield* settle([discarded])
        assert.strictEqual(yield* count("job"), 0)
        assert.strictEqual(yield* count("unique_key"), 0)
        assert.strictEqual(yield* count("lease"), 0)
        const places = yield* Effect.forEach([forgotten, awaited, kept, failing], ({ id }) => stateOf(id))
        assert.deepStrictEqual(places.map(({ place, status }) => [place, status]), [
          ["nowhere", undefined],
          ["finished", "completed"],
          ["finished", "completed"],
          ["finished", "discarded"]
        ])
        assert.deepStrictEqual(
          (yield* settle([entry(held.lease, forgotten.id, "completed", forget)])).map(({ state }) => state),
          ["gone"]
        )
      }))
    )
  }

  it.effect(
    "a job that is not to be kept may come again under its id",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const again = job({ id: uuid() })
      for (let n = 0; n < 2; n++) {
        const held = yield* claimed([again])
        yield* store.settle(held.worker, [entry(held.lease, again.id, "completed", { forget: true })])
      }
      assert.strictEqual(yield* count("finished"), 0)
    }))
  )
})
