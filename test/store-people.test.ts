/** What people do to jobs and what they can know of them: cancel, retry, delete, redrive, and the life of one job. */
import { assert, describe, it as top, layer } from "@effect/vitest"
import { Deferred, Duration, Effect, Fiber, Layer, Option, Result, Schedule, Schema } from "effect"
import { SqlClient } from "effect/sql"
import * as Database from "../src/Database.ts"
import { Admin, Job, JobQueue, Worker } from "../src/index.ts"
import * as Migrations from "../src/Migrations.ts"
import * as Store from "../src/Store.ts"
import { rows, withQueue } from "./support/queue.ts"
import {
  bury,
  claim,
  claimed,
  count,
  entry,
  failure,
  job,
  jobs,
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

/** Everything that is stored, to see that nothing has changed. */
const stored = value<string>(
  `select json_build_object(${
    ["job", "ready", "lease", "finished", "archive", "attempt", "unique_key"].map((table) =>
      `'${table}', (select json_agg(t order by t::text) from (select xmin::text, * from pgqueue.${table}) t)`
    ).join(", ")
  })::text`
)
const unchanged = <A, E, R>(self: Effect.Effect<A, E, R>) =>
  Effect.gen(function*() {
    const before = yield* stored
    const answer = yield* self
    assert.deepStrictEqual(JSON.parse(yield* stored), JSON.parse(before))
    return answer
  })
/** The status that a refused action found, or what the action answered. */
const refusal = <A, E, R>(self: Effect.Effect<A, E | Admin.Stale, R>) =>
  Effect.map(Effect.result(self), (result) =>
    Result.isSuccess(result)
      ? { done: result.success }
      : result.failure instanceof Admin.Stale
      ? { stale: Option.getOrElse(result.failure.status, () => "nowhere"), operation: result.failure.operation }
      : { failure: result.failure })
const details = (id: string) => Effect.map(Admin.get(id), Option.getOrThrow)
const some = <A>(option: Option.Option<A>) => Option.getOrUndefined(option)
/** Moves finished jobs to where the old ones are kept. */
const archive = query(
  `with gone as (delete from pgqueue.finished returning *) insert into pgqueue.archive select * from gone`
)
/** A keyed job that has failed once and waits for its next attempt. */
const failedOnce = Effect.fnUntraced(function*(options: Partial<Store.NewJob> = {}) {
  const { store } = yield* Storage
  const held = yield* claimed([keyed("key", options)])
  yield* store.settle(held.worker, [entry(held.lease, held.ids[0]!, "failed", { delay: 60_000, failure })])
  return { ...held, id: held.ids[0]! }
})
/** One job that has ended in each way, keyed by how. */
const endedJobs = Effect.gen(function*() {
  const { store } = yield* Storage
  const held = yield* claimed(jobs(3))
  const [completed, cancelled, discarded] = held.ids as [string, string, string]
  yield* store.settle(held.worker, [
    entry(held.lease, completed, "completed", { result: `{"ok":true}` }),
    entry(held.lease, cancelled, "cancelled", { reason: "enough" }),
    entry(held.lease, discarded, "failed", { failure })
  ])
  return { ...held, completed, cancelled, discarded }
})
/** What listeners of this process are told from now on, in words. */
const heard = Effect.gen(function*() {
  const { internal } = yield* JobQueue
  const words: Array<string> = []
  yield* internal.wakeup.subscribe({
    works: () => false,
    onDue: (queue) => words.push(`due ${queue}`),
    onCancel: (id) => words.push(`cancel ${id}`),
    onEnd: (id) => words.push(`end ${id}`),
    onSchedule: () => {},
    onLost: () => {}
  })
  return words
})
const malformed = [
  "",
  "no id",
  "0190b5a0-0000-7000-8000-00000000000",
  "{0190b5a0-0000-7000-8000-000000000001}",
  "%",
  "\0"
]

layer(Layer.provideMerge(JobQueue.layer(), Storage.layer), { excludeTestServices: true })("people", (it) => {
  // ---------------------------------------------------------------------------
  // Cancel
  // ---------------------------------------------------------------------------

  it.effect(
    "a waiting job that is cancelled ends with its reason and without its key, and keeps its attempts",
    rule(Effect.gen(function*() {
      const { id } = yield* failedOnce()
      assert.strictEqual(yield* Admin.cancel(id, { reason: "enough" }), "cancelled")
      const state = yield* stateOf(id)
      assert.deepInclude(state, { place: "finished", status: "cancelled", reason: "enough", attempt: 1, error: null })
      assert.deepInclude(state, { lease: null, worker: null, started_at: null, payload: { a: 1 } })
      assert.deepStrictEqual([yield* count("job"), yield* count("ready"), yield* count("unique_key")], [0, 0, 0])
      assert.deepStrictEqual((yield* Admin.attempts(id)).map(({ attempt, tag }) => [attempt, tag]), [[1, "Failed"]])
    }))
  )

  it.effect(
    "a job that waits is found wherever it stands: at any priority, in the future, as a suspect, parked",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const lanes = Store.priorityLanes
      const plain = lanes.flatMap((priority) => [job({ priority }), job({ priority, delay: 1e9 })])
      yield* store.insert(plain, false)
      for (let crash = 0; crash < 2; crash++) {
        yield* makeDue
        const victim = yield* worker()
        yield* claim(victim, { lanes: [...lanes, ...Store.suspectLanes].map(Store.laneStart) })
        yield* bury(victim)
        yield* store.rescue(10)
      }
      assert.strictEqual(yield* value("select min(lane)::int4 from pgqueue.ready"), 100)
      const strange = lanes.map((priority) => job({ priority, kind: "strange" }))
      yield* store.insert(strange, false)
      yield* worker()
      assert.strictEqual(yield* store.park(lanes, 100), 10)
      yield* store.insert(lanes.map((priority) => job({ priority, delay: 1e9 })), false)
      const ids = (yield* query<{ id: string }>("select id::text as id from pgqueue.job")).map(({ id }) => id)
      for (const id of ids) assert.strictEqual(yield* Admin.cancel(id), "cancelled")
      assert.deepStrictEqual([yield* count("ready"), yield* count("finished")], [0, 40])
    }))
  )

  it.effect(
    "a held job that is cancelled is marked, once, and its end honours the mark",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed(jobs(2))
      const [failing, completing] = held.ids as [string, string]
      for (const id of held.ids) assert.strictEqual(yield* Admin.cancel(id, { reason: "first" }), "cancelling")
      assert.strictEqual(yield* unchanged(Admin.cancel(failing, { reason: "second" })), "cancelling")
      assert.deepInclude(yield* details(failing), {
        status: "running",
        cancelling: true,
        reason: Option.some("first"),
        worker: Option.some(held.worker)
      })
      yield* store.settle(held.worker, [
        entry(held.lease, failing, "failed", { delay: 0, failure }),
        entry(held.lease, completing, "completed", { result: "1" })
      ])
      assert.deepInclude(yield* details(failing), {
        status: "cancelled",
        cancelling: false,
        reason: Option.some("first"),
        attempt: 1
      })
      assert.deepStrictEqual((yield* Admin.attempts(failing)).map(({ tag }) => tag), ["Failed"])
      assert.deepInclude(yield* details(completing), { status: "completed", result: Option.some(1) })
    }))
  )

  it.effect(
    "a reason is made fit to be stored, and none is none",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const reasons = [
        ["a\0b", "a\uFFFDb"],
        ["\uD800x", "\uFFFDx"],
        ["'; drop table pgqueue.job; --", "'; drop table pgqueue.job; --"],
        ["", undefined],
        [undefined, undefined]
      ] as const
      for (const [reason, expected] of reasons) {
        const waiting = job()
        yield* store.insert([waiting], false)
        yield* Admin.cancel(waiting.id, { reason })
        const kept = some((yield* details(waiting.id)).reason)
        assert.strictEqual(kept, expected)
      }
      const long = job()
      yield* store.insert([long], false)
      yield* Admin.cancel(long.id, { reason: "ü".repeat(5000) })
      const kept = some((yield* details(long.id)).reason)!
      // Cut between two characters.
      assert.match(kept, /^ü+$/)
      const bytes = Buffer.byteLength(kept)
      assert.isTrue(bytes > 8180 && bytes <= 8192, `${bytes} bytes`)
    }))
  )

  it.effect(
    "a key with a period outlives the cancel of its job",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const holder = keyed("key", {}, 3_600_000)
      yield* store.insertUnique([holder], false, undefined)
      yield* Admin.cancel(holder.id)
      assert.strictEqual((yield* store.insertUnique([keyed("key")], false, undefined)).size, 0)
    }))
  )

  it.effect(
    "whoever waits for the end is told of it by the cancel of a waiting job and by the settle of a held one",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const [waiting, running, nobodys] = [job({ awaited: true }), job(), job({ delay: 1000 })]
      yield* store.insert([running], false)
      const me = yield* worker()
      const { lease } = yield* claim(me)
      yield* store.insert([waiting, nobodys], false)
      yield* store.awaits(running.id)
      const words = yield* heard
      yield* Admin.cancel(waiting.id)
      yield* Admin.cancel(running.id.toUpperCase())
      yield* Admin.cancel(nobodys.id)
      assert.deepStrictEqual(words, [`end ${waiting.id}`, `cancel ${running.id}`])
      assert.deepStrictEqual(yield* store.settle(me, [entry(lease, running.id, "failed", { delay: 0, failure })]), [
        { lease, id: running.id, state: "done", status: "cancelled", awaited: true }
      ])
    }))
  )

  it.effect(
    "a stranger's transaction on a row makes cancel, retry and delete fail after five seconds, and nothing else",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const waiting = job()
      // Who waits for a row in a line of two waits for each of the two: one job for each.
      const { completed, discarded } = yield* endedJobs
      yield* store.insert([waiting], false)
      const stranger = yield* session
      yield* stranger.query("begin")
      yield* stranger.query("select 1 from pgqueue.job for update")
      yield* stranger.query("select 1 from pgqueue.finished for update")
      yield* unchanged(
        Effect.forEach(
          [Admin.cancel(waiting.id), Admin.retry(discarded), Admin.delete(completed)],
          (act) =>
            Effect.gen(function*() {
              const [took, error] = yield* Effect.timed(Effect.flip(act as Effect.Effect<unknown, any, JobQueue>))
              assert.strictEqual(Database.sqlState(error), "55P03")
              assert.isTrue(Database.isTransient(error))
              assert.isAtLeast(Duration.toMillis(took), 4900)
              assert.isAtMost(Duration.toMillis(took), 9000)
            }),
          { concurrency: "unbounded" }
        )
      )
      yield* stranger.query("rollback")
      // The sessions that gave up are as they were.
      yield* Effect.all([Admin.cancel(waiting.id), Admin.retry(discarded)])
    }))
  )

  // ---------------------------------------------------------------------------
  // What is refused
  // ---------------------------------------------------------------------------

  it.effect(
    "cancel needs a job that has not ended, retry and delete one that has; each refusal says what it found",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const { cancelled, completed, discarded } = yield* endedJobs
      const { id: retryable } = yield* failedOnce()
      const held = yield* claimed([job()])
      const [available, scheduled] = [job(), job({ delay: 1e9 })]
      yield* store.insert([available, scheduled], false)
      for (const [status, id] of Object.entries({ completed, cancelled, discarded })) {
        assert.deepStrictEqual(yield* unchanged(refusal(Admin.cancel(id))), { stale: status, operation: "cancel" })
      }
      const open = { retryable, running: held.ids[0]!, available: available.id, scheduled: scheduled.id }
      for (const [status, id] of Object.entries(open)) {
        assert.deepStrictEqual(yield* unchanged(refusal(Admin.retry(id))), { stale: status, operation: "retry" })
        assert.deepStrictEqual(yield* unchanged(refusal(Admin.delete(id))), { stale: status, operation: "delete" })
      }
      const stale = yield* Effect.flip(Admin.retry(available.id))
      assert.strictEqual(stale.message, `cannot retry ${available.id}: it is available`)
    }))
  )

  it.effect(
    "an id that is unknown, or none at all, is refused as such, and there is nothing to look at",
    rule(Effect.gen(function*() {
      for (const id of [uuid(), ...malformed]) {
        assert.deepStrictEqual(yield* refusal(Admin.cancel(id)), { stale: "nowhere", operation: "cancel" })
        assert.deepStrictEqual(yield* refusal(Admin.retry(id)), { stale: "nowhere", operation: "retry" })
        assert.deepStrictEqual(yield* refusal(Admin.delete(id)), { stale: "nowhere", operation: "delete" })
        assert.isTrue(Option.isNone(yield* Admin.get(id)))
        assert.deepStrictEqual(yield* Admin.attempts(id), [])
      }
      const stale = yield* Effect.flip(Admin.delete("no id"))
      assert.strictEqual(stale._tag === "Stale" && stale.message, "cannot delete no id: there is no such job")
    }))
  )

  it.effect(
    "an id may be written in capitals",
    rule(Effect.gen(function*() {
      const { discarded } = yield* endedJobs
      const id = discarded.toUpperCase()
      assert.strictEqual((yield* details(id)).id, discarded)
      yield* Admin.retry(id)
      assert.strictEqual(yield* Admin.cancel(id), "cancelled")
      assert.strictEqual((yield* Admin.attempts(id)).length, 1)
      yield* Admin.delete(id)
    }))
  )

  // ---------------------------------------------------------------------------
  // Retry
  // ---------------------------------------------------------------------------

  for (const how of ["completed", "cancelled", "discarded"] as const) {
    it.effect(
      `a job that was ${how} and is retried stands in line as if it were new, due at once, with what it came with`,
      rule(Effect.gen(function*() {
        const { store } = yield* Storage
        const original = keyed("key", {
          queue: "mail",
          priority: 2,
          maxAttempts: 3,
          timeout: 1500,
          metadata: `{"tenant":"x"}`,
          trace: "00-trace",
          runAt: 1
        })
        yield* store.insertUnique([original], false, undefined)
        const me = yield* worker()
        const first = yield* claim(me, { queue: "mail" })
        yield* store.progress(first.lease, original.id, `"half"`)
        yield* store.settle(me, [entry(first.lease, original.id, "snoozed", { delay: 0 })])
        const second = yield* claim(me, { queue: "mail" })
        yield* store.awaits(original.id)
        const verb = how === "discarded" ? "failed" : how
        yield* store.settle(me, [entry(second.lease, original.id, verb, { result: "1", failure })])
        // Somebody else has the key by now.
        const other = keyed("key", { delay: 1e9 })
        yield* store.insertUnique([other], false, undefined)
        const words = yield* heard

        yield* Admin.retry(original.id)
        assert.include(words, "due mail")
        const state = yield* stateOf(original.id)
        assert.deepInclude(state, {
          place: "ready",
          kind: "k",
          queue: "mail",
          priority: 2,
          attempt: 0,
          max_attempts: 3,
          rescued: 0,
          snoozed: 1,
          timeout_ms: 1500,
          unique_key: null,
          cancelled_at: null,
          cancel_reason: null,
          awaited: false,
          progress: "half",
          metadata: { tenant: "x" },
          trace: "00-trace",
          payload: { a: 1 }
        })
        assert.deepInclude(yield* details(original.id), { status: "available", result: Option.none() })
        assert.strictEqual(yield* count("finished"), 0)
        const again = yield* claim(me, { queue: "mail" })
        assert.deepInclude(again.rows[0], { id: original.id, attempt: 0, history: null, progress: `"half"` })
        yield* store.settle(me, [entry(again.lease, original.id, "completed")])
        assert.strictEqual(yield* value("select job::text from pgqueue.unique_key"), other.id)
      }))
    )
  }

  it.effect(
    "a suspect that is retried is one no longer",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const killer = job({ maxAttempts: 1 })
      yield* store.insert([killer], false)
      for (let crash = 0; crash < 2; crash++) {
        yield* makeDue
        const victim = yield* worker()
        yield* claim(victim)
        yield* bury(victim)
        yield* store.rescue(10)
      }
      assert.deepInclude(yield* stateOf(killer.id), { status: "discarded", rescued: 2 })
      yield* Admin.retry(killer.id)
      assert.strictEqual(yield* value("select lane::int4 from pgqueue.ready"), 5)
      const tags = (yield* Admin.attempts(killer.id)).map(({ attempt, tag }) => [attempt, tag])
      assert.deepStrictEqual(tags, [[1, "Lost"], [1, "Lost"]])
    }))
  )

  it.effect(
    "a retried job has all its attempts again; the old ones can be read, and neither count nor are shown to its policy",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const stubborn = job({ maxAttempts: 2 })
      yield* store.insert([stubborn], false)
      const me = yield* worker()
      const histories: Array<ReadonlyArray<string>> = []
      const run = Effect.fnUntraced(function*(message: string) {
        const { lease, rows } = yield* claim(me)
        const history = JSON.parse(rows[0]!.history ?? "[]") as ReadonlyArray<{ readonly message: string }>
        histories.push(history.map((one) => one.message))
        const answers = yield* store.settle(me, [
          entry(lease, stubborn.id, "failed", { delay: 0, failure: { ...failure, message } })
        ])
        return answers[0]!.status
      })
      for (const round of ["a", "b", "c"]) {
        assert.strictEqual(yield* run(`${round}1`), null)
        assert.strictEqual(yield* run(`${round}2`), "discarded")
        if (round !== "c") yield* Admin.retry(stubborn.id)
      }
      assert.deepStrictEqual(histories, [[], ["a1"], [], ["b1"], [], ["c1"]])
      assert.deepStrictEqual(
        (yield* Admin.attempts(stubborn.id)).map(({ attempt, message }) => [attempt, message]),
        [[1, "a1"], [2, "a2"], [1, "b1"], [2, "b2"], [1, "c1"], [2, "c2"]]
      )
      assert.deepInclude(yield* stateOf(stubborn.id), { attempt: 2, place: "finished" })
    }))
  )

  it.effect(
    "many are retried in one statement: each once, only those that ended so, and none that is not there",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const { cancelled, completed, discarded } = yield* endedJobs
      const { id: open } = yield* failedOnce()
      const all = [uuid(), discarded, completed, discarded, cancelled, open]
      assert.deepStrictEqual(yield* unchanged(store.retry([], undefined, false)), { count: 0, queues: [] })
      assert.deepStrictEqual(yield* store.retry(all, "discarded", false), { count: 1, queues: ["default"] })
      assert.deepStrictEqual(yield* store.retry(all, undefined, false), { count: 2, queues: ["default"] })
      assert.deepStrictEqual(yield* unchanged(store.retry(all, undefined, false)), { count: 0, queues: [] })
    }))
  )

  it.effect(
    "jobs that are retried together stand in line at one time, in the order of their ids",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed(jobs(50))
      // They ended in another order.
      for (const id of held.ids.toReversed()) {
        yield* store.settle(held.worker, [entry(held.lease, id, "failed", { failure })])
      }
      yield* store.retry(held.ids.toReversed(), undefined, false)
      assert.strictEqual(yield* value("select count(distinct run_at)::int4 from pgqueue.ready"), 1)
      assert.deepStrictEqual((yield* claim(held.worker)).ids, held.ids)
    }))
  )

  it.effect(
    "two retries of many jobs at once, in opposite orders, bring each back once",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed(jobs(100))
      yield* store.settle(held.worker, held.ids.map((id) => entry(held.lease, id, "failed", { failure })))
      const counts = yield* Effect.all(
        Array.from(
          { length: 6 },
          (_, i) => store.retry(i % 2 === 0 ? held.ids : held.ids.toReversed(), "discarded", false)
        ),
        { concurrency: 6 }
      )
      assert.strictEqual(counts.reduce((sum, { count }) => sum + count, 0), 100)
      assert.strictEqual(yield* count("ready"), 100)
    }))
  )

  it.effect(
    "an enqueue that is sent again finds the job that was retried, and inserts nothing",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const original = keyed("key")
      const held = yield* claimed([original])
      yield* store.settle(held.worker, [entry(held.lease, original.id, "completed")])
      yield* Admin.retry(original.id)
      assert.strictEqual((yield* unchanged(store.insertUnique([original], false, undefined))).size, 0)
      assert.strictEqual((yield* unchanged(store.insert([original], false))).size, 0)
    }))
  )

  // ---------------------------------------------------------------------------
  // Delete
  // ---------------------------------------------------------------------------

  it.effect(
    "a deleted job is gone with its attempts, and with nobody else's",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const [gone, kept] = [yield* failedOnce(), yield* claimed([job()])]
      yield* store.settle(kept.worker, [entry(kept.lease, kept.ids[0]!, "failed", { delay: 0, failure })])
      yield* Admin.cancel(gone.id)
      yield* Admin.delete(gone.id)
      assert.isTrue(Option.isNone(yield* Admin.get(gone.id)))
      assert.deepStrictEqual(yield* Admin.attempts(gone.id), [])
      assert.strictEqual(yield* value("select string_agg(job::text, ',') from pgqueue.attempt"), kept.ids[0])
      assert.deepStrictEqual(yield* refusal(Admin.delete(gone.id)), { stale: "nowhere", operation: "delete" })
      // The id is free again, for better or worse.
      assert.strictEqual((yield* store.insert([job({ id: gone.id })], false)).size, 1)
    }))
  )

  it.effect(
    "an archived job can be read and deleted, and not brought back",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const { id } = yield* failedOnce()
      yield* makeDue
      const me = yield* worker()
      const { lease } = yield* claim(me)
      yield* store.progress(lease, id, "7")
      yield* store.settle(me, [entry(lease, id, "failed", { failure: { ...failure, message: "last" } })])
      const { discarded: _, ...others } = yield* endedJobs
      const before = yield* details(id)
      yield* archive
      assert.deepStrictEqual(yield* details(id), before)
      assert.deepInclude(before, { status: "discarded", progress: Option.some(7), attempt: 2 })
      assert.deepStrictEqual((yield* Admin.attempts(id)).map(({ message }) => message), ["boom", "last"])
      assert.deepStrictEqual((yield* store.ends([id], false)).map(({ status }) => status), ["discarded"])
      assert.deepStrictEqual(yield* unchanged(refusal(Admin.retry(id))), { stale: "discarded", operation: "retry" })
      assert.deepStrictEqual(yield* unchanged(refusal(Admin.cancel(id))), { stale: "discarded", operation: "cancel" })
      yield* Admin.delete(id)
      assert.isTrue(Option.isNone(yield* Admin.get(id)))
      assert.strictEqual(yield* count("attempt"), 0)
      assert.strictEqual((yield* details(others.completed)).status, "completed")
    }))
  )

  // ---------------------------------------------------------------------------
  // Redrive
  // ---------------------------------------------------------------------------

  /** Discarded jobs, made on the server: `count` of each kind, a second apart or all at once. */
  const discardedJobs = (kinds: ReadonlyArray<string>, count: number, apart = "1 second", queue = "default") =>
    query(
      `insert into pgqueue.finished (id, kind, queue, priority, status, attempt, max_attempts, rescued, snoozed, metadata,
        enqueued_at, scheduled_for, finished_at, payload, error)
      select gen_random_uuid(), kind, $4::text, 5, 'discarded', 1, 1, 0, 0, '{}', now(), now(), now() - i * $3::interval, '{}',
        '{"tag":"Failed"}'
      from unnest($1::text[]) as kind cross join generate_series(1, $2::int4) as i`,
      [[...kinds], count, apart, queue]
    )

  it.effect(
    "the discarded are read in pages, oldest first, none twice and none left out, though they ended at the same time",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* discardedJobs(["k", "other"], 40, "0")
      yield* discardedJobs(["k"], 5, "1 day")
      yield* discardedJobs(["k"], 5, "1 day", "mail")
      yield* query(
        "update pgqueue.finished set status = 'completed' where id in (select id from pgqueue.finished limit 7)"
      )
      const wanted = yield* query<{ id: string }>(
        "select id::text as id from pgqueue.finished where status = 'discarded' and kind = 'k' and queue = 'default' order by finished_at, id"
      )
      const before = yield* store.clock(false)
      const got: Array<string> = []
      let after: { readonly at: string; readonly id: string } | undefined
      for (;;) {
        const page = yield* store.discarded({ kind: "k", queue: "default", before, after, limit: 7 }, false)
        got.push(...page.map(({ id }) => id))
        if (page.length < 7) break
        after = page[page.length - 1]
      }
      assert.deepStrictEqual(got, wanted.map(({ id }) => id))
      const all = { kind: undefined, queue: undefined, after: undefined, limit: 1000 }
      assert.strictEqual((yield* store.discarded({ ...all, before }, false)).length, 83)
      const epoch = yield* value<string>(
        "select (extract(epoch from max(finished_at)) * 1000000)::int8::text from pgqueue.finished"
      )
      // Before means before.
      assert.isBelow((yield* store.discarded({ ...all, before: epoch }, false)).length, 83)
    }))
  )

  it.effect(
    "a redrive takes one kind, one queue, so many, or those of some time, oldest first",
    rule(Effect.gen(function*() {
      yield* discardedJobs(["a", "b"], 1200)
      yield* discardedJobs(["a"], 10, "1 day", "mail")
      const left = (where: string) => value<number>(`select count(*)::int4 from pgqueue.finished where ${where}`)
      for (const limit of [0, -1]) assert.strictEqual(yield* unchanged(Admin.redrive({ limit })), 0)
      assert.strictEqual(yield* unchanged(Admin.redrive({ kind: "nothing" })), 0)
      // A filter that came out empty or broken is not one that lets everything through.
      assert.strictEqual(yield* unchanged(Admin.redrive({ kind: "" })), 0)
      assert.strictEqual(yield* unchanged(Admin.redrive({ queue: "" })), 0)
      for (const broken of [{ within: NaN }, { within: "soon" as "1 day" }, { limit: NaN }]) {
        assert.propertyVal(yield* unchanged(Effect.flip(Admin.redrive(broken))), "reason", "InvalidOption")
      }
      assert.strictEqual(yield* unchanged(Admin.redrive({ within: 0 })), 0)

      assert.strictEqual(yield* Admin.redrive({ queue: "mail", within: "60 hours" }), 2)
      assert.strictEqual(yield* left("queue = 'mail' and finished_at > now() - interval '60 hours'"), 0)
      assert.strictEqual(yield* Admin.redrive({ queue: "mail" }), 8)

      assert.strictEqual(yield* Admin.redrive({ kind: "a", limit: 700.9 }), 700)
      assert.strictEqual(yield* left("kind = 'b'"), 1200)
      assert.strictEqual(yield* left("kind = 'a' and finished_at < now() - interval '600 seconds'"), 0)
      assert.strictEqual(yield* Admin.redrive({ kind: "a" }), 500)
      assert.strictEqual(yield* Admin.redrive(), 1200)
      assert.deepStrictEqual([yield* count("finished"), yield* count("ready")], [0, 2410])
    }))
  )

  it.effect(
    "a redrive ends, and takes each job once, though what it brings back is discarded again meanwhile",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* discardedJobs(["a", "b"], 600)
      const me = yield* worker({ kinds: ["a", "b"] })
      const first = yield* Deferred.make<void>()
      let again = 0
      const discarding = yield* Effect.forkChild(Effect.forever(Effect.gen(function*() {
        const { ids, lease } = yield* claim(me, { kinds: ["a", "b"], limit: 50 })
        if (ids.length === 0) return yield* Effect.yieldNow
        yield* store.settle(me, ids.map((id) => entry(lease, id, "failed", { failure })))
        again += ids.length
        yield* Deferred.succeed(first, undefined)
      })))
      assert.strictEqual(yield* Admin.redrive({ kind: "a" }), 600)
      // Some of them have been discarded again before the next one, which takes them as well.
      yield* Deferred.await(first)
      const more = yield* Admin.redrive()
      assert.isAtLeast(more, 600)
      assert.isAtMost(more, 1200)
      yield* Fiber.interrupt(discarding)
      assert.isAbove(again, 0)
      assert.strictEqual((yield* count("finished")) + (yield* count("job")), 1200)
    }))
  )

  // ---------------------------------------------------------------------------
  // In the application's transaction
  // ---------------------------------------------------------------------------

  it.effect(
    "what is done in a transaction that rolls back has changed nothing and wakes nobody; a commit does both",
    rule(Effect.gen(function*() {
      const { sql, store } = yield* Storage
      const { cancelled, completed, discarded } = yield* endedJobs
      const held = yield* claimed([job()])
      const waiting = job({ awaited: true })
      yield* store.insert([waiting], false)
      const words = yield* heard
      const everything = Effect.gen(function*() {
        assert.strictEqual(yield* Admin.cancel(waiting.id), "cancelled")
        assert.strictEqual(yield* Admin.cancel(held.ids[0]!), "cancelling")
        yield* Admin.retry(completed)
        yield* Admin.delete(cancelled)
        assert.strictEqual(yield* Admin.redrive(), 1)
        // Inside, it is seen; elsewhere, it is not.
        assert.strictEqual((yield* details(waiting.id)).status, "cancelled")
        assert.strictEqual((yield* details(completed)).status, "available")
        assert.isTrue(Option.isNone(yield* Admin.get(cancelled)))
        assert.deepStrictEqual(yield* refusal(Admin.cancel(waiting.id)), { stale: "cancelled", operation: "cancel" })
        assert.deepInclude(yield* store.inspect(waiting.id, false), { status: "available" })
        assert.deepStrictEqual(words, [])
      })
      yield* unchanged(Effect.flip(sql.withTransaction(Effect.andThen(everything, Effect.fail("no")))))
      assert.deepStrictEqual(words, [])
      yield* sql.withTransaction(everything)
      assert.sameMembers(words, [`end ${waiting.id}`, `cancel ${held.ids[0]}`, "due default", "due default"])
      assert.strictEqual((yield* details(discarded)).status, "available")
    }))
  )

  // ---------------------------------------------------------------------------
  // Looking
  // ---------------------------------------------------------------------------

  it.effect(
    "everything that is stored of a job can be read, in each status",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const plain = job({
        priority: 2,
        payload: `{"n":[1,null]}`,
        metadata: `{"tenant":"x"}`,
        delay: 60_000,
        maxAttempts: 2,
        timeout: 1000
      })
      const { id } = plain
      yield* store.insert([plain], false)
      const scheduled = yield* details(id)
      const millis = (at: { readonly epochMilliseconds: number }) => at.epochMilliseconds
      assert.deepInclude({ ...scheduled, id: String(scheduled.id) }, {
        id,
        kind: "k",
        queue: "default",
        priority: 2,
        status: "scheduled",
        cancelling: false,
        attempt: 0,
        maxAttempts: 2,
        rescued: 0,
        snoozed: 0,
        metadata: { tenant: "x" },
        payload: { n: [1, null] },
        reason: Option.none(),
        startedAt: Option.none(),
        finishedAt: Option.none(),
        worker: Option.none(),
        progress: Option.none(),
        result: Option.none()
      })
      assert.closeTo(millis(scheduled.scheduledFor) - millis(scheduled.enqueuedAt), 60_000, 1000)
      assert.strictEqual(millis(Option.getOrThrow(scheduled.runAt)), millis(scheduled.scheduledFor))

      yield* makeDue
      assert.strictEqual((yield* details(id)).status, "available")
      const me = yield* worker()
      const first = yield* claim(me)
      yield* store.progress(first.lease, id, `{"page":3}`)
      const running = yield* details(id)
      assert.deepInclude(running, {
        status: "running",
        worker: Option.some(me),
        progress: Option.some({ page: 3 })
      })
      assert.isAtLeast(millis(Option.getOrThrow(running.startedAt)), millis(running.enqueuedAt))

      yield* store.settle(me, [entry(first.lease, id, "failed", { delay: 60_000, failure })])
      assert.deepInclude(yield* details(id), { status: "retryable", attempt: 1, worker: Option.none() })
      yield* makeDue
      const second = yield* claim(me)
      yield* store.settle(me, [entry(second.lease, id, "completed", { result: `{"ok":true}`, ran: 0 })])
      const completed = yield* details(id)
      assert.deepInclude(completed, {
        status: "completed",
        attempt: 2,
        result: Option.some({ ok: true }),
        runAt: Option.none(),
        worker: Option.some(me),
        progress: Option.some({ page: 3 })
      })
      assert.isTrue(Option.isSome(completed.startedAt) && Option.isSome(completed.finishedAt))

      const strange = job({ kind: "strange" })
      yield* store.insert([strange], false)
      assert.strictEqual(yield* store.park(Store.priorityLanes, 10), 1)
      assert.strictEqual((yield* details(strange.id)).status, "available")
    }))
  )

  it.effect(
    "the attempts of a job are read oldest first, each as it was, the last one with them",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const { id, worker: first } = yield* failedOnce({ maxAttempts: 3 })
      yield* makeDue
      const victim = yield* worker()
      yield* claim(victim)
      yield* bury(victim)
      yield* store.rescue(10)
      yield* makeDue
      const last = yield* worker()
      const { lease } = yield* claim(last)
      yield* store.settle(last, [
        entry(lease, id, "failed", { failure: { tag: "TimedOut", message: "", error: undefined }, ran: 1500 })
      ])
      const attempts = yield* Admin.attempts(id)
      assert.deepStrictEqual(
        attempts.map(({ attempt, error, message, tag, worker }) => [attempt, tag, message, some(error), some(worker)]),
        [
          [1, "Failed", "boom", { _tag: "Boom" }, first],
          [2, "Lost", "the worker that ran this attempt was lost", undefined, victim],
          [2, "TimedOut", "", undefined, last]
        ]
      )
      assert.deepStrictEqual(attempts.map(({ startedAt }) => Option.isSome(startedAt)), [true, false, true])
      const { endedAt, startedAt } = attempts[2]!
      assert.strictEqual(endedAt.epochMilliseconds - Option.getOrThrow(startedAt).epochMilliseconds, 1500)
      const times = attempts.map((one) => one.endedAt.epochMilliseconds)
      assert.deepStrictEqual(times, times.toSorted((a, b) => a - b))
    }))
  )

  it.effect(
    "the ends of many jobs are read at once: open, ended, archived, and nothing of one that is nowhere",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const old = yield* endedJobs
      yield* archive
      const { cancelled, completed, discarded } = yield* endedJobs
      const { id: waiting } = yield* failedOnce()
      const held = (yield* claimed([job()])).ids[0]!
      const asked = [waiting, completed, uuid(), held, cancelled, discarded, old.completed, waiting]
      const ends = yield* store.ends(asked, false)
      const end = { kind: "k", reason: null, result: null, error: null }
      const open = { ...end, id: waiting, status: "open" }
      assert.deepStrictEqual(
        ends.map(({ error, result, status, ...row }) => ({
          ...row,
          status: String(status),
          result: result === null ? null : JSON.parse(result),
          error: error === null ? null : JSON.parse(error)
        })),
        [
          open,
          { ...end, id: completed, status: "completed", result: { ok: true } },
          { ...end, id: held, status: "open" },
          { ...end, id: cancelled, status: "cancelled", reason: "enough" },
          {
            ...end,
            id: discarded,
            status: "discarded",
            error: { tag: "Failed", message: "boom", error: { _tag: "Boom" } }
          },
          { ...end, id: old.completed, status: "completed", result: { ok: true } },
          open
        ]
      )
      assert.deepStrictEqual(yield* store.ends([], false), [])
    }))
  )

  it.effect(
    "a job is marked as awaited once, and its end is told by whoever ends it",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed(jobs(4, { maxAttempts: 1 }))
      for (const id of held.ids.slice(0, 3)) yield* store.awaits(id)
      yield* unchanged(Effect.forEach([...held.ids.slice(0, 3), uuid()], (id) => store.awaits(id)))
      const [one, two, three, nobodys] = held.ids as [string, string, string, string]
      assert.deepStrictEqual(
        yield* store.settle(held.worker, [
          entry(held.lease, one, "completed"),
          entry(held.lease, nobodys, "completed")
        ]),
        [{ lease: held.lease, id: one, state: "done", status: "completed", awaited: true }]
      )
      yield* store.cancel(two, "", false)
      assert.deepStrictEqual((yield* store.release(held.worker, [held.lease])).awaited, [two])
      yield* query("update pgqueue.job set rescued = 1")
      const victim = yield* worker()
      yield* claim(victim)
      yield* bury(victim)
      assert.deepStrictEqual((yield* store.rescue(10)).awaited, [three])
      yield* unchanged(store.awaits(one))
    }))
  )

  it.effect(
    "a stranger's transaction on a job holds up nobody who begins to wait for its end",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const waiting = job()
      yield* store.insert([waiting], false)
      const stranger = yield* session
      yield* stranger.query("begin")
      yield* stranger.query("select 1 from pgqueue.job for update")
      const hasty = yield* session
      yield* hasty.query("set lock_timeout = 1000")
      // It is not marked, so the end is found by looking.
      yield* unchanged(hasty.store.awaits(waiting.id))
      yield* stranger.query("commit")
      yield* store.awaits(waiting.id)
      assert.deepInclude(yield* store.cancel(waiting.id, "", false), { awaited: true })
    }))
  )

  // ---------------------------------------------------------------------------
  // What a handler says, and a lease of its own
  // ---------------------------------------------------------------------------

  it.effect(
    "progress is stored under the lease, replaced by the next, kept with the end, and nobody else's words count",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const { discarded } = yield* endedJobs
      const held = yield* claimed(jobs(2))
      const [mine, neighbour] = held.ids as [string, string]
      const said = (id: string) => Effect.map(details(id), ({ progress }) => some(progress))
      yield* store.progress(held.lease, mine, "1")
      yield* store.progress(held.lease, mine, `{"page": 2}`)
      assert.deepStrictEqual([yield* said(mine), yield* said(neighbour)], [{ page: 2 }, undefined])
      yield* store.settle(held.worker, [entry(held.lease, mine, "snoozed", { delay: 0 })])
      const other = yield* worker()
      const { lease } = yield* claim(other)
      yield* unchanged(Effect.forEach(
        [[held.lease, mine], [lease, neighbour], [lease, discarded], [uuid(), mine], [lease, uuid()]] as const,
        ([lease, id]) => store.progress(lease, id, `"stale"`)
      ))
      yield* store.settle(other, [entry(lease, mine, "completed")])
      assert.deepStrictEqual(yield* said(mine), { page: 2 })
      yield* unchanged(store.progress(lease, mine, `"late"`))
    }))
  )

  it.effect(
    "progress that is too long for the storage is refused by it and changes nothing",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed([job()])
      const text = (bytes: number) => JSON.stringify("x".repeat(bytes - 2))
      const error = yield* unchanged(
        Effect.flip(store.progress(held.lease, held.ids[0]!, text(Migrations.maxProgressBytes + 1)))
      )
      assert.isTrue(Database.isUnstorable(error))
      yield* store.progress(held.lease, held.ids[0]!, text(Migrations.maxProgressBytes))
    }))
  )

  it.effect(
    "progress waits for no stranger's transaction, and counts when it is over",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed(jobs(2))
      const [mine, neighbour] = held.ids as [string, string]
      const stranger = yield* session
      yield* stranger.query("begin")
      yield* stranger.query("select 1 from pgqueue.job where id = $1::uuid for update", [mine])
      const hasty = yield* session
      yield* hasty.query("set lock_timeout = 1000")
      // It is to be sent again, and has locked nothing.
      assert.strictEqual(yield* hasty.store.progress(held.lease, mine, "1"), "busy")
      assert.deepStrictEqual(yield* hasty.store.settle(held.worker, [entry(held.lease, neighbour, "completed")]), [])
      yield* stranger.query("commit")
      assert.strictEqual(yield* store.progress(held.lease, mine, "1"), "done")
      assert.deepStrictEqual((yield* details(mine)).progress, Option.some(1))
    }))
  )

  it.effect(
    "progress does not wait for a lease that is being settled: it would keep that settle from the job's row",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed([job()])
      const id = held.ids[0]!
      const handler = yield* session
      yield* handler.query("begin")
      // What the settle of a transactional handler locks first, and keeps while it finds the job busy.
      yield* handler.query("select 1 from pgqueue.lease where id = $1::uuid for update", [held.lease])
      assert.strictEqual(yield* unchanged(store.progress(held.lease, id, "1")), "busy")
      yield* handler.store.settle(held.worker, [entry(held.lease, id, "completed")])
      yield* handler.query("commit")
      assert.strictEqual(yield* unchanged(store.progress(held.lease, id, "1")), "done")
    }))
  )

  it.effect(
    "progress that has waited says nothing of a job that has left its lease meanwhile",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed([job()])
      const settling = yield* session
      yield* settling.query("begin")
      yield* settling.store.settle(held.worker, [entry(held.lease, held.ids[0]!, "snoozed", { delay: 0 })])
      const hasty = yield* session
      yield* hasty.query("set lock_timeout = 1000")
      assert.strictEqual(yield* hasty.store.progress(held.lease, held.ids[0]!, "1"), "busy")
      yield* settling.query("commit")
      assert.strictEqual(yield* store.progress(held.lease, held.ids[0]!, "1"), "done")
      assert.isTrue(Option.isNone((yield* details(held.ids[0]!)).progress))
    }))
  )

  it.effect(
    "a job is moved into a lease of its own, unless it has one or has left",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed(jobs(3))
      const [one, two, three] = held.ids as [string, string, string]
      const own = uuid()
      assert.strictEqual(yield* store.detach(held.lease, one, own), "moved")
      assert.deepStrictEqual(
        yield* query(
          "select id::text as id, worker::text as worker, ids::text as ids from pgqueue.lease order by cardinality(ids)"
        ),
        [
          { id: own, worker: held.worker, ids: `{${one}}` },
          { id: held.lease, worker: held.worker, ids: `{${two},${three}}` }
        ]
      )
      assert.strictEqual(yield* unchanged(store.detach(held.lease, one, uuid())), "gone")
      assert.strictEqual(yield* unchanged(store.detach(own, one, uuid())), "alone")
      assert.strictEqual(yield* unchanged(store.detach(uuid(), two, uuid())), "gone")
      assert.strictEqual(yield* unchanged(store.detach(held.lease, uuid(), uuid())), "gone")
      const answers = yield* store.settle(held.worker, [
        entry(held.lease, one, "discarded"),
        entry(held.lease, two, "completed"),
        entry(own, one, "completed")
      ])
      assert.deepStrictEqual(answers, [{ lease: held.lease, id: one, state: "gone", status: null, awaited: false }])
      assert.strictEqual(yield* unchanged(store.detach(held.lease, three, uuid())), "alone")
      yield* bury(held.worker)
      yield* store.rescue(10)
      assert.strictEqual(yield* unchanged(store.detach(held.lease, three, uuid())), "gone")
    }))
  )

  it.effect(
    "a lease of its own holds up nobody who was claimed with it",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed(jobs(2))
      const own = uuid()
      yield* store.detach(held.lease, held.ids[0]!, own)
      const transaction = yield* session
      yield* transaction.query("begin")
      yield* transaction.store.settle(held.worker, [entry(own, held.ids[0]!, "completed")])
      assert.deepStrictEqual(yield* store.settle(held.worker, [entry(held.lease, held.ids[1]!, "completed")]), [])
      yield* transaction.query("rollback")
      yield* bury(held.worker)
      assert.deepInclude(yield* store.rescue(10), { leases: 1, back: 1 })
    }))
  )
})

