/**
 * The statements that keep the storage in order: workers that are gone, kinds that nobody handles, jobs in no place.
 *
 * @since 0.1.0
 */
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Semaphore from "effect/Semaphore"
import type { SqlError } from "effect/sql/SqlError"
import { clockTolerance, type Standing } from "./Contact.ts"
import * as Database from "./Database.ts"
import { impatiently } from "./Intervention.ts"

/** How long a statement of upkeep may take, in milliseconds; who waits for it waits longer. */
const statementTimeout = 20_000

/** With these, what is oldest is read in the order of an index, however much or little the statistics make of it. */
const inOrder = { enable_sort: "off", enable_bitmapscan: "off", enable_seqscan: "off" }

/** For how long one has to have watched a worker with a longer lease than this, in milliseconds. */
const longestWatch = 600_000

/** The first lane of parked jobs: those of kinds that no live worker lists wait in 200 + priority. */
const parkedLane = 200
const parkedLanes = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9].map((priority) => parkedLane + priority)

/**
 * Builds the statements for one quoted schema.
 */
const statements = (s: string) => {
  // Skipped when locked and judged again after a lock was waited for: a late beat wins or loses cleanly. Not at all when the
  // clock is not where whoever judges expects it: after a step forward everybody looks dead. Nor by one who has watched for
  // less than the lease: whoever lives has had the time to beat since the clock was last moved. Then a beat in the future is
  // from before it went back, and so may be the start of the server. A smaller step is allowed for: it may be longer than a
  // short lease.
  const lease =
    "(w.lease_ms + case when $1::text = '' then 0 else abs(extract(epoch from clock_timestamp()) * 1000 - $1::float8) + $3::float8 end) * interval '1 millisecond'"
  const reap = `delete from ${s}.worker where id = any (array(
      select w.id from ${s}.worker w
      where case when $1::text = '' then true
          else abs(extract(epoch from clock_timestamp()) * 1000 - $1::float8) <= ${clockTolerance} end
        and case when $2::text = '' then true else least(w.lease_ms, ${longestWatch}) <= $2::float8 end
        and (w.beat_at > clock_timestamp() + ${lease} or greatest(
          w.beat_at, case when pg_postmaster_start_time() <= clock_timestamp() then pg_postmaster_start_time() end
        ) < clock_timestamp() - ${lease})
      order by w.id for update skip locked))
    returning id::text as id`

  // Due jobs that every claim from the front passes, because no live worker of their queue lists their kind, go to lanes
  // that no claim reads. Only the front of each lane is looked at: what stands further back is in nobody's way.
  // By ctid, because rows of the line are never updated. With the job's row locked: whoever acts on the job meanwhile has
  // to see where it stands now, and a job in somebody's hands stays where it is.
  const park = `with front as materialized (
      select r.tid, r.queue, r.kind from (select distinct q.queue from ${s}.worker w cross join unnest(w.queues) as q(queue)) q
      cross join unnest($1::int2[]) as l(lane)
      cross join lateral (
        select r.ctid as tid, r.queue, r.kind from ${s}.ready r
        where r.queue = q.queue and r.lane = l.lane and r.run_at <= statement_timestamp()
        order by r.run_at, r.id limit $2::int4
      ) r
    ), strange as materialized (
      select k.queue, k.kind from (select distinct queue, kind from front) k
      where not exists (
        select 1 from ${s}.worker w where k.queue = any (w.queues) and (k.kind = any (w.kinds) or k.kind ^@ any (w.prefixes))
      )
    ), picked as materialized (
      select f.tid from front f where case when (f.queue, f.kind) in (select queue, kind from strange) then true else false end
    ), gone as (
      delete from ${s}.ready where ctid = any (array(
        select r.ctid from ${s}.ready r cross join lateral (select j.id from ${s}.job j where j.id = r.id for update skip locked) j
        where r.ctid = any (array(select tid from picked)) for update of r skip locked
      )) returning queue, lane, run_at, id, kind, attempt, group_key
    ), parked as (
      insert into ${s}.ready (queue, lane, run_at, id, kind, attempt, group_key)
      select queue, 200 + lane % 100, run_at, id, kind, attempt, group_key from gone on conflict do nothing
    ), noted as (
      insert into ${s}.parked (queue, kind) select distinct queue, kind from gone
      on conflict (queue, kind) do update set since = clock_timestamp()
    )
    select count(*)::int4 as count from gone`

  // What a worker lists is brought back; all of it is due, and saying so keeps the planner on the index. When nothing is
  // left, the mark goes, unless another job has been parked since: then the mark has changed. There the order is for the
  // planner: without it a scan of the whole line looks cheap.
  const unpark = `with mine as materialized (
      select p.queue, p.kind, p.since from ${s}.worker w join ${s}.parked p
        on p.queue = any (w.queues) and (p.kind = any (w.kinds) or p.kind ^@ any (w.prefixes))
      where w.id = $1::uuid
    ), picked as materialized (
      select r.tid from (select queue, array_agg(kind) as kinds from mine group by queue) m
      cross join unnest($2::int2[]) as l(lane)
      cross join lateral (
        select r.ctid as tid, r.id from ${s}.ready r
        where r.queue = m.queue and r.lane = l.lane and r.run_at <= statement_timestamp()
          and case when r.kind = any (m.kinds) then true else false end
        order by r.run_at, r.id limit $3::int4 for update skip locked
      ) r cross join lateral (select j.id from ${s}.job j where j.id = r.id for update skip locked) j
    ), gone as (
      delete from ${s}.ready where ctid = any (array(select tid from picked))
      returning queue, lane, run_at, id, kind, attempt, group_key
    ), back as (
      insert into ${s}.ready (queue, lane, run_at, id, kind, attempt, group_key)
      select g.queue, g.lane - 200 + coalesce((select 100 from ${s}.job j where j.id = g.id and j.rescued >= 2), 0),
        g.run_at, g.id, g.kind, g.attempt, g.group_key
      from gone g on conflict do nothing
    ), done as (
      delete from ${s}.parked p using mine m
      where p.queue = m.queue and p.kind = m.kind and p.since = m.since and not exists (select 1 from gone)
        and not exists (
          select 1 from unnest($2::int2[]) as l(lane) cross join lateral (
            select 1 from ${s}.ready r where r.queue = m.queue and r.lane = l.lane
              and case when r.kind = m.kind then true else false end order by r.run_at, r.id limit 1
          ) r
        )
    )
    select count(*)::int4 as count, json_agg(distinct queue)::text as queues from gone`

  // One page of jobs, held against every place a job can be in; one snapshot, so who moves is in one place or the other.
  // `offset 0` keeps the look at the line a look-up per job.
  const audit = `with page as materialized (
      select j.id, j.queue, j.priority, j.run_at from ${s}.job j where j.id > $1::uuid order by j.id limit $2::int4
    ), held as materialized (
      select u.id from ${s}.lease l cross join unnest(l.ids) as u(id)
    )
    select (select id::text from page order by id desc limit 1) as last, array_to_string(array(
      select p.id from page p
      where case when p.id in (select id from held) then false else true end
        and not exists (
          select 1 from ${s}.ready r
          where r.queue = p.queue and r.lane = any (array[p.priority, 100 + p.priority, 200 + p.priority]) and r.run_at = p.run_at and r.id = p.id
          offset 0
        )
        and not exists (select 1 from ${s}.blocked b where b.id = p.id)
    ), ',') as misplaced`

  // Judged again with the rows locked and a newer snapshot, and by id alone: a look through the whole line, but there
  // should be nothing to look for.
  const lockMisplaced = `select j.id from ${s}.job j where j.id = any ($1::uuid[]) order by j.id for update skip locked`
  const repair = `with back as (
      insert into ${s}.ready (queue, lane, run_at, id, kind, attempt, group_key)
      select j.queue, j.priority + case when j.rescued >= 2 then 100 else 0 end, j.run_at, j.id, j.kind, j.attempt, j.group_key
      from ${s}.job j
      where j.id = any ($1::uuid[]) and not exists (select 1 from ${s}.ready r where r.id = j.id)
        and not exists (select 1 from ${s}.lease l where j.id = any (l.ids))
        and not exists (select 1 from ${s}.blocked b where b.id = j.id)
      on conflict do nothing returning id, queue
    )
    select array_to_string(array_agg(id), ',') as repaired, json_agg(distinct queue)::text as queues from back`

  const newsUsage = "select pg_notification_queue_usage()::float8 as usage"

  const bound = "select set_config(name, value, true) from unnest($1::text[], $2::text[]) as s(name, value)"

  return { bound, reap, park, unpark, audit, lockMisplaced, repair, newsUsage }
}

