/**
 * Random sequences of everything that can be done to the storage, each answer and all that is stored held against the
 * model in `support/model.ts`. `MODEL_RUNS` says how many sequences, `MODEL_SEED` repeats those of an earlier run.
 */
import { assert, it } from "@effect/vitest"
import { Duration, Effect } from "effect"
import * as fc from "fast-check"
import type { Verb } from "../src/Settlement.ts"
import * as Store from "../src/Store.ts"
import { insertKeyed } from "../src/UniqueKeys.ts"
import * as Model from "./support/model.ts"
import {
  claimOptions,
  entry,
  failure,
  job as jobOf,
  makeDue,
  misplaced,
  query,
  silence,
  Storage,
  storageLayer,
  tables
} from "./support/storage.ts"

const runs = Number(process.env["MODEL_RUNS"] ?? 150)
const seed = Number(process.env["MODEL_SEED"] ?? Math.floor(Math.random() * 2 ** 31))
/** Sequences run side by side, each of these on a database of its own. */
const databases = 2

// ---------------------------------------------------------------------------
// Commands: plain data, so that a failing sequence can be printed and shrunk
// ---------------------------------------------------------------------------

/** Which of the things that there are, or ever were: resolved when the command runs. */
type Pick = number

interface JobData {
  /** The id of a job that there has been already, for one of several. */
  readonly repeat: Pick | null
  readonly kind: string
  readonly queue: string
  readonly priority: number
  readonly delayed: boolean
  readonly maxAttempts: number
  readonly awaited: boolean
}

interface EntryData {
  readonly claim: Pick
  readonly verb: Verb
  readonly delay: "none" | "now" | "later"
  readonly reason: string | null
}

type Command =
  | { readonly do: "insert"; readonly jobs: ReadonlyArray<JobData> }
  | { readonly do: "insertKeyed"; readonly job: JobData; readonly rule: Omit<Model.ModelRule, "idGiven"> }
  | { readonly do: "register"; readonly kind: number }
  | { readonly do: "claim"; readonly worker: Pick; readonly queue: string; readonly limit: number }
  | { readonly do: "beat" | "silence" | "unregister"; readonly worker: Pick }
  | { readonly do: "reap" | "makeDue" | "expirePeriods" }
  | { readonly do: "settle"; readonly entries: ReadonlyArray<EntryData> }
  | { readonly do: "release"; readonly worker: Pick | null; readonly claims: ReadonlyArray<Pick> }
  | { readonly do: "rescue"; readonly limit: number }
  | { readonly do: "cancel"; readonly job: Pick; readonly reason: string | null }
  | { readonly do: "retry"; readonly jobs: ReadonlyArray<Pick>; readonly status: string | null }
  | { readonly do: "erase" | "awaits" | "look"; readonly job: Pick }
  | { readonly do: "detach" | "progress"; readonly claim: Pick }
  | { readonly do: "park"; readonly limit: number }
  | { readonly do: "unpark"; readonly worker: Pick; readonly limit: number }
  | { readonly do: "audit"; readonly after: Pick | null; readonly limit: number }
  | { readonly do: "lose"; readonly job: Pick }

const pick = fc.nat({ max: 9999 })
const oneOf = <const A>(...values: ReadonlyArray<A>) => fc.constantFrom(...values)
const maybe = <A>(arbitrary: fc.Arbitrary<A>) => fc.option(arbitrary, { freq: 2 })
const list = <A>(arbitrary: fc.Arbitrary<A>, maxLength: number) =>
  fc.array(arbitrary, { minLength: 1, maxLength, size: "max" })
const limit = oneOf(1, 2, 5)

const jobData = fc.record<JobData>({
  repeat: fc.oneof({ weight: 5, arbitrary: fc.constant(null) }, { weight: 1, arbitrary: pick }),
  kind: oneOf("k", "k", "k", "k", "r:1", "x"),
  queue: oneOf("a", "a", "a", "b"),
  priority: oneOf(2, 5, 5),
  delayed: oneOf(false, false, false, true),
  maxAttempts: oneOf(1, 2, 3),
  awaited: oneOf(false, false, true)
})

