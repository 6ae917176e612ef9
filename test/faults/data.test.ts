/** What comes in and goes out: values that JSON or PostgreSQL cannot hold, errors of every shape, rows that nobody can read. */
import { assert } from "@effect/vitest"
import { Effect, Exit, Layer, Option, Random, Redacted, Schema } from "effect"
import * as fc from "fast-check"
import * as Enqueue from "../../src/Enqueue.ts"
import { Job, JobQueue, JobQueueError, Worker } from "../../src/index.ts"
import { Count } from "../programs/jobs.ts"
import { makeDatabase } from "../support/database.ts"
import { running, until } from "../support/queue.ts"
import { full, limit } from "./form.ts"
import { queueAt } from "./inside.ts"
import { scenarios } from "./scenario.ts"
import { type Stage, Victim } from "./stage.ts"

const nested = (levels: number): unknown => {
  let value: unknown = 1
  for (let level = 0; level < levels; level++) value = level % 2 === 0 ? [value] : { value }
  return value
}
const cyclic: Record<string, unknown> = {}
cyclic["self"] = cyclic

/** What JSON can say, and every reader gives back. */
const good: ReadonlyArray<unknown> = [
  null,
  true,
  "",
  "x",
  "\ufffe\uffff",
  "😀 \u{10ffff}",
  "\u202eright to left \u0634",
  "\u2028\u2029\u007f",
  -0,
  1e308,
  5e-324,
  2 ** 53 + 1,
  -(2 ** 53),
  [],
  {},
  [[], {}],
  "\\u0000",
  "\\ud800",
  nested(64),
  nested(256),
  JSON.parse(
    `{"__proto__": {"admin": true}, "constructor": {"prototype": {"admin": true}}, "toString": 1, "hasOwnProperty": null}`
  ),
  Object.fromEntries(Array.from({ length: 1000 }, (_, n) => [`key ${n}`, n])),
  Object.assign(Object.create(null), { a: 1 })
]

/** What neither can, or what is not what it seems. */
const bad: ReadonlyArray<unknown> = [
  "a\0b",
  { "\0": 1 },
  "\ud800",
  "\udc00x",
  ["\udbff"],
  { "\ud800": 1 },
  NaN,
  Infinity,
  -Infinity,
  [NaN],
  1n,
  { a: 2n ** 64n },
  undefined,
  [undefined],
  new Date(0),
  new Date(NaN),
  new Map([[1, 2]]),
  new Set([1]),
  Symbol("s"),
  [Symbol.iterator],
  () => 1,
  cyclic,
  [[cyclic]],
  nested(257),
  nested(10_000),
  /x/,
  new Error("x"),
  new Uint8Array(3),
  new (class Own {
    a = 1
  })(),
  Object("boxed"),
  new WeakMap(),
  {
    get throws() {
      throw new Error("a getter")
    }
  },
  { toJSON: () => ({ lied: true }) },
  Object.defineProperty({ a: 1 }, "toJSON", { value: () => ({ lied: true }) }),
  Object.assign([1], { toJSON: () => "lied" }),
  new Proxy({}, {
    ownKeys: () => {
      throw new Error("a proxy")
    }
  }),
  Object.assign([], { length: 3 }),
  "x".repeat(1024 * 1024)
]

/** As JSON has it: -0 is 0, and a field that is undefined is none. */
const plain = (value: unknown): unknown => {
  if (value === 0) return 0
  if (Array.isArray(value)) return value.map(plain)
  if (typeof value !== "object" || value === null) return value
  const copy: Record<string, unknown> = {}
  for (const [key, item] of Object.entries(value)) {
    if (item !== undefined) {
      Object.defineProperty(copy, key, { value: plain(item), enumerable: true, configurable: true, writable: true })
    }
  }
  return copy
}

const anything = fc.anything({
  maxDepth: 4,
  withBigInt: true,
  withBoxedValues: true,
  withDate: true,
  withMap: true,
  withSet: true,
  withNullPrototype: true,
  withObjectString: true,
  withSparseArray: true,
  withTypedArray: true,
  withUnicodeString: true,
  key: fc.oneof(
    fc.string({ unit: "binary" }),
    fc.constantFrom("__proto__", "constructor", "prototype", "toJSON", "\0", "\ud800")
  ),
  values: [
    fc.boolean(),
    fc.double(),
    fc.integer(),
    fc.string({ unit: "binary" }),
    fc.string({ unit: "grapheme" }),
    // Any code unit at all, lone surrogates and NUL among them.
    fc.array(fc.integer({ min: 0, max: 0xffff }), { maxLength: 5 }).map((units) => String.fromCharCode(...units)),
    fc.constantFrom(null, undefined, NaN, -0, "\ud800", "\0", "\\u0000", "\\\0")
  ]
})