// ---------------------------------------------------------------------------
// With a worker
// ---------------------------------------------------------------------------

class Refused extends Schema.TaggedError<Refused>()("Refused", { run: Schema.Finite }) {}

class Stubborn extends Job.make("stubborn", { error: Refused, maxAttempts: 10, retry: Schedule.recurs(2) }) {}

describe("a retried job and its worker", () => {
  top.live(
    "its policy begins anew, its handler sees no old failure, and Admin shows all of it",
    () =>
      withQueue(Effect.gen(function*() {
        const seen: Array<readonly [attempt: number, last: string | undefined]> = []
        const work = Worker.runUntilEmpty({ jobs: [Stubborn] }).pipe(
          Effect.provide(Stubborn.toLayer(() =>
            Effect.flatMap(Job.Current, ({ attempt, lastFailure }) => {
              seen.push([attempt, some(lastFailure)?._tag])
              return new Refused({ run: seen.length })
            })
          ))
        )
        const { id } = yield* Stubborn.enqueue()
        yield* work
        yield* Admin.retry(id)
        yield* work
        const round = [[1, undefined], [2, "Failed"], [3, "Failed"]] as const
        assert.deepStrictEqual(seen, [...round, ...round])
        assert.deepStrictEqual(
          (yield* Admin.attempts(id)).map(({ attempt, error }) => [attempt, some(error)]),
          [1, 2, 3, 4, 5, 6].map((run) => [(run - 1) % 3 + 1, { _tag: "Refused", run }])
        )
        assert.deepInclude(Option.getOrThrow(yield* Admin.get(id)), {
          status: "discarded",
          attempt: 3,
          maxAttempts: 10
        })
        yield* Admin.delete(id)
        assert.deepStrictEqual(yield* rows("select 1 from pgqueue.attempt"), [])
      }))
  )

  top.live(
    "inside a transaction of the application's client it is not there before the commit",
    () =>
      withQueue(Effect.gen(function*() {
        const sql = yield* SqlClient.SqlClient
        const { id } = yield* Stubborn.enqueue()
        yield* sql.withTransaction(Effect.andThen(Admin.cancel(id), Effect.fail("no"))).pipe(Effect.flip)
        assert.deepInclude(Option.getOrThrow(yield* Admin.get(id)), { status: "available" })
        yield* sql.withTransaction(Admin.cancel(id))
        assert.deepInclude(Option.getOrThrow(yield* Admin.get(id)), { status: "cancelled" })
      }))
  )
})
