-- Least privilege for a queue of effect-pgqueue. Explained in docs/security.md.
--
-- Run it as a superuser, or as a role with CREATEROLE that owns the database, with psql or any other client:
--
--     psql "$DATABASE_URL" -v ON_ERROR_STOP=1 -1 -f roles.sql
--
-- once before the storage is created, if a member of pgqueue_owner is to create it, and again after the storage was created
-- or updated: a new version may have new tables and columns. It may be run any number of times.
--
-- For another schema than "pgqueue" replace that word everywhere: it names the schema, and it is what the names of the roles
-- begin with. Roles belong to the whole server, so two databases that both have a queue share them unless they are renamed.
--
-- The roles are groups that nobody logs in as. Make what your processes log in as a member:
--
--     create role web login password '…' in role pgqueue_producer;
--
-- Where the role that migrates is another one than the role that works, give all but the first `migrate: false`.

do $roles$
declare
  wanted text;
begin
  foreach wanted in array array[
    'pgqueue_owner', 'pgqueue_worker', 'pgqueue_producer', 'pgqueue_replacer', 'pgqueue_caller', 'pgqueue_viewer', 'pgqueue_admin'
  ] loop
    if not exists (select from pg_catalog.pg_roles where rolname = wanted) then
      execute format('create role %I nologin', wanted);
    end if;
  end loop;
  -- Who is no superuser can give a schema or a table to a role only as a member of it.
  if not (select rolsuper from pg_catalog.pg_roles where rolname = current_user) then
    execute format('grant pgqueue_owner to %I', current_user);
  end if;
end
$roles$;

-- Owner: creates and updates the storage (`migrate: true`), and holds it.
create schema if not exists pgqueue authorization pgqueue_owner;
alter schema pgqueue owner to pgqueue_owner;

revoke all on schema pgqueue from public;
grant usage on schema pgqueue to
  pgqueue_worker, pgqueue_producer, pgqueue_replacer, pgqueue_caller, pgqueue_viewer, pgqueue_admin;

do $grants$
declare
  one record;
