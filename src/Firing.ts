/**
 * The statements that make jobs of ticks: a tick enqueued and its schedule moved on in one statement, ticks that have waited,
 * and those that people ask for.
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
import { micros, millis } from "./Inspection.ts"
import type { People } from "./Intervention.ts"

/** What happens to a tick while the job of an earlier one has not ended. */
export type Overlap = "allow" | "skip" | "queue"

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
export const unchanged = (column: string) =>
  `coalesce(case when pg_catalog.isfinite(${column}) then ${micros(column)} else ${column}::text end, '')`

/** A time from milliseconds since the epoch. */
export const instant = (value: string) => `timestamptz 'epoch' + ${value}::float8 * interval '1 millisecond'`

/** Locks one schedule, and reads what whoever acts on it has to know. */
export const oneText = (s: string): string =>
  `select spec, time_zone, ${millis("previous_at")} as previous, overlap, pg_catalog.cardinality(waiting) as waiting,
      ${millis("pg_catalog.clock_timestamp()")} as now
    from ${s}.schedule where name = $1::text for update`

/**
 * Builds the statements for one quoted schema.
 */
const statements = (s: string) => {
  const clock = "clock as materialized (select pg_catalog.clock_timestamp() as now)"
  const impatient = (parameter: string) =>
    `clock as materialized (select pg_catalog.clock_timestamp() as now, pg_catalog.set_config('lock_timeout', ${parameter}::text, true) as patience)`

  // The ticks in `wanted` become jobs of the schedules in `mine`. A tick that is there already, or has ended, is none again,
  // and takes no key. The last look into `finished` has a newer snapshot and refuses what the first one could not see yet.
  const jobs = `fresh as materialized (
      select w.id, w.at, m.name, m.kind, m.queue, m.priority, m.max_attempts, m.timeout_ms, m.payload, m.metadata,
        m.overlap = 'queue' as awaited, m.unique_key, m.unique_until,
        clock.now + m.unique_period_ms::float8 * interval '1 millisecond' as expires_at,
        greatest(clock.now, w.at + w.spread * interval '1 millisecond') as run_at
      from wanted w join mine m using (name) cross join clock
      where not exists (select 1 from ${s}.finished f where f.id = w.id offset 0)
        and not exists (select 1 from ${s}.archive a where a.id = w.id offset 0)
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
        and not exists (select 1 from ${s}.archive a where a.id = t.id offset 0)
        and not exists (select 1 from ${s}.job j where j.id = t.id offset 0) as waits
      from (
        select t.name, t.at, ${s}.tick_id(t.name, t.at) as id, m.busy, m.heeded, m.jitter_ms,
          pg_catalog.row_number() over (partition by t.name order by t.at) as n
        from (select i.name, ${
    instant("i.at")
  } as at from unnest($1::text[], $2::text[]) as i(name, at)) t join mine m using (name)
      ) t
    ), wanted as materialized (
      select name, at, id, pg_catalog.random() * jitter_ms::float8 as spread from ticks where heeded = 'allow' or (n = 1 and not busy)
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
  // As it is where nothing is added: written anew, a full one is 80 KB at every tick.
  const waiting = `case when d.ats is null or pg_catalog.cardinality(s.waiting) >= ${mostWaiting} then s.waiting
      else (pg_catalog.array_cat(s.waiting, d.ats))[1:${mostWaiting}] end`

  // Locked rows are somebody else's: what he does with them, he does. A row that has changed since it was read is dropped by
  // the conditions, which are looked at again when the lock is there.
  const fire = `with ${impatient("$9")}, mine as materialized (
      select s.*, s.overlap as heeded, i.following, i.passed, ${busy}
      from (select * from unnest($3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[])
        as i(name, next_at, updated_at, last_job, following, passed) order by name) i
      cross join lateral (
        select s.* from ${s}.schedule s
        where s.name = i.name and ${unchanged("s.next_at")} = i.next_at and ${unchanged("s.updated_at")} = i.updated_at
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
  const follow = `with ${impatient("$3")}, mine as materialized (
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

  return { fire, follow, backfill, trigger, expire }
}

/**
 * Builds the verbs of ticks for one quoted schema. Those that take `inUserTransaction` are then part of the transaction that is
 * open.
 */
export const make = (db: Database.Database, s: string, { run, together }: People) => {
  const texts = statements(s)
  const one = oneText(s)
  // Sound: what the statement builds.
  const firedOf = ([row]: ReadonlyArray<any>): ReadonlyArray<Fired> => JSON.parse(row.fired)

  const verbs = {
    /**
     * Enqueues the ticks of schedules and moves these on: those that are still as they were read. The others are not among
     * the answers.
     */
    fire: (advances: ReadonlyArray<Advance>, wait = patience): Effect.Effect<ReadonlyArray<Fired>, SqlError> =>
      Effect.map(
        db.query<any>(texts.fire, [
          advances.flatMap(({ row, ticks }) => ticks.map(() => row.name)),
          advances.flatMap(({ ticks }) => ticks.map(String)),
          advances.map(({ row }) => row.name),
          advances.map(({ row }) => row.next_at),
          advances.map(({ row }) => row.updated_at),
          advances.map(({ row }) => row.last_job ?? ""),
          advances.map(({ next }) => next === undefined ? "" : String(next)),
          advances.map(({ previous }) => previous === undefined ? "" : String(previous)),
          String(wait)
        ]),
        firedOf
      ),

    /**
     * Enqueues the first waiting tick of schedules whose last job was this one and has ended. Returns the queues.
     */
    follow: (
      free: ReadonlyArray<{ readonly name: string; readonly job: string | null }>,
      wait = patience
    ): Effect.Effect<ReadonlyArray<string>, SqlError> =>
      Effect.map(
        db.query<any>(texts.follow, [free.map(({ name }) => name), free.map(({ job }) => job ?? ""), String(wait)]),
        ([row]) => Database.listOf(row.queues)
      ),

    /**
     * Removes the unique keys of these schedules whose period is over.
     */
    expireKeys: (names: ReadonlyArray<string>): Effect.Effect<void, SqlError> =>
      Effect.asVoid(db.query<any>(texts.expire, [names])),

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
          yield* run(inUserTransaction, one, [name])
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
          const [row] = yield* run(inUserTransaction, one, [name])
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
