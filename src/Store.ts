/**
 * The verbs of the storage, one for each thing to do, which send the statement that does it at the least cost: those of this
 * file, claim and beat among them, and all the others, whose texts are next to those that they resemble.
 *
 * Every statement is a fixed text over bound parameters; the schema name, validated and quoted, is the only thing ever
 * written into one. Arrays are bound as text and cast, so that any driver can send them.
 *
 * @since 0.1.0
 */
import * as Effect from "effect/Effect"
import type { SqlError } from "effect/sql/SqlError"
import * as Cleanup from "./Cleanup.ts"
import * as Database from "./Database.ts"
import * as Firing from "./Firing.ts"
import * as Insertion from "./Insertion.ts"
import * as Inspection from "./Inspection.ts"
import * as Intervention from "./Intervention.ts"
import * as Schedules from "./Schedules.ts"
import * as Settlement from "./Settlement.ts"
import * as Upkeep from "./Upkeep.ts"

export { columnsOf, keyedColumnsOf, type NewJob, type UniqueRule } from "./Insertion.ts"
export { type EndRow, everything, type Stats } from "./Inspection.ts"

/** The longest idle time that the server can hold, in milliseconds: 24 days. */
const longestIdle = 2_147_483_647

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
  readonly payload: string
  /** JSON text. */
  readonly progress: string | null
  /** It was cancelled while it stood in line, by a transaction that saw it elsewhere. */
  readonly cancelled: boolean
  /** The earlier attempts since it was enqueued or retried, oldest first, as JSON text of `AttemptRow`s. */
  readonly history: string | null
}

