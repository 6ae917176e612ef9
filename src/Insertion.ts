/**
 * The statements that bring jobs in: insert, insert under a unique key, and what the losers of a key do next.
 *
 * They also run in the application's own sessions, whose search_path is not ours: functions are named with their schema
 * (`unnest` of several arrays is grammar, and always the built-in one).
 *
 * @since 0.1.0
 */

import { arrayText, column } from "./Database.ts"

/** A job as it is inserted: everything resolved, everything checked. */
export interface NewJob {
  readonly id: string
  readonly kind: string
  readonly queue: string
  readonly priority: number
  /** Milliseconds from now by the database's clock. */
  readonly delay: number
  /** Milliseconds since the epoch; wins over `delay`. */
  readonly runAt: number | undefined
  readonly maxAttempts: number
  readonly timeout: number | undefined
  /** JSON text. */
  readonly payload: string
  /** JSON text. */
  readonly metadata: string
  readonly trace: string | undefined
  readonly unique: UniqueRule | undefined
  /** The id is the caller's choice: finding it there need not be a replay of this insert. */
  readonly idGiven?: boolean
  /** Somebody waits for its end. */
  readonly awaited?: boolean
}

/** A resolved uniqueness rule. */
export interface UniqueRule {
  readonly key: string
  readonly period: number | undefined
  readonly until: "started" | "finished"
  readonly onConflict: "keep" | "replace" | "debounce"
}

const idOf = (job: NewJob): string => job.id
const payloadOf = (job: NewJob): string => job.payload

/** What every insert says of a job, in the order of its parameters. */
const fields: ReadonlyArray<(job: NewJob) => string | number> = [
  idOf,
  (job) => job.kind,
  (job) => job.queue,
  (job) => job.priority,
  (job) => String(job.delay),
  (job) => job.runAt === undefined ? "" : String(job.runAt),
  (job) => job.maxAttempts,
  (job) => job.timeout === undefined ? "" : String(job.timeout),
  payloadOf,
  (job) => job.metadata,
  (job) => job.trace ?? "",
  (job) => job.awaited === true ? "awaited" : ""
]

/** The parameters of `insert`. */
export const columnsOf = (jobs: ReadonlyArray<NewJob>, patience?: number): Array<unknown> => [
  ...fields.map((field) => jobs.map(field)),
  patienceOf(patience)
]

/** The parameter of a wait for strangers, in milliseconds: empty without a limit. */
export const patienceOf = (millis: number | undefined): string => millis === undefined ? "" : String(millis)

/**
 * The parameters of `insertNew`, as short as they can be: for 1 000 jobs the driver took 4.6 ms over 13 full columns, and
 * takes 0.9 ms over these.
 */
export const newColumnsOf = (jobs: ReadonlyArray<NewJob>): Array<unknown> =>
  fields.map((field) =>
    field === idOf ? arrayText(jobs.map(idOf)) : field === payloadOf ? jobs.map(payloadOf) : column(jobs, field)
  )

/** The parameters of `insertNewOne`: the notification goes out on `channel`, when there is one. */
export const oneColumnsOf = (job: NewJob, channel: string, notification: string): Array<unknown> => [
  ...fields.map((field) => field(job)),
  channel,
  notification
]

/** The parameters of `insertUnique`. */
export const keyedColumnsOf = (jobs: ReadonlyArray<NewJob>, patience?: number): Array<unknown> => [
  ...columnsOf(jobs, patience),
  jobs.map((job) => job.unique!.key),
  jobs.map((job) => job.unique!.until),
  jobs.map((job) => job.unique!.period === undefined ? "" : String(job.unique!.period))
]

/**
 * Gives a transaction that has found its job there something to commit. The commit that brought it in may have been given
 * up while it waited for a synchronous standby: then the job is there, and would not be after a fail-over. Only a commit of
 * something written waits for the standby, and for all that was written before.
 */
