/**
 * The statements of cron schedules: what is due, a tick enqueued and its schedule advanced in one statement, and what people
 * do to them.
 *
 * Nobody holds a lock while he computes the next tick: rows are read, and written only if they are still as they were read
 * (`next_at`, `updated_at`, `last_job`). A process that is stopped in between holds up nobody, and its write changes nothing.
 *
 * Those that people use also run in the application's own sessions, whose search_path is not ours: functions are named with
 * their schema.
 *
 * @since 0.1.0
 */
import * as Effect from "effect/Effect"
import type { SqlError } from "effect/sql/SqlError"
import * as Database from "./Database.ts"
import { millis } from "./Inspection.ts"
import { impatiently } from "./Intervention.ts"

/** What happens to a tick while the job of an earlier one has not ended. */
export type Overlap = "allow" | "skip" | "queue"

/** A schedule as it is registered: everything resolved, everything checked. */
export interface Registration {
  readonly name: string
  readonly spec: string
  readonly timeZone: string
  readonly kind: string
  readonly queue: string
  readonly priority: number
  readonly maxAttempts: number
  /** These four in milliseconds. */
  readonly timeout: number | undefined
  readonly missedWindow: number
  readonly jitter: number
  readonly uniquePeriod: number | undefined
  /** JSON text. */
  readonly payload: string
  /** JSON text. */
  readonly metadata: string
  /** How many missed ticks are made up. */
  readonly missed: number
  readonly overlap: Overlap
  readonly uniqueKey: string | undefined
  readonly uniqueUntil: "started" | "finished"
  readonly version: number
  /** Its first tick from now on, in milliseconds since the epoch. */
  readonly next: number
}

/** What a scheduler needs to know of a schedule to advance it. Times are milliseconds since the epoch. */
export interface DueRow {
  readonly name: string
  readonly spec: string
  readonly time_zone: string
  /** `null` when nobody has computed it yet. */
  readonly due: number | null
  readonly previous: number | null
  readonly missed: number
  readonly missed_window_ms: number
  /** The database's clock. */
  readonly now: number
  /** Whether its jobs hold a unique key. */
  readonly keyed: boolean
  /** These three are what it must still be when it is written. */
  readonly next_at: string
  readonly updated_at: string
  readonly last_job: string | null
}

/** Which ticks of a schedule to enqueue, and where it stands after them. */
export interface Advance {
  readonly row: DueRow
  /** In order. */
  readonly ticks: ReadonlyArray<number>
  readonly previous: number | undefined
  readonly next: number | undefined
}

/** What became of the ticks of one schedule. */
export interface Fired {
  readonly name: string
  readonly queue: string
  readonly enqueued: number
  /** How many wait for the job before them. */
  readonly waiting: number
  /** How many will have no job: an earlier one has not ended, or somebody holds the key. */
  readonly skipped: number
  /** Milliseconds until the first of the jobs is due. */
  readonly delay: number
}

/** What a scheduler looks at from time to time. */
export interface Look {
  /** Milliseconds to the next tick; `null` when there is none. */
  readonly wait: number | null
  /** Whether there are schedules whose next tick nobody has computed. */
  readonly unset: boolean
  /** Schedules with ticks that wait for a job, and whether that has ended. */
  readonly waiting: ReadonlyArray<{ readonly name: string; readonly job: string | null; readonly free: boolean }>
}

/** A schedule as people see it. Times are milliseconds since the epoch. */
export interface ScheduleRow {
  readonly name: string
  readonly spec: string
  readonly time_zone: string
  readonly kind: string
  readonly queue: string
  readonly priority: number
  readonly max_attempts: number
  readonly timeout_ms: number | null
  /** These two are JSON text. */
  readonly payload: string
  readonly metadata: string
  readonly missed: number
  readonly missed_window_ms: number
  readonly overlap: Overlap
  readonly jitter_ms: number
  readonly version: number
  readonly next: number | null
  readonly previous: number | null
  readonly paused: number | null
  readonly problem: string | null
  readonly waiting: number
  readonly last_job: string | null
  readonly declared: boolean
  readonly undeclared: number | null
}

/** What somebody needs to know who acts on one schedule. */
export interface OneRow {
  readonly spec: string
  readonly time_zone: string
  readonly previous: number | null
  readonly overlap: Overlap
  readonly waiting: number
  readonly now: number
}

