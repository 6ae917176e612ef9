/** Settle: what each verb leaves behind, and that one end per claim is accepted whatever is lost, repeated or late. */
import { assert, layer } from "@effect/vitest"
import { Duration, Effect } from "effect"
import { type Entry, type Verb } from "../src/Settlement.ts"
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
  query,
  rule,
  session,
  stateOf,
  Storage,
  uuid,
  value,
  worker
} from "./support/storage.ts"

const leases = value<number>("select count(*)::int4 from pgqueue.lease")
const finishedCount = value<number>("select count(*)::int4 from pgqueue.finished")
const attemptsOf = (id: string) =>
  query("select n, tag, message, error, worker::text as worker from pgqueue.attempt where job = $1::uuid order by id", [
    id
  ])
/** How far away the due time of a job is, in milliseconds. */
const dueIn = (id: string) =>
  value<number>(
    "select (extract(epoch from run_at - clock_timestamp()) * 1000)::float8 from pgqueue.job where id = $1::uuid",
    [id]
  )
const cancelMark = (id: string) =>
  `update pgqueue.job set cancelled_at = clock_timestamp(), cancel_reason = 'enough' where id = '${id}'`

layer(Storage.layer, { excludeTestServices: true })("settle", (it) => {
  // ---------------------------------------------------------------------------
  // What each verb leaves behind
  // ---------------------------------------------------------------------------

  /** One keyed job, claimed and settled with one entry. */
  const settled = Effect.fnUntraced(
    function*(verb: Verb, options: Partial<Entry>, before?: (id: string) => string, maxAttempts = 5) {
      const { store } = yield* Storage
      const held = yield* claimed([keyed("key", { maxAttempts })])
      const id = held.ids[0]!
      if (before !== undefined) yield* query(before(id))
      const answers = yield* store.settle(held.worker, [entry(held.lease, id, verb, options)])
      assert.strictEqual(yield* leases, 0)
      return {
        ...held,
        id,
        answers: answers.map(({ state, status }) => [state, status]),
        state: yield* stateOf(id),
        attempts: yield* attemptsOf(id),
        keys: yield* value<number>("select count(*)::int4 from pgqueue.unique_key")
      }
    }
  )

  it.effect(
    "completed: the job moves to finished with its result, frees its key and is not answered",
    rule(Effect.gen(function*() {
      const { answers, attempts, keys, lease, state, worker } = yield* settled("completed", {
        result: `{"ok": true}`,
        ran: 1500
      })
      assert.deepStrictEqual(answers, [])
      assert.deepInclude(state, {
        place: "finished",
        status: "completed",
        result: { ok: true },
        error: null,
        attempt: 1,
        lease,
        worker
      })
      const ran = Date.parse(String(state["finished_at"])) - Date.parse(String(state["started_at"]))
      assert.strictEqual(ran, 1500)
      assert.deepStrictEqual([attempts.length, keys], [0, 0])
    }))
  )

  it.effect(
    "failed with a delay: an attempt is recorded and the job waits for its retry with its key",
    rule(Effect.gen(function*() {
      const { answers, attempts, id, keys, state, worker } = yield* settled("failed", { delay: 60_000, failure })
      assert.deepStrictEqual(answers, [["done", null]])
      assert.deepInclude(state, { place: "ready", attempt: 1, rescued: 0, snoozed: 0 })
      const wait = yield* dueIn(id)
      assert.isTrue(wait > 50_000 && wait <= 60_000, `due in ${wait} ms`)
      assert.deepStrictEqual(attempts, [{ n: 1, tag: "Failed", message: "boom", error: { _tag: "Boom" }, worker }])
      assert.strictEqual(keys, 1)
    }))
  )

  it.effect(
    "failed without a delay: the job is discarded with its last error",
    rule(Effect.gen(function*() {
      const { answers, attempts, keys, state } = yield* settled("failed", { failure })
      assert.deepStrictEqual(answers, [["done", "discarded"]])
      assert.deepInclude(state, { place: "finished", status: "discarded", attempt: 1 })
      assert.deepStrictEqual(state["error"], { tag: "Failed", message: "boom", error: { _tag: "Boom" } })
      assert.deepStrictEqual([attempts.length, keys], [0, 0])
    }))
  )

  it.effect(
    "failed at the last attempt: the job is discarded whatever delay was asked for",
    rule(Effect.gen(function*() {
      const { answers, keys, state } = yield* settled("failed", { delay: 1000, failure }, undefined, 1)
      assert.deepStrictEqual(answers, [["done", "discarded"]])
      assert.deepInclude(state, { place: "finished", status: "discarded", attempt: 1 })
      assert.strictEqual(keys, 0)
    }))
  )

  it.effect(
    "snoozed: the job waits, no attempt is spent, the key stays",
    rule(Effect.gen(function*() {
      const { answers, attempts, id, keys, state } = yield* settled("snoozed", { delay: 60_000 }, undefined, 1)
      assert.deepStrictEqual(answers, [["done", null]])
      assert.deepInclude(state, { place: "ready", attempt: 0, snoozed: 1 })
      assert.isTrue((yield* dueIn(id)) > 50_000)
      assert.deepStrictEqual([attempts.length, keys], [0, 1])
    }))
  )

  for (const verb of ["cancelled", "discarded"] as const) {
    it.effect(
      `${verb}: the job ends with the reason and frees its key`,
      rule(Effect.gen(function*() {
        const { answers, keys, state } = yield* settled(verb, { reason: "because" })
        assert.deepStrictEqual(answers, [["done", verb]])
        assert.deepInclude(state, { place: "finished", status: verb, reason: "because", error: null, attempt: 1 })
        assert.strictEqual(keys, 0)
      }))
    )
  }

  it.effect(
    "released: the job is where it was before the claim, with its due time and its key",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const waiting = keyed("key")
      yield* store.insertUnique([waiting], false, undefined)
      const before = yield* query("select * from pgqueue.ready")
      const me = yield* worker()
      const { lease } = yield* claim(me)
      const answers = yield* store.settle(me, [entry(lease, waiting.id, "released", { delay: 1000 })])
      assert.deepStrictEqual(answers.map((a) => a.state), ["done"])
      assert.deepStrictEqual(yield* query("select * from pgqueue.ready"), before)
      assert.deepInclude(yield* stateOf(waiting.id), { place: "ready", attempt: 0, rescued: 0, snoozed: 0 })
      assert.deepStrictEqual(yield* attemptsOf(waiting.id), [])
    }))
  )

  for (const verb of ["failed", "snoozed", "released"] as const) {
    it.effect(
      `a cancel mark ends a job that is ${verb}`,
      rule(Effect.gen(function*() {
        const { answers, keys, state } = yield* settled(verb, { delay: 1000 }, cancelMark)
        assert.deepStrictEqual(answers, [["done", "cancelled"]])
        assert.deepInclude(state, { place: "finished", status: "cancelled", reason: "enough" })
        assert.strictEqual(keys, 0)
      }))
    )
  }

  it.effect(
    "a cancel mark comes too late for a job that completed",
    rule(Effect.gen(function*() {
      const { state } = yield* settled("completed", { result: "1" }, cancelMark)
      assert.deepInclude(state, { place: "finished", status: "completed", result: 1 })
    }))
  )

  it.effect(
    "a cancel mark counts when it is set after the settle took its snapshot",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed([job()])
      const stranger = yield* session
      yield* stranger.query("begin")
      yield* stranger.query("select 1 from pgqueue.lease for update")
      const late = yield* blocked(
        store.settle(held.worker, [entry(held.lease, held.ids[0]!, "failed", { delay: 0, failure })])
      )
      yield* query(cancelMark(held.ids[0]!))
      yield* stranger.query("commit")
      assert.deepStrictEqual((yield* join(late)).map((a) => a.status), ["cancelled"])
    }))
  )

  for (const verb of ["completed", "failed"] as const) {
    it.effect(
      `${verb}: rows that were changed after the settle took its snapshot are written all the same`,
      rule(Effect.gen(function*() {
        const { store } = yield* Storage
        const held = yield* claimed([keyed("key")])
        const stranger = yield* session
        yield* stranger.query("begin")
        yield* stranger.query("select 1 from pgqueue.lease for update")
        const late = yield* blocked(
          store.settle(held.worker, [entry(held.lease, held.ids[0]!, verb, { delay: 1000, failure })])
        )
        yield* query("update pgqueue.job set metadata = metadata")
        yield* query("update pgqueue.unique_key set until = until")
        yield* stranger.query("commit")
        yield* join(late)
        assert.deepInclude(yield* stateOf(held.ids[0]!), {
          place: verb === "completed" ? "finished" : "ready",
          attempt: 1
        })
      }))
    )
  }

  // ---------------------------------------------------------------------------
  // The fence
  // ---------------------------------------------------------------------------

  const verbs: ReadonlyArray<Verb> = ["completed", "failed", "snoozed", "cancelled", "discarded", "released"]

  it.effect(
    "the same settle sent twice changes nothing the second time",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed(jobs(verbs.length + 1))
      const entries = verbs.map((verb, i) => entry(held.lease, held.ids[i]!, verb, { delay: 60_000, failure }))
      const everything =
        `select (select json_agg(j order by id) from pgqueue.job j)::text as job, (select json_agg(f order by id) from pgqueue.finished f)::text as finished,
        (select json_agg(r order by id) from pgqueue.ready r)::text as ready, (select json_agg(a order by id) from pgqueue.attempt a)::text as attempt,
        (select json_agg(l) from pgqueue.lease l)::text as lease`
      yield* store.settle(held.worker, entries)
      const once = yield* query(everything)
      const answers = yield* store.settle(held.worker, entries)
      assert.deepStrictEqual(yield* query(everything), once)
      assert.deepStrictEqual(answers.map((a) => a.state), verbs.map(() => "gone"))
      // and a replay under another verb does not either
      yield* store.settle(held.worker, entries.map((e) => ({ ...e, verb: "completed" as const })))
      assert.deepStrictEqual(yield* query(everything), once)
    }))
  )

  it.effect(
    "an entry that is in the batch twice counts once",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed([job()])
      const twice = entry(held.lease, held.ids[0]!, "failed", { delay: 0, failure })
      assert.deepStrictEqual((yield* store.settle(held.worker, [twice, twice])).length, 1)
      assert.strictEqual((yield* attemptsOf(held.ids[0]!)).length, 1)
    }))
  )

  it.effect(
    "a stale and a valid lease of one job in one batch: only the valid one counts",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      for (const staleFirst of [true, false]) {
        const held = yield* claimed([job()])
        const id = held.ids[0]!
        yield* store.release(held.worker, [held.lease])
        const again = yield* claim(held.worker)
        assert.deepStrictEqual(again.ids, [id])
        const batch = [
          entry(held.lease, id, "discarded", { reason: "stale" }),
          entry(again.lease, id, "completed", { result: `"valid"` })
        ]
        const answers = yield* store.settle(held.worker, staleFirst ? batch : batch.toReversed())
        assert.deepStrictEqual(answers, [{ lease: held.lease, id, state: "gone", status: null, awaited: false }])
        assert.deepInclude(yield* stateOf(id), { status: "completed", result: "valid", lease: again.lease })
      }
    }))
  )

  for (const inner of ["first", "second"] as const) {
    it.effect(
      `two settles of one lease at once: the ${inner} one wins when it has the lock, the other changes nothing`,
      rule(Effect.gen(function*() {
        const { store } = yield* Storage
        const held = yield* claimed(jobs(3))
        const complete = held.ids.map((id) => entry(held.lease, id, "completed", { result: "1" }))
        const fail = held.ids.map((id) => entry(held.lease, id, "failed", { delay: 0, failure }))
        const [ahead, behind] = inner === "first" ? [complete, fail] : [fail, complete]
        const first = yield* session
        yield* first.query("begin")
        yield* first.store.settle(held.worker, ahead)
        const second = yield* blocked(store.settle(held.worker, behind))
        yield* first.query("commit")
        assert.deepStrictEqual((yield* join(second)).map((a) => a.state), ["gone", "gone", "gone"])
        assert.strictEqual(yield* finishedCount, inner === "first" ? 3 : 0)
        assert.strictEqual(yield* value("select count(*)::int4 from pgqueue.attempt"), inner === "first" ? 0 : 3)
      }))
    )
  }

  it.effect(
    "two settles of different jobs of one lease at once both count, and the lease goes with the last job",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed(jobs(3))
      const [a, b, c] = held.ids.map((id) => entry(held.lease, id, "completed"))
      const first = yield* session
      yield* first.query("begin")
      yield* first.store.settle(held.worker, [a!])
      const second = yield* blocked(store.settle(held.worker, [b!]))
      yield* first.query("commit")
      assert.deepStrictEqual(yield* join(second), [])
      assert.strictEqual(yield* value("select array_to_string(ids, ',') from pgqueue.lease"), held.ids[2])
      assert.deepStrictEqual(yield* store.settle(held.worker, [c!]), [])
      assert.strictEqual(yield* leases, 0)
    }))
  )

  it.effect(
    "when the first of two settles rolls back, the waiting one counts",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed([job()])
      const entries = [entry(held.lease, held.ids[0]!, "completed")]
      const first = yield* session
      yield* first.query("begin")
      yield* first.store.settle(held.worker, entries)
      const second = yield* blocked(store.settle(held.worker, entries))
      yield* first.query("rollback")
      assert.deepStrictEqual(yield* join(second), [])
      assert.strictEqual(yield* finishedCount, 1)
    }))
  )

  it.effect(
    "a settle locks its leases in the order of their ids, so one that waits holds no lease that comes later",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const both = [yield* claimed(jobs(1)), yield* claimed(jobs(2))].toSorted((a, b) => a.lease < b.lease ? -1 : 1)
      const [first, second] = [both[0]!, both[1]!]
      const stranger = yield* session
      yield* stranger.query("begin")
      yield* stranger.query("select 1 from pgqueue.lease where id = $1::uuid for update", [first.lease])
      const waiting = yield* blocked(store.settle(uuid(), [
        entry(second.lease, second.ids[0]!, "completed"),
        entry(first.lease, first.ids[0]!, "completed")
      ]))
      yield* store.release(second.worker, [second.lease])
      yield* stranger.query("commit")
      assert.deepStrictEqual((yield* join(waiting)).map((a) => a.id), [second.ids[0]])
    }))
  )

  it.effect(
    "batches that share leases in opposite orders do not deadlock",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const all = yield* Effect.forEach(Array.from({ length: 40 }), () => claimed(jobs(2)))
      const half = (at: number) => all.map((held) => entry(held.lease, held.ids[at]!, "completed"))
      yield* Effect.all([store.settle(uuid(), half(0)), store.settle(uuid(), half(1).toReversed())], { concurrency: 2 })
      assert.strictEqual(yield* finishedCount, 80)
      assert.strictEqual(yield* leases, 0)
    }))
  )

  it.effect(
    "a process that wakes after it was declared dead changes nothing and takes nothing",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed([job()])
      yield* bury(held.worker)
      assert.strictEqual((yield* store.rescue(10)).back, 1)
      assert.deepStrictEqual(
        (yield* store.settle(held.worker, [entry(held.lease, held.ids[0]!, "completed")])).map((a) => a.state),
        ["gone"]
      )
      assert.deepInclude(yield* stateOf(held.ids[0]!), { place: "ready" })
      assert.deepStrictEqual((yield* claim(held.worker)).ids, [])
      assert.strictEqual(yield* leases, 0)
      const heard = yield* beat(held.worker)
      assert.deepStrictEqual(heard, { alive: false, clock: undefined, leases: [], cancelled: [] })
    }))
  )

  it.effect(
    "a lease is valid until it is taken back: a settle between the reap and the rescue counts",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed([job()])
      yield* bury(held.worker)
      assert.deepStrictEqual(yield* store.settle(held.worker, [entry(held.lease, held.ids[0]!, "completed")]), [])
      assert.deepInclude(yield* store.rescue(10), { leases: 0, back: 0, ended: 0 })
    }))
  )

  // ---------------------------------------------------------------------------
  // What others do to a job meanwhile
  // ---------------------------------------------------------------------------

  it.effect(
    "an id whose job row is missing is gone and leaves the lease",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed(jobs(2))
      yield* query(`delete from pgqueue.job where id = $1::uuid`, [held.ids[0]!])
      const answers = yield* store.settle(held.worker, held.ids.map((id) => entry(held.lease, id, "completed")))
      assert.deepStrictEqual(answers, [{
        lease: held.lease,
        id: held.ids[0]!,
        state: "gone",
        status: null,
        awaited: false
      }])
      assert.strictEqual(yield* leases, 0)
    }))
  )

  for (
    const [what, lock] of [
      ["job", (id: string) => `select 1 from pgqueue.job where id = '${id}' for update`],
      ["key", (id: string) => `select 1 from pgqueue.unique_key where job = '${id}' for update`]
    ] as const
  ) {
    it.effect(
      `a ${what} row that a stranger holds makes its job busy, holds up nobody else, and settles later`,
      rule(Effect.gen(function*() {
        const { store } = yield* Storage
        const held = yield* claimed([keyed("a"), keyed("b"), ...jobs(19)])
        const entries = held.ids.map((id, i) => entry(held.lease, id, i % 2 === 0 ? "completed" : "failed"))
        const stranger = yield* session
        yield* stranger.query("begin")
        yield* stranger.query(lock(held.ids[0]!))
        // In five rounds, each with the busy job, because one round may meet a busy machine.
        const rounds: Array<number> = []
        for (let i = 0; i < 5; i++) {
          const others = entries.slice(1 + i * 4, 5 + i * 4)
          const [took, answers] = yield* Effect.timed(store.settle(held.worker, [entries[0]!, ...others]))
          rounds.push(Duration.toMillis(took))
          assert.deepStrictEqual(
            answers.filter((a) => a.state !== "done"),
            [{ lease: held.lease, id: held.ids[0]!, state: "busy", status: null, awaited: false }]
          )
          assert.strictEqual(yield* finishedCount, (i + 1) * 4)
        }
        assert.isBelow(Math.min(...rounds), 50)
        assert.strictEqual(yield* value("select array_to_string(ids, ',') from pgqueue.lease"), held.ids[0])
        yield* stranger.query("commit")
        assert.deepStrictEqual(yield* store.settle(held.worker, [entries[0]!]), [])
        assert.strictEqual(yield* leases, 0)
      }))
    )
  }

  it.effect(
    "a job that a stranger deletes meanwhile is gone in the next round",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed([job()])
      const entries = [entry(held.lease, held.ids[0]!, "completed")]
      const stranger = yield* session
      yield* stranger.query("begin")
      yield* stranger.query("delete from pgqueue.job")
      assert.deepStrictEqual((yield* store.settle(held.worker, entries)).map((a) => a.state), ["busy"])
      yield* stranger.query("commit")
      assert.deepStrictEqual((yield* store.settle(held.worker, entries)).map((a) => a.state), ["gone"])
      assert.strictEqual(yield* leases, 0)
    }))
  )

  it.effect(
    "a data error changes nothing, so that the batch can be sent again in parts",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed(jobs(2))
      const [good, bad] = [
        entry(held.lease, held.ids[0]!, "completed"),
        entry(held.lease, held.ids[1]!, "completed", { result: "{" })
      ]
      yield* Effect.flip(store.settle(held.worker, [good, bad]))
      assert.strictEqual(yield* finishedCount, 0)
      assert.deepStrictEqual(yield* store.settle(held.worker, [good]), [])
      assert.deepStrictEqual(yield* store.settle(held.worker, [{ ...bad, result: "{}" }]), [])
    }))
  )

  // ---------------------------------------------------------------------------
  // Claims whose answer was lost
  // ---------------------------------------------------------------------------

  it.effect(
    "a claim whose answer was lost: the retry takes other jobs, the beat shows the lost lease, release puts it back unburnt",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* store.insert(jobs(4), false)
      const before = yield* query("select * from pgqueue.ready order by id")
      const me = yield* worker()
      const lost = claimOptions(me, { limit: 2 })
      yield* store.claim(lost)
      const known = yield* claim(me, { limit: 2 })
      const heard = yield* beat(me)
      assert.isTrue(heard.alive)
      assert.sameMembers(heard.leases.map((l) => l.id), [lost.lease, known.lease])
      assert.isTrue(heard.leases.every((l) => l.age >= 0 && l.age < 60_000))
      const unknown = heard.leases.filter((l) => l.id !== known.lease).map((l) => l.id)
      assert.deepInclude(yield* store.release(me, unknown), { leases: 1, back: 2, ended: 0, queues: ["default"] })
      assert.deepInclude(yield* store.release(me, unknown), { leases: 0, back: 0, ended: 0, queues: [] })
      yield* store.release(me, [known.lease])
      assert.deepStrictEqual(yield* query("select * from pgqueue.ready order by id"), before)
      assert.strictEqual(yield* value("select sum(attempt + rescued + snoozed)::int4 from pgqueue.job"), 0)
    }))
  )

  it.effect(
    "release honours a cancel mark and touches only leases of the worker that asks",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed([keyed("a"), keyed("b")])
      yield* query(cancelMark(held.ids[0]!))
      assert.deepInclude(yield* store.release(uuid(), [held.lease]), { leases: 0, back: 0, ended: 0 })
      assert.deepInclude(yield* store.release(held.worker, [held.lease]), { leases: 1, back: 1, ended: 1 })
      assert.deepInclude(yield* stateOf(held.ids[0]!), { place: "finished", status: "cancelled", attempt: 0 })
      assert.strictEqual(yield* value("select count(*)::int4 from pgqueue.unique_key"), 1)
    }))
  )

  it.effect(
    "the beat lists the jobs of the worker that are marked as cancelled",
    rule(Effect.gen(function*() {
      const held = yield* claimed(jobs(2))
      yield* query(cancelMark(held.ids[1]!))
      const heard = yield* beat(held.worker)
      assert.deepStrictEqual(heard.cancelled, [held.ids[1]!])
    }))
  )

  it.effect(
    "goes on with whatever columns somebody, or a later version, has added to the jobs",
    rule(Effect.gen(function*() {
      const added = [
        "status",
        "tag",
        "result",
        "error",
        "reason",
        "message",
        "lease",
        "worker",
        "now",
        "failure",
        "verb",
        "ran",
        "mine"
      ]
      const { store } = yield* Storage
      yield* query(`alter table pgqueue.job ${added.map((name) => `add column ${name} text`).join(", ")}`)
      yield* Effect.gen(function*() {
        const all = jobs(4)
        const held = yield* claimed(all)
        const ids = all.map(({ id }) => id)
        yield* store.settle(held.worker, [entry(held.lease, ids[0]!, "failed", { delay: 60_000, failure })])
        yield* store.settle(held.worker, [entry(held.lease, ids[1]!, "completed", { result: "1" })])
        yield* store.settle(held.worker, [{ ...entry(held.lease, ids[2]!, "completed"), forget: true }])
        yield* bury(held.worker)
        const { back } = yield* store.rescue(10)
        assert.strictEqual(back, 1)
        assert.strictEqual(yield* finishedCount, 1)
        assert.strictEqual(yield* leases, 0)
      }).pipe(
        Effect.ensuring(
          Effect.orDie(query(`alter table pgqueue.job ${added.map((name) => `drop column ${name}`).join(", ")}`))
        )
      )
    }))
  )
})
