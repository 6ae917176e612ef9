/**
 * The statements by which people and handlers act on jobs from outside their settlement: cancel, retry, delete, progress.
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
      select id, attempt, error ->> 'tag'::text, error ->> 'message'::text, error -> 'error'::text, worker, started_at, finished_at
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

  return { lock, cancel, retry, erase, awaits, progress }
}

const bound =
  `select set_config('lock_timeout', '5000', true), set_config('idle_in_transaction_session_timeout', '${Database.frozen}', true) as bound`

/**
 * Runs an effect in a transaction of the queue's own that does not wait for somebody's open one without end: 5 s a lock. Nor
 * does anybody wait for it: a process that is frozen before it commits keeps what it has locked no longer than `Database.frozen`.
 */
export const impatiently = <A>(db: Database.Database, self: Effect.Effect<A, SqlError>): Effect.Effect<A, SqlError> =>
  Database.transaction(
    db.own,
    Effect.andThen(
      db.own.unsafe(bound),
      self
    )
  )

/**
 * How what people do is sent.
 */
export interface People {
  /** Runs one statement: in the application's transaction, or in the queue's own. */
  readonly run: (
    inUserTransaction: boolean,
    text: string,
    params: ReadonlyArray<unknown>
  ) => Effect.Effect<ReadonlyArray<any>, SqlError>
  /** Runs statements together: in the application's transaction, or in one of the queue's own that waits for no one long. */
  readonly together: <A>(inUserTransaction: boolean, self: Effect.Effect<A, SqlError>) => Effect.Effect<A, SqlError>
  /** Waits for an answer no longer than people do. */
  readonly answered: <A>(self: Effect.Effect<A, SqlError>) => Effect.Effect<A, SqlError>
}

/**
 * Makes the way in which everything is sent that people do.
 */
export const people = (db: Database.Database): People => {
  const answered = Database.answeredWithin(Database.answerBound)
  // Those who wait for a stranger's transaction are not to take the queue's whole pool.
  const turns = Semaphore.makeUnsafe(3)
  return {
    answered,
    together: (inUserTransaction, self) =>
      inUserTransaction ? self : Semaphore.withPermit(turns, answered(impatiently(db, self))),
    run: (inUserTransaction, text, params) => (inUserTransaction ? db.app : db.own).unsafe<any>(text, params).unprepared
  }
}

/**
 * Builds the verbs of people for one quoted schema. Those that take `inUserTransaction` are then part of the transaction
 * that is open.
 */
export const make = (db: Database.Database, s: string, { run, together }: People) => {
  const texts = statements(s)
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
