/** The storage under test: a migrated schema, more sessions on it, and one query that knows what must never be. */
import { assert } from "@effect/vitest"
import { Context, Effect, Fiber, Layer, Schedule } from "effect"
import { SecureRandom } from "effect/crypto"
import { SqlClient, type SqlError } from "effect/sql"
import * as Database from "../../src/Database.ts"
import * as Migrations from "../../src/Migrations.ts"
import type * as Settlement from "../../src/Settlement.ts"
import * as Store from "../../src/Store.ts"
import { databaseLayer } from "./database.ts"

type Row = Record<string, unknown>

/** The schema that {@link Storage} migrates; its name is written into the statements of the tests. */
export const schema = "pgqueue"

/** A migrated database and the statements over it; many sessions of one process. */
export class Storage extends Context.Service<Storage, {
  readonly sql: SqlClient.SqlClient
  readonly db: Database.Database
  readonly store: Store.Store
}>()("effect-pgqueue/test/support/storage") {
  static readonly layer: Layer.Layer<Storage | SqlClient.SqlClient, SqlError.SqlError | Migrations.JobQueueError> =
    Layer.suspend(() => storageLayer())
}

/** A {@link Storage} on a database of its own, whose sessions begin with these parameters. */
export const storageLayer = (
  startupParameters: Readonly<Record<string, string>> = {}
): Layer.Layer<Storage | SqlClient.SqlClient, SqlError.SqlError | Migrations.JobQueueError> =>
  Layer.provideMerge(
    Layer.effect(
      Storage,
      Effect.gen(function*() {
        const sql = yield* SqlClient.SqlClient
        const db = yield* Database.make(sql, { maxConnections: 24 })
        yield* Migrations.run(db.own, schema)
        return { sql, db, store: Store.make(db, schema) }
      })
    ),
    databaseLayer({ maxConnections: 4, startupParameters })
  )

/** Runs a query on the storage and returns its rows. */
export const query = Effect.fnUntraced(function*<A extends object = Row>(text: string, params: Array<unknown> = []) {
  const { db } = yield* Storage
  return yield* db.query<A>(text, params)
})

/** The first column of the first row. */
export const value = Effect.fnUntraced(function*<A = unknown>(text: string, params: Array<unknown> = []) {
  const [row] = yield* query(text, params)
  return Object.values(row ?? {})[0] as A
})

/** How many rows a table has. */
export const count = (table: string) => value<number>(`select count(*)::int4 from pgqueue.${table}`)

/**
 * One more session, with the statements of the store on it. Its connection is its own, so `begin` and `commit` may be
 * sent as they are; what is open at the end of the scope is rolled back with the connection.
 */
export const session = Effect.gen(function*() {
  const { sql } = yield* Storage
  const db = yield* Database.make(sql, { maxConnections: 1 })
  return { store: Store.make(db, schema), query: (text: string, params: Array<unknown> = []) => db.query(text, params) }
})

/** Waits until `count` sessions of this database wait for a lock: the state is looked at, no time is guessed. */
export const untilBlocked = (count = 1) =>
  value<number>(
    `select count(*)::int4 from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'`
  ).pipe(
    Effect.filterOrFail((waiting) => waiting >= count),
    Effect.retry(Schedule.max([Schedule.spaced("2 millis"), Schedule.recurs(5000)])),
    Effect.orDie
  )

/** Starts an effect that is going to wait for a lock, and returns its fiber once it does. */
export const blocked = Effect.fnUntraced(function*<A, E, R>(effect: Effect.Effect<A, E, R>, count = 1) {
  const fiber = yield* Effect.forkChild(effect, { startImmediately: true })
  yield* untilBlocked(count)
  assert.isUndefined(fiber.pollUnsafe(), "the statement did not wait for the lock")
  return fiber
})

/** Waits for a fiber started by {@link blocked}. */
export const join = Fiber.join

/** A new UUID. */
export const uuid = () => SecureRandom.uuidV7Unsafe()

