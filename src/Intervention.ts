/**
 * The statements by which people look at jobs and act on them: cancel, retry, delete, and what is known of a job.
 *
 * Whoever acts on a job that has not ended locks its row first and looks at the line in a later statement, with a newer
 * snapshot: with the row locked, a job can only be claimed meanwhile, and that is then seen. They also run in the
 * application's own sessions, whose search_path is not ours: functions are named with their schema.
 *
 * @since 0.1.0
 */
import * as Effect from "effect/Effect"
import * as Semaphore from "effect/Semaphore"
import type { SqlError } from "effect/sql/SqlError"
import * as Database from "./Database.ts"

/** A job as it is stored, wherever it is. Times are milliseconds since the epoch. */
export interface InspectedRow {
  readonly id: string
  readonly kind: string
  readonly queue: string
  readonly priority: number
  readonly status: "scheduled" | "available" | "running" | "retryable" | "completed" | "cancelled" | "discarded"
  readonly reason: string | null
  readonly attempt: number
  readonly max_attempts: number
  readonly rescued: number
  readonly snoozed: number
  /** These four are JSON text. */
  readonly metadata: string
  readonly payload: string
  readonly progress: string | null
  readonly result: string | null
  readonly cancelling: boolean
  readonly enqueued_at: number
  readonly scheduled_for: number
  readonly run_at: number | null
  readonly started_at: number | null
  readonly finished_at: number | null
  readonly worker: string | null
}

/** One ended attempt as people see it. Times are milliseconds since the epoch. */
export interface EndedAttemptRow {
  readonly n: number
  readonly tag: string
  readonly message: string | null
  /** JSON text. */
  readonly error: string | null
  readonly worker: string | null
  readonly started_at: number | null
  readonly ended_at: number
}

/** What has become of a job that somebody waits for; `open` when it has not ended. */
export interface EndRow {
  readonly id: string
  readonly kind: string
  readonly status: "open" | "completed" | "cancelled" | "discarded"
  readonly reason: string | null
  /** These two are JSON text. */
  readonly result: string | null
  readonly error: string | null
}

/**
 * Builds the statements for one quoted schema.
 */
