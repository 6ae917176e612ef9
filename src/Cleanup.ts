/**
 * The statements of what the processes do for all of them by turns: whose turn it is, what they have agreed on, and the end
 * of what nobody needs any more, finished jobs and expired keys.
 *
 * @since 0.1.0
 */
import * as Effect from "effect/Effect"
import type { SqlError } from "effect/sql/SqlError"
import type * as Database from "./Database.ts"
import { micros } from "./Inspection.ts"

/** How a job can have ended, each with a retention of its own. */
export const endings = ["completed", "cancelled", "discarded"] as const
/** How a job can have ended. */
export type Ending = (typeof endings)[number]

/** How long finished jobs are kept where nobody says otherwise, in milliseconds: a day, and a week. */
const kept: Record<Ending, number> = { completed: 86_400_000, cancelled: 604_800_000, discarded: 604_800_000 }

/** Whether it is this process's turn; `interval`, and how long to `wait` for the next turn, in milliseconds. */
export interface Turn {
  readonly taken: boolean
  readonly interval: number
  readonly wait: number
  /** Where the last one has stopped. */
  readonly position: string | undefined
}

/** What a policy says, every field of it; `retention` in milliseconds, `Infinity` for ever. */
export interface Policy {
  readonly interval?: number
  readonly strategy?: "delete" | "archive"
  readonly retention?: { readonly [E in Ending]?: number }
}

/** What one statement has removed, and after which moment (microseconds) the next one goes on. */
export interface Removed {
  readonly count: number
  /** How many it has looked at: others may hold something of one. */
  readonly found: number
  readonly last: string | null
}

/** Before the first of everything, in microseconds. */
const start = "-1"

const columns =
  `id, kind, queue, priority, status, reason, result, error, attempt, max_attempts, timeout_ms, rescued, snoozed,
      lease, worker, group_key, trace, metadata, enqueued_at, scheduled_for, started_at, finished_at, payload, progress`

/**
 * Builds the statements for one quoted schema.
 */
const statements = (s: string) => {
  const from = (parameter: string) => `timestamptz 'epoch' + ${parameter}::int8 * interval '1 microsecond'`

  // Everybody asks, nobody leads. Skipped when locked; judged again when somebody has just had the turn, with a newer clock
  // than theirs, which is therefore read per row and not once. A turn in the future is one from before the clock went back.
  // Whoever asks for it `anyway` has found the row locked again and again, by a stranger, and goes on without it.
  const take = `with policy as materialized (
      select coalesce((
        select greatest(10, (value ->> 'interval')::float8) from ${s}.setting
        where name = $1::text and value ->> 'interval' is not null
      ), $2::float8) as interval_ms
    ), taken as (
      update ${s}.task set ran_at = clock_timestamp() where name = any (array(
        select t.name from ${s}.task t
        where t.name = $1::text and (t.ran_at <= clock_timestamp() - (select interval_ms from policy) * interval '1 millisecond'
          or t.ran_at > clock_timestamp() + interval '1 second')
        for update skip locked))
      returning position
    ), first as (
      insert into ${s}.task (name, ran_at) select $1::text, clock_timestamp()
      where not exists (select 1 from ${s}.task where name = $1::text) on conflict (name) do nothing returning position
    ), held as (
      select t.position from ${s}.task t where t.name = $1::text and not exists (select 1 from taken)
        and $3::boolean and t.ran_at <= clock_timestamp() - (select interval_ms from policy) * interval '1 millisecond'
    ), turn as (select position from taken union all select position from first union all select position from held)
    select exists (select 1 from turn) as taken, (select position from turn) as position, p.interval_ms as interval,
      greatest(0, p.interval_ms - coalesce((
        select case when isfinite(t.ran_at) then extract(epoch from clock_timestamp() - t.ran_at) * 1000 else p.interval_ms end
        from ${s}.task t where t.name = $1::text
      ), 0))::float8 as wait
    from policy p`

  const free = `name = any (array(select t.name from ${s}.task t where t.name = $1::text for update skip locked))`
  const renew = `update ${s}.task set ran_at = clock_timestamp() where ${free}`
  const goOn = `update ${s}.task set position = nullif($2::text, '') where ${free}`

  // Field by field, so that nobody takes back what another has said by not saying it.
  const merge = `insert into ${s}.setting as s (name, value)
    select $1::text, n.value::json from (select $2::jsonb as value) n
    on conflict (name) do update set updated_at = clock_timestamp(), value = (
      select (o.value || n.value || case when n.value ? 'retention' then jsonb_build_object('retention',
          case when jsonb_typeof(o.value -> 'retention') = 'object' then o.value -> 'retention' else '{}' end || (n.value -> 'retention'))
        else '{}' end)::json
      from (select excluded.value::jsonb as value) n, (
        select case when json_typeof(s.value) = 'object' then s.value::jsonb else '{}' end as value
      ) o)`

  // The policy is read where it is followed, under a lock that whoever changes it waits for: once it says archive, nothing
  // is deleted any more, and a statement that has waited for the change follows it. What is not plainly "delete" is kept.
  // In the order of the index and after a cursor, because what has gone is walked over again until vacuum has been there.
  // Whoever retries or deletes one of these jobs has it locked, and comes first; and so does who has locked one of its attempts.
  const prune = `with policy as materialized (
      select value from ${s}.setting where name = 'cleanup' for share
    ), rule as materialized (
      select coalesce(p.value ->> 'strategy', 'delete') <> 'delete' as keep, clock_timestamp() - greatest(0, least(1e13,
          coalesce((p.value -> 'retention' ->> $1::text)::float8, case $1::text ${
    endings.map((ending) => `when '${ending}' then ${kept[ending]}`).join(" ")
  } end))) * interval '1 millisecond' as before
      from (select 1) one left join policy p on true
    ), old as materialized (
      select f.* from rule r cross join lateral (
        select f.ctid as tid, f.id, f.finished_at from ${s}.finished f
        where f.status = $1::text and f.finished_at >= ${from("$3")} and f.finished_at < r.before
        order by f.finished_at limit $2::int4 for update skip locked
      ) f
    ), tried as materialized (
      select a.tid from old o cross join lateral (
        select a.ctid as tid from ${s}.attempt a where a.job = o.id and not (select keep from rule) for update skip locked
      ) a
    ), busy as materialized (
      select a.job from old o cross join lateral (
        select a.job from ${s}.attempt a
        where a.job = o.id and not (select keep from rule) and a.ctid not in (select tid from tried) offset 0
      ) a
    ), gone as (
      delete from ${s}.finished where ctid = any (array(select tid from old where id not in (select job from busy)))
      returning ${columns}
    ), kept as (
      -- A row that is there already is this one, which somebody has copied back: the same job ends again at another time.
      insert into ${s}.archive (${columns}) select ${columns} from gone where (select keep from rule)
      on conflict (id, finished_at) do nothing
    ), attempts as (
      delete from ${s}.attempt where job = any (array(
        select g.id from gone g where not (select keep from rule)
          and not exists (select 1 from ${s}.archive a where a.id = g.id offset 0)))
    )
    select (select count(*) from gone)::int4 as count, (select count(*) from old)::int4 as found,
      (select ${micros("max(finished_at)")} from old) as last`

  // A key whose period is over can be taken by anybody, whether it is there or not. Judged again when somebody has just
  // given it a new period.
  const expire = `with old as materialized (
      select u.key, u.expires_at from ${s}.unique_key u
      where u.expires_at >= ${from("$2")} and u.expires_at <= statement_timestamp()
      order by u.expires_at limit $1::int4 for update skip locked
    ), gone as (
      delete from ${s}.unique_key where key = any (array(select key from old))
    )
    select count(*)::int4 as count, count(*)::int4 as found, ${micros("max(expires_at)")} as last from old`

  return { take, renew, goOn, mergePolicy: merge, prune, expire }
}