const resolverOf = <P extends Schema.Top>(schema: P) =>
  Enqueue.resolver({
    kind: "anything",
    schema,
    encode: Schema.encodeEffect(Schema.toCodecJson(schema)),
    takesUndefined: true,
    defaults: { queue: "default", priority: "normal", maxAttempts: 5, timeout: undefined, unique: undefined }
  })
const resolvers = [resolverOf(Schema.Unknown), resolverOf(Schema.Any)]

/** Whether a value is taken; then it is the same on the other side, and otherwise the refusal has a type. */
const taken = (value: unknown) =>
  Effect.map(
    Effect.forEach(resolvers, (resolver) => Effect.result(resolver.one(value))),
    (results) =>
      results.map((result) => {
        if (result._tag === "Failure") {
          assert.instanceOf(result.failure, Job.EnqueueError)
          assert.include(["InvalidPayload", "TooLarge"], result.failure.reason)
          return false
        }
        const { payload } = result.success
        assert.deepStrictEqual(JSON.parse(payload), plain(value))
        assert.isTrue(payload.isWellFormed())
        return true
      })
  )

class Anything extends Job.make("anything", { payload: Schema.Unknown }) {}
class Returns extends Job.make("returns", { payload: { n: Schema.Int }, success: Schema.Unknown, maxAttempts: 1 }) {}
class Reports extends Job.make("reports", { payload: { n: Schema.Int }, maxAttempts: 1 }) {}
class Throws extends Job.make("throws", {
  payload: { n: Schema.Int, typed: Schema.Boolean },
  error: Schema.Unknown,
  maxAttempts: 1
}) {}
class Strange extends Job.make("strange") {}

/** Runs a worker in this process for as long as something else takes. */
const working = <J extends ReadonlyArray<Job.Any>, A, E, R>(
  stage: Stage,
  jobs: J,
  handlers: Layer.Layer<any, never, any>,
  self: Effect.Effect<A, E, R>
) =>
  Effect.scoped(Effect.gen(function*() {
    yield* running(
      Worker.layer({ jobs, rescueInterval: "500 millis", concurrency: 20 }).pipe(
        Layer.provide(handlers),
        Layer.provide(Layer.succeedContext(stage.services))
      ) as Layer.Layer<never, unknown>
    )
    return yield* self
  }))

const prototype = Object.getOwnPropertyNames(Object.prototype).toSorted().join()

