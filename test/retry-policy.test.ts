/** When a failed job is tried again: the pure function, policy by policy. */
import { assert, describe, it } from "@effect/vitest"
import { Cause, Clock, Context, Duration, Effect, Fiber, Option, Random, Schedule, Schema } from "effect"
import { TestClock } from "effect/testing"
import * as Bounded from "../src/Bounded.ts"
import * as Handling from "../src/Handling.ts"
import { Job } from "../src/index.ts"
import * as RetryPolicy from "../src/RetryPolicy.ts"
import * as Run from "../src/Run.ts"
import type * as Store from "../src/Store.ts"

class Bounced extends Schema.TaggedError<Bounced>()("Bounced", { code: Schema.Finite, after: Schema.Finite }) {}

type Failure = RetryPolicy.Failure<Bounced>
type Policy = RetryPolicy.Retry<Bounced> | undefined

const second = 1000
const minute = 60 * second
const hour = 60 * minute
/** When the first attempt failed. Not a round time, so that nothing is right by chance. */
const begun = Date.UTC(2026, 10, 25, 14, 41, 2, 345)

const failed = (code = 0, after = 0): Failure => ({ _tag: "Failed", error: new Bounced({ code, after }) })

/** Every other way not to succeed. */
const others: ReadonlyArray<Failure> = [
  { _tag: "Defect", message: "broken" },
  { _tag: "TimedOut" },
  { _tag: "Interrupted" },
  { _tag: "Undecodable", message: "not mine" },
  { _tag: "Lost" }
]

const failures = Schedule.forever.pipe(Schedule.setInputType<Failure>())

/** What the policy says after these attempts: milliseconds, or "end". */
const decide = (policy: Policy, attempts: ReadonlyArray<RetryPolicy.Attempt<Bounced>>) =>
  Effect.map(RetryPolicy.next(policy, attempts), Option.getOrElse(() => "end" as const))

/** What the policy says after the first attempt, the first two, and so on; `at` in milliseconds after the first failure. */
const decisions = (policy: Policy, at: ReadonlyArray<number>, failure: (n: number) => Failure = () => failed()) => {
  const attempts = at.map((millis, n) => ({ at: begun + millis, failure: failure(n) }))
  return Effect.runSync(Effect.forEach(attempts, (_, n) => decide(policy, attempts.slice(0, n + 1))))
}

/** The first `count` failures of a job that fails at once, under this delay. */
const every = (delay: number, count: number) => Array.from({ length: count }, (_, n) => n * delay)

const random = (value: number) => ({ nextDoubleUnsafe: () => value, nextIntUnsafe: () => 0 })

describe("the default policy", () => {
  const expected = [1, 4, 16, 64, 256, 1024, 1800, 1800, 1800, 1800].map((seconds) => seconds * second)
  const attempts = expected.map((_, n) => ({ at: begun + n * hour, failure: n % 2 === 0 ? failed() : others[n % 5]! }))

  it("waits 1 s, 4 s, 16 s … up to half an hour, each ±20 %", () => {
    for (const policy of [undefined, {}, { schedule: undefined }, RetryPolicy.defaultSchedule, { while: () => true }]) {
      for (const [n, middle] of expected.entries()) {
        const delayed = (value: number) =>
          Effect.runSync(
            decide(policy, attempts.slice(0, n + 1)).pipe(Effect.provideService(Random.Random, random(value)))
          )
        assert.strictEqual(delayed(0), middle * 0.8, `attempt ${n + 1}`)
        assert.strictEqual(delayed(0.5), middle, `attempt ${n + 1}`)
        assert.closeTo(Number(delayed(1)), middle * 1.2, 1e-6, `attempt ${n + 1}`)
      }
    }
  })

  it("is spread by chance", () => {
    for (const [n, middle] of expected.entries()) {
      const seen = Array.from({ length: 200 }, () => Effect.runSync(decide(undefined, attempts.slice(0, n + 1))))
      for (const delay of seen) assert.isTrue(delay !== "end" && delay >= middle * 0.8 && delay <= middle * 1.2)
      assert.isAbove(new Set(seen).size, 190)
    }
  })

  it("goes on for as many attempts as a job can have", () => {
    const all = Array.from({ length: 1000 }, (_, n) => ({ at: begun + n * hour, failure: failed() }))
    const [took, last] = Effect.runSync(Effect.timed(decide(undefined, all)))
    assert.isTrue(last !== "end" && last >= 0.8 * 30 * minute && last <= 1.2 * 30 * minute)
    assert.isBelow(Duration.toMillis(took), 5 * second)
  })
})

