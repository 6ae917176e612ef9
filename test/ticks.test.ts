/** What a schedule may be, when it fires when clocks are changed, and that the functions agree with one another. */
import { Cron, DateTime, Duration, Result } from "effect"
import * as fc from "fast-check"
import { assert, describe, it } from "vitest"
import * as Ticks from "../src/Ticks.ts"

const second = 1000
const minute = 60 * second
const hour = 60 * minute
const day = 24 * hour
const now = Date.UTC(2026, 10, 25, 14, 41, 2, 345)

const at = (text: string) => {
  const millis = Date.parse(text)
  assert.isFalse(Number.isNaN(millis), text)
  return millis
}
const iso = (instants: ReadonlyArray<number>) => instants.map((instant) => new Date(instant).toISOString())

const ticksOf = (spec: string, timeZone = "UTC", from = now) => Result.getOrThrow(Ticks.parse(spec, timeZone, from))
const problem = (spec: string, timeZone = "UTC", from = now): string => {
  const result = Ticks.parse(spec, timeZone, from)
  return Result.isFailure(result) ? result.failure : assert.fail(`${spec.slice(0, 100)} was read`)
}
const specOf = (options: Parameters<typeof Ticks.specOf>[0]) => Result.getOrThrow(Ticks.specOf(options))
const refusal = (options: Parameters<typeof Ticks.specOf>[0]): string => {
  const result = Ticks.specOf(options)
  return Result.isFailure(result) ? result.failure : assert.fail(`${JSON.stringify(options)} was accepted`)
}

