/** The statements of cron schedules: each tick once, whoever else is at it. */
import { assert, layer } from "@effect/vitest"
import { Effect } from "effect"
import * as Database from "../src/Database.ts"
import type * as Schedules from "../src/Schedules.ts"
import * as Storage_ from "./support/storage.ts"
import {
  blocked,
  claim,
  entry,
  join,
  keyed,
  query,
  session,
  Storage,
  untilBlocked,
  uuid,
  value,
  worker
} from "./support/storage.ts"

const rule = <A, E, R>(body: Effect.Effect<A, E, R>) =>
  Storage_.rule(Effect.andThen(query("truncate pgqueue.schedule"), body))

const minute = 60_000
/** Ticks in the past: whatever is registered with one is due. */
const tick = (n: number) => Date.UTC(2026, 0, 1) + n * minute
const iso = (millis: number) => new Date(millis).toISOString()

const registration = (options: Partial<Schedules.Registration> = {}): Schedules.Registration => ({
  name: "s",
  spec: "@every 60s",
  timeZone: "UTC",
  kind: "k",
  queue: "default",
  priority: 5,
  maxAttempts: 5,
  timeout: undefined,
  missedWindow: 604_800_000,
  jitter: 0,
  uniquePeriod: undefined,
  payload: `{"a":1}`,
  metadata: `{"schedule":"s"}`,
  missed: 1,
  overlap: "allow",
  uniqueKey: undefined,
  uniqueUntil: "finished",
  version: 0,
  next: tick(0),
  ...options
})
const register = Effect.fnUntraced(function*(...all: ReadonlyArray<Partial<Schedules.Registration>>) {
  const { store } = yield* Storage
  return yield* store.schedules.register(all.map(registration), true, false)
})
const dueRows = Effect.flatMap(Storage, ({ store }) => store.schedules.due(500))
const due = (name = "s") => Effect.map(dueRows, (rows) => rows.find((row) => row.name === name)!)
const advance = (
  row: Schedules.DueRow,
  ticks: ReadonlyArray<number>,
  options: Partial<Schedules.Advance> = {}
): Schedules.Advance => ({ row, ticks, previous: ticks.at(-1), next: (ticks.at(-1) ?? tick(0)) + minute, ...options })
/** Reads a schedule and fires ticks of it. */
const fire = Effect.fnUntraced(function*(ticks: ReadonlyArray<number>, name = "s") {
  const { store } = yield* Storage
  return (yield* store.schedules.fire([advance(yield* due(name), ticks)]))[0]
})
const fired = (options: Partial<Schedules.Fired>): Schedules.Fired => ({
  name: "s",
  queue: "default",
  enqueued: 0,
  waiting: 0,
  skipped: 0,
  delay: 0,
  ...options
})
const follow = Effect.gen(function*() {
  const { store } = yield* Storage
  const free = (yield* store.schedules.look()).waiting.filter(({ free }) => free)
  return yield* store.schedules.follow(free)
})
const tickId = (at: number, name = "s") =>
  value<string>("select pgqueue.tick_id($1::text, $2::timestamptz)::text", [name, iso(at)])
/** The ticks that have a job, in the order in which workers take them. */
const jobTicks = Effect.map(
  query<{ at: number }>("select (extract(epoch from scheduled_for) * 1000)::float8 as at from pgqueue.job order by id"),
  (rows) => rows.map(({ at }) => at)
)
const stored = (name = "s") =>
  Effect.map(
    query<any>(
      `select s.*, xmin::text as xmin, last_job::text as last_job, cardinality(waiting) as waits,
        (extract(epoch from next_at) * 1000)::float8 as next, (extract(epoch from previous_at) * 1000)::float8 as previous
       from pgqueue.schedule s where name = $1`,
      [name]
    ),
    ([row]) => row
  )
/** A worker takes everything in line and completes it. */
const complete = Effect.gen(function*() {
  const { store } = yield* Storage
  const id = yield* worker()
  const { ids, lease } = yield* claim(id)
  yield* store.settle(id, ids.map((job) => entry(lease, job, "completed")))
  return ids
})
const prune = query("delete from pgqueue.finished")
const remove = (id: string) =>
  query(
    `with r as (delete from pgqueue.ready where id = $1::uuid), k as (delete from pgqueue.unique_key where job = $1::uuid)
     delete from pgqueue.job where id = $1::uuid`,
    [id]
  )