describe("a Schedule", () => {
  const rows: ReadonlyArray<
    readonly [what: string, policy: Policy, at: ReadonlyArray<number>, decisions: ReadonlyArray<number | "end">]
  > = [
    ["that repeats a delay", Schedule.spaced("10 seconds"), every(17, 3), [10_000, 10_000, 10_000]],
    ["that grows", Schedule.exponential("1 second", 3), every(hour, 4), [1000, 3000, 9000, 27_000]],
    ["that grows slowly", Schedule.fibonacci("1 second"), every(1, 5), [1000, 1000, 2000, 3000, 5000]],
    ["that counts", Schedule.recurs(2), every(hour, 4), [0, 0, "end", "end"]],
    ["that never goes on", Schedule.recurs(0), every(1, 2), ["end", "end"]],
    ["that goes on once", Schedule.once, every(1, 2), [0, "end"]],
    ["that waits once", Schedule.duration("7 seconds"), every(1, 2), [7000, "end"]],
    [
      "that is limited in times",
      Schedule.spaced("5 seconds").pipe(Schedule.upTo({ times: 2 })),
      every(1, 3),
      [5000, 5000, "end"]
    ],
    // Elapsed time is that since the first failure, which itself has 0.
    [
      "that is limited in time",
      Schedule.spaced("10 minutes").pipe(Schedule.upTo({ duration: "1 hour" })),
      [0, 10 * minute, hour, hour + 1, hour + 2],
      [10 * minute, 10 * minute, 10 * minute, "end", "end"]
    ],
    [
      "that is limited to no time at all",
      Schedule.spaced("1 second").pipe(Schedule.upTo({ duration: 0 })),
      [0, 0, 1],
      [1000, 1000, "end"]
    ],
    ["that lasts a while", Schedule.during("1 hour"), [0, hour - 1, hour, hour + 1], [0, 0, 0, "end"]],
    [
      "that lasts a while and spaces",
      Schedule.max([Schedule.spaced("1 minute"), Schedule.during("1 hour")]),
      [0, hour, 2 * hour],
      [minute, minute, "end"]
    ],
    [
      "that looks at the elapsed time",
      Schedule.spaced("1 second").pipe(Schedule.while(({ elapsed }) => elapsed < 5000)),
      [0, 4999, 5000],
      [1000, 1000, "end"]
    ],
    [
      "that looks at the time since the last failure",
      Schedule.spaced("1 second").pipe(Schedule.while(({ elapsedSincePrevious }) => elapsedSincePrevious < 5000)),
      [0, 4999, 9998, 14_998],
      [1000, 1000, 1000, "end"]
    ],
    [
      "at fixed times after the first failure",
      Schedule.fixed("1 minute"),
      [0, minute + 1, 2 * minute + 7, 3 * minute, 5 * minute + 1],
      [minute, minute - 1, minute - 7, minute, 0]
    ],
    ["at the ends of windows", Schedule.windowed("1 minute"), [0, 61 * second, 150 * second], [
      minute,
      59 * second,
      30 * second
    ]],
    [
      "of a calendar",
      // Sound: the expression is one.
      Schedule.cron("0 * * * *", "UTC") as Schedule.Schedule<unknown>,
      [0, 18 * minute + 57_655, hour],
      [18 * minute + 57_655, hour, 18 * minute + 57_655]
    ],
    [
      "followed by another",
      Schedule.concat(Schedule.recurs(2), Schedule.spaced("1 hour").pipe(Schedule.upTo({ times: 1 }))),
      every(1, 4),
      [0, 0, hour, "end"]
    ],
    [
      "followed by another, whose time begins with its own first failure",
      Schedule.concat(Schedule.recurs(1), Schedule.spaced("1 minute").pipe(Schedule.upTo({ duration: "1 hour" }))),
      [0, 2 * hour, 3 * hour, 3 * hour + 1],
      [0, minute, minute, "end"]
    ],
    [
      "with a ceiling",
      Schedule.min([Schedule.exponential("1 second", 10), Schedule.spaced("1 minute")]),
      every(1, 4),
      [1000, 10_000, minute, minute]
    ]
  ]
  for (const [what, policy, at, expected] of rows) {
    it(`${what} decides the same alone and in the form of Effect.retry, however often it is asked`, () => {
      const form = { schedule: policy as Schedule.Schedule<unknown> }
      for (const one of [policy, policy, form, form, { ...form, while: () => true, until: () => false }]) {
        assert.deepStrictEqual(decisions(one, at), expected)
      }
    })

    it.effect(`${what} decides as Effect.retry does with the same failures at the same times`, () =>
      Effect.gen(function*() {
        const schedule = policy as Schedule.Schedule<unknown>
        // Runs that take a while: a schedule that counts from the start of a run would differ.
        const lengths = [0, 7, 3 * second, 0, 2 * minute, 50 * minute, 1, 2 * hour]
        const at: Array<number> = []
        const handler = Effect.gen(function*() {
          yield* Effect.sleep(lengths[at.length]!)
          at.push(yield* Clock.currentTimeMillis)
          if (at.length < lengths.length) return yield* new Bounced({ code: 0, after: 0 })
        })
        yield* TestClock.setTime(begun)
        const retried = yield* Effect.forkChild(Effect.exit(Effect.retry(handler, schedule)))
        yield* TestClock.adjust("7 days")
        const succeeded = (yield* Fiber.join(retried))._tag === "Success"
        const delays = at.slice(1).map((end, n) => end - lengths[n + 1]! - at[n]!)
        assert.deepStrictEqual(
          decisions(policy, at.map((millis) => millis - at[0]!)).slice(0, succeeded ? -1 : undefined),
          succeeded ? delays : [...delays, "end"]
        )
      }))
  }

  it("is shown each stored failure with its own time, counted from the first", () => {
    const all = [failed(1), ...others, failed(2)]
    const at = [0, 5, 5, 1000, 61_000, 61_001, 9 * hour]
    const seen: Array<Schedule.InputMetadata<Failure>> = []
    const policy = failures.pipe(Schedule.while(({ attempt, elapsed, elapsedSincePrevious, input, now, start }) => {
      seen.push({ attempt, elapsed, elapsedSincePrevious, input, now, start })
      return true
    }))
    const attempts = all.map((failure, n) => ({ at: begun + at[n]!, failure }))
    for (let count = 1; count <= all.length; count++) {
      seen.length = 0
      Effect.runSync(decide(policy, attempts.slice(0, count)))
      assert.deepStrictEqual(
        seen,
        all.slice(0, count).map((input, n) => ({
          attempt: n + 1,
          elapsed: at[n]!,
          elapsedSincePrevious: n === 0 ? 0 : at[n]! - at[n - 1]!,
          input,
          now: begun + at[n]!,
          start: begun
        }))
      )
    }
  })

  it("may stop on a field of an error, also on one of an earlier attempt", () => {
    const policy = failures.pipe(
      Schedule.while(({ input }) => input._tag !== "Failed" || input.error.code !== 550)
    )
    const codes = [450, 550, 450]
    assert.deepStrictEqual(decisions(policy, every(1, 3), (n) => failed(codes[n])), [0, "end", "end"])
  })

  it("may take its delay from a field of the error", () => {
    const policy = failures.pipe(
      Schedule.modifyDelay(({ input }) => Effect.succeed(input._tag === "Failed" ? input.error.after : 77))
    )
    const all = [failed(0, 5000), failed(0, 20), ...others]
    assert.deepStrictEqual(decisions(policy, every(1, 7), (n) => all[n]!), [5000, 20, 77, 77, 77, 77, 77])
  })

  it("may treat every way not to succeed differently", () => {
    for (const stop of [failed(), ...others]) {
      const policy = failures.pipe(Schedule.while(({ input }) => input._tag !== stop._tag))
      for (const failure of [failed(), ...others]) {
        assert.deepStrictEqual(decisions(policy, [0], () => failure), [failure._tag === stop._tag ? "end" : 0])
      }
    }
  })
})

