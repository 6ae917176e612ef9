/**
 * The shape of the storage: numbered, additive migrations in the queue's own schema.
 *
 * @since 0.1.0
 */
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import * as Random from "effect/Random"
import * as Schedule from "effect/Schedule"
import * as Schema from "effect/Schema"
import * as Migrator from "effect/sql/Migrator"
import * as SqlClient from "effect/sql/SqlClient"
import { isSqlError, type SqlError } from "effect/sql/SqlError"
import * as Database from "./Database.ts"
import { maxTextBytes } from "./Outcome.ts"
import * as Report from "./Report.ts"

/**
 * The database is not one this queue can run on, or an option does not fit it.
 *
 * **Details**
 *
 * `reason` tells a program what to do:
 *
 * - `NotMigrated`: the schema is missing or older than this library; the message says what to run.
 * - `Unsupported`: not PostgreSQL 15 or newer, not UTF-8, or a schema newer than this library.
 * - `ForeignClient`: a transactional handler was built on another `SqlClient` than the queue's.
 * - `QueueNotConsumed`: a queue was named that no listed job uses.
 * - `InTransaction`: a worker was started inside an open transaction, which its handlers would take part in.
 * - `InsecureConnection`: the client connects to another host without verified TLS; nothing was sent.
 * - `InvalidOption`: an option is out of range, or two listed jobs handle one kind; the message names it.
 *
 * @category errors
 * @since 0.1.0
 */
export class JobQueueError extends Schema.TaggedError<JobQueueError>()("JobQueueError", {
  message: Schema.String,
  reason: Schema.Literals([
    "NotMigrated",
    "Unsupported",
    "ForeignClient",
    "QueueNotConsumed",
    "InTransaction",
    "InsecureConnection",
    "InvalidOption"
  ])
}) {}

/** The largest payload or result, in bytes of JSON text; held by a CHECK and by `enqueue`. */
export const maxPayloadBytes = 1_048_576

/** The largest progress of a job, in bytes of JSON text. */
export const maxProgressBytes = 65_536

/** The largest encoded error of a run, in bytes of JSON text. */
export const maxErrorBytes = 65_536