describe("what is refused, with a sentence for people", () => {
  const expressions: ReadonlyArray<readonly [spec: string, reason: RegExp]> = [
    ["", /five or six fields/],
    [" \n ", /five or six fields/],
    ["* * * *", /five or six fields/],
    ["* * * * * * *", /five or six fields/],
    ["\0", /five or six fields/],
    ["* * * * \0", /positive integer/],
    ["61 * * * *", /between 0 and 59, not "61"/],
    ["0 24 * * *", /between 0 and 23, not "24"/],
    ["0 0 0 * *", /between 1 and 31, not "0"/],
    ["0 0 * 13 *", /between 1 and 12, not "13"/],
    ["0 0 * * 8", /between 0 and 7, not "8"/],
    ["0 0 * * someday", /positive integer, not "someday"/],
    ["*/0 * * * *", /greater than 0/],
    ["5-1 * * * *", /invalid value range "5-1"/],
    ["1,,2 * * * *", /positive integer/],
    ["-1 * * * *", /positive integer/],
    ["1.5 * * * *", /positive integer/],
    ["0 0 L * *", /positive integer/],
    ["*".repeat(10_000), /at most 1000 characters/],
    ["* ".repeat(5000), /at most 1000 characters/],
    ["@reboot", /none of @yearly, .*@daily/],
    ["@constructor", /none of @yearly/],
    ["@daily 5", /five or six fields/],
    ["0 0 * * * dst=sometimes", /"dst=sometimes" is none of dst=both/],
    ["0 0 * * * days=or", /"days=or" is none of/],
    ["0 0 * * * tz=UTC", /"tz=UTC" is none of/],
    ["0 0 * * * dst=both dst=later", /each at most once/],
    ["dst=both 0 0 * * *", /come last/],
    ["@every", /not like "@every 90s"/],
    ["@every 0s", /not like/],
    ["@every 999ms", /not like/],
    ["@every 1.5s", /not like/],
    ["@every -1s", /not like/],
    ["@every 90", /not like/],
    ["@every 2 days", /not like/],
    ["@every 1y", /not like/],
    ["@every 3654d", /not like/],
    ["@every 999999999999999d", /not like/],
    [`@every ${"9".repeat(900)}s`, /not like/],
    ["@every 90s dst=both", /not like/],
    ["0 0 31 2 *", /no tick within ten years/],
    ["0 0 30,31 2 *", /no tick within ten years/],
    ["0 0 31 4,6,9,11 *", /no tick within ten years/],
    ["0 0 31 2 1 days=and", /no tick within ten years/]
  ]

  it.each(expressions)("%j", (spec, reason) => {
    const text = problem(spec)
    assert.match(text, reason)
    assert.isBelow(text.length, 300)
    // eslint-disable-next-line no-control-regex -- control characters are what is looked for
    assert.notMatch(text, /[\u0000-\u001f]/)
  })

  it.each(["", " ", "Mars/Olympus", "\0", "x".repeat(10_000), "+25:00", "-99:99", "+1", "Europe/Berlin "])(
    "the zone %j",
    (timeZone) => {
      assert.match(problem("0 0 * * *", timeZone), /^the time zone ".*" is unknown$/)
      assert.match(refusal({ cron: "0 0 * * *", timeZone }), /^the time zone ".*" is unknown$/)
    }
  )

  it("a schedule of neither or both kinds, and intervals that are none", () => {
    assert.match(refusal({}), /either cron or every/)
    assert.match(refusal({ cron: undefined, every: undefined }), /either cron or every/)
    assert.match(refusal({ cron: "* * * * *", every: "1 minute" }), /either cron or every/)
    for (const every of [0, 999, 1000.5, -1000, NaN, Infinity, "3654 days", Duration.infinity] as const) {
      assert.match(refusal({ every }), /^every must be/, String(every))
    }
    assert.match(refusal({ cron: "61 * * * *" }), /between 0 and 59/)
    const half = DateTime.zoneMakeOffset(90_500)
    assert.match(refusal({ cron: "* * * * *", timeZone: half }), /whole minutes/)
  })

  it("what TypeScript would not let through", () => {
    // Sound: what callers without types may do.
    for (const wrong of [null, 5, {}, [], Symbol.iterator] as ReadonlyArray<unknown>) {
      assert.isTrue(Result.isFailure(Ticks.specOf({ cron: wrong as string })), typeof wrong)
      assert.isTrue(Result.isFailure(Ticks.specOf({ cron: "* * * * *", timeZone: wrong as string ?? 5 })), typeof wrong)
      assert.isTrue(Result.isFailure(Ticks.parse(wrong as string, "UTC", now)), typeof wrong)
      assert.isTrue(Result.isFailure(Ticks.parse("* * * * *", wrong as string, now)), typeof wrong)
    }
  })

  it("nothing makes it throw", () => {
    const token = fc.oneof(
      fc.string(),
      fc.constantFrom(
        "*",
        "*/2",
        "0",
        "1-5",
        "31",
        "2",
        "mon",
        "@every",
        "@daily",
        "dst=both",
        "days=and",
        "5m",
        "99",
        "/"
      )
    )
    const text = fc.oneof(fc.string({ unit: "binary" }), fc.array(token, { maxLength: 9 }).map((_) => _.join(" ")))
    const zone = fc.oneof(fc.string({ unit: "binary" }), fc.constantFrom("UTC", "Europe/Berlin", "+05:45"))
    fc.assert(fc.property(text, zone, fc.double(), (spec, timeZone, from) => {
      const result = Ticks.parse(spec, timeZone, from)
      if (Result.isSuccess(result)) Ticks.next(result.success, from)
      const again = Ticks.specOf({ cron: spec, timeZone })
      if (Result.isSuccess(again)) assert.strictEqual(specOf({ cron: again.success.spec }).spec, again.success.spec)
    }))
  })
})

