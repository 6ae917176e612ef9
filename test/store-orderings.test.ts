/**
 * Everything that can happen to one job, two at a time and in both orders: the first holds its transaction open while the
 * second begins, and commits when the second waits for it or has passed it by.
 */
import { assert, layer } from "@effect/vitest"
import { Deferred, Effect, Fiber, Layer, Option } from "effect"
import { SqlClient, type SqlError } from "effect/sql"
import { Admin, JobQueue } from "../src/index.ts"
import * as Store from "../src/Store.ts"
import {
  beat,
  claim,
  claimed,
  entry,
  failure,
  keyed,
  query,
  rule,
  session,
  Storage,
  untilBlocked,
  value
} from "./support/storage.ts"

type Verb = "complete" | "fail" | "snooze" | "cancel" | "rescue" | "beat" | "retry" | "delete"

/** One job, and the lease under which it is or was claimed. */
interface Subject {
  readonly worker: string
  readonly lease: string
  readonly id: string
}

// ---------------------------------------------------------------------------
// What each verb answers, in words
// ---------------------------------------------------------------------------

const settling = (store: Store.Store, { id, lease, worker }: Subject, verb: "completed" | "failed" | "snoozed") =>
  Effect.map(
    store.settle(worker, [
      entry(lease, id, verb, { delay: 60_000, result: "1", ...verb === "failed" ? { failure } : {} })
    ]),
    // Who completes as asked is not answered.
    ([answer]) => answer === undefined ? "completed" : answer.state === "done" ? answer.status ?? "back" : answer.state
  )

const rescuing = (store: Store.Store) =>
  Effect.gen(function*() {
    const dead = (yield* store.reapWorkers()).length
    const { back, ended } = yield* store.rescue(10)
    return `${dead} dead, ${back} back, ${ended} ended`
  })

const told = ({ alive, cancelled, leases }: Store.Beat, { id, lease }: Subject) =>
  !alive
    ? "dead"
    : ["alive", ...leases.some((one) => one.id === lease) ? ["holds"] : [], ...cancelled.includes(id) ? ["told"] : []]
      .join(" ")

/** Through what an application calls. */
const acting = (verb: "cancel" | "retry" | "delete", { id }: Subject) =>
  (verb === "cancel"
    ? Admin.cancel(id, { reason: "enough" })
    : Effect.as(verb === "retry" ? Admin.retry(id) : Admin.delete(id), verb)).pipe(
      Effect.map(String),
      Effect.catchTag("Stale", (stale) => {
        assert.deepInclude(stale, { id, operation: verb })
        return Effect.succeed(`stale: ${Option.getOrElse(stale.status, () => "nowhere")}`)
      })
    )

const settleVerbs = { complete: "completed", fail: "failed", snooze: "snoozed" } as const

/** Everything stored of jobs, with the transaction that wrote each row: who changes nothing leaves all of it alone. */
const storedText = `select json_build_object(${
  ["job", "ready", "lease", "finished", "attempt", "unique_key"].map((table) =>
    `'${table}', (select json_agg(t order by t::text) from (select xmin::text, * from pgqueue.${table}) t)`
  ).join(", ")
})::text as stored`

/** Where the job is in the end, and that it ended once at most. */
const endOf = ({ id }: Subject) =>
  value<string>(
    `select coalesce(string_agg(end_of, ' and '), 'nowhere') from (
      select f.status as end_of from pgqueue.finished f where f.id = $1::uuid
      union all select 'line ' || r.attempt || ' of ' || j.max_attempts from pgqueue.ready r join pgqueue.job j using (id) where id = $1::uuid
      union all select 'lease' || case when j.cancelled_at is null then '' else ', cancelled' end
        from pgqueue.lease l join pgqueue.job j on j.id = any (l.ids) where j.id = $1::uuid
    ) e`,
    [id]
  )

// ---------------------------------------------------------------------------
// The first one, in an open transaction
// ---------------------------------------------------------------------------

/** Does the first thing and returns how to commit it, with what is stored then. */
const begin = Effect.fnUntraced(function*(verb: Verb, subject: Subject) {
  if (verb === "cancel" || verb === "retry" || verb === "delete") {
    const sql = yield* SqlClient.SqlClient
    const acted = yield* Deferred.make<readonly [string, string], SqlError.SqlError>()
    const go = yield* Deferred.make<void>()
    const fiber = yield* Effect.forkChild(
      sql.withTransaction(Effect.gen(function*() {
        const answer = yield* acting(verb, subject)
        const [row] = yield* sql.unsafe<{ stored: string }>(storedText)
        yield* Deferred.succeed(acted, [answer, row!.stored])
        yield* Deferred.await(go)
      })),
      { startImmediately: true }
    )
    const [answer, stored] = yield* Effect.raceFirst(
      Deferred.await(acted),
      Effect.andThen(Fiber.join(fiber), Effect.never)
    )
    return { answer, stored, commit: Effect.andThen(Deferred.succeed(go, undefined), Fiber.join(fiber)) }
  }
  const mine = yield* session
  yield* mine.query("begin")
  const answer = verb === "rescue"
    ? yield* rescuing(mine.store)
    : verb === "beat"
    // Sound: these are the columns of the text.
    ? told(Store.readBeat((yield* mine.query(mine.store.beatText, [subject.worker])) as any), subject)
    : yield* settling(mine.store, subject, settleVerbs[verb])
  const [row] = yield* mine.query(storedText)
  return { answer, stored: String((row as any).stored), commit: mine.query("commit") }
})