/** The statements of migration 1. `s` is the validated and quoted schema name. */
const initial = (s: string, channel: string): ReadonlyArray<string> => [
  // `json`, not `jsonb`: the string that was checked is the string that is stored and returned, byte for byte,
  // so that the limit below means the same on both sides (jsonb of an array of small numbers is 6 times its text).
  `create table ${s}.job (
    id uuid primary key,
    kind text collate "C" not null check (length(kind) between 1 and 200),
    queue text collate "C" not null check (length(queue) between 1 and 128),
    priority smallint not null check (priority between 0 and 9),
    run_at timestamptz not null check (isfinite(run_at)),
    attempt integer not null default 0,
    rescued integer not null default 0,
    snoozed integer not null default 0,
    max_attempts integer not null check (max_attempts between 1 and 1000),
    timeout_ms bigint check (timeout_ms > 0),
    unique_key bytea,
    cancelled_at timestamptz,
    cancel_reason text,
    group_key text collate "C",
    trace text,
    metadata json not null default '{}',
    enqueued_at timestamptz not null default clock_timestamp(),
    scheduled_for timestamptz not null,
    payload json not null,
    constraint job_payload_size check (octet_length(payload::text) <= ${maxPayloadBytes}),
    constraint job_metadata_size check (octet_length(metadata::text) <= 65536)
  )`,
  `create table ${s}.ready (
    queue text collate "C" not null,
    lane smallint not null,
    run_at timestamptz not null,
    id uuid not null,
    kind text collate "C" not null,
    attempt integer not null,
    group_key text collate "C",
    primary key (queue, lane, run_at, id)
  )`,
  `create table ${s}.lease (
    id uuid primary key,
    worker uuid not null,
    claimed_at timestamptz not null default clock_timestamp(),
    ids uuid[] not null
  )`,
  `create index lease_worker on ${s}.lease (worker)`,
  `create table ${s}.worker (
    id uuid primary key,
    name text not null,
    queues text[] not null,
    kinds text[] not null,
    prefixes text[] not null,
    lease_ms bigint not null,
    started_at timestamptz not null default clock_timestamp(),
    beat_at timestamptz not null default clock_timestamp()
  )`,
  `create table ${s}.attempt (
    job uuid not null,
    id bigint generated always as identity,
    n integer not null,
    tag text not null,
    message text,
    error json,
    worker uuid,
    started_at timestamptz,
    ended_at timestamptz not null default clock_timestamp(),
    primary key (job, id)
  )`,
  ...["finished", "archive"].map((table) =>
    `create table ${s}.${table} (
    id uuid not null,
    kind text collate "C" not null,
    queue text collate "C" not null,
    priority smallint not null,
    status text not null check (status in ('completed', 'cancelled', 'discarded')),
    reason text,
    result json,
    error json,
    attempt integer not null,
    max_attempts integer not null,
    timeout_ms bigint,
    rescued integer not null,
    snoozed integer not null,
    lease uuid,
    worker uuid,
    group_key text collate "C",
    trace text,
    metadata json not null,
    enqueued_at timestamptz not null,
    scheduled_for timestamptz not null,
    started_at timestamptz,
    finished_at timestamptz not null default clock_timestamp(),
    payload json not null,
    primary key (${table === "finished" ? "id" : "id, finished_at"})
  )`
  ),
  `create index finished_age on ${s}.finished (status, finished_at)`,
  `create table ${s}.unique_key (
    key bytea primary key,
    job uuid not null,
    until text not null check (until in ('started', 'finished')),
    expires_at timestamptz
  )`,
  `create index unique_key_expires on ${s}.unique_key (expires_at) where expires_at is not null`,
  `create table ${s}.blocked (
    id uuid primary key,
    reason text not null,
    since timestamptz not null default clock_timestamp()
  )`,
  `create table ${s}.schedule (
    name text collate "C" primary key,
    spec text not null,
    time_zone text not null,
    kind text collate "C" not null,
    queue text collate "C" not null,
    priority smallint not null,
    max_attempts integer not null,
    timeout_ms bigint,
    payload json not null,
    metadata json not null default '{}',
    next_at timestamptz,
    previous_at timestamptz,
    paused_at timestamptz,
    problem text,
    updated_at timestamptz not null default clock_timestamp()
  )`,
  `create index schedule_next on ${s}.schedule (next_at) where next_at is not null`,
  `create table ${s}.queue (name text collate "C" primary key, paused_at timestamptz)`,
  `create table ${s}.setting (name text primary key, value json not null, updated_at timestamptz not null default clock_timestamp())`,
  // The hot tables live by delete + insert. Vacuum by count, at once and at full speed, and never with the
  // ACCESS EXCLUSIVE lock that truncation takes.
  ...["job", "ready", "lease"].map((table) =>
    `alter table ${s}.${table} set (
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 50000,
    autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 50000,
    autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off
  )`
  ),
  `alter table ${s}.worker set (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500)`,
  // VOLATILE, so that its query has a snapshot of its own, newer than that of the statement that calls it: an insert
  // that waited for the settle of the same id sees the finished row only here. Without it the job runs twice.
  // Without sequential scans, because a session keeps the plan, and may have made it while the table was empty.
  `create function ${s}.refuse_finished(ids uuid[], expected integer) returns void language plpgsql volatile
    set search_path = pg_catalog set enable_seqscan = off as $$
  begin
    if cardinality(ids) < expected then
      raise exception 'a job with this id came in at the same time' using errcode = 'PQ001';
    end if;
    if exists (select 1 from ${s}.finished f where f.id = any (ids)) then
      raise exception 'a job with this id has already ended' using errcode = 'PQ001';
    end if;
  end $$`,
  // The key of a uniqueness rule: hashed, because keys carry row data into errors and logs; scoped to the kind.
  `create function ${s}.hash_key(kind text, key text) returns bytea language sql immutable strict parallel safe
    set search_path = pg_catalog as $$ select sha256(convert_to(kind || E'\\x1f' || key, 'UTF8')) $$`,
  `create function ${s}.uuid_v7() returns uuid language sql volatile set search_path = pg_catalog as $$
    select encode(set_bit(set_bit(overlay(uuid_send(gen_random_uuid()) placing
      substring(int8send((extract(epoch from clock_timestamp()) * 1000)::bigint) from 3) from 1 for 6), 52, 1), 53, 1), 'hex')::uuid
  $$`,
  // For triggers, psql and other languages. It may notify inside the transaction, because it has no other way.
  `create function ${s}.enqueue(
    kind text, payload json default 'null', queue text default 'default', priority integer default 5,
    run_at timestamptz default null, delay interval default null, max_attempts integer default 5,
    timeout interval default null, unique_key text default null, metadata json default '{}', id uuid default null
  ) returns uuid language plpgsql volatile set search_path = pg_catalog set enable_seqscan = off as $$
  declare
    asked uuid := coalesce(enqueue.id, ${s}.uuid_v7());
    due timestamptz := greatest(coalesce(enqueue.run_at, clock_timestamp() + coalesce(enqueue.delay, interval '0')), clock_timestamp());
    hashed bytea := ${s}.hash_key(enqueue.kind, enqueue.unique_key);
    holder uuid;
    inserted uuid;
  begin
    if exists (select 1 from ${s}.finished f where f.id = asked) then
      return asked;
    end if;
    while hashed is not null loop
      delete from ${s}.unique_key k where k.key = hashed and k.expires_at <= clock_timestamp();
      insert into ${s}.unique_key (key, job, until) values (hashed, asked, 'finished') on conflict do nothing;
      exit when found;
      select k.job into holder from ${s}.unique_key k where k.key = hashed;
      if found then
        return holder;
      end if;
    end loop;
    insert into ${s}.job (id, kind, queue, priority, run_at, scheduled_for, max_attempts, timeout_ms, unique_key, metadata, payload)
      values (asked, enqueue.kind, enqueue.queue, enqueue.priority, due, due, enqueue.max_attempts,
        (extract(epoch from enqueue.timeout) * 1000)::bigint, hashed, enqueue.metadata, enqueue.payload)
      on conflict do nothing returning job.id into inserted;
    if inserted is not null then
      insert into ${s}.ready (queue, lane, run_at, id, kind, attempt) values (enqueue.queue, enqueue.priority, due, asked, enqueue.kind, 0);
      perform ${s}.refuse_finished(array[asked], 1);
      -- Where a session that listens and does nothing has filled the server's queue, the commit would fail.
      if pg_notification_queue_usage() < 0.9 then
        perform pg_notify('${channel}', case when octet_length(enqueue.queue) < 190 then '0 ' || enqueue.queue else 'look' end);
      end if;
    elsif hashed is not null then
      -- The id is there under another key, or without one: nobody would ever give this key back.
      delete from ${s}.unique_key k where k.key = hashed and k.job = asked;
    end if;
    return asked;
  end $$`,
  // Nobody gets anything by default; docs name the grants of each role.
  `revoke all on schema ${s} from public`,
  `revoke all on all functions in schema ${s} from public`
]