scenarios("data", (scenario) => {
  scenario("I1", "values of every kind are enqueued", { short: true }, (stage) =>
    Effect.gen(function*() {
      for (const value of good) {
        assert.deepStrictEqual(yield* taken(value), [true, true], String(JSON.stringify(value)).slice(0, 100))
      }
      const admitted: Array<string> = []
      for (const [index, value] of bad.entries()) {
        if ((yield* taken(value)).includes(true)) {
          admitted.push(`${index}: ${Object.prototype.toString.call(value)}`)
        }
      }
      assert.deepStrictEqual(admitted, [])

      const runs = full ? 100_000 : 3000
      const seed = Math.floor((yield* Random.next) * 2 ** 31)
      const accepted: Array<unknown> = []
      let count = 0
      for (const value of fc.sample(anything, { numRuns: runs, seed })) {
        const both = yield* Effect.tapDefect(taken(value), () => Effect.logError(`seed ${seed}`))
        if (both[0] === true) {
          count++
          if (accepted.length < (full ? 5000 : 300)) accepted.push(value)
        }
      }
      // And through the database: alone, many at once, and to the handler.
      const seen = new Map<string, unknown>()
      const all = [...good, ...accepted]
      yield* working(
        stage,
        [Anything],
        Anything.toLayer((payload) => Effect.map(Job.Current, ({ id }) => void seen.set(id, payload))),
        Effect.provideContext(
          Effect.gen(function*() {
            const alone = yield* Effect.forEach(good, (value) => Anything.enqueue(value), { concurrency: 10 })
            const many = yield* Anything.enqueueAll(accepted)
            yield* stage.untilAllEnded()
            for (const [index, { id }] of [...alone, ...many].entries()) {
              assert.deepStrictEqual(seen.get(id), plain(all[index]), `seed ${seed}`)
            }
          }),
          stage.services
        )
      )
      assert.strictEqual(
        yield* stage.value("select count(*)::int from pgqueue.finished where status <> 'completed'"),
        0
      )
      assert.strictEqual(Object.getOwnPropertyNames(Object.prototype).toSorted().join(), prototype)
      assert.isUndefined(({} as any).admin)
      yield* stage.finish()
      return {
        values: `${runs + good.length + bad.length}`,
        accepted: `${count}`,
        "through the database": `${all.length}`,
        seed: `${seed}`
      }
    }))

  scenario("I2", "handlers fail with values of every kind", { short: true }, (stage) =>
    Effect.gen(function*() {
      const deep = Array.from({ length: 1000 }).reduce<Error>(
        (cause) => new Error("in between", { cause }),
        new Error("the first")
      )
      const huge = "x".repeat(full ? 100 * 1024 * 1024 : 10 * 1024 * 1024)
      const named = Object.assign(new Error("\0 \ud800"), { name: "\0", stack: "\ud800 at \0" })
      const thrown: ReadonlyArray<unknown> = [
        ...good,
        ...bad,
        named,
        deep,
        new Error(huge),
        huge,
        Object.assign(new Error("x"), { stack: huge }),
        { message: huge },
        new AggregateError([new Error("a"), cyclic], "many"),
        Object.create(null),
        new Proxy(new Error("x"), {
          get: () => {
            throw new Error("a proxy")
          }
        })
      ]
      yield* working(
        stage,
        [Throws],
        Throws.toLayer(({ n, typed }) =>
          typed ? Effect.fail(thrown[n]) : Effect.sync(() => {
            throw thrown[n]
          })
        ),
        Effect.provideContext(
          Effect.gen(function*() {
            yield* Throws.enqueueAll(thrown.flatMap((_, n) => [{ n, typed: true }, { n, typed: false }]))
            yield* stage.untilAllEnded()
          }),
          stage.services
        )
      )
      const count = 2 * thrown.length
      assert.deepStrictEqual(
        yield* stage.rows("select status, attempt::int, count(*)::int from pgqueue.finished group by 1, 2"),
        [{ status: "discarded", attempt: 1, count }]
      )
      const [sizes] = yield* stage.rows<{ least: number; most: number; whole: number }>(
        `select min(octet_length(error->>'message')) as least, max(octet_length(error->>'message')) as most,
           max(octet_length(error::text)) as whole from pgqueue.finished`
      )
      assert.isAtLeast(sizes!.least, 1)
      assert.isAtMost(sizes!.most, 8192)
      yield* stage.finish()
      return {
        failures: `${count}`,
        "longest message": `${sizes!.most} B`,
        "with the typed error": `${sizes!.whole} B`
      }
    }))

  scenario("I3", "payloads up to the limit, and rows past it", {}, (stage) =>
    Effect.gen(function*() {
      const mebibyte = 1024 * 1024
      const seen = new Map<string, number>()
      const started: Array<number> = []
      yield* working(
        stage,
        [Anything, Count],
        Layer.mergeAll(
          Anything.toLayer((payload) => Effect.map(Job.Current, ({ id }) => void seen.set(id, String(payload).length))),
          Count.toLayer(({ n }) => Effect.sync(() => void started.push(n)))
        ),
        Effect.provideContext(
          Effect.gen(function*() {
            const sizes = [1, 1024, mebibyte / 2, mebibyte - 2]
            const ids = yield* Effect.forEach(sizes, (size) => Anything.enqueue("x".repeat(size)))
            const refused = yield* Effect.flip(Anything.enqueue("x".repeat(mebibyte - 1)))
            assert.deepInclude(refused, { _tag: "EnqueueError", reason: "TooLarge" })
            yield* Effect.flip(stage.rows("select pgqueue.enqueue('anything', to_json(repeat('x', 1048575)))"))
            yield* stage.untilAllEnded()
            assert.deepStrictEqual(ids.map(({ id }) => seen.get(id)), sizes)

            // Somebody has taken the limit away, and writes what no client of this driver can read, compressible or not.
            yield* stage.rows("alter table pgqueue.job drop constraint job_payload_size")
            yield* stage.rows(
              "create function noise(n int) returns text language sql as $$ select string_agg(md5(i::text), '') from generate_series(1, n / 32) i $$"
            )
            const before = yield* stage.rows<{ pid: number }>(
              "select pid from pg_stat_activity where application_name = 'stage'"
            )
            for (const size of [8, 20]) {
              yield* stage.rows(
                `select pgqueue.enqueue('anything', to_json(repeat('x', ${
                  size * mebibyte
                })), priority => 0, max_attempts => 1)`
              )
              yield* stage.rows(
                `select pgqueue.enqueue('anything', to_json(noise(${
                  size * mebibyte
                })), priority => 0, max_attempts => 2)`
              )
            }
            yield* Count.enqueueAll(Array.from({ length: 50 }, (_, n) => ({ n })))
            const neighbours = yield* until("the neighbours have run", Effect.sync(() => started.length === 50))
            yield* stage.untilAllEnded()
            const after = yield* stage.rows<{ pid: number }>(
              "select pid from pg_stat_activity where application_name = 'stage'"
            )
            const gone = before.filter(({ pid }) => !after.some((one) => one.pid === pid)).length
            assert.isAtMost(gone, 1)
            assert.isBelow(neighbours, limit(5000))
          }),
          stage.services
        )
      )
      assert.deepStrictEqual(
        yield* stage.rows(
          `select status, attempt::int, error->>'tag' as tag, count(*)::int from pgqueue.finished
           where kind = 'anything' and octet_length(payload::text) > 1048576 group by 1, 2, 3 order by 2`
        ),
        [
          { status: "discarded", attempt: 1, tag: "Undecodable", count: 2 },
          { status: "discarded", attempt: 2, tag: "Undecodable", count: 2 }
        ]
      )
      // A result that somebody has made too large, without the limit: who asks for it fails, and nobody else.
      yield* stage.rows("alter table pgqueue.finished drop constraint finished_size")
      const { id } = yield* Effect.provideContext(Returns.enqueue({ n: 0 }), stage.services)
      yield* working(stage, [Returns], Returns.toLayer(() => Effect.succeed("x")), stage.untilAllEnded())
      yield* stage.rows("update pgqueue.finished set result = to_json(repeat('x', 20000000)) where id = $1::uuid", [id])
      const failed = yield* Effect.flip(Effect.provideContext(Returns.poll(id), stage.services))
      assert.strictEqual(failed._tag, "SqlError")
      yield* Effect.provideContext(JobQueue.use((queue) => queue.stats), stage.services)
      yield* stage.finish()
      return { payloads: "8 and 20 MiB, compressible and not", outcome: "discarded as Undecodable" }
    }))

  scenario("I4", "rows whose payload does not fit its schema", { short: true }, (stage) =>
    Effect.gen(function*() {
      const worker = yield* stage.worker("worker", { concurrency: 5 })
      const count = 100
      yield* stage.rows(
        `select pgqueue.enqueue('count', '{"n": "not a number"}', priority => 0, max_attempts => 2) from generate_series(1, $1::int)`,
        [count]
      )
      yield* Effect.provideContext(Count.enqueueAll(Array.from({ length: count }, (_, n) => ({ n }))), stage.services)
      const neighbours = yield* until(
        "the others have run",
        Effect.map(
          stage.recorded("select count(*)::int from ledger where phase = 'start'"),
          (n) => n === count
        )
      )
      yield* stage.untilAllEnded()
      assert.deepStrictEqual(
        yield* stage.rows(
          "select status, attempt::int, error->>'tag' as tag, count(*)::int from pgqueue.finished group by 1, 2, 3 order by 1"
        ),
        [
          { status: "completed", attempt: 1, tag: null, count },
          { status: "discarded", attempt: 2, tag: "Undecodable", count }
        ]
      )
      // It came back after its delay, and not at once.
      const soonest = yield* stage.value(
        `select (extract(epoch from min(f.finished_at - a.ended_at)) * 1000)::float8 from pgqueue.attempt a join pgqueue.finished f on f.id = a.job`
      )
      assert.isAbove(soonest, 700)
      assert.isTrue(worker.running())
      const counts = yield* stage.finish()
      return { ...counts, "neighbours done": neighbours, "shortest delay": soonest }
    }))

  scenario("I5", "a kind that nobody handles yet", { short: true }, (stage) =>
    Effect.gen(function*() {
      const worker = yield* stage.worker("worker")
      const strangers = full ? 2500 : 200
      yield* stage.rows("select pgqueue.enqueue('strange', priority => 0) from generate_series(1, $1::int)", [
        strangers
      ])
      yield* Effect.provideContext(Count.enqueueAll(Array.from({ length: 100 }, (_, n) => ({ n }))), stage.services)
      const neighbours = yield* until(
        "the others have run",
        Effect.map(
          stage.recorded("select count(*)::int from ledger where phase = 'start'"),
          (n) => n === 100
        )
      )
      yield* until(
        "they are out of the way",
        Effect.map(stage.value("select count(*)::int from pgqueue.ready where lane >= 200"), (n) => n === strangers),
        { within: 30_000 }
      )
      const stats = yield* Effect.provideContext(JobQueue.use((queue) => queue.stats), stage.services)
      assert.deepInclude(stats.find(({ kind }) => kind === "strange")!, { available: strangers, handled: false })
      assert.strictEqual(yield* stage.value("select count(*)::int from pgqueue.finished where kind = 'strange'"), 0)
      let ran = 0
      yield* working(stage, [Strange], Strange.toLayer(() => Effect.sync(() => void ran++)), stage.untilAllEnded())
      assert.strictEqual(ran, strangers)
      assert.strictEqual(
        yield* stage.value("select count(*)::int from pgqueue.finished where kind = 'strange' and attempt <> 1"),
        0
      )
      assert.isTrue(worker.running())
      const counts = yield* stage.finish()
      return { ...counts, strangers: `${strangers}`, "neighbours done": neighbours }
    }))

  scenario(
    "I6",
    "handlers return values of every kind, and say how far they are with them",
    { short: true },
    (stage) =>
      Effect.gen(function*() {
        const values = [...good, ...bad]
        const polled = yield* working(
          stage,
          [Returns, Reports],
          Layer.mergeAll(
            Returns.toLayer(({ n }) => Effect.succeed(values[n])),
            Reports.toLayer(({ n }) => Job.progress(values[n] as Schema.Json))
          ),
          Effect.provideContext(
            Effect.gen(function*() {
              const ids = yield* Returns.enqueueAll(values.map((_, n) => ({ n })))
              yield* Reports.enqueueAll(values.map((_, n) => ({ n })))
              yield* stage.untilAllEnded()
              return yield* Effect.forEach(ids, ({ id }) => Returns.poll(id))
            }),
            stage.services
          )
        )
        for (const [index, value] of good.entries()) {
          assert.deepStrictEqual(Option.getOrThrow(polled[index]!), Exit.succeed(plain(value)))
        }
        const outcomes = yield* stage.rows<{ kind: string; status: string; count: number }>(
          "select kind, status, count(*)::int from pgqueue.finished group by 1, 2 order by 1, 2"
        )
        assert.deepStrictEqual(outcomes.map(({ kind, status }) => `${kind} ${status}`), [
          "reports completed",
          "reports discarded",
          "returns completed",
          "returns discarded"
        ])
        const [reported, unreported, returned, refused] = outcomes.map(({ count }) => count)
        assert.strictEqual(refused, bad.length)
        assert.strictEqual(returned, good.length)
        assert.strictEqual(unreported, bad.length)
        assert.strictEqual(reported, good.length)
        yield* stage.finish()
        return { accepted: `${returned}`, refused: `${refused}` }
      })
  )

  scenario("I7", "a database that is not encoded in UTF-8", { short: true }, (stage) =>
    Effect.gen(function*() {
      const victim = yield* Victim
      const refused: Array<string> = []
      for (const encoding of ["SQL_ASCII", "LATIN1"]) {
        const { name, url } = yield* makeDatabase(victim.url)
        yield* stage.rows(`drop database ${name}`)
        yield* stage.rows(`create database ${name} encoding '${encoding}' locale 'C' template template0`)
        const error = yield* Effect.flip(queueAt(Redacted.value(url)))
        assert.instanceOf(error, JobQueueError)
        assert.deepInclude(error, { _tag: "JobQueueError", reason: "Unsupported" })
        assert.match(error.message, /must be encoded in UTF8, this one is/)
        refused.push(error.message)
        if (!full) continue
        const started = yield* Effect.exit(stage.worker(`worker ${encoding}`, { url: Redacted.value(url) }))
        assert.match(String(started), /must be encoded in UTF8/)
      }
      yield* stage.finish()
      return { refused: `${refused.length}`, message: refused[0]! }
    }))
})