/** A job with defaults that do not matter. */
export const job = (options: Partial<Store.NewJob> = {}): Store.NewJob => ({
  id: uuid(),
  kind: "k",
  queue: "default",
  priority: 5,
  delay: 0,
  runAt: undefined,
  maxAttempts: 5,
  timeout: undefined,
  payload: `{"a":1}`,
  metadata: "{}",
  trace: undefined,
  unique: undefined,
  ...options
})

/** `count` jobs with the same options. */
export const jobs = (count: number, options: Partial<Store.NewJob> = {}): Array<Store.NewJob> =>
  Array.from({ length: count }, () => job(options))

/** A job that wants a key. */
export const keyed = (key: string, options: Partial<Store.NewJob> = {}, period?: number): Store.NewJob =>
  job({ unique: { key, period, until: "finished", onConflict: "keep" }, ...options })

/** Registers a worker and returns its id. */
export const worker = Effect.fnUntraced(function*(options: Partial<Parameters<Store.Store["register"]>[0]> = {}) {
  const { store } = yield* Storage
  const id = uuid()
  yield* store.register({
    id,
    name: "test",
    queues: ["default"],
    kinds: ["k"],
    prefixes: [],
    lease: 30_000,
    ...options
  })
  return id
})

type ClaimOptions = Parameters<Store.Store["claim"]>[0]

/** The options of a claim of everything due in the default queue, suspects included, under a new lease. */
export const claimOptions = (worker: string, options: Partial<ClaimOptions> = {}): ClaimOptions => ({
  worker,
  lease: uuid(),
  queue: "default",
  lanes: [2, 5, 8, 100 + 2, 100 + 5].map(Store.laneStart),
  kinds: ["k"],
  prefixes: [],
  limit: 100,
  ...options
})

/** Claims and returns the lease with what it holds. */
export const claim = Effect.fnUntraced(function*(worker: string, options: Partial<ClaimOptions> = {}) {
  const { store } = yield* Storage
  const full = claimOptions(worker, options)
  const rows = yield* store.claim(full)
  return { lease: full.lease, rows, ids: rows.map((row) => row.id) }
})

/** Inserts jobs, claims them with a worker of their own, and returns who holds what. */
export const claimed = Effect.fnUntraced(function*(all: ReadonlyArray<Store.NewJob>) {
  const { store } = yield* Storage
  const plain = all.filter((job) => job.unique === undefined)
  const unique = all.filter((job) => job.unique !== undefined)
  if (plain.length > 0) yield* store.insert(plain, false)
  if (unique.length > 0) yield* store.insertUnique(unique, false, undefined)
  const id = yield* worker()
  const { lease, ids } = yield* claim(id, { limit: all.length })
  assert.sameMembers(ids, all.map((job) => job.id))
  return { worker: id, lease, ids: all.map((job) => job.id) }
})

/** Sends the beat of a worker and returns what it learned. */
export const beat = Effect.fnUntraced(function*(worker: string) {
  const { store } = yield* Storage
  return Store.readBeat(yield* query<{ what: string; id: string; age: number }>(store.beatText, [worker]))
})

/** A settlement with defaults that do not matter. */
export const entry = (
  lease: string,
  id: string,
  verb: Settlement.Verb,
  options: Partial<Settlement.Entry> = {}
): Settlement.Entry => ({
  lease,
  id,
  verb,
  result: undefined,
  reason: undefined,
  delay: undefined,
  failure: undefined,
  ran: 10,
  ...options
})

/** A failure to record. */
export const failure = { tag: "Failed", message: "boom", error: `{"_tag":"Boom"}` }

/** Makes a worker look overdue, however short the server has been up. */
export const silence = (worker: string) =>
  query(`update pgqueue.worker set beat_at = '1999-12-31', lease_ms = 0 where id = $1::uuid`, [worker])

/** Declares a worker dead, whatever it does. */
export const bury = (worker: string) => query(`delete from pgqueue.worker where id = $1::uuid`, [worker])

/** Makes everything in line due, by the rule that a line entry is never updated. */
export const makeDue = query(`
  with early as (delete from pgqueue.ready where run_at > clock_timestamp() returning *),
    due as (
      insert into pgqueue.ready (queue, lane, run_at, id, kind, attempt)
      select queue, lane, statement_timestamp(), id, kind, attempt from early returning id, run_at
    )
  update pgqueue.job j set run_at = due.run_at from due where due.id = j.id`)