/** Reads the columns of a claim, in the order of its text. */
const claimedRow = (row: ReadonlyArray<unknown>): ClaimedRow => ({
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
  payload: row[14] as string,
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

/** What one beat learned. `alive` is `false` when the worker's row is gone: it was declared dead. */
export interface Beat {
  readonly alive: boolean
  /** The database's clock, in milliseconds since the epoch; `undefined` when the worker's row is gone. */
  readonly clock: number | undefined
  /** The worker's leases in the table, with their age in milliseconds. */
  readonly leases: ReadonlyArray<{ readonly id: string; readonly age: number }>
  /** Jobs in these leases that are marked as cancelled. */
  readonly cancelled: ReadonlyArray<string>
}

/** What a rescue or a release did. */
export interface TakenBack {
  readonly leases: number
  readonly back: number
  readonly ended: number
  readonly queues: ReadonlyArray<string>
  /** Jobs that have ended and whose end somebody waits for. */
  readonly awaited: ReadonlyArray<string>
  /** The greatest of these leases; `null` when there were none. */
  readonly last: string | null
}

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

/** Asks whether a session is still there. */
export const probeText = "select 1 as here"

/** Announces queues: one statement, whatever their number. */
export const notifyText = "select pg_notify($1::text, p)::text as sent from unnest($2::text[]) as p"

/**
 * Builds the statements for one schema.
 */
export const make = (db: Database.Database, schema: string) => {
  const s = Database.quoteSchema(schema)
  const insertion = Insertion.statements(s)
  const settlement = Settlement.statements(s)
  // Without LISTEN nobody hears it.
  const channel = db.connect === undefined ? "" : Database.channelOf(schema)
  const inspection = Inspection.make(db, s)
  const people = Intervention.people(db)
  const intervention = Intervention.make(db, s, people)
  const upkeep = Upkeep.make(db, s)
  const schedules = Schedules.make(db, s, people)
  const firing = Firing.make(db, s, people)
  const cleanup = Cleanup.make(db, s)

  const runAt = `(${microseconds("due")})::int8::text`

  // One probe per lane, each with its own limit, in lane order and only as far as needed: future jobs and lower
  // priorities cost nothing. Gated on the worker's own row in front of everything (`me`), so that a process declared
  // dead takes nothing. The kind filter is opaque (`case`), because no plan may be built around how rare a kind looks.
  // Losing the commit in a server crash only puts the jobs back in line, so it does not wait for the disk. A key that
  // somebody has locked is not waited for: it is released when the job has ended.
  const claimText = `with me as materialized (
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
      ${microseconds("clock_timestamp()")} / 1000 as claimed_at, payload::text as payload,
      progress::text as progress, cancelled_at is not null as cancelled, case when attempt > 0 or rescued > 0 then (
        select json_agg(json_build_object('n', a.n, 'tag', a.tag, 'at', ${Inspection.millis("a.ended_at")},
          'message', case when a.size <= ${historySize} then a.message end, 'error', case when a.size <= ${historySize} then a.error end) order by a.id)
        from (
          select a.*, sum(coalesce(octet_length(a.message), 0) + coalesce(octet_length(a.error::text), 0)) over (order by a.id desc) as size
          from ${s}.attempt a where a.job = picked and (retried_at is null or a.ended_at > retried_at)
        ) a)::text end as history
    from jobs`

  // The row `alive` has the database's clock where the others have an age.
  const beatText = `with beat as (
      update ${s}.worker set beat_at = clock_timestamp() where id = $1::uuid returning id
    )
    select 'alive' as what, b.id::text as id, ${Inspection.millis("clock_timestamp()")} as age from beat b
    union all
    select 'lease', l.id::text, ${Inspection.millis("statement_timestamp() - l.claimed_at")}
    from ${s}.lease l where l.worker = $1::uuid
    union all
    select 'cancelled', j.id::text, 0
    from ${s}.lease l cross join unnest(l.ids) as u(id)
    cross join lateral (select j.id from ${s}.job j where j.id = u.id and j.cancelled_at is not null offset 0) j
    where l.worker = $1::uuid`

  const rows = <A extends object = any>(text: string, params: ReadonlyArray<unknown>) => db.query<A>(text, params)
  const often = <A extends object = any>(text: string, params: ReadonlyArray<unknown>) => db.often<A>(text, params)
  const run = (inUserTransaction: boolean, text: string, params: ReadonlyArray<unknown>) =>
    inUserTransaction ? Database.here<any>(db, text, params) : often<any>(text, params)

  return {
    ...inspection.verbs,
    ...intervention.verbs,
    ...upkeep.verbs,
    ...cleanup.verbs,

    /** The verbs of cron schedules. */
    schedules: { ...schedules.verbs, ...firing.verbs },

    /**
     * Inserts jobs without a unique key whose ids were made for them, all or none. May fail with an error that `isReplay`
     * tells when one of them is there or has been: then they are to be inserted with `insert`. One job can carry a
     * notification; when the server does not take it, it fails with what `isFullOfNews` and `isLockTimeout` tell.
     */
    insertNew: (jobs: ReadonlyArray<Insertion.NewJob>, notification = ""): Effect.Effect<void, SqlError> =>
      Effect.suspend(() =>
        Effect.asVoid(
          // Their last look is safe only with the settings of the queue's own sessions. `insert`, which brings its own,
          // takes a replay as it is.
          db.connect === undefined
            ? often(insertion.insert, Insertion.columnsOf(jobs))
            : jobs.length === 1
            ? often(insertion.insertNewOne, Insertion.oneColumnsOf(jobs[0]!, channel, notification))
            : often(insertion.insertNew, Insertion.newColumnsOf(jobs))
        )
      ),

    /**
     * Inserts jobs without a unique key; returns the ids that were not there before. `patience` bounds, in milliseconds,
     * the wait for a transaction that has taken one of the ids or keys and not ended.
     */
    insert: Effect.fnUntraced(
      function*(jobs: ReadonlyArray<Insertion.NewJob>, inUserTransaction: boolean, patience?: number) {
        return insertedIds(yield* run(inUserTransaction, insertion.insert, Insertion.columnsOf(jobs, patience)), jobs)
      }
    ),

    /**
     * Inserts jobs with a unique key; returns the ids that were inserted. The others have lost to a holder.
     */
    insertUnique: Effect.fnUntraced(
      function*(jobs: ReadonlyArray<Insertion.NewJob>, inUserTransaction: boolean, patience: number | undefined) {
        return insertedIds(
          yield* run(inUserTransaction, insertion.insertUnique, Insertion.keyedColumnsOf(jobs, patience)),
          jobs
        )
      }
    ),

    /**
     * Reads who holds the keys of these jobs. A job that is there or has ended holds its own; no row when nobody does.
     */
    holders: (
      jobs: ReadonlyArray<Insertion.NewJob>,
      inUserTransaction: boolean
    ): Effect.Effect<
      ReadonlyArray<{ readonly id: string; readonly holder: string; readonly expired: boolean }>,
      SqlError
    > =>
      run(inUserTransaction, insertion.holders, [
        jobs.map((job) => job.id),
        jobs.map((job) => job.kind),
        jobs.map((job) => job.unique!.key)
      ]),

    /**
     * Gives a waiting holder of a key the payload and options of a new job; `false` when it does not stand in line.
     */
    replace: (holder: string, job: Insertion.NewJob, inUserTransaction: boolean): Effect.Effect<boolean, SqlError> =>
      Effect.map(
        run(inUserTransaction, insertion.replace, [
          holder,
          job.kind,
          job.queue,
          job.priority,
          job.maxAttempts,
          job.timeout ?? null,
          job.payload,
          job.metadata,
          job.trace ?? "",
          job.unique!.onConflict,
          String(job.delay),
          job.runAt === undefined ? "" : String(job.runAt),
          job.unique!.period === undefined ? "" : String(job.unique!.period),
          job.awaited === true ? "awaited" : ""
        ]),
        (rows) => rows[0]!.count === 1
      ),

    /**
     * Removes those keys of these jobs whose period is over.
     */
    expireKeys: (jobs: ReadonlyArray<Insertion.NewJob>, inUserTransaction: boolean): Effect.Effect<void, SqlError> =>
      Effect.asVoid(run(inUserTransaction, insertion.expireKeys, [
        jobs.map((job) => job.kind),
        jobs.map((job) => job.unique!.key)
      ])),

    /**
     * Takes up to `limit` due jobs of one queue under a new lease. Nothing, when the worker's row is gone.
     */
    claim: (options: {
      readonly worker: string
      readonly lease: string
      readonly queue: string
      readonly lanes: ReadonlyArray<LaneCursor>
      readonly kinds: ReadonlyArray<string>
      readonly prefixes: ReadonlyArray<string>
      readonly limit: number
    }): Effect.Effect<ReadonlyArray<ClaimedRow>, SqlError> =>
      Effect.map(
        db.oftenInOrder(claimText, [
          options.worker,
          options.lease,
          options.queue,
          Database.arrayText(options.lanes.map((lane) => lane.lane)),
          Database.arrayText(options.lanes.map((lane) => lane.runAt)),
          Database.arrayText(options.lanes.map((lane) => lane.id)),
          options.kinds,
          options.prefixes,
          options.limit
        ]),
        (rows) => rows.map(claimedRow)
      ),

    /**
     * Settles jobs under the fence: only those that are still in their lease. At most about 1 000 a statement. The end of
     * those that somebody waits for is announced with the commit.
     */
    settle: (
      worker: string,
      entries: ReadonlyArray<Settlement.Entry>,
      now?: number
    ): Effect.Effect<ReadonlyArray<Settlement.Answer>, SqlError> => {
      const settle = (entries: ReadonlyArray<Settlement.Entry>, channel: string) =>
        often<Settlement.Answer>(settlement.settle, Settlement.columnsOf(worker, entries, channel, now))
      // The settler sends those that have completed apart, for this.
      const complete = (channel: string) =>
        entries.every((entry) => entry.forget === true)
          ? often<Settlement.Completing>(settlement.completeForgotten, Settlement.forgottenColumnsOf(entries))
          : often<Settlement.Completing>(
            settlement.completeKept,
            Settlement.keptColumnsOf(worker, entries, channel, now)
          ).pipe(
            // A row of the same id has ended before, which nothing here lets happen: then they end as the others do.
            Effect.catchIf(Database.isReplay, () => settle(entries, channel))
          )
      const send = (channel: string) =>
        entries.every(({ verb }) => verb === "completed")
          ? Effect.flatMap(complete(channel), (rows) => {
            const { answers, unsettled } = Settlement.splitAnswers(entries, rows)
            if (unsettled.length === 0) return Effect.succeed(answers)
            // Should this fail, all are sent again, and those that are settled now are `gone` then: who waits for one of
            // them looks by itself.
            return Effect.map(settle(unsettled, channel), (more) => [...answers, ...more])
          })
          : settle(entries, channel)
      // A session that listens and does nothing has filled the server's queue of notifications. That is nobody's result to
      // pay for: who waits looks by itself.
      return Effect.catchIf(send(channel), Database.isFullOfNews, () => send(""))
    },

    /**
     * Settles one job that has completed in the application's transaction. See `settle`.
     */
    completeHere: (
      worker: string,
      entry: Settlement.Entry
    ): Effect.Effect<ReadonlyArray<Settlement.Answer>, SqlError> =>
      Database.here(db, settlement.complete, Settlement.columnsOf(worker, [entry])),

    /**
     * Moves a job out of its lease into one of its own. `"alone"`: it has one already; `"gone"`: it is no longer in that
     * lease.
     */
    detach: (lease: string, id: string, own: string): Effect.Effect<"moved" | "alone" | "gone", SqlError> =>
      Effect.map(
        rows(settlement.detach, [lease, id, own]),
        ([row]) => row === undefined ? "gone" : row.alone ? "alone" : "moved"
      ),

    /**
     * Says in the application's transaction how long its session may do nothing, in milliseconds.
     */
    boundIdle: (millis: number): Effect.Effect<void, SqlError> =>
      Effect.asVoid(Database.here(
        db,
        "select pg_catalog.set_config('idle_in_transaction_session_timeout', $1::text, true) as bound",
        [String(Math.min(longestIdle, Math.ceil(millis)))]
      )),

    /**
     * Registers a worker: from now on it may claim.
     */
    register: (worker: {
      readonly id: string
      readonly name: string
      readonly queues: ReadonlyArray<string>
      readonly kinds: ReadonlyArray<string>
      readonly prefixes: ReadonlyArray<string>
      readonly lease: number
    }): Effect.Effect<void, SqlError> =>
      Effect.asVoid(rows(
        `insert into ${s}.worker (id, name, queues, kinds, prefixes, lease_ms)
         values ($1::uuid, $2::text, $3::text[], $4::text[], $5::text[], $6::int8) on conflict (id) do nothing`,
        [worker.id, worker.name, worker.queues, worker.kinds, worker.prefixes, worker.lease]
      )),

    /**
     * Removes a worker that has handed everything back.
     */
    unregister: (worker: string): Effect.Effect<void, SqlError> =>
      Effect.asVoid(rows(`delete from ${s}.worker where id = $1::uuid`, [worker])),

    /** The text of `beat`, which travels on a connection of its own. */
    beatText,

    /** The statements as they are sent, for tests of their plans. */
    texts: {
      ...insertion,
      claim: claimText,
      beat: beatText,
      ...settlement,
      ...inspection.texts,
      ...intervention.texts,
      ...upkeep.texts,
      ...cleanup.texts,
      schedules: { ...schedules.texts, ...firing.texts }
    },

    /**
     * Takes back the jobs of up to `limit` leases whose worker is gone, in the order of their ids and after the lease
     * `after`; counts a rescue on each job.
     */
    rescue: (limit: number, after: string = Database.firstId): Effect.Effect<TakenBack, SqlError> =>
      Effect.map(rows(settlement.rescue, [limit, after]), takenBack),

    /**
     * Puts the jobs of a worker's own leases back in line as if they had not been claimed.
     */
    release: (worker: string, leases: ReadonlyArray<string>): Effect.Effect<TakenBack, SqlError> =>
      Effect.map(rows(settlement.release, [worker, leases]), takenBack),

    /**
     * Puts the jobs of every lease of a worker back in line as if they had not been claimed.
     */
    releaseAll: (worker: string): Effect.Effect<void, SqlError> =>
      Effect.flatMap(
        rows(`select array_to_string(array_agg(id), ',') as ids from ${s}.lease where worker = $1::uuid`, [worker]),
        ([row]) =>
          row.ids === null
            ? Effect.void
            : Effect.asVoid(rows(settlement.release, [worker, Database.idsOf(row.ids)]))
      )
  }
}

/** The statements of one schema. */
export type Store = ReturnType<typeof make>

const insertedIds = (
  rows: ReadonlyArray<{ readonly count: number; readonly ids: string | null }>,
  jobs: ReadonlyArray<Insertion.NewJob>
): ReadonlySet<string> => {
  const row = rows[0]!
  return new Set(row.count === jobs.length ? jobs.map((job) => job.id) : row.ids === null ? [] : row.ids.split(","))
}

const takenBack = (
  rows: ReadonlyArray<
    Omit<TakenBack, "queues" | "awaited"> & { readonly queues: string | null; readonly awaited: string | null }
  >
): TakenBack => ({ ...rows[0]!, queues: Database.listOf(rows[0]!.queues), awaited: Database.listOf(rows[0]!.awaited) })

/**
 * Reads the rows of `beatText`.
 */
export const readBeat = (
  rows: ReadonlyArray<{ readonly what: string; readonly id: string; readonly age: number }>
): Beat => ({
  alive: rows.some((row) => row.what === "alive"),
  clock: rows.find((row) => row.what === "alive")?.age,
  leases: rows.filter((row) => row.what === "lease"),
  cancelled: rows.filter((row) => row.what === "cancelled").map((row) => row.id)
})