/** How many ticks of a schedule can wait for the job before them; the later ones are dropped. */
export const mostWaiting = 10_000

/** How long a statement waits for a transaction that has taken a key or an id of its jobs and not ended, in milliseconds. */
const patience = 200

/** A time as it must still be; also one without end, which somebody may have written by hand. */
const micros = (column: string) =>
  `coalesce(case when pg_catalog.isfinite(${column}) then (extract(epoch from ${column}) * 1000000)::int8::text else ${column}::text end, '')`
const instant = (millis: string) => `timestamptz 'epoch' + ${millis}::float8 * interval '1 millisecond'`

/**
 * Builds the statements for one quoted schema.
 */
const statements = (s: string) => {
  const clock = "clock as materialized (select pg_catalog.clock_timestamp() as now)"
  const impatient =
    `clock as materialized (select pg_catalog.clock_timestamp() as now, pg_catalog.set_config('lock_timeout', '${patience}', true) as patience)`

  // The ticks in `wanted` become jobs of the schedules in `mine`. A tick that is there already, or has ended, is none again,
  // and takes no key. The last look into `finished` has a newer snapshot and refuses what the first one could not see yet.
  const jobs = `fresh as materialized (
      select w.id, w.at, m.name, m.kind, m.queue, m.priority, m.max_attempts, m.timeout_ms, m.payload, m.metadata,
        m.overlap = 'queue' as awaited, m.unique_key, m.unique_until,
        clock.now + m.unique_period_ms * interval '1 millisecond' as expires_at,
        greatest(clock.now, w.at + w.spread * interval '1 millisecond') as run_at
      from wanted w join mine m using (name) cross join clock
      where not exists (select 1 from ${s}.finished f where f.id = w.id offset 0)
        and not exists (select 1 from ${s}.job j where j.id = w.id offset 0)
    ), keys as (
      insert into ${s}.unique_key (key, job, until, expires_at)
      select distinct on (unique_key) unique_key, id, unique_until, expires_at from fresh where unique_key is not null
      order by unique_key, at on conflict (key) do nothing returning job
    ), won as materialized (
      select * from fresh where unique_key is null or id in (select job from keys)
    ), inserted as (
      insert into ${s}.job (id, kind, queue, priority, run_at, scheduled_for, max_attempts, timeout_ms, payload, metadata, awaited, unique_key)
      select id, kind, queue, priority, run_at, at, max_attempts, timeout_ms, payload, metadata, awaited, unique_key from won
      on conflict (id) do nothing returning id, queue, priority, run_at, kind
    ), line as (
      insert into ${s}.ready (queue, lane, run_at, id, kind, attempt)
      select queue, priority, run_at, id, kind, 0 from inserted on conflict do nothing
    ), latest as (
      select distinct on (w.name) w.name, w.id from wanted w
      where w.id in (select id from won) or exists (select 1 from ${s}.job j where j.id = w.id offset 0)
      order by w.name, w.at desc
    )`
  const checked =
    `${s}.refuse_finished(coalesce((select pg_catalog.array_agg(id) from inserted), '{}'), 0)::text as checked`

  // `busy`: the job of an earlier tick has not ended, or ticks wait for it already. A tick that waits already, or has had its
  // job, does not begin to wait: that job may be forgotten by the time it would be its turn.
  const ticks = `ticks as materialized (
      select t.*, t.heeded = 'queue' and (t.n > 1 or t.busy) and not exists (select 1 from ${s}.finished f where f.id = t.id offset 0)
        and not exists (select 1 from ${s}.job j where j.id = t.id offset 0) as waits
      from (
        select t.name, t.at, ${s}.tick_id(t.name, t.at) as id, m.busy, m.heeded, m.jitter_ms,
          pg_catalog.row_number() over (partition by t.name order by t.at) as n
        from (select i.name, ${
    instant("i.at")
  } as at from unnest($1::text[], $2::text[]) as i(name, at)) t join mine m using (name)
      ) t
    ), wanted as materialized (
      select name, at, id, pg_catalog.random() * jitter_ms as spread from ticks where heeded = 'allow' or (n = 1 and not busy)
    ), delayed as materialized (
      select name, pg_catalog.array_agg(at order by at) as ats from (
        select name, at from ticks where waits except select m.name, w.at from mine m cross join lateral pg_catalog.unnest(m.waiting) as w(at)
      ) d group by name
    )`
  const busy = `case when s.overlap = 'allow' then false
      else pg_catalog.cardinality(s.waiting) > 0 or exists (select 1 from ${s}.job j where j.id = s.last_job offset 0) end as busy`
  const report = `select coalesce(pg_catalog.json_agg(r)::text, '[]') as fired, ${checked} from (
      select m.name, m.queue, pg_catalog.count(i.id)::int4 as enqueued,
        pg_catalog.count(t.id) filter (where t.waits)::int4 as waiting,
        pg_catalog.count(t.id) filter (where i.id is null and not t.waits)::int4 as skipped,
        coalesce(pg_catalog.min(${millis("i.run_at - clock.now")}), 0) as delay
      from mine m cross join clock left join ticks t using (name) left join inserted i on i.id = t.id
      group by m.name, m.queue
    ) r`
  const waiting = `(s.waiting || coalesce(d.ats, '{}'))[1:${mostWaiting}]`

  // Locked rows are somebody else's: what he does with them, he does. A row that has changed since it was read is dropped by
  // the conditions, which are looked at again when the lock is there.
  const fire = `with ${impatient}, mine as materialized (
      select s.*, s.overlap as heeded, i.following, i.passed, ${busy}
      from (select * from unnest($3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[])
        as i(name, next_at, updated_at, last_job, following, passed) order by name) i
      cross join lateral (
        select s.* from ${s}.schedule s
        where s.name = i.name and ${micros("s.next_at")} = i.next_at and ${micros("s.updated_at")} = i.updated_at
          and coalesce(s.last_job::text, '') = i.last_job and s.paused_at is null and s.problem is null
        for update skip locked
      ) s
    ), ${ticks}, ${jobs}, moved as (
      update ${s}.schedule s set next_at = ${instant("nullif(m.following, '')")},
        previous_at = greatest(s.previous_at, ${instant("nullif(m.passed, '')")}),
        waiting = ${waiting}, last_job = coalesce(l.id, s.last_job)
      from mine m left join delayed d using (name) left join latest l using (name) where s.name = m.name
    ) ${report}`

  // The job before it has ended, by a look: the first tick that waits. Of two who have looked only one finds `last_job` as
  // it was.
  const follow = `with ${impatient}, mine as materialized (
      select s.* from (select * from unnest($1::text[], $2::text[]) as i(name, last_job) order by name) i
      cross join lateral (
        select s.* from ${s}.schedule s
        where s.name = i.name and coalesce(s.last_job::text, '') = i.last_job and pg_catalog.cardinality(s.waiting) > 0
          and s.paused_at is null and s.problem is null
        for update skip locked
      ) s
    ), wanted as materialized (
      select name, waiting[1] as at, ${s}.tick_id(name, waiting[1]) as id, 0::float8 as spread from mine
    ), ${jobs}, moved as (
      update ${s}.schedule s set waiting = s.waiting[2:], last_job = coalesce(l.id, s.last_job)
      from mine m left join latest l using (name) where s.name = m.name
    )
    select pg_catalog.json_agg(distinct queue)::text as queues, ${checked} from mine`

  const backfill = `with ${clock}, mine as materialized (
      select s.*, case when s.overlap = 'queue' then 'queue' else 'allow' end as heeded, ${busy}
      from ${s}.schedule s where s.name = $3::text for update
    ), ${ticks}, ${jobs}, moved as (
      update ${s}.schedule s set waiting = ${waiting}, last_job = coalesce(l.id, s.last_job)
      from mine m left join delayed d using (name) left join latest l using (name) where s.name = m.name and m.heeded = 'queue'
    ) ${report}`

  // An extra job now. The schedule heeds it as its own when none of its jobs is there.
  const trigger = `with ${clock}, mine as materialized (
      select s.*, ${busy} from ${s}.schedule s where s.name = $1::text for update
    ), wanted as materialized (
      select m.name, clock.now as at, $2::uuid as id, 0::float8 as spread from mine m cross join clock
    ), ${jobs}, moved as (
      update ${s}.schedule s set last_job = l.id from mine m join latest l using (name)
      where s.name = m.name and m.overlap <> 'allow' and not m.busy
    )
    select m.queue, (select pg_catalog.count(*) from inserted) > 0 as inserted,
      (select k.job::text from ${s}.unique_key k where k.key = m.unique_key) as holder, ${checked}
    from mine m`

  // Keys whose period is over, of schedules that are about to fire.
  const expire = `delete from ${s}.unique_key where key = any (array(
      select u.key from ${s}.schedule s cross join lateral (
        select u.key from ${s}.unique_key u
        where u.key = s.unique_key and case when u.expires_at <= pg_catalog.clock_timestamp() then true else false end for update skip locked
      ) u where s.name = any ($1::text[])))`

  const look = `select
      (select ${
    millis("next_at - clock_timestamp()")
  } from ${s}.schedule where next_at is not null order by next_at limit 1) as wait,
      exists (select 1 from ${s}.schedule where next_at is null and paused_at is null and problem is null) as unset,
      (select json_agg(json_build_object('name', w.name, 'job', w.last_job, 'free', w.free))::text
        from (
          select name, last_job, not exists (select 1 from ${s}.job j where j.id = s.last_job offset 0) as free from ${s}.schedule s
          where cardinality(waiting) > 0 and paused_at is null and problem is null order by free desc, name limit 1000
        ) w
      ) as waiting`

  // Those that nobody has computed yet come first. In pages, because rows that somebody has locked must hide no others.
  const due = `select name, spec, time_zone, ${millis("next_at")} as due, ${millis("previous_at")} as previous,
      missed, missed_window_ms::float8 as missed_window_ms, ${millis("statement_timestamp()")} as now,
      unique_key is not null as keyed, ${micros("next_at")} as next_at, ${
    micros("updated_at")
  } as updated_at, last_job::text as last_job
    from (
      (select * from ${s}.schedule
        where $3::boolean and next_at is null and paused_at is null and problem is null and name > $2::text collate "C"
        order by name limit $4::int4)
      union all
      (select * from ${s}.schedule
        where next_at <= statement_timestamp()
          and ($3::boolean or (next_at, name) > (timestamptz 'epoch' + $1::int8 * interval '1 microsecond', $2::text collate "C"))
        order by next_at, name limit $4::int4)
    ) s order by s.next_at nulls first, s.name limit $4::int4`

  const disable = `update ${s}.schedule set problem = $3::text, next_at = null
    where name = (
      select name from ${s}.schedule where name = $1::text and $2::text in ('', ${
    micros("updated_at")
  }) and problem is null
      for update skip locked)`

  const definition =
    "spec, time_zone, kind, queue, priority, max_attempts, timeout_ms, payload, metadata, missed, missed_window_ms, overlap, jitter_ms, unique_key, unique_until, unique_period_ms, version"
  // JSON cannot be compared, its text can.
  const compared = (row: string) =>
    definition.split(", ").map((column) => `${row}.${column}${/payload|metadata/.test(column) ? "::text" : ""}`).join(
      ", "
    )
  // In the order of their names, so that two processes that start cannot deadlock, and only those that differ, so that nobody
  // waits for one that stays as it is. A schedule that keeps its times keeps its
  // next tick, also one that is overdue; one that changes them has none before the last one that it had.
  const register = `with input as materialized (
      select i.name, i.spec, i.time_zone, i.kind, i.queue, i.priority, i.max_attempts, nullif(i.timeout_ms, '')::int8 as timeout_ms,
        i.payload, i.metadata, i.missed, i.missed_window_ms::float8::int8 as missed_window_ms, i.overlap, i.jitter_ms::float8::int8 as jitter_ms,
        case when i.unique_key <> '' then ${s}.hash_key(i.kind, i.unique_key) end as unique_key, i.unique_until,
        nullif(i.unique_period_ms, '')::float8::int8 as unique_period_ms, i.version, ${instant("i.next")} as next_at
      from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::int2[], $7::int4[], $8::text[], $9::json[], $10::json[],
        $11::int4[], $12::text[], $13::text[], $14::text[], $15::text[], $16::text[], $17::text[], $18::int4[], $19::text[])
        as i(name, spec, time_zone, kind, queue, priority, max_attempts, timeout_ms, payload, metadata, missed, missed_window_ms, overlap,
          jitter_ms, unique_key, unique_until, unique_period_ms, version, next)
    ), written as (
      insert into ${s}.schedule as s (name, ${definition}, next_at, declared_at)
      select name, ${definition}, next_at, case when $20::boolean then pg_catalog.clock_timestamp() end from input i
      where not exists (
        select 1 from ${s}.schedule s where s.name = i.name
          and (s.version > i.version or s.problem is null and (${compared("s")}) is not distinct from (${
    compared("i")
  })))
      order by name
      on conflict (name) do update set
        ${definition.split(", ").map((column) => `${column} = excluded.${column}`).join(", ")},
        next_at = case
          when s.paused_at is not null then null
          when s.problem is null and s.spec = excluded.spec and s.time_zone = excluded.time_zone then s.next_at
          when excluded.next_at > coalesce(s.previous_at, timestamptz '-infinity') then excluded.next_at end,
        problem = null, updated_at = pg_catalog.clock_timestamp(), declared_at = excluded.declared_at, undeclared_at = null
      where excluded.version >= s.version and (s.problem is not null or (${compared("s")}) is distinct from (${
    compared("excluded")
  }))
      returning s.name
    )
    select (select pg_catalog.json_agg(name order by name)::text from written) as written,
      (select pg_catalog.json_agg(s.name order by s.name)::text from ${s}.schedule s join input i using (name) where s.version > i.version) as newer`

  // Every process that declares them says so from time to time; one of them is enough.
  const declare = `update ${s}.schedule set declared_at = clock_timestamp(), undeclared_at = null
    where name = any (array(
      select name from ${s}.schedule where name = any ($1::text[])
        and (declared_at is null or undeclared_at is not null or not declared_at between clock_timestamp() - $2::float8 * interval '1 millisecond' and clock_timestamp())
      order by name for update skip locked))`
  const undeclare = `update ${s}.schedule set undeclared_at = clock_timestamp()
    where name = any (array(
      select name from ${s}.schedule
      where declared_at < clock_timestamp() - $1::float8 * interval '1 millisecond' and undeclared_at is null
      order by name for update skip locked))
    returning name`

  const list =
    `select name, spec, time_zone, kind, queue, priority, max_attempts, timeout_ms::float8 as timeout_ms, payload::text as payload,
      metadata::text as metadata, missed, missed_window_ms::float8 as missed_window_ms, overlap, jitter_ms::float8 as jitter_ms, version,
      ${millis("next_at")} as next, ${millis("previous_at")} as previous, ${millis("paused_at")} as paused, problem,
      pg_catalog.cardinality(waiting) as waiting, last_job::text as last_job, declared_at is not null as declared, ${
      millis("undeclared_at")
    } as undeclared
    from ${s}.schedule order by name`
  const pause = `update ${s}.schedule set paused_at = coalesce(paused_at, pg_catalog.clock_timestamp()), next_at = null,
      updated_at = pg_catalog.clock_timestamp()
    where name = $1::text returning name`
  const one = `select spec, time_zone, ${
    millis("previous_at")
  } as previous, overlap, pg_catalog.cardinality(waiting) as waiting,
      ${millis("pg_catalog.clock_timestamp()")} as now
    from ${s}.schedule where name = $1::text for update`
  const resume =
    `update ${s}.schedule set paused_at = null, next_at = case when paused_at is null and problem is null then next_at
        else ${instant("nullif($2::text, '')")} end,
      problem = nullif($3::text, ''), updated_at = pg_catalog.clock_timestamp()
    where name = $1::text and (paused_at is not null or problem is not null)`
  const remove = `delete from ${s}.schedule where name = $1::text returning name`

  return {
    fire,
    follow,
    backfill,
    trigger,
    expire,
    look,
    due,
    disable,
    register,
    declare,
    undeclare,
    list,
    pause,
    one,
    resume,
    remove
  }
}

