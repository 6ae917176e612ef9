/** Upkeep: kinds that nobody handles stand aside and come back, and jobs in no place are found. */
import { assert, layer } from "@effect/vitest"
import { Effect, Fiber, Metric } from "effect"
import * as Store from "../src/Store.ts"
import * as Tasks from "../src/Tasks.ts"
import * as Telemetry from "../src/Telemetry.ts"
import type * as Wakeup from "../src/Wakeup.ts"
import {
  assertInPlace,
  blocked,
  bury,
  claim,
  claimed,
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
  uuid,
  value,
  worker
} from "./support/storage.ts"

const lanes = [...Store.priorityLanes, ...Store.suspectLanes]
const everyLane = lanes.map(Store.laneStart)
const count = (where: string) => value<number>(`select count(*)::int4 from pgqueue.${where}`)
const marks = Effect.map(
  query<{ mark: string }>("select queue || ' ' || kind as mark from pgqueue.parked order by 1"),
  (rows) => rows.map(({ mark }) => mark)
)
const laneOf = (id: string) => value<number>("select lane::int4 from pgqueue.ready where id = $1::uuid", [id])
const lineText = "select queue, lane, run_at, id, kind, attempt from pgqueue.ready order by queue, lane, run_at, id"
/** What a worker of this process is told. */
const hearing = () => {
  const words: Array<string> = []
  const wakeup: Wakeup.Wakeup = {
    mark: (queue) => words.push(`due ${queue}`),
    withInsert: () => undefined,
    tell: (news, id) => words.push(`${news} ${id}`),
    tellHere: (news, id) => words.push(`${news} ${id}`),
    scheduled: () => {},
    subscribe: () => Effect.void,
    listen: Effect.void
  }
  return { words, wakeup }
}
/** Claims with a worker that dies at once, and rescues, twice: everything due of a kind becomes a suspect. */
const makeSuspects = Effect.fnUntraced(function*(kind: string) {
  const { store } = yield* Storage
  for (let crash = 0; crash < 2; crash++) {
    yield* makeDue
    const victim = yield* worker()
    yield* claim(victim, { kinds: [kind], lanes: everyLane })
    yield* bury(victim)
    yield* store.rescue(100)
  }
  yield* makeDue
})

