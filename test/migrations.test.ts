/** Migrations: any number of processes at once, a clear word when the version is wrong, and the SQL function `enqueue`. */
import { assert, layer } from "@effect/vitest"
import { Effect } from "effect"
import { SqlClient } from "effect/sql"
import * as Database from "../src/Database.ts"
import * as Migrations from "../src/Migrations.ts"
import { clientLayer, databaseLayer, makeDatabase, TestDatabase } from "./support/database.ts"
import {
  blocked,
  claimed,
  entry,
  join,
  keyed,
  query,
  rule,
  session,
  stateOf,
  Storage,
  uuid,
  value
} from "./support/storage.ts"

layer(databaseLayer({ maxConnections: 2 }), { excludeTestServices: true })("migrations", (it) => {
  /** Runs the migrations the way one process does: with a client of its own. */
  const boot = (schema: string) =>
    Effect.gen(function*() {
      const db = yield* Database.make(yield* SqlClient.SqlClient, { maxConnections: 1 })
      yield* Migrations.run(db.own, schema)
      yield* Migrations.verify(db.own, schema)
      yield* Migrations.verifyServer(db.own)
    }).pipe(Effect.scoped, Effect.provide(clientLayer({ maxConnections: 1 }), { local: true }))

  it.effect("sixteen processes that start at once on an empty database all come up, five times over", () =>
    Effect.gen(function*() {
      for (let round = 0; round < 5; round++) {
        const database = yield* makeDatabase()
        yield* Effect.all(Array.from({ length: 16 }, () => boot("pgqueue")), { concurrency: "unbounded" }).pipe(
          Effect.provideService(TestDatabase, database)
        )
        const [row] = yield* SqlClient.SqlClient.use((sql) =>
          sql<{ tables: number; migrations: number }>`select
            (select count(*)::int4 from pg_tables where schemaname = 'pgqueue') as tables,
            (select count(*)::int4 from pgqueue.migration) as migrations`
        ).pipe(Effect.provide(clientLayer(), { local: true }), Effect.provideService(TestDatabase, database))
        assert.deepStrictEqual(row, { tables: 15, migrations: Migrations.version })
      }
    }))

  it.effect("two schemas in one database have nothing in common", () =>
    Effect.gen(function*() {
      yield* Effect.all([boot("one"), boot("two"), boot("one"), boot("two")], { concurrency: "unbounded" })
      const sql = yield* SqlClient.SqlClient
      yield* sql`select one.enqueue('k')`
      const [row] = yield* sql<{ one: number; two: number }>`select
        (select count(*)::int4 from one.job) as one, (select count(*)::int4 from two.job) as two`
      assert.deepStrictEqual(row, { one: 1, two: 0 })
    }))

  it.effect("running again changes nothing and takes no lock", () =>
    Effect.gen(function*() {
      const sql = yield* SqlClient.SqlClient
      yield* boot("again")
      yield* sql.withTransaction(Effect.gen(function*() {
        yield* sql`select pg_advisory_xact_lock(1885827953, hashtext('again'))`
        yield* sql`lock table again.migration, again.job in share mode`
        yield* boot("again")
      }))
    }))

  it.effect("what was there before can be changed under the limits of version 5", () =>
    Effect.gen(function*() {
      const sql = yield* SqlClient.SqlClient
      const at = (from: number, to: number) =>
        Effect.forEach(
          Migrations.migrations.slice(from, to).flatMap(([, , statements]) => statements("aged", "aged")),
          (text) => sql.unsafe(text)
        )
      yield* sql`create schema aged`
      yield* at(0, 4)
      yield* sql.unsafe(
        `insert into aged.worker (id, name, queues, kinds, prefixes, lease_ms)
           select gen_random_uuid(), name, '{}', '{}', '{}', 1 from unnest(array['', repeat('n', 300)]) name`
      )
      yield* sql.unsafe("select aged.enqueue('k')")
      yield* sql.unsafe("update aged.job set trace = repeat('t', 300), cancel_reason = repeat('é', 5000)")
      yield* at(4, 5)
      yield* sql`update aged.worker set beat_at = clock_timestamp()`
      yield* sql`update aged.job set attempt = attempt + 1`
      assert.deepStrictEqual(yield* sql`select length(name)::int4 as length from aged.worker order by 1`, [
        { length: 6 },
        { length: 200 }
      ])
    }))

  it.effect("a schema that is missing, unfinished or newer is named with what to do", () =>
    Effect.gen(function*() {
      const sql = yield* SqlClient.SqlClient
      const refused = Effect.flip(Migrations.verify(sql, "checked"))
      const missing = yield* refused
      assert.instanceOf(missing, Migrations.JobQueueError)
      assert.strictEqual(missing.reason, "NotMigrated")
      assert.match(missing.message, /"checked" holds no queue.*migrate: true/)

      yield* boot("checked")
      yield* Migrations.verify(sql, "checked")
      yield* sql`insert into checked.migration (migration_id, name) values (${Migrations.version + 1}, 'future')`
      const newer = yield* refused
      assert.instanceOf(newer, Migrations.JobQueueError)
      assert.strictEqual(newer.reason, "Unsupported")
      assert.match(newer.message, /newer than this library/)
      // and an older library leaves a newer schema alone
      yield* Migrations.run(sql, "checked")
      assert.strictEqual(yield* Migrations.current(sql, "checked"), Migrations.version + 1)

      yield* sql`delete from checked.migration`
      const emptied = yield* refused
      assert.instanceOf(emptied, Migrations.JobQueueError)
      assert.strictEqual(emptied.reason, "NotMigrated")
    }))

  it.effect("a schema that somebody is at work on is waited for", () =>
    Effect.gen(function*() {
      const stranger = yield* Database.make(yield* SqlClient.SqlClient, { maxConnections: 1 })
      const sql = yield* SqlClient.SqlClient
      yield* stranger.query("begin", [])
      yield* stranger.query("create schema waited", [])
      const fiber = yield* Effect.forkChild(boot("waited"), { startImmediately: true })
      yield* sql<{ waiting: number }>`select count(*)::int4 as waiting from pg_stat_activity
        where datname = current_database() and wait_event_type = 'Lock'`.pipe(
        Effect.repeat({ until: (rows) => rows[0]!.waiting > 0 })
      )
      yield* stranger.query("commit", [])
      yield* join(fiber)
    }))

  it.effect("objects of the same names in the search path are neither used nor harmed", () =>
    Effect.gen(function*() {
      const sql = yield* SqlClient.SqlClient
      yield* sql`create schema hostile`
      for (const table of ["job", "ready", "lease", "worker", "attempt", "finished", "unique_key", "migration"]) {
        yield* sql.unsafe(`create table hostile.${table} (trap integer)`)
      }
      yield* sql.unsafe(
        `create function hostile.refuse_finished(uuid[], integer) returns void language sql as 'select 1 / 0'`
      )
      yield* sql.unsafe(
        `create function hostile.hash_key(text, text) returns bytea language sql as 'select null::bytea'`
      )
      yield* sql.unsafe(
        `create function hostile.clock_timestamp() returns timestamptz language sql as $$ select 'infinity'::timestamptz $$`
      )
      yield* sql.unsafe(`create function hostile.equals(uuid, uuid) returns boolean language sql as 'select false'`)
      yield* sql.unsafe(`create operator hostile.= (leftarg = uuid, rightarg = uuid, function = hostile.equals)`)
      yield* sql.withTransaction(Effect.gen(function*() {
        yield* sql`set local search_path = hostile, pg_catalog`
        yield* Migrations.run(sql, "safe")
        yield* sql`select safe.enqueue('k', unique_key => 'a')`
        yield* sql`select safe.enqueue('k', unique_key => 'a')`
      }))
      const [row] = yield* sql<{ jobs: number; finite: boolean; traps: number }>`select count(*)::int4 as jobs,
        bool_and(isfinite(run_at)) as finite, (select count(*)::int4 from hostile.job) as traps from safe.job`
      assert.deepStrictEqual(row, { jobs: 1, finite: true, traps: 0 })
    }))

  it.effect("nobody else may use the schema until it is granted", () =>
    Effect.gen(function*() {
      const sql = yield* SqlClient.SqlClient
      yield* boot("closed")
      const [row] = yield* sql<{ open: number }>`select count(*)::int4 as open
        from pg_proc p where pronamespace = 'closed'::regnamespace and (proacl is null or array_to_string(proacl, ',') ~ '(^|,)=')`
      assert.strictEqual(row?.open, 0)
    }))
})