/**
 * Builds the verbs of these for one quoted schema.
 */
export const make = (db: Database.Database, s: string) => {
  const texts = statements(s)
  const run = (text: string, params: ReadonlyArray<unknown>) => Effect.asVoid(db.query<any>(text, params))
  const here = (text: string, params: ReadonlyArray<unknown>) => db.own.unsafe<any>(text, params).unprepared
  const removed = (rows: ReadonlyArray<any>): Removed => rows[0]

  const verbs = {
    /**
     * Takes the turn of a task when nobody has had it for `interval` milliseconds, or for what the policy says; not when its
     * row is locked, unless that is asked for.
     */
    take: (task: string, interval: number, anyway = false): Effect.Effect<Turn, SqlError> =>
      Effect.map(db.query<any>(texts.take, [task, interval, anyway]), ([row]) => ({
        ...row,
        position: row.position ?? undefined
      })),

    /**
     * Says that the turn goes on: nobody is to take over what takes longer than the interval.
     */
    renew: (task: string): Effect.Effect<void, SqlError> => run(texts.renew, [task]),

    /**
     * Says where the next turn goes on; from the beginning when `undefined`.
     */
    goOn: (task: string, position: string | undefined): Effect.Effect<void, SqlError> =>
      run(texts.goOn, [task, position ?? ""]),

    /**
     * Adds to what the processes have agreed on; what is not said stays as it is.
     */
    mergePolicy: (task: string, policy: Policy): Effect.Effect<void, SqlError> =>
      // JSON has no `Infinity`.
      run(texts.mergePolicy, [task, JSON.stringify(policy, (_, one) => one === Infinity ? "Infinity" : one)]),

    /**
     * Removes up to `limit` of the oldest jobs that have ended so, after the moment `after`, whose retention is over.
     */
    prune: (ending: Ending, limit: number, after: string = start): Effect.Effect<Removed, SqlError> =>
      Effect.map(here(texts.prune, [ending, limit, after]), removed),

    /**
     * Removes up to `limit` unique keys whose period is over, after the moment `after`.
     */
    expire: (limit: number, after: string = start): Effect.Effect<Removed, SqlError> =>
      Effect.map(here(texts.expire, [limit, after]), removed)
  }
  return { texts, verbs }
}
