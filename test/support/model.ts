/**
 * The storage as a few maps: what each verb of the store answers and leaves behind. No SQL, no clock and no chance in it,
 * so that it can be read beside the promises.
 *
 * Time is a count of statements. What a statement makes due "now" is due at its count, and whatever is due later, by a
 * delay or a random back-off, is just `later` until somebody makes it due.
 */
import { createHash } from "node:crypto"
import type { Verb } from "../../src/Settlement.ts"

/** Due at some time that has not come. */
export const later = Infinity

export type Place =
  | { readonly at: "line"; readonly parked: boolean }
  | { readonly at: "lease"; readonly lease: string }

export interface ModelJob {
  readonly id: string
  kind: string
  queue: string
  priority: number
  maxAttempts: number
  place: Place
  /** The count of the statement that made it due, or `later`. */
  due: number
  attempt: number
  rescued: number
  readonly snoozed: number
  cancelled: boolean
  reason: string | undefined
  /** The hash of the key it took when it came in. */
  readonly key: string | undefined
  awaited: boolean
  progress: string | undefined
  /** How many of its attempts were made before somebody retried it. */
  readonly before: number
}

export interface ModelEnd {
  readonly job: ModelJob
  readonly status: "completed" | "cancelled" | "discarded"
  readonly reason: string | undefined
  readonly result: string | undefined
  /** What its last attempt failed with. */
  readonly tag: string | undefined
}

export interface Attempt {
  readonly n: number
  readonly tag: string
}

export interface Model {
  now: number
  /** A random back-off has been drawn since this was last set to `false`. */
  backedOff: boolean
  readonly jobs: Map<string, ModelJob>
  readonly ends: Map<string, ModelEnd>
  readonly attempts: Map<string, Array<Attempt>>
  readonly keys: Map<string, { job: string; until: "started" | "finished"; expires: "never" | "later" | "past" }>
  readonly leases: Map<string, { readonly worker: string; ids: Array<string> }>
  readonly workers: Map<string, WorkerKind & { overdue: boolean }>
  /** `queue kind` of what is, or was, in the lanes of the parked. */
  readonly parked: Set<string>
}

export interface WorkerKind {
  readonly queues: ReadonlyArray<string>
  readonly kinds: ReadonlyArray<string>
  readonly prefixes: ReadonlyArray<string>
}

export interface NewModelJob {
  readonly id: string
  readonly kind: string
  readonly queue: string
  readonly priority: number
  readonly delayed: boolean
  readonly maxAttempts: number
  readonly awaited: boolean
}

export interface ModelRule {
  readonly key: string
  readonly until: "started" | "finished"
  readonly period: boolean
  readonly onConflict: "keep" | "replace" | "debounce"
  readonly idGiven: boolean
}

export const make = (): Model => ({
  now: 0,
  backedOff: false,
  jobs: new Map(),
  ends: new Map(),
  attempts: new Map(),
  keys: new Map(),
  leases: new Map(),
  workers: new Map(),
  parked: new Set()
})

// ---------------------------------------------------------------------------
// What follows from the rest
// ---------------------------------------------------------------------------

export const hashKey = (kind: string, key: string) => createHash("sha256").update(`${kind}\x1f${key}`).digest("hex")

export const laneOf = (job: ModelJob) =>
  job.place.at === "line" && job.place.parked ? 200 + job.priority : job.priority + (job.rescued >= 2 ? 100 : 0)

export const lists = (worker: WorkerKind, queue: string, kind: string) =>
  worker.queues.includes(queue) &&
  (worker.kinds.includes(kind) || worker.prefixes.some((prefix) => kind.startsWith(prefix)))

const byText = (a: string, b: string) => a < b ? -1 : a > b ? 1 : 0
const byDue = (a: ModelJob, b: ModelJob) => a.due - b.due || byText(a.id, b.id)
const distinct = (all: Iterable<string>) => [...new Set(all)].toSorted(byText)

/** What is due in one lane of one queue, in order. */
const front = (model: Model, queue: string, lane: number) =>
  [...model.jobs.values()]
    .filter((job) => job.place.at === "line" && job.queue === queue && laneOf(job) === lane && job.due <= model.now)
    .toSorted(byDue)

/** Everything that is due in line, in order. */
export const lineOf = (model: Model) =>
  [...model.jobs.values()].filter((job) => job.place.at === "line" && job.due <= model.now)
    .toSorted((a, b) => byText(a.queue, b.queue) || laneOf(a) - laneOf(b) || byDue(a, b))

export const attemptsOf = (model: Model, id: string): ReadonlyArray<Attempt> => model.attempts.get(id) ?? []