/** The statements of migration 2: what a job says of itself while it runs, who waits for it, and parked kinds. */
const life = (s: string): ReadonlyArray<string> => [
  // `retried_at`: somebody has brought the job back after its end, and earlier attempts count no more. The constraint is
  // not valid, so that nobody waits for a look at every row: none has a value yet.
  `alter table ${s}.job add column progress json, add column awaited boolean not null default false,
    add column retried_at timestamptz,
    add constraint job_progress_size check (octet_length(progress::text) <= ${maxProgressBytes}) not valid`,
  ...["finished", "archive"].map((table) => `alter table ${s}.${table} add column progress json`),
  // Which kinds have jobs in the lanes of the parked. `since` changes with every job that is parked, so that a worker
  // that has found the lanes empty cannot remove the mark of one that came in at the same time.
  `create table ${s}.parked (
    queue text collate "C" not null,
    kind text collate "C" not null,
    since timestamptz not null default clock_timestamp(),
    primary key (queue, kind)
  )`
]

/** The statements of migration 3: schedules that fire, and tasks that the processes share. */
const time = (s: string): ReadonlyArray<string> => [
  // With defaults and the limits of `job`, so that a row can be written by hand and what it says can be enqueued.
  `alter table ${s}.schedule
    alter column time_zone set default 'UTC', alter column queue set default 'default', alter column priority set default 5,
    alter column max_attempts set default 5, alter column payload set default 'null',
    add column missed integer not null default 1 check (missed between 0 and 1000),
    add column missed_window_ms bigint not null default 604800000 check (missed_window_ms > 0),
    add column overlap text not null default 'allow' check (overlap in ('allow', 'skip', 'queue')),
    add column jitter_ms bigint not null default 0 check (jitter_ms >= 0),
    add column unique_key bytea, add column unique_until text not null default 'finished' check (unique_until in ('started', 'finished')),
    add column unique_period_ms bigint check (unique_period_ms > 0),
    add column last_job uuid,
    add column waiting timestamptz[] not null default '{}',
    add column version integer not null default 0,
    add column declared_at timestamptz,
    add column undeclared_at timestamptz,
    add check (length(name) between 1 and 200), add check (length(kind) between 1 and 200), add check (length(queue) between 1 and 128),
    add check (priority between 0 and 9), add check (max_attempts between 1 and 1000), add check (timeout_ms > 0),
    add check (octet_length(payload::text) <= ${maxPayloadBytes}), add check (octet_length(metadata::text) <= 65536),
    add check (isfinite(next_at))`,
  // What is not due but has to be looked at: ticks that wait for a job, rows that somebody has written by hand.
  `create index schedule_waiting on ${s}.schedule (name) where cardinality(waiting) > 0`,
  `create index schedule_unset on ${s}.schedule (name) where next_at is null and paused_at is null and problem is null`,
  // The id of the job of a tick: the same whoever enqueues it. It begins with the tick, so that ids have its order.
  `create function ${s}.tick_id(name text, at timestamptz) returns uuid language sql immutable strict parallel safe
    set search_path = pg_catalog as $$
    select encode(set_byte(set_byte(h, 6, (get_byte(h, 6) & 15) | 128), 8, (get_byte(h, 8) & 63) | 128), 'hex')::uuid
    from (select overlay(substring(sha256(convert_to(name, 'UTF8')) from 1 for 16) placing
      substring(int8send((extract(epoch from at) * 1000)::int8) from 3) from 1 for 6) as h) h
  $$`,
  `revoke all on function ${s}.tick_id(text, timestamptz) from public`,
  // When a task of all processes last began; `position` is where it goes on.
  `create table ${s}.task (
    name text primary key,
    ran_at timestamptz not null default '-infinity',
    position text
  )`,
  // There from the start: a row that is not there cannot be locked by those who go by it.
  `insert into ${s}.setting (name, value) values ('cleanup', '{}') on conflict (name) do nothing`
]

