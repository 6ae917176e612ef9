/** Cleanup: finished jobs whose retention is over, expired keys, and whose turn it is. */
import { assert, layer } from "@effect/vitest"
import { Effect, Fiber } from "effect"
import type * as Cleanup from "../src/Cleanup.ts"
import type * as Settlement from "../src/Settlement.ts"
import * as Tasks from "../src/Tasks.ts"
import {
  assertInPlace,
  blocked,
  claim,
  claimed,
  entry,
  failure,
  job,
  jobs,
  join,
  keyed,
  makeDue,
  query,
  rule as onEmptyTables,
  session,
  stateOf,
  Storage,
  tables,
  uuid,
  value,
  worker
} from "./support/storage.ts"

const second = 1000
const day = 86_400 * second
const count = (where: string, params?: Array<unknown>) =>
  value<number>(`select count(*)::int4 from pgqueue.${where}`, params)

/** The body of a test that begins without any policy, and before anybody has had a turn. */
const rule = <A, E, R>(body: Effect.Effect<A, E, R>) =>
  onEmptyTables(
    query("update pgqueue.setting set value = '{}'").pipe(
      Effect.andThen(query("delete from pgqueue.setting where name <> 'cleanup'")),
      Effect.andThen(query("delete from pgqueue.task")),
      Effect.andThen(body)
    )
  )

const mergePolicy = (policy: Cleanup.Policy) => Storage.use(({ store }) => store.mergePolicy("cleanup", policy))
const policy = (name = "cleanup") =>
  value<Record<string, unknown>>("select value from pgqueue.setting where name = $1::text", [name])
/** Without the lines that are said of it. */
const cleanUp = Storage.use(({ store }) => Tasks.cleanUpOnce(store))

/** Ends jobs and returns their ids. */
const ended = Effect.fnUntraced(function*(
  verb: Settlement.Verb,
  all = jobs(1),
  options: Partial<Settlement.Entry> = {}
) {
  const { store } = yield* Storage
  const held = yield* claimed(all)
  yield* store.settle(held.worker, held.ids.map((id) => entry(held.lease, id, verb, options)))
  yield* store.unregister(held.worker)
  return held.ids
})

/** Makes finished jobs look so many milliseconds old. */
const age = (ids: ReadonlyArray<string>, millis: number) =>
  query(
    `update pgqueue.finished set finished_at = clock_timestamp() - $2::float8 * interval '1 millisecond' where id = any ($1::uuid[])`,
    [ids, millis]
  )

const finished = (ending: Cleanup.Ending, millis: number, number = 1) =>
  Effect.tap(
    ended(ending === "completed" ? "completed" : ending, jobs(number)),
    (ids) => age(ids, millis)
  )

/** Everything that is not finished, as it is. */
const live = Effect.forEach(
  tables.filter((table) => !["finished", "archive", "attempt", "unique_key"].includes(table)),
  (table) => query(`select to_json(t)::text as row from pgqueue.${table} t order by 1`)
)

/** Ages everything that has ended, in the order it has ended in. */
const ageAll = (millis: number) =>
  query(`update pgqueue.finished set finished_at = finished_at - $1::float8 * interval '1 millisecond'`, [millis])

