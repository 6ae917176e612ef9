/** A queue under test: a fresh database, the application's client, the ledger, and conditions to wait for. */
import { PgClient } from "@effect/sql-pg"
import { assert } from "@effect/vitest"
import { Clock, Deferred, Effect, Fiber, Layer, Redacted, Schedule, type Scope, Tracer } from "effect"
import { SqlClient, type SqlError } from "effect/sql"
import * as Database from "../../src/Database.ts"
import { JobQueue, type JobQueueError } from "../../src/index.ts"
import type * as Queue from "../../src/JobQueue.ts"
import * as Store from "../../src/Store.ts"
import { clientLayer, makeDatabase, TestDatabase } from "./database.ts"
import { hidden } from "./hidden.ts"
import { createLedger, Ledger } from "./ledger.ts"
import { assertInPlace, assertInPlaceButKeys, schema, Storage } from "./storage.ts"

/** What {@link withQueue} accepts. */
export interface QueueOptions {
  /** The application's pool. */
  readonly pool?: Omit<PgClient.PgPoolConfig, "url">
  readonly queue?: Queue.Options
  /** A server of one's own. */
  readonly serverUrl?: string
}

/** What the body of a test has at hand. */
export type Services = JobQueue | PgClient.PgClient | SqlClient.SqlClient | TestDatabase | Ledger | Scope.Scope

/** A fresh database with a ledger in it. */
export const databaseWithLedger = (
  serverUrl?: string
): Layer.Layer<TestDatabase | Ledger, SqlError.SqlError> =>
  Layer.effectDiscard(createLedger).pipe(
    Layer.provideMerge(
      Layer.unwrap(Effect.map(TestDatabase, ({ url }) => Ledger.layer(Redacted.value(url), "test")))
    ),
    Layer.provideMerge(Layer.fresh(Layer.effect(TestDatabase, Effect.suspend(() => makeDatabase(serverUrl)))))
  )

/** One more queue on the {@link TestDatabase} in the context, with a client of its own: a second process, so to speak. */
export const queueLayer = (
  options: QueueOptions = {}
): Layer.Layer<
  JobQueue | PgClient.PgClient | SqlClient.SqlClient,
  SqlError.SqlError | JobQueueError,
  TestDatabase
> => Layer.fresh(Layer.provideMerge(JobQueue.layer(options.queue), clientLayer(options.pool)))

/** A client that cannot LISTEN: any `SqlClient` on PostgreSQL that is not a `PgClient`. Its sessions are called "polling". */
export const pollingClient = (
  pool?: Omit<PgClient.PgPoolConfig, "url">
): Layer.Layer<SqlClient.SqlClient, SqlError.SqlError, TestDatabase> =>
  Layer.effect(
    SqlClient.SqlClient,
    Effect.map(PgClient.PgClient, hidden)
  ).pipe(Layer.provide(clientLayer({ applicationName: "polling", ...pool })))

/** One more queue on the {@link TestDatabase} that works by polling alone. */
export const pollingQueueLayer = (pool?: Omit<PgClient.PgPoolConfig, "url">) =>
  Layer.fresh(JobQueue.layer().pipe(Layer.provideMerge(pollingClient(pool))))

/** Runs the body of a test on a queue of its own that works by polling alone. */
export const withPolling = <A, E, R>(
  body: Effect.Effect<A, E, R>,
  pool?: Omit<PgClient.PgPoolConfig, "url">
) => Effect.scoped(body).pipe(Effect.provide(Layer.provideMerge(pollingQueueLayer(pool), databaseWithLedger())))

/** Runs the body of a test on a queue of its own. Workers that are built in its scope end before the queue does. */
export const withQueue = <A, E, R>(body: Effect.Effect<A, E, R>, options: QueueOptions = {}) =>
  Effect.scoped(body).pipe(
    Effect.provide(Layer.provideMerge(queueLayer(options), databaseWithLedger(options.serverUrl)))
  )

