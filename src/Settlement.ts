/**
 * The statements that take jobs out of their leases: settle with its short forms, release and rescue;
 * and those that put them into leases of their own.
 *
 * They share one order of steps. Lock the leases in id order; keep the jobs that are still in their lease (that is the
 * fence); lock the job rows, skipping those that somebody else holds; decide everything from the locked rows; write by
 * id only; take exactly these ids out of the leases and delete the leases that became empty. The short forms, for what has
 * completed, have nothing to decide.
 *
 * By id and never by ctid: a locked row may be newer than the statement's snapshot (somebody marked the job as cancelled
 * while the lease was waited for). Its ctid is then that of a version the snapshot cannot see, and a write by ctid
 * silently finds nothing, while a write by id follows the row to its newest version.
 *
 * A transactional handler's settle runs in the application's own session, whose search_path is not ours: functions are
 * named with their schema.
 *
 * @since 0.1.0
 */

import { arrayText, column } from "./Database.ts"

/** How a worker wants a job to go on. The server has the last word: see `settle`. */
export type Verb = "completed" | "failed" | "snoozed" | "cancelled" | "discarded" | "released" | "lost"

/** One settlement, with the lease under which the job was claimed. */
export interface Entry {
  readonly lease: string
  readonly id: string
  readonly verb: Verb
  /** JSON text of the result. */
  readonly result: string | undefined
  /** Why it was cancelled or discarded. */
  readonly reason: string | undefined
  /** Milliseconds until the job is due again; `undefined` ends it. */
  readonly delay: number | undefined
  readonly failure: { readonly tag: string; readonly message: string; readonly error: string | undefined } | undefined
  /** Milliseconds the handler ran. */
  readonly ran: number
  /** When it ended, by this process's monotonic clock, in milliseconds; just now when undefined. */
  readonly endedAt?: number | undefined
  /** Nothing is kept of it when it has completed, unless somebody waits for its end. */
  readonly forget?: boolean | undefined
}

/**
 * What became of one entry: `done`; `busy`, still in its lease with its row locked by somebody: send it again;
 * `gone`, no longer in the lease or no such job: drop it. Entries that completed as asked are not answered, unless
 * somebody waits for them.
 */
export interface Answer {
  readonly lease: string
  readonly id: string
  readonly state: "done" | "busy" | "gone"
  /** The final status, when the job ended. */
  readonly status: "completed" | "cancelled" | "discarded" | null
  /** Somebody waits for its end. */
  readonly awaited: boolean
}

/** What the short forms answer: what they leave `unsettled` is for `settle`. */
export type Completing = Answer | { readonly lease: string; readonly id: string; readonly state: "unsettled" }

/** Names an entry and its answer. */
export const keyOf = ({ id, lease }: { readonly lease: string; readonly id: string }): string => lease + id

/**
 * The parameters of `settle`. On `channel` is announced who has ended and is
 * waited for. `now` is the monotonic clock that the entries go by.
 */
export const columnsOf = (
  worker: string,
  entries: ReadonlyArray<Entry>,
  channel = "",
  now?: number
): Array<unknown> => {
  const once = onceEach(entries)
  return [
    once.map((entry) => entry.lease),
    once.map((entry) => entry.id),
    once.map((entry) => entry.verb),
    once.map((entry) => entry.result ?? ""),
    once.map((entry) => entry.reason ?? ""),
    once.map((entry) => entry.delay === undefined ? "" : String(entry.delay)),
    once.map((entry) => entry.failure?.tag ?? ""),
    once.map((entry) => entry.failure?.message ?? ""),
    once.map((entry) => entry.failure?.error ?? ""),
    once.map((entry) => String(Math.max(0, entry.ran))),
    worker,
    channel,
    once.map(({ endedAt }) => endedAt === undefined || now === undefined ? "0" : String(Math.max(0, now - endedAt))),
    once.map(({ forget }) => forget === true ? "forget" : "")
  ]
}

/**
 * The parameters of `completeKept`, as short as they can be. See `columnsOf`.
 */
