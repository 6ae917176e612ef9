/** Beat, reap and rescue: who is alive, and how the jobs of the dead come back. */
import { assert, layer } from "@effect/vitest"
import { Effect } from "effect"
import * as Tasks from "../src/Tasks.ts"
import type * as Wakeup from "../src/Wakeup.ts"
import {
  beat,
  blocked,
  bury,
  claim,
  claimed,
  claimOptions,
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
  silence,
  stateOf,
  Storage,
  value,
  worker
} from "./support/storage.ts"

const lineOf = (id: string) =>
  Effect.map(
    query<{ lane: number; wait: number }>(
      `select lane, (extract(epoch from run_at - clock_timestamp()) * 1000)::float8 as wait from pgqueue.ready where id = $1::uuid`,
      [id]
    ),
    (rows) => rows[0]!
  )
const leases = value<number>("select count(*)::int4 from pgqueue.lease")
const alive = (id: string) => value<boolean>("select count(*) > 0 from pgqueue.worker where id = $1::uuid", [id])

/** Claims with a new worker that dies at once, and rescues. */
const crash = Effect.gen(function*() {
  const { store } = yield* Storage
  yield* makeDue
  const victim = yield* worker()
  const { ids } = yield* claim(victim)
  yield* bury(victim)
  yield* store.rescue(100)
  return ids
})

/** Tells nobody. */
const deaf: Wakeup.Wakeup = {
  mark: () => {},
  withInsert: () => undefined,
  tell: () => {},
  tellHere: () => {},
  scheduled: () => {},
  subscribe: () => Effect.void,
  listen: Effect.never
}

/** So many leases with a job each. */
const leased = (count: number) => Effect.forEach(Array.from({ length: count }), () => claimed([job()]))