/** The status as people see it; `undefined` when there is no such job. */
export const statusOf = (model: Model, id: string) => {
  const job = model.jobs.get(id)
  if (job === undefined) return model.ends.get(id)?.status
  if (job.place.at === "lease") return "running"
  return job.due <= model.now ? "available" : job.attempt > 0 ? "retryable" : "scheduled"
}

// ---------------------------------------------------------------------------
// Into the line
// ---------------------------------------------------------------------------

const add = (model: Model, job: NewModelJob, key: string | undefined) => {
  model.jobs.set(job.id, {
    ...job,
    place: { at: "line", parked: false },
    due: job.delayed ? later : model.now,
    attempt: 0,
    rescued: 0,
    snoozed: 0,
    cancelled: false,
    reason: undefined,
    key,
    progress: undefined,
    before: 0
  })
}

const isThere = (model: Model, id: string) => model.jobs.has(id) || model.ends.has(id)

/** An id that is there, or has ended, is not inserted again. */
export const insert = (model: Model, jobs: ReadonlyArray<NewModelJob>) => {
  const inserted: Array<string> = []
  for (const job of jobs) {
    if (isThere(model, job.id)) continue
    add(model, job, undefined)
    inserted.push(job.id)
  }
  return inserted
}

/** One holder a key; the loser is told who it is, and may replace it while it stands in line. */
export const insertKeyed = (model: Model, job: NewModelJob, rule: ModelRule) => {
  const own = { id: job.id, status: rule.idGiven ? "existing" : "inserted" }
  if (isThere(model, job.id)) return own
  const key = hashKey(job.kind, rule.key)
  const held = model.keys.get(key)
  const expires = rule.period ? "later" : "never"
  if (held === undefined || held.expires === "past") {
    model.keys.set(key, { job: job.id, until: rule.until, expires })
    add(model, job, key)
    return { id: job.id, status: "inserted" }
  }
  const holder = model.jobs.get(held.job)
  if (rule.onConflict === "keep" || holder === undefined || holder.place.at !== "line") {
    return { id: held.job, status: "existing" }
  }
  const debounce = rule.onConflict === "debounce"
  Object.assign(holder, {
    kind: job.kind,
    queue: job.queue,
    priority: job.priority,
    maxAttempts: job.maxAttempts,
    awaited: holder.awaited || job.awaited,
    progress: undefined,
    place: { at: "line", parked: false }
  })
  if (debounce) holder.due = job.delayed ? later : model.now
  if (debounce && rule.period && holder.key === key) held.expires = "later"
  return { id: held.job, status: "replaced" }
}

/** Takes the first due jobs that the worker lists, lane by lane. A worker that is not registered takes nothing. */
export const claim = (
  model: Model,
  options: {
    readonly worker: string
    readonly lease: string
    readonly queue: string
    readonly lanes: ReadonlyArray<number>
    readonly limit: number
  }
) => {
  const worker = model.workers.get(options.worker)
  if (worker === undefined) return []
  const kinds = { ...worker, queues: [options.queue] }
  const taken = options.lanes
    .flatMap((lane) => front(model, options.queue, lane).filter((job) => lists(kinds, options.queue, job.kind)))
    .slice(0, options.limit)
  const rows = taken.map((job) => ({
    id: job.id,
    lane: laneOf(job),
    kind: job.kind,
    priority: job.priority,
    attempt: job.attempt,
    max_attempts: job.maxAttempts,
    rescued: job.rescued,
    progress: job.progress ?? null,
    history: attemptsOf(model, job.id).slice(job.before)
  }))
  for (const job of taken) {
    job.place = { at: "lease", lease: options.lease }
    const held = job.key === undefined ? undefined : model.keys.get(job.key)
    if (held?.job === job.id && held.until === "started" && held.expires === "never") model.keys.delete(job.key!)
  }
  if (taken.length > 0) {
    model.leases.set(options.lease, { worker: options.worker, ids: taken.map((job) => job.id) })
  }
  return rows
}

// ---------------------------------------------------------------------------
// Out of a lease
// ---------------------------------------------------------------------------

const leave = (model: Model, lease: string, id: string) => {
  const held = model.leases.get(lease)!
  held.ids = held.ids.filter((other) => other !== id)
  if (held.ids.length === 0) model.leases.delete(lease)
}

const end = (
  model: Model,
  job: ModelJob,
  how: Omit<ModelEnd, "job">
) => {
  model.jobs.delete(job.id)
  model.ends.set(job.id, { job, ...how })
  const held = job.key === undefined ? undefined : model.keys.get(job.key)
  if (held?.job === job.id && held.expires !== "later") model.keys.delete(job.key!)
}

const record = (model: Model, id: string, attempt: Attempt) =>
  model.attempts.set(id, [...attemptsOf(model, id), attempt])

interface Entry {
  readonly lease: string
  readonly id: string
  readonly verb: Verb
  readonly reason: string | undefined
  readonly result: string | undefined
  readonly delay: "none" | "now" | "later"
  readonly tag: string | undefined
}

