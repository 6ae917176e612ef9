/**
 * What must never be, whatever has happened: each a query that returns no row. They read the queue's tables, what triggers
 * have written down beside them, and the evidence of the ledger, which is copied into the same database first.
 */

/** The sessions of processes under test. */
export const theirs =
  `datname = current_database() and application_name like any (array['worker%', 'producer%', 'scheduler%'])`

/** Written by the same transactions as the changes themselves, so it is the truth even after a crash. */
export const watch = [
  "create schema watch",
  `create table watch.transition (seq bigserial primary key, job uuid not null, what text not null, lease uuid,
    worker uuid, at timestamptz not null default clock_timestamp(), xid xid8 not null default pg_current_xact_id())`,
  "create index on watch.transition (job, seq)",
  "create table watch.holder (seq bigserial primary key, key bytea not null, job uuid not null, gained boolean not null)",
  "create table watch.beat (worker uuid not null, name text not null, lease_ms bigint not null, at timestamptz not null)",
  "create index on watch.beat (worker, at)",
  `create function watch.note_lease() returns trigger language plpgsql as $$ begin
    if tg_op <> 'INSERT' then
      insert into watch.transition (job, what, lease, worker) select id, 'left', old.id, old.worker
        from unnest(old.ids) id where tg_op = 'DELETE' or id <> all (new.ids);
    else
      insert into watch.transition (job, what, lease, worker) select id, 'claimed', new.id, new.worker from unnest(new.ids) id;
    end if;
    return null; end $$`,
  `create function watch.note_end() returns trigger language plpgsql as $$ begin
    insert into watch.transition (job, what, lease, worker) values (new.id, new.status, new.lease, new.worker);
    return null; end $$`,
  `create function watch.note_key() returns trigger language plpgsql as $$ begin
    if tg_op = 'INSERT' then insert into watch.holder (key, job, gained) values (new.unique_key, new.id, true);
    else insert into watch.holder (key, job, gained) values (old.unique_key, old.id, false); end if;
    return null; end $$`,
  `create function watch.note_beat() returns trigger language plpgsql as $$ begin
    insert into watch.beat values (new.id, new.name, new.lease_ms, new.beat_at); return null; end $$`,
  "create trigger watch after insert or update or delete on pgqueue.lease for each row execute function watch.note_lease()",
  "create trigger watch after insert on pgqueue.finished for each row execute function watch.note_end()",
  "create trigger watch_gained after insert on pgqueue.job for each row when (new.unique_key is not null) execute function watch.note_key()",
  "create trigger watch_lost after delete on pgqueue.job for each row when (old.unique_key is not null) execute function watch.note_key()",
  "create trigger watch after insert or update on pgqueue.worker for each row execute function watch.note_beat()",
  "create table public.paid (job uuid not null, part int not null)"
]

/** What the ledger holds, in its own database. */
export const ledgerTables = [
  `create table public.intent (key uuid primary key, producer text not null, outcome text not null, job uuid,
    begun_at timestamptz not null default clock_timestamp(), answered_at timestamptz)`,
  `create table public.fault (what text not null, begun_at timestamptz not null default clock_timestamp(), cleared_at timestamptz)`
]

/** Where the evidence of the ledger is copied to. */
export const evidence = [
  "create schema evidence",
  "create table evidence.crash (what text)",
  "create table evidence.intent (key uuid primary key, outcome text, job uuid)",
  `create table evidence.run (run uuid primary key, job uuid not null, attempt int not null, boot text not null, key text,
    begun_at timestamptz not null, ended_at timestamptz, stopped_at timestamptz)`,
  "create index on evidence.run (job)",
  "create index on evidence.run (key)"
]

/** The runs that the ledger knows of, as `evidence.run`. */
export const runs =
  `select run::text, min(job::text) as job, min(attempt) as attempt, min(boot) as boot, min(note) as key,
    coalesce(min(at) filter (where phase = 'start'), min(at))::text as begun_at,
    (min(at) filter (where phase in ('end', 'failed')))::text as ended_at, (min(at) filter (where phase = 'interrupted'))::text as stopped_at
  from public.ledger group by run`

