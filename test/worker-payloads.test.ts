/** What may enter the queue, what is refused at the door, and that whatever enters arrives at the handler as it was. */
import { PgClient } from "@effect/sql-pg"
import { assert, describe, it } from "@effect/vitest"
import { Context, DateTime, Duration, Effect, Layer, Redacted, Schema } from "effect"
import { Job, JobQueue, Worker } from "../src/index.ts"
import { makeProxy } from "./support/proxy.ts"
import { assertRows, databaseUrl, running, until, untilAllEnded, value, withQueue } from "./support/queue.ts"

class Anything extends Job.make("anything", { payload: Schema.Unknown }) {}
class Text extends Job.make("text", { payload: { text: Schema.String } }) {}
class Numeric extends Job.make("number", { payload: { n: Schema.Number } }) {}
class Dated extends Job.make("date", { payload: { at: Schema.Date } }) {}
class Short extends Job.make("short", { payload: { text: Schema.String.check(Schema.isMaxLength(3)) } }) {}
class Recursive extends Job.make("recursive", { payload: Schema.Any }) {}

const nested = (levels: number): unknown => {
  let value: unknown = 1
  for (let level = 0; level < levels; level++) value = level % 2 === 0 ? [value] : { value }
  return value
}
const lone = "a\ud800b"
/** What somebody passes who does not use TypeScript. */
const untyped = (options: object): Job.EnqueueOptions => options
const text = (options: object) => Text.enqueue({ text: "x" }, untyped(options))
const mebibyte = 1024 * 1024

type Refused = readonly [what: string, enqueue: Effect.Effect<unknown, unknown, JobQueue>, message?: RegExp]

const invalidPayload: ReadonlyArray<Refused> = [
  ["a payload that does not fit", Short.enqueue({ text: "four" })],
  ["no payload", (Text.enqueue as () => ReturnType<typeof Text.enqueue>)()],
  ["a payload of another type", (Text.enqueue as (payload: unknown) => ReturnType<typeof Text.enqueue>)({ text: 1 })],
  ["NaN in an unknown value", Anything.enqueue({ a: [NaN] })],
  ["Infinity in an unknown value", Anything.enqueue(Infinity)],
  ["undefined in an unknown value", Anything.enqueue({ a: undefined })],
  ["a bigint in an unknown value", Anything.enqueue({ a: 1n })],
  ["a Map in an unknown value", Anything.enqueue(new Map([[1, 2]]))],
  ["a function", Anything.enqueue(() => 1)],
  ["NaN in a value of any type", Recursive.enqueue({ a: [NaN] })],
  ["a Date in a value of any type", Recursive.enqueue({ a: new Date(0) })],
  ["an invalid date", Dated.enqueue({ at: new Date(NaN) })],
  ["NUL in a string", Text.enqueue({ text: "a\0b" }), /NUL/],
  ["NUL in a key", Anything.enqueue({ "a\0b": 1 }), /NUL/],
  ["NUL after a backslash", Text.enqueue({ text: "\\\0" }), /NUL/],
  ["a lone high surrogate", Text.enqueue({ text: lone }), /surrogate/],
  ["a lone low surrogate", Text.enqueue({ text: "\udc00" }), /surrogate/],
  ["a lone surrogate in a key", Anything.enqueue({ x: [{ [lone]: 1 }] }), /surrogate/],
  ["nesting 257 deep", Anything.enqueue(nested(257)), /deep/],
  ["nesting 10 000 deep", Anything.enqueue(nested(10_000))],
  ["nesting 10 000 deep in a value of any type", Recursive.enqueue(nested(10_000))]
]

const tooLarge: ReadonlyArray<Refused> = [
  ["1 MiB and a byte", Anything.enqueue("a".repeat(mebibyte - 1))],
  ["1 MiB in 3-byte characters", Anything.enqueue("€".repeat(mebibyte / 3))],
  ["1 MiB in 4-byte characters", Anything.enqueue("😀".repeat(mebibyte / 4))],
  ["one of many", Text.enqueueAll([{ text: "" }, { text: "a".repeat(mebibyte) }])],
  ["metadata over 64 KiB", text({ metadata: { a: "a".repeat(65_536) } })]
]

