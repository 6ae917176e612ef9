/**
 * The verbs of the storage, one for each thing to do, which send the statement that does it at the least cost. Most
 * texts are next to those that they resemble.
 *
 * Every statement is a fixed text over bound parameters; the schema name, validated and quoted, is the only thing ever
 * written into one. Arrays are bound as text and cast, so that any driver can send them.
 *
 * @since 0.1.0
 */
import * as Effect from "effect/Effect"
import type { SqlError } from "effect/sql/SqlError"
import * as Claim from "./Claim.ts"
import * as Cleanup from "./Cleanup.ts"
import * as Database from "./Database.ts"
import * as Firing from "./Firing.ts"
import * as Insertion from "./Insertion.ts"
import * as Inspection from "./Inspection.ts"
import * as Intervention from "./Intervention.ts"
import * as Schedules from "./Schedules.ts"
import * as Settlement from "./Settlement.ts"
import * as Upkeep from "./Upkeep.ts"

export {
  type AttemptRow,
  type ClaimedRow,
  type LaneCursor,
  laneStart,
  priorityLanes,
  suspectLane,
  suspectLanes
} from "./Claim.ts"
export { columnsOf, keyedColumnsOf, type NewJob, type UniqueRule } from "./Insertion.ts"
export { type EndRow, everything, type Stats } from "./Inspection.ts"

/** The longest idle time that the server can hold, in milliseconds: 24 days. */
const longestIdle = 2_147_483_647

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

/** Asks whether a session is still there. */
export const probeText = "select 1 as here"

/** Announces queues: one statement, whatever their number. */
export const notifyText = "select pg_notify($1::text, p)::text as sent from unnest($2::text[]) as p"

/** The same in a session without the setting: nothing is lost with it, so it commits without waiting for the disk. */
export const notifyLazilyText = `select set_config('synchronous_commit', 'off', true),
    pg_notify($1::text, p)::text as sent from unnest($2::text[]) as p`

/** Asks what a session was given at its start, and for a limit that only servers from PostgreSQL 17 on have. */
export const givenText =
  "select coalesce(current_setting($1::text, true), '') as given, current_setting('transaction_timeout', true) as timeout"

/** Ends the session that it is sent over. */
const endText = "select pg_terminate_backend(pg_backend_pid()) as ended"

/**
 * Ends sessions that were opened while the server, the database or the role was read-only: they stay so for as long as they
 * live, and a pool lends first what it has lent last. What it lends next is most probably what has just refused.
 */
const withoutReadOnly = (db: Database.Database): Database.Database => {
  if (!db.keepsSettings) return db
  const endsBy = (send: Database.Database["query"]) => (error: SqlError) =>
    Database.isReadOnly(error) ? Effect.ignore(send(endText, [])) : Effect.void
  const [end, endOften] = [endsBy(db.query), endsBy(db.often)]
  return {
    ...db,
    query: (text, params) => Effect.tapError(db.query(text, params), end),
    often: (text, params) => Effect.tapError(db.often(text, params), endOften),
    oftenInOrder: (text, params) => Effect.tapError(db.oftenInOrder(text, params), endOften)
  }
}

/**
 * Builds the statements for one schema.
 */
