/**
 * The statement that takes jobs out of the line under a lease: where it reads on, and what it brings.
 *
 * @since 0.1.0
 */
import * as Database from "./Database.ts"
import * as Inspection from "./Inspection.ts"
import { maxPayloadBytes } from "./Migrations.ts"

/** The first lane of suspects: jobs that have lost their worker more than once wait in 100 + priority. */
export const suspectLane = 100

const priorities = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9] as const
/** The lanes of the ten priorities. */
export const priorityLanes: ReadonlyArray<number> = priorities
/** The lanes of suspects. */
export const suspectLanes: ReadonlyArray<number> = priorities.map((priority) => suspectLane + priority)

/** Where a claim goes on reading one lane: after the row with this due time (microseconds) and id. */
export interface LaneCursor {
  readonly lane: number
  readonly runAt: string
  readonly id: string
}

/** The beginning of a lane. */
export const laneStart = (lane: number): LaneCursor => ({
  lane,
  // Year -4713 in microseconds, the smallest timestamp, would overflow the arithmetic; no row is due before 1970.
  runAt: "-1",
  id: Database.firstId
})

/** A claimed job. The columns of the job are `null` when its row is gone. */
export interface ClaimedRow {
  readonly id: string
  readonly lane: number
  readonly run_at: string
  readonly kind: string | null
  readonly priority: number
  readonly attempt: number
  readonly max_attempts: number
  readonly rescued: number
  readonly timeout_ms: number | null
  readonly trace: string | null
  readonly metadata: string
  readonly enqueued_at: number
  readonly scheduled_for: number
  /** The database's clock when it was claimed. */
  readonly claimed_at: number
  /** JSON text; `null` when it is larger than any payload may be. */
  readonly payload: string | null
  /** JSON text. */
  readonly progress: string | null
  /** It was cancelled while it stood in line, by a transaction that saw it elsewhere. */
  readonly cancelled: boolean
  /** The earlier attempts since it was enqueued or retried, oldest first, as JSON text of `AttemptRow`s. */
  readonly history: string | null
}

/** Reads the columns of a claim, in the order of its text. */
export const rowOf = (row: ReadonlyArray<unknown>): ClaimedRow => ({
  // Sound: the types of the columns in the text of the claim.
  id: row[0] as string,
  lane: row[1] as number,
  run_at: row[2] as string,
  kind: row[3] as string | null,
  priority: row[4] as number,
  attempt: row[5] as number,
  max_attempts: row[6] as number,
  rescued: row[7] as number,
  timeout_ms: row[8] as number | null,
  trace: row[9] as string | null,
  metadata: row[10] as string,
  enqueued_at: row[11] as number,
  scheduled_for: row[12] as number,
  claimed_at: row[13] as number,
  payload: row[14] as string | null,
  progress: row[15] as string | null,
  cancelled: row[16] as boolean,
  history: row[17] as string | null
})

/** One ended attempt. */
export interface AttemptRow {
  readonly n: number
  readonly tag: string
  readonly message: string | null
  readonly error: unknown
  /** Milliseconds since the epoch. */
  readonly at: number
}

/** What a claim is asked for. */
export interface Claim {
  readonly worker: string
  readonly lease: string
  readonly queue: string
  readonly lanes: ReadonlyArray<LaneCursor>
  readonly kinds: ReadonlyArray<string>
  readonly prefixes: ReadonlyArray<string>
  readonly limit: number
}

/**
 * The parameters of a claim.
 */
export const paramsOf = (claim: Claim): Array<unknown> => [
  claim.worker,
  claim.lease,
  claim.queue,
  Database.arrayText(claim.lanes.map((lane) => lane.lane)),
  Database.arrayText(claim.lanes.map((lane) => lane.runAt)),
  Database.arrayText(claim.lanes.map((lane) => lane.id)),
  claim.kinds,
  claim.prefixes,
  claim.limit
]

/**
 * How much text of its earlier attempts travels with a claimed job, in bytes: the latest that fit. A thousand attempts with
 * an error of 64 KiB each would be a row that no client can read.
 */
const historySize = 1_048_576

/**
 * Microseconds since the epoch, as a float8: exact for 80 years to come. `extract` would count in numeric, as everything
 * else does with `Inspection.micros`, and that was a fifth of what a claim costs.
 */