/** Starts a layer, a worker for instance, in the scope of the test. */
export const running = <A, E, R>(layer: Layer.Layer<A, E, R>) => Effect.asVoid(Layer.build(Layer.fresh(layer)))

/** The URL of the database under test, for other processes. */
export const databaseUrl = Effect.map(TestDatabase, ({ url }) => Redacted.value(url))

/** Reads rows, on a connection that belongs to no queue and no application. */
export const rows = <A extends object = any>(text: string, params?: ReadonlyArray<unknown>) =>
  Effect.flatMap(Ledger, ({ query }) => query<A>(text, params))

/** Reads the first column of the first row. */
export const value = <A = number>(text: string, params?: ReadonlyArray<unknown>) =>
  Effect.map(rows(text, params), ([row]) => Object.values(row ?? {})[0] as A)

/** A tracer that keeps its spans. */
export const tracing = () => {
  const spans: Array<Tracer.Span> = []
  const tracer = Tracer.make({
    span: (options) => {
      const span = new Tracer.NativeSpan(options)
      spans.push(span)
      return span
    }
  })
  return { spans, tracer }
}

/** Milliseconds of the monotonic clock. */
export const now = Effect.map(Clock.Clock, (clock) => Number(clock.monotonicTimeNanosUnsafe()) / 1_000_000)

/** Waits until a condition holds and returns how long that took, in milliseconds; fails when it takes too long. */
export const until = Effect.fnUntraced(function*<E, R>(
  what: string,
  condition: Effect.Effect<boolean, E, R>,
  options: { readonly within?: number; readonly every?: number } = {}
) {
  const begun = yield* now
  const within = options.within ?? 20_000
  while (!(yield* condition)) {
    if ((yield* now) - begun > within) {
      return yield* Effect.die(new Error(`not within ${within} ms: ${what}`))
    }
    yield* Effect.sleep(options.every ?? 10)
  }
  return (yield* now) - begun
})

/** Waits until the first column of the first row is as expected. */
export const untilValue = (
  text: string,
  expected: unknown,
  options?: { readonly within?: number; readonly every?: number; readonly params?: ReadonlyArray<unknown> }
) => {
  let last: unknown
  return until(
    `${text} = ${String(expected)}`,
    Effect.map(value<unknown>(text, options?.params), (found) => {
      last = found
      return found === expected
    }),
    options
  ).pipe(Effect.tapDefect(() => Effect.logError(`found ${String(last)}`)))
}

/** Waits until every job has ended. */
export const untilAllEnded = (options?: { readonly within?: number; readonly every?: number }) =>
  untilValue("select count(*)::int from pgqueue.job", 0, options)

/** Waits until the sessions with this `application_name` have asked nothing of the database for a while. */
export const untilQuiet = (name: string) =>
  untilValue(
    `select coalesce(max(state_change) < clock_timestamp() - interval '300 ms', false) from pg_stat_activity
     where application_name = $1 and datname = current_database() and query not like 'select 1 %'`,
    true,
    { params: [name] }
  )

/** Counts the entries of the ledger in one phase. */
export const phases = (phase: string) => value("select count(*)::int from ledger where phase = $1", [phase])

/** Jobs that were started more than once. */
export const startedTwice = rows<{ job: string }>(
  "select job::text from ledger where phase = 'start' group by job having count(*) > 1"
)

/**
 * From here on every end of a job is written down: by a trigger that also sees a second end, of which the table of
 * finished jobs would show nothing.
 */
export const watchEnds = Effect.gen(function*() {
  yield* rows("create table public.ending (job uuid not null, worker uuid not null)")
  yield* rows(`create function public.note_end() returns trigger language plpgsql as
    $$ begin insert into public.ending values (new.id, new.worker); return new; end $$`)
  yield* rows(
    "create trigger note_end before insert on pgqueue.finished for each row execute function public.note_end()"
  )
})

/** Jobs that have ended more than once, of those whose ends were watched. */
export const endedTwice = rows<{ job: string }>("select job::text from ending group by job having count(*) > 1")