export const keptColumnsOf = (
  worker: string,
  entries: ReadonlyArray<Entry>,
  channel: string,
  now: number | undefined
): Array<unknown> => {
  const once = onceEach(entries)
  return [
    arrayText(column(once, (entry) => entry.lease)),
    arrayText(once.map((entry) => entry.id)),
    column(once, (entry) => entry.result ?? ""),
    arrayText(once.map((entry) => microsOf(entry.ran))),
    arrayText(
      once.map(({ endedAt }) => endedAt === undefined || now === undefined ? 0 : microsOf(now - endedAt))
    ),
    worker,
    channel,
    column(once, ({ forget }) => forget === true ? "forget" : "")
  ]
}

/**
 * The parameters of `completeForgotten`. See `columnsOf`.
 */
export const forgottenColumnsOf = (entries: ReadonlyArray<Entry>): Array<unknown> => {
  const once = onceEach(entries)
  return [arrayText(column(once, (entry) => entry.lease)), arrayText(once.map((entry) => entry.id))]
}

/**
 * Splits what a short form has answered into the answers, and the entries that it has left.
 */
export const splitAnswers = (entries: ReadonlyArray<Entry>, rows: ReadonlyArray<Completing>) => {
  const answers: Array<Answer> = []
  const unsettled = new Set<string>()
  for (const row of rows) {
    if (row.state === "unsettled") unsettled.add(keyOf(row))
    else answers.push(row)
  }
  return { answers, unsettled: unsettled.size === 0 ? [] : entries.filter((entry) => unsettled.has(keyOf(entry))) }
}

/** Whole microseconds: written with all its digits, a time took more room than the id of its job. */
const microsOf = (millis: number): number => Math.max(0, Math.round(millis * 1000))

/** Each job in each lease once, whatever the buffer held: the last entry counts. */
const onceEach = (entries: ReadonlyArray<Entry>): ReadonlyArray<Entry> =>
  new Set(entries.map((entry) => entry.id)).size === entries.length
    ? entries
    : [...new Map(entries.map((entry) => [keyOf(entry), entry])).values()]

/** By name: a column that is added to the table later must not make one of what is beside it ambiguous. */
const jobColumns =
  `j.id, j.kind, j.queue, j.priority, j.run_at, j.attempt, j.rescued, j.snoozed, j.max_attempts, j.timeout_ms, j.unique_key,
    j.cancelled_at, j.cancel_reason, j.group_key, j.trace, j.metadata, j.enqueued_at, j.scheduled_for, j.payload, j.progress, j.awaited`

/**
 * Builds the statements for one quoted schema.
 */
