/**
 * The statements that only read: what is due, how many jobs there are, and what is known of one.
 *
 * Those that people use also run in the application's own sessions, whose search_path is not ours: functions are named with
 * their schema.
 *
 * @since 0.1.0
 */
import * as Effect from "effect/Effect"
import type { SqlError } from "effect/sql/SqlError"
import * as Database from "./Database.ts"

/** The counts of one queue and kind. */
export interface Stats {
  readonly queue: string
  readonly kind: string
  readonly available: number
  readonly scheduled: number
  readonly retryable: number
  readonly running: number
  readonly completed: number
  readonly cancelled: number
  readonly discarded: number
  /** Milliseconds the job at the front has been due; 0 when none is. */
  readonly lag: number
  /** Whether a live worker lists this kind. */
  readonly handled: boolean
}

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

/** Longer than anything has been due, in milliseconds. */
export const everything = 1e13

/** Milliseconds since the epoch, or of an interval. */
export const millis = (column: string) => `(extract(epoch from ${column}) * 1000.0)::float8`

/** Microseconds since the epoch, as exact as the server is; as text, whatever a client makes of an int8. */
export const micros = (column: string) => `(extract(epoch from ${column}) * 1000000.0)::int8::text`

/**
 * Builds the statements for one quoted schema.
 */
const statements = (s: string) => {
  // Two probes a lane, due and future: cheap however long the lanes are. Not EXISTS: it drops the order, and then a scan of
  // the whole line looks cheap to the planner, which expects the first row to fit.
  const look = `select q.queue, bool_or(p.due) as due, min(p.wait)::float8 as wait
    from unnest($1::text[], $3::float8[]) as q(queue, news) cross join unnest($2::int2[]) as l(lane)
    cross join lateral (
      select (select true from ${s}.ready r where r.queue = q.queue and r.lane = l.lane and r.run_at <= statement_timestamp()
          and r.run_at > statement_timestamp() - q.news * interval '1 millisecond' order by r.run_at, r.id limit 1) is not null as due,
        (select ${millis("r.run_at - statement_timestamp()")} from ${s}.ready r
          where r.queue = q.queue and r.lane = l.lane and r.run_at > statement_timestamp()
          order by r.run_at, r.id limit 1) as wait
    ) p group by q.queue`

  const stats = `with line as (
      select queue, kind, pg_catalog.count(*) filter (where run_at <= pg_catalog.clock_timestamp()) as available,
        pg_catalog.count(*) filter (where run_at > pg_catalog.clock_timestamp() and attempt = 0) as scheduled,
        pg_catalog.count(*) filter (where run_at > pg_catalog.clock_timestamp() and attempt > 0) as retryable,
        greatest(0, ${millis("pg_catalog.clock_timestamp() - pg_catalog.min(run_at)")}) as lag
      from ${s}.ready group by 1, 2
    ), held as (
      select j.queue, j.kind, pg_catalog.count(*) as running
      from ${s}.lease l cross join pg_catalog.unnest(l.ids) as u(id) join ${s}.job j on j.id = u.id group by 1, 2
    ), done as (
      select queue, kind, pg_catalog.count(*) filter (where status = 'completed') as completed,
        pg_catalog.count(*) filter (where status = 'cancelled') as cancelled, pg_catalog.count(*) filter (where status = 'discarded') as discarded
      from ${s}.finished group by 1, 2
    )
    select queue, kind, coalesce(available, 0)::float8 as available, coalesce(scheduled, 0)::float8 as scheduled,
      coalesce(retryable, 0)::float8 as retryable, coalesce(running, 0)::float8 as running,
      coalesce(completed, 0)::float8 as completed, coalesce(cancelled, 0)::float8 as cancelled,
      coalesce(discarded, 0)::float8 as discarded, coalesce(lag, 0)::float8 as lag,
      exists (select 1 from ${s}.worker w where queue = any (w.queues) and (kind = any (w.kinds) or kind ^@ any (w.prefixes))) as handled
    from line full join held using (queue, kind) full join done using (queue, kind) order by 1, 2`

  // A page of discarded jobs, by the index on status and end: how long the history is does not matter.
  const discarded = `select f.id::text as id, ${micros("f.finished_at")} as at from ${s}.finished f
    where f.status = 'discarded' and f.finished_at < timestamptz 'epoch' + $5::int8::float8 * interval '1 microsecond'
      and (f.finished_at, f.id) > (timestamptz 'epoch' + $3::int8::float8 * interval '1 microsecond', $4::uuid)
      and ($1::text is null or f.kind = $1::text) and ($2::text is null or f.queue = $2::text)
    order by f.finished_at, f.id limit $6::int4`

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
        select f.attempt, f.error ->> 'tag'::text, f.error ->> 'message'::text, f.error -> 'error'::text, f.worker, f.started_at, f.finished_at, 9223372036854775807
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

  const clock = `select ${micros("pg_catalog.clock_timestamp()")} as now`

  return { look, stats, discarded, inspect, attempts, ends, clock }
}

/**
 * Builds the verbs that read for one quoted schema. Those that take `inUserTransaction` then see what the transaction that
 * is open has done.
 */
export const make = (db: Database.Database, s: string) => {
  const texts = statements(s)
  const answered = Database.answeredWithin(Database.answerBound)
  const read = (inUserTransaction: boolean, text: string, params: ReadonlyArray<unknown>) =>
    inUserTransaction ? Database.here<any>(db, text, params) : answered(db.query<any>(text, params))

  const verbs = {
    /**
     * Tells for each queue whether something is due and how many milliseconds until the next is. With `news`, due is only
     * what became due in the last so many milliseconds, queue by queue.
     */
    look: (
      queues: ReadonlyArray<string>,
      lanes: ReadonlyArray<number>,
      news: ReadonlyArray<number> = queues.map(() => everything)
    ): Effect.Effect<
      ReadonlyArray<{ readonly queue: string; readonly due: boolean; readonly wait: number | null }>,
      SqlError
    > => db.query<any>(texts.look, [queues, lanes, news.map(String)]),

    /**
     * Counts jobs by queue and kind.
     */
    stats: (inUserTransaction: boolean): Effect.Effect<ReadonlyArray<Stats>, SqlError> =>
      // As long as it takes: it reads the whole history.
      Database.run<any>(db, inUserTransaction, texts.stats, []),

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
      read(inUserTransaction, texts.ends, [ids])
  }
  return { texts, verbs }
}