layer(Storage.layer, { excludeTestServices: true })("cleanup", (it) => {
  // ---------------------------------------------------------------------------
  // What goes
  // ---------------------------------------------------------------------------

  it.effect(
    "keeps completed jobs a day and the others a week where nobody says otherwise, and then deletes them",
    rule(Effect.gen(function*() {
      const young = [
        ...(yield* finished("completed", day - 60 * second)),
        ...(yield* finished("cancelled", 7 * day - 60 * second)),
        ...(yield* finished("discarded", 7 * day - 60 * second))
      ]
      const old = [
        ...(yield* finished("completed", day + second)),
        ...(yield* finished("cancelled", 7 * day + second)),
        ...(yield* finished("discarded", 7 * day + second))
      ]
      assert.strictEqual(yield* cleanUp, old.length)
      for (const id of young) assert.strictEqual(yield* count("finished where id = $1::uuid", [id]), 1)
      assert.strictEqual(yield* count("finished"), young.length)
      assert.strictEqual(yield* count("archive"), 0)
      assert.strictEqual(yield* cleanUp, 0)
    }))
  )

  it.effect(
    "keeps each status as long as the policy says, for ever too",
    rule(Effect.gen(function*() {
      yield* mergePolicy({ retention: { completed: Infinity, cancelled: 60 * second, discarded: 0 } })
      const [completed] = yield* finished("completed", 1e11)
      const [stays] = yield* finished("cancelled", 50 * second)
      yield* finished("cancelled", 70 * second)
      yield* finished("discarded", 1)
      assert.strictEqual(yield* cleanUp, 2)
      const left = yield* query<{ id: string }>("select id::text as id from pgqueue.finished")
      assert.sameMembers(left.map(({ id }) => id), [completed!, stays!])
      yield* mergePolicy({ retention: { completed: 1e12 } })
      assert.strictEqual(yield* cleanUp, 0)
    }))
  )

  it.effect(
    "goes from the oldest on, batch by batch, past what somebody has locked",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const ids: Array<string> = []
      for (let n = 0; n < 7; n++) ids.push(...(yield* finished("completed", 3 * day - n * second)))
      const stranger = yield* session
      yield* stranger.query("begin")
      yield* stranger.query(`select from pgqueue.finished where id = '${ids[0]}' for update`)
      const first = yield* store.prune("completed", 2)
      assert.strictEqual(first.count, 2)
      assert.strictEqual((yield* store.prune("completed", 3, first.last!)).count, 3)
      const left = yield* query<{ id: string }>("select id::text as id from pgqueue.finished order by finished_at")
      assert.deepStrictEqual(left.map(({ id }) => id), [ids[0], ids[6]])
      assert.strictEqual(yield* cleanUp, 1)
      yield* stranger.query("commit")
      assert.strictEqual(yield* cleanUp, 1)
    }))
  )

  it.effect(
    "past what somebody has locked of its attempts, which then goes with all of them",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const ids: Array<string> = []
      for (let n = 0; n < 5; n++) ids.push(...(yield* finished("completed", 3 * day - n * second)))
      yield* query(
        "insert into pgqueue.attempt (job, n, tag) select id, n, 'Failed' from pgqueue.finished, generate_series(1, 2) n"
      )
      const stranger = yield* session
      yield* stranger.query("begin")
      yield* stranger.query(`select from pgqueue.attempt where job = '${ids[0]}' and n = 2 for update`)
      // Nor is it looked for again and again where a batch is nothing else.
      assert.deepInclude(yield* store.prune("completed", 1), { count: 0, found: 1 })
      assert.strictEqual(yield* cleanUp, 4)
      assert.strictEqual(yield* count("finished"), 1)
      assert.strictEqual(yield* count("attempt"), 2)
      yield* stranger.query("commit")
      assert.strictEqual(yield* cleanUp, 1)
      assert.strictEqual(yield* count("attempt"), 0)
    }))
  )

  it.effect(
    "removes more than a batch that ended at the same moment",
    rule(Effect.gen(function*() {
      yield* query(
        `insert into pgqueue.finished (id, kind, queue, priority, status, attempt, max_attempts, rescued, snoozed, metadata,
            enqueued_at, scheduled_for, finished_at, payload)
          select gen_random_uuid(), 'k', 'default', 5, case when i % 2 = 0 then 'completed' else 'discarded' end, 1, 5, 0, 0, '{}',
            'epoch', 'epoch', 'epoch', '{}' from generate_series(1, 6400) as i`
      )
      assert.strictEqual(yield* cleanUp, 6400)
      assert.strictEqual(yield* count("finished"), 0)
    }))
  )

  it.effect(
    "halves a batch that takes the server too long, and goes on",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* mergePolicy({ strategy: "archive" })
      yield* finished("completed", 2 * day, 24)
      yield* query(`create function public.slow() returns trigger language plpgsql as
        $$ begin perform pg_sleep(0.02); return new; end $$`)
      yield* query("create trigger slow before insert on pgqueue.archive for each row execute function public.slow()")
      // All at once take half a second.
      const removed = yield* Tasks.cleanUpOnce(store, 200).pipe(
        Effect.ensuring(Effect.orDie(query("drop function public.slow cascade")))
      )
      assert.strictEqual(removed, 24)
      assert.strictEqual(yield* count("archive"), 24)
      assert.strictEqual(yield* count("finished"), 0)
    }))
  )

  it.effect(
    "touches nothing that is not finished, whatever its age",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* mergePolicy({ retention: { completed: 0, cancelled: 0, discarded: 0 } })
      yield* finished("completed", 2 * day, 3)
      yield* claimed(jobs(2))
      const failing = yield* claimed([job()])
      yield* store.settle(failing.worker, [entry(failing.lease, failing.ids[0]!, "failed", { delay: 1e6, failure })])
      yield* store.insert([job(), job({ delay: 1e6 }), job({ priority: 2 })], false)
      yield* store.insertUnique([keyed("key")], false, undefined)
      yield* query("update pgqueue.job set enqueued_at = 'epoch'")
      const before = yield* live
      assert.strictEqual(yield* cleanUp, 3)
      yield* Tasks.expireOnce(store)
      assert.deepStrictEqual(yield* live, before)
      assert.strictEqual(yield* count("attempt"), 1)
      assert.strictEqual(yield* count("unique_key"), 1)
    }))
  )

  it.effect(
    "takes the attempts of a deleted job along, and those of no other",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const tried = Effect.fnUntraced(function*() {
        const held = yield* claimed([job()])
        yield* store.settle(held.worker, [entry(held.lease, held.ids[0]!, "failed", { delay: 0, failure })])
        yield* makeDue
        const again = yield* claim(held.worker)
        yield* store.settle(held.worker, [entry(again.lease, held.ids[0]!, "completed")])
        return held.ids[0]!
      })
      const [gone, kept] = [yield* tried(), yield* tried()]
      yield* age([gone], 2 * day)
      assert.strictEqual(yield* cleanUp, 1)
      assert.deepStrictEqual(yield* store.attempts(gone, false), [])
      assert.strictEqual((yield* store.attempts(kept, false)).length, 1)

      yield* mergePolicy({ strategy: "archive" })
      yield* age([kept], 2 * day)
      assert.strictEqual(yield* cleanUp, 1)
      assert.strictEqual((yield* store.attempts(kept, false)).length, 1)
      assert.deepInclude(yield* store.inspect(kept, false), { status: "completed" })
    }))
  )

  // ---------------------------------------------------------------------------
  // The archive
  // ---------------------------------------------------------------------------

  it.effect(
    "the archive has every column of a finished job, as it was",
    rule(Effect.gen(function*() {
      const columns = (table: string) =>
        Effect.map(
          query<{ name: string; type: string }>(
            `select attname::text as name, format_type(atttypid, atttypmod) as type from pg_attribute
             where attrelid = ('pgqueue.' || $1::text)::regclass and attnum > 0 order by attname`,
            [table]
          ),
          (rows) => rows.map(({ name, type }) => `${name} ${type}`)
        )
      assert.deepStrictEqual(yield* columns("archive"), yield* columns("finished"))

      yield* mergePolicy({ strategy: "archive" })
      const held = yield* claimed([
        keyed("key", { timeout: 1000, trace: "trace", metadata: `{"a":"b"}`, payload: `{"x": 1}` })
      ])
      const id = held.ids[0]!
      yield* query("update pgqueue.job set group_key = 'g', progress = '{\"p\":1}' where id = $1::uuid", [id])
      const { store } = yield* Storage
      yield* store.settle(held.worker, [
        entry(held.lease, id, "discarded", { reason: "because", result: "[1]", failure })
      ])
      yield* age([id], 8 * day)
      const row = (table: string) => value<string>(`select to_json(t)::text from pgqueue.${table} t`)
      const before = yield* row("finished")
      assert.notMatch(before, /null/)
      assert.strictEqual(yield* cleanUp, 1)
      assert.strictEqual(yield* row("archive"), before)
      assert.strictEqual(yield* count("finished"), 0)
    }))
  )

  it.effect(
    "the archive keeps every row: of a key that is used again and again, and of a job that ends again and again",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* mergePolicy({ strategy: "archive" })
      const ids: Array<string> = []
      for (let n = 0; n < 20; n++) {
        ids.push(...(yield* ended("completed", [keyed("the one key")])))
        if (n % 3 === 0) {
          yield* ageAll(2 * day)
          yield* cleanUp
        }
      }
      yield* ageAll(2 * day)
      yield* cleanUp
      assert.strictEqual(yield* count("archive"), 20)
      assert.strictEqual(yield* count("finished"), 0)
      assert.strictEqual(new Set(ids).size, 20)

      const [again] = yield* ended("discarded", jobs(1))
      for (let n = 0; n < 5; n++) {
        assert.strictEqual((yield* store.retry([again!], undefined, false)).count, 1)
        const me = yield* worker()
        const { lease } = yield* claim(me)
        yield* store.settle(me, [entry(lease, again!, "discarded", { reason: String(n) })])
      }
      // With the id of one that is archived a job can come in again, and end again.
      for (let n = 0; n < 5; n++) {
        yield* ageAll(8 * day)
        assert.strictEqual(yield* cleanUp, 1)
        yield* ended("completed", [job({ id: again! })])
      }
      yield* ageAll(8 * day)
      yield* cleanUp
      assert.strictEqual(yield* count("archive where id = $1::uuid", [again]), 6)
      assert.strictEqual(yield* count("archive"), 26)
    }))
  )

  it.effect(
    "a row that somebody has copied back from the archive leaves again",
    rule(Effect.gen(function*() {
      yield* mergePolicy({ strategy: "archive" })
      const [id] = yield* finished("completed", 2 * day)
      yield* cleanUp
      yield* query("insert into pgqueue.finished select * from pgqueue.archive")
      assert.strictEqual(yield* cleanUp, 1)
      assert.strictEqual(yield* count("finished"), 0)
      assert.strictEqual(yield* count("archive where id = $1::uuid", [id]), 1)
    }))
  )

  // ---------------------------------------------------------------------------
  // The policy
  // ---------------------------------------------------------------------------

  it.effect(
    "a policy is added to field by field",
    rule(Effect.gen(function*() {
      yield* mergePolicy({ strategy: "archive" })
      yield* mergePolicy({ retention: { completed: 5 } })
      yield* mergePolicy({ interval: 7, retention: { discarded: Infinity } })
      yield* mergePolicy({})
      assert.deepStrictEqual(yield* policy(), {
        strategy: "archive",
        interval: 7,
        retention: { completed: 5, discarded: "Infinity" }
      })
      yield* mergePolicy({ retention: { completed: 6 } })
      assert.deepStrictEqual(yield* policy(), {
        strategy: "archive",
        interval: 7,
        retention: { completed: 6, discarded: "Infinity" }
      })
      const { store } = yield* Storage
      yield* store.mergePolicy("audit", { interval: 3 })
      assert.deepStrictEqual(yield* policy("audit"), { interval: 3 })
      for (const broken of ["[1]", "\"delete\"", "null", "{\"retention\":3}"]) {
        yield* query("update pgqueue.setting set value = $1::text::json where name = 'cleanup'", [broken])
        yield* mergePolicy({ retention: { completed: 6 } })
        assert.deepStrictEqual(yield* policy(), { retention: { completed: 6 } })
      }
    }))
  )

  it.effect(
    "many who add to a policy at the same time lose nothing",
    rule(Effect.gen(function*() {
      for (let round = 0; round < 20; round++) {
        yield* query(round % 2 === 0 ? "update pgqueue.setting set value = '{}'" : "delete from pgqueue.setting")
        yield* Effect.forEach(
          [
            { strategy: "archive" },
            { interval: 7 },
            { retention: { completed: 1 } },
            { retention: { cancelled: 2 } },
            { retention: { discarded: 3 } }
          ] satisfies ReadonlyArray<Cleanup.Policy>,
          mergePolicy,
          { concurrency: "unbounded" }
        )
        assert.deepStrictEqual(yield* policy(), {
          strategy: "archive",
          interval: 7,
          retention: { completed: 1, cancelled: 2, discarded: 3 }
        })
      }
    }))
  )

  it.effect(
    "what is not plainly delete is archived, and a policy that makes no sense removes nothing",
    rule(Effect.gen(function*() {
      yield* finished("completed", 2 * day)
      for (const retention of ["1 day", "NaN", {}, -Infinity]) {
        yield* query("update pgqueue.setting set value = $1::text::json where name = 'cleanup'", [
          JSON.stringify({ retention: { completed: retention === -Infinity ? "x" : retention } })
        ])
        yield* Effect.exit(cleanUp)
        assert.strictEqual(yield* count("finished"), 1)
      }
      yield* query("update pgqueue.setting set value = '{\"strategy\":\"Delete\"}' where name = 'cleanup'")
      assert.strictEqual(yield* cleanUp, 1)
      assert.strictEqual(yield* count("archive"), 1)
    }))
  )

  it.effect(
    "a change of the policy waits for the cleanup that goes by the old one",
    rule(Effect.gen(function*() {
      yield* finished("completed", 2 * day, 3)
      const cleaning = yield* session
      yield* cleaning.query("begin")
      assert.strictEqual((yield* cleaning.store.prune("completed", 2)).count, 2)
      const changing = yield* blocked(mergePolicy({ strategy: "archive" }))
      yield* cleaning.query("commit")
      yield* join(changing)
      assert.strictEqual(yield* cleanUp, 1)
      assert.strictEqual(yield* count("archive"), 1)
    }))
  )

  it.effect(
    "a cleanup that began before a change of the policy goes by the new one",
    rule(Effect.gen(function*() {
      yield* finished("completed", 2 * day, 3)
      const changing = yield* session
      yield* changing.query("begin")
      yield* changing.store.mergePolicy("cleanup", { strategy: "archive" })
      const cleaning = yield* blocked(cleanUp)
      yield* changing.query("commit")
      assert.strictEqual(yield* join(cleaning), 3)
      assert.strictEqual(yield* count("archive"), 3)
    }))
  )

  // ---------------------------------------------------------------------------
  // Beside others
  // ---------------------------------------------------------------------------

  for (const what of ["retry", "erase"] as const) {
    it.effect(
      `a job that somebody is about to ${what} is left to them`,
      rule(Effect.gen(function*() {
        yield* mergePolicy({ strategy: "archive" })
        const [id] = yield* finished("discarded", 8 * day)
        const person = yield* session
        yield* person.query("begin")
        if (what === "retry") {
          yield* person.query("select from pgqueue.finished where id = $1::uuid for update", [id])
        } else yield* person.query("delete from pgqueue.finished where id = $1::uuid", [id])
        assert.strictEqual(yield* cleanUp, 0)
        yield* person.query("rollback")
        const { sql, store } = yield* Storage
        yield* sql.withTransaction(Effect.gen(function*() {
          if (what === "retry") assert.strictEqual((yield* store.retry([id!], undefined, true)).count, 1)
          else assert.isTrue(yield* store.erase(id!, true))
          assert.strictEqual(yield* cleanUp, 0)
        }))
        assert.strictEqual(yield* count("archive"), 0)
        assert.strictEqual(yield* count("finished"), 0)
        assert.deepInclude(yield* stateOf(id!), { place: what === "retry" ? "ready" : "nowhere" })
        if (what === "retry") yield* store.cancel(id!, "", false)
      }))
    )

    it.effect(
      `whoever comes to ${what} a job that is being removed finds it gone`,
      rule(Effect.gen(function*() {
        const { store } = yield* Storage
        const [id] = yield* finished("discarded", 8 * day)
        const cleaning = yield* session
        yield* cleaning.query("begin")
        assert.strictEqual((yield* cleaning.store.prune("discarded", 10)).count, 1)
        const person = yield* blocked(
          what === "retry"
            ? Effect.map(store.retry([id!], undefined, false), ({ count }) => count > 0)
            : store.erase(id!, false)
        )
        yield* cleaning.query("commit")
        assert.isFalse(yield* join(person))
        assert.deepInclude(yield* stateOf(id!), { place: "nowhere" })
      }))
    )
  }

  it.effect(
    "an enqueue with the id of a job that is being removed is taken for the same job until it is gone",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const [id] = yield* finished("completed", 2 * day)
      const cleaning = yield* session
      yield* cleaning.query("begin")
      yield* cleaning.store.prune("completed", 10)
      assert.deepStrictEqual([...(yield* store.insert([job({ id: id! })], false))], [])
      yield* cleaning.query("commit")
      assert.deepStrictEqual([...(yield* store.insert([job({ id: id! })], false))], [id])
    }))
  )

  it.effect(
    "eight who clean up at the same time, beside people who retry, remove each job once and lose none",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* mergePolicy({ strategy: "archive" })
      const ids: Array<string> = []
      for (let n = 0; n < 10; n++) ids.push(...(yield* finished("discarded", 8 * day, 100)))
      let removed = 0
      let back = 0
      const cleaner = Effect.gen(function*() {
        while (true) {
          const { count } = yield* store.apart(store.prune("discarded", 20))
          removed += count
          if (count === 0) return
        }
      })
      const person = Effect.forEach(
        Array.from({ length: 50 }),
        (_, n) => Effect.map(store.retry([ids[n * 20]!], undefined, false), ({ count }) => back += count)
      )
      yield* Effect.all([...Array.from({ length: 8 }, () => cleaner), person], { concurrency: "unbounded" })
      yield* cleaner
      assert.strictEqual(removed + back, 1000)
      assert.strictEqual(yield* count("archive"), removed)
      assert.strictEqual(yield* count("job"), back)
      yield* assertInPlace
    }))
  )

  // ---------------------------------------------------------------------------
  // Keys
  // ---------------------------------------------------------------------------

  it.effect(
    "removes keys whose period is over, and no other",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* ended("completed", [keyed("over", {}, 1e9), keyed("running", {}, 1e9)])
      yield* store.insertUnique([keyed("held")], false, undefined)
      yield* query("update pgqueue.unique_key set expires_at = 'epoch' where key = pgqueue.hash_key('k', 'over')")
      assert.strictEqual(yield* Tasks.expireOnce(store), 1)
      assert.strictEqual(
        yield* count("unique_key where key in (pgqueue.hash_key('k', 'running'), pgqueue.hash_key('k', 'held'))"),
        2
      )
      assert.strictEqual(yield* count("unique_key"), 2)
      assert.strictEqual(yield* Tasks.expireOnce(store), 0)
    }))
  )

  it.effect(
    "a key that gets a new period meanwhile is kept",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* ended("completed", [keyed("over", {}, 1e9)])
      yield* query("update pgqueue.unique_key set expires_at = 'epoch'")
      const renewing = yield* session
      yield* renewing.query("begin")
      yield* renewing.query("update pgqueue.unique_key set expires_at = clock_timestamp() + interval '1 hour'")
      assert.strictEqual(yield* Tasks.expireOnce(store), 0)
      yield* renewing.query("commit")
      assert.strictEqual(yield* Tasks.expireOnce(store), 0)
      assert.strictEqual(yield* count("unique_key"), 1)
    }))
  )

  // ---------------------------------------------------------------------------
  // Turns
  // ---------------------------------------------------------------------------

  it.effect(
    "of eight who ask at the same time one has the turn, the first time and every other",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      const askers = yield* Effect.forEach(Array.from({ length: 8 }), () => session)
      for (let round = 0; round < 40; round++) {
        if (round % 10 === 0) yield* query("delete from pgqueue.task")
        else yield* query("update pgqueue.task set ran_at = clock_timestamp() - interval '61 seconds'")
        const answers = yield* Effect.forEach(askers, ({ store }) => store.take("cleanup", 60_000), {
          concurrency: "unbounded"
        })
        assert.strictEqual(answers.filter(({ taken }) => taken).length, 1, `round ${round}`)
      }
      const { taken, wait } = yield* store.take("cleanup", 60_000)
      assert.isFalse(taken)
      assert.isTrue(wait > 50_000 && wait <= 60_000, `wait ${wait}`)
      assert.isTrue((yield* store.take("audit", 60_000)).taken)
    }))
  )

  it.effect(
    "whoever waits the least has the turn first, and what all have agreed on goes before what each says",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      assert.isTrue((yield* store.take("rescue", 1000)).taken)
      yield* query("update pgqueue.task set ran_at = clock_timestamp() - interval '2 seconds'")
      assert.isFalse((yield* store.take("rescue", 60_000)).taken)
      assert.isTrue((yield* store.take("rescue", 1000)).taken)
      yield* query("update pgqueue.task set ran_at = clock_timestamp() - interval '2 seconds'")
      yield* store.mergePolicy("rescue", { interval: 60_000 })
      assert.deepInclude(yield* store.take("rescue", 1000), { taken: false, interval: 60_000 })
      yield* store.mergePolicy("rescue", { interval: 1500 })
      assert.deepInclude(yield* store.take("rescue", 60_000), { taken: true, interval: 1500 })
    }))
  )

  it.effect(
    "a turn that somebody is about to take is not waited for",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* store.take("cleanup", 0)
      const other = yield* session
      yield* other.query("begin")
      assert.isTrue((yield* other.store.take("cleanup", 0)).taken)
      assert.isFalse((yield* store.take("cleanup", 0)).taken)
      yield* other.query("commit")
    }))
  )

  it.effect(
    "a turn from before the clock went back does not hold up the next one, and a renewed one does",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* query("insert into pgqueue.task (name, ran_at) values ('cleanup', clock_timestamp() + interval '1 hour')")
      assert.isTrue((yield* store.take("cleanup", 60_000)).taken)
      assert.isFalse((yield* store.take("cleanup", 60_000)).taken)
      yield* query("update pgqueue.task set ran_at = 'epoch'")
      yield* store.renew("cleanup")
      assert.isFalse((yield* store.take("cleanup", 60_000)).taken)
    }))
  )

  it.effect(
    "the next one goes on where the last one has stopped",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      assert.deepInclude(yield* store.take("audit", 0), { taken: true, position: undefined })
      const at = uuid()
      yield* store.goOn("audit", at)
      assert.deepInclude(yield* store.take("audit", 0), { taken: true, position: at })
      yield* store.goOn("audit", undefined)
      assert.deepInclude(yield* store.take("audit", 0), { taken: true, position: undefined })
    }))
  )

  it.effect(
    "a hundred rounds of cleanup beside everything that makes jobs end touch nothing that has not",
    rule(Effect.gen(function*() {
      const { store } = yield* Storage
      yield* mergePolicy({ retention: { completed: 0, cancelled: 0, discarded: 0 }, strategy: "archive" })
      const me = yield* worker({ lease: 1e12 })
      const verbs = ["completed", "failed", "discarded", "released"] as const
      const mover = Effect.gen(function*() {
        yield* store.insert(jobs(5), false)
        const { ids, lease } = yield* claim(me, { limit: 10 })
        yield* store.settle(me, ids.map((id, i) => entry(lease, id, verbs[i % 4]!, { delay: 0, failure })))
      })
      const movers = yield* Effect.forEach(Array.from({ length: 3 }), () => Effect.forkChild(Effect.forever(mover)))
      let removed = 0
      for (let round = 0; round < 100; round++) removed += yield* cleanUp
      yield* Fiber.interruptAll(movers)
      assert.isAbove(removed, 100)
      assert.strictEqual(yield* count("archive"), removed)
      assert.strictEqual(yield* count("archive a where exists (select 1 from pgqueue.job j where j.id = a.id)"), 0)
      yield* assertInPlace
    }))
  )
})