const invalidOption: ReadonlyArray<Refused> = [
  ["an empty queue name", text({ queue: "" }), /queue/],
  ["a queue name with a line break", text({ queue: "a\nb" }), /queue/],
  ["a queue name with NUL", text({ queue: "a\0" }), /queue/],
  ["a queue name of 129 characters", text({ queue: "q".repeat(129) }), /queue/],
  ["a queue name with a lone surrogate", text({ queue: lone }), /queue/],
  ["an empty kind", Job.make("").enqueue(), /kind/],
  ["a kind with a lone surrogate", Job.make(lone).enqueue(), /kind/],
  ["a kind of 201 characters", Job.make("k".repeat(201)).enqueue(), /kind/],
  ["a kind with a control character", Job.make("a\u007f").enqueue(), /kind/],
  ["a bad id", text({ id: "1" }), /id/],
  ["an id with something behind it", text({ id: "0190aaaa-0000-7000-8000-000000000001\n" }), /id/],
  ["priority 10", text({ priority: 10 }), /priority/],
  ["priority -1", text({ priority: -1 }), /priority/],
  ["priority 1.5", text({ priority: 1.5 }), /priority/],
  ["priority NaN", text({ priority: NaN }), /priority/],
  ["a priority that has no name", text({ priority: "urgent" }), /priority/],
  ["maxAttempts 0", text({ maxAttempts: 0 }), /maxAttempts/],
  ["maxAttempts 1 001", text({ maxAttempts: 1001 }), /maxAttempts/],
  ["maxAttempts 2.5", text({ maxAttempts: 2.5 }), /maxAttempts/],
  ["a negative delay", text({ delay: -1 }), /delay/],
  ["an infinite delay", text({ delay: Duration.infinity }), /delay/],
  ["a delay of NaN", text({ delay: NaN }), /delay/],
  ["a delay that is no duration", text({ delay: "soon" }), /delay/],
  ["delay and runAt", text({ delay: 1, runAt: new Date(0) }), /runAt/],
  ["an invalid runAt", text({ runAt: new Date(NaN) }), /runAt/],
  ["a runAt in the year 10 000", text({ runAt: new Date("+010000-01-02T00:00:00Z") }), /runAt/],
  ["a runAt that is no date", text({ runAt: "2030-01-01" }), /runAt/],
  ["no time", text({ timeout: 0 }), /timeout/],
  ["an infinite timeout", text({ timeout: Duration.infinity }), /timeout/],
  ["an empty unique key", text({ unique: "" }), /unique/],
  ["a unique key of 1 025 characters", text({ unique: "k".repeat(1025) }), /unique/],
  ["a unique key with NUL", text({ unique: "a\0b" }), /unique/],
  ["a unique key with a lone surrogate", text({ unique: { key: lone } }), /unique/],
  ["a period of nothing", text({ unique: { key: "k", period: 0 } }), /period/],
  ["an endless period", text({ unique: { key: "k", period: Duration.infinity } }), /period/]
]

const invalidMetadata: ReadonlyArray<Refused> = [
  ["metadata that is no record", text({ metadata: "x" })],
  ["metadata that is no text", text({ metadata: { a: 1 } })],
  ["metadata with NUL", text({ metadata: { a: "\0" } })],
  ["metadata with a lone surrogate in a key", text({ metadata: { [lone]: "a" } })]
]

/** A queue behind a proxy that counts what is sent. */
const counted = Effect.gen(function*() {
  const proxy = yield* makeProxy(yield* databaseUrl)
  const context = yield* Layer.build(
    Layer.fresh(
      JobQueue.layer().pipe(
        Layer.provide(PgClient.layer({ url: Redacted.make(proxy.url) }))
      )
    )
  )
  return { requests: proxy.requests, queue: Context.pick(JobQueue)(context) }
})

describe("enqueue refuses, before anything is sent,", () => {
  for (
    const [reason, table] of [
      ["InvalidPayload", invalidPayload],
      ["TooLarge", tooLarge],
      ["InvalidOption", invalidOption],
      ["InvalidPayload", invalidMetadata]
    ] as const
  ) {
    it.live(`${reason}: ${table.length} kinds of ${table === invalidMetadata ? "metadata" : "input"}`, () =>
      withQueue(Effect.gen(function*() {
        const { queue, requests } = yield* counted
        const before = requests()
        for (const [what, enqueue, message] of table) {
          const exit = yield* Effect.exit(Effect.provideContext(enqueue, queue))
          const error = yield* Effect.flip(exit).pipe(
            Effect.catchCause((cause) => Effect.die(`${what}: ${String(cause)}`))
          )
          assert.instanceOf(error, Job.EnqueueError, what)
          assert.strictEqual((error as Job.EnqueueError).reason, reason, what)
          if (message !== undefined) assert.match((error as Job.EnqueueError).message, message, what)
        }
        assert.strictEqual(requests(), before)
        // The counter does count.
        yield* Effect.provideContext(text({}), queue)
        assert.isAbove(requests(), before)
        assert.strictEqual(yield* value("select count(*)::int from pgqueue.job"), 1)
      })))
  }

  it.live("everything of an enqueueAll when one is bad", () =>
    withQueue(Effect.gen(function*() {
      const error = yield* Effect.flip(
        Text.enqueueAll([{ text: "a" }, { text: "b\0" }, { text: "c" }])
      )
      assert.deepInclude(error, { _tag: "EnqueueError", kind: "text", reason: "InvalidPayload" })
      yield* assertRows("select * from pgqueue.job", [])
    })))
})

