/** Names are values and never SQL, keys of objects or paths (S1, S11); ids of others open nothing (S18). */
import { PgClient } from "@effect/sql-pg"
import { assert, describe, it } from "@effect/vitest"
import { Effect, Exit, Layer, Option, Redacted, Schema } from "effect"
import { Admin, CronScheduler, Job, JobQueue, Maintenance, Worker } from "../src/index.ts"
import { overhear } from "./support/overheard.ts"
import {
  allInPlace,
  assertRows,
  databaseUrl,
  databaseWithLedger,
  queueLayer,
  rows,
  running,
  until,
  untilAllEnded,
  value,
  withQueue
} from "./support/queue.ts"

const literal = [
  `x"; drop table pgqueue.job; --`,
  `x'; drop table pgqueue.job; --`,
  "a.b",
  "$$ $1 %s %I",
  "{a,b}",
  `"`,
  `\\'`,
  "NULL",
  " ",
  "é\u2028😀",
  "__proto__",
  "constructor",
  "toString",
  "../../x",
  "node:fs",
  "y".repeat(128)
]
const refused = ["", "a\0b", "a\nb", "a\u007fb", "a\ud800b", "z".repeat(1000)]

/** A job whose kind, queue, key and metadata are all of this name. */
const jobOf = (name: string) =>
  Job.make(name, {
    payload: { text: Schema.String },
    success: Schema.Record(Schema.String, Schema.String),
    queue: name,
    unique: () => name
  })

const tables = value<string>(
  "select string_agg(relname || ' ' || (select count(*) from pg_attribute where attrelid = c.oid), ',' order by relname) from pg_class c where relnamespace = 'pgqueue'::regnamespace"
)