begin
  if to_regclass('pgqueue.migration') is null then
    raise notice 'The schema pgqueue holds no queue yet: run this again when it does.';
    return;
  end if;

  -- Whoever has created or updated the storage: it is the owner's.
  for one in select c.oid::regclass::text as name from pg_catalog.pg_class c
    where c.relnamespace = 'pgqueue'::regnamespace and c.relkind in ('r', 'p') loop
    execute format('alter table %s owner to pgqueue_owner', one.name);
  end loop;
  for one in select p.oid::regprocedure::text as name from pg_catalog.pg_proc p
    where p.pronamespace = 'pgqueue'::regnamespace loop
    execute format('alter function %s owner to pgqueue_owner', one.name);
  end loop;

  -- From here on what is not granted is not allowed, whatever was before.
  revoke all on all tables in schema pgqueue from
    public, pgqueue_worker, pgqueue_producer, pgqueue_replacer, pgqueue_caller, pgqueue_viewer, pgqueue_admin;
  revoke all on all sequences in schema pgqueue from public;
  revoke all on all functions in schema pgqueue from
    public, pgqueue_worker, pgqueue_producer, pgqueue_replacer, pgqueue_caller, pgqueue_viewer, pgqueue_admin;

  -- Everybody who starts a JobQueue looks for the version.
  grant select on pgqueue.migration to
    pgqueue_worker, pgqueue_producer, pgqueue_replacer, pgqueue_caller, pgqueue_viewer, pgqueue_admin;

  -- Worker: Worker, CronScheduler, Maintenance, Admin and enqueue. No DDL and no TRUNCATE; the version is not its to write.
  grant select, insert, update, delete on all tables in schema pgqueue to pgqueue_worker;
  revoke insert, update, delete on pgqueue.migration from pgqueue_worker;
  grant execute on all functions in schema pgqueue to pgqueue_worker;

  -- Producer: enqueue, alone, in bulk, in a transaction, with a key and with an id of its own, from the library and from SQL.
  -- It reads no payload, result or error, its own jobs' neither, and changes no job that is there. It may give back unique
  -- keys (DELETE), because who meets a key whose period is over has to; keys are hashed.
  grant insert (
    id, kind, queue, priority, run_at, scheduled_for, max_attempts, timeout_ms, payload, metadata, trace, awaited, enqueued_at, unique_key
  ), select (id, kind, queue, priority, run_at) on pgqueue.job to pgqueue_producer;
  grant insert (queue, lane, run_at, id, kind, attempt) on pgqueue.ready to pgqueue_producer;
  grant select (id) on pgqueue.finished to pgqueue_producer;
  grant select, insert, delete on pgqueue.unique_key to pgqueue_producer;
  -- Without UPDATE of anything there is no SELECT … FOR UPDATE, which is how two that meet an old key do not wait for each other.
  grant update (until) on pgqueue.unique_key to pgqueue_producer;
  grant execute on function
    pgqueue.enqueue(text, json, text, integer, timestamptz, interval, integer, interval, text, json, uuid),
    pgqueue.uuid_v7(), pgqueue.hash_key(text, text), pgqueue.refuse_finished(uuid[], integer), pgqueue.refuse_ended(uuid[])
    to pgqueue_producer;

  -- Replacer: a producer whose keys have `onConflict: "replace"` or `"debounce"`. It overwrites jobs that wait, and reads none.
  grant pgqueue_producer to pgqueue_replacer;
  grant select (id, kind, queue, priority, run_at, attempt, rescued, awaited, scheduled_for, unique_key),
    update (kind, queue, priority, max_attempts, timeout_ms, payload, metadata, trace, progress, awaited, run_at, scheduled_for)
    on pgqueue.job to pgqueue_replacer;
  grant select (queue, lane, run_at, id), delete on pgqueue.ready to pgqueue_replacer;
  grant update (expires_at) on pgqueue.unique_key to pgqueue_replacer;

  -- Caller: a producer that also waits for results, with `execute` and `poll`. It reads the results and errors of all jobs.
  grant pgqueue_producer to pgqueue_caller;
  grant select (id, kind, awaited), update (awaited) on pgqueue.job to pgqueue_caller;
  grant select (id, kind, status, reason, result, error) on pgqueue.finished, pgqueue.archive to pgqueue_caller;

  -- Viewer: how many jobs there are, and where (`JobQueue.stats`), and in SQL every column that can hold no data of a job's.
  grant select (id, kind, queue, priority, run_at, attempt, rescued, snoozed, max_attempts, timeout_ms, cancelled_at, enqueued_at,
    scheduled_for, awaited, retried_at) on pgqueue.job to pgqueue_viewer;
  grant select (id, kind, queue, priority, status, attempt, max_attempts, timeout_ms, rescued, snoozed, lease, worker, enqueued_at,
    scheduled_for, started_at, finished_at) on pgqueue.finished, pgqueue.archive to pgqueue_viewer;
  grant select (job, id, n, tag, worker, started_at, ended_at) on pgqueue.attempt to pgqueue_viewer;
  grant select (name, spec, time_zone, kind, queue, priority, max_attempts, timeout_ms, next_at, previous_at, paused_at, updated_at,
    missed, missed_window_ms, overlap, jitter_ms, last_job, waiting, version, declared_at, undeclared_at)
    on pgqueue.schedule to pgqueue_viewer;
  grant select on pgqueue.ready, pgqueue.lease, pgqueue.worker, pgqueue.parked, pgqueue.task, pgqueue.setting, pgqueue.queue
    to pgqueue_viewer;

  -- Admin: looks at jobs and schedules, payloads and results included, and acts on them (`Admin`, `CronScheduler.pause` and the
  -- like). It claims and settles nothing, and does not change what all have agreed on.
  grant select on all tables in schema pgqueue to pgqueue_admin;
  grant insert, update, delete on pgqueue.job, pgqueue.ready, pgqueue.finished, pgqueue.attempt, pgqueue.unique_key,
    pgqueue.schedule, pgqueue.queue to pgqueue_admin;
  grant delete on pgqueue.archive to pgqueue_admin;
  grant execute on all functions in schema pgqueue to pgqueue_admin;
end
$grants$;