describe("the form of Effect.retry", () => {
  const schedule = Schedule.spaced("1 second")

  it("asks its predicates about the last typed error only", () => {
    const rows: ReadonlyArray<readonly [policy: Policy, decisions: ReadonlyArray<number | "end">]> = [
      [{ schedule, while: (error) => error.code < 500 }, [1000, "end", 1000, "end"]],
      [{ schedule, until: (error) => error.code >= 500 }, [1000, "end", 1000, "end"]],
      [{ schedule, while: () => true, until: () => false }, [1000, 1000, 1000, 1000]],
      [{ schedule, while: () => true, until: () => true }, ["end", "end", "end", "end"]],
      [{ schedule, while: () => false, until: () => false }, ["end", "end", "end", "end"]],
      [{ schedule, while: (e) => e.code !== 450, until: (e) => e.code === 551 }, ["end", 1000, "end", "end"]],
      [{ schedule: Schedule.recurs(2), while: (error) => error.code < 500 }, [0, "end", "end", "end"]]
    ]
    const codes = [450, 550, 450, 551]
    for (const [policy, expected] of rows) {
      assert.deepStrictEqual(decisions(policy, every(1, 4), (n) => failed(codes[n])), expected)
    }
  })

  it("does not show its predicates any other failure", () => {
    const asked: Array<unknown> = []
    const never = (error: unknown) => {
      asked.push(error)
      return true
    }
    for (const failure of others) {
      assert.deepStrictEqual(decisions({ schedule, until: never }, [0], () => failure), [1000])
      assert.deepStrictEqual(decisions({ schedule, while: (e) => !never(e) }, [0], () => failure), [1000])
      // A typed error before it is not asked about again.
      assert.deepStrictEqual(
        decisions({ schedule, until: never }, [0, 1], (n) => n === 0 ? failed() : failure).slice(1),
        [1000]
      )
    }
    assert.lengthOf(asked, others.length, "the typed errors, when they were the last")
  })

  it("stops only at a false `while` and a true `until`", () => {
    const odd = (value: unknown) => () => value as boolean
    assert.deepStrictEqual(decisions({ schedule, while: odd(undefined) }, [0]), [1000])
    assert.deepStrictEqual(decisions({ schedule, until: odd("yes") }, [0]), [1000])
  })
})

