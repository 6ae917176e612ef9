/** Payloads on their way to the database: encoded at once or later, alone or many, with what each job has of its own. */
import { assert, describe, it } from "@effect/vitest"
import { Context, Effect, Schema, SchemaGetter, Tracer } from "effect"
import * as Enqueue from "../src/Enqueue.ts"

class Key extends Context.Service<Key, string>()("effect-pgqueue/test/enqueue-encoding.test/Key") {}

/** Text that is encoded with a service, and later: an odd one after a turn of the event loop, an even one at once. */
const Sealed = Schema.String.pipe(Schema.decodeTo(Schema.Number, {
  decode: SchemaGetter.transform(Number),
  encode: SchemaGetter.transformEffect((n: number) =>
    n % 2 === 0
      ? Effect.succeed(`${n}`)
      : Effect.andThen(Effect.yieldNow, Effect.map(Effect.service(Key), (key) => `${n} ${key}`))
  )
}))

const resolverOf = <P extends Schema.Top>(schema: P, defaults: Partial<Enqueue.Defaults> = {}) =>
  Enqueue.resolver({
    kind: "note",
    schema,
    encode: Schema.encodeEffect(Schema.toCodecJson(schema)),
    takesUndefined: false,
    defaults: {
      queue: "default",
      priority: "normal",
      maxAttempts: 5,
      timeout: undefined,
      unique: undefined,
      ...defaults
    }
  })

const plain = resolverOf(Schema.Struct({ n: Schema.Int }))

describe("a bulk", () => {
  it.effect("keeps its order, whether the schema answers at once or later", () =>
    Effect.gen(function*() {
      const sealed = resolverOf(Schema.Struct({ n: Sealed }))
      const inputs = [0, 2, 1, 4, 3, 5].map((n) => ({ n }))
      const jobs = yield* sealed.all(inputs)
      assert.deepStrictEqual(
        jobs.map(({ payload }) => JSON.parse(payload).n),
        ["0", "2", "1 secret", "4", "3 secret", "5 secret"]
      )
      const ids = jobs.map(({ id }) => id)
      assert.deepStrictEqual(ids.toSorted(), ids)
      assert.strictEqual((yield* sealed.one({ n: 7 })).payload, `{"n":"7 secret"}`)
    }).pipe(Effect.provideService(Key, "secret")))

  it.effect("is taken from anything that can be iterated", () =>
    Effect.gen(function*() {
      const jobs = yield* plain.all(new Set([{ n: 1 }, { n: 2 }]))
      assert.deepStrictEqual(jobs.map(({ payload }) => payload), [`{"n":1}`, `{"n":2}`])
      assert.deepStrictEqual(yield* plain.all([]), [])
    }))

  it.effect("gives each job the options of its payload and place, or all of them the same", () =>
    Effect.gen(function*() {
      const each = yield* plain.all([{ n: 5 }, { n: 6 }], ({ n }, index) => ({ queue: `queue ${n} ${index}` }))
      assert.deepStrictEqual(each.map(({ queue }) => queue), ["queue 5 0", "queue 6 1"])
      const same = yield* plain.all([{ n: 5 }, { n: 6 }], { delay: "1 second", metadata: { a: "b" } })
      assert.deepStrictEqual(
        same.map(({ delay, metadata }) => [delay, metadata]),
        [[1000, `{"a":"b"}`], [1000, `{"a":"b"}`]]
      )
    }))

  it.effect("gives each job the key of its own payload", () =>
    Effect.gen(function*() {
      const keyed = resolverOf(Schema.Struct({ n: Schema.Int }), {
        // Sound: called with payloads of this schema.
        unique: ((payload: { readonly n: number }) => payload.n === 0 ? undefined : `key ${payload.n}`) as any
      })
      const jobs = yield* keyed.all([{ n: 0 }, { n: 1 }, { n: 2 }])
      assert.deepStrictEqual(jobs.map(({ unique }) => unique?.key), [undefined, "key 1", "key 2"])
    }))

  it.effect("is refused for the first that is wrong: its payload before its options", () =>
    Effect.gen(function*() {
      const bad: any = { n: "one" }
      const reasonOf = (inputs: ReadonlyArray<any>, own?: Enqueue.EnqueueOptions) =>
        Effect.map(Effect.flip(plain.all(inputs, own)), ({ reason }) => reason)
      assert.strictEqual(yield* reasonOf([{ n: 1 }, bad]), "InvalidPayload")
      assert.strictEqual(yield* reasonOf([bad], { delay: -1 }), "InvalidPayload")
      assert.strictEqual(yield* reasonOf([{ n: 1 }, bad], { delay: -1 }), "InvalidOption")
      assert.deepStrictEqual(yield* plain.all([], { delay: -1 }), [])
    }))

  it.live("of many lets others have their turn", () =>
    Effect.gen(function*() {
      let turns = 0
      const other = yield* Effect.forkChild(Effect.forever(Effect.andThen(Effect.sync(() => turns++), Effect.yieldNow)))
      const jobs = yield* plain.all(Array.from({ length: 20_000 }, (_, n) => ({ n })))
      assert.isTrue(turns >= 5, `${turns} turns`)
      assert.strictEqual(jobs.length, 20_000)
      assert.isTrue(jobs.every(({ payload }, n) => payload === `{"n":${n}}`))
      assert.isUndefined(other.pollUnsafe())
    }))
})

describe("a job", () => {
  it.effect("goes by the definition where its options say nothing", () =>
    Effect.gen(function*() {
      const mail = resolverOf(Schema.Struct({ n: Schema.Int }), {
        queue: "mail",
        priority: "high",
        timeout: "1 second"
      })
      for (const job of [yield* mail.one({ n: 1 }), yield* mail.one({ n: 1 }, {})]) {
        assert.deepInclude(job, { queue: "mail", priority: 2, timeout: 1000, maxAttempts: 5, metadata: "{}", delay: 0 })
      }
      assert.deepInclude(yield* mail.one({ n: 1 }, { queue: "post" }), { queue: "post", priority: 2 })
    }))

  it.effect("is refused anew for a definition that says nonsense", () =>
    Effect.gen(function*() {
      const nonsense = resolverOf(Schema.Struct({ n: Schema.Int }), { maxAttempts: 0 })
      for (const own of [undefined, undefined, {}]) {
        assert.strictEqual((yield* Effect.flip(nonsense.one({ n: 1 }, own))).reason, "InvalidOption")
      }
      assert.strictEqual((yield* nonsense.one({ n: 1 }, { maxAttempts: 1 })).maxAttempts, 1)
    }))

  it.effect("carries the span of who enqueues it, alone and in a bulk", () =>
    Effect.gen(function*() {
      const span = Tracer.externalSpan({ traceId: "0".repeat(31) + "1", spanId: "0".repeat(15) + "2", sampled: true })
      const [one, all] = yield* Effect.provideService(
        Effect.all([plain.one({ n: 1 }), plain.all([{ n: 1 }])]),
        Tracer.ParentSpan,
        span
      )
      const trace = `00-${span.traceId}-${span.spanId}-01`
      assert.deepStrictEqual([one.trace, all[0]?.trace], [trace, trace])
      assert.isUndefined((yield* plain.one({ n: 1 })).trace)
    }))
})