const microseconds = (column: string) => `round(date_part('epoch', ${column}) * 1000000)`

/**
 * What somebody has written past the limit may be more than a client can read: then the statement would fail each time, and
 * its connection with it. Compression makes text 255 times smaller at most, so that mostly a look at the stored size is enough.
 */
const payload = `case when pg_column_size(payload) < ${Math.floor(maxPayloadBytes / 256)} then payload::text
        when octet_length(payload::text) <= ${maxPayloadBytes} then payload::text end`

const runAt = `(${microseconds("due")})::int8::text`

/**
 * Builds the statement for one quoted schema.
 */
export const statement = (s: string): string => {
  // One probe per lane, each with its own limit, in lane order and only as far as needed: future jobs and lower
  // priorities cost nothing. Gated on the worker's own row in front of everything (`me`), so that a process declared
  // dead takes nothing. The kind filter is opaque (`case`), because no plan may be built around how rare a kind looks.
  // Losing the commit in a server crash only puts the jobs back in line, so it does not wait for the disk. A key that
  // somebody has locked is not waited for: it is released when the job has ended.
  return `with me as materialized (
      select $4::int2[] as lanes from ${s}.worker w
      where w.id = $1::uuid and set_config('synchronous_commit', 'off', true) is not null
      for key share
    ), picked as materialized (
      select r.tid, r.id, r.lane, r.run_at
      from unnest((select lanes from me), $5::int8[], $6::uuid[]) as l(lane, run_at, id)
      cross join lateral (
        select r.ctid as tid, r.id, r.lane, r.run_at from ${s}.ready r
        where r.queue = $3::text and r.lane = l.lane
          and (r.run_at, r.id) > (timestamptz 'epoch' + l.run_at * interval '1 microsecond', l.id)
          and r.run_at <= statement_timestamp()
          and case when r.kind = any ($7::text[]) or r.kind ^@ any ($8::text[]) then true else false end
        order by r.run_at, r.id limit $9::int4 for update skip locked
      ) r
      limit $9::int4
    ), taken as (
      delete from ${s}.ready where ctid = any (array(select tid from picked))
    ), held as (
      insert into ${s}.lease (id, worker, ids)
      select $2::uuid, $1::uuid, array_agg(id) from picked having count(*) > 0
    ), jobs as materialized (
      select p.lane, p.run_at as due, p.id as picked, j.* from picked p
      left join lateral (
        select j.id, j.kind, j.priority, j.attempt, j.max_attempts, j.rescued, j.timeout_ms, j.trace, j.metadata, j.enqueued_at,
          j.scheduled_for, j.payload, j.progress, j.cancelled_at, j.retried_at, j.unique_key
        from ${s}.job j where j.id = p.id offset 0
      ) j on true
    ), freed as (
      delete from ${s}.unique_key where key = any (array(
        select u.key from jobs j cross join lateral (
          select u.key from ${s}.unique_key u
          where u.key = j.unique_key and u.job = j.id and u.until = 'started' and u.expires_at is null for update skip locked
        ) u where j.unique_key is not null))
    )
    select picked::text as id, lane, ${runAt} as run_at, kind, priority, attempt, max_attempts,
      rescued, timeout_ms::float8 as timeout_ms, trace, metadata::text as metadata,
      ${microseconds("enqueued_at")} / 1000 as enqueued_at, ${microseconds("scheduled_for")} / 1000 as scheduled_for,
      ${microseconds("clock_timestamp()")} / 1000 as claimed_at, ${payload} as payload,
      progress::text as progress, cancelled_at is not null as cancelled, case when attempt > 0 or rescued > 0 then (
        select json_agg(json_build_object('n', a.n, 'tag', a.tag, 'at', ${Inspection.millis("a.ended_at")},
          'message', case when a.size <= ${historySize} then a.message end, 'error', case when a.size <= ${historySize} then a.error end) order by a.id)
        from (
          select a.*, sum(coalesce(octet_length(a.message), 0) + coalesce(octet_length(a.error::text), 0)) over (order by a.id desc) as size
          from ${s}.attempt a where a.job = picked and (retried_at is null or a.ended_at > retried_at)
        ) a)::text end as history
    from jobs`
}