const entryData = fc.record<EntryData>({
  claim: pick,
  verb: oneOf(
    "completed",
    "completed",
    "failed",
    "failed",
    "failed",
    "snoozed",
    "cancelled",
    "discarded",
    "released",
    "lost"
  ),
  delay: oneOf("none", "now", "now", "later"),
  reason: maybe(fc.constant("asked"))
})

const command: fc.Arbitrary<Command> = fc.oneof(
  { weight: 8, arbitrary: fc.record({ do: fc.constant("insert" as const), jobs: list(jobData, 3) }) },
  {
    weight: 5,
    arbitrary: fc.record({
      do: fc.constant("insertKeyed" as const),
      job: jobData,
      rule: fc.record({
        key: oneOf("one", "two"),
        until: oneOf("finished", "finished", "started"),
        period: oneOf(false, false, true),
        onConflict: oneOf("keep", "keep", "replace", "debounce")
      })
    })
  },
  { weight: 3, arbitrary: fc.record({ do: fc.constant("register" as const), kind: fc.nat({ max: 2 }) }) },
  {
    weight: 18,
    arbitrary: fc.record({ do: fc.constant("claim" as const), worker: pick, queue: oneOf("a", "a", "a", "b"), limit })
  },
  { weight: 3, arbitrary: fc.record({ do: fc.constant("beat" as const), worker: pick }) },
  { weight: 2, arbitrary: fc.record({ do: oneOf("silence", "silence", "unregister"), worker: pick }) },
  { weight: 3, arbitrary: fc.record({ do: fc.constant("reap" as const) }) },
  { weight: 4, arbitrary: fc.record({ do: fc.constant("makeDue" as const) }) },
  { weight: 1, arbitrary: fc.record({ do: fc.constant("expirePeriods" as const) }) },
  { weight: 14, arbitrary: fc.record({ do: fc.constant("settle" as const), entries: list(entryData, 3) }) },
  {
    weight: 3,
    arbitrary: fc.record({ do: fc.constant("release" as const), worker: maybe(pick), claims: list(pick, 2) })
  },
  { weight: 6, arbitrary: fc.record({ do: fc.constant("rescue" as const), limit }) },
  {
    weight: 5,
    arbitrary: fc.record({ do: fc.constant("cancel" as const), job: pick, reason: maybe(fc.constant("enough")) })
  },
  {
    weight: 5,
    arbitrary: fc.record({
      do: fc.constant("retry" as const),
      jobs: list(pick, 3),
      status: maybe(oneOf("discarded", "completed"))
    })
  },
  { weight: 3, arbitrary: fc.record({ do: oneOf("erase", "awaits", "look"), job: pick }) },
  { weight: 5, arbitrary: fc.record({ do: oneOf("detach", "progress"), claim: pick }) },
  { weight: 4, arbitrary: fc.record({ do: fc.constant("park" as const), limit }) },
  { weight: 3, arbitrary: fc.record({ do: fc.constant("unpark" as const), worker: pick, limit }) },
  { weight: 2, arbitrary: fc.record({ do: fc.constant("audit" as const), after: maybe(pick), limit: oneOf(2, 100) }) },
  { weight: 1, arbitrary: fc.record({ do: fc.constant("lose" as const), job: pick }) }
)

const sequence = fc.record({
  // Somebody who works, and something to do.
  jobs: fc.array(jobData, { maxLength: 4, size: "max" }),
  commands: fc.array(command, { minLength: 5, maxLength: 50, size: "max" })
})

const workerKinds: ReadonlyArray<Model.WorkerKind> = [
  { queues: ["a"], kinds: ["k"], prefixes: [] },
  { queues: ["a"], kinds: ["k"], prefixes: ["r:"] },
  { queues: ["a", "b"], kinds: ["k", "x"], prefixes: [] }
]
const lanes = [2, 5, 100 + 2, 100 + 5]

