/**
 * A database clock that a test can move: the queue reads `testclock` where it would read the clock of the server. The queue
 * works by polling, because only the texts of a client that is not a `PgClient` go through the hands of a test.
 */
import { PgClient } from "@effect/sql-pg"
import { Effect, Layer } from "effect"
import { SqlClient, type SqlError } from "effect/sql"
import * as Database from "../../src/Database.ts"
import { JobQueue, type JobQueueError } from "../../src/index.ts"
import type * as Queue from "../../src/JobQueue.ts"
import * as Migrations from "../../src/Migrations.ts"
import * as Store from "../../src/Store.ts"
import { clientLayer, databaseLayer, type TestDatabase } from "./database.ts"
import type { Ledger } from "./ledger.ts"
import { databaseWithLedger, rows } from "./queue.ts"
import { schema, Storage } from "./storage.ts"

// `statement_timestamp` is stable, so that an index can be searched by it, as by the original.
const createText = [
  "create schema testclock",
  "create table testclock.moved (by interval not null)",
  "insert into testclock.moved values ('0')",
  `create function testclock.clock_timestamp() returns timestamptz language sql volatile
    as 'select pg_catalog.clock_timestamp() + by from testclock.moved'`,
  `create function testclock.statement_timestamp() returns timestamptz language sql stable
    as 'select pg_catalog.statement_timestamp() + by from testclock.moved'`
]

/** Writes the movable clock into a statement. */
const withTestClock = (text: string) =>
  text.replaceAll(/\b(?:pg_catalog\.)?(clock|statement)_timestamp\(\)/g, "testclock.$1_timestamp()")

/** A client that reads the movable clock, in its tables' defaults and functions too if it has migrated them. */
const clocked = (client: SqlClient.SqlClient): SqlClient.SqlClient =>
  // Sound: it lacks nothing that a `SqlClient` has.
  new Proxy(client, {
    has: (target, key) => key !== PgClient.TypeId && key in target,
    get: (target, key) => {
      if (key === PgClient.TypeId || key === "config") return undefined
      if (key === "withoutTransforms") return () => clocked(target.withoutTransforms())
      if (key === "unsafe") {
        return (text: string, params?: ReadonlyArray<unknown>) => target.unsafe(withTestClock(text), params)
      }
      return Reflect.get(target, key)
    }
  })

const clockedClient = (
  pool?: Omit<PgClient.PgPoolConfig, "url">
): Layer.Layer<SqlClient.SqlClient, SqlError.SqlError, TestDatabase> =>
  Layer.effect(SqlClient.SqlClient, Effect.map(PgClient.PgClient, clocked)).pipe(Layer.provide(clientLayer(pool)))

/** One more queue on the {@link TestDatabase} that goes by the movable clock: a second process, so to speak. */
export const clockedQueueLayer = (
  options: { readonly pool?: Omit<PgClient.PgPoolConfig, "url">; readonly queue?: Queue.Options } = {}
): Layer.Layer<
  JobQueue | SqlClient.SqlClient,
  SqlError.SqlError | JobQueueError,
  TestDatabase
> => Layer.fresh(Layer.provideMerge(JobQueue.layer(options.queue), clockedClient(options.pool)))

/** Runs the body of a test on a queue of its own that goes by the movable clock. */
export const withClock = <A, E, R>(
  body: Effect.Effect<A, E, R>,
  options?: Parameters<typeof clockedQueueLayer>[0]
) =>
  Effect.scoped(body).pipe(
    Effect.provide(
      clockedQueueLayer(options).pipe(
        Layer.provide(Layer.effectDiscard(Effect.forEach(createText, (text) => rows(text)))),
        Layer.provideMerge(databaseWithLedger())
      )
    )
  )

/** Moves the database's clock by so many milliseconds, back when they are negative. */
export const moveClock = (millis: number): Effect.Effect<void, SqlError.SqlError, Ledger> =>
  Effect.asVoid(
    rows("update testclock.moved set by = by + $1::float8 * interval '1 millisecond'", [millis])
  )

/** A {@link Storage} that goes by the movable clock. */
export const clockedStorage: Layer.Layer<
  Storage | SqlClient.SqlClient,
  SqlError.SqlError | Migrations.JobQueueError
> = Layer.provideMerge(
  Layer.effect(
    Storage,
    Effect.gen(function*() {
      const sql = yield* SqlClient.SqlClient
      yield* Effect.forEach(createText, (text) => sql.unsafe(text))
      const db = yield* Database.make(clocked(sql), { maxConnections: 24 })
      yield* Migrations.run(db.own, schema)
      return { sql, db, store: Store.make(db, schema) }
    })
  ),
  databaseLayer({ maxConnections: 8 })
)