describe("a name is stored as it is", () => {
  it.live("as kind, queue, key, metadata, schedule and name of a worker, and is in the text of no statement", () =>
    Effect.gen(function*() {
      const wire = yield* overhear(yield* databaseUrl)
      yield* Effect.scoped(Effect.gen(function*() {
        const before = yield* tables
        const jobs = literal.map(jobOf)
        const seen: Array<string> = []
        const handlers = jobs.map((job) =>
          job.toLayer(({ text }) =>
            Effect.gen(function*() {
              const { kind, metadata, queue } = yield* Job.Current
              assert.deepStrictEqual([kind, queue, text], [job._tag, job._tag, job._tag])
              seen.push(kind)
              return metadata
            })
          )
        )
        for (const [index, job] of jobs.entries()) {
          const name = literal[index]!
          // A key that is computed is one like any other.
          const metadata = { [name]: name }
          const { id, status } = yield* job.enqueue({ text: name }, { metadata })
          assert.strictEqual(status, "inserted", name)
          assert.deepStrictEqual(yield* job.enqueue({ text: name }), { id, status: "existing" }, name)
          const details = Option.getOrThrow(yield* Admin.get(id))
          assert.deepStrictEqual([details.kind, details.queue], [name, name])
          assert.deepStrictEqual(Object.entries(details.metadata), [[name, name]])
          yield* CronScheduler.schedule(
            CronScheduler.make(name, { cron: "0 0 1 1 *", job, payload: { text: name }, metadata })
          )
          yield* CronScheduler.pause(name)
          yield* CronScheduler.resume(name)
          assert.strictEqual((yield* CronScheduler.trigger(name)).id, id)
          assert.strictEqual(yield* Admin.redrive({ kind: name, queue: name }), 0)
          yield* rows("select pgqueue.enqueue($1, '{\"text\":\"\"}', queue => $1, unique_key => $1)", [name])
        }
        assert.sameMembers((yield* CronScheduler.list).map((one) => one.name), literal)
        yield* running(
          Worker.layer({
            name: literal.join("").slice(0, 200),
            jobs: jobs as [typeof jobs[number]],
            queues: Object.fromEntries(literal.map((name) => [name, { concurrency: 1 }])),
            pollInterval: "100 millis"
          }).pipe(Layer.provide(handlers as [typeof handlers[number]]))
        )
        yield* untilAllEnded()
        assert.sameMembers(seen, literal)
        assert.deepStrictEqual(
          (yield* rows<{ name: string }>("select result->>kind as name from pgqueue.finished")).map((row) => row.name)
            .toSorted(),
          literal.toSorted()
        )
        const { stats } = yield* JobQueue
        assert.sameMembers((yield* stats).map((one) => one.kind), literal)
        yield* Effect.forEach(literal, CronScheduler.remove, { discard: true })
        assert.strictEqual(yield* tables, before)
        yield* allInPlace
      })).pipe(
        Effect.provide(
          JobQueue.layer().pipe(Layer.provideMerge(PgClient.layer({ url: Redacted.make(wire.url) })))
        )
      )
      const asked = [...new Set(wire.texts)]
      assert.isAbove(asked.length, 20)
      const telling = literal.filter((name) => name.length > 3 && !["NULL", "toString", "constructor"].includes(name))
      assert.isAbove(telling.length, 7)
      for (const text of asked) for (const name of telling) assert.notInclude(text, name)
    }).pipe(Effect.scoped, Effect.provide(databaseWithLedger())))

  it.live("or refused with a typed error, before any SQL", () =>
    withQueue(Effect.gen(function*() {
      class Plain extends Job.make("plain") {}
      const typed = Effect.fnUntraced(function*<A, E extends { readonly _tag: string }, R>(
        what: string,
        operation: Effect.Effect<A, E, R>,
        tag: string
      ) {
        const exit = yield* Effect.exit(operation)
        assert.isTrue(Exit.isFailure(exit), what)
        const error = yield* Effect.flip(exit)
        assert.strictEqual(error._tag, tag, what)
      })
      for (const name of refused) {
        const shown = JSON.stringify(name.slice(0, 20))
        const job = Job.make(name)
        yield* typed(`kind ${shown}`, job.enqueue(), "EnqueueError")
        yield* typed(`kind in bulk ${shown}`, job.enqueueAll([undefined]), "EnqueueError")
        yield* typed(`queue ${shown}`, Plain.enqueue(undefined, { queue: name }), "EnqueueError")
        yield* typed(`id ${shown}`, Plain.enqueue(undefined, { id: name }), "EnqueueError")
        const entry = CronScheduler.make(name, { cron: "0 0 1 1 *", job: Plain })
        yield* typed(`schedule ${shown}`, CronScheduler.schedule(entry), "EnqueueError")
        const worker = (options: object) =>
          Layer.build(
            Worker.layer({ jobs: [Plain], ...options } as Worker.Options<[typeof Plain], never>).pipe(
              Layer.provide([Plain.toLayer(() => Effect.void), job.toLayer(() => Effect.void)])
            )
          ).pipe(Effect.scoped)
        yield* typed(`worker of the kind ${shown}`, worker({ jobs: [job] }), "JobQueueError")
        yield* typed(
          `worker of the alias ${shown}`,
          worker({ jobs: [Job.make("plain", { aliases: [name] })] }),
          "JobQueueError"
        )
        yield* typed(
          `worker of the queue ${shown}`,
          worker({ jobs: [Job.make("plain", { queue: name })] }),
          "JobQueueError"
        )
        yield* typed(`name ${shown}`, worker({ name }), "JobQueueError")
        yield* typed("schema", Layer.build(queueLayer({ queue: { schema: name } })), "JobQueueError")
      }
      for (const name of ["", "a\0b", "a\ud800b", "z".repeat(1025)]) {
        yield* typed("key", Plain.enqueue(undefined, { unique: name }), "EnqueueError")
        if (name === "" || name.length > 1000) continue
        yield* typed("metadata key", Plain.enqueue(undefined, { metadata: { [name]: "" } }), "EnqueueError")
        yield* typed("metadata value", Plain.enqueue(undefined, { metadata: { a: name } }), "EnqueueError")
      }
      for (const schema of literal.filter((name) => !/^(constructor|__proto__)$/.test(name))) {
        yield* typed(`schema ${schema}`, Layer.build(queueLayer({ queue: { schema } })), "JobQueueError")
      }
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.job"), 0)
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.worker"), 0)
      assert.strictEqual(
        yield* value(
          "select count(*)::int from pg_namespace where nspname !~ '^(pg_|information_schema|public|pgqueue$)'"
        ),
        0
      )
    })))
})