// ---------------------------------------------------------------------------
// What is stored, and what the model says is stored
// ---------------------------------------------------------------------------

const storedText = `select json_build_object(
  'jobs', (select json_agg(json_build_array(j.id, coalesce(l.id::text, case when r.id is null then 'nowhere' end, 'lane ' || r.lane),
      r.run_at > clock_timestamp(), j.kind, j.queue, j.priority, j.attempt, j.max_attempts, j.rescued, j.snoozed,
      j.cancelled_at is not null, j.cancel_reason, encode(j.unique_key, 'hex'), j.awaited, j.progress::text, a.all) order by j.id)
    from pgqueue.job j left join pgqueue.ready r on r.id = j.id left join pgqueue.lease l on j.id = any (l.ids)
    left join lateral (select string_agg(n || ' ' || tag, ', ' order by id) as all from pgqueue.attempt a where a.job = j.id) a on true),
  'ends', (select json_agg(json_build_array(f.id, f.status, f.reason, f.result::text, f.error ->> 'tag', f.kind, f.queue, f.attempt, f.max_attempts,
      f.rescued, f.snoozed, f.progress::text, a.all) order by f.id)
    from pgqueue.finished f
    left join lateral (select string_agg(n || ' ' || tag, ', ' order by id) as all from pgqueue.attempt a where a.job = f.id) a on true),
  'line', (select json_agg(id order by queue, lane, run_at, id) from pgqueue.ready where run_at <= clock_timestamp()),
  'keys', (select json_agg(json_build_array(encode(key, 'hex'), job, until,
      case when expires_at is null then 'never' when expires_at > clock_timestamp() then 'later' else 'past' end) order by key)
    from pgqueue.unique_key),
  'leases', (select json_agg(json_build_array(id, worker, (select json_agg(u.id order by u.id) from unnest(ids) as u(id))) order by id)
    from pgqueue.lease),
  'workers', (select json_agg(id order by id) from pgqueue.worker),
  'parked', (select json_agg(queue || ' ' || kind order by queue, kind) from pgqueue.parked),
  'stray', (select json_agg(a.id) from pgqueue.attempt a where not exists (select 1 from pgqueue.job j where j.id = a.job)
    and not exists (select 1 from pgqueue.finished f where f.id = a.job))
)::text as stored`

const sorted = <A>(all: Iterable<A>, by: (one: A) => string) =>
  [...all].toSorted((a, b) => by(a) < by(b) ? -1 : by(a) > by(b) ? 1 : 0)

/** An empty list reads as `null`. */
const listOrNull = <A>(all: ReadonlyArray<A>) => all.length === 0 ? null : all

const expected = (model: Model.Model) => {
  const attempts = (id: string) => Model.attemptsOf(model, id).map(({ n, tag }) => `${n} ${tag}`).join(", ") || null
  return {
    jobs: listOrNull(
      sorted(model.jobs.values(), ({ id }) => id).map((job) => [
        job.id,
        job.place.at === "lease" ? job.place.lease : `lane ${Model.laneOf(job)}`,
        job.place.at === "lease" ? null : job.due > model.now,
        job.kind,
        job.queue,
        job.priority,
        job.attempt,
        job.maxAttempts,
        job.rescued,
        job.snoozed,
        job.cancelled,
        job.reason ?? null,
        job.key ?? null,
        job.awaited,
        job.progress ?? null,
        attempts(job.id)
      ])
    ),
    ends: listOrNull(
      sorted(model.ends.values(), ({ job }) => job.id).map(({ job, reason, result, status, tag }) => [
        job.id,
        status,
        reason ?? null,
        result ?? null,
        tag ?? null,
        job.kind,
        job.queue,
        job.attempt,
        job.maxAttempts,
        job.rescued,
        job.snoozed,
        job.progress ?? null,
        attempts(job.id)
      ])
    ),
    line: listOrNull(Model.lineOf(model).map(({ id }) => id)),
    keys: listOrNull(
      sorted(model.keys, ([key]) => key).map(([key, { expires, job, until }]) => [key, job, until, expires])
    ),
    leases: listOrNull(sorted(model.leases, ([id]) => id).map(([id, { ids, worker }]) => [id, worker, ids.toSorted()])),
    workers: listOrNull([...model.workers.keys()].toSorted()),
    parked: listOrNull([...model.parked].toSorted()),
    stray: null
  }
}

