/** Which ticks become jobs: on time, late, missed, and never twice. */
import { assert, describe, it } from "@effect/vitest"
import { Result } from "effect"
import * as fc from "fast-check"
import * as Missed from "../src/Missed.ts"
import * as Ticks from "../src/Ticks.ts"

const every = (seconds: number) => Result.getOrThrow(Ticks.parse(`@every ${seconds}s`, "UTC", 0))
const minute = 60_000
const day = 86_400_000
const start = Date.UTC(2026, 0, 1)
const due = (options: Partial<Missed.Due>): Missed.Due => ({
  due: start,
  previous: null,
  now: start,
  missed: 1,
  missedWindow: 7 * day,
  ...options
})

describe("a schedule that is due", () => {
  it("fires its tick on time, and knows the next one", () => {
    for (const now of [start, start + 1, start + 29_999, start + Missed.grace]) {
      assert.deepStrictEqual(Missed.plan(every(60), due({ now })), {
        ticks: [start],
        previous: start,
        next: start + minute,
        missed: false
      })
    }
  })

  it("makes up every tick that is late by no more than the grace time, whatever is made up of missed ones", () => {
    for (const missed of [0, 1, 10]) {
      assert.deepStrictEqual(Missed.plan(every(10), due({ now: start + 29_000, missed, missedWindow: 1 })), {
        ticks: [start, start + 10_000, start + 20_000],
        previous: start + 20_000,
        next: start + 30_000,
        missed: false
      })
    }
    assert.deepStrictEqual(
      Missed.plan(every(1), due({ now: start + Missed.grace, missed: 0 })).ticks,
      Array.from({ length: 31 }, (_, n) => start + n * 1000)
    )
  })

  it("makes up of an outage what it is told to: nothing, the latest, or the latest so many in their order", () => {
    const now = start + 3 * 60 * minute + 5000
    const last = start + 180 * minute
    for (
      const [missed, ticks] of [
        [0, []],
        [1, [last]],
        [10, Array.from({ length: 10 }, (_, n) => last - (9 - n) * minute)],
        [181, Array.from({ length: 181 }, (_, n) => start + n * minute)],
        [182, Array.from({ length: 181 }, (_, n) => start + n * minute)],
        [1000, Array.from({ length: 181 }, (_, n) => start + n * minute)]
      ] as const
    ) {
      assert.deepStrictEqual(Missed.plan(every(60), due({ now, missed })), {
        ticks,
        previous: last,
        next: last + minute,
        missed: true
      }, String(missed))
    }
  })

  it("makes up the only tick that was missed, or none", () => {
    const now = start + Missed.grace + 1
    for (const [missed, ticks] of [[0, []], [1, [start]], [10, [start]]] as const) {
      assert.deepStrictEqual(Missed.plan(every(60), due({ now, missed })), {
        ticks,
        previous: start,
        next: start + minute,
        missed: true
      })
    }
  })

  it("makes up nothing that is older than its window", () => {
    const now = start + 60 * minute
    const plan = (missed: number, missedWindow: number) =>
      Missed.plan(every(60), due({ now: now + 100, missed, missedWindow }))
    assert.deepStrictEqual(plan(10, 2 * minute + 100).ticks, [now - 2 * minute, now - minute, now])
    assert.deepStrictEqual(plan(10, 2 * minute + 99).ticks, [now - minute, now])
    assert.deepStrictEqual(plan(10, 99), { ticks: [], previous: now, next: now + minute, missed: true })
    const long = Missed.plan(every(86_400), due({ now: start + day - 1, missed: 10, missedWindow: 60 * minute }))
    assert.deepStrictEqual(long, { ticks: [], previous: start, next: start + day, missed: true })
  })

  it("keeps the tick that was promised, also one that its expression would not name", () => {
    const odd = start + 12_345
    assert.deepStrictEqual(Missed.plan(every(60), due({ due: odd, now: odd + 1 })), {
      ticks: [odd],
      previous: odd,
      next: start + minute,
      missed: false
    })
    assert.deepStrictEqual(Missed.plan(every(60), due({ due: odd, now: start + minute, missed: 10 })), {
      ticks: [odd, start + minute],
      previous: start + minute,
      next: start + 2 * minute,
      missed: true
    })
    assert.deepStrictEqual(Missed.plan(every(3600), due({ due: odd, now: odd + 31_000 })).ticks, [odd])
  })

  it("is given its first tick when nobody has computed one, after the last one that it had", () => {
    assert.deepStrictEqual(Missed.plan(every(60), due({ due: null, now: start + 1 })), {
      ticks: [],
      previous: undefined,
      next: start + minute,
      missed: false
    })
    assert.strictEqual(
      Missed.plan(every(60), due({ due: null, now: start, previous: start - day })).next,
      start + minute
    )
    assert.strictEqual(
      Missed.plan(every(60), due({ due: null, now: start, previous: start + day })).next,
      start + day + minute
    )
  })
})

describe("schedulers that wake up at any times", () => {
  const wakeUps = (most: number) => fc.array(fc.integer({ min: 0, max: most }), { minLength: 1, maxLength: 60 })
  const policy = fc.record({
    seconds: fc.integer({ min: 1, max: 120 }),
    missed: fc.constantFrom(0, 1, 2, 10, 1000),
    missedWindow: fc.constantFrom(1, 5000, 60_000, 7 * day),
    offset: fc.integer({ min: 0, max: 5000 })
  })
  /** Fires as the storage does, and returns the ticks in the order in which they were fired. */
  const run = (
    gaps: ReadonlyArray<number>,
    { missed, missedWindow, offset, seconds }: { [K in "missed" | "missedWindow" | "offset" | "seconds"]: number }
  ) => {
    const ticks = every(seconds)
    const fired: Array<number> = []
    let now = start + offset
    let [next, previous]: [number | null, number | null] = [null, null]
    for (const gap of [0, ...gaps]) {
      now += gap
      while (next === null || next <= now) {
        const plan = Missed.plan(ticks, { due: next, previous, now, missed, missedWindow })
        fired.push(...plan.ticks)
        previous = plan.previous ?? previous
        next = plan.next!
        assert.isAbove(next, now)
      }
    }
    return { fired, now, expected: Ticks.between(ticks, start + offset, now, 1e9) }
  }

  it("fire no tick twice, none out of order, and none that is not one", () => {
    fc.assert(
      fc.property(wakeUps(300_000), policy, (gaps, options) => {
        const { expected, fired } = run(gaps, options)
        const all = new Set(expected)
        fired.forEach((tick, n) => {
          assert.isTrue(n === 0 || tick > fired[n - 1]!, `${tick} after ${fired[n - 1]}`)
          assert.isTrue(all.has(tick), `${tick} is none`)
        })
      }),
      { numRuns: 500 }
    )
  })

  it("fire every tick when they never are away for longer than the grace time", () => {
    fc.assert(
      fc.property(wakeUps(Missed.grace), policy, (gaps, options) => {
        const { expected, fired } = run(gaps, options)
        assert.deepStrictEqual(fired, expected)
      }),
      { numRuns: 500 }
    )
  })
})