describe("what people ask for by name or id", () => {
  it.live("is not there, or is refused with a typed error", () =>
    withQueue(Effect.gen(function*() {
      class Plain extends Job.make("plain") {}
      for (const name of [...literal, "a\0b", "a\ud800b", "z".repeat(1000)]) {
        assert.isTrue(Option.isNone(yield* Admin.get(name)))
        assert.deepStrictEqual(yield* Admin.attempts(name), [])
        for (const act of [Admin.cancel, Admin.retry, Admin.delete]) {
          assert.strictEqual((yield* Effect.flip(act(name)))._tag, "Stale")
        }
        assert.isTrue(Option.isSome(yield* Plain.poll(name)))
        for (const act of [CronScheduler.pause, CronScheduler.resume, CronScheduler.trigger, CronScheduler.remove]) {
          const error = yield* Effect.flip(act(name) as Effect.Effect<unknown, { readonly _tag: string }, JobQueue>)
          assert.strictEqual(error._tag, name.includes("\0") ? "SqlError" : "NoSuchSchedule", JSON.stringify(name))
        }
      }
    })))
})

describe("what is stored is data", () => {
  const polluted =
    `{"__proto__":{"polluted":1},"constructor":{"prototype":{"polluted":1}},"prototype":{"polluted":1},"a":"1"}`

  it.live("a payload, metadata, progress and a result with the names of prototypes change none", () =>
    withQueue(Effect.gen(function*() {
      const Anything = Schema.Record(Schema.String, Schema.Unknown)
      class Echo extends Job.make("echo", { payload: Anything, success: Anything }) {}
      class Strict extends Job.make("strict", { payload: { a: Schema.String }, success: Schema.String }) {}
      const seen: Array<ReadonlyArray<string>> = []
      const handlers = Layer.mergeAll(
        Echo.toLayer((payload) =>
          Effect.gen(function*() {
            const { metadata } = yield* Job.Current
            seen.push(Object.keys(payload), Object.keys(metadata))
            yield* Job.progress(payload as Schema.Json)
            return payload
          })
        ),
        Strict.toLayer((payload) => Effect.succeed(Object.keys(payload).join()))
      )
      const [echo] = yield* rows<{ id: string }>(
        "select pgqueue.enqueue('echo', $1::json, metadata => '{\"__proto__\":\"x\"}')::text as id",
        [polluted]
      )
      const [strict] = yield* rows<{ id: string }>("select pgqueue.enqueue('strict', $1::json)::text as id", [polluted])
      yield* running(Worker.layer({ jobs: [Echo, Strict] }).pipe(Layer.provide(handlers)))
      const again = yield* Echo.execute(JSON.parse(polluted))
      yield* untilAllEnded()
      assert.deepStrictEqual(seen[1], ["__proto__"])
      assert.sameMembers([...seen[0]!], ["__proto__", "constructor", "prototype", "a"])
      assert.isTrue(Object.hasOwn(again, "__proto__"))
      const ended = Option.getOrThrow(yield* Admin.get(echo!.id))
      assert.isTrue(Object.hasOwn(Option.getOrThrow(ended.progress) as object, "__proto__"))
      assert.strictEqual(JSON.stringify(Option.getOrThrow(ended.result)), polluted)
      assert.deepStrictEqual(Option.getOrThrow(yield* Strict.poll(strict!.id)), Exit.succeed("a"))
      assert.notProperty({}, "polluted")
      assert.notProperty(Object, "polluted")
      assert.isNull(Object.getPrototypeOf(Object.prototype))
    })))

  it.live("a kind that nobody lists stays in line, whatever it is called, and loads nothing", () =>
    withQueue(Effect.gen(function*() {
      class Plain extends Job.make("plain") {}
      class Family extends Job.family("family:", {}) {}
      const kinds = [
        "__proto__",
        "constructor",
        "toString",
        "valueOf",
        "../../x",
        "node:fs",
        "./Job.ts",
        "Plain",
        "plain ",
        "family"
      ]
      for (const kind of kinds) yield* rows("select pgqueue.enqueue($1, 'null')", [kind])
      for (const kind of ["family:__proto__", "family:../../x"]) {
        yield* rows("select pgqueue.enqueue($1, 'null')", [kind])
      }
      const handled: Array<string> = []
      yield* running(
        Worker.layer({ jobs: [Plain, Family], rescueInterval: "50 millis" }).pipe(
          Layer.provide([
            Plain.toLayer(() => Effect.void),
            Family.toLayer((_, kind) => Effect.sync(() => void handled.push(kind)))
          ])
        )
      )
      yield* Plain.execute()
      yield* until("the family", Effect.sync(() => handled.length === 2))
      assert.sameMembers(handled, ["family:__proto__", "family:../../x"])
      yield* Plain.execute()
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.ready"), kinds.length)
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.attempt"), 0)
      const { stats } = yield* JobQueue
      for (const kind of kinds) assert.propertyVal((yield* stats).find((one) => one.kind === kind), "handled", false)
    })))
})