/** Does the second thing. */
const act = (verb: Verb, subject: Subject) =>
  Effect.gen(function*() {
    const { store } = yield* Storage
    switch (verb) {
      case "cancel":
      case "retry":
      case "delete":
        return yield* acting(verb, subject)
      case "rescue":
        return yield* rescuing(store)
      case "beat":
        return told(yield* beat(subject.worker), subject)
      default:
        return yield* settling(store, subject, settleVerbs[verb])
    }
  })

/** Starts an effect, and tells whether it has answered or waits for a lock. */
const startedOrWaiting = Effect.fnUntraced(function*<A, E, R>(effect: Effect.Effect<A, E, R>) {
  const fiber = yield* Effect.forkChild(effect, { startImmediately: true })
  const waits = yield* Effect.raceFirst(
    Effect.as(Fiber.await(fiber), false),
    Effect.as(untilBlocked(), true)
  )
  return { fiber, waits }
})

// ---------------------------------------------------------------------------
// The pairs
// ---------------------------------------------------------------------------

interface Pair {
  /** What the second answers: after `waits`, when it waited for the first; again, when it comes again by itself. */
  readonly answers: string
  /** What has become of the job. */
  readonly end: string
}

const pair = (answers: string, end: string): Pair => ({ answers, end })

/** Of a job that is held. The worker is overdue where somebody rescues, and what is cancelled is only marked. */
const pairs: Record<Verb, Record<Verb, Pair>> = {
  complete: {
    complete: pair("waits, gone", "completed"),
    fail: pair("waits, gone", "completed"),
    snooze: pair("waits, gone", "completed"),
    cancel: pair("waits, stale: completed", "completed"),
    // Its worker is dead, and what it reports counts until somebody takes the lease.
    rescue: pair("1 dead, 0 back, 0 ended; 0 dead, 0 back, 0 ended", "completed"),
    beat: pair("alive holds; alive", "completed"),
    retry: pair("stale: running", "completed"),
    delete: pair("stale: running", "completed")
  },
  fail: {
    complete: pair("waits, gone", "line 1 of 3"),
    fail: pair("waits, gone", "line 1 of 3"),
    snooze: pair("waits, gone", "line 1 of 3"),
    cancel: pair("waits, cancelled", "cancelled"),
    rescue: pair("1 dead, 0 back, 0 ended; 0 dead, 0 back, 0 ended", "line 1 of 3"),
    beat: pair("alive holds; alive", "line 1 of 3"),
    retry: pair("stale: running", "line 1 of 3"),
    delete: pair("stale: running", "line 1 of 3")
  },
  snooze: {
    complete: pair("waits, gone", "line 0 of 3"),
    fail: pair("waits, gone", "line 0 of 3"),
    snooze: pair("waits, gone", "line 0 of 3"),
    cancel: pair("waits, cancelled", "cancelled"),
    rescue: pair("1 dead, 0 back, 0 ended; 0 dead, 0 back, 0 ended", "line 0 of 3"),
    beat: pair("alive holds; alive", "line 0 of 3"),
    retry: pair("stale: running", "line 0 of 3"),
    delete: pair("stale: running", "line 0 of 3")
  },
  cancel: {
    complete: pair("busy; completed", "completed"),
    fail: pair("busy; cancelled", "cancelled"),
    snooze: pair("busy; cancelled", "cancelled"),
    cancel: pair("waits, cancelling", "lease, cancelled"),
    rescue: pair("1 dead, 0 back, 0 ended; 0 dead, 0 back, 1 ended", "cancelled"),
    beat: pair("alive holds; alive holds told", "lease, cancelled"),
    retry: pair("stale: running", "lease, cancelled"),
    delete: pair("stale: running", "lease, cancelled")
  },
  rescue: {
    complete: pair("waits, gone", "line 0 of 3"),
    fail: pair("waits, gone", "line 0 of 3"),
    snooze: pair("waits, gone", "line 0 of 3"),
    cancel: pair("waits, cancelled", "cancelled"),
    rescue: pair("0 dead, 0 back, 0 ended; 0 dead, 0 back, 0 ended", "line 0 of 3"),
    beat: pair("waits, dead; dead", "line 0 of 3"),
    retry: pair("stale: running", "line 0 of 3"),
    delete: pair("stale: running", "line 0 of 3")
  },
  beat: {
    complete: pair("completed", "completed"),
    fail: pair("back", "line 1 of 3"),
    snooze: pair("back", "line 0 of 3"),
    cancel: pair("cancelling", "lease, cancelled"),
    // It was overdue, and has been heard in time.
    rescue: pair("0 dead, 0 back, 0 ended; 0 dead, 0 back, 0 ended", "lease"),
    beat: pair("waits, alive holds; alive holds", "lease"),
    retry: pair("stale: running", "lease"),
    delete: pair("stale: running", "lease")
  },
  // Of a job that was discarded, under the lease that it had.
  retry: {
    complete: pair("gone", "line 0 of 3"),
    fail: pair("gone", "line 0 of 3"),
    snooze: pair("gone", "line 0 of 3"),
    cancel: pair("stale: discarded", "line 0 of 3"),
    rescue: pair("1 dead, 0 back, 0 ended; 0 dead, 0 back, 0 ended", "line 0 of 3"),
    beat: pair("alive; alive", "line 0 of 3"),
    retry: pair("waits, stale: available", "line 0 of 3"),
    delete: pair("waits, stale: available", "line 0 of 3")
  },
  delete: {
    complete: pair("gone", "nowhere"),
    fail: pair("gone", "nowhere"),
    snooze: pair("gone", "nowhere"),
    cancel: pair("stale: discarded", "nowhere"),
    rescue: pair("1 dead, 0 back, 0 ended; 0 dead, 0 back, 0 ended", "nowhere"),
    beat: pair("alive; alive", "nowhere"),
    retry: pair("waits, stale: nowhere", "nowhere"),
    delete: pair("waits, stale: nowhere", "nowhere")
  }
}