describe("what is stored", () => {
  const stored: ReadonlyArray<readonly [options: Parameters<typeof Ticks.specOf>[0], spec: string, timeZone: string]> =
    [
      [{ cron: "0 9 * * 1-5" }, "0 9 * * 1-5", "UTC"],
      [{ cron: "  0\t9 *  * MON-fri\n" }, "0 9 * * MON-fri", "UTC"],
      [{ cron: "*/10 * * * * *", timeZone: "Europe/Berlin" }, "*/10 * * * * *", "Europe/Berlin"],
      [{ cron: "0 0 1 * 1 days=and dst=later" }, "0 0 1 * 1 dst=later days=and", "UTC"],
      [{ cron: "@daily", timeZone: "+05:45" }, "@daily", "+05:45"],
      [{ cron: "@Weekly dst=both" }, "@weekly dst=both", "UTC"],
      [{ cron: "@every 5m" }, "@every 300s", "UTC"],
      [{ every: "90 seconds" }, "@every 90s", "UTC"],
      [{ every: 1500 }, "@every 1500ms", "UTC"],
      [{ every: Duration.days(3653), timeZone: "Asia/Almaty" }, "@every 315619200s", "Asia/Almaty"],
      // As it was written, although the runtime may have another name for the same zone.
      [{ cron: "@hourly", timeZone: "Asia/Kathmandu" }, "@hourly", "Asia/Kathmandu"],
      [{ cron: "@hourly", timeZone: DateTime.zoneMakeNamedUnsafe("Pacific/Auckland") }, "@hourly", "Pacific/Auckland"],
      [{ cron: "@hourly", timeZone: DateTime.zoneMakeOffset(-3.5 * hour) }, "@hourly", "-03:30"],
      [{ cron: Cron.parseUnsafe("0 9 * * 1-5", "America/New_York") }, "0 9 * * 1-5", "America/New_York"],
      [{ cron: Cron.parseUnsafe("0 9 * * *", "America/New_York"), timeZone: "UTC" }, "0 9 * * *", "UTC"],
      [{ cron: Cron.parseUnsafe("0 9 * * *", "+01:00") }, "0 9 * * *", "+01:00"],
      [{ cron: Cron.parseUnsafe("5 0 9 * * *") }, "5 0 9 * * *", "UTC"],
      [{ cron: Cron.parseUnsafe("0 */2 * * *") }, "0 */2 * * *", "UTC"],
      [{ cron: Cron.parseUnsafe("0 */5 * * *") }, "0 */5 * * *", "UTC"],
      [{ cron: Cron.parseUnsafe("0 */11 * * *") }, "0 */11 * * *", "UTC"],
      // {0, 12} is two times of day as likely as a rhythm.
      [{ cron: Cron.parseUnsafe("0 */12 * * *") }, "0 0,12 * * *", "UTC"],
      [{ cron: Cron.parseUnsafe("0 0-23 * * *") }, "0 * * * *", "UTC"],
      [{ cron: Cron.parseUnsafe("0 0,2,4 * * *") }, "0 0-4/2 * * *", "UTC"],
      [{ cron: Cron.parseUnsafe("0 1-23/2 * * *") }, "0 1-23/2 * * *", "UTC"],
      [{ cron: Cron.parseUnsafe("0 0 */2 * 1") }, "0 0 1-31/2 * 1 days=and", "UTC"],
      [{ cron: Cron.parseUnsafe("0 0 1 * 1") }, "0 0 1 * 1", "UTC"],
      [{ cron: Cron.parseUnsafe("30 1 * * *", undefined, { onDstOverlap: "later" }) }, "30 1 * * * dst=later", "UTC"],
      [{ cron: Cron.parseUnsafe("30 1 * * *", undefined, { onDstOverlap: "both" }) }, "30 1 * * * dst=both", "UTC"],
      [{ cron: Cron.parseUnsafe("30 1 * * *", undefined, { onDstOverlap: "earlier" }) }, "30 1 * * *", "UTC"]
    ]

  it.each(stored)("%j", (options, spec, timeZone) => {
    assert.deepStrictEqual(specOf(options), { spec, timeZone })
    const ticks = ticksOf(spec, timeZone)
    assert.strictEqual(ticks.spec, spec)
    assert.strictEqual(ticks.timeZone, timeZone)
    // Reading and writing again changes nothing.
    assert.deepStrictEqual(specOf({ cron: spec, timeZone }), { spec, timeZone })
  })

  it("the days of a Cron value, both or either", () => {
    const make = (and: boolean) =>
      Cron.make({ minutes: [0], hours: [12], days: [13], months: [], weekdays: [5], and, tz: undefined })
    const spec = (and: boolean) => specOf({ cron: make(and) }).spec
    assert.strictEqual(spec(true), "0 12 13 * 5 days=and")
    assert.strictEqual(spec(false), "0 12 13 * 5")
    const year = (and: boolean) => Ticks.between(ticksOf(spec(and)), at("2026-01-01"), at("2027-01-01"), 999)
    assert.deepStrictEqual(iso(year(true)), [
      "2026-02-13T12:00:00.000Z",
      "2026-03-13T12:00:00.000Z",
      "2026-11-13T12:00:00.000Z"
    ])
    assert.strictEqual(year(false).length, 12 + 52 - 3)
  })

  it("a Cron value fires at the same instants as itself, where clocks are never changed", () => {
    const values = (min: number, max: number) => fc.uniqueArray(fc.integer({ min, max }), { maxLength: 6 })
    const fields = fc.record({
      seconds: fc.constantFrom([0], [0, 30], [7]),
      minutes: values(0, 59),
      hours: fc.oneof(values(0, 23), fc.constantFrom([0, 6, 12, 18], [0, 12])),
      days: values(1, 28),
      months: values(1, 12),
      weekdays: values(0, 7),
      and: fc.boolean()
    })
    fc.assert(fc.property(fields, (fields) => {
      const cron = Cron.make({ ...fields, tz: DateTime.zoneMakeOffset(0) })
      const ticks = Ticks.parse(specOf({ cron }).spec, "UTC", now)
      // The 5th of a month that is a Sunday in one month of the year only may be far away.
      if (Result.isFailure(ticks)) return
      let expected = now
      const seen = Array.from({ length: 5 }, () => (expected = Cron.next(cron, expected).getTime()))
      // Ten years without a tick are its end: a 24 August that is a Saturday is eleven years after the last one.
      const tenYears = 3653 * 86_400_000
      const end = seen.findIndex((tick, n) => tick - (seen[n - 1] ?? now) > tenYears)
      const within = end < 0 ? seen : seen.slice(0, end)
      assert.deepStrictEqual(iso(Ticks.between(ticks.success, now, Infinity, 5)), iso(within))
    }))
  })

  it("names mean what they mean elsewhere", () => {
    const firsts = ["@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly", "@minutely"]
      .map((name) => Ticks.next(ticksOf(name), now)!)
    assert.deepStrictEqual(iso(firsts), [
      "2027-01-01T00:00:00.000Z",
      "2027-01-01T00:00:00.000Z",
      "2026-12-01T00:00:00.000Z",
      "2026-11-29T00:00:00.000Z",
      "2026-11-26T00:00:00.000Z",
      "2026-11-26T00:00:00.000Z",
      "2026-11-25T15:00:00.000Z",
      "2026-11-25T14:42:00.000Z"
    ])
  })

  it("the 31st is fine in the months that have one", () => {
    for (const month of [1, 3, 5, 7, 8, 10, 12]) {
      assert.strictEqual(new Date(Ticks.next(ticksOf(`0 0 31 ${month} *`), now)!).getUTCMonth() + 1, month)
    }
  })

  it("29 February is rare and fine", () => {
    const ticks = ticksOf("0 0 29 2 *")
    assert.deepStrictEqual(iso(Ticks.between(ticks, now, at("2033-01-01"), 9)), [
      "2028-02-29T00:00:00.000Z",
      "2032-02-29T00:00:00.000Z"
    ])
    // 2100 is no leap year.
    assert.strictEqual(Ticks.next(ticks, at("2097-01-01")), at("2104-02-29"))
    // On a Monday: the next after 2016 is in 2044.
    assert.match(problem("0 0 29 2 1 days=and"), /no tick within ten years/)
    assert.isTrue(Result.isSuccess(Ticks.parse("0 0 29 2 1 days=and", "UTC", at("2040-01-01"))))
  })
})