describe("a lease is nobody's who does not hold it", () => {
  it.live("nothing of the public interface takes one; guessed ids and tokens change no row", () =>
    withQueue(Effect.gen(function*() {
      class Held extends Job.make("held", { success: Schema.String }) {}
      const { store } = (yield* JobQueue).internal
      const guess = "0190aaaa-0000-4000-8000-000000000001"
      const { id } = yield* Held.enqueue()
      yield* running(
        Worker.layer({ jobs: [Held], gracePeriod: 0 }).pipe(Layer.provide(Held.toLayer(() => Effect.never)))
      )
      yield* until("it runs", Effect.map(value("select count(*)::int from pgqueue.lease"), (n) => n === 1))
      const state = rows(
        `select (select json_agg(l) from pgqueue.lease l)::text as lease, (select json_agg(w.id) from pgqueue.worker w)::text as worker,
           (select json_agg(j) from pgqueue.job j)::text as job, (select count(*)::int from pgqueue.finished) as finished,
           (select count(*)::int from pgqueue.ready) as ready`
      )
      const before = yield* state
      const [{ lease, worker } = { lease: "", worker: "" }] = yield* rows<{ lease: string; worker: string }>(
        "select id::text as lease, worker::text as worker from pgqueue.lease"
      )
      // By people: a running job has not ended.
      assert.strictEqual((yield* Effect.flip(Admin.retry(id)))._tag, "Stale")
      assert.strictEqual((yield* Effect.flip(Admin.delete(id)))._tag, "Stale")
      assert.strictEqual((yield* Effect.flip(Admin.cancel(guess)))._tag, "Stale")
      // By another worker: with a lease that is none, with the lease of others for a job that is none, as a worker that is none.
      for (const verb of ["completed", "failed", "cancelled", "released", "lost", "snoozed"] as const) {
        const entry = {
          lease: guess,
          id,
          verb,
          result: undefined,
          reason: undefined,
          delay: 0,
          failure: undefined,
          ran: 0,
          endedAt: undefined,
          forget: undefined
        }
        assert.deepInclude((yield* store.settle(worker, [entry]))[0], { state: "gone" }, verb)
        assert.deepInclude((yield* store.settle(worker, [{ ...entry, lease, id: guess }]))[0], { state: "gone" }, verb)
      }
      assert.include(yield* store.release(guess, [lease]), { leases: 0, back: 0 })
      yield* store.leave(guess)
      yield* store.unregister(guess)
      yield* store.progress(guess, id, `"mine"`)
      assert.strictEqual(yield* store.detach(guess, id, guess), "gone")
      assert.deepStrictEqual(
        yield* store.claim({
          worker: guess,
          lease: guess,
          queue: "default",
          lanes: [],
          kinds: ["held"],
          prefixes: [""],
          limit: 10
        }),
        []
      )
      assert.deepStrictEqual(yield* rows(store.beatText, [guess]), [])
      assert.deepStrictEqual(yield* state, before)
    })))
})

describe("a queue's storage is its own", () => {
  it.live("what all have agreed on is changed by what Maintenance takes, and nothing else", () =>
    Effect.gen(function*() {
      yield* Layer.build(queueLayer())
      const garbage = { cleanup: { strategy: `delete'; drop table pgqueue.job; --` } } as unknown as Maintenance.Options
      const error = yield* Effect.flip(Layer.build(Maintenance.layer(garbage).pipe(Layer.provide(queueLayer()))))
      assert.strictEqual(error._tag, "JobQueueError")
      yield* assertRows("select value::text from pgqueue.setting where name = 'cleanup'", [{ value: "{}" }])
    }).pipe(Effect.scoped, Effect.provide(databaseWithLedger())))
})