export const make = (database: Database.Database, schema: string) => {
  const db = withoutReadOnly(database)
  const s = Database.quoteSchema(schema)
  const insertion = Insertion.statements(s)
  const claimText = Claim.statement(s)
  const settlement = Settlement.statements(s)
  const channel = Database.channelOf(schema)
  const inspection = Inspection.make(db, s)
  const people = Intervention.people(db)
  const intervention = Intervention.make(db, s, people)
  const upkeep = Upkeep.make(db, s)
  const schedules = Schedules.make(db, s, people)
  const firing = Firing.make(db, s, people)
  const cleanup = Cleanup.make(db, s)

  // The row `alive` has the database's clock where the others have an age. A beat that is lost in a crash is not missed (see
  // `reap`), and one that waits for a disk or a standby is: so it commits without.
  const beatText = `with beat as (
      update ${s}.worker set beat_at = clock_timestamp() where id = $1::uuid returning id
    )
    select 'alive' as what, b.id::text as id, ${Inspection.millis("clock_timestamp()")} as age from beat b
    union all
    select 'setting', set_config('synchronous_commit', 'off', true), 0 from beat
    union all
    select 'lease', l.id::text, ${Inspection.millis("statement_timestamp() - l.claimed_at")}
    from ${s}.lease l where l.worker = $1::uuid
    union all
    select 'cancelled', j.id::text, 0
    from ${s}.lease l cross join unnest(l.ids) as u(id)
    cross join lateral (select j.id from ${s}.job j where j.id = u.id and j.cancelled_at is not null offset 0) j
    where l.worker = $1::uuid`

  // Asks for the rights of claim, settle, rescue and beat, and for no row: whether there would be one does not matter to them.
  const rights = (table: string, key: string, verbs: ReadonlyArray<"insert" | "update" | "delete">) =>
    verbs.map((verb) => {
      if (verb === "insert") return `insert into ${s}.${table} (${key}) select ${key} from ${s}.${table} where false`
      return verb === "update"
        ? `select from ${s}.${table} where false for update`
        : `delete from ${s}.${table} where false`
    })
  const mayWorkText = `with ${
    [
      ...rights("job", "id", ["update", "delete"]),
      ...rights("ready", "id", ["insert", "update", "delete"]),
      ...rights("lease", "id", ["insert", "update", "delete"]),
      ...rights("worker", "id", ["insert", "update", "delete"]),
      ...rights("finished", "id", ["insert"]),
      ...rights("attempt", "job", ["insert"]),
      ...rights("unique_key", "key", ["update", "delete"]),
      ...rights("parked", "kind", ["insert", "update", "delete"])
    ].map((text, index) => `right_${index} as (${text})`).join(", ")
  } select 1 as allowed`

  const rows = <A extends object = any>(text: string, params: ReadonlyArray<unknown>) => db.query<A>(text, params)
  const often = <A extends object = any>(text: string, params: ReadonlyArray<unknown>) => db.often<A>(text, params)
  const run = (inUserTransaction: boolean, text: string, params: ReadonlyArray<unknown>) =>
    inUserTransaction ? Database.here<any>(db, text, params) : often<any>(text, params)

  /** Removes a worker, whatever leases it has. */
  const unregister = (worker: string): Effect.Effect<void, SqlError> =>
    Effect.asVoid(rows(`delete from ${s}.worker where id = $1::uuid`, [worker]))

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
          !db.keepsSettings
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
     * Commits after the insert of a job that was found to be there, and waits for what that waits for.
     */
    replayed: (inUserTransaction: boolean): Effect.Effect<void, SqlError> =>
      Effect.asVoid(run(inUserTransaction, Insertion.replayedText, [])),

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
     * Removes those keys of these jobs whose period is over. Waits at most `patience` milliseconds for a stranger's
     * transaction that has one of them locked.
     */
    expireKeys: (
      jobs: ReadonlyArray<Insertion.NewJob>,
      inUserTransaction: boolean,
      patience: number | undefined
    ): Effect.Effect<void, SqlError> =>
      Effect.asVoid(run(inUserTransaction, insertion.expireKeys, [
        jobs.map((job) => job.kind),
        jobs.map((job) => job.unique!.key),
        Insertion.patienceOf(patience)
      ])),

    /**
     * Takes up to `limit` due jobs of one queue under a new lease. Nothing, when the worker's row is gone.
     */
    claim: (claim: Claim.Claim): Effect.Effect<ReadonlyArray<Claim.ClaimedRow>, SqlError> =>
      Effect.map(db.oftenInOrder(claimText, Claim.paramsOf(claim)), (rows) => rows.map(Claim.rowOf)),

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
     * Fails with what the server says when this role may not do what a worker does.
     */
    mayWork: (): Effect.Effect<void, SqlError> => Effect.asVoid(rows(mayWorkText, [])),

    unregister,

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

    /** The first lease that `rescue` would take, and how many jobs are in it. */
    firstLost: (
      after: string = Database.firstId
    ): Effect.Effect<{ readonly id: string; readonly jobs: number } | undefined, SqlError> =>
      Effect.map(rows<{ id: string; jobs: number }>(settlement.lostNames, [1, after]), ([lease]) => lease),

    /** How many leases there are whose worker is gone, or looks as if it were. */
    orphaned: (): Effect.Effect<number, SqlError> =>
      Effect.map(rows<{ count: number }>(settlement.orphaned, []), ([row]) => row!.count),

    /**
     * Gives each job of a lease whose worker is gone a lease of its own, and returns how many that were; none when it was
     * the only one, or somebody else has the lease by now.
     */
    scatter: (lease: string): Effect.Effect<number, SqlError> =>
      Effect.map(rows<{ count: number }>(settlement.scatter, [lease]), ([row]) => row!.count),

    /**
     * Puts the jobs of a worker's own leases back in line as if they had not been claimed.
     */
    release: (worker: string, leases: ReadonlyArray<string>): Effect.Effect<TakenBack, SqlError> =>
      Effect.map(rows(settlement.release, [worker, leases]), takenBack),

    /**
     * Removes a worker that ends. Leases that it still has go back in line first, as if they had not been claimed.
     */
    leave: (worker: string): Effect.Effect<void, SqlError> =>
      Effect.flatMap(
        // One round trip where nothing is left: an end on a slow line has no time for two.
        rows(
          `with held as materialized (select id from ${s}.lease where worker = $1::uuid),
             gone as (delete from ${s}.worker where id = $1::uuid and not exists (select 1 from held))
           select array_to_string(array_agg(id), ',') as ids from held`,
          [worker]
        ),
        ([row]) =>
          row.ids === null
            ? Effect.void
            : Effect.andThen(rows(settlement.release, [worker, Database.idsOf(row.ids)]), unregister(worker))
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