/** The stored state of one job, from wherever it is. */
export const stateOf = (id: string) =>
  Effect.map(
    query<{ place: string; row: Row }>(
      `select 'finished' as place, to_json(f) as row from pgqueue.finished f where f.id = $1::uuid
       union all select 'lease', to_json(j) from pgqueue.job j
         where j.id = $1::uuid and exists (select 1 from pgqueue.lease l where j.id = any (l.ids))
       union all select 'ready', to_json(j) from pgqueue.job j
         where j.id = $1::uuid and exists (select 1 from pgqueue.ready r where j.id = r.id)`,
      [id]
    ),
    (rows): Row => rows.map(({ place, row }) => ({ ...row, place }))[0] ?? { place: "nowhere" }
  )

/**
 * What must never be: one row per job, lease or key that is not as it should be. The whole of the storage's invariant is
 * here, so a test need not think of it.
 */
const misplacedText = `
  with place as (
    select id, 'ready' as name from pgqueue.ready
    union all select u.id, 'lease' from pgqueue.lease cross join unnest(ids) as u(id)
    union all select id, 'blocked' from pgqueue.blocked
  ), places as (select id, count(*) as count, string_agg(name, '+') as names from place group by id)
  select 'a job that is in ' || coalesce(p.names, 'no place') as problem, j.id::text as id
    from pgqueue.job j left join places p on p.id = j.id where p.count is distinct from 1
  union all select 'a place (' || p.names || ') without its job', p.id::text
    from places p where not exists (select 1 from pgqueue.job j where j.id = p.id)
  union all select 'a job that has ended and goes on', j.id::text from pgqueue.job j join pgqueue.finished f on f.id = j.id
  union all select 'a line entry that differs from its job', j.id::text from pgqueue.job j join pgqueue.ready r on r.id = j.id
    where (r.queue, r.run_at, r.kind, r.attempt) is distinct from (j.queue, j.run_at, j.kind, j.attempt)
      or r.lane not in (j.priority + case when j.rescued >= 2 then 100 else 0 end, j.priority + 200)
  union all select 'a parked job that nobody would bring back', r.id::text from pgqueue.ready r
    where r.lane >= 200 and not exists (select 1 from pgqueue.parked p where p.queue = r.queue and p.kind = r.kind)
  union all select 'an empty lease', id::text from pgqueue.lease where cardinality(ids) = 0
  union all select 'a key without a job that holds it', k.job::text from pgqueue.unique_key k
    where k.expires_at is null and not exists (select 1 from pgqueue.job j where j.id = k.job and j.unique_key = k.key)
  union all select 'a job without its key', j.id::text from pgqueue.job j
    where j.unique_key is not null and not exists (select 1 from pgqueue.unique_key k where k.key = j.unique_key)`

/** What is not as it should be. */
export const misplaced = query<{ problem: string; id: string }>(misplacedText)

/** Fails unless every job is in exactly one place, and every lease, line entry and key belongs to one. */
export const assertInPlace = Effect.map(misplaced, (found) => assert.deepStrictEqual(found, []))

/**
 * As {@link assertInPlace}, where jobs have given their keys back before their end: at their start, or because the period
 * is over. Their rows still name the key, and do not tell by which rule they had it.
 */
export const assertInPlaceButKeys = Effect.map(
  misplaced,
  (found) => assert.deepStrictEqual(found.filter(({ problem }) => problem !== "a job without its key"), [])
)

/** The tables that a test fills. */
export const tables = [
  "job",
  "ready",
  "lease",
  "worker",
  "attempt",
  "finished",
  "archive",
  "unique_key",
  "blocked",
  "parked"
] as const

const emptyText = `truncate ${tables.map((table) => `${schema}.${table}`)}`

/** The body of a test: on empty tables, and with {@link assertInPlace} at its end. */
export const rule = <A, E, R>(body: Effect.Effect<A, E, R>) => () =>
  query(emptyText).pipe(Effect.andThen(Effect.scoped(body)), Effect.andThen(assertInPlace))