export const replayedText =
  "select pg_catalog.pg_logical_emit_message(true, 'effect-pgqueue'::text, 'replayed'::text)::text as written"

/** How long an insert waits for the lock of NOTIFY, in milliseconds. */
const notifyPatience = 20

const jobColumns =
  "id, kind, queue, priority, run_at, scheduled_for, max_attempts, timeout_ms, payload, metadata, trace, awaited, enqueued_at"

/**
 * When a job is due, and never before now. `delay` and `runAt` are texts: who asks for a time has no delay, and says so with
 * a `runAt` that is not empty.
 */
const dueAt = (now: string, delay: string, runAt: string): string =>
  `greatest(${now}, case when ${runAt} = '' then ${now} + ${delay}::float8 * interval '1 millisecond'
    else timestamptz 'epoch' + nullif(${runAt}, '')::float8 * interval '1 millisecond' end)`

/** Has the statement wait for a stranger's lock for so long and no longer, if there is a limit. */
const patiently = (parameter: string): string =>
  `case when ${parameter}::text <> '' then pg_catalog.set_config('lock_timeout', ${parameter}::text, true) end`

/**
 * Builds the statements for one quoted schema.
 */
export const statements = (s: string) => {
  // Ids that have ended are dropped before anything is inserted. `offset 0` keeps this a look-up per row: as a join,
  // or a hashed subplan, it reads the whole history. One clock for the statement, so that a batch keeps its order by id.
  // The lock timeout is for the one wait there can be: another transaction that has taken an id or a key and not ended.
  const input = (extraColumns: string, keyed: boolean) =>
    `clock as materialized (
      select pg_catalog.clock_timestamp() as now, ${patiently("$13")} as patience
    ),
    input as materialized (
      select ${
      keyed ? "distinct on (i.id) " : ""
    }i.id, i.kind, i.queue, i.priority, i.max_attempts, nullif(i.timeout_ms, '')::int8 as timeout_ms, i.payload,
        i.metadata, nullif(i.trace, '') as trace, i.awaited <> '' as awaited, clock.now as enqueued_at, ${
      dueAt("clock.now", "i.delay", "i.run_at")
    } as run_at${extraColumns}
      from clock, unnest($1::uuid[], $2::text[], $3::text[], $4::int2[], $5::text[], $6::text[], $7::int4[], $8::text[],
        $9::json[], $10::json[], $11::text[], $12::text[]${keyed ? ", $14::text[], $15::text[], $16::text[]" : ""})
        as i(id, kind, queue, priority, delay, run_at, max_attempts, timeout_ms, payload, metadata, trace, awaited${
      keyed ? ", key, until, period" : ""
    })
      where not exists (select 1 from ${s}.finished f where f.id = i.id offset 0)${
      keyed ? ` and not exists (select 1 from ${s}.job j where j.id = i.id offset 0)` : ""
    }
    )`
  // The last look into `finished` has a newer snapshot and refuses what the first one could not see yet.
  const insertion = (from: string, key: string, expected: string) =>
    `inserted as (
      insert into ${s}.job (${jobColumns}, unique_key)
      select id, kind, queue, priority, run_at, run_at, max_attempts, timeout_ms, payload, metadata, trace, awaited, enqueued_at, ${key} from ${from}
      on conflict (id) do nothing returning id, queue, priority, run_at, kind
    ), line as (
      insert into ${s}.ready (queue, lane, run_at, id, kind, attempt)
      select queue, priority, run_at, id, kind, 0 from inserted on conflict do nothing
    )
    select pg_catalog.count(*)::int4 as count, pg_catalog.array_to_string(pg_catalog.array_agg(id), ',') as ids,
      ${s}.refuse_finished(coalesce(pg_catalog.array_agg(id), '{}'), ${expected})::text as checked from inserted`

  const insert = `with ${input("", false)}, ${insertion("input", "null", "0")}`

  // Jobs whose ids were made for this very statement, in the queue's own sessions, whose settings `refuse_ended` relies on.
  // Neither looked for beforehand nor guarded against a conflict, which is a third of the work (12 us a job instead of 18).
  // Sent again after its answer was lost it fails, with 23505, or with what the last look raises when the job has ended
  // meanwhile; then `insert` is to be sent. A column of which there is only one value has it for all rows.
  const insertNew = `with clock as materialized (select pg_catalog.clock_timestamp() as now), inserted as (
      insert into ${s}.job (${jobColumns})
      select i.id, i.kind, i.queue, i.priority, i.run_at, i.run_at, i.max_attempts, i.timeout_ms, i.payload, i.metadata, i.trace, i.awaited, i.now
      from (
        select i.id, coalesce(i.kind, ($2::text[])[1]) as kind, coalesce(i.queue, ($3::text[])[1]) as queue,
          coalesce(i.priority, ($4::int2[])[1]) as priority, coalesce(i.max_attempts, ($7::int4[])[1]) as max_attempts,
          nullif(coalesce(i.timeout_ms, ($8::text[])[1]), '')::int8 as timeout_ms, i.payload,
          coalesce(i.metadata, ($10::json[])[1]) as metadata, nullif(coalesce(i.trace, ($11::text[])[1]), '') as trace,
          coalesce(i.awaited, ($12::text[])[1]) <> '' as awaited, c.now,
          ${dueAt("c.now", "coalesce(i.delay, ($5::text[])[1])", "coalesce(i.run_at, ($6::text[])[1])")} as run_at
        from clock c, unnest($1::uuid[], $2::text[], $3::text[], $4::int2[], $5::text[], $6::text[], $7::int4[], $8::text[],
          $9::json[], $10::json[], $11::text[], $12::text[])
          as i(id, kind, queue, priority, delay, run_at, max_attempts, timeout_ms, payload, metadata, trace, awaited)
        offset 0
      ) i
      returning id, queue, priority, run_at, kind
    ), line as (
      insert into ${s}.ready (queue, lane, run_at, id, kind, attempt) select queue, priority, run_at, id, kind, 0 from inserted
    )
    select ${s}.refuse_ended(pg_catalog.array_agg(id))::text as checked from inserted`

  // The same for one job, which comes without arrays, in three quarters of the time (400 us instead of 520 from call to
  // answer). It carries a notification when there is one, and fails with 55P03 rather than wait for the commit of a stranger's:
  // the lock of NOTIFY is one for all databases of the server.
  const insertNewOne = `with inserted as (
      insert into ${s}.job (${jobColumns})
      select $1::uuid, $2::text, $3::text, $4::int2, due.at, due.at, $7::int4, nullif($8::text, '')::int8, $9::json, $10::json, nullif($11::text, ''),
        $12::text <> '', clock.now
      from (select pg_catalog.clock_timestamp() as now offset 0) clock, lateral (
        select ${dueAt("clock.now", "$5::text", "$6::text")} as at offset 0
      ) due
      returning run_at
    ), line as (
      insert into ${s}.ready (queue, lane, run_at, id, kind, attempt) select $3::text, $4::int2, run_at, $1::uuid, $2::text, 0 from inserted
    )
    select ${s}.refuse_ended(array[$1::uuid])::text as checked,
      case when $14::text <> '' then pg_catalog.set_config('lock_timeout', '${notifyPatience}', true) || pg_catalog.pg_notify($13::text, $14::text) end as told
    from inserted`

  // An id that is there already takes no key with it: nobody would ever give that key back. One that comes in at the same
  // time has won a key and inserts nothing; that is refused at the end, and the filter drops it when it is sent again.
  // Keys are taken in order, so that two batches cannot deadlock, and with DO NOTHING, so that the holder is never
  // locked.
  const insertUnique = `with ${
    input(
      `, ${s}.hash_key(i.kind, i.key) as key, i.until,
        case when i.period <> '' then clock.now + i.period::float8 * interval '1 millisecond' end as expires_at`,
      true
    )
  }, keys as (
      insert into ${s}.unique_key (key, job, until, expires_at)
      select distinct on (key) key, id, until, expires_at from input order by key, id
      on conflict (key) do nothing returning job
    ), won as materialized (
      select * from input i where case when i.id in (select job from keys) then true else false end
    ), ${insertion("won", "key", "(select pg_catalog.count(*)::int4 from won)")}`

  // A job that is there, or has ended, answers for itself: this was a replay, whoever has the key by now.
  const holders = `select i.id::text as id, coalesce(own.id, k.job)::text as holder,
      own.id is null and coalesce(k.expires_at <= pg_catalog.clock_timestamp(), false) as expired
    from unnest($1::uuid[], $2::text[], $3::text[]) as i(id, kind, key)
    left join lateral (
      select j.id from ${s}.job j where j.id = i.id union all select f.id from ${s}.finished f where f.id = i.id limit 1
    ) own on true
    left join lateral (select * from ${s}.unique_key k where k.key = ${s}.hash_key(i.kind, i.key) offset 0) k on true
    where own.id is not null or k.job is not null`

  // Only a holder that stands in line: the line entry is deleted first, and who runs has none. The job's row is locked
  // before, and skipped when somebody else has it. `debounce` takes the new due time and
  // begins the period again, `replace` keeps both.
  const replace = `with held as materialized (
      select j.id, j.queue, j.priority, j.run_at, j.attempt, case when j.rescued >= 2 then 100 else 0 end as suspect
      from ${s}.job j where j.id = $1::uuid for update skip locked
    ), gone as (
      delete from ${s}.ready where queue = (select queue from held) and run_at = (select run_at from held) and id = $1::uuid
        and lane = any (array[(select priority + suspect from held), (select 200 + priority from held)])
      returning id
    ), changed as (
      update ${s}.job j set kind = $2::text, queue = $3::text, priority = $4::int2, max_attempts = $5::int4, timeout_ms = $6::int8,
        payload = $7::json, metadata = $8::json, trace = nullif($9::text, ''), progress = null, awaited = j.awaited or $14::text <> '',
        run_at = case when $10::text = 'replace' then j.run_at else due.at end,
        scheduled_for = case when $10::text = 'replace' then j.scheduled_for else due.at end
      from gone, held h, (select ${dueAt("pg_catalog.clock_timestamp()", "$11::text", "$12::text")} as at) due
      where j.id = $1::uuid and h.id = j.id
      returning j.id, j.kind, j.queue, j.priority + h.suspect as lane, j.run_at, j.attempt, j.unique_key
    ), prolonged as (
      update ${s}.unique_key u set expires_at = pg_catalog.clock_timestamp() + nullif($13::text, '')::float8 * interval '1 millisecond'
      from changed c where u.key = (select unique_key from changed) and u.job = c.id and $10::text = 'debounce' and $13::text <> ''
    ), line as (
      insert into ${s}.ready (queue, lane, run_at, id, kind, attempt)
      select queue, lane, run_at, id, kind, attempt from changed on conflict do nothing
    )
    select pg_catalog.count(*)::int4 as count from changed`

  // The condition on the time is opaque: the planner would rather walk the index of all keys with a period. In the order of
  // the keys, and waiting for whoever has one locked: skipped, it would be met again at once, and for as long as that lasts.
  const expireKeys = `delete from ${s}.unique_key where key = any (array(
      select k.key from (
        select distinct ${s}.hash_key(i.kind, i.key) as key,
          ${patiently("$3")} as patience
        from unnest($1::text[], $2::text[]) as i(kind, key) order by 1
      ) i
      cross join lateral (
        select u.key from ${s}.unique_key u
        where u.key = i.key and case when u.expires_at <= pg_catalog.clock_timestamp() then true else false end for update
      ) k))`

  return { insert, insertNew, insertNewOne, insertUnique, holders, replace, expireKeys }
}
