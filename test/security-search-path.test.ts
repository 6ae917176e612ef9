/** Statements in the application's own sessions, whose search_path somebody else may have filled, use nothing of theirs (S2). */
import { PgClient } from "@effect/sql-pg"
import { assert, describe, it } from "@effect/vitest"
import { DateTime, Effect, Layer, Option, Schema } from "effect"
import { readdirSync, readFileSync } from "node:fs"
import { join } from "node:path"
import { Admin, CronScheduler, Job, JobQueue, Worker } from "../src/index.ts"
import { allInPlace, rows, running, untilValue, value, withQueue } from "./support/queue.ts"

class Note extends Job.make("note", { payload: { n: Schema.Finite }, success: Schema.Finite, error: Schema.String }) {}
class Keyed extends Job.make("keyed", { unique: () => "s" }) {}
class Write extends Job.make("write", { queue: "writes" }) {}

const src = join(import.meta.dirname, "../src")
const texts = readdirSync(src).map((file) => readFileSync(join(src, file), "utf8")).join("\n")
/** Everything in the sources that is written like the call of a function. */
const called = [...new Set([...texts.matchAll(/\b([a-z_][a-z0-9_]*)\s*\(/g)].map(([, name]) => name!))]

const types =
  "uuid text json jsonb timestamptz interval int2 int4 int8 float8 numeric bool void uuid[] text[] timestamptz[]"
    .split(" ")
const operators = "= <> < <= > >= + - * / || -> ->> ^@ ~".split(" ")

/** Fills a schema with what has the names of what our statements use, and takes a note whenever any of it is called. */
const fill = Effect.fnUntraced(function*(schema: string) {
  yield* rows(`create schema if not exists ${schema}`)
  yield* rows(`create table if not exists public.called (what text not null)`)
  yield* rows(
    `create function ${schema}.note_call(what text) returns void language plpgsql set search_path = pg_catalog as
    $$ begin insert into public.called values (what); end $$`
  )
  const ours = yield* rows<{ name: string }>(
    "select relname::text as name from pg_class where relnamespace = 'pgqueue'::regnamespace and relkind = 'r'"
  )
  for (const { name } of ours) {
    yield* rows(`create table ${schema}.${name} as select 'trap'::text as trap`)
  }
  // Functions: with the very types of the built-in ones, and with all others that an argument might have.
  yield* rows(
    `do $do$ declare f record; t text; body text;
    begin
      for f in
        select distinct on (p.proname, pg_get_function_identity_arguments(p.oid))
          p.proname as name, pg_get_function_identity_arguments(p.oid) as args, p.pronargs, p.proretset,
          case when p.prorettype = 'internal'::regtype then 'text' else format_type(p.prorettype, null) end as result
        from pg_proc p where p.pronamespace in ('pg_catalog'::regnamespace, 'pgqueue'::regnamespace) and p.proname = any ('{${
      called.join(",")
    }}')
      loop
        body := format($f$ begin perform ${schema}.note_call(%L); return null; end $f$, f.name || '(' || f.args || ')');
        begin
          execute format('create function ${schema}.%I(%s) returns %s language plpgsql as %L', f.name, f.args, f.result, body);
        exception when others then null; end;
        if f.pronargs = 1 then
          foreach t in array '{${types.map((type) => `"${type}"`).join(",")}}'::text[] loop
            begin
              execute format('create function ${schema}.%I(%s) returns %s language plpgsql as %L', f.name, t,
                case when f.result ~ '^any' then t else f.result end, body);
            exception when others then null; end;
          end loop;
        end if;
      end loop;
    end $do$`
  )
  // Operators for all pairs of these types.
  yield* rows(
    `do $do$ declare l text; r text; o text; kind text; result text;
    begin
      foreach l in array '{${types.map((type) => `"${type}"`).join(",")}}'::text[] loop
        foreach r in array '{${types.map((type) => `"${type}"`).join(",")}}'::text[] loop
          foreach kind in array '{bool,left,text}'::text[] loop
            result := case kind when 'left' then case l when 'void' then 'text' else l end else kind end;
            begin
              execute format('create function ${schema}.%I(%s, %s) returns %s language plpgsql as %L', 'trap_' || kind, l, r, result,
                format($f$ begin perform ${schema}.note_call(%L); return null; end $f$, l || ' ' || kind || ' ' || r));
            exception when others then null; end;
          end loop;
          foreach o in array '{${operators.map((operator) => `"${operator}"`).join(",")}}'::text[] loop
            kind := case when o in ('+', '-', '*', '/', '%', '||', '->') then 'left' when o in ('->>', '#>>') then 'text' else 'bool' end;
            begin
              execute format('create operator ${schema}.%s (leftarg = %s, rightarg = %s, function = ${schema}.%I)', o, l, r, 'trap_' || kind);
            exception when others then null; end;
          end loop;
        end loop;
      end loop;
    end $do$`
  )
})

/** What of theirs was called since the last look. */
const calls = (after: string) =>
  Effect.map(
    rows<{ what: string }>("with gone as (delete from public.called returning what) select distinct what from gone"),
    (found) => found.map(({ what }) => `${after}: ${what}`)
  )

describe("the functions of the storage", () => {
  it.live("have a search_path of their own, but for one, which names its operator in full", () =>
    withQueue(Effect.gen(function*() {
      const found = yield* rows<{ name: string }>(
        `select proname::text as name from pg_catalog.pg_proc where pronamespace = 'pgqueue'::regnamespace
           and not coalesce(array_to_string(proconfig, ' '), '') like '%search_path=pg_catalog%'`
      )
      assert.deepStrictEqual(found, [{ name: "refuse_ended" }])
    })))
})

describe("a search_path that somebody else has filled", () => {
  for (const [path, schema] of [[`"$user", public`, `"$user"`], ["evil, public", "public"]] as const) {
    it.live(`${path}, full of traps in ${schema}: nothing of theirs is called`, () =>
      withQueue(
        Effect.gen(function*() {
          const sql = yield* PgClient.PgClient
          const filled = schema === "public" ? schema : `"${yield* value<string>("select current_user::text")}"`
          yield* fill(filled)
          const count = (table: string, column: string) =>
            value(`select count(*)::int from ${table} where ${column} = '${filled}'::regnamespace`)
          assert.isAbove(yield* count("pg_proc", "pronamespace"), 500)
          assert.isAbove(yield* count("pg_operator", "oprnamespace"), 2000)
          // The traps work: what is written carelessly falls into them.
          yield* sql`select 1::numeric * 2::int4, round(1::int2)`
          assert.isAbove(yield* value("select count(*)::int from public.called"), 0)
          yield* rows("delete from public.called")

          const touched: Array<string> = []
          const untouched = (after: string) => Effect.map(calls(after), (found) => void touched.push(...found))
          const here = sql.withTransaction
          const unique = (key: string, more: object = {}) => ({ unique: { key, ...more } })
          yield* Note.enqueue({ n: 1 })
          yield* Note.enqueueAll([{ n: 1 }, { n: 2 }])
          yield* Note.enqueue({ n: 1 }, unique("a"))
          yield* untouched("enqueue apart")
          const id = crypto.randomUUID()
          yield* here(Effect.gen(function*() {
            yield* Note.enqueue({ n: 1 })
            yield* Note.enqueue({ n: 1 }, {
              id,
              runAt: DateTime.makeUnsafe(0),
              timeout: "1 minute",
              metadata: { a: "b" }
            })
            yield* Note.enqueue({ n: 1 }, { id })
            yield* Note.enqueueAll([{ n: 1 }, { n: 2 }], { delay: "1 millis" })
            yield* untouched("enqueue in a transaction")
            yield* Note.enqueue({ n: 1 }, unique("b", { period: "1 millis" }))
            yield* Note.enqueue({ n: 1 }, unique("a"))
            yield* Effect.sleep(5)
            yield* Note.enqueue({ n: 1 }, unique("b", { period: "1 hour" }))
            yield* Note.enqueue({ n: 1 }, { ...unique("c"), delay: "1 hour" })
            yield* Note.enqueue({ n: 2 }, { ...unique("c", { onConflict: "replace" }), delay: "1 hour" })
            yield* Note.enqueue({ n: 3 }, unique("c", { onConflict: "debounce", period: "1 hour" }))
            yield* Note.enqueueAll([{ n: 1 }, { n: 2 }], (_, n) => unique(`d${n}`))
          }))
          yield* untouched("unique keys in a transaction")

          for (
            const text of [
              "select pgqueue.enqueue('note', '{\"n\":1}')",
              "select pgqueue.enqueue('note', '{\"n\":1}', unique_key => 'sql', delay => '1 millisecond', timeout => '1 minute', metadata => '{}')",
              "select pgqueue.enqueue('note', '{\"n\":1}', unique_key => 'sql', id => 'ffffffff-0000-7000-8000-000000000000')"
            ]
          ) {
            yield* sql.unsafe(text)
          }
          yield* untouched("enqueue in SQL")

          const handlers = Layer.mergeAll(
            Note.toLayer(({ n }) => n === 1 ? Effect.succeed(n) : Effect.fail("no")),
            Write.toLayer(
              () => Effect.orDie(Effect.asVoid(Effect.flatMap(PgClient.PgClient, (sql) => sql`select 1`))),
              {
                transactional: true
              }
            )
          )
          yield* Write.enqueue()
          yield* running(
            Worker.layer({ jobs: [Note, Write], pollInterval: "50 millis" }).pipe(Layer.provide(handlers))
          )
          yield* Note.execute({ n: 1 })
          yield* untilValue(
            "select count(*)::int from pgqueue.finished where kind = 'write' and status = 'completed'",
            1
          )
          yield* untouched("work")

          const waiting = yield* Note.enqueue({ n: 1 }, { delay: "1 hour" })
          const failed = yield* Note.enqueue({ n: 2 }, { maxAttempts: 1 })
          yield* Effect.ignore(Note.execute({ n: 2 }, { maxAttempts: 1 }))
          yield* untilValue(`select count(*)::int from pgqueue.finished where id = '${failed.id}'`, 1)
          yield* untouched("a failed attempt")
          yield* here(Effect.gen(function*() {
            const { stats } = yield* JobQueue
            yield* stats
            yield* untouched("stats")
            assert.isTrue(Option.isSome(yield* Admin.get(id)))
            assert.isTrue(Option.isSome(yield* Admin.get(waiting.id)))
            yield* untouched("get")
            assert.isNotEmpty(yield* Admin.attempts(failed.id))
            yield* untouched("attempts")
            yield* Note.poll(id)
            yield* untouched("poll")
            yield* Admin.cancel(waiting.id, { reason: "no more" })
            yield* Admin.retry(waiting.id)
            yield* Admin.retry(failed.id)
            yield* Admin.cancel(waiting.id)
            yield* Admin.delete(waiting.id)
            yield* untouched("acting")
            yield* Admin.redrive({ kind: "note", queue: "default", within: "1 hour", limit: 10 })
            yield* untouched("redrive")
          }))
          const entry = CronScheduler.make("s", {
            every: "1 hour",
            job: Keyed,
            overlap: "queue"
          })
          yield* here(Effect.gen(function*() {
            yield* CronScheduler.schedule(entry)
            yield* CronScheduler.schedule(entry)
            yield* untouched("schedule")
            yield* CronScheduler.list
            yield* CronScheduler.pause("s")
            yield* CronScheduler.resume("s")
            yield* untouched("list, pause, resume")
            yield* CronScheduler.trigger("s")
            yield* CronScheduler.trigger("s")
            yield* untouched("trigger")
            yield* CronScheduler.backfill("s", { from: DateTime.makeUnsafe(0), to: DateTime.makeUnsafe(20_000_000) })
            yield* untouched("backfill")
            yield* CronScheduler.remove("s")
          }))
          yield* untouched("schedules in a transaction")
          assert.deepStrictEqual(yield* rows(`select * from ${filled}.job`), [{ trap: "trap" }])
          assert.deepStrictEqual(touched, [])
          yield* allInPlace
        }),
        { pool: { startupParameters: { search_path: path } } }
      ))
  }
})