layer(Storage.layer, { excludeTestServices: true })("schedules", (it) => {
  // ---------------------------------------------------------------------------
  // A tick and its schedule, in one statement
  // ---------------------------------------------------------------------------

  it.effect(
    "a tick becomes a job with what the schedule says, and the schedule goes on",
    rule(Effect.gen(function*() {
      yield* register({
        kind: "report",
        queue: "mail",
        priority: 2,
        maxAttempts: 9,
        timeout: 1500,
        payload: `{"day":1}`,
        metadata: `{"schedule":"s","x":"y"}`
      })
      assert.deepStrictEqual(yield* fire([tick(0)]), fired({ queue: "mail", enqueued: 1 }))
      const [row] = yield* query<any>(
        `select j.id::text as id, j.kind, j.queue, j.priority, j.max_attempts, j.timeout_ms::int4 as timeout, j.payload::text as payload,
          j.metadata::text as metadata, (extract(epoch from scheduled_for) * 1000)::float8 as at, awaited, unique_key, trace,
          j.run_at <= clock_timestamp() and j.run_at >= j.enqueued_at - interval '1 second' as now,
          (r.queue, r.lane, r.kind, r.run_at, r.attempt) = (j.queue, j.priority, j.kind, j.run_at, 0) as in_line
         from pgqueue.job j join pgqueue.ready r using (id)`
      )
      assert.deepStrictEqual(row, {
        id: yield* tickId(tick(0)),
        kind: "report",
        queue: "mail",
        priority: 2,
        max_attempts: 9,
        timeout: 1500,
        payload: `{"day":1}`,
        metadata: `{"schedule":"s","x":"y"}`,
        at: tick(0),
        awaited: false,
        unique_key: null,
        trace: null,
        now: true,
        in_line: true
      })
      assert.deepInclude(yield* stored(), {
        next: tick(1),
        previous: tick(0),
        last_job: row.id,
        waits: 0,
        problem: null
      })
    }))
  )

  it.effect(
    "a tick in the future waits in line for its time",
    rule(Effect.gen(function*() {
      yield* register({})
      const later = (yield* value<number>("select floor(extract(epoch from clock_timestamp()))::float8")) * 1000 +
        60_000
      const done = yield* fire([later])
      assert.isAbove(done!.delay, 50_000)
      assert.strictEqual(
        yield* value("select count(*)::int4 from pgqueue.ready where run_at = $1::timestamptz", [iso(later)]),
        1
      )
    }))
  )

  it.effect(
    "many schedules fire together, each its own ticks",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const names = Array.from({ length: 500 }, (_, n) => `s${String(n).padStart(3, "0")}`)
      yield* register(...names.map((name) => ({ name })))
      const rows = yield* dueRows
      assert.deepStrictEqual(rows.map(({ name }) => name), names)
      const done = yield* store.schedules.fire(
        rows.map((row, n) => advance(row, Array.from({ length: n % 3 }, (_, i) => tick(i))))
      )
      assert.sameDeepMembers([...done], names.map((name, n) => fired({ name, enqueued: n % 3 })))
      assert.strictEqual((yield* jobTicks).length, 499)
      assert.deepStrictEqual(yield* store.schedules.fire([]), [])
    }))
  )

  it.effect(
    "of two who have read the same row one fires",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* register({})
      const [first, second] = [yield* due(), yield* due()]
      assert.deepStrictEqual(yield* store.schedules.fire([advance(first, [tick(0)])]), [fired({ enqueued: 1 })])
      assert.deepStrictEqual(yield* store.schedules.fire([advance(second, [tick(0), tick(1)])]), [])
      assert.deepStrictEqual(yield* jobTicks, [tick(0)])
      assert.strictEqual((yield* stored()).next, tick(1))
    }))
  )

  for (const overlap of ["skip", "queue"] as const) {
    it.effect(
      `of two who have read the same row one fires, also when no job comes of it: ${overlap}`,
      rule(Effect.gen(function*() {
        const { store } = yield* Storage
        yield* register({ overlap })
        yield* fire([tick(0)])
        const [first, second] = [yield* due(), yield* due()]
        assert.strictEqual((yield* store.schedules.fire([advance(first, [tick(1)])])).length, 1)
        assert.deepStrictEqual(yield* store.schedules.fire([advance(second, [tick(1)])]), [])
        assert.strictEqual((yield* stored()).next, tick(2))
      }))
    )
  }

  it.effect(
    "of many at the same time one fires each schedule, and all of them are fired",
    rule(Effect.gen(function*() {
      const names = Array.from({ length: 100 }, (_, n) => `s${n}`)
      yield* register(
        ...names.map((name) => ({ name, overlap: (["allow", "skip", "queue"] as const)[name.length % 3]! }))
      )
      const rows = yield* dueRows
      const { store } = yield* Storage
      for (let round = 0; round < 5; round++) {
        const shuffled = (n: number) => rows.toSorted((a, b) => (a.name + n < b.name + n ? -1 : 1) * (n % 2 ? 1 : -1))
        yield* Effect.forEach(
          Array.from({ length: 8 }, (_, n) => n),
          (n) => store.schedules.fire(shuffled(n).map((row) => advance(row, [tick(0)]))),
          { concurrency: "unbounded" }
        )
      }
      assert.strictEqual((yield* jobTicks).length, 100)
      assert.strictEqual(
        yield* value("select count(*)::int4 from pgqueue.schedule where next_at = $1::timestamptz", [iso(tick(1))]),
        100
      )
    }))
  )

  for (
    const [what, change] of [
      ["its times were changed", register({ spec: "@every 90s", next: tick(0) })],
      ["only what it enqueues was changed", register({ payload: `{"a":2}` })],
      ["it was paused", Effect.flatMap(Storage, ({ store }) => store.schedules.pause("s", false))],
      [
        "it was paused and resumed with the same tick",
        Effect.flatMap(Storage, ({ store }) =>
          Effect.andThen(
            store.schedules.pause("s", false),
            store.schedules.resume("s", () => ({ next: tick(0) }), false)
          ))
      ],
      ["it was stopped", Effect.flatMap(Storage, ({ store }) => store.schedules.disable("s", undefined, "why"))],
      ["it was triggered", Effect.flatMap(Storage, ({ store }) => store.schedules.trigger("s", uuid(), false))],
      ["it was removed", Effect.flatMap(Storage, ({ store }) => store.schedules.remove("s", false))],
      [
        "it was removed and is there again",
        Effect.andThen(
          Effect.flatMap(Storage, ({ store }) => store.schedules.remove("s", false)),
          register({ overlap: "skip" })
        )
      ]
    ] as const
  ) {
    it.effect(
      `who has read a schedule changes nothing after ${what}`,
      rule(Effect.gen(function*() {
        const { store } = yield* Storage
        yield* register({ overlap: "skip" })
        const row = yield* due()
        yield* change
        const before = { jobs: yield* jobTicks, row: yield* stored() }
        assert.deepStrictEqual(yield* store.schedules.fire([advance(row, [tick(0)])]), [])
        assert.deepStrictEqual({ jobs: yield* jobTicks, row: yield* stored() }, before)
      }))
    )
  }

  it.effect(
    "a change that is committed while somebody fires is seen, also when he has waited for nothing",
    rule(Effect.gen(function*() {
      // `fire` skips the locked row; the change must win whether it commits before or after.
      const { store } = yield* Storage
      yield* register({}, { name: "t" })
      const rows = yield* dueRows
      const stranger = yield* session
      yield* stranger.query("begin")
      yield* stranger.query(
        "update pgqueue.schedule set payload = '2', updated_at = clock_timestamp() where name = 's'"
      )
      const done = yield* store.schedules.fire(rows.map((row) => advance(row, [tick(0)])))
      assert.deepStrictEqual(done, [fired({ name: "t", enqueued: 1 })])
      yield* stranger.query("commit")
      assert.deepStrictEqual(yield* store.schedules.fire(rows.map((row) => advance(row, [tick(0)]))), [])
      assert.deepStrictEqual(yield* fire([tick(0)]), fired({ enqueued: 1 }))
    }))
  )

  it.effect(
    "a schedule that has no next tick is left without one",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* register({})
      yield* store.schedules.fire([advance(yield* due(), [tick(0)], { next: undefined })])
      assert.deepInclude(yield* stored(), { next: null, previous: tick(0) })
      // It is looked at once more, and stopped then.
      assert.isTrue((yield* store.schedules.look()).unset)
      assert.strictEqual((yield* due()).due, null)
    }))
  )

  it.effect(
    "the last tick never goes back",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* register({})
      yield* fire([tick(10)])
      yield* query("update pgqueue.schedule set next_at = $1::timestamptz", [iso(tick(5))])
      yield* store.schedules.fire([advance(yield* due(), [], { previous: tick(5), next: tick(11) })])
      assert.deepInclude(yield* stored(), { previous: tick(10), next: tick(11) })
    }))
  )

  // ---------------------------------------------------------------------------
  // Overlap
  // ---------------------------------------------------------------------------

  it.effect(
    "allow: every tick has its job, and they have the order of their ticks",
    rule(Effect.gen(function*() {
      yield* register({})
      assert.deepStrictEqual(yield* fire([tick(0), tick(1), tick(2)]), fired({ enqueued: 3 }))
      assert.deepStrictEqual(yield* fire([tick(3)]), fired({ enqueued: 1 }))
      assert.deepStrictEqual(yield* jobTicks, [0, 1, 2, 3].map(tick))
      assert.deepStrictEqual(yield* complete, yield* Effect.forEach([0, 1, 2, 3], (n) => tickId(tick(n))))
    }))
  )

  it.effect(
    "skip: no job while that of an earlier tick has not ended, whether it waits or runs",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* register({ overlap: "skip" })
      assert.deepStrictEqual(yield* fire([tick(0), tick(1), tick(2)]), fired({ enqueued: 1, skipped: 2 }))
      assert.deepStrictEqual(yield* jobTicks, [tick(0)])
      assert.deepStrictEqual(yield* fire([tick(3)]), fired({ skipped: 1 }))
      assert.deepInclude(yield* stored(), {
        last_job: yield* tickId(tick(0)),
        next: tick(4),
        previous: tick(3),
        waits: 0
      })
      const id = yield* worker()
      const { ids, lease } = yield* claim(id)
      assert.deepStrictEqual(yield* fire([tick(4)]), fired({ skipped: 1 }))
      yield* store.settle(id, [entry(lease, ids[0]!, "failed", { delay: 100_000, failure: Storage_.failure })])
      assert.deepStrictEqual(yield* fire([tick(5)]), fired({ skipped: 1 }))
      yield* remove(ids[0]!)
      assert.deepStrictEqual(yield* fire([tick(6), tick(7)]), fired({ enqueued: 1, skipped: 1 }))
      assert.deepStrictEqual(yield* jobTicks, [tick(6)])
    }))
  )

  it.effect(
    "queue: each tick has its job when that of the one before has ended",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* register({ overlap: "queue", queue: "mail" })
      assert.deepStrictEqual(
        yield* fire([tick(0), tick(1), tick(2)]),
        fired({ queue: "mail", enqueued: 1, waiting: 2 })
      )
      assert.deepStrictEqual(yield* fire([tick(3)]), fired({ queue: "mail", waiting: 1 }))
      assert.deepStrictEqual(yield* jobTicks, [tick(0)])
      assert.deepStrictEqual((yield* store.schedules.look()).waiting, [
        { name: "s", job: yield* tickId(tick(0)), free: false }
      ])
      assert.isTrue(yield* value("select awaited from pgqueue.job"))
      for (const n of [1, 2, 3]) {
        assert.deepStrictEqual(yield* follow, [])
        yield* remove(yield* tickId(tick(n - 1)))
        // Also with nothing running: the ticks that wait come first.
        if (n === 2) assert.deepStrictEqual(yield* fire([tick(4)]), fired({ queue: "mail", waiting: 1 }))
        assert.deepStrictEqual(yield* follow, ["mail"])
        assert.deepStrictEqual(yield* jobTicks, [tick(n)])
        assert.strictEqual((yield* stored()).last_job, yield* tickId(tick(n)))
      }
      yield* remove(yield* tickId(tick(3)))
      yield* follow
      assert.deepStrictEqual((yield* store.schedules.look()).waiting, [])
      assert.strictEqual((yield* stored()).next, tick(5))
    }))
  )

  it.effect(
    "queue: two who have seen the same end, one job; who comes late changes nothing",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* register({ overlap: "queue" })
      yield* fire([tick(0), tick(1), tick(2), tick(3)])
      for (let n = 1; n <= 3; n++) {
        yield* remove(yield* tickId(tick(n - 1)))
        const { waiting } = yield* store.schedules.look()
        yield* Effect.forEach(Array.from({ length: 8 }), () => store.schedules.follow(waiting), {
          concurrency: "unbounded"
        })
        assert.deepStrictEqual(yield* jobTicks, [tick(n)])
        assert.strictEqual((yield* stored()).waits, 3 - n)
      }
      assert.deepStrictEqual(yield* store.schedules.follow([{ name: "s", job: yield* tickId(tick(0)) }]), [])
      assert.deepStrictEqual(yield* store.schedules.follow([{ name: "s", job: yield* tickId(tick(3)) }]), [])
    }))
  )

  it.effect(
    "queue: a paused or stopped schedule does not follow, nor one that somebody has locked; the others do",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const names = ["a", "b", "c", "d"]
      yield* register(...names.map((name) => ({ name, overlap: "queue" as const })))
      for (const name of names) yield* fire([tick(0), tick(1)], name)
      yield* query("delete from pgqueue.ready")
      yield* query("delete from pgqueue.job")
      const { waiting } = yield* store.schedules.look()
      assert.deepStrictEqual(waiting.map(({ free, name }) => [name, free]), names.map((name) => [name, true]))
      yield* store.schedules.pause("a", false)
      yield* store.schedules.disable("b", undefined, "why")
      const stranger = yield* session
      yield* stranger.query("begin")
      yield* stranger.query("select 1 from pgqueue.schedule where name = 'c' for update")
      yield* store.schedules.follow(waiting)
      assert.deepStrictEqual(
        yield* query("select id::text as id from pgqueue.job"),
        [{ id: yield* tickId(tick(1), "d") }]
      )
      // What is paused or stopped is not looked at either.
      assert.deepStrictEqual((yield* store.schedules.look()).waiting.map(({ name }) => name), ["c"])
      yield* stranger.query("rollback")
      yield* store.schedules.resume("a", () => ({ next: tick(2) }), false)
      assert.strictEqual((yield* follow).length, 1)
      assert.strictEqual(yield* value("select count(*)::int4 from pgqueue.job"), 3)
    }))
  )

  it.effect(
    "queue: no more than 10 000 ticks wait",
    rule(Effect.gen(function*() {
      yield* register({ overlap: "queue" })
      yield* fire([tick(0)])
      yield* query(
        `update pgqueue.schedule set waiting =
          (select array_agg($1::timestamptz + n * interval '1 minute' order by n) from generate_series(1, 9999) n)`,
        [iso(tick(0))]
      )
      yield* fire([tick(10_000), tick(10_001), tick(10_002)])
      assert.strictEqual((yield* stored()).waits, 10_000)
      assert.strictEqual(
        yield* value("select (extract(epoch from waiting[10000]) * 1000)::float8 from pgqueue.schedule"),
        tick(10_000)
      )
    }))
  )

  it.effect(
    "queue: a list that is full is not written again at every tick",
    rule(Effect.gen(function*() {
      yield* register({ overlap: "queue" })
      yield* fire([tick(0)])
      yield* query(
        "update pgqueue.schedule set waiting = (select array_agg(timestamptz 'epoch' + n * interval '1 hour') from generate_series(1, 10000) n)"
      )
      const size = value<number>("select pg_table_size('pgqueue.schedule')::int4")
      const before = yield* size
      for (let n = 1; n <= 10; n++) yield* fire([tick(n)])
      assert.isBelow((yield* size) - before, 100_000)
      assert.deepInclude(yield* stored(), { waits: 10_000, previous: tick(10) })
    }))
  )

  it.effect(
    "queue: more than 1 000 schedules that wait hide no one whose job has ended",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const names = Array.from({ length: 1100 }, (_, n) => `s${String(n).padStart(4, "0")}`)
      yield* register(...names.map((name) => ({ name, overlap: "queue" as const })))
      const rows = [...(yield* dueRows)]
      for (let last = rows; last.length === 500;) {
        last = [...(yield* store.schedules.due(500, last.at(-1)))]
        rows.push(...last)
      }
      yield* store.schedules.fire(rows.map((row) => advance(row, [tick(0), tick(1)])))
      yield* remove(yield* tickId(tick(0), "s1099"))
      const { waiting } = yield* store.schedules.look()
      assert.deepInclude(waiting, { name: "s1099", job: yield* tickId(tick(0), "s1099"), free: true })
    }))
  )

  it.effect(
    "an extra job is heeded by what follows, unless the job of a tick is there to be heeded",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* register({ overlap: "skip" }, { name: "q", overlap: "queue" }, { name: "a" })
      const extra = { s: uuid(), q: uuid(), a: uuid() }
      for (const [name, id] of Object.entries(extra)) {
        assert.deepStrictEqual(yield* store.schedules.trigger(name, id, false), {
          queue: "default",
          inserted: true,
          holder: null,
          checked: ""
        } as never)
      }
      assert.strictEqual((yield* stored("s")).last_job, extra.s)
      assert.strictEqual((yield* stored("q")).last_job, extra.q)
      assert.strictEqual((yield* stored("a")).last_job, null)
      assert.deepStrictEqual(yield* fire([tick(0)], "s"), fired({ name: "s", skipped: 1 }))
      assert.deepStrictEqual(yield* fire([tick(0)], "q"), fired({ name: "q", waiting: 1 }))
      assert.deepStrictEqual(yield* fire([tick(0)], "a"), fired({ name: "a", enqueued: 1 }))
      yield* store.schedules.trigger("s", uuid(), false)
      assert.strictEqual((yield* stored("s")).last_job, extra.s)
      assert.strictEqual((yield* stored("q")).previous, tick(0))
    }))
  )

  it.effect(
    "an extra job that waited for a tick heeds the job of that tick",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* register({ overlap: "skip" })
      const firing = yield* session
      const row = yield* due()
      yield* firing.query("begin")
      yield* firing.store.schedules.fire([advance(row, [tick(0)])])
      const triggering = yield* blocked(store.schedules.trigger("s", uuid(), false))
      yield* firing.query("commit")
      assert.isTrue((yield* join(triggering))!.inserted)
      assert.strictEqual((yield* stored()).last_job, yield* tickId(tick(0)))
    }))
  )

  // ---------------------------------------------------------------------------
  // The id of a tick
  // ---------------------------------------------------------------------------

  it.effect(
    "the id of a tick is a UUID of version 8 that begins with the tick, and no other tick or schedule has it",
    rule(Effect.gen(function*() {
      const ids = yield* Effect.forEach(
        [tick(0), tick(0) + 1, tick(1), 0, Date.UTC(9000, 0, 1)],
        (at) => Effect.map(tickId(at), (id) => [at, id] as const)
      )
      for (const [at, id] of ids) {
        assert.match(id, /^[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/)
        assert.strictEqual(parseInt(id.slice(0, 8) + id.slice(9, 13), 16), at)
      }
      assert.notStrictEqual(yield* tickId(tick(0), "t"), yield* tickId(tick(0)))
      yield* query("set session time zone 'Asia/Kathmandu'")
      assert.strictEqual(yield* tickId(tick(0)), ids[0]![1])
    }))
  )

  const archive = query(
    `with gone as (delete from pgqueue.finished returning *) insert into pgqueue.archive select * from gone`
  )
  for (
    const [how, prepare, again] of [
      ["is there", Effect.void, 1],
      ["has ended", complete, 0],
      ["is archived", Effect.andThen(complete, archive), 0],
      [
        "runs",
        Effect.gen(function*() {
          yield* claim(yield* worker())
        }),
        1
      ]
    ] as const
  ) {
    it.effect(
      `a tick whose job ${how} has no second one, by a backfill or by the scheduler`,
      rule(Effect.gen(function*() {
        const { store } = yield* Storage
        yield* register({})
        yield* fire([tick(0)])
        yield* prepare
        const backfilled = yield* store.schedules.backfill("s", () => [tick(0)], false)
        assert.deepStrictEqual(backfilled, [fired({ skipped: 1 })])
        // A clock that was set back, or a hand that was: the same tick once more.
        yield* query("update pgqueue.schedule set next_at = $1::timestamptz", [iso(tick(0))])
        assert.deepStrictEqual(yield* fire([tick(0)]), fired({ skipped: 1 }))
        assert.strictEqual(yield* value("select count(*)::int4 from pgqueue.job"), again)

        yield* store.schedules.backfill("s", () => [tick(1)], false)
        yield* prepare
        assert.deepStrictEqual(yield* fire([tick(1)]), fired({ skipped: 1 }))
        assert.strictEqual((yield* stored()).last_job, again === 1 ? yield* tickId(tick(1)) : yield* tickId(tick(0)))
      }))
    )
  }

  it.effect(
    "a tick whose finished job was pruned at once is not fired again",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      for (const overlap of ["allow", "skip", "queue"] as const) {
        yield* register({ name: overlap, overlap })
        const stale = yield* due(overlap)
        yield* fire([tick(0)], overlap)
        yield* complete
        yield* prune
        assert.deepStrictEqual(yield* store.schedules.fire([advance(stale, [tick(0)])]), [])
        assert.strictEqual((yield* due(overlap)).due, tick(1))
      }
    }))
  )

  it.effect(
    "a tick that waits already does not wait twice, so that it has one job also when the first is pruned at its end",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* register({ overlap: "queue" })
      yield* fire([tick(0), tick(1)])
      const span = [tick(0), tick(1), tick(2)]
      for (let n = 0; n < 3; n++) yield* store.schedules.backfill("s", () => span, false)
      const runs: Array<number> = []
      for (let n = 0; n < 10; n++) {
        runs.push(...(yield* jobTicks))
        yield* complete
        yield* prune
        yield* follow
      }
      assert.deepStrictEqual(runs, [tick(0), tick(1), tick(2)])
    }))
  )

  it.effect(
    "a backfill enqueues what is missing in the order of the ticks, and all or none",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* register({ next: tick(5000) }, { name: "q", overlap: "queue", next: tick(5000) })
      const ticks = Array.from({ length: 2500 }, (_, n) => tick(n))
      const all = yield* store.schedules.backfill("s", (row) => {
        assert.deepInclude(row, { spec: "@every 60s", time_zone: "UTC", previous: null, overlap: "allow", waiting: 0 })
        return ticks
      }, false)
      assert.deepStrictEqual(all, [1000, 1000, 500].map((enqueued) => fired({ enqueued })))
      assert.deepStrictEqual(yield* jobTicks, ticks)
      // The schedule is where it was.
      assert.deepInclude(yield* stored(), { next: tick(5000), previous: null, last_job: null })

      const queued = yield* store.schedules.backfill("q", () => ticks, false)
      assert.deepStrictEqual(queued, [
        fired({ name: "q", enqueued: 1, waiting: 999 }),
        fired({ name: "q", waiting: 1000 }),
        fired({ name: "q", waiting: 500 })
      ])
      assert.strictEqual((yield* stored("q")).waits, 2499)

      assert.strictEqual(yield* store.schedules.backfill("s", () => "too many", false), "too many")
      assert.isUndefined(yield* store.schedules.backfill("nobody", () => ticks, false))
      const failed = yield* Effect.exit(store.schedules.backfill("s", () => [...ticks.map((at) => at + 1), NaN], false))
      assert.strictEqual(failed._tag, "Failure")
      assert.strictEqual((yield* jobTicks).length, 2501)
    }))
  )

  // ---------------------------------------------------------------------------
  // Unique keys
  // ---------------------------------------------------------------------------

  it.effect(
    "a tick that meets a holder of its key has no job, and the schedule goes on",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* register({ uniqueKey: "key" })
      yield* store.insertUnique([keyed("key")], false, undefined)
      assert.isTrue((yield* due()).keyed)
      assert.deepStrictEqual(yield* fire([tick(0)]), fired({ skipped: 1 }))
      assert.deepInclude(yield* stored(), { next: tick(1), previous: tick(0), last_job: null })
      yield* complete
      assert.deepStrictEqual(yield* fire([tick(1), tick(2)]), fired({ enqueued: 1, skipped: 1 }))
      assert.deepStrictEqual(yield* jobTicks, [tick(1)])
      const held = yield* store.schedules.trigger("s", uuid(), false)
      assert.deepInclude(held, { inserted: false, holder: yield* tickId(tick(1)) })
      assert.deepStrictEqual(
        yield* store.schedules.backfill("s", () => [tick(1), tick(3)], false),
        [fired({ skipped: 2 })]
      )
    }))
  )

  it.effect(
    "one of two schedules with the same key has a job",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* register({ uniqueKey: "key" }, { name: "t", uniqueKey: "key" }, {
        name: "u",
        uniqueKey: "key",
        kind: "other"
      })
      const done = yield* store.schedules.fire((yield* dueRows).map((row) => advance(row, [tick(0)])))
      assert.deepStrictEqual(done.map(({ enqueued, skipped }) => enqueued + skipped), [1, 1, 1])
      assert.strictEqual((yield* jobTicks).length, 2)
    }))
  )

  it.effect(
    "a key is held for its period, also after the end of the job, and no longer",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* register({ uniqueKey: "key", uniquePeriod: 3_600_000 })
      yield* fire([tick(0)])
      yield* complete
      yield* store.schedules.expireKeys(["s"])
      assert.deepStrictEqual(yield* fire([tick(1)]), fired({ skipped: 1 }))
      yield* query("update pgqueue.unique_key set expires_at = clock_timestamp()")
      yield* store.schedules.expireKeys(["other"])
      assert.deepStrictEqual(yield* fire([tick(2)]), fired({ skipped: 1 }))
      yield* store.schedules.expireKeys(["s"])
      assert.deepStrictEqual(yield* fire([tick(3)]), fired({ enqueued: 1 }))
      yield* query("update pgqueue.unique_key set expires_at = clock_timestamp()")
      yield* complete
      assert.isTrue((yield* store.schedules.trigger("s", uuid(), false))!.inserted)
    }))
  )

  it.effect(
    "a key that is held until the job starts",
    rule(Effect.gen(function*() {
      yield* register({ uniqueKey: "key", uniqueUntil: "started" })
      yield* fire([tick(0)])
      assert.deepStrictEqual(yield* fire([tick(1)]), fired({ skipped: 1 }))
      assert.strictEqual(yield* value("select until from pgqueue.unique_key"), "started")
    }))
  )

  it.effect(
    "a key that a stranger's transaction has taken holds a tick up for no longer than a second",
    rule(Effect.gen(function*() {
      yield* register({ uniqueKey: "key" })
      const stranger = yield* session
      yield* stranger.query("begin")
      yield* stranger.store.insertUnique([keyed("key")], false, undefined)
      const error = yield* Effect.flip(fire([tick(0)]))
      assert.isTrue(Database.isLockTimeout(error))
      assert.strictEqual((yield* due()).due, tick(0))
      yield* stranger.query("rollback")
      assert.deepStrictEqual(yield* fire([tick(0)]), fired({ enqueued: 1 }))
      assert.strictEqual(yield* value("select count(*)::int4 from pgqueue.unique_key"), 1)
    }))
  )

  it.effect(
    "a tick that was there takes no key",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* register({ uniqueKey: "key" })
      yield* fire([tick(0)])
      yield* complete
      assert.deepStrictEqual(yield* store.schedules.backfill("s", () => [tick(0)], false), [fired({ skipped: 1 })])
      assert.strictEqual(yield* value("select count(*)::int4 from pgqueue.unique_key"), 0)
    }))
  )

  // ---------------------------------------------------------------------------
  // Jitter
  // ---------------------------------------------------------------------------

  it.effect(
    "jitter starts jobs later by up to so much, each by its own, and the tick stays the tick",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const names = Array.from({ length: 200 }, (_, n) => `s${n}`)
      const base = (yield* value<number>("select floor(extract(epoch from clock_timestamp()))::float8")) * 1000 +
        600_000
      yield* register(...names.map((name) => ({ name, jitter: 60_000, next: tick(0) })))
      const done = yield* store.schedules.fire((yield* dueRows).map((row) => advance(row, [base])))
      const late = yield* query<{ late: number; at: number }>(
        `select (extract(epoch from run_at - scheduled_for) * 1000)::float8 as late, (extract(epoch from scheduled_for) * 1000)::float8 as at
         from pgqueue.job`
      )
      assert.isTrue(late.every(({ at, late }) => late >= 0 && late <= 60_000 && at === base))
      assert.isAbove(new Set(late.map(({ late }) => late)).size, 190)
      assert.isBelow(Math.min(...late.map(({ late }) => late)), 10_000)
      assert.isAbove(Math.max(...late.map(({ late }) => late)), 50_000)
      assert.isTrue(done.every(({ delay }) => delay > 590_000 && delay <= 660_000))
    }))
  )

  // ---------------------------------------------------------------------------
  // Registering
  // ---------------------------------------------------------------------------

  it.effect(
    "what is registered is stored resolved, and read back",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* register({
        kind: "report",
        queue: "mail",
        priority: 2,
        maxAttempts: 9,
        timeout: 1500,
        missedWindow: 1000.5,
        jitter: 2000,
        uniquePeriod: 3000,
        uniqueKey: "key",
        uniqueUntil: "started",
        payload: `{"day":1}`,
        metadata: `{}`,
        missed: 10,
        overlap: "skip",
        version: -3,
        timeZone: "Europe/Berlin"
      })
      const [row] = yield* store.schedules.list(false)
      assert.deepStrictEqual(row, {
        name: "s",
        spec: "@every 60s",
        time_zone: "Europe/Berlin",
        kind: "report",
        queue: "mail",
        priority: 2,
        max_attempts: 9,
        timeout_ms: 1500,
        payload: `{"day":1}`,
        metadata: `{}`,
        missed: 10,
        missed_window_ms: row!.missed_window_ms,
        overlap: "skip",
        jitter_ms: 2000,
        version: -3,
        next: tick(0),
        previous: null,
        paused: null,
        problem: null,
        waiting: 0,
        last_job: null,
        declared: true,
        undeclared: null
      })
      assert.strictEqual(
        yield* value(
          "select unique_key = pgqueue.hash_key('report', 'key') and unique_until = 'started' and unique_period_ms = 3000 from pgqueue.schedule"
        ),
        true
      )
    }))
  )

  it.effect(
    "what has not changed is not written, and nobody is waited for",
    rule(Effect.gen(function*() {
      yield* register({}, { name: "t", overlap: "skip", uniqueKey: "key", timeout: 5 })
      const before = [yield* stored("s"), yield* stored("t")]
      const later = [{ next: tick(7) }, {
        name: "t",
        overlap: "skip" as const,
        uniqueKey: "key",
        timeout: 5,
        next: tick(7)
      }]
      assert.deepStrictEqual(yield* register(...later), { written: [], newer: [] })
      assert.deepStrictEqual([yield* stored("s"), yield* stored("t")], before)
      // Somebody looks at one of them and does not go away.
      const stranger = yield* session
      yield* stranger.query("begin")
      yield* stranger.query("select 1 from pgqueue.schedule where name = 's' for update")
      assert.deepStrictEqual(yield* register(...later, { name: "u" }), { written: ["u"], newer: [] })
    }))
  )

  it.effect(
    "times that stay keep the next tick, also one that is overdue, whatever else changes",
    rule(Effect.gen(function*() {
      yield* register({})
      assert.deepStrictEqual(
        yield* register({ payload: "2", metadata: "{}", priority: 1, overlap: "queue", jitter: 5, next: tick(100) }),
        { written: ["s"], newer: [] }
      )
      assert.deepInclude(yield* stored(), { next: tick(0), payload: 2, priority: 1, overlap: "queue" })
    }))
  )

  it.effect(
    "times that change begin after the last tick that there was",
    rule(Effect.gen(function*() {
      yield* register({})
      yield* fire([tick(0)])
      yield* register({ spec: "@every 90s", next: tick(50) })
      assert.deepInclude(yield* stored(), { next: tick(50), previous: tick(0) })
      // The clock has been set back: its first tick is not after the last one. The scheduler computes it.
      yield* query("update pgqueue.schedule set previous_at = $1::timestamptz", [iso(tick(60))])
      yield* register({ spec: "@every 60s", next: tick(60) })
      assert.deepInclude(yield* stored(), { next: null, previous: tick(60) })
      yield* register({ spec: "@every 60s", timeZone: "Europe/Berlin", next: tick(61) })
      assert.strictEqual((yield* stored()).next, tick(61))
    }))
  )

  it.effect(
    "a paused schedule stays paused, and one with a problem is tried again",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* register({}, { name: "t" }, { name: "u" })
      yield* store.schedules.pause("s", false)
      yield* register({ spec: "@every 90s", next: tick(3) })
      assert.deepInclude(yield* stored(), { next: null, spec: "@every 90s" })
      assert.isNotNull((yield* stored()).paused_at)
      yield* store.schedules.disable("t", undefined, "why")
      assert.deepInclude(yield* stored("t"), { next: null, problem: "why" })
      assert.deepStrictEqual((yield* register({ name: "t", next: tick(4) })).written, ["t"])
      assert.deepInclude(yield* stored("t"), { next: tick(4), problem: null })
      yield* store.schedules.disable("u", undefined, "why")
      yield* store.schedules.pause("u", false)
      yield* register({ name: "u", next: tick(4) })
      assert.deepInclude(yield* stored("u"), { next: null, problem: null })
    }))
  )

  it.effect(
    "the higher version has its way, and of equal ones the last to come",
    rule(Effect.gen(function*() {
      yield* register({ version: 2, payload: "2" })
      assert.deepStrictEqual(yield* register({ version: 1, payload: "1" }), { written: [], newer: ["s"] })
      assert.deepStrictEqual((yield* stored()).payload, 2)
      assert.deepStrictEqual(yield* register({ version: 2, payload: "3" }), { written: ["s"], newer: [] })
      assert.deepStrictEqual(yield* register({ version: 2, payload: "2" }), { written: ["s"], newer: [] })
      assert.deepStrictEqual(yield* register({ version: 3, payload: "2" }), { written: ["s"], newer: [] })
      assert.deepStrictEqual((yield* stored()).version, 3)
      // Also when it has a problem.
      yield* Effect.flatMap(Storage, ({ store }) => store.schedules.disable("s", undefined, "why"))
      assert.deepStrictEqual(yield* register({ version: 2, payload: "2" }), { written: [], newer: ["s"] })
      assert.strictEqual((yield* stored()).problem, "why")
    }))
  )

  it.effect(
    "processes that start together write the same rows once, in any order",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const all = Array.from({ length: 50 }, (_, n) => registration({ name: `s${n}` }))
      for (let version = 0; version < 5; version++) {
        const mine = all.map((one) => ({ ...one, payload: String(version) }))
        const results = yield* Effect.forEach(
          Array.from({ length: 8 }, (_, n) => n % 2 === 0 ? mine : mine.toReversed()),
          (mine) => store.schedules.register(mine, true, false),
          { concurrency: "unbounded" }
        )
        assert.strictEqual(results.flatMap(({ written }) => written).length, 50)
      }
    }))
  )

  // ---------------------------------------------------------------------------
  // Code and rows
  // ---------------------------------------------------------------------------

  it.effect(
    "what no process declares any more is marked once, and what is declared again no longer",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* register({}, { name: "t" })
      yield* store.schedules.register([registration({ name: "by hand" })], false, false)
      assert.deepStrictEqual(yield* store.schedules.undeclare(60_000), [])
      yield* query("update pgqueue.schedule set declared_at = declared_at - interval '2 minutes'")
      yield* store.schedules.declare(["t", "nobody"], 30_000)
      assert.deepStrictEqual(yield* store.schedules.undeclare(60_000), ["s"])
      assert.deepStrictEqual(yield* store.schedules.undeclare(60_000), [])
      const marks = Effect.map(
        store.schedules.list(false),
        (rows) => rows.map(({ declared, name, undeclared }) => [name, declared, undeclared !== null])
      )
      assert.deepStrictEqual(yield* marks, [["by hand", false, false], ["s", true, true], ["t", true, false]])
      // It goes on all the same.
      assert.deepStrictEqual(yield* fire([tick(0)]), fired({ enqueued: 1 }))
      yield* store.schedules.declare(["s"], 1e9)
      assert.deepStrictEqual(yield* marks, [["by hand", false, false], ["s", true, false], ["t", true, false]])
      yield* store.schedules.declare([], 30_000)
    }))
  )

  it.effect(
    "a declaration is written no more often than it has to be, and never in the future for good",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* register({})
      const before = yield* stored()
      yield* store.schedules.declare(["s"], 60_000)
      assert.deepStrictEqual(yield* stored(), before)
      yield* query("update pgqueue.schedule set declared_at = '2300-01-01'")
      yield* store.schedules.declare(["s"], 60_000)
      assert.isTrue(yield* value("select declared_at < clock_timestamp() + interval '1 second' from pgqueue.schedule"))
      yield* query("update pgqueue.schedule set declared_at = null")
      yield* store.schedules.declare(["s"], 60_000)
      assert.isNotNull((yield* stored()).declared_at)
    }))
  )

  it.effect(
    "declaring waits for nobody, and does not disturb who has just read the schedule",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* register({}, { name: "t" })
      yield* query("update pgqueue.schedule set declared_at = null")
      const row = yield* due()
      const stranger = yield* session
      yield* stranger.query("begin")
      yield* stranger.query("select 1 from pgqueue.schedule where name = 't' for update")
      yield* store.schedules.declare(["s", "t"], 60_000)
      assert.strictEqual(yield* value("select count(*)::int4 from pgqueue.schedule where declared_at is not null"), 1)
      assert.strictEqual((yield* store.schedules.fire([advance(row, [tick(0)])])).length, 1)
    }))
  )

  it.effect(
    "a schedule is stopped as it was read, and not when it has changed since",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* register({})
      const row = yield* due()
      yield* register({ payload: "2" })
      yield* store.schedules.disable("s", row.updated_at, "why")
      assert.deepInclude(yield* stored(), { problem: null, next: tick(0) })
      yield* store.schedules.disable("s", (yield* due()).updated_at, "why")
      assert.deepInclude(yield* stored(), { problem: "why", next: null })
      yield* store.schedules.disable("s", undefined, "something else")
      assert.strictEqual((yield* stored()).problem, "why")
      assert.deepStrictEqual(yield* dueRows, [])
    }))
  )

  it.effect(
    "stopping a schedule waits for nobody who has it locked",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* register({})
      const stranger = yield* session
      yield* stranger.query("begin")
      yield* stranger.query("select 1 from pgqueue.schedule for update")
      yield* Effect.timeout(store.schedules.disable("s", (yield* due()).updated_at, "why"), "2 seconds")
      assert.strictEqual((yield* stored()).problem, null)
      yield* stranger.query("rollback")
      yield* store.schedules.disable("s", (yield* due()).updated_at, "why")
      assert.strictEqual((yield* stored()).problem, "why")
    }))
  )

  // ---------------------------------------------------------------------------
  // What is due
  // ---------------------------------------------------------------------------

  it.effect(
    "due schedules come in pages by their ticks, and rows that are locked hide no others",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const names = Array.from({ length: 25 }, (_, n) => `s${String(n).padStart(2, "0")}`)
      yield* register(...names.map((name, n) => ({ name, next: tick(n >> 2) })))
      const stranger = yield* session
      yield* stranger.query("begin")
      yield* stranger.query("select 1 from pgqueue.schedule order by next_at, name limit 20 for update")
      const seen: Array<string> = []
      const done: Array<string> = []
      let after: Schedules.DueRow | undefined
      while (true) {
        const rows = yield* store.schedules.due(10, after)
        seen.push(...rows.map(({ name }) => name))
        done.push(...(yield* store.schedules.fire(rows.map((row) => advance(row, [row.due!])))).map(({ name }) => name))
        if (rows.length < 10) break
        after = rows.at(-1)
      }
      assert.deepStrictEqual(seen, names)
      assert.sameMembers(done, names.slice(20))
    }))
  )

  it.effect(
    "the next tick is known before it is due, and rows without one are seen at once",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      assert.deepStrictEqual(yield* store.schedules.look(), {
        due: false,
        wait: null,
        unset: false,
        waiting: []
      })
      const soon = (yield* value<number>("select floor(extract(epoch from clock_timestamp()) * 1000)::float8")) +
        100_000
      yield* register({ next: soon }, { name: "t", next: soon + 5 })
      const look = yield* store.schedules.look()
      assert.closeTo(look.wait!, 100_000, 5000)
      assert.isFalse(look.unset)
      assert.deepStrictEqual(yield* dueRows, [])
      yield* query("insert into pgqueue.schedule (name, spec, kind) values ('by hand', '@every 60s', 'k')")
      // One that is due hides neither what nobody has computed nor when the next one is due.
      yield* register({ name: "over", next: soon - 200_000 })
      const busy = yield* store.schedules.look()
      assert.deepStrictEqual([busy.due, busy.unset], [true, true])
      assert.closeTo(busy.wait!, 100_000, 5000)
      assert.deepInclude(yield* due("by hand"), {
        name: "by hand",
        time_zone: "UTC",
        due: null,
        previous: null,
        missed: 1,
        missed_window_ms: 604_800_000,
        keyed: false,
        next_at: "",
        last_job: null
      })
      // Its first tick.
      const done = yield* store.schedules.fire([
        advance(yield* due("by hand"), [], { previous: undefined, next: tick(0) })
      ])
      assert.deepStrictEqual(done, [fired({ name: "by hand" })])
      assert.deepInclude(yield* stored("by hand"), { next: tick(0), previous: null })
      assert.deepStrictEqual(yield* fire([tick(0)], "by hand"), fired({ name: "by hand", enqueued: 1 }))
      assert.deepStrictEqual(
        yield* query(
          "select kind, queue, priority, max_attempts, payload::text as payload, metadata::text as metadata from pgqueue.job"
        ),
        [{ kind: "k", queue: "default", priority: 5, max_attempts: 5, payload: "null", metadata: "{}" }]
      )
    }))
  )

  it.effect(
    "rows without a next tick that are locked hide no others",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* query(
        "insert into pgqueue.schedule (name, spec, kind) select 's' || lpad(n::text, 2, '0'), '@every 60s', 'k' from generate_series(0, 24) n"
      )
      const stranger = yield* session
      yield* stranger.query("begin")
      yield* stranger.query("select 1 from pgqueue.schedule order by name limit 20 for update")
      let after: Schedules.DueRow | undefined
      const done: Array<string> = []
      for (let rounds = 0; rounds < 10; rounds++) {
        const rows = yield* store.schedules.due(10, after)
        done.push(
          ...(yield* store.schedules.fire(rows.map((row) => advance(row, [], { next: tick(1e7) })))).map(({ name }) =>
            name
          )
        )
        if (rows.length < 10) break
        after = rows.at(-1)
      }
      assert.sameMembers(done, ["s20", "s21", "s22", "s23", "s24"])
    }))
  )

  it.effect(
    "whatever time stands in a row can be read, also before 1970 or without end",
    rule(Effect.gen(function*() {
      yield* query(
        `insert into pgqueue.schedule (name, spec, kind, next_at, previous_at, updated_at) values
          ('a', '@every 60s', 'k', '1900-01-01', null, 'infinity'), ('b', '@every 60s', 'k', '4000-01-01 BC', '-infinity', '-infinity'),
          ('c', '@every 60s', 'k', null, 'infinity', clock_timestamp()), ('d', '@every 60s', 'k', '1970-01-01 00:00Z', null, '0001-01-01')`
      )
      assert.sameMembers((yield* dueRows).map(({ name }) => name), ["a", "b", "c", "d"])
      for (const name of ["a", "b", "d"]) {
        assert.deepStrictEqual(yield* fire([tick(0)], name), fired({ name, enqueued: 1 }))
        yield* Effect.flatMap(Storage, ({ store }) => store.schedules.list(false))
      }
    }))
  )

  for (
    const [what, column, values] of [
      ["a name", "name", ["''", "repeat('x', 201)", "null"]],
      ["a kind", "kind", ["''", "repeat('x', 201)", "null"]],
      ["a queue", "queue", ["''", "repeat('x', 129)", "null"]],
      ["a priority", "priority", ["-1", "10", "null"]],
      ["attempts", "max_attempts", ["0", "1001", "null"]],
      ["a timeout", "timeout_ms", ["0", "-1"]],
      ["a payload", "payload", ["'{'", "null", "to_json(repeat('x', 2000000))"]],
      ["metadata", "metadata", ["'{'", "null", "to_json(repeat('x', 70000))"]],
      ["missed ticks", "missed", ["-1", "1001", "null"]],
      ["a window", "missed_window_ms", ["0", "-5", "null"]],
      ["an overlap", "overlap", ["'maybe'", "null"]],
      ["a jitter", "jitter_ms", ["-1", "null"]],
      ["a rule for its key", "unique_until", ["'dawn'", "null"]],
      ["a period for its key", "unique_period_ms", ["0"]],
      ["a next tick", "next_at", ["'infinity'", "'-infinity'"]]
    ] as const
  ) {
    it.effect(
      `a row with ${what} that nobody could use is refused`,
      rule(Effect.gen(function*() {
        yield* register({})
        for (const value of values) {
          const exit = yield* Effect.exit(query(`update pgqueue.schedule set ${column} = ${value}`))
          assert.strictEqual(exit._tag, "Failure", `${column} = ${value}`)
        }
      }))
    )
  }

  // ---------------------------------------------------------------------------
  // In the application's transaction
  // ---------------------------------------------------------------------------

  it.effect(
    "what is done in the application's transaction is undone with it, and its sessions are left as they were",
    rule(Effect.gen(function*() {
      const { sql, store } = yield* Storage
      yield* register({}, { name: "q", overlap: "queue" }, { name: "p" })
      const before = [yield* stored("s"), yield* stored("q"), yield* stored("p")]
      const settings = sql.unsafe("select current_setting('lock_timeout') as l, current_setting('search_path') as p")
      const all = Effect.gen(function*() {
        yield* sql.unsafe("set local lock_timeout = '7654ms'")
        const own = yield* settings
        assert.deepStrictEqual(
          (yield* store.schedules.register([registration({ name: "new" })], false, true)).written,
          ["new"]
        )
        assert.isTrue(yield* store.schedules.pause("p", true))
        assert.isTrue(yield* store.schedules.resume("p", () => ({ next: tick(5) }), true))
        assert.isTrue((yield* store.schedules.trigger("s", uuid(), true))!.inserted)
        assert.strictEqual(
          ((yield* store.schedules.backfill("q", () => [tick(1), tick(2)], true)) as ReadonlyArray<Schedules.Fired>)[0]!
            .waiting,
          1
        )
        assert.isTrue(yield* store.schedules.remove("s", true))
        assert.deepStrictEqual((yield* store.schedules.list(true)).map(({ name }) => name), ["new", "p", "q"])
        assert.deepStrictEqual(yield* settings, own)
      })
      yield* Effect.exit(sql.withTransaction(Effect.andThen(all, Effect.fail("back"))))
      assert.deepStrictEqual([yield* stored("s"), yield* stored("q"), yield* stored("p")], before)
      assert.isUndefined(yield* stored("new"))
      assert.deepStrictEqual(yield* jobTicks, [])
      yield* sql.withTransaction(all)
      assert.strictEqual((yield* jobTicks).length, 2)
      assert.deepStrictEqual(yield* value("select current_setting('lock_timeout')"), "0")
    }))
  )

  it.effect(
    "whatever stands in front of the application's search_path",
    rule(Effect.gen(function*() {
      const { sql, store } = yield* Storage
      yield* query("create schema hostile")
      for (const table of ["schedule", "job", "ready", "finished", "unique_key"]) {
        yield* query(`create table hostile.${table} (trap integer)`)
      }
      for (
        const trap of [
          "refuse_finished(uuid[], integer) returns void language sql as 'select 1 / 0'",
          "hash_key(text, text) returns bytea language sql as 'select null::bytea'",
          "tick_id(text, timestamptz) returns uuid language sql as 'select null::uuid'",
          "clock_timestamp() returns timestamptz language sql as $$ select 'infinity'::timestamptz $$",
          "statement_timestamp() returns timestamptz language sql as $$ select 'infinity'::timestamptz $$",
          "random() returns float8 language sql as 'select 1e9::float8'",
          "cardinality(anyarray) returns int language sql as 'select 7'",
          "set_config(text, text, boolean) returns text language sql as 'select 1 / 0'::text"
        ]
      ) {
        yield* Effect.ignore(query(`create function hostile.${trap}`))
      }
      yield* register({ overlap: "queue", jitter: 5000 })
      yield* sql.withTransaction(Effect.gen(function*() {
        yield* sql.unsafe("set local search_path = hostile, pg_catalog")
        yield* store.schedules.register(
          [registration({ name: "new", uniqueKey: "key", uniquePeriod: 5000 })],
          true,
          true
        )
        yield* store.schedules.pause("s", true)
        assert.isNotNull((yield* store.schedules.list(true))[1]!.paused)
        yield* store.schedules.resume("s", ({ now }) => ({ next: now }), true)
        assert.isTrue((yield* store.schedules.trigger("new", uuid(), true))!.inserted)
        assert.deepInclude(
          ((yield* store.schedules.backfill("s", () => [tick(1), tick(2)], true)) as ReadonlyArray<Schedules.Fired>)[0],
          { enqueued: 1, waiting: 1 }
        )
        assert.deepStrictEqual((yield* store.schedules.list(true)).map(({ waiting }) => waiting), [0, 1])
      }))
      assert.strictEqual(
        yield* value("select count(*)::int4 from pgqueue.job where run_at < clock_timestamp() + interval '1 minute'"),
        2
      )
      assert.strictEqual(yield* value("select count(*)::int4 from pgqueue.unique_key where isfinite(expires_at)"), 1)
      assert.strictEqual(
        yield* value("select last_job::text from pgqueue.schedule where name = 's'"),
        yield* tickId(tick(1))
      )
      yield* query("drop schema hostile cascade")
    }))
  )

  it.effect(
    "people do not wait for a stranger without end, and what they meant is done or not done",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* register({})
      const stranger = yield* session
      yield* stranger.query("begin")
      yield* stranger.query("select 1 from pgqueue.schedule for update")
      const waiting = yield* blocked(store.schedules.pause("s", false))
      yield* untilBlocked()
      yield* stranger.query("rollback")
      assert.isTrue(yield* join(waiting))
      assert.isNotNull((yield* stored()).paused_at)
      assert.isFalse(yield* store.schedules.pause("nobody", false))
      assert.isFalse(yield* store.schedules.remove("nobody", false))
      assert.isFalse(yield* store.schedules.resume("nobody", () => ({ next: 0 }), false))
      assert.isUndefined(yield* store.schedules.trigger("nobody", uuid(), false))
    }))
  )

  it.effect(
    "resuming starts from the tick that is found, or says the problem that is",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* register({})
      yield* fire([tick(0)])
      yield* store.schedules.pause("s", false)
      const paused = (yield* stored()).paused_at
      yield* store.schedules.pause("s", false)
      assert.deepStrictEqual((yield* stored()).paused_at, paused)
      yield* store.schedules.resume("s", (row) => {
        assert.deepInclude(row, { spec: "@every 60s", previous: tick(0) })
        return { next: tick(9) }
      }, false)
      assert.deepInclude(yield* stored(), { paused_at: null, next: tick(9) })
      // One that goes on is left as it is.
      const going = yield* stored()
      yield* store.schedules.resume("s", () => ({ next: tick(99) }), false)
      assert.deepStrictEqual(yield* stored(), going)
      yield* store.schedules.disable("s", undefined, "why")
      yield* store.schedules.resume("s", () => ({ problem: "still" }), false)
      assert.deepInclude(yield* stored(), { problem: "still", next: null })
      yield* store.schedules.resume("s", () => ({ next: tick(10) }), false)
      assert.deepInclude(yield* stored(), { problem: null, next: tick(10) })
    }))
  )
})