/** The statements of migration 4: what makes the hot statements cheaper. */
const pace = (s: string): ReadonlyArray<string> => [
  // The last look of an insert, for the queue's own sessions, whose settings are known: to set and restore two of them at
  // each call was a tenth of the time of an insert of one job.
  `create function ${s}.refuse_ended(ids uuid[]) returns void language plpgsql volatile as $$
  begin
    if exists (select 1 from ${s}.finished f where f.id = any (ids)) then
      raise exception 'a job with this id has already ended' using errcode = 'PQ001';
    end if;
  end $$`,
  `revoke all on function ${s}.refuse_ended(uuid[]) from public`,
  // Ids do not compress, and to find that out was a fortieth of the work of claim and settle.
  `alter table ${s}.lease alter column ids set storage external`
]

/** The statements of migration 5: what workers and people write is limited, too, and the last function is safe anywhere. */
const limits = (s: string): ReadonlyArray<string> => [
  // Whoever updates a row is held to the limits even of what was there before: a single row would stop a rescue. Read from
  // end to end before anything is locked against others.
  `update ${s}.job set trace = left(trace, 200), cancel_reason = left(cancel_reason, ${maxTextBytes / 4})
    where length(trace) > 200 or octet_length(cancel_reason) > ${maxTextBytes}`,
  // Each table has one constraint for all, because each is a cost of its own for a statement of one row; none is valid for
  // what is there, so that nobody waits for a look at every row. The archive takes what `finished` has taken.
  `alter table ${s}.job drop constraint job_progress_size, add constraint job_size check (
    octet_length(progress::text) <= ${maxProgressBytes} and octet_length(cancel_reason) <= ${maxTextBytes} and length(trace) <= 200
  ) not valid`,
  // An error is stored with its text, in which each character may be escaped by six.
  `alter table ${s}.finished add constraint finished_size check (
    octet_length(result::text) <= ${maxPayloadBytes} and octet_length(error::text) <= ${
    maxErrorBytes + 8 * maxTextBytes
  }
      and octet_length(reason) <= ${maxTextBytes} and octet_length(progress::text) <= ${maxProgressBytes}
  ) not valid`,
  `alter table ${s}.attempt add constraint attempt_size check (
    octet_length(error::text) <= ${maxErrorBytes} and octet_length(message) <= ${maxTextBytes} and length(tag) <= 200
  ) not valid`,
  // A worker that runs goes on to beat, and each beat is held to the limit.
  `update ${s}.worker set name = coalesce(nullif(left(name, 200), ''), 'worker') where length(name) not between 1 and 200`,
  `alter table ${s}.worker add constraint worker_size check (length(name) between 1 and 200) not valid`,
  `alter table ${s}.queue add constraint queue_size check (length(name) between 1 and 128) not valid`,
  // It has no search_path of its own, for speed, and is granted to roles that may call it from sessions of theirs.
  `create or replace function ${s}.refuse_ended(ids uuid[]) returns void language plpgsql volatile as $$
  begin
    if exists (select 1 from ${s}.finished f where f.id operator(pg_catalog.=) any (ids)) then
      raise exception 'a job with this id has already ended' using errcode = 'PQ001';
    end if;
  end $$`
]