describe("a payload arrives as it was", () => {
  class Event extends Schema.Class<Event>("Event")({
    id: Schema.String.pipe(Schema.brand("EventId")),
    at: Schema.Date,
    size: Schema.BigInt,
    count: Schema.Number.pipe(Schema.withConstructorDefault(Effect.succeed(1))),
    note: Schema.optionalKey(Schema.String)
  }) {}
  class Events extends Job.make("event", { payload: Event }) {}

  const first = new Date(1)
  const last = new Date(8.64e15)

  const edges: ReadonlyArray<unknown> = [
    null,
    true,
    0,
    "",
    [],
    {},
    2 ** 53 - 1,
    -(2 ** 53 - 1),
    5e-324,
    1.7976931348623157e308,
    "😀👩‍👩‍👧‍👦𐍈",
    "שלום עליכם مرحبا‎‏",
    "\u0001\u001f\u007f\u0085\u2028\u2029\ufeff\uffff",
    "\\u0000 \\ud800 is text, and so is \\\\u0000",
    "quotes ' \" $$ $1 :name ?",
    JSON.parse(`{"__proto__": {"admin": true}, "constructor": 1, "toString": null, "": "empty"}`),
    { "ключ 😀": ["a", { b: [[[]]] }], "a.b\"c'd": "" },
    nested(256),
    "x".repeat(mebibyte - 2),
    "€".repeat((mebibyte - 2) / 3 | 0)
  ]

  it.live("whatever JSON can say", () =>
    withQueue(Effect.gen(function*() {
      const seen = new Map<string, unknown>()
      yield* running(
        Worker.layer({ jobs: [Anything] }).pipe(
          Layer.provide(Anything.toLayer((payload) => Effect.map(Job.Current, ({ id }) => void seen.set(id, payload))))
        )
      )
      for (const edge of edges) {
        const { id } = yield* Anything.enqueue(edge)
        yield* until("it has arrived", Effect.sync(() => seen.has(id)))
        assert.deepStrictEqual(seen.get(id), edge)
      }
      assert.isUndefined(({} as any).admin)
      yield* untilAllEnded()
      yield* assertRows("select distinct status, attempt::int from pgqueue.finished", [{
        status: "completed",
        attempt: 1
      }])
    })))

  it.live("dates, bigints, numbers that are not JSON, classes, defaults and optional keys, through their schemas", () =>
    withQueue(Effect.gen(function*() {
      const seen: Array<unknown> = []
      const arrived = (payload: unknown) => Effect.sync(() => void seen.push(payload))
      yield* running(
        Worker.layer({ jobs: [Events, Numeric, Dated], concurrency: 1 }).pipe(
          Layer.provide([Events.toLayer(arrived), Numeric.toLayer(arrived), Dated.toLayer(arrived)])
        )
      )
      const id = Event.fields.id.make("1")
      const event = new Event({ id, at: first, size: 2n ** 100n, note: "n" })
      yield* Events.enqueue(event)
      yield* untilAllEnded()
      yield* Events.enqueue({ id, at: last, size: -1n })
      yield* untilAllEnded()
      yield* Numeric.enqueueAll([{ n: NaN }, { n: -Infinity }])
      yield* untilAllEnded()
      assert.instanceOf(seen[0], Event)
      assert.deepStrictEqual(seen[0], event)
      assert.instanceOf(seen[1], Event)
      assert.deepStrictEqual({ ...seen[1] as Event }, { id, at: last, size: -1n, count: 1 })
      assert.notProperty(seen[1], "note")
      assert.deepStrictEqual(seen.slice(2), [{ n: NaN }, { n: -Infinity }])
    })))

  it.live("and so do its options", () =>
    withQueue(Effect.gen(function*() {
      const infos: Array<Job.Info> = []
      yield* running(
        Worker.layer({ jobs: [Text] }).pipe(
          Layer.provide(Text.toLayer(() => Effect.map(Job.Current, (info) => void infos.push(info))))
        )
      )
      const metadata = { tenant: "ä😀", ["__proto__x"]: "", "a b": "\\u0000" }
      const past = DateTime.makeUnsafe("2001-02-03T04:05:06.789Z")
      const { id } = yield* Text.enqueue({ text: "x" }, {
        id: "0190AAAA-0000-7000-8000-000000000001",
        runAt: past,
        priority: 0,
        maxAttempts: 1000,
        timeout: "1 hour",
        unique: { key: "k".repeat(1024), period: "1 millis" },
        metadata
      })
      yield* untilAllEnded()
      assert.strictEqual(id, "0190aaaa-0000-7000-8000-000000000001")
      const info = infos[0]!
      assert.deepStrictEqual(
        { ...info, enqueuedAt: 0, scheduledFor: 0, lastFailure: info.lastFailure._tag, progress: info.progress._tag },
        {
          id,
          kind: "text",
          queue: "default",
          priority: 0,
          attempt: 1,
          maxAttempts: 1000,
          enqueuedAt: 0,
          scheduledFor: 0,
          metadata,
          lastFailure: "None",
          progress: "None"
        }
      )
      // An instant in the past means now, by the clock of the database.
      assert.strictEqual(
        yield* value(
          "select count(*)::int from pgqueue.finished where scheduled_for > clock_timestamp() - interval '1 minute' and id = $1::uuid",
          [id]
        ),
        1
      )
      assert.closeTo(DateTime.toEpochMillis(info.scheduledFor), DateTime.toEpochMillis(info.enqueuedAt), 50)
    })))
})