const assertStored = Effect.fnUntraced(function*(model: Model.Model, after: string) {
  const { sql } = yield* Storage
  // On the application's client, whose sessions keep the plan.
  const [row] = yield* sql.unsafe<{ stored: string }>(storedText)
  const wanted = JSON.stringify(expected(model))
  // Cheap when they are the same, and readable when they are not.
  if (JSON.stringify(JSON.parse(row!.stored)) !== wanted) {
    assert.deepStrictEqual(JSON.parse(row!.stored), JSON.parse(wanted), `stored after ${after}`)
  }
})

/** A job that was keyed until it started, or for a period, may have lost its key and be right; nothing else may be wrong. */
const assertAllInPlace = Effect.fnUntraced(function*(model: Model.Model) {
  const free = [...model.jobs.values()].filter(({ key }) => key !== undefined && !model.keys.has(key))
  assert.deepStrictEqual(
    sorted(yield* misplaced, ({ id }) => id),
    sorted(free, ({ id }) => id).map(({ id }) => ({ problem: "a job without its key", id }))
  )
})

const assertStats = Effect.fnUntraced(function*(model: Model.Model) {
  const { store } = yield* Storage
  const all = [...model.jobs.values(), ...[...model.ends.values()].map(({ job }) => job)]
  const groups = Map.groupBy(all, ({ kind, queue }) => `${queue} ${kind}`)
  const wanted = sorted(groups, ([name]) => name).map(([name, jobs]) => {
    const [queue, kind] = name.split(" ") as [string, string]
    const count = (status: string) => jobs.filter(({ id }) => Model.statusOf(model, id) === status).length
    return {
      queue,
      kind,
      available: count("available"),
      scheduled: count("scheduled"),
      retryable: count("retryable"),
      running: count("running"),
      completed: count("completed"),
      cancelled: count("cancelled"),
      discarded: count("discarded"),
      lag: 0,
      handled: [...model.workers.values()].some((worker) => Model.lists(worker, queue, kind))
    }
  })
  assert.deepStrictEqual((yield* store.stats(false)).map((row) => ({ ...row, lag: 0 })), wanted)
})

// ---------------------------------------------------------------------------
// Running a command against both
// ---------------------------------------------------------------------------

const emptyText = `with ${
  tables.map((table) => `${table}_ as (delete from pgqueue.${table})`).join(", ")
} select 1 as done`

/** A random back-off, which may be over by now: what the model says is later is moved out of reach of any machine. */
const holdBack = (model: Model.Model) =>
  query(
    `with early as (
      delete from pgqueue.ready where id = any ($1::uuid[]) and run_at < clock_timestamp() + interval '1 hour' returning *
    ), late as (
      insert into pgqueue.ready (queue, lane, run_at, id, kind, attempt)
      select queue, lane, clock_timestamp() + interval '1 day', id, kind, attempt from early returning id, run_at
    )
    update pgqueue.job j set run_at = late.run_at from late where late.id = j.id`,
    [
      [...model.jobs.values()].filter(({ due, place }) => place.at === "line" && due === Model.later).map(({ id }) =>
        id
      )
    ]
  )

const day = 86_400_000

/** What has been done, over all sequences: stale actions have to be as frequent as others. */
const done = { sequences: 0, commands: 0, claimed: 0, settled: 0, acted: 0, stale: 0 }