export const statements = (s: string) => {
  // Hashed while it stays in a target list; as a join it may become quadratic (10 000 jobs/s at 20 000 a statement).
  const checked = `checked as materialized (
      select i.*, (i.lease, i.id) in (select h.id, u.id from held h cross join pg_catalog.unnest(h.ids) as u(id)) as mine from input i
    )`
  const missing = `missing as materialized (
      select c.lease, c.id, exists (select 1 from ${s}.job j where j.id = c.id offset 0) as busy
      from checked c where c.mine and case when c.id in (select id from decided) then false else true end
    ), out_of_lease as materialized (
      select lease, id from decided union all select lease, id from missing where not busy
    )`
  // Takes exactly these ids out of their leases. Membership by one hash for all leases: with `except` there was one for each,
  // and 1 000 jobs of 1 000 leases took 80 to 150 ms, where they take 10 to 40.
  const shrinkLeases = (taken: string) =>
    `left_over as materialized (
      select h.id, array(select u.id from pg_catalog.unnest(h.ids) as u(id) where case when ${taken} then false else true end) as ids from held h
    ), shrunk as (
      update ${s}.lease l set ids = o.ids from left_over o
      where l.id = any (array(select id from left_over where pg_catalog.cardinality(ids) > 0)) and l.id = o.id
        and pg_catalog.cardinality(o.ids) < pg_catalog.cardinality(l.ids)
    ), closed as (
      delete from ${s}.lease where id = any (array(select id from left_over where pg_catalog.cardinality(ids) = 0))
    )`
  const freed = (from: string, which: string) =>
    `freed as (
      delete from ${s}.unique_key where key = any (array(select unique_key from ${from} where ${which}))
        and (expires_at is null or expires_at <= pg_catalog.clock_timestamp())
    )`

  // FOR UPDATE SKIP LOCKED inside LATERAL is a forced point look-up, one index probe a job: as a join this flips to a
  // scan of the table. A key row held by somebody makes the job busy as its own row does, or one stranger's
  // transaction would hold up the whole batch.
  const locked = (from: string, columns: string) =>
    `locked as materialized (
      select ${columns}, j.*, k.held is not null as key_held,
        case when j.unique_key is null or k.held then false
        else exists (select 1 from ${s}.unique_key u where u.key = j.unique_key and u.job = j.id offset 0) end as key_busy
      from ${from} m
      cross join lateral (
        select ${jobColumns} from ${s}.job j where j.id = m.id for update skip locked
      ) j
      left join lateral (
        select true as held from ${s}.unique_key u where u.key = j.unique_key and u.job = j.id for update skip locked
      ) k on true
    )`

  const putBack = (worker: string) =>
    `back as (
      insert into ${s}.ready (queue, lane, run_at, id, kind, attempt, group_key)
      select queue, priority + case when next_rescued >= 2 then 100 else 0 end, next_run_at, id, kind, next_attempt, group_key
      from decided where status is null on conflict do nothing
    ), moved as (
      update ${s}.job j set attempt = d.next_attempt, rescued = d.next_rescued, snoozed = d.next_snoozed, run_at = d.next_run_at
      from decided d where j.id = any (array(select id from decided where status is null and changed)) and d.id = j.id
    ), tried as (
      insert into ${s}.attempt (job, n, tag, message, error, worker, started_at, ended_at)
      select id, attempt + 1, failure ->> 'tag'::text, failure ->> 'message'::text, failure -> 'error'::text, ${worker}, started_at, ended_at
      from decided where status is null and failure is not null
    ), `

  // The rest is the same for settle, rescue and release once `decided` says for each job: status (null: back in line),
  // next_attempt, next_rescued, next_snoozed, next_run_at, when the run ended, which an outage may have kept from being
  // told, and the failure to record, if any. `kept` narrows down whose end is recorded, `more` is what else there is to do.
  const writes = (worker: string, lease: string, kept: string, more = putBack(worker)) =>
    `ended as (
      insert into ${s}.finished (id, kind, queue, priority, status, reason, result, error, attempt, max_attempts, timeout_ms,
        rescued, snoozed, lease, worker, group_key, trace, metadata, enqueued_at, scheduled_for, started_at, finished_at, payload, progress)
      select id, kind, queue, priority, status, end_reason, end_result, failure, next_attempt, max_attempts, timeout_ms,
        next_rescued, next_snoozed, ${lease}, ${worker}, group_key, trace, metadata, enqueued_at, scheduled_for, started_at, ended_at, payload, progress
      from decided where status is not null${kept} on conflict (id) do nothing
    ), removed as (
      delete from ${s}.job where id = any (array(select id from decided where status is not null))
    ), ${freed("decided", "status is not null and key_held")}, ${more}${
      shrinkLeases("(h.id, u.id) in (select lease, id from out_of_lease)")
    }`

  // The first loss of a job is free, every later one counts an attempt and makes the job a suspect: after a crash nobody
  // knows which of the lease's jobs did it, so the innocent must not pay and the guilty must be found. Lost for the first
  // time, jobs come back apart from each other, within two seconds: claimed together again, the one that kills its process
  // takes the same others with it (50 of 1 000 neighbours of five such jobs paid for them, apart 0 to 3).
  const lost = {
    ends: "rescued > 0 and attempt + 1 >= max_attempts",
    attempt: "attempt + case when rescued > 0 then 1 else 0 end",
    runAt: `case when rescued = 0 then c.now + pg_catalog.random() * interval '2 seconds'
          else c.now + least(300, 2::float8 * pg_catalog.power(2, least(rescued, 10))) * (0.5::float8 + pg_catalog.random()) * interval '1 second' end`
  }

  const settleBy = (writes: string) =>
    `with input as materialized (
      select * from unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[], $9::text[], $10::text[], $13::text[],
        $14::text[]) as i(lease, id, verb, result, reason, delay_ms, tag, message, error, ran_ms, age_ms, forget)
    ), held as materialized (
      select l.id, l.ids from ${s}.lease l where l.id = any (array(select distinct lease from input)) order by l.id for update
    ), ${checked}, ${
      locked(
        "(select * from checked where mine)",
        "m.lease, m.verb, m.result, m.reason, m.delay_ms, m.tag, m.message, m.error, m.ran_ms, m.age_ms, m.forget"
      )
    }, decided as materialized (
      select l.*, c.now, c.now - l.age_ms::float8 * interval '1 millisecond' as ended_at,
        c.now - (l.age_ms::float8 + l.ran_ms::float8) * interval '1 millisecond' as started_at,
        case when verb = 'completed' then 'completed' when verb = 'discarded' then 'discarded'
          when verb = 'cancelled' or cancelled_at is not null then 'cancelled'
          when verb = 'failed' and (delay_ms = '' or attempt + 1 >= max_attempts) then 'discarded'
          when verb = 'lost' and ${lost.ends} then 'discarded' end as status,
        case when verb in ('snoozed', 'released') then attempt when verb = 'lost' then ${lost.attempt}
          else attempt + 1 end as next_attempt,
        rescued + case when verb = 'lost' then 1 else 0 end as next_rescued, snoozed + case when verb = 'snoozed' then 1 else 0 end as next_snoozed,
        case when verb = 'lost' then ${lost.runAt} when verb = 'released' or delay_ms = '' then run_at else c.now + delay_ms::float8 * interval '1 millisecond' end as next_run_at,
        verb <> 'released' as changed,
        case when verb = 'completed' then null when verb in ('cancelled', 'discarded') then coalesce(nullif(reason, ''), cancel_reason)
          else cancel_reason end as end_reason,
        nullif(result, '')::json as end_result,
        case when tag = '' then null when error = '' then pg_catalog.json_build_object('tag', tag, 'message', nullif(message, ''))
          else pg_catalog.json_build_object('tag', tag, 'message', nullif(message, ''), 'error', error::json) end as failure
      from (select pg_catalog.clock_timestamp() as now) c, locked l where not key_busy
    ), ${missing}, ${writes}
    -- Announced at the commit, so that whoever waits is spared a round trip; rare enough for the lock that NOTIFY takes.
    select lease::text as lease, id::text as id, 'done' as state, status,
      case when awaited and status is not null and $12::text <> '' then pg_catalog.pg_notify($12::text, 'end '::text || id::text)::text is not null
        else awaited end as awaited
    from decided where verb <> 'completed' or awaited
    union all select lease::text, id::text, case when busy then 'busy' else 'gone' end, null, false from missing
    union all select lease::text, id::text, 'gone', null, false from checked where not mine`
  const kept = " and (forget = '' or awaited or status <> 'completed')"
  const settle = settleBy(writes("$11::uuid", "lease", kept))
  // For a transactional handler, whose job has completed: nothing goes back in line, which is half as much for the planner.
  // It sees this anew each time, in a session that is not ours; what `completeKept` fails with would end the transaction.
  const complete = settleBy(writes("$11::uuid", "lease", kept, ""))

  // What `settle` does, where everything has completed: half of the work for the server, and a fifth where nothing is kept
  // (11 and 5 us a job, where `settle` takes 22). Nothing to decide and nothing to put back, job rows found and locked in one
  // walk through their index, where a look-up for each cost three times that, and no guard against an id that has ended, which
  // costs as much as the insert itself: on 23505 `settle` is to be sent. What is not there to be completed, for whatever
  // reason, is left to `settle`, which has the answers.
  //
  // `found`, from the inside: one walk over the ids; then the key of each, where `key_held` is null without one and false when
  // it was skipped, once (offset 0), because it locks; then only those whose key is theirs no more, or is locked by us: any
  // other is locked by a stranger.
  const completing = (form: {
    readonly input: string
    /** What is read of the jobs, and of which. */
    readonly columns: string
    readonly which: string
    /** What else is written, and answered. */
    readonly ended: string
    readonly answers: string
  }) =>
    `with input as materialized (
      ${form.input}
    ), held as materialized (
      select l.id, l.ids from ${s}.lease l where l.id = any ($1::uuid[]) order by l.id for update
    ), ${checked}, found as materialized (
      select * from (
        select j.*, case when unique_key is null then null else coalesce(
          (select true from ${s}.unique_key u where u.key = j.unique_key and u.job = j.id for update skip locked), false) end as key_held
        from (
          select ${form.columns} from ${s}.job j where j.id = any (array(select id from checked where mine))${form.which} for update skip locked
        ) j
        offset 0
      ) j
      where case when key_held is not false then true
        else not exists (select 1 from ${s}.unique_key u where u.key = j.unique_key and u.job = j.id offset 0) end
    ), removed as (
      delete from ${s}.job where id = any (array(select id from found))
    ), ${freed("found", "key_held")}, ${form.ended}${shrinkLeases("u.id in (select id from found)")}
    -- In a case, membership stays a hash.
    select lease::text as lease, id::text as id, 'unsettled' as state, null as status, false as awaited
    from checked where case when mine then id in (select id from found) else false end is false${form.answers}`

  const completeKept = completing({
    input:
      `select coalesce(i.lease, ($1::uuid[])[1]) as lease, i.id, coalesce(i.result, ($3::text[])[1]) as result, i.ran, i.age,
        coalesce(i.forget, ($8::text[])[1]) <> '' as forget
      from unnest($1::uuid[], $2::uuid[], $3::text[], $4::float8[], $5::float8[], $8::text[]) as i(lease, id, result, ran, age, forget)`,
    columns: jobColumns,
    which: "",
    ended: `ended as (
      insert into ${s}.finished (id, kind, queue, priority, status, result, attempt, max_attempts, timeout_ms,
        rescued, snoozed, lease, worker, group_key, trace, metadata, enqueued_at, scheduled_for, started_at, finished_at, payload, progress)
      select f.id, kind, queue, priority, 'completed', nullif(i.result, '')::json, attempt + 1, max_attempts, timeout_ms,
        rescued, snoozed, lease, $6::uuid, group_key, trace, metadata, enqueued_at, scheduled_for,
        c.now - (i.age + i.ran) * interval '1 microsecond', c.now - i.age * interval '1 microsecond', payload, progress
      from (select pg_catalog.clock_timestamp() as now) c, found f join checked i on i.id = f.id
      where i.mine and (awaited or not forget)
    ), `,
    // Announced as in `settle`.
    answers: `
    union all select lease::text, id::text, 'done', 'completed',
      case when $7::text <> '' then pg_catalog.pg_notify($7::text, 'end '::text || id::text)::text is not null else true end
    from checked where case when mine then id in (select id from found where awaited) else false end`
  })

  // Where nothing is kept of them. What somebody waits for is.
  const completeForgotten = completing({
    input:
      "select coalesce(i.lease, ($1::uuid[])[1]) as lease, i.id from unnest($1::uuid[], $2::uuid[]) as i(lease, id)",
    columns: "j.id, j.unique_key",
    which: " and not awaited",
    ended: "",
    answers: ""
  })

  const takeBack = (held: string, decided: string) =>
    `with held as materialized (${held}),
    entries as materialized (select h.id as lease, h.worker, u.id from held h cross join pg_catalog.unnest(h.ids) as u(id)),
    ${locked("entries", "m.lease, m.worker")}, decided as materialized (${decided}),
    missing as materialized (
      select e.lease, e.id from entries e
      where case when e.id in (select id from decided) then false else not exists (select 1 from ${s}.job j where j.id = e.id offset 0) end
    ), out_of_lease as materialized (select lease, id from decided union all select lease, id from missing),
    ${writes("worker", "lease", "")}
    select (select pg_catalog.count(*) from held)::int4 as leases, pg_catalog.count(*) filter (where status is null)::int4 as back,
      pg_catalog.count(*) filter (where status is not null)::int4 as ended, pg_catalog.json_agg(distinct queue)::text as queues,
      pg_catalog.json_agg(id) filter (where status is not null and awaited)::text as awaited,
      (select id::text from held order by id desc limit 1) as last from decided`

  const lostLeases = (columns: string) =>
    `select ${columns} from ${s}.lease l
      where l.id > $2::uuid and not exists (select 1 from ${s}.worker w where w.id = l.worker)
      order by l.id limit $1::int4 for update of l skip locked`
  // Those that `rescue` would take, by name.
  const lostNames = lostLeases("l.id::text as id, cardinality(l.ids) as jobs")
  const orphaned =
    `select pg_catalog.count(*)::int4 as count from ${s}.lease l left join ${s}.worker w on w.id = l.worker
    where w.id is null or w.beat_at < pg_catalog.clock_timestamp() - w.lease_ms * interval '1 millisecond'`
  const rescue = takeBack(
    lostLeases("l.id, l.worker, l.ids"),
    `select l.*, c.now, c.now as ended_at, null::timestamptz as started_at,
        case when cancelled_at is not null then 'cancelled'
          when ${lost.ends} then 'discarded' end as status,
        ${lost.attempt} as next_attempt, rescued + 1 as next_rescued, snoozed as next_snoozed,
        ${lost.runAt} as next_run_at,
        true as changed, cancel_reason as end_reason, null::json as end_result,
        pg_catalog.json_build_object('tag', 'Lost', 'message', 'the worker that ran this attempt was lost') as failure
      from (select pg_catalog.clock_timestamp() as now) c, locked l where not key_busy`
  )

  const release = takeBack(
    `select l.id, l.worker, l.ids from ${s}.lease l where l.worker = $1::uuid and l.id = any ($2::uuid[]) order by l.id for update`,
    `select l.*, c.now, c.now as ended_at, null::timestamptz as started_at, case when cancelled_at is not null then 'cancelled' end as status,
        attempt as next_attempt, rescued as next_rescued, snoozed as next_snoozed, run_at as next_run_at, false as changed,
        cancel_reason as end_reason, null::json as end_result, null::json as failure
      from (select pg_catalog.clock_timestamp() as now) c, locked l where not key_busy`
  )

  // Gives a job a lease of its own: what keeps its lease locked until a commit must not hold up the jobs claimed with it.
  const detach = `with held as materialized (
      select l.id, l.worker, l.ids from ${s}.lease l where l.id = $1::uuid for update
    ), mine as materialized (
      select *, cardinality(ids) = 1 as alone from held where $2::uuid = any (ids)
    ), own as (
      insert into ${s}.lease (id, worker, ids) select $3::uuid, worker, array[$2::uuid] from mine where not alone
    ), shrunk as (
      update ${s}.lease l set ids = array_remove(m.ids, $2::uuid) from mine m where l.id = m.id and not m.alone
    )
    select alone from mine`

  // One of the jobs keeps the others: the rescue of a lease is one statement.
  const scatter = `with lost as (
      delete from ${s}.lease where id = any (array(
        select l.id from ${s}.lease l where l.id = $1::uuid and cardinality(l.ids) > 1
          and not exists (select 1 from ${s}.worker w where w.id = l.worker) for update skip locked
      )) returning worker, ids, claimed_at
    ), own as (
      insert into ${s}.lease (id, worker, ids, claimed_at)
      select ${s}.uuid_v7(), worker, array[u.id], claimed_at from lost cross join unnest(ids) as u(id)
    )
    select coalesce(sum(cardinality(ids)), 0)::int4 as count from lost`

  return { settle, complete, completeKept, completeForgotten, lostNames, orphaned, rescue, release, detach, scatter }
}