layer(Storage.layer, { excludeTestServices: true })("enqueue in SQL", (it) => {
  it.effect(
    "takes every option",
    rule(Effect.gen(function*() {
      const id = uuid()
      assert.strictEqual(
        yield* value(
          `select pgqueue.enqueue('email.send', '{"to" : "a"}', queue => 'mail', priority => 2, delay => '90 seconds', max_attempts => 7,
             timeout => '2.5 seconds', unique_key => 'welcome', metadata => '{"tenant":"x"}', id => $1::uuid)::text`,
          [id]
        ),
        id
      )
      assert.deepInclude(yield* stateOf(id), {
        place: "ready",
        kind: "email.send",
        payload: { to: "a" },
        queue: "mail",
        priority: 2,
        max_attempts: 7,
        timeout_ms: 2500,
        metadata: { tenant: "x" },
        attempt: 0
      })
      const wait = yield* value<number>(`select extract(epoch from run_at - enqueued_at)::float8 from pgqueue.job`)
      assert.closeTo(wait, 90, 1)
      assert.strictEqual(yield* value("select payload::text from pgqueue.job"), `{"to" : "a"}`)
    }))
  )

  it.effect(
    "has the defaults of the library, and ids of version 7 in order",
    rule(Effect.gen(function*() {
      const id = yield* value<string>("select pgqueue.enqueue('k')::text")
      assert.match(id, /^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab]/)
      assert.deepInclude(yield* stateOf(id), {
        queue: "default",
        priority: 5,
        max_attempts: 5,
        payload: null,
        timeout_ms: null
      })
      assert.isTrue(yield* value<boolean>("select run_at <= clock_timestamp() from pgqueue.ready"))
      const at = parseInt(id.replaceAll("-", "").slice(0, 12), 16)
      assert.closeTo(at, yield* value<number>("select (extract(epoch from clock_timestamp()) * 1000)::float8"), 60_000)
    }))
  )

  it.effect(
    "a due time wins over a delay, and the past means now",
    rule(Effect.gen(function*() {
      const future = yield* value<string>(
        "select pgqueue.enqueue('k', run_at => '2999-01-01Z', delay => '1 second')::text"
      )
      const past = yield* value<string>("select pgqueue.enqueue('k', run_at => '1999-01-01Z')::text")
      const due = (id: string) =>
        value<string>(
          "select extract(year from run_at at time zone 'UTC')::text from pgqueue.ready where id = $1::uuid",
          [id]
        )
      assert.strictEqual(yield* due(future), "2999")
      assert.isTrue(
        yield* value<boolean>(
          "select run_at > enqueued_at - interval '1 second' from pgqueue.job where id = $1::uuid",
          [past]
        )
      )
    }))
  )

  it.effect(
    "the same id again inserts nothing, not even after the job has ended",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed([keyed("a")])
      const again = value(`select pgqueue.enqueue('k', unique_key => 'a', id => $1::uuid)::text`, [held.ids[0]!])
      assert.strictEqual(yield* again, held.ids[0])
      yield* store.settle(held.worker, [entry(held.lease, held.ids[0]!, "completed")])
      assert.strictEqual(yield* again, held.ids[0])
      assert.strictEqual(yield* value("select count(*)::int4 from pgqueue.job"), 0)
    }))
  )

  it.effect(
    "an id that is there under another key, or without one, takes no second key with it",
    rule(Effect.gen(function*() {
      const id = yield* value<string>("select pgqueue.enqueue('k', unique_key => 'a')::text")
      const plain = yield* value<string>("select pgqueue.enqueue('k')::text")
      for (const one of [id, plain]) {
        assert.strictEqual(
          yield* value("select pgqueue.enqueue('k', unique_key => 'b', id => $1::uuid)::text", [one]),
          one
        )
      }
      assert.strictEqual(yield* value("select count(*)::int4 from pgqueue.unique_key"), 1)
    }))
  )

  it.effect(
    "an insert that waited while the job of its id ended is refused",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const held = yield* claimed([keyed("a")])
      const settling = yield* session
      yield* settling.query("begin")
      yield* settling.store.settle(held.worker, [entry(held.lease, held.ids[0]!, "completed")])
      const late = yield* blocked(
        Effect.flip(query(`select pgqueue.enqueue('k', id => $1::uuid)::text`, [held.ids[0]!]))
      )
      yield* settling.query("commit")
      assert.strictEqual(Database.sqlState(yield* join(late)), Database.alreadyEnded)
      assert.strictEqual(
        (yield* store.settle(held.worker, [entry(held.lease, held.ids[0]!, "completed")]))[0]?.state,
        "gone"
      )
    }))
  )

  it.effect(
    "shares its keys with the library: the loser gets the id of the holder, contenders wait for each other",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const first = keyed("a")
      yield* store.insertUnique([first], false, undefined)
      assert.strictEqual(yield* value("select pgqueue.enqueue('k', unique_key => 'a')::text"), first.id)
      assert.notStrictEqual(yield* value("select pgqueue.enqueue('other', unique_key => 'a')::text"), first.id)

      const ids = yield* Effect.all(
        Array.from({ length: 20 }, () => value<string>("select pgqueue.enqueue('k', unique_key => 'b')::text")),
        { concurrency: "unbounded" }
      )
      assert.strictEqual(new Set(ids).size, 1)
      yield* query("update pgqueue.unique_key set expires_at = now() where job = $1::uuid", [ids[0]!])
      assert.notStrictEqual(yield* value("select pgqueue.enqueue('k', unique_key => 'b')::text"), ids[0])
    }))
  )

  it.effect(
    "works in a trigger, and a transaction that rolls back leaves nothing",
    rule(Effect.gen(function*() {
      const { sql } = yield* Storage
      yield* sql`create table if not exists customer (name text)`
      yield* sql`create or replace function welcome() returns trigger language plpgsql as $$ begin
        perform pgqueue.enqueue('welcome', json_build_object('name', new.name), unique_key => new.name);
        return new;
      end $$`
      yield* sql`create or replace trigger welcome after insert on customer for each row execute function welcome()`
      yield* Effect.flip(
        sql.withTransaction(Effect.andThen(sql`insert into customer values ('ada')`, Effect.fail("no")))
      )
      assert.strictEqual(yield* value("select count(*)::int4 from pgqueue.job"), 0)
      yield* sql`insert into customer select 'name ' || i from generate_series(1, 100) as i`
      yield* sql`insert into customer values ('name 1')`
      assert.strictEqual(yield* value("select count(*)::int4 from pgqueue.ready"), 100)
    }))
  )

  it.effect(
    "refuses what the library refuses, and leaves nothing",
    rule(Effect.gen(function*() {
      for (
        const bad of [
          "''",
          "null",
          "'k', priority => 10",
          "'k', max_attempts => 0",
          "'k', timeout => '0'",
          "'k', queue => ''",
          "'k', run_at => 'infinity'",
          "repeat('k', 201)",
          "'k', payload => to_json(repeat('x', 1048576))",
          "'k', metadata => null, unique_key => 'a'"
        ]
      ) {
        yield* Effect.flip(query(`select pgqueue.enqueue(${bad})::text`))
      }
      assert.strictEqual(yield* value("select count(*)::int4 from pgqueue.ready"), 0)
    }))
  )
})