/**
 * Builds the verbs of schedules for one quoted schema. Those that take `inUserTransaction` are then part of the transaction
 * that is open.
 */
export const make = (db: Database.Database, s: string) => {
  const texts = statements(s)
  const answered = Database.answeredWithin(Database.answerBound)
  const run = (inUserTransaction: boolean, text: string, params: ReadonlyArray<unknown>) =>
    (inUserTransaction ? db.app : db.own).unsafe<any>(text, params).unprepared
  /** In the caller's transaction, or in one of its own that does not wait for somebody's open one without end. */
  const together = <A>(inUserTransaction: boolean, self: Effect.Effect<A, SqlError>) =>
    inUserTransaction ? self : answered(impatiently(db, self))
  // Sound: what the statement builds.
  const firedOf = ([row]: ReadonlyArray<any>): ReadonlyArray<Fired> => JSON.parse(row.fired)

  const verbs = {
    /**
     * Enqueues the ticks of schedules and moves these on: those that are still as they were read. The others are not among
     * the answers.
     */
    fire: (advances: ReadonlyArray<Advance>): Effect.Effect<ReadonlyArray<Fired>, SqlError> =>
      Effect.map(
        db.query<any>(texts.fire, [
          advances.flatMap(({ row, ticks }) => ticks.map(() => row.name)),
          advances.flatMap(({ ticks }) => ticks.map(String)),
          advances.map(({ row }) => row.name),
          advances.map(({ row }) => row.next_at),
          advances.map(({ row }) => row.updated_at),
          advances.map(({ row }) => row.last_job ?? ""),
          advances.map(({ next }) => next === undefined ? "" : String(next)),
          advances.map(({ previous }) => previous === undefined ? "" : String(previous))
        ]),
        firedOf
      ),

    /**
     * Enqueues the first waiting tick of schedules whose last job was this one and has ended. Returns the queues.
     */
    follow: (
      free: ReadonlyArray<{ readonly name: string; readonly job: string | null }>
    ): Effect.Effect<ReadonlyArray<string>, SqlError> =>
      Effect.map(
        db.query<any>(texts.follow, [free.map(({ name }) => name), free.map(({ job }) => job ?? "")]),
        ([row]) => Database.listOf(row.queues)
      ),

    /**
     * Removes the unique keys of these schedules whose period is over.
     */
    expireKeys: (names: ReadonlyArray<string>): Effect.Effect<void, SqlError> =>
      Effect.asVoid(db.query<any>(texts.expire, [names])),

    /**
     * Looks when the next tick is due.
     */
    look: (): Effect.Effect<Look, SqlError> =>
      Effect.map(db.query<any>(texts.look, []), ([row]) => ({
        wait: row.wait,
        unset: row.unset,
        waiting: row.waiting === null ? [] : JSON.parse(row.waiting)
      })),

    /**
     * Reads up to `limit` due schedules after the row `after`: those whose next tick nobody has computed, then the others in
     * the order of their ticks.
     */
    due: (
      limit: number,
      after?: DueRow
    ): Effect.Effect<ReadonlyArray<DueRow>, SqlError> =>
      db.query<DueRow>(texts.due, [
        after === undefined || after.next_at === "" ? "0" : after.next_at,
        after?.name ?? "",
        after === undefined || after.next_at === "",
        limit
      ]),

    /**
     * Stops a schedule that cannot fire, and says why; one that has changed since it was read, when that is known, goes on.
     */
    disable: (name: string, updatedAt: string | undefined, problem: string): Effect.Effect<void, SqlError> =>
      Effect.asVoid(db.query<any>(texts.disable, [name, updatedAt ?? "", problem])),

    /**
     * Writes schedules, where they differ and are not of an older version. Returns those that were written, and those whose
     * row is of a newer version.
     */
    register: (
      registrations: ReadonlyArray<Registration>,
      declared: boolean,
      inUserTransaction: boolean
    ): Effect.Effect<{ readonly written: ReadonlyArray<string>; readonly newer: ReadonlyArray<string> }, SqlError> =>
      together(
        inUserTransaction,
        Effect.map(
          run(inUserTransaction, texts.register, [
            registrations.map((one) => one.name),
            registrations.map((one) => one.spec),
            registrations.map((one) => one.timeZone),
            registrations.map((one) => one.kind),
            registrations.map((one) => one.queue),
            registrations.map((one) => one.priority),
            registrations.map((one) => one.maxAttempts),
            registrations.map((one) => one.timeout === undefined ? "" : String(one.timeout)),
            registrations.map((one) => one.payload),
            registrations.map((one) => one.metadata),
            registrations.map((one) => one.missed),
            registrations.map((one) => String(one.missedWindow)),
            registrations.map((one) => one.overlap),
            registrations.map((one) => String(one.jitter)),
            registrations.map((one) => one.uniqueKey ?? ""),
            registrations.map((one) => one.uniqueUntil),
            registrations.map((one) => one.uniquePeriod === undefined ? "" : String(one.uniquePeriod)),
            registrations.map((one) => one.version),
            registrations.map((one) => String(one.next)),
            declared
          ]),
          ([row]) => ({ written: Database.listOf(row.written), newer: Database.listOf(row.newer) })
        )
      ),

    /**
     * Says that a running process declares these schedules, unless one has said so in the last `within` milliseconds.
     */
    declare: (names: ReadonlyArray<string>, within: number): Effect.Effect<void, SqlError> =>
      Effect.asVoid(db.query<any>(texts.declare, [names, within])),

    /**
     * Marks the schedules that were declared once and by no process in the last `within` milliseconds. Returns their names.
     */
    undeclare: (within: number): Effect.Effect<ReadonlyArray<string>, SqlError> =>
      Effect.map(db.query<any>(texts.undeclare, [within]), (rows) => rows.map(({ name }) => name)),

    /**
     * Reads all schedules, by name.
     */
    list: (inUserTransaction: boolean): Effect.Effect<ReadonlyArray<ScheduleRow>, SqlError> =>
      answered(Database.run<ScheduleRow>(db, inUserTransaction, texts.list, [])),

    /**
     * Stops a schedule until it is resumed; `false` when there is none.
     */
    pause: (name: string, inUserTransaction: boolean): Effect.Effect<boolean, SqlError> =>
      together(
        inUserTransaction,
        Effect.map(run(inUserTransaction, texts.pause, [name]), (rows) => rows.length > 0)
      ),

    /**
     * Lets a schedule that is paused, or has a problem, fire again, from the tick that `next` finds or with the problem that
     * it finds; `false` when there is none.
     */
    resume: (
      name: string,
      next: (row: OneRow) => { readonly next: number } | { readonly problem: string },
      inUserTransaction: boolean
    ): Effect.Effect<boolean, SqlError> =>
      together(
        inUserTransaction,
        Effect.flatMap(run(inUserTransaction, texts.one, [name]), ([row]) => {
          if (row === undefined) return Effect.succeed(false)
          const found = next(row)
          const params = "next" in found ? [name, String(found.next), ""] : [name, "", found.problem]
          return Effect.as(run(inUserTransaction, texts.resume, params), true)
        })
      ),

    /**
     * Removes a schedule; `false` when there is none.
     */
    remove: (name: string, inUserTransaction: boolean): Effect.Effect<boolean, SqlError> =>
      together(
        inUserTransaction,
        Effect.map(run(inUserTransaction, texts.remove, [name]), (rows) => rows.length > 0)
      ),

    /**
     * Enqueues an extra job of a schedule under the id given. `holder` is the job that holds its unique key when it was not
     * inserted; `undefined` when there is no such schedule.
     */
    trigger: (
      name: string,
      id: string,
      inUserTransaction: boolean
    ): Effect.Effect<
      { readonly queue: string; readonly inserted: boolean; readonly holder: string | null } | undefined,
      SqlError
    > =>
      together(
        inUserTransaction,
        Effect.gen(function*() {
          // First, so that what follows sees the job of a tick that was fired meanwhile.
          yield* run(inUserTransaction, texts.one, [name])
          yield* run(inUserTransaction, texts.expire, [[name]])
          const [row] = yield* run(inUserTransaction, texts.trigger, [name, id])
          return row
        })
      ),

    /**
     * Enqueues ticks of the past, 1 000 in one statement and all or none. `ticksOf` says which, or why not; `undefined` when
     * there is no such schedule.
     */
    backfill: (
      name: string,
      ticksOf: (row: OneRow) => ReadonlyArray<number> | string,
      inUserTransaction: boolean
    ): Effect.Effect<ReadonlyArray<Fired> | string | undefined, SqlError> =>
      together(
        inUserTransaction,
        Effect.gen(function*() {
          const [row] = yield* run(inUserTransaction, texts.one, [name])
          if (row === undefined) return undefined
          const ticks = ticksOf(row)
          if (typeof ticks === "string") return ticks
          const fired: Array<Fired> = []
          for (let start = 0; start < ticks.length; start += 1000) {
            const part = ticks.slice(start, start + 1000)
            yield* run(inUserTransaction, texts.expire, [[name]])
            const params = [part.map(() => name), part.map(String), name]
            fired.push(...firedOf(yield* run(inUserTransaction, texts.backfill, params)))
          }
          return fired
        })
      )
  }
  return { texts, verbs }
}