/** In their order. @internal */
export const migrations: ReadonlyArray<
  readonly [id: number, name: string, (quotedSchema: string, channel: string) => ReadonlyArray<string>]
> = [
  [1, "initial", initial],
  [2, "life", life],
  [3, "time", time],
  [4, "pace", pace],
  [5, "limits", limits]
]

/** The version of the storage that this library needs. */
export const version = migrations[migrations.length - 1]![0]

/**
 * Reads the version of the storage: 0 when there is none.
 */
export const current = Effect.fnUntraced(function*(sql: SqlClient.SqlClient, schema: string) {
  const table = `${Database.quoteSchema(schema)}.migration`
  // to_regclass first: an empty database is not an error, and a role without CREATE can ask.
  const [found] = yield* sql.unsafe<{ found: boolean }>(`select to_regclass('${table}') is not null as found`)
  if (!found?.found) return 0
  const [row] = yield* sql.unsafe<{ version: number }>(
    `select coalesce(max(migration_id), 0)::int4 as version from ${table}`
  )
  return row?.version ?? 0
})

/**
 * Fails unless the server and the storage are what this library needs.
 */
export const verify = Effect.fnUntraced(function*(sql: SqlClient.SqlClient, schema: string) {
  const found = yield* current(sql, schema)
  if (found < version) {
    return yield* new JobQueueError({
      reason: "NotMigrated",
      message: found === 0
        ? `The schema "${schema}" holds no queue. Start once with JobQueue.layer({ migrate: true }), or run Migrations.run, with a role that may create it.`
        : `The schema "${schema}" is at version ${found}, this library needs ${version}. Start once with JobQueue.layer({ migrate: true }), or run Migrations.run.`
    })
  }
  if (found > version) {
    return yield* new JobQueueError({
      reason: "Unsupported",
      message:
        `The schema "${schema}" is at version ${found}, newer than this library (${version}). Update effect-pgqueue in this process.`
    })
  }
})