const statements = (s: string) => {
  const lock = `select j.id from ${s}.job j where j.id = $1::uuid for update`

  // Waiting: leaves the line and ends. Running, or claimed a moment ago: marked, and its worker, its settle or its rescue
  // ends it.
  const cancel = `with held as materialized (
      select j.*, case when j.rescued >= 2 then 100 else 0 end as suspect, pg_catalog.clock_timestamp() as now
      from ${s}.job j where j.id = $1::uuid
    ), gone as (
      delete from ${s}.ready r using held h
      where r.queue = h.queue and r.lane = any (array[h.priority + h.suspect, 200 + h.priority]) and r.run_at = h.run_at and r.id = h.id
      returning r.id
    ), ended as (
      insert into ${s}.finished (id, kind, queue, priority, status, reason, attempt, max_attempts, timeout_ms, rescued, snoozed,
        group_key, trace, metadata, enqueued_at, scheduled_for, finished_at, payload, progress)
      select h.id, kind, queue, priority, 'cancelled', nullif($2::text, ''), attempt, max_attempts, timeout_ms, rescued, snoozed,
        group_key, trace, metadata, enqueued_at, scheduled_for, now, payload, progress
      from held h join gone using (id) on conflict (id) do nothing
    ), removed as (
      delete from ${s}.job where id = any (array(select id from gone))
    ), freed as (
      delete from ${s}.unique_key k using held h, gone g
      where k.key = h.unique_key and k.job = g.id and (k.expires_at is null or k.expires_at <= h.now)
    ), marked as (
      update ${s}.job j set cancelled_at = h.now, cancel_reason = nullif($2::text, '')
      from held h where j.id = $1::uuid and h.id = j.id and h.cancelled_at is null and not exists (select 1 from gone)
    )
    select exists (select 1 from gone) as ended, h.awaited from held h`

  // Back in line with all its attempts, and without the key it once held: that may be somebody else's by now. What it
  // failed with is kept as an attempt. Rows are locked in the order of their ids, so that two of these cannot deadlock. One
  // clock for the statement, so that they stand in line in that order too: as a subquery it is read again for every row.
  // A forced look-up per job, and an opaque condition on the status: the planner would rather read all that ended so.
  const retry = `with clock as materialized (select pg_catalog.clock_timestamp() as now), held as materialized (
      select f.* from (select distinct i.id from pg_catalog.unnest($1::uuid[]) as i(id) order by i.id) i cross join lateral (
        select f.* from ${s}.finished f
        where f.id = i.id and case when $2::text = '' or f.status = $2::text then true else false end for update
      ) f
    ), gone as (
      delete from ${s}.finished where id = any (array(select id from held)) returning id
    ), back as (
      insert into ${s}.job (id, kind, queue, priority, run_at, max_attempts, timeout_ms, snoozed, group_key, trace, metadata, enqueued_at,
        scheduled_for, payload, progress, retried_at)
      select id, kind, queue, priority, c.now, max_attempts, timeout_ms, snoozed, group_key, trace, metadata, enqueued_at,
        scheduled_for, payload, progress, c.now
      from held join gone using (id), clock c
      on conflict (id) do nothing returning id, queue, priority, run_at, kind, group_key
    ), line as (
      insert into ${s}.ready (queue, lane, run_at, id, kind, attempt, group_key)
      select queue, priority, run_at, id, kind, 0, group_key from back on conflict do nothing
    ), tried as (
      insert into ${s}.attempt (job, n, tag, message, error, worker, started_at, ended_at)
      select id, attempt, error ->> 'tag', error ->> 'message', error -> 'error', worker, started_at, finished_at
      from held where error is not null
    )
    select pg_catalog.count(*)::int4 as count, pg_catalog.json_agg(distinct queue)::text as queues from back`

  const erase = `with gone as (
      delete from ${s}.finished where id = $1::uuid returning id
    ), old as (
      delete from ${s}.archive where id = $1::uuid returning id
    ), attempts as (
      delete from ${s}.attempt where job = any (array(select id from gone union select id from old))
    )
    select (select pg_catalog.count(*) from gone) + (select pg_catalog.count(*) from old) > 0 as erased`

  // A page of discarded jobs, by the index on status and end: how long the history is does not matter.
  const discarded =
    `select f.id::text as id, (extract(epoch from f.finished_at) * 1000000)::int8::text as at from ${s}.finished f
    where f.status = 'discarded' and f.finished_at < timestamptz 'epoch' + $5::int8 * interval '1 microsecond'
      and (f.finished_at, f.id) > (timestamptz 'epoch' + $3::int8 * interval '1 microsecond', $4::uuid)
      and ($1::text is null or f.kind = $1::text) and ($2::text is null or f.queue = $2::text)
    order by f.finished_at, f.id limit $6::int4`

  const millis = (column: string) => `(extract(epoch from ${column}) * 1000)::float8`
  const ended = (table: string) =>
    `select f.id::text as id, f.kind, f.queue, f.priority, f.status, f.reason, f.attempt, f.max_attempts, f.rescued, f.snoozed,
      f.metadata::text as metadata, f.payload::text as payload, f.progress::text as progress, f.result::text as result,
      false as cancelling, ${millis("f.enqueued_at")} as enqueued_at,
      ${millis("f.scheduled_for")} as scheduled_for, null::float8 as run_at, ${millis("f.started_at")} as started_at,
      ${millis("f.finished_at")} as finished_at, f.worker::text as worker
    from ${s}.${table} f where f.id = $1::uuid`
  // In one snapshot a job is in exactly one place.
  const inspect = `select j.id::text as id, j.kind, j.queue, j.priority,
      case when l.worker is not null then 'running' when j.run_at <= pg_catalog.clock_timestamp() then 'available'
        when j.attempt > 0 then 'retryable' else 'scheduled' end as status,
      j.cancel_reason as reason, j.attempt, j.max_attempts, j.rescued, j.snoozed,
      j.metadata::text as metadata, j.payload::text as payload, j.progress::text as progress, null::text as result,
      j.cancelled_at is not null as cancelling, ${millis("j.enqueued_at")} as enqueued_at,
      ${millis("j.scheduled_for")} as scheduled_for, ${millis("j.run_at")} as run_at, ${
    millis("l.claimed_at")
  } as started_at,
      null::float8 as finished_at, l.worker::text as worker
    from ${s}.job j left join lateral (
      select l.worker, l.claimed_at from ${s}.lease l where j.id = any (l.ids) limit 1
    ) l on true where j.id = $1::uuid
    union all (${ended("finished")} union all ${ended("archive")} limit 1)`

  const attempts = `select n, tag, message, error::text as error, worker::text as worker, ${
    millis("started_at")
  } as started_at,
      ${millis("ended_at")} as ended_at
    from (
      select a.n, a.tag, a.message, a.error, a.worker, a.started_at, a.ended_at, a.id from ${s}.attempt a where a.job = $1::uuid
      union all (
        select f.attempt, f.error ->> 'tag', f.error ->> 'message', f.error -> 'error', f.worker, f.started_at, f.finished_at, 9223372036854775807
        from (
          select * from ${s}.finished where id = $1::uuid union all select * from ${s}.archive where id = $1::uuid
        ) f where f.error is not null limit 1
      )
    ) a order by a.id`

  // What has become of jobs that somebody waits for. The end of each that has one.
  const ends = `select e.* from pg_catalog.unnest($1::uuid[]) as w(id) cross join lateral (
      select * from (
        select w.id::text as id, j.kind, 'open' as status, null::text as reason, null::text as result, null::text as error
        from ${s}.job j where j.id = w.id
        union all select w.id::text, f.kind, f.status, f.reason, f.result::text, f.error::text from ${s}.finished f where f.id = w.id
        union all select w.id::text, f.kind, f.status, f.reason, f.result::text, f.error::text from ${s}.archive f where f.id = w.id
      ) e limit 1
    ) e`

  // Only what is not marked yet: waiting for a job must not write it again and again. A job in a stranger's hands is not
  // waited for: its end is then found by looking.
  const awaits = `update ${s}.job set awaited = true where id = any (array(
      select j.id from ${s}.job j where j.id = $1::uuid and not j.awaited for update skip locked))`

  // Fenced by the lease: a handler that has lost its job says nothing more of it. Waits for no lock: with the job's row
  // locked it would wait for a transactional handler that waits for that row, and the jobs of one stranger's transaction
  // would take every connection.
  const progress = `with mine as materialized (
      select j.id from ${s}.job j where j.id = $2::uuid for no key update skip locked
    ), held as materialized (
      select m.id from mine m cross join lateral (
        select l.id from ${s}.lease l where l.id = $1::uuid and m.id = any (l.ids) for key share skip locked
      ) l
    ), stored as (
      update ${s}.job set progress = $3::json where id = any (array(select id from held)) returning id
    )
    select not exists (select 1 from stored) and exists (
        select 1 from ${s}.lease l where l.id = $1::uuid and $2::uuid = any (l.ids)
      ) as busy`

  const clock = `select (extract(epoch from pg_catalog.clock_timestamp()) * 1000000)::int8::text as now`

  return { lock, cancel, retry, erase, discarded, inspect, attempts, ends, awaits, progress, clock }
}

