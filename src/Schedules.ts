/**
 * The statements of cron schedules as rows: registered, looked at, found due, stopped, paused, removed.
 *
 * Those that people use also run in the application's own sessions, whose search_path is not ours: functions are named with
 * their schema.
 *
 * @since 0.1.0
 */
import * as Effect from "effect/Effect"
import type { SqlError } from "effect/sql/SqlError"
import * as Database from "./Database.ts"
import { type DueRow, instant, type OneRow, oneText, type Overlap, unchanged } from "./Firing.ts"
import { millis } from "./Inspection.ts"
import type { People } from "./Intervention.ts"

export type { Advance, DueRow, Fired, OneRow, Overlap } from "./Firing.ts"

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

/** What became of schedules that were registered: those that were written, and those whose row is of a newer version. */
export interface Registered {
  readonly written: ReadonlyArray<string>
  readonly newer: ReadonlyArray<string>
}

/** What a scheduler looks at from time to time. */
export interface Look {
  /** Whether a tick is due. */
  readonly due: boolean
  /** Milliseconds to the next one that is not yet; `null` when there is none. */
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

/**
 * Builds the statements for one quoted schema.
 */
const statements = (s: string) => {
  // Each part reads one entry, or all, of a partial index: schedules that have nothing to do cost nothing. What is due may be in
  // somebody's hands for long, and must not hide when the next tick is due. Of those that wait, free ones come first, because
  // something is to be done for them. `offset 0` keeps the look at the job a look-up: see `Insertion`.
  const look = `select exists (select 1 from ${s}.schedule where next_at <= statement_timestamp()) as due,
      (select ${
    millis("next_at - clock_timestamp()")
  } from ${s}.schedule where next_at > statement_timestamp() order by next_at limit 1) as wait,
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
      unique_key is not null as keyed, ${unchanged("next_at")} as next_at, ${
    unchanged("updated_at")
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
    unchanged("updated_at")
  }) and problem is null
      for update skip locked)
    returning name`

  const definition =
    "spec, time_zone, kind, queue, priority, max_attempts, timeout_ms, payload, metadata, missed, missed_window_ms, overlap, jitter_ms, unique_key, unique_until, unique_period_ms, version"
  // JSON cannot be compared, its text can.
  const compared = (row: string) =>
    definition.split(", ").map((column) => `${row}.${column}${/payload|metadata/.test(column) ? "::text" : ""}`).join(
      ", "
    )
  // In the order of their names, so that two processes that start cannot deadlock, and only those that differ, so that nobody
  // waits for one that stays as it is. A schedule that keeps its times keeps its next tick, also one that is overdue; one that
  // changes them has none before the last one that it had.
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
  const resume =
    `update ${s}.schedule set paused_at = null, next_at = case when paused_at is null and problem is null then next_at
        else ${instant("nullif($2::text, '')")} end,
      problem = nullif($3::text, ''), updated_at = pg_catalog.clock_timestamp()
    where name = $1::text and (paused_at is not null or problem is not null)`
  const remove = `delete from ${s}.schedule where name = $1::text returning name`

  return {
    look,
    due,
    disable,
    register,
    declare,
    undeclare,
    list,
    pause,
    one: oneText(s),
    resume,
    remove
  }
}

/**
 * Builds the verbs of schedules for one quoted schema. Those that take `inUserTransaction` are then part of the transaction
 * that is open.
 */
export const make = (db: Database.Database, s: string, { answered, run, together }: People) => {
  const texts = statements(s)
  const verbs = {
    /**
     * Looks when the next tick is due.
     */
    look: (): Effect.Effect<Look, SqlError> =>
      Effect.map(db.query<any>(texts.look, []), ([row]) => ({
        due: row.due,
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
     * Stops a schedule that cannot fire, and says why; one that has changed since it was read, when that is known, goes on, and
     * so does one that somebody has locked. Returns whether it was stopped.
     */
    disable: (name: string, updatedAt: string | undefined, problem: string): Effect.Effect<boolean, SqlError> =>
      Effect.map(db.query<any>(texts.disable, [name, updatedAt ?? "", problem]), (rows) => rows.length > 0),

    /**
     * Writes schedules, where they differ and are not of an older version. Returns those that were written, and those whose
     * row is of a newer version.
     */
    register: (
      registrations: ReadonlyArray<Registration>,
      declared: boolean,
      inUserTransaction: boolean
    ): Effect.Effect<Registered, SqlError> =>
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
      )
  }
  return { texts, verbs }
}