/**
 * Fails with `Unsupported` unless the server is PostgreSQL 15 or newer with UTF-8.
 */
export const verifyServer = Effect.fnUntraced(function*(sql: SqlClient.SqlClient) {
  const [row] = yield* sql.unsafe<{ version: number; encoding: string }>(
    `select current_setting('server_version_num')::int4 as version,
       (select pg_encoding_to_char(encoding) from pg_catalog.pg_database where datname = current_database())::text as encoding`
  )
  const unsupported = (message: string) => new JobQueueError({ reason: "Unsupported", message })
  if (row === undefined || row.version < 150_000) {
    return yield* unsupported(`PostgreSQL 15 or newer is needed, this server is ${row?.version ?? "unknown"}.`)
  }
  if (row.encoding !== "UTF8") {
    return yield* unsupported(`The database must be encoded in UTF8, this one is ${row.encoding}.`)
  }
})

/**
 * Brings the storage to the version of this library. Safe with any number of processes at once.
 *
 * **Details**
 *
 * Processes that find the right version take no lock. The others queue up behind a transaction-level advisory lock
 * that also covers the creation of the schema. DDL waits at most a second and a half for a lock, then lets everybody pass
 * and tries again, for up to a minute.
 *
 * @since 0.1.0
 */
export const run = Effect.fn("Migrations.run")(
  function*(sql: SqlClient.SqlClient, schema: string): Effect.fn.Return<void, JobQueueError | SqlError> {
    const quoted = Database.quoteSchema(schema)
    if ((yield* current(sql, schema)) >= version) return
    const migrate = Effect.gen(function*() {
      yield* sql.unsafe(
        // Longer than the second after which PostgreSQL asks an autovacuum that is in the way to give up (deadlock_timeout).
        "select set_config('lock_timeout', '1500', true), set_config('client_min_messages', 'warning', true)"
      )
      // Two 32-bit keys: a namespace of our own ("pgqq") and the schema. Transaction-level, so that no pooler can leak it.
      yield* sql.unsafe(`select pg_advisory_xact_lock(1885827953, hashtext($1))`, [schema])
      // Asked first: the owner of a schema that is there need not have the right to create one, which is asked for even then.
      const [schemaIs] = yield* sql.unsafe<{ missing: boolean }>(
        "select pg_catalog.to_regnamespace($1::text) is null as missing",
        [quoted]
      )
      if (schemaIs?.missing !== false) yield* sql.unsafe(`create schema if not exists ${quoted}`)
      yield* Migrator.make({})({
        table: `${schema}.migration`,
        loader: Effect.succeed(migrations.map(([id, name, statements]) =>
          [
            id,
            name,
            Effect.succeed(
              Effect.forEach(statements(quoted, Database.channelOf(schema)), (text) => sql.unsafe(text), {
                discard: true
              })
            )
          ] as const
        ))
      }).pipe(Effect.provideService(SqlClient.SqlClient, sql))
    })
    // Whoever has waited behind us gets through meanwhile.
    const rest = yield* Random.nextIntBetween(500, 1500)
    yield* sql.withTransaction(migrate).pipe(
      Database.typedTransaction,
      // Migrator wraps what a migration fails with; the SqlError inside is what decides whether to try again.
      Effect.catchTag("MigrationError", (error) =>
        isSqlError(error.cause)
          ? Effect.fail(error.cause)
          : Effect.die(new Error(error.message, { cause: error.cause }))),
      Effect.tapCause((cause) => Report.debug("migration did not go through", Cause.pretty(cause))),
      Effect.retry({
        // 23505: somebody else has created the schema at the same time; "if not exists" does not cover that.
        while: (error) => Database.isTransient(error) || (isSqlError(error) && Database.sqlState(error) === "23505"),
        schedule: Schedule.max([Schedule.spaced(rest), Schedule.recurs(200)]).pipe(
          Schedule.upTo({ duration: "1 minute" })
        )
      })
    )
  }
)