describe("every", () => {
  it("fires at the multiples since 1970, in any zone", () => {
    for (const timeZone of ["UTC", "Asia/Kathmandu"]) {
      assert.deepStrictEqual(iso(Ticks.between(ticksOf("@every 90s", timeZone), at("2026-11-25T00:00:00Z"), now, 2)), [
        "2026-11-25T00:01:30.000Z",
        "2026-11-25T00:03:00.000Z"
      ])
    }
    const weekly = ticksOf("@every 7d")
    assert.strictEqual(Ticks.next(weekly, 0), 7 * day)
    assert.strictEqual(Ticks.next(weekly, -1), 0)
    assert.strictEqual(Ticks.next(weekly, 7 * day - 1), 7 * day)
    assert.strictEqual(Ticks.next(weekly, 7 * day), 14 * day)
    assert.deepStrictEqual(Ticks.last(weekly, 0, 21 * day, 2), [14 * day, 21 * day])
    assert.deepStrictEqual(Ticks.last(weekly, 14 * day, 21 * day, 2), [21 * day])
  })
})

// ---------------------------------------------------------------------------
// Changes of the clocks
// ---------------------------------------------------------------------------

describe("when clocks are changed", () => {
  /** The ticks of the local day on which it happens, in UTC; a half-hourly schedule only near the change. */
  const table: ReadonlyArray<readonly [zone: string, what: string, from: string, to: string, Record<string, string>]> =
    [
      ["America/New_York", "forward, 02:00 to 03:00 at 07:00Z", "2026-03-08T05:00Z", "2026-03-08T09:00Z", {
        "*/30 * * * *": "05:00 05:30 06:00 06:30 07:00 07:30 08:00 08:30",
        "30 1 * * *": "06:30",
        "30 2 * * *": "07:30", // 03:30: moved by the hour that was left out
        "0 */2 * * *": "05:00 08:00", // 00:00, 04:00
        "0 0 * * *": "05:00"
      }],
      ["America/New_York", "back, 02:00 to 01:00 at 06:00Z", "2026-11-01T04:00Z", "2026-11-01T09:00Z", {
        "*/30 * * * *": "04:00 04:30 05:00 05:30 06:00 06:30 07:00 07:30 08:00 08:30",
        "30 1 * * *": "05:30", // the first 01:30
        "30 2 * * *": "07:30",
        "0 */2 * * *": "04:00 07:00", // 00:00, 02:00
        "0 0 * * *": "04:00"
      }],
      ["Europe/Berlin", "forward, 02:00 to 03:00 at 01:00Z", "2026-03-28T23:00Z", "2026-03-29T03:00Z", {
        "*/30 * * * *": "23:00 23:30 00:00 00:30 01:00 01:30 02:00 02:30",
        "30 1 * * *": "00:30",
        "30 2 * * *": "01:30", // 03:30
        "0 */2 * * *": "23:00 02:00",
        "0 0 * * *": "23:00"
      }],
      ["Europe/Berlin", "back, 03:00 to 02:00 at 01:00Z", "2026-10-24T22:00Z", "2026-10-25T04:00Z", {
        "*/30 * * * *": "22:00 22:30 23:00 23:30 00:00 00:30 01:00 01:30 02:00 02:30 03:00 03:30",
        "30 1 * * *": "23:30",
        "30 2 * * *": "00:30", // the first 02:30
        "0 */2 * * *": "22:00 00:00 01:00 03:00", // 00:00, 02:00 twice, 04:00
        "0 0 * * *": "22:00"
      }],
      ["Australia/Lord_Howe", "forward, 02:00 to 02:30 at 15:30Z", "2026-10-03T13:30Z", "2026-10-03T18:00Z", {
        "*/30 * * * *": "13:30 14:00 14:30 15:00 15:30 16:00 16:30 17:00 17:30",
        "30 1 * * *": "15:00",
        "30 2 * * *": "15:30", // there is one
        "0 2 * * *": "15:30", // 02:30, moved by half an hour
        "0 */2 * * *": "13:30 17:00", // 00:00, 04:00
        "0 0 * * *": "13:30"
      }],
      ["Australia/Lord_Howe", "back, 02:00 to 01:30 at 15:00Z", "2026-04-04T13:00Z", "2026-04-04T18:00Z", {
        "*/30 * * * *": "13:00 13:30 14:00 14:30 15:00 15:30 16:00 16:30 17:00 17:30",
        "30 1 * * *": "14:30", // the first
        "30 2 * * *": "16:00",
        "0 */2 * * *": "13:00 15:30 17:30",
        "0 0 * * *": "13:00"
      }],
      // The first minute of a day is left out, or there twice.
      ["America/Havana", "forward, 00:00 to 01:00 at 05:00Z", "2026-03-08T04:00Z", "2026-03-08T07:00Z", {
        "0 0 * * *": "05:00", // 01:00
        "30 0 * * *": "05:30",
        "0 * * * *": "04:00 05:00 06:00"
      }],
      ["America/Havana", "back, 01:00 to 00:00 at 05:00Z", "2026-11-01T03:00Z", "2026-11-01T07:00Z", {
        "0 0 * * *": "04:00", // the first
        "30 0 * * *": "04:30",
        "30 0 * * * dst=later": "05:30",
        "30 0 * * * dst=both": "04:30 05:30",
        "0 * * * *": "03:00 04:00 05:00 06:00",
        "0 * * * * dst=earlier": "03:00 04:00 06:00",
        "0 * * * * dst=later": "03:00 05:00 06:00"
      }],
      // No summer time, another offset.
      ["Asia/Almaty", "back for good, 00:00 to 23:00 at 18:00Z", "2024-02-29T16:00Z", "2024-02-29T21:00Z", {
        "30 23 * * *": "17:30",
        "0 0 * * *": "19:00",
        "30 * * * *": "16:30 17:30 18:30 19:30 20:30"
      }],
      ["Antarctica/Casey", "back by three hours, 03:00 to 00:00 at 16:00Z", "2023-03-08T12:00Z", "2023-03-08T20:00Z", {
        "30 1 * * *": "14:30",
        "30 1 * * * dst=later": "17:30",
        "30 * * * *": "12:30 13:30 14:30 15:30 16:30 17:30 18:30 19:30"
      }]
    ]

  describe.each(table)("%s, %s", (zone, _, from, to, rows) => {
    it.each(Object.entries(rows))("%s", (spec, expected) => {
      const ticks = ticksOf(spec, zone)
      const found = Ticks.between(ticks, at(from) - 1, at(to) - 1, 99)
      assert.strictEqual(iso(found).map((text) => text.slice(11, 16)).join(" "), expected)
      assert.deepStrictEqual(Ticks.last(ticks, at(from) - 1, at(to) - 1, 99), found)
    })
  })

  it("two times of day that come to lie on one instant are one tick", () => {
    const found = Ticks.between(
      ticksOf("30 2,3 * * *", "Europe/Berlin"),
      at("2026-03-28T23:00Z"),
      at("2026-03-29T23:00Z"),
      9
    )
    assert.deepStrictEqual(iso(found), ["2026-03-29T01:30:00.000Z"])
  })

  it("a time that was moved beyond another one comes after it", () => {
    const found = Ticks.between(
      ticksOf("0,45 2,3 * * *", "Europe/Berlin"),
      at("2026-03-28T23:00Z"),
      at("2026-03-29T23:00Z"),
      9
    )
    assert.deepStrictEqual(iso(found), ["2026-03-29T01:00:00.000Z", "2026-03-29T01:45:00.000Z"])
  })
})