/** One job that is still in its lease. Returns the status it ended with; `null` when it is back in line. */
const settleOne = (model: Model, { delay, id, lease, reason, result, tag, verb }: Entry) => {
  const job = model.jobs.get(id)!
  const lost = verb === "lost"
  const counts = lost ? job.rescued > 0 : verb !== "snoozed" && verb !== "released"
  const used = job.attempt + 1 >= job.maxAttempts
  const status = verb === "completed" || verb === "discarded"
    ? verb
    : verb === "cancelled" || job.cancelled
    ? "cancelled"
    : verb === "failed" && (delay === "none" || used) || lost && counts && used
    ? "discarded"
    : null
  const failed = job.attempt + 1
  const next: ModelJob = {
    ...job,
    attempt: job.attempt + (counts ? 1 : 0),
    rescued: job.rescued + (lost ? 1 : 0),
    snoozed: job.snoozed + (verb === "snoozed" ? 1 : 0),
    place: { at: "line", parked: false },
    // Apart from the others that were lost with it, and later each time.
    due: lost
      ? later
      : verb === "released" || delay === "none"
      ? job.due
      : delay === "later"
      ? later
      : model.now
  }
  leave(model, lease, id)
  if (status !== null) {
    const said = verb === "completed"
      ? undefined
      : verb === "cancelled" || verb === "discarded"
      ? reason ?? job.reason
      : job.reason
    end(model, next, { status, reason: said, result, tag })
  } else {
    model.jobs.set(id, next)
    if (tag !== undefined) record(model, id, { n: failed, tag })
    if (lost) model.backedOff = true
  }
  return status
}

const holds = (model: Model, lease: string, id: string) => model.leases.get(lease)?.ids.includes(id) === true

/** Only jobs that are still in their lease; the others are `gone`, and nothing changes. */
export const settle = (model: Model, entries: ReadonlyArray<Entry>) => {
  const once = [...new Map(entries.map((entry) => [entry.lease + entry.id, entry])).values()]
  const valid = new Set(once.filter(({ id, lease }) => holds(model, lease, id)))
  return once.flatMap((entry) => {
    const { id, lease, verb } = entry
    if (!valid.has(entry)) return { lease, id, state: "gone", status: null, awaited: false }
    const { awaited } = model.jobs.get(id)!
    const status = settleOne(model, entry)
    return verb !== "completed" || awaited ? { lease, id, state: "done", status, awaited } : []
  })
}

const takeBack = (model: Model, leases: ReadonlyArray<string>, verb: "lost" | "released") => {
  let [back, ended] = [0, 0]
  const queues: Array<string> = []
  const awaited: Array<string> = []
  for (const lease of leases) {
    for (const id of model.leases.get(lease)!.ids) {
      const job = model.jobs.get(id)!
      queues.push(job.queue)
      const tag = verb === "lost" ? "Lost" : undefined
      const status = settleOne(model, { lease, id, verb, tag, delay: "none", reason: undefined, result: undefined })
      if (status === null) back++
      else ended++
      if (status !== null && job.awaited) awaited.push(id)
    }
  }
  return {
    leases: leases.length,
    back,
    ended,
    queues: distinct(queues),
    awaited: distinct(awaited),
    last: leases[leases.length - 1] ?? null
  }
}

export const release = (model: Model, worker: string, leases: ReadonlyArray<string>) =>
  takeBack(model, distinct(leases).filter((lease) => model.leases.get(lease)?.worker === worker), "released")

/** The first leases, in the order of their ids, whose worker is not registered. */
export const rescue = (model: Model, limit: number) => {
  const orphans = [...model.leases].filter(([, { worker }]) => !model.workers.has(worker)).map(([lease]) => lease)
  return takeBack(model, orphans.toSorted(byText).slice(0, limit), "lost")
}

export const detach = (model: Model, lease: string, id: string, own: string) => {
  if (!holds(model, lease, id)) return "gone"
  const held = model.leases.get(lease)!
  if (held.ids.length === 1) return "alone"
  leave(model, lease, id)
  model.leases.set(own, { worker: held.worker, ids: [id] })
  model.jobs.get(id)!.place = { at: "lease", lease: own }
  return "moved"
}

// ---------------------------------------------------------------------------
// People
// ---------------------------------------------------------------------------

export const cancel = (model: Model, id: string, reason: string | undefined) => {
  const job = model.jobs.get(id)
  if (job === undefined) return undefined
  const { awaited } = job
  if (job.place.at === "line") {
    end(model, job, { status: "cancelled", reason, result: undefined, tag: undefined })
    return { status: "cancelled", awaited }
  }
  if (!job.cancelled) Object.assign(job, { cancelled: true, reason })
  return { status: "cancelling", awaited }
}