const runSequence = Effect.fnUntraced(function*(
  { commands, jobs }: { readonly jobs: ReadonlyArray<JobData>; readonly commands: ReadonlyArray<Command> }
) {
  const { store } = yield* Storage
  const model = Model.make()
  // Ids in the order in which they are made, whatever the clock says.
  let count = 0
  const uuid = () => `00000000-0000-7000-8000-${String(++count).padStart(12, "0")}`
  // Everything that there has ever been, so that much of what is picked is stale.
  const ids: Array<string> = []
  const workers: Array<string> = []
  const claims: Array<{ readonly lease: string; readonly id: string }> = []
  const isCurrent = ({ id, lease }: { readonly lease: string; readonly id: string }) =>
    model.leases.get(lease)?.ids.includes(id) === true

  /** One of those that are as they should be two times out of three, and one of all the others. */
  const choose = <A>(all: ReadonlyArray<A>, current: (one: A) => boolean, pick: Pick): A | undefined => {
    const fit = all.filter(current)
    const from = pick % 3 !== 0 && fit.length > 0 ? fit : all
    const chosen = from[Math.floor(pick / 3) % from.length]
    if (chosen !== undefined) {
      done.acted++
      if (!current(chosen)) done.stale++
    }
    return chosen
  }
  const chooseWorker = (pick: Pick) => choose(workers, (id) => model.workers.get(id)?.overdue === false, pick)
  const chooseClaim = (pick: Pick) => choose(claims, isCurrent, pick)
  const chooseJob = (pick: Pick, current: (id: string) => boolean) => choose(ids, current, pick)

  const same = (actual: unknown, wanted: unknown, what: Command) =>
    assert.deepStrictEqual(actual, wanted, `the answer of ${JSON.stringify(what)}`)

  const newJob = ({ repeat, ...data }: JobData) => {
    const old = repeat === null ? undefined : ids[repeat % ids.length]
    const id = old ?? uuid()
    if (old === undefined) ids.push(id)
    const { awaited, delayed, kind, maxAttempts, priority, queue } = data
    return {
      forModel: { ...data, id },
      forStore: jobOf({ id, kind, queue, priority, maxAttempts, awaited, delay: delayed ? day : 0 }),
      given: old !== undefined
    }
  }

  const register = Effect.fnUntraced(function*(kind: number) {
    const id = uuid()
    workers.push(id)
    yield* store.register({ id, name: "model", lease: 1e12, ...workerKinds[kind]! })
    Model.register(model, id, workerKinds[kind]!)
  })

  const run = Effect.fnUntraced(function*(command: Command) {
    switch (command.do) {
      case "insert": {
        const jobs = command.jobs.map(newJob)
        const inserted = yield* store.insert(jobs.map(({ forStore }) => forStore), false)
        const wanted = Model.insert(model, jobs.map(({ forModel }) => forModel))
        return same([...inserted].toSorted(), wanted.toSorted(), command)
      }
      case "insertKeyed": {
        const { forModel, forStore, given } = newJob(command.job)
        const { key, onConflict, period, until } = command.rule
        const unique = { key, onConflict, until, period: period ? day : undefined }
        const manner = { inUserTransaction: false, patience: undefined }
        const enqueued = yield* insertKeyed(store, [{ ...forStore, unique, idGiven: given }], manner)
        return same(enqueued, [Model.insertKeyed(model, forModel, { ...command.rule, idGiven: given })], command)
      }
      case "register":
        return yield* register(command.kind)
      case "claim": {
        const worker = chooseWorker(command.worker)!
        const lease = uuid()
        const kinds = model.workers.get(worker) ?? workerKinds[2]!
        const { limit, queue } = command
        const rows = yield* store.claim(
          claimOptions(worker, { ...kinds, lease, queue, limit, lanes: lanes.map(Store.laneStart) })
        )
        const got = rows.map((row) => ({
          id: row.id,
          lane: row.lane,
          kind: row.kind,
          priority: row.priority,
          attempt: row.attempt,
          max_attempts: row.max_attempts,
          rescued: row.rescued,
          progress: row.progress,
          history: (JSON.parse(row.history ?? "[]") as ReadonlyArray<Model.Attempt>).map(({ n, tag }) => ({ n, tag }))
        }))
        same(got, Model.claim(model, { worker, lease, queue, limit, lanes }), command)
        claims.push(...got.map(({ id }) => ({ lease, id })))
        done.claimed += got.length
        return
      }
      case "beat": {
        const worker = chooseWorker(command.worker)!
        const rows = yield* query<{ what: string; id: string; age: number }>(store.beatText, [worker])
        const { alive, cancelled, leases } = Store.readBeat(rows)
        const got = { alive, leases: leases.map(({ id }) => id).toSorted(), cancelled: cancelled.toSorted() }
        return same(got, Model.beat(model, worker), command)
      }
      case "silence": {
        const worker = chooseWorker(command.worker)!
        yield* silence(worker)
        return Model.silence(model, worker)
      }
      case "unregister": {
        const worker = chooseWorker(command.worker)!
        yield* store.unregister(worker)
        model.workers.delete(worker)
        return
      }
      case "reap":
        return same((yield* store.reapWorkers()).map(({ id }) => id).toSorted(), Model.reap(model), command)
      case "makeDue":
        yield* makeDue
        return Model.makeDue(model)
      case "expirePeriods":
        yield* query("update pgqueue.unique_key set expires_at = clock_timestamp() where expires_at is not null")
        return Model.expirePeriods(model)
      case "settle": {
        const entries = command.entries.flatMap((data) => {
          const chosen = chooseClaim(data.claim)
          if (chosen === undefined) return []
          if (isCurrent(chosen)) done.settled++
          const { delay, verb } = data
          const result = verb === "completed" ? "7" : undefined
          const reason = data.reason ?? undefined
          const failed = verb === "failed" ? failure : verb === "lost" ? { ...failure, tag: "Lost" } : undefined
          return {
            forStore: entry(chosen.lease, chosen.id, verb, {
              result,
              reason,
              delay: delay === "none" ? undefined : delay === "now" ? 0 : day,
              failure: failed
            }),
            forModel: { ...chosen, verb, delay, result, reason, tag: failed?.tag }
          }
        })
        const answers = yield* store.settle(workers[0]!, entries.map(({ forStore }) => forStore))
        const wanted = Model.settle(model, entries.map(({ forModel }) => forModel))
        const by = ({ id, lease }: { readonly lease: string; readonly id: string }) => lease + id
        return same(sorted(answers, by), sorted(wanted, by), command)
      }
      case "release": {
        const leases = command.claims.flatMap((pick) => chooseClaim(pick)?.lease ?? [])
        // Most often the worker whose leases they are.
        const owner = leases.map((lease) => model.leases.get(lease)?.worker).find((worker) => worker !== undefined)
        const worker = command.worker === null ? owner ?? workers[0]! : chooseWorker(command.worker)!
        const { awaited, ...taken } = yield* store.release(worker, leases)
        return same({ ...taken, awaited: awaited.toSorted() }, Model.release(model, worker, leases), command)
      }
      case "rescue": {
        const { awaited, ...taken } = yield* store.rescue(command.limit)
        return same({ ...taken, awaited: awaited.toSorted() }, Model.rescue(model, command.limit), command)
      }
      case "cancel": {
        const id = chooseJob(command.job, (id) => model.jobs.has(id))
        if (id === undefined) return
        const answer = yield* store.cancel(id, command.reason ?? "", false)
        return same(answer, Model.cancel(model, id, command.reason ?? undefined), command)
      }
      case "retry": {
        const chosen = command.jobs.flatMap((pick) => chooseJob(pick, (id) => model.ends.has(id)) ?? [])
        const status = command.status ?? undefined
        return same(yield* store.retry(chosen, status, false), Model.retry(model, chosen, status), command)
      }
      case "erase": {
        const id = chooseJob(command.job, (id) => model.ends.has(id))
        if (id === undefined) return
        return same(yield* store.erase(id, false), Model.erase(model, id), command)
      }
      case "awaits": {
        const id = chooseJob(command.job, (id) => model.jobs.has(id))
        if (id === undefined) return
        yield* store.awaits(id)
        return Model.awaits(model, id)
      }
      case "look": {
        const id = chooseJob(command.job, (id) => model.jobs.has(id))
        if (id === undefined) return
        const ended = model.ends.get(id)
        const row = yield* store.inspect(id, false)
        same(row?.status, Model.statusOf(model, id), command)
        same(row?.reason ?? undefined, ended === undefined ? model.jobs.get(id)?.reason : ended.reason, command)
        same(row?.cancelling ?? false, model.jobs.get(id)?.cancelled ?? false, command)
        const tried = (yield* store.attempts(id, false)).map(({ n, tag }) => ({ n, tag }))
        const last = ended?.tag === undefined ? [] : [{ n: ended.job.attempt, tag: ended.tag }]
        same(tried, [...Model.attemptsOf(model, id), ...last], command)
        const ends = (yield* store.ends([id], false)).map(({ status }) => status)
        return same(ends, model.jobs.has(id) ? ["open"] : ended === undefined ? [] : [ended.status], command)
      }
      case "detach": {
        const chosen = chooseClaim(command.claim)
        if (chosen === undefined) return
        const own = uuid()
        const answer = yield* store.detach(chosen.lease, chosen.id, own)
        same(answer, Model.detach(model, chosen.lease, chosen.id, own), command)
        if (answer === "moved") claims.push({ lease: own, id: chosen.id })
        return
      }
      case "progress": {
        const chosen = chooseClaim(command.claim)
        if (chosen === undefined) return
        const value = `${++count}`
        yield* store.progress(chosen.lease, chosen.id, value)
        return Model.progress(model, chosen.lease, chosen.id, value)
      }
      case "park":
        return same(yield* store.park(lanes, command.limit), Model.park(model, lanes, command.limit), command)
      case "unpark": {
        const worker = chooseWorker(command.worker)!
        return same(yield* store.unpark(worker, command.limit), Model.unpark(model, worker, command.limit), command)
      }
      case "audit": {
        const after = command.after === null ? undefined : ids[command.after % ids.length]
        return same(yield* store.audit(after, command.limit), Model.audit(model, after, command.limit), command)
      }
      case "lose": {
        const waiting = ids.filter((id) => model.jobs.get(id)?.place.at === "line")
        const id = waiting[command.job % waiting.length]
        if (id === undefined) return
        yield* query("delete from pgqueue.ready where id = $1::uuid", [id])
        same((yield* store.audit(undefined, 1000)).misplaced, [id], command)
        return same(yield* store.repair(ids), Model.repair(model, id), command)
      }
    }
  })

  yield* query(emptyText)
  yield* register(0)
  for (const command of [{ do: "insert" as const, jobs }, ...commands]) {
    model.now++
    yield* run(command)
    if (model.backedOff) {
      yield* holdBack(model)
      model.backedOff = false
    }
    yield* assertStored(model, JSON.stringify(command))
    done.commands++
  }
  yield* assertAllInPlace(model)
  yield* assertStats(model)
  done.sequences++
})

it.live(
  "the storage is what the model says",
  () =>
    Effect.gen(function*() {
      yield* Effect.logInfo(`model: ${runs} sequences of MODEL_SEED=${seed}`)
      const each = Effect.fnUntraced(function*(database: number) {
        const context = yield* Effect.context<Storage>()
        const property = fc.asyncProperty(sequence, (all) => Effect.runPromiseWith(context)(runSequence(all)))
        yield* Effect.promise(() =>
          fc.assert(property, { seed: seed + database, numRuns: Math.ceil(runs / databases) })
        )
      })
      const [took] = yield* Effect.timed(Effect.forEach(
        Array.from({ length: databases }, (_, database) => database),
        (database) => Effect.provide(each(database), storageLayer({ synchronous_commit: "off" })),
        { concurrency: databases }
      ))
      yield* Effect.logInfo(`model: ${JSON.stringify(done)} in ${Math.round(Duration.toMillis(took))} ms`)
    }),
  3_600_000
)