/** What a scenario may allow. */
export interface Allowed {
  /** Nothing was done to anything: each job has started exactly once. */
  readonly faultFree?: boolean
  /** The server that has taken over may not have had everything. */
  readonly lossy?: boolean
  /** The server's clock was not the ledger's all the time, and ticks may have been missed. */
  readonly clockStepped?: boolean
}

const faultless: Record<string, string> = {
  "I5 exactly once": `select f.id from pgqueue.finished f where f.kind in ('work', 'pay', 'tick') and f.attempt = 1
    and (select count(*) from evidence.run r where r.job = f.id) <> 1`
}

/** By the ledger's clock alone. An attempt of which no end is known has ended before the next one. */
const unshared: Record<string, string> = {
  "I4 no overlap at all": `select a.job, a.boot, b.boot as other from evidence.run a
    join evidence.run b on b.job = a.job and b.run <> a.run and b.begun_at > a.begun_at
      and b.begun_at < coalesce(least(a.ended_at, a.stopped_at), case when b.attempt = a.attempt then timestamptz 'infinity' end)`
}

const leases: Record<string, string> = {
  // By the database's own record: the lease is the last one that the job was in, and the job had not left it before.
  "I3 one final, by who holds it": `select t.job, t.what from watch.transition t
    left join lateral (select c.seq, c.lease from watch.transition c where c.job = t.job and c.what = 'claimed' and c.seq < t.seq
      order by c.seq desc limit 1) c on true
    where t.what in ('completed', 'discarded') and t.lease is not null and (t.lease is distinct from c.lease
      or exists (select 1 from watch.transition l where l.job = t.job and l.lease = t.lease and l.what = 'left'
        and l.seq between c.seq and t.seq and l.xid <> t.xid))`
}

/** What is compared with a clock. */
const times: Record<string, string> = {
  "I8 each tick once": `select s.name, t.tick, count(f.id) from
      (select metadata->>'schedule' as name, min(scheduled_for) as first, max(scheduled_for) as last
        from pgqueue.finished where metadata->>'schedule' is not null group by 1) s
    cross join lateral generate_series(s.first, s.last, '1 second') t(tick)
    left join pgqueue.finished f on f.metadata->>'schedule' = s.name and f.scheduled_for = t.tick
    group by 1, 2 having count(f.id) <> 1`
}

const overlaps: Record<string, string> = {
  // A run counts as begun when its ledger says so, and its worker as alive for a lease after each beat.
  "I4 no overlap under a valid lease": `select a.job, a.boot, b.boot as other from evidence.run a
    join evidence.run b on b.job = a.job and b.run <> a.run and b.begun_at > a.begun_at
      and b.begun_at < least(a.ended_at, a.stopped_at)
    join lateral (
      select c.worker, c.lease from watch.transition c join watch.beat w on w.worker = c.worker and w.name = a.boot
      where c.job = a.job and c.what = 'claimed' and c.at <= a.begun_at order by c.seq desc limit 1
    ) held on not exists (
      -- Its claim was forgotten in a crash, and this is that of an attempt before.
      select 1 from watch.transition l where l.job = a.job and l.lease = held.lease and l.what = 'left' and l.at < a.begun_at
    )
    join lateral (
      select max(at + lease_ms * interval '1 millisecond') as until from watch.beat w where w.worker = held.worker and w.at <= b.begun_at
    ) alive on b.begun_at < alive.until`
}