/** Back in line with all its attempts, without its key. */
export const retry = (model: Model, ids: ReadonlyArray<string>, status: string | undefined) => {
  const queues: Array<string> = []
  for (const id of new Set(ids)) {
    const ended = model.ends.get(id)
    if (ended === undefined || status !== undefined && ended.status !== status) continue
    if (ended.tag !== undefined) record(model, id, { n: ended.job.attempt, tag: ended.tag })
    model.ends.delete(id)
    model.jobs.set(id, {
      ...ended.job,
      place: { at: "line", parked: false },
      due: model.now,
      attempt: 0,
      rescued: 0,
      cancelled: false,
      reason: undefined,
      key: undefined,
      awaited: false,
      before: attemptsOf(model, id).length
    })
    queues.push(ended.job.queue)
  }
  return { count: queues.length, queues: distinct(queues) }
}

export const erase = (model: Model, id: string) => {
  const erased = model.ends.delete(id)
  if (erased) model.attempts.delete(id)
  return erased
}

export const awaits = (model: Model, id: string) => {
  const job = model.jobs.get(id)
  if (job !== undefined) job.awaited = true
}

export const progress = (model: Model, lease: string, id: string, value: string) => {
  if (holds(model, lease, id)) model.jobs.get(id)!.progress = value
}

// ---------------------------------------------------------------------------
// Workers, and what they do for all
// ---------------------------------------------------------------------------

export const register = (model: Model, id: string, kind: WorkerKind) => {
  model.workers.set(id, { ...kind, overdue: false })
}

export const silence = (model: Model, id: string) => {
  const worker = model.workers.get(id)
  if (worker !== undefined) worker.overdue = true
}

export const reap = (model: Model) => {
  const dead = [...model.workers].filter(([, { overdue }]) => overdue).map(([id]) => id)
  for (const id of dead) model.workers.delete(id)
  return dead.toSorted(byText)
}

export const beat = (model: Model, id: string) => {
  const mine = [...model.leases].filter(([, { worker }]) => worker === id)
  return {
    alive: model.workers.has(id),
    leases: mine.map(([lease]) => lease).toSorted(byText),
    cancelled: mine.flatMap(([, { ids }]) => ids).filter((job) => model.jobs.get(job)!.cancelled).toSorted(byText)
  }
}

export const park = (model: Model, lanes: ReadonlyArray<number>, limit: number) => {
  const workers = [...model.workers.values()]
  const picked = distinct(workers.flatMap(({ queues }) => queues)).flatMap((queue) =>
    lanes.flatMap((lane) => front(model, queue, lane).slice(0, limit))
  ).filter((job) => !workers.some((worker) => lists(worker, job.queue, job.kind)))
  for (const job of picked) {
    job.place = { at: "line", parked: true }
    model.parked.add(`${job.queue} ${job.kind}`)
  }
  return picked.length
}

export const unpark = (model: Model, id: string, limit: number) => {
  const worker = model.workers.get(id)
  const mine = worker === undefined ? [] : [...model.parked].filter((mark) => {
    const [queue, kind] = mark.split(" ")
    return lists(worker, queue!, kind!)
  })
  const candidates = (mark: string) =>
    [...model.jobs.values()].filter((job) =>
      job.place.at === "line" && job.place.parked && `${job.queue} ${job.kind}` === mark
    )
  const lanes = Map.groupBy(mine.flatMap(candidates), (job) => `${job.queue} ${job.priority}`)
  const back = [...lanes.values()].flatMap((lane) => lane.toSorted(byDue).slice(0, limit))
  for (const job of back) job.place = { at: "line", parked: false }
  if (back.length === 0) { for (const mark of mine) if (candidates(mark).length === 0) model.parked.delete(mark) }
  return { count: back.length, queues: distinct(back.map(({ queue }) => queue)) }
}

/** The page that an audit looks at; there is never anything to find. */
export const audit = (model: Model, after: string | undefined, limit: number) => {
  const page = [...model.jobs.keys()].filter((id) => after === undefined || id > after).toSorted(byText).slice(0, limit)
  return { last: page[page.length - 1], misplaced: [] as ReadonlyArray<string> }
}

/** A line entry that has vanished is made anew: where it belongs, and not parked. */
export const repair = (model: Model, id: string) => {
  const job = model.jobs.get(id)!
  job.place = { at: "line", parked: false }
  return { repaired: [id], queues: [job.queue] }
}

// ---------------------------------------------------------------------------
// Time
// ---------------------------------------------------------------------------

export const makeDue = (model: Model) => {
  for (const job of model.jobs.values()) if (job.place.at === "line" && job.due === later) job.due = model.now
}

export const expirePeriods = (model: Model) => {
  for (const key of model.keys.values()) if (key.expires === "later") key.expires = "past"
}