describe("a policy that is broken", () => {
  const thrown = () => {
    throw new Error("policy")
  }
  // Sound for a test of what the types forbid.
  const step = (delay: number) =>
    Schedule.fromStep(Effect.succeed(() => Effect.succeed<[number, Duration.Duration]>([0, Duration.millis(delay)])))
  const ends: ReadonlyArray<readonly [what: string, policy: Policy]> = [
    ["throws in a predicate of the form", { while: thrown }],
    ["throws in the other predicate of the form", { until: thrown }],
    ["throws in a predicate", failures.pipe(Schedule.while(thrown))],
    ["dies in a predicate", failures.pipe(Schedule.while(() => Effect.die("policy")))],
    ["interrupts itself", failures.pipe(Schedule.while(() => Effect.interrupt))],
    ["dies in its step", Schedule.fromStep(Effect.succeed(() => Effect.die("policy")))],
    ["throws in its step", Schedule.fromStep(Effect.succeed(thrown))],
    ["dies before its first step", Schedule.fromStep(Effect.die("policy"))],
    ["fails in its step", Schedule.fromStep(Effect.succeed(() => Effect.fail("policy") as any))],
    ["steps to nothing", Schedule.fromStep(Effect.succeed(() => Effect.undefined as Effect.Effect<never>))],
    ["is done at once", Schedule.fromStep(Effect.succeed(() => Cause.done(0)))],
    ["waits for ever", Schedule.spaced(Duration.infinity)],
    ["waits longer than a date can be away", step(RetryPolicy.longestDelay + 1)]
  ]
  for (const [what, policy] of ends) {
    it(`because it ${what} ends the job like one that stops`, () => {
      assert.deepStrictEqual(decisions(policy, [0, 1]), ["end", "end"])
    })
  }

  it("because its delay is less than nothing tries again at once", () => {
    for (const delay of [-1, -1e20, -Infinity, NaN, -0]) {
      assert.deepStrictEqual(decisions(step(delay), [0]), [0])
    }
    assert.deepStrictEqual(decisions(Schedule.spaced(Duration.negativeInfinity), [0]), [0])
  })

  it("is not, while a date can be as far away", () => {
    assert.deepStrictEqual(decisions(step(RetryPolicy.longestDelay), [0]), [RetryPolicy.longestDelay])
    assert.deepStrictEqual(decisions(step(0.25), [0]), [0.25])
  })
})

describe("a policy that needs time", () => {
  it.effect("is waited for", () =>
    Effect.gen(function*() {
      const slow = Schedule.spaced("1 minute").pipe(Schedule.while(() => Effect.as(Effect.sleep("1 second"), true)))
      const attempts = every(1, 3).map((millis) => ({ at: begun + millis, failure: failed() }))
      const fiber = yield* Effect.forkChild(decide(slow, attempts))
      yield* TestClock.adjust("2999 millis")
      assert.isUndefined(fiber.pollUnsafe())
      yield* TestClock.adjust("1 millis")
      assert.strictEqual(yield* Fiber.join(fiber), minute)
      const promised = failures.pipe(Schedule.while(() => Effect.promise(() => Promise.resolve(false))))
      assert.strictEqual(yield* decide(promised, attempts), "end")
    }))
})