const answersOfFirst: Record<Verb, string> = {
  complete: "completed",
  fail: "back",
  snooze: "back",
  cancel: "cancelling",
  rescue: "1 dead, 1 back, 0 ended",
  beat: "alive holds",
  retry: "retry",
  delete: "delete"
}

/** Answers of those who have come too late, or have nothing to say about the job: not a row has changed. */
const changesNothing = (answers: string) =>
  /gone$|stale: |dead, 0 back, 0 ended$|^waits, cancelling$|alive|dead$/.test(answers)

/** Overdue, by what its beat would change: the start of the server counts as one. */
const overdue = (worker: string) =>
  query(
    `update pgqueue.worker set beat_at = '1999-12-31',
      lease_ms = (extract(epoch from clock_timestamp() - pg_postmaster_start_time()) * 1000)::int8 - 1 where id = $1::uuid`,
    [worker]
  )

/** A job that is held; or one that was, for those who need one that has ended. */
const prepare = Effect.fnUntraced(function*(first: Verb, second: Verb) {
  const { store } = yield* Storage
  const held = yield* claimed([keyed("key", { maxAttempts: 3 })])
  let subject: Subject = { ...held, id: held.ids[0]! }
  if (first === "retry" || first === "delete") {
    yield* store.settle(held.worker, [entry(held.lease, subject.id, "failed", { delay: 0, failure })])
    const again = yield* claim(held.worker)
    subject = { ...subject, lease: again.lease }
    yield* store.settle(held.worker, [entry(again.lease, subject.id, "failed", { failure })])
  }
  if (first === "rescue" || second === "rescue") yield* overdue(subject.worker)
  return subject
})

layer(Layer.provideMerge(JobQueue.layer(), Storage.layer), { excludeTestServices: true })("orderings", (it) => {
  for (const first of Object.keys(pairs) as Array<Verb>) {
    for (const second of Object.keys(pairs) as Array<Verb>) {
      const { answers, end } = pairs[first][second]
      it.effect(
        `${first}, and ${second} before it has committed: ${answers}`,
        rule(Effect.gen(function*() {
          const subject = yield* prepare(first, second)
          const ahead = yield* begin(first, subject)
          assert.strictEqual(ahead.answer, answersOfFirst[first])
          const { fiber, waits } = yield* startedOrWaiting(act(second, subject))
          const passed = waits ? "waits" : yield* Fiber.join(fiber)
          yield* ahead.commit
          const heard = [waits ? `waits, ${yield* Fiber.join(fiber)}` : passed]
          // Its caller comes again: a settle that found a row busy, and what every process does from time to time.
          if (passed === "busy" || second === "rescue" || second === "beat") heard.push(yield* act(second, subject))
          assert.strictEqual(heard.join("; "), answers)
          assert.strictEqual(yield* endOf(subject), end)
          const ended = yield* value<number>("select count(*)::int4 from pgqueue.finished")
          assert.strictEqual(ended, /^(completed|cancelled)$/.test(end) ? 1 : 0)
          if (changesNothing(answers)) {
            assert.deepStrictEqual(JSON.parse(yield* value<string>(storedText)), JSON.parse(ahead.stored))
          }
        }))
      )
    }
  }
})