/**
 * Builds the verbs of upkeep for one quoted schema.
 */
export const make = (db: Database.Database, s: string) => {
  const texts = statements(s)
  const run = (text: string, params: ReadonlyArray<unknown>) => db.own.unsafe<any>(text, params).unprepared
  // All together are not to take the queue's whole pool.
  const turns = Semaphore.makeUnsafe(2)
  // What was started inside a transaction of the application goes on after it.
  const outside = Context.omit(db.own.transactionService)

  const verbs = {
    /**
     * Runs statements of upkeep in a transaction of the queue's own, where the server gives up each after `timeout`
     * milliseconds, 20 s by default, and waiting for a lock after 5 s. Two at once.
     */
    apart: <A, E>(
      self: Effect.Effect<A, E>,
      options: { readonly timeout?: number | undefined; readonly inOrder?: boolean } = {}
    ): Effect.Effect<A, E | SqlError> => {
      const settings = {
        statement_timeout: String(options.timeout ?? statementTimeout),
        lock_timeout: "5000",
        // A process that is frozen before it commits must not keep what it has locked from the one that comes next.
        idle_in_transaction_session_timeout: String(Database.frozen),
        ...(options.inOrder === true ? inOrder : {})
      }
      const transaction: Effect.Effect<A, E | SqlError> = Effect.updateContext(
        Database.transaction(
          db.own,
          Effect.andThen(run(texts.bound, [Object.keys(settings), Object.values(settings)]), self)
        ),
        outside
      )
      return Semaphore.withPermit(turns, transaction)
    },

    /**
     * Deletes workers that have not been heard of for their lease time; none, when the database's clock is not where it is
     * expected, and only those with a lease as long as they have been watched.
     */
    reapWorkers: (standing?: Standing): Effect.Effect<ReadonlyArray<{ readonly id: string }>, SqlError> =>
      db.query(
        texts.reap,
        standing === undefined
          ? ["", "", "0"]
          : [String(standing.clock), String(standing.watched), String(standing.doubt)]
      ),

    /**
     * Parks jobs of kinds that no live worker lists: of each lane those among the first `limit` due ones. Returns how many.
     */
    park: (lanes: ReadonlyArray<number>, limit: number): Effect.Effect<number, SqlError> =>
      Effect.map(run(texts.park, [lanes, limit]), ([row]) => row.count),

    /**
     * Brings parked jobs back that this worker lists, `limit` of a lane at most.
     */
    unpark: (
      worker: string,
      limit: number
    ): Effect.Effect<{ readonly count: number; readonly queues: ReadonlyArray<string> }, SqlError> =>
      Effect.map(
        db.query<any>(texts.unpark, [worker, parkedLanes, limit]),
        ([row]) => ({ count: row.count, queues: Database.listOf(row.queues) })
      ),

    /**
     * Looks, in the order of ids and after `after`, at `limit` jobs for those that are in no place.
     */
    audit: (
      after: string | undefined,
      limit: number
    ): Effect.Effect<{ readonly last: string | undefined; readonly misplaced: ReadonlyArray<string> }, SqlError> =>
      Effect.map(run(texts.audit, [after ?? Database.firstId, limit]), ([row]) => ({
        last: row.last ?? undefined,
        misplaced: Database.idsOf(row.misplaced)
      })),

    /**
     * How full the server's queue of notifications is, from 0 to 1.
     */
    newsUsage: Effect.map(
      Effect.suspend(() => db.query<{ usage: number }>(texts.newsUsage, [])),
      ([row]) => row?.usage ?? 0
    ),

    /**
     * Puts those of these jobs back in line that are in no place.
     */
    repair: (
      ids: ReadonlyArray<string>
    ): Effect.Effect<{ readonly repaired: ReadonlyArray<string>; readonly queues: ReadonlyArray<string> }, SqlError> =>
      impatiently(
        db,
        Effect.flatMap(run(texts.lockMisplaced, [ids]), (locked) =>
          Effect.map(
            run(texts.repair, [locked.map((row) => row.id)]),
            ([row]) => ({ repaired: Database.idsOf(row.repaired), queues: Database.listOf(row.queues) })
          ))
      )
  }
  return { texts, verbs }
}