layer(Storage.layer, { excludeTestServices: true })("rescue", (it) => {
  it.effect(
    "leases whose rows a stranger has locked hide no other from the sweep",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      // Eleven leases, one more than a sweep takes at a time; the stranger holds the jobs of the first ten.
      const held = yield* leased(11)
      const stranger = yield* session
      yield* stranger.query("begin")
      yield* stranger.query("select from pgqueue.job where id = any ($1::text[]::uuid[]) for update", [
        held.slice(0, 10).flatMap(({ ids }) => ids)
      ])
      for (const { worker } of held) yield* bury(worker)
      assert.strictEqual(yield* Tasks.rescueOnce(store, deaf), 1)
      assert.deepInclude(yield* stateOf(held[10]!.ids[0]!), { place: "ready", rescued: 1 })
      yield* stranger.query("commit")
      assert.strictEqual(yield* Tasks.rescueOnce(store, deaf), 10)
    }))
  )

  it.effect(
    "a job that cannot be taken back keeps no other one",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      // The bad one among others in its lease, and leases before and after it.
      const held = [...yield* leased(3), yield* claimed([job(), job(), job()]), ...yield* leased(8)]
      const bad = held[3]!.ids[1]!
      yield* query(`alter table pgqueue.job add constraint bad check (id <> '${bad}' or rescued = 0)`)
      for (const { worker } of held) yield* bury(worker)
      assert.strictEqual(yield* Tasks.rescueOnce(store, deaf), 13)
      assert.deepInclude(yield* stateOf(bad), { place: "lease" })
      yield* query("alter table pgqueue.job drop constraint bad")
      assert.strictEqual(yield* Tasks.rescueOnce(store, deaf), 1)
    }))
  )

  it.effect(
    "the first rescue is free, the second counts an attempt and makes the job a suspect",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed([keyed("key")])
      const id = held.ids[0]!
      yield* silence(held.worker)
      assert.deepStrictEqual(yield* store.reapWorkers(), [{ id: held.worker }])
      assert.deepStrictEqual(yield* store.rescue(10), {
        leases: 1,
        back: 1,
        ended: 0,
        queues: ["default"],
        awaited: [],
        last: held.lease
      })
      assert.deepInclude(yield* stateOf(id), { place: "ready", attempt: 0, rescued: 1 })
      const first = yield* lineOf(id)
      assert.strictEqual(first.lane, 5)
      assert.isTrue(first.wait > -1000 && first.wait <= 2000, `due in ${first.wait} ms`)

      assert.deepStrictEqual(yield* crash, [id])
      assert.deepInclude(yield* stateOf(id), { place: "ready", attempt: 1, rescued: 2 })
      const { lane, wait } = yield* lineOf(id)
      assert.strictEqual(lane, 105)
      assert.isTrue(wait > 500 && wait < 10_000, `due in ${wait} ms`)
      const attempts = yield* query("select n, tag, worker is not null as known from pgqueue.attempt order by id")
      assert.deepStrictEqual(attempts, [{ n: 1, tag: "Lost", known: true }, { n: 1, tag: "Lost", known: true }])
      assert.strictEqual(yield* value("select count(*)::int4 from pgqueue.unique_key"), 1)
    }))
  )

  it.effect(
    "a job that crashes every worker is discarded after exactly maxAttempts + 1 starts",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      for (const maxAttempts of [1, 3]) {
        const killer = job({ maxAttempts })
        yield* store.insert([killer], false)
        let starts = 0
        while ((yield* crash).length > 0) starts++
        assert.strictEqual(starts, maxAttempts + 1)
        const state = yield* stateOf(killer.id)
        assert.deepInclude(state, { place: "finished", status: "discarded", attempt: maxAttempts })
        assert.deepInclude(state["error"], { tag: "Lost" })
      }
    }))
  )

  it.effect(
    "crashes and failures together start a job at most maxAttempts + 1 times",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* store.insert([job({ maxAttempts: 3 })], false)
      assert.strictEqual((yield* crash).length, 1)
      assert.strictEqual((yield* crash).length, 1)
      for (const expected of [null, "discarded"]) {
        yield* makeDue
        const me = yield* worker()
        const { ids, lease } = yield* claim(me)
        const answers = yield* store.settle(me, [entry(lease, ids[0]!, "failed", { delay: 0, failure })])
        assert.deepStrictEqual(answers.map((a) => a.status), [expected])
      }
    }))
  )

  it.effect(
    "a retry of a suspect stays in the lane of suspects",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* store.insert([job()], false)
      yield* crash
      yield* crash
      yield* makeDue
      const me = yield* worker()
      for (const verb of ["failed", "snoozed", "released"] as const) {
        const { ids, lease } = yield* claim(me)
        yield* store.settle(me, [entry(lease, ids[0]!, verb, { delay: 0 })])
        assert.strictEqual((yield* lineOf(ids[0]!)).lane, 105)
      }
    }))
  )

  it.effect(
    "a cancel mark ends a job instead of bringing it back",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed([keyed("key")])
      yield* query("update pgqueue.job set cancelled_at = now(), cancel_reason = 'enough'")
      yield* bury(held.worker)
      assert.deepInclude(yield* store.rescue(10), { back: 0, ended: 1 })
      assert.deepInclude(yield* stateOf(held.ids[0]!), { place: "finished", status: "cancelled", reason: "enough" })
    }))
  )

  it.effect(
    "a sweep takes at most as many leases as it is told",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      for (let i = 0; i < 5; i++) yield* bury((yield* claimed(jobs(3))).worker)
      const alive = yield* claimed(jobs(2))
      assert.deepInclude(yield* store.rescue(2), { leases: 2, back: 6 })
      assert.deepInclude(yield* store.rescue(2), { leases: 2, back: 6 })
      assert.deepInclude(yield* store.rescue(2), { leases: 1, back: 3 })
      assert.deepInclude(yield* store.rescue(2), { leases: 0, back: 0 })
      assert.strictEqual(yield* value("select array_agg(id)::text from pgqueue.lease"), `{${alive.lease}}`)
    }))
  )

  for (const table of ["job", "unique_key"]) {
    it.effect(
      `a job whose ${table} row somebody holds stays in its lease for the next sweep`,
      rule(Effect.gen(function*() {
        const { store } = yield* Storage
        const held = yield* claimed([keyed("a"), keyed("b")])
        yield* bury(held.worker)
        const stranger = yield* session
        yield* stranger.query("begin")
        yield* stranger.query(
          `select 1 from pgqueue.${table} where ${table === "job" ? "id" : "job"} = '${held.ids[0]!}' for update`
        )
        assert.deepInclude(yield* store.rescue(10), { leases: 1, back: 1 })
        assert.deepInclude(yield* store.rescue(10), { leases: 1, back: 0 })
        assert.strictEqual(yield* value("select array_to_string(ids, ',') from pgqueue.lease"), held.ids[0])
        yield* stranger.query("rollback")
        assert.deepInclude(yield* store.rescue(10), { leases: 1, back: 1 })
      }))
    )
  }

  it.effect(
    "a job row that is missing leaves the lease",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed(jobs(2))
      yield* query("delete from pgqueue.job where id = $1::uuid", [held.ids[0]!])
      yield* bury(held.worker)
      assert.deepInclude(yield* store.rescue(10), { leases: 1, back: 1, ended: 0 })
      assert.strictEqual(yield* leases, 0)
    }))
  )

  it.effect(
    "sweeps at the same time rescue each lease once",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      for (let i = 0; i < 20; i++) yield* bury((yield* claimed(jobs(5))).worker)
      const done = yield* Effect.all(Array.from({ length: 8 }, () => store.rescue(5)), { concurrency: 8 })
      let back = done.reduce((sum, { back }) => sum + back, 0)
      for (let more = 1; more > 0;) back += more = (yield* store.rescue(5)).back
      assert.strictEqual(back, 100)
      assert.strictEqual(yield* value("select sum(rescued)::int4 from pgqueue.job"), 100)
    }))
  )

  // ---------------------------------------------------------------------------
  // Who is alive
  // ---------------------------------------------------------------------------

  it.effect(
    "each worker is judged by its own lease time",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const long = yield* worker({ lease: 1e12 })
      const short = yield* worker({ lease: 1e12 })
      yield* query("update pgqueue.worker set beat_at = '1999-12-31'")
      yield* silence(short)
      assert.deepStrictEqual(yield* store.reapWorkers(), [{ id: short }])
      assert.isTrue(yield* alive(long))
    }))
  )

  it.effect(
    "the start of the server counts as a beat of every worker",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const id = yield* worker()
      const uptime = `(extract(epoch from clock_timestamp() - pg_postmaster_start_time()) * 1000)::int8`
      yield* query(`update pgqueue.worker set beat_at = '1999-12-31', lease_ms = ${uptime} + 60000`)
      assert.deepStrictEqual(yield* store.reapWorkers(), [])
      yield* query(`update pgqueue.worker set lease_ms = ${uptime} - 1`)
      assert.deepStrictEqual(yield* store.reapWorkers(), [{ id }])
    }))
  )

  it.effect(
    "a late beat that comes before the reap saves the worker",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed([job()])
      yield* query("update pgqueue.worker set beat_at = '1999-12-31', lease_ms = 0")
      const late = yield* session
      yield* late.query("begin")
      yield* late.query(late.store.beatText, [held.worker])
      // a lease time under which this beat counts
      yield* late.query("update pgqueue.worker set lease_ms = 60000")
      assert.deepStrictEqual(yield* store.reapWorkers(), [])
      assert.deepInclude(yield* store.rescue(10), { leases: 0 })
      yield* late.query("commit")
      assert.deepStrictEqual(yield* store.reapWorkers(), [])
      assert.deepInclude(yield* store.rescue(10), { leases: 0 })
      assert.isTrue((yield* beat(held.worker)).alive)
    }))
  )

  it.effect(
    "a beat that comes after the reap learns that the worker is dead, and brings nothing back to life",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed([job()])
      yield* silence(held.worker)
      const reaper = yield* session
      yield* reaper.query("begin")
      assert.deepStrictEqual(yield* reaper.store.reapWorkers(), [{ id: held.worker }])
      const late = yield* blocked(beat(held.worker))
      const claiming = yield* blocked(claim(held.worker), 2)
      yield* reaper.query("commit")
      assert.isFalse((yield* join(late)).alive)
      assert.deepStrictEqual((yield* join(claiming)).ids, [])
      assert.deepInclude(yield* store.rescue(10), { leases: 1, back: 1 })
    }))
  )

  it.effect(
    "when the reap rolls back, the beat that waited for it counts",
    rule(Effect.gen(function*() {
      const held = yield* claimed([job()])
      yield* silence(held.worker)
      const reaper = yield* session
      yield* reaper.query("begin")
      yield* reaper.store.reapWorkers()
      const late = yield* blocked(beat(held.worker))
      yield* reaper.query("rollback")
      const heard = yield* join(late)
      assert.isTrue(heard.alive)
      assert.deepStrictEqual(heard.leases.map((l) => l.id), [held.lease])
    }))
  )

  it.effect(
    "a worker whose claim is in flight is not reaped, so its lease cannot be orphaned unseen",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* store.insert([job()], false)
      const me = yield* worker()
      yield* silence(me)
      const claiming = yield* session
      yield* claiming.query("begin")
      assert.strictEqual((yield* claiming.store.claim(claimOptions(me))).length, 1)
      assert.deepStrictEqual(yield* store.reapWorkers(), [])
      assert.isTrue((yield* beat(me)).alive)
      yield* claiming.query("commit")
      assert.strictEqual(yield* leases, 1)
    }))
  )

  it.effect(
    "a settle under way is finished before a rescue sees the lease, and one that comes later is gone",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed(jobs(2))
      const entries = held.ids.map((id) => entry(held.lease, id, "completed"))
      yield* bury(held.worker)
      const settling = yield* session
      yield* settling.query("begin")
      yield* settling.store.settle(held.worker, [entries[0]!])
      assert.deepInclude(yield* store.rescue(10), { leases: 0 })
      yield* settling.query("commit")

      const rescuing = yield* session
      yield* rescuing.query("begin")
      assert.deepInclude(yield* rescuing.store.rescue(10), { leases: 1, back: 1 })
      const late = yield* blocked(store.settle(held.worker, entries))
      yield* rescuing.query("commit")
      assert.deepStrictEqual((yield* join(late)).map((a) => a.state), ["gone", "gone"])
      assert.deepInclude(yield* stateOf(held.ids[0]!), { place: "finished" })
      assert.deepInclude(yield* stateOf(held.ids[1]!), { place: "ready", rescued: 1 })
    }))
  )

  it.effect(
    "unregister makes the leases that are left free at once",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed([job()])
      assert.deepInclude(yield* store.rescue(10), { leases: 0 })
      yield* store.unregister(held.worker)
      assert.deepInclude(yield* store.rescue(10), { leases: 1, back: 1 })
    }))
  )

  it.effect(
    "leave puts the jobs of every lease that is left back in line, unburnt, and removes the worker",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed([job(), job()])
      const other = yield* claimed([job()])
      yield* store.leave(held.worker)
      for (const id of held.ids) {
        assert.deepInclude(yield* stateOf(id), { place: "ready", rescued: 0, attempt: 0 })
      }
      assert.deepInclude(yield* stateOf(other.ids[0]!), { place: "lease" })
      assert.isFalse(yield* alive(held.worker))
      assert.isTrue(yield* alive(other.worker))
      yield* store.settle(other.worker, other.ids.map((id) => entry(other.lease, id, "completed")))
      yield* store.leave(other.worker)
      assert.isFalse(yield* alive(other.worker))
      // Nothing is left of it: it may have been declared dead meanwhile.
      yield* store.leave(held.worker)
    }))
  )
})