const always: Record<string, string> = {
  "I1 all have ended": "select id::text, kind from pgqueue.job limit 20",
  "I1 no loss": `select i.key from evidence.intent i where i.outcome = 'acked'
    and not exists (select 1 from pgqueue.finished f where f.id = i.job)`,
  // Joins, because they may be hashed in parts: a list of a quarter of a million keys is too long for the memory of a statement,
  // and was read once for each that was rejected (more than six minutes after a soak; 0.6 s).
  "I2 no phantom":
    `select i.key from evidence.intent i join evidence.run r on r.key = i.key::text where i.outcome = 'rejected'
    union
    select i.key from evidence.intent i join pgqueue.finished f on f.payload->>'key' = i.key::text
    where i.outcome = 'rejected' and f.kind in ('work', 'pay')`,
  "I3 one final": `select job from watch.transition where what in ('completed', 'discarded', 'cancelled')
    group by job having count(*) > 1`,
  // What left a lease without an attempt or an end was released, by whom it was claimed: that is free. What entered another
  // lease at the same time has a transaction of its own, and was not.
  "I6 bounded starts": `select r.job, count(*) from evidence.run r join pgqueue.finished f on f.id = r.job
    group by r.job, f.max_attempts, f.rescued having count(*) > f.max_attempts + least(f.rescued, 1) + (select count(*) from evidence.crash)
      + greatest(0, (select count(*) from watch.transition t where t.job = r.job and t.what = 'left' and not exists
          (select 1 from watch.transition c where c.job = t.job and c.what = 'claimed' and c.xid = t.xid))
        - (select count(*) from pgqueue.attempt a where a.job = r.job) - 1)`,
  "I7 fenced side effects": `select coalesce(f.id, p.job) as id, f.status, p.count from
      (select job, count(*)::int from public.paid group by job) p
    full join (select id, status from pgqueue.finished where kind = 'pay') f on f.id = p.job
    where coalesce(p.count, 0) <> case when f.status = 'completed' then 2 else 0 end`,
  "I8 no tick twice": `select metadata->>'schedule' as name, scheduled_for from pgqueue.finished
    where metadata->>'schedule' is not null group by 1, 2 having count(*) > 1`,
  "I9 unique": `select key, job, other from (
      select key, job, gained, lag(job) over keys as other, lag(gained) over keys as held from watch.holder window keys as (partition by key order by seq)
    ) h where gained and held and other <> job`,
  "I9 one job for each enqueue": `select payload->>'key' as key from
      (select payload from pgqueue.finished where kind in ('work', 'pay') union all select payload from pgqueue.job where kind in ('work', 'pay')) all_jobs
    group by 1 having count(*) > 1`,
  "I11 hygiene: transactions": `select pid, application_name, state, query from pg_stat_activity
    where datname = current_database() and state like 'idle in transaction%'`,
  "I11 hygiene: locks": `select pid, objid from pg_locks
    where locktype = 'advisory' and database = (select oid from pg_database where datname = current_database())`,
  "I11 hygiene: sessions": `select pid, application_name, state, query from pg_stat_activity
    where ${theirs}`,
  "I11 hygiene: workers": "select id::text, name from pgqueue.worker",
  "I11 hygiene: leases": "select id::text, worker::text, ids::text from pgqueue.lease",
  "I11 hygiene: indexes": "select indexrelid::regclass::text from pg_index where not indisvalid",
  "I13 accounting": `select * from (
      select (select count(distinct job) from evidence.intent where outcome = 'acked') as acknowledged,
        (select count(*) from evidence.intent i where outcome in ('unknown', 'pending')
          and exists (select 1 from pgqueue.finished f where f.payload->>'key' = i.key::text and f.kind in ('work', 'pay')
            and not exists (select 1 from evidence.intent a where a.outcome = 'acked' and a.job = f.id))) as unknown,
        (select count(*) from pgqueue.finished f where kind in ('work', 'pay')
          and exists (select 1 from evidence.intent i where i.key::text = f.payload->>'key')) as finished
    ) counts where acknowledged + unknown <> finished`,
  "I13 no defect": "select key from evidence.intent where outcome = 'defect'"
}

/** The queries that hold here. */
export const invariants = (allowed: Allowed): ReadonlyArray<readonly [name: string, query: string]> =>
  Object.entries({
    ...always,
    ...leases,
    ...(allowed.clockStepped === true ? unshared : { ...times, ...overlaps }),
    ...(allowed.faultFree === true ? faultless : {})
  }).filter(([name]) => allowed.lossy !== true || !/^I1 no loss|^I13 acc/.test(name))