layer(Storage.layer, { excludeTestServices: true })("upkeep", (it) => {
  // ---------------------------------------------------------------------------
  // Kinds that nobody handles
  // ---------------------------------------------------------------------------

  it.effect(
    "parks what is due of kinds that no live worker of that queue lists, by kind or by prefix, and nothing else",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* worker({ queues: ["default", "both"], kinds: ["k", "a%"], prefixes: ["report:", "x_"] })
      yield* worker({ queues: ["other", "both"], kinds: ["strange"] })
      const stay = [
        job(),
        job({ kind: "report:daily" }),
        job({ kind: "report:" }),
        job({ kind: "x_y" }),
        job({ kind: "a%" }),
        job({ kind: "strange", queue: "other" }),
        job({ kind: "strange", queue: "both" }),
        // Nobody works this line, so it is in nobody's way.
        job({ kind: "strange", queue: "nobody's" }),
        // Not yet.
        job({ kind: "strange", delay: 60_000 })
      ]
      const park = [
        job({ kind: "strange" }),
        job({ kind: "strange", priority: 2 }),
        job({ kind: "report" }),
        job({ kind: "Report:daily" }),
        job({ kind: "xzy" }),
        job({ kind: "abc" }),
        job({ kind: "k", queue: "other" })
      ]
      yield* store.insert([...stay, ...park], false)
      assert.strictEqual(yield* store.park(lanes, 100), park.length)
      const parked = yield* query<{ id: string }>("select id::text as id from pgqueue.ready where lane >= 200")
      assert.sameMembers(parked.map(({ id }) => id), park.map(({ id }) => id))
      assert.strictEqual(yield* laneOf(park[1]!.id), 202)
      assert.deepStrictEqual(yield* marks, [
        "default Report:daily",
        "default abc",
        "default report",
        "default strange",
        "default xzy",
        "other k"
      ])
      assert.strictEqual(yield* store.park(lanes, 100), 0)
    }))
  )

  it.effect(
    "a worker counts until it is declared dead",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* worker()
      const silent = yield* worker({ kinds: ["strange"] })
      yield* store.insert([job({ kind: "strange" })], false)
      yield* silence(silent)
      assert.strictEqual(yield* store.park(lanes, 100), 0)
      yield* store.reapWorkers()
      assert.strictEqual(yield* store.park(lanes, 100), 1)
    }))
  )

  it.effect(
    "what is parked is in nobody's way: no claim and no look reads it, and it is still counted as unhandled",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const me = yield* worker()
      yield* store.insert(jobs(3, { kind: "strange" }), false)
      yield* store.park(lanes, 100)
      assert.deepStrictEqual((yield* claim(me, { kinds: ["k", "strange"], lanes: everyLane })).ids, [])
      assert.deepStrictEqual(yield* store.look(["default"], lanes), [{ queue: "default", due: false, wait: null }])
      const [row, ...others] = yield* store.stats(false)
      assert.deepInclude(row, { queue: "default", kind: "strange", available: 3, running: 0, handled: false })
      assert.deepStrictEqual(others, [])
    }))
  )

  it.effect(
    "a full front of strangers is parked page by page until the handled ones behind it are in front",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const me = yield* worker()
      const insert = (kind: string, count: number) =>
        query(
          `with new as (
            insert into pgqueue.job (id, kind, queue, priority, run_at, scheduled_for, max_attempts, payload)
            select gen_random_uuid(), $1::text, 'default', 5, statement_timestamp(), now(), 5, '{}' from generate_series(1, $2::int4)
            returning id, run_at)
          insert into pgqueue.ready (queue, lane, run_at, id, kind, attempt) select 'default', 5, run_at, id, $1::text, 0 from new`,
          [kind, count]
        )
      yield* insert("strange", 4500)
      const last = job()
      yield* store.insert([last], false)
      assert.strictEqual(yield* store.park(lanes, 10), 10)
      assert.strictEqual(yield* Tasks.parkOnce(store), 4490)
      assert.deepStrictEqual((yield* claim(me)).ids, [last.id])
      const { words, wakeup } = hearing()
      const handler = yield* worker({ kinds: ["strange"] })
      assert.strictEqual(yield* Tasks.unparkOnce(store, wakeup, handler), 4500)
      assert.deepStrictEqual(words, ["due default", "due default", "due default"])
      assert.deepStrictEqual(yield* marks, [])
    }))
  )

  it.effect(
    "what comes back stands where it stood: order, priority, due time, suspects among suspects",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* store.insert(jobs(3, { kind: "strange", priority: 2 }), false)
      yield* store.insert(jobs(3, { kind: "strange" }), false)
      yield* makeSuspects("strange")
      yield* store.insert(jobs(3, { kind: "strange" }), false)
      yield* store.insert(jobs(3, { kind: "strange", priority: 2 }), false)
      yield* store.insert(jobs(3), false)
      const before = yield* query(lineText)
      assert.strictEqual(yield* count("ready where lane between 100 and 199"), 6)
      const me = yield* worker()
      assert.strictEqual(yield* store.park(lanes, 100), 12)
      assert.strictEqual(yield* count("ready where lane >= 200"), 12)
      yield* assertInPlace
      yield* store.unpark(me, 100)
      assert.strictEqual(yield* count("ready where lane >= 200"), 12)

      const handler = yield* worker({ kinds: ["strange"] })
      // A lane at a time no more than asked, the first ones first.
      assert.deepStrictEqual(yield* store.unpark(handler, 2), { count: 4, queues: ["default"] })
      assert.deepStrictEqual(yield* marks, ["default strange"])
      assert.deepStrictEqual(yield* store.unpark(handler, 100), { count: 8, queues: ["default"] })
      assert.deepStrictEqual(yield* query(lineText), before)
      assert.deepStrictEqual(yield* store.unpark(handler, 100), { count: 0, queues: [] })
      assert.deepStrictEqual(yield* marks, [])
    }))
  )

  it.effect(
    "a worker brings back what it lists, in the queues it works, and leaves the rest and its marks",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* worker({ queues: ["a", "b"] })
      const strange = ["a", "b"].flatMap((queue) =>
        ["report:daily", "report", "email"].map((kind) => job({ kind, queue }))
      )
      yield* store.insert(strange, false)
      assert.strictEqual(yield* store.park(lanes, 100), 6)
      const handler = yield* worker({ queues: ["a"], kinds: ["email"], prefixes: ["report:"] })
      assert.deepStrictEqual(yield* store.unpark(handler, 100), { count: 2, queues: ["a"] })
      assert.deepStrictEqual(yield* store.unpark(handler, 100), { count: 0, queues: [] })
      assert.deepStrictEqual(yield* marks, ["a report", "b email", "b report", "b report:daily"])
      assert.deepStrictEqual(yield* store.unpark(uuid(), 100), { count: 0, queues: [] })
    }))
  )

  it.effect(
    "the mark goes when the parked jobs have gone otherwise",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* worker()
      const [one, two] = [job({ kind: "strange" }), job({ kind: "strange", priority: 8 })]
      yield* store.insert([one, two], false)
      yield* store.park(lanes, 100)
      const handler = yield* worker({ kinds: ["strange"] })
      yield* store.cancel(one.id, "", false)
      const holding = yield* session
      yield* holding.query("begin")
      yield* holding.query("select 1 from pgqueue.ready for update")
      // There is one more, which nobody can take at the moment.
      assert.strictEqual((yield* store.unpark(handler, 100)).count, 0)
      assert.deepStrictEqual(yield* marks, ["default strange"])
      yield* holding.query("commit")
      yield* store.cancel(two.id, "", false)
      assert.strictEqual((yield* store.unpark(handler, 100)).count, 0)
      assert.deepStrictEqual(yield* marks, [])
    }))
  )

  it.effect(
    "a parked job can be replaced, and then stands in line as what has replaced it",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const me = yield* worker()
      for (const onConflict of ["replace", "debounce"] as const) {
        const parked = keyed("key", { kind: "strange" })
        yield* store.insertUnique([parked], false, undefined)
        assert.strictEqual(yield* store.park(lanes, 100), 1)
        const other = job({ priority: 2, payload: `"new"`, unique: { ...parked.unique!, onConflict } })
        assert.isTrue(yield* store.replace(parked.id, other, false))
        const { ids, lease, rows } = yield* claim(me, { lanes: everyLane })
        assert.deepStrictEqual(ids, [parked.id])
        assert.deepInclude(rows[0], { lane: 2, kind: "k", payload: `"new"` })
        yield* store.settle(me, [entry(lease, parked.id, "completed")])
      }
    }))
  )

  it.effect(
    "a job that is parked while its worker registers comes back: the parker first",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* worker()
      const strange = job({ kind: "strange" })
      yield* store.insert([strange, job({ kind: "strange", priority: 2 })], false)
      // One is parked and has come back: there is a mark, and nothing behind it.
      yield* store.park([2], 100)
      yield* store.cancel(yield* value<string>("select id::text from pgqueue.ready where lane = 202"), "", false)
      const parking = yield* session
      yield* parking.query("begin")
      assert.strictEqual(yield* parking.store.park(lanes, 100), 1)
      const handler = yield* worker({ kinds: ["strange"] })
      const unparking = yield* blocked(store.unpark(handler, 100))
      yield* parking.query("commit")
      // It could not see the job, and must not take the mark away from it.
      assert.deepStrictEqual(yield* join(unparking), { count: 0, queues: [] })
      assert.deepStrictEqual(yield* marks, ["default strange"])
      assert.deepStrictEqual(yield* store.unpark(handler, 100), { count: 1, queues: ["default"] })
      assert.strictEqual(yield* laneOf(strange.id), 5)
    }))
  )

  it.effect(
    "a job that is parked while its worker registers comes back: the worker first",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* worker()
      const strange = job({ kind: "strange" })
      yield* store.insert([job({ kind: "strange", priority: 2 })], false)
      yield* store.park(lanes, 100)
      yield* store.cancel(yield* value<string>("select id::text from pgqueue.ready"), "", false)
      yield* store.insert([strange], false)
      const handler = uuid()
      const registering = yield* session
      yield* registering.query("begin")
      yield* registering.store.register({
        id: handler,
        name: "late",
        queues: ["default"],
        kinds: ["strange"],
        prefixes: [],
        lease: 30_000
      })
      assert.strictEqual((yield* registering.store.unpark(handler, 100)).count, 0)
      // The mark is going, and the parker does not know of the worker yet.
      const parking = yield* blocked(store.park(lanes, 100))
      yield* registering.query("commit")
      assert.strictEqual(yield* join(parking), 1)
      assert.deepStrictEqual(yield* marks, ["default strange"])
      assert.strictEqual((yield* store.unpark(handler, 100)).count, 1)
      assert.strictEqual((yield* store.unpark(handler, 100)).count, 0)
      assert.deepStrictEqual(yield* marks, [])
    }))
  )

  it.effect(
    "many who park and bring back at the same time lose nothing and double nothing",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* worker()
      const all = ["strange", "stranger"].flatMap((kind) => jobs(150, { kind }))
      yield* store.insert(all, false)
      let parked = yield* store.park(lanes, 100)
      let back = 0
      const parker = Effect.map(store.park(lanes, 40), (count) => parked += count)
      const visitor = (kind: string) =>
        Effect.gen(function*() {
          const id = yield* worker({ kinds: [kind] })
          for (let i = 0; i < 3; i++) back += (yield* store.unpark(id, 50)).count
          yield* store.unregister(id)
        })
      const parkers = yield* Effect.forEach(
        Array.from({ length: 4 }),
        () => Effect.forkChild(Effect.forever(parker))
      )
      yield* Effect.forEach(
        ["strange", "stranger", "strange"],
        (kind) => Effect.repeat(visitor(kind), { times: 8 }),
        { concurrency: 3 }
      )
      yield* Fiber.interruptAll(parkers)
      // How often they meet is chance; that the first visitor finds something is not.
      assert.isAtLeast(parked, 100)
      assert.isAbove(back, 0)
      yield* assertInPlace
      assert.strictEqual(yield* count("ready"), 300)
      const handler = yield* worker({ kinds: ["strange", "stranger"] })
      yield* Tasks.unparkOnce(store, hearing().wakeup, handler)
      assert.deepStrictEqual(yield* marks, [])
      const { ids } = yield* claim(handler, { kinds: ["strange", "stranger"], limit: 1000 })
      assert.deepStrictEqual(ids, all.map(({ id }) => id))
    }))
  )

  it.effect(
    "a claim and a parker that meet share no job",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const me = yield* worker()
      yield* store.insert(jobs(2, { kind: "strange" }), false)
      const claiming = yield* session
      yield* claiming.query("begin")
      const taken = yield* claiming.store.claim({
        worker: me,
        lease: uuid(),
        queue: "default",
        lanes: everyLane,
        kinds: ["strange"],
        prefixes: [],
        limit: 1
      })
      assert.strictEqual(yield* store.park(lanes, 100), 1)
      yield* claiming.query("commit")
      assert.deepInclude(yield* stateOf(taken[0]!.id), { place: "lease" })
      assert.strictEqual(yield* store.park(lanes, 100), 0)
    }))
  )

  for (const what of ["park", "unpark"] as const) {
    /** A job that is about to be moved, and how. */
    const about = Effect.gen(function*() {
      const { store } = yield* Storage
      yield* worker()
      const strange = job({ kind: "strange" })
      yield* store.insert([strange], false)
      if (what === "park") return { id: strange.id, move: (by: Store.Store) => by.park(lanes, 100) }
      yield* store.park(lanes, 100)
      const handler = yield* worker({ kinds: ["strange"] })
      return { id: strange.id, move: (by: Store.Store) => Effect.map(by.unpark(handler, 100), ({ count }) => count) }
    })

    it.effect(
      `a job that is cancelled while it moves has ended: ${what} first`,
      rule(Effect.gen(function*() {
        const { store } = yield* Storage
        const { id, move } = yield* about
        const moving = yield* session
        yield* moving.query("begin")
        assert.strictEqual(yield* move(moving.store), 1)
        const cancelling = yield* blocked(store.cancel(id, "enough", false))
        yield* moving.query("commit")
        assert.deepInclude(yield* join(cancelling), { status: "cancelled" })
        assert.deepInclude(yield* stateOf(id), { place: "finished", status: "cancelled", reason: "enough" })
      }))
    )

    it.effect(
      `a job that is cancelled while it would move has ended: ${what} passes it by`,
      rule(Effect.gen(function*() {
        const { sql, store } = yield* Storage
        const { id, move } = yield* about
        yield* sql.withTransaction(Effect.gen(function*() {
          assert.deepInclude(yield* store.cancel(id, "enough", true), { status: "cancelled" })
          assert.strictEqual(yield* move(store), 0)
        }))
        assert.strictEqual(yield* move(store), 0)
        assert.deepInclude(yield* stateOf(id), { place: "finished", status: "cancelled" })
      }))
    )
  }

  // ---------------------------------------------------------------------------
  // Jobs in no place
  // ---------------------------------------------------------------------------

  it.effect(
    "a job in no place is found and stands where it belongs again, once, is counted, and wakes its queue",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const suspect = job({ kind: "strange" })
      yield* store.insert([suspect], false)
      yield* makeSuspects("strange")
      const held = yield* claimed(jobs(2))
      yield* store.settle(held.worker, [entry(held.lease, held.ids[1]!, "failed", { delay: 0, failure })])
      const [plain, future, mail, parked] = [
        job({ priority: 2 }),
        job({ delay: 60_000 }),
        job({ queue: "mail" }),
        job({ kind: "strange" })
      ]
      yield* store.insert([plain, future, mail, parked], false)
      const before = yield* query(lineText)
      yield* store.park([5], 100)
      yield* query("delete from pgqueue.ready")
      yield* query("delete from pgqueue.lease")

      const { words, wakeup } = hearing()
      const counted = yield* Metric.value(Telemetry.misplacedJobs)
      const first = yield* Tasks.auditOnce(store, wakeup, undefined)
      assert.strictEqual(first.jobs, 7)
      assert.deepStrictEqual(yield* Tasks.auditOnce(store, wakeup, first.last), { jobs: 0, last: undefined })
      assert.sameMembers(words, ["due default", "due mail"])
      assert.strictEqual(Number((yield* Metric.value(Telemetry.misplacedJobs)).count) - Number(counted.count), 7)
      yield* assertInPlace
      assert.strictEqual(yield* laneOf(suspect.id), 105)
      assert.strictEqual(yield* laneOf(parked.id), 5)
      assert.deepInclude(yield* stateOf(held.ids[1]!), { place: "ready", attempt: 1 })
      // Whose lease has vanished is in line, unburnt.
      assert.deepInclude(yield* stateOf(held.ids[0]!), { place: "ready", attempt: 0, rescued: 0 })
      const line = yield* query<{ id: string }>(lineText)
      assert.deepStrictEqual(line.filter(({ id }) => id !== held.ids[0]), before as typeof line)
      yield* Tasks.auditOnce(store, wakeup, undefined)
      assert.strictEqual(words.length, 2)
      yield* query("delete from pgqueue.parked")
    }))
  )

  it.effect(
    "jobs that are held, parked, blocked, suspect, or not yet due are in their place",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* store.insert(jobs(2, { kind: "suspect" }), false)
      yield* makeSuspects("suspect")
      yield* claimed(jobs(3))
      const waiting = job()
      yield* store.insert([
        ...Store.priorityLanes.map((priority) => job({ priority, kind: "strange" })),
        job({ delay: 1e9 }),
        waiting
      ], false)
      yield* store.park(Store.priorityLanes, 100)
      yield* query("delete from pgqueue.ready where id = $1::uuid", [waiting.id])
      yield* query("insert into pgqueue.blocked (id, reason) values ($1::uuid, 'a test')", [waiting.id])
      assert.deepStrictEqual((yield* store.audit(undefined, 1000)).misplaced, [])
      const all = yield* query<{ id: string }>("select id::text as id from pgqueue.job")
      assert.deepStrictEqual(yield* store.repair(all.map(({ id }) => id)), { repaired: [], queues: [] })
    }))
  )

  it.effect(
    "an audit goes through the jobs page by page and begins again at the end",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      assert.deepStrictEqual(yield* store.audit(undefined, 3), { last: undefined, misplaced: [] })
      yield* store.insert(jobs(8), false)
      yield* query("delete from pgqueue.ready")
      const ids = (yield* query<{ id: string }>("select id::text as id from pgqueue.job order by id")).map(({ id }) =>
        id
      )
      const found: Array<string> = []
      let after: string | undefined
      const pages: Array<number> = []
      do {
        const page = yield* store.audit(after, 3)
        found.push(...page.misplaced)
        pages.push(page.misplaced.length)
        after = page.last
      } while (after !== undefined)
      assert.deepStrictEqual(pages, [3, 3, 2, 0])
      assert.deepStrictEqual(found.toSorted(), ids)
      assert.deepStrictEqual(yield* store.repair([]), { repaired: [], queues: [] })
      assert.sameMembers([...(yield* store.repair(ids)).repaired], ids)
    }))
  )

  it.effect(
    "what has found its place since the audit, has ended, or is in somebody's hands is not repaired",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed(jobs(2))
      yield* store.settle(held.worker, [entry(held.lease, held.ids[1]!, "completed")])
      const [waiting, locked, lost] = [job(), job(), job()]
      yield* store.insert([waiting, locked, lost], false)
      yield* query("delete from pgqueue.ready where id <> $1::uuid", [waiting.id])
      const stranger = yield* session
      yield* stranger.query("begin")
      yield* stranger.query(`select 1 from pgqueue.job where id = '${locked.id}' for update`)
      const all = [...held.ids, waiting.id, locked.id, lost.id, uuid()]
      const [one, two] = yield* Effect.all([store.repair(all), store.repair(all)], { concurrency: 2 })
      // Two at once: whoever has the row repairs it.
      assert.deepStrictEqual([...one.repaired, ...two.repaired], [lost.id])
      yield* stranger.query("commit")
      assert.deepStrictEqual(yield* store.repair(all), { repaired: [locked.id], queues: ["default"] })
    }))
  )

  it.effect(
    "two hundred audits beside everything that moves jobs find nothing",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* store.insert(jobs(60), false)
      yield* store.insert(jobs(20, { kind: "strange" }), false)
      const me = yield* worker({ lease: 1e12 })
      let moves = 0
      const verbs = ["completed", "failed", "snoozed", "released", "discarded"] as const
      const settler = Effect.gen(function*() {
        const { ids, lease } = yield* claim(me, { limit: 10 })
        moves += ids.length
        yield* store.settle(me, ids.map((id, i) => entry(lease, id, verbs[i % 5]!, { delay: 0, failure })))
      })
      const releaser = Effect.gen(function*() {
        const { ids, lease } = yield* claim(me, { limit: 5 })
        moves += ids.length
        if (ids.length > 1) yield* store.detach(lease, ids[0]!, uuid())
        yield* store.release(me, [lease])
      })
      const dying = Effect.gen(function*() {
        const victim = yield* worker({ lease: 1e12 })
        yield* claim(victim, { limit: 3 })
        yield* bury(victim)
        yield* store.rescue(10)
        yield* makeDue
      })
      const visitor = Effect.gen(function*() {
        const id = yield* worker({ kinds: ["strange"], lease: 1e12 })
        yield* store.park(lanes, 10)
        yield* store.unpark(id, 10)
        yield* store.unregister(id)
        yield* store.park(lanes, 10)
      })
      const person = Effect.gen(function*() {
        const ended = yield* query<{ id: string }>("select id::text as id from pgqueue.finished limit 20")
        yield* store.retry(ended.map(({ id }) => id), undefined, false)
        const key = keyed("key", {
          unique: { key: "key", period: undefined, until: "finished", onConflict: "debounce" }
        })
        yield* store.insertUnique([key], false, undefined)
        const [holder] = yield* store.holders([key], false)
        if (holder !== undefined) yield* store.replace(holder.holder, key, false)
        if (holder !== undefined) yield* store.cancel(holder.holder, "", false)
      })
      const movers = yield* Effect.forEach(
        [settler, settler, releaser, dying, visitor, person],
        (mover) => Effect.forkChild(Effect.forever(mover))
      )
      for (let i = 0; i < 200; i++) {
        const { misplaced } = yield* store.audit(undefined, 5000)
        assert.deepStrictEqual(misplaced, [], `audit ${i}`)
      }
      yield* Fiber.interruptAll(movers)
      assert.isAbove(moves, 100)
      // What was interrupted in the middle of a claim is still held by somebody.
      yield* assertInPlace
    }))
  )
})