/** Jobs that were started more often than the failed and lost attempts in their history explain. */
export const startedForNothing = rows<{ job: string }>(
  `select l.job::text from ledger l where l.phase = 'start' group by l.job
   having count(*) > 1 + (select count(*) from pgqueue.attempt a where a.job = l.job)`
)

/** Jobs that completed and paid for something else than failing: the first rescue is free, every later one an attempt. */
export const burnt = rows<{ id: string }>(
  `select id::text from pgqueue.finished f where status = 'completed' and attempt <> greatest(rescued, 1) +
     (select count(*) from pgqueue.attempt a where a.job = f.id and a.tag <> 'Lost')`
)

/** Begins a transaction with something in it and keeps it open; returns how to end it. */
export const stranger = Effect.fnUntraced(function*<A, E, R>(something: Effect.Effect<A, E, R>) {
  const sql = yield* SqlClient.SqlClient
  const held = yield* Deferred.make<void>()
  const end = yield* Deferred.make<void>()
  const fiber = yield* Effect.forkScoped(sql.withTransaction(
    Effect.andThen(something, Effect.andThen(Deferred.succeed(held, undefined), Deferred.await(end)))
  ))
  yield* Deferred.await(held)
  return {
    commit: Effect.andThen(Deferred.succeed(end, undefined), Fiber.join(fiber)),
    rollback: Fiber.interrupt(fiber)
  }
})

/** The same with a statement of the application's client. */
export const strangerDoes = (text: string) => stranger(Effect.flatMap(SqlClient.SqlClient, (sql) => sql.unsafe(text)))

/** Has a trigger `refuse` do something, such as to raise an exception, before a row of a table that meets a condition is inserted. */
export const refusing = (table: string, condition: string, body: string) =>
  rows(`create function public.refuse() returns trigger language plpgsql as $$ begin
      if ${condition} then ${body} end if;
      return new;
    end $$`).pipe(Effect.andThen(
    rows(`create trigger refuse before insert on pgqueue.${table} for each row execute function public.refuse()`)
  ))

/** Counts from here on how many statements begin to do something to a table, in `public.tries`: what is rolled back, too. */
export const counting = (event: "insert" | "delete", table: string) =>
  rows("create sequence public.tries").pipe(
    Effect.andThen(rows(`create function public.counted() returns trigger language plpgsql as
      $$ begin perform nextval('public.tries'); return null; end $$`)),
    Effect.andThen(
      rows(
        `create trigger counted before ${event} on pgqueue.${table} for each statement execute function public.counted()`
      )
    )
  )

/** Fails unless every job is in exactly one place, and every lease, line entry and key belongs to one. */
export const allInPlace = Effect.suspend(() => onStorage(assertInPlace))

/** As {@link allInPlace}, where jobs may have given their keys back before their end. */
export const allInPlaceButKeys = Effect.suspend(() => onStorage(assertInPlaceButKeys))

const onStorage = Effect.fnUntraced(function*<A, E>(check: Effect.Effect<A, E, Storage>) {
  const { sql } = yield* Ledger
  const db = yield* Database.make(sql, { maxConnections: 1 })
  return yield* Effect.provideService(check, Storage, { sql, db, store: Store.make(db, schema) })
}, Effect.scoped)

/** Fails unless the rows are these. */
export const assertRows = (text: string, expected: ReadonlyArray<object>, params?: ReadonlyArray<unknown>) =>
  Effect.map(rows(text, params), (found) => assert.deepStrictEqual(found, expected))

/** The middle, or any other part, of some measurements. */
export const quantile = (measured: ReadonlyArray<number>, part: number): number =>
  measured.toSorted((a, b) => a - b)[Math.min(measured.length - 1, Math.floor(measured.length * part))]!

/** Repeats a check until it holds, for what is about to become true. */
export const eventually = <A, E, R>(check: Effect.Effect<A, E, R>) =>
  Effect.retry(Effect.sandbox(check), Schedule.max([Schedule.spaced("20 millis"), Schedule.recurs(500)]))

export { schema, SqlClient }