describe("the attempts that a policy is given", () => {
  /** Runs a claimed job with this history, and returns what its policy was shown and what is to be settled. */
  const shown = Effect.fnUntraced(function*(options: {
    readonly history: ReadonlyArray<readonly [at: number, tag: string, error?: unknown]>
    readonly claimedAt: number
    /** How long it waits in its worker's buffer, and how long it then runs. */
    readonly waits: number
    readonly runs: number
    /** How long its policy takes to decide on each attempt. */
    readonly decides?: number
  }) {
    const seen: Array<readonly [at: number, tag: string]> = []
    const { definition } = Job.make("k", {
      error: Bounced,
      retry: Schedule.spaced("1 minute").pipe(
        Schedule.setInputType<Failure>(),
        Schedule.while(({ elapsed, input }) => {
          seen.push([elapsed, input._tag])
          return Effect.as(Effect.sleep(options.decides ?? 0), true)
        })
      )
    })["~effect-pgqueue/Job"]
    const handling = Handling.make(definition, {
      // Sound: the error is the definition's.
      run: (): any => Effect.andThen(Effect.sleep(options.runs), new Bounced({ code: 1, after: 0 })),
      context: Context.empty(),
      transactional: false
    })
    const row: Store.ClaimedRow = {
      id: "0198c0de-0000-7000-8000-000000000000",
      lane: 5,
      run_at: "0",
      kind: "k",
      priority: 5,
      attempt: options.history.length,
      max_attempts: 5,
      rescued: 0,
      timeout_ms: null,
      trace: null,
      metadata: "{}",
      enqueued_at: begun,
      scheduled_for: begun,
      claimed_at: begun + options.claimedAt,
      payload: "null",
      progress: null,
      cancelled: false,
      history: options.history.length === 0 ? null : JSON.stringify(
        options.history.map(([at, tag, error], n) => ({
          n: n + 1,
          tag,
          message: "m",
          error: error ?? null,
          at: begun + at
        }))
      )
    }
    const context = yield* Effect.context<never>()
    const running: Run.Running = {
      row,
      lease: row.id,
      queue: "default",
      claimedAt: Bounded.monotonic(yield* Clock.Clock),
      fiber: undefined,
      interruption: undefined,
      entry: undefined,
      settled: undefined
    }
    yield* TestClock.adjust(options.waits)
    const fiber = yield* Effect.forkChild(
      Run.make({
        context,
        middleware: [],
        transactional: (_running, handler) => handler,
        progress: () => Effect.void
      })(running, handling, "k")
    )
    yield* TestClock.adjust(options.runs)
    yield* TestClock.adjust("1 minute")
    yield* Fiber.join(fiber)
    const delay = (options.decides ?? 0) < minute ? minute : undefined
    assert.deepInclude(running.entry, { verb: "failed", delay, ran: options.runs })
    return seen
  })

  it.effect("are the stored ones, and the one that just ended, by the clock of the database", () =>
    Effect.gen(function*() {
      const error = { _tag: "Bounced", code: 7, after: 0 }
      const history = [[0, "Failed", error], [90_000, "TimedOut"], [200_000, "Failed", { old: true }]] as const
      assert.deepStrictEqual(
        yield* shown({ history, claimedAt: 300_000, waits: 0, runs: 1234 }),
        [[0, "Failed"], [90_000, "TimedOut"], [200_000, "Undecodable"], [301_234, "Failed"]]
      )
      assert.deepStrictEqual(yield* shown({ history: [], claimedAt: 5, waits: 0, runs: 70 }), [[0, "Failed"]])
    }))

  it.effect("count the time that the job waited in its worker", () =>
    Effect.gen(function*() {
      assert.deepStrictEqual(
        yield* shown({ history: [[0, "Defect"]], claimedAt: 300_000, waits: 2000, runs: 50 }),
        [[0, "Defect"], [302_050, "Failed"]]
      )
    }))

  it.effect("begin without the first loss of a worker, which is free, and have every later one", () =>
    Effect.gen(function*() {
      const history = [[0, "Lost"], [1000, "Defect"], [2000, "Lost"]] as const
      assert.deepStrictEqual(
        yield* shown({ history, claimedAt: 5000, waits: 0, runs: 0 }),
        [[0, "Defect"], [1000, "Lost"], [4000, "Failed"]]
      )
    }))

  it.effect("are decided on in time: a policy that does not answer is one that has ended, and holds up no worker", () =>
    Effect.gen(function*() {
      const options = { history: [], claimedAt: 0, waits: 0, runs: 0 }
      assert.lengthOf(yield* shown({ ...options, decides: 1000 }), 1)
      assert.lengthOf(yield* shown({ ...options, decides: Infinity }), 1)
    }))
})