/** A statement on a dead link never answers, in milliseconds. */
const answerBound = 15_000

/**
 * Runs an effect in a transaction of the queue's own that does not wait for somebody's open one without end: 5 s a lock.
 */
export const impatiently = <A>(db: Database.Database, self: Effect.Effect<A, SqlError>): Effect.Effect<A, SqlError> =>
  Database.transaction(
    db.own,
    Effect.andThen(db.own.unsafe("select set_config('lock_timeout', '5000', true) as bound"), self)
  )

/**
 * Builds the verbs of people for one quoted schema. Those that take `inUserTransaction` are then part of the transaction
 * that is open.
 */
export const make = (db: Database.Database, s: string) => {
  const texts = statements(s)
  const answered = Database.answeredWithin(answerBound)
  // Those who wait for a stranger's transaction are not to take the queue's whole pool.
  const turns = Semaphore.makeUnsafe(3)
  const together = <A>(inUserTransaction: boolean, self: Effect.Effect<A, SqlError>) =>
    inUserTransaction ? self : Semaphore.withPermit(turns, answered(impatiently(db, self)))
  const run = (inUserTransaction: boolean, text: string, params: ReadonlyArray<unknown>) =>
    (inUserTransaction ? db.app : db.own).unsafe<any>(text, params).unprepared
  const read = (inUserTransaction: boolean, text: string, params: ReadonlyArray<unknown>) =>
    inUserTransaction ? Database.here<any>(db, text, params) : answered(db.query<any>(text, params))

  const verbs = {
    /**
     * Cancels a job: `"cancelled"` when it was waiting and has ended, `"cancelling"` when its worker has to end it,
     * `undefined` when there is no such job or it has ended.
     */
    cancel: (
      id: string,
      reason: string,
      inUserTransaction: boolean
    ): Effect.Effect<
      { readonly status: "cancelled" | "cancelling"; readonly awaited: boolean } | undefined,
      SqlError
    > =>
      together(
        inUserTransaction,
        Effect.flatMap(run(inUserTransaction, texts.lock, [id]), (found) =>
          found.length === 0
            ? Effect.undefined
            : Effect.map(run(inUserTransaction, texts.cancel, [id, reason]), ([row]) => ({
              status: row.ended ? "cancelled" as const : "cancelling" as const,
              awaited: row.awaited
            })))
      ),

    /**
     * Brings finished jobs back in line, with all their attempts; with `status`, only those that ended so.
     */
    retry: (
      ids: ReadonlyArray<string>,
      status: string | undefined,
      inUserTransaction: boolean
    ): Effect.Effect<{ readonly count: number; readonly queues: ReadonlyArray<string> }, SqlError> =>
      together(
        inUserTransaction,
        Effect.map(run(inUserTransaction, texts.retry, [ids, status ?? ""]), ([row]) => ({
          count: row.count,
          queues: Database.listOf(row.queues)
        }))
      ),

    /**
     * Deletes a finished job and its attempts; `false` when there is none.
     */
    erase: (id: string, inUserTransaction: boolean): Effect.Effect<boolean, SqlError> =>
      together(
        inUserTransaction,
        Effect.map(run(inUserTransaction, texts.erase, [id]), ([row]) => row.erased)
      ),

    /**
     * Reads a page of the discarded jobs that ended before `before`, in the order in which they ended, after `after`.
     */
    discarded: (
      options: {
        readonly kind: string | undefined
        readonly queue: string | undefined
        /** Microseconds since the epoch, as text. */
        readonly before: string
        readonly after: { readonly at: string; readonly id: string } | undefined
        readonly limit: number
      },
      inUserTransaction: boolean
    ): Effect.Effect<ReadonlyArray<{ readonly at: string; readonly id: string }>, SqlError> =>
      read(inUserTransaction, texts.discarded, [
        // Not the empty text for none: a filter that came out empty must not mean every job.
        options.kind ?? null,
        options.queue ?? null,
        options.after?.at ?? "-1",
        options.after?.id ?? Database.firstId,
        options.before,
        options.limit
      ]),

    /**
     * Reads the database's clock, in microseconds since the epoch, as text.
     */
    clock: (inUserTransaction: boolean): Effect.Effect<string, SqlError> =>
      Effect.map(read(inUserTransaction, texts.clock, []), ([row]) => row.now),

    /**
     * Reads all there is to know of a job.
     */
    inspect: (id: string, inUserTransaction: boolean): Effect.Effect<InspectedRow | undefined, SqlError> =>
      Effect.map(read(inUserTransaction, texts.inspect, [id]), ([row]) => row),

    /**
     * Reads the attempts of a job that failed, oldest first.
     */
    attempts: (id: string, inUserTransaction: boolean): Effect.Effect<ReadonlyArray<EndedAttemptRow>, SqlError> =>
      read(inUserTransaction, texts.attempts, [id]),

    /**
     * Reads what has become of some jobs; no row for one that is nowhere.
     */
    ends: (ids: ReadonlyArray<string>, inUserTransaction: boolean): Effect.Effect<ReadonlyArray<EndRow>, SqlError> =>
      read(inUserTransaction, texts.ends, [ids]),

    /**
     * Marks a job as one whose end is to be announced.
     */
    awaits: (id: string): Effect.Effect<void, SqlError> => Effect.asVoid(db.query<any>(texts.awaits, [id])),

    /**
     * Stores what a handler says of its job; nothing when the job is no longer in that lease. `"busy"`: somebody has
     * locked the job or its lease, ask again.
     */
    progress: (lease: string, id: string, value: string): Effect.Effect<"done" | "busy", SqlError> =>
      Effect.map(db.query<any>(texts.progress, [lease, id, value]), ([row]) => row.busy ? "busy" : "done")
  }
  return { texts, verbs }
}