// ---------------------------------------------------------------------------
// The functions among each other
// ---------------------------------------------------------------------------

describe("next, between and last agree", () => {
  const specs = [
    "* * * * *",
    "*/30 * * * *",
    "*/20 2 * * *",
    "30 1,2 * * *",
    "0 */2 * * * dst=later",
    "30 1 * * * dst=both",
    "17 5 * * 1-5",
    "0 0 1 * *",
    "0 0 29 2 *",
    "@weekly",
    "@every 90s",
    "*/15 * 2 * * *"
  ]
  const zones = ["UTC", "Europe/Berlin", "Australia/Lord_Howe", "Africa/Casablanca", "America/Havana", "-03:30"]

  it("for any instants", () => {
    const spec = fc.constantFrom(...specs)
    const zone = fc.constantFrom(...zones)
    const instant = fc.oneof(
      fc.integer({ min: at("2024-01-01"), max: at("2031-01-01") }),
      // Near changes of the clocks in Berlin and Havana.
      fc.integer({ min: -5 * hour, max: 5 * hour }).map((millis) => at("2026-10-25T01:00Z") + millis),
      fc.integer({ min: -5 * hour, max: 5 * hour }).map((millis) => at("2026-03-08T05:00Z") + millis)
    )
    const span = fc.oneof(fc.integer({ min: 0, max: 3 * day }), fc.constant(0), fc.constant(minute))
    fc.assert(
      fc.property(spec, zone, instant, span, fc.integer({ min: 0, max: 12 }), (spec, zone, after, span, count) => {
        const ticks = ticksOf(spec, zone)
        const until = after + span
        const all: Array<number> = []
        for (let tick = Ticks.next(ticks, after); tick !== undefined && tick <= until; tick = Ticks.next(ticks, tick)) {
          assert.isAbove(tick, all.at(-1) ?? after)
          all.push(tick)
        }
        assert.deepStrictEqual(Ticks.between(ticks, after, until, Infinity), all)
        assert.deepStrictEqual(Ticks.between(ticks, after, until, count), all.slice(0, count))
        assert.deepStrictEqual(Ticks.last(ticks, after, until, count), count === 0 ? [] : all.slice(-count))
      }),
      { numRuns: 500 }
    )
  })

  it("next is the nearest: from any instant before a tick, and after the one before it", () => {
    fc.assert(
      fc.property(
        fc.constantFrom(...specs),
        fc.constantFrom(...zones),
        fc.integer({ min: at("2024-01-01"), max: at("2031-01-01") }),
        fc.double({ min: 0, max: 1, noNaN: true, maxExcluded: true }),
        (spec, zone, after, part) => {
          const ticks = ticksOf(spec, zone)
          const first = Ticks.next(ticks, after)!
          const second = Ticks.next(ticks, first)!
          assert.strictEqual(Ticks.next(ticks, first + Math.floor((second - first) * part)), second)
          assert.strictEqual(Ticks.next(ticks, second - 1), second)
          assert.strictEqual(Ticks.next(ticks, second - 0.5), second)
        }
      )
    )
  })

  it("includes until, and excludes after", () => {
    const ticks = ticksOf("0 * * * *")
    const [from, to] = [at("2026-01-01T00:00Z"), at("2026-01-01T02:00Z")]
    for (const found of [Ticks.between(ticks, from, to, 9), Ticks.last(ticks, from, to, 9)]) {
      assert.deepStrictEqual(found, [from + hour, to])
    }
    assert.deepStrictEqual(Ticks.last(ticks, from, to, 1), [to])
    assert.deepStrictEqual(Ticks.between(ticks, from, to, 1), [from + hour])
  })

  it("nothing comes of nothing", () => {
    for (const ticks of specs.map((spec) => ticksOf(spec, "Europe/Berlin"))) {
      for (const [after, until] of [[now, now], [now, now - day], [NaN, now], [now, NaN], [NaN, NaN]] as const) {
        assert.deepStrictEqual(Ticks.between(ticks, after, until, 9), [])
        assert.deepStrictEqual(Ticks.last(ticks, after, until, 9), [])
      }
      assert.deepStrictEqual(Ticks.last(ticks, 0, now, 0), [])
      for (const limit of [0, -1, NaN]) assert.deepStrictEqual(Ticks.between(ticks, 0, now, limit), [])
      for (const after of [NaN, Infinity, 8.64e15, 8.64e15 - 1, 1e300]) assert.isUndefined(Ticks.next(ticks, after))
      assert.doesNotThrow(() => Ticks.next(ticks, -Infinity))
      assert.doesNotThrow(() => Ticks.next(ticks, -8.64e15))
      assert.doesNotThrow(() => Ticks.last(ticks, 0, 8.64e15, 2))
      assert.doesNotThrow(() => Ticks.last(ticks, -Infinity, -8.64e15 + day, 2))
    }
  })

  it("the last ticks of a month of seconds are found without the others", () => {
    // Two and a half million ticks: one by one it would take longer than a test may.
    for (const [spec, zone] of [["* * * * * *", "Europe/Berlin"], ["@every 1s", "UTC"]] as const) {
      const ticks = ticksOf(spec, zone)
      for (let n = 0; n < 100; n++) assert.deepStrictEqual(Ticks.last(ticks, now - 30 * day, now, 1), [now - 345])
    }
    // Dense on one day of the month, and looked for from the end of it.
    const ticks = ticksOf("* * * 1 * *", "Europe/Berlin")
    for (let n = 0; n < 100; n++) {
      assert.deepStrictEqual(iso(Ticks.last(ticks, 0, now, 2)), [
        "2026-11-01T22:59:58.000Z",
        "2026-11-01T22:59:59.000Z"
      ])
    }
  })
})
