/**
 * When schedules fire, held against two others: croner, and the rule of the README applied to every minute that a zone's
 * clock shows. Near changes of the clocks the second decides, and says where croner differs.
 */
import { Cron as Croner } from "croner"
import { Result } from "effect"
import { assert, describe, it } from "vitest"
import * as Ticks from "../src/Ticks.ts"
import { long } from "./support/long.ts"

const minute = 60_000
const hour = 60 * minute
const day = 24 * hour
const begin = Date.UTC(2024, 0, 1)
const end = Date.UTC(2031, 0, 1)

const zones = [
  "America/New_York",
  "Europe/Berlin",
  "Europe/London",
  "Australia/Lord_Howe",
  "America/Santiago",
  "Antarctica/Casey",
  "Asia/Kathmandu",
  "Africa/Casablanca",
  "UTC",
  "America/Havana",
  "Asia/Beirut",
  "Pacific/Auckland",
  "Asia/Almaty",
  // Changes its clocks at midnight UTC, where the blocks of days meet by which offsets are remembered.
  "Asia/Gaza"
]

/** The hour field begins with `*`. */
const rhythms = [
  "* * * * * *",
  "*/10 * * * * *",
  "15,45 */5 * * * *",
  "30 0 * * * *",
  "* * * * *",
  "*/5 * * * *",
  "*/7 * * * *",
  "*/15 * * * *",
  "*/30 * * * *",
  "0 * * * *",
  "30 * * * *",
  "59 * * * *",
  "15,45 * * * *",
  "10-20 * * * *",
  "0 */2 * * *",
  "30 */2 * * *",
  "0 */3 * * *",
  "15 */5 * * *",
  "0 */12 * * *",
  "30 * * * 0",
  "*/30 * 25-31 3,10 *",
  "0 */6 1 * *",
  "20 * * 4-10 sat,sun",
  "0 * 1 1 *"
]

/** One value, a list or a range in seconds, minutes and hours. */
const times = [
  "30 1 * * *",
  "30 2 * * *",
  "0 2 * * *",
  "0 3 * * *",
  "15 0 * * *",
  "0 0 * * *",
  "59 23 * * *",
  "45 12 * * *",
  "0 9 * * 1-5",
  "30 1 * * 0",
  "0 0 1 * *",
  "0 0 1 1 *",
  "0 12 29 2 *",
  "0 6 31 * *",
  "30 2 * 3,10,11 *",
  "0 1,2,3 * * *",
  "0,15,30,45 2 * * *",
  "0,20,40 0-4 * * *",
  "0-10 2 * * *",
  "5 30 1 * * *",
  "0,30 30 2 * * *",
  "15 10 1 jan,jul mon",
  "0 0 13 * 5",
  "0 0 * * 7",
  "0 0 */2 * 1"
]

/** A time of day with a step or `*` in another field, or a step in the hours. Where croner has another opinion. */
const mixed = [
  "*/15 2 * * *",
  "* 1 * * *",
  "*/20 0,23 * * *",
  "*/30 1-3 * * *",
  "*/10 30 2 * * *",
  "0 0-23/2 * * *",
  "30 1-23/3 * * *",
  "0-59/30 * 2 * * *",
  "15 0-4 */3 * 0",
  "* 0 * * 0",
  "*/5 2-3 * 3,4,9,10,11 *",
  "0 0-6/2 * * 6"
]

const expressions = [...rhythms, ...times, ...mixed]

it("covers sixty expressions and fourteen zones", () => {
  assert.isAtLeast(new Set(expressions).size, 60)
  assert.isAtLeast(new Set(zones).size, 14)
})

// ---------------------------------------------------------------------------
// The fields of an expression, read a second time
// ---------------------------------------------------------------------------

const alias = (text: string) =>
  text
    .replace(/sun|mon|tue|wed|thu|fri|sat/g, (name) => String("sunmontuewedthufrisat".indexOf(name) / 3))
    .replace(/jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec/g, (name) =>
      String("janfebmaraprmayjunjulaugsepoctnovdec".indexOf(name) / 3 + 1))

const valuesOf = (field: string, min: number, max: number): ReadonlySet<number> =>
  new Set(
    alias(field).split(",").flatMap((part) => {
      const [range = "", step = "1"] = part.split("/")
      const [from, to] = range === "*" ? [min, max] : range.split("-").map(Number)
      return Array.from({ length: (to ?? from!) - from! + 1 }, (_, n) => from! + n)
        .filter((value) => (value - from!) % Number(step) === 0)
    })
  )

/** What a clock shows. */
interface Shown {
  readonly minute: number
  readonly hour: number
  readonly monthday: number
  readonly month: number
  readonly weekday: number
}

interface Fields {
  readonly seconds: ReadonlyArray<number>
  /** Whether a minute that the clock shows is one of the expression's. */
  readonly matches: (shown: Shown) => boolean
  readonly rhythm: boolean
  /** What croner takes for a time of day. */
  readonly timeForCroner: boolean
  readonly bothDays: boolean
}

const fieldsOf = (expression: string): Fields => {
  const parts = expression.split(" ")
  const [seconds, minutes, hours, days, months, weekdays] = (parts.length === 6 ? parts : ["0", ...parts]) as [
    string,
    string,
    string,
    string,
    string,
    string
  ]
  const inMinutes = valuesOf(minutes, 0, 59)
  const inHours = valuesOf(hours, 0, 23)
  const inMonths = valuesOf(months, 1, 12)
  const inDays = valuesOf(days, 1, 31)
  const inWeekdays = new Set([...valuesOf(weekdays, 0, 6)].map((weekday) => weekday % 7))
  const either = !days.startsWith("*") && !weekdays.startsWith("*")
  return {
    seconds: [...valuesOf(seconds, 0, 59)],
    matches: ({ hour, minute, month, monthday, weekday }) => {
      if (!inMinutes.has(minute) || !inHours.has(hour) || !inMonths.has(month)) return false
      return either
        ? inDays.has(monthday) || inWeekdays.has(weekday)
        : inDays.has(monthday) && inWeekdays.has(weekday)
    },
    rhythm: hours.startsWith("*"),
    timeForCroner: ![seconds, minutes, hours].some((field) => /[*/]/.test(field)),
    bothDays: !either && days !== "*" && weekdays !== "*"
  }
}

// ---------------------------------------------------------------------------
// What the clocks show
// ---------------------------------------------------------------------------

/** What the clock of a zone shows at an instant, to the second and as if it were UTC. */
const clockOf = (timeZone: string): (instant: number) => number => {
  const format = new Intl.DateTimeFormat("en-US", {
    timeZone,
    hourCycle: "h23",
    year: "numeric",
    month: "numeric",
    day: "numeric",
    hour: "numeric",
    minute: "numeric",
    second: "numeric"
  })
  return (instant) => {
    const [month, day, year, hour, minute, second] = format.format(instant).split(/\D+/).map(Number)
    return Date.UTC(year!, month! - 1, day, hour, minute, second)
  }
}

const shownAt = (wall: number): Shown => {
  const date = new Date(wall)
  return {
    minute: date.getUTCMinutes(),
    hour: date.getUTCHours(),
    monthday: date.getUTCDate(),
    month: date.getUTCMonth() + 1,
    weekday: date.getUTCDay()
  }
}

/** The instants from which on a zone's clock goes differently. Casey, which moves by three hours, last did in 2023. */
const changesOf = (timeZone: string): ReadonlyArray<number> => {
  const clock = clockOf(timeZone)
  const offset = (instant: number) => clock(instant) - instant
  const changes: Array<number> = []
  for (let at = timeZone === "Antarctica/Casey" ? Date.UTC(2018, 0, 1) : begin; at < end; at += day) {
    if (offset(at) === offset(at + day)) continue
    let [low, high] = [at, at + day]
    while (high - low > 1000) {
      const middle = Math.floor((low + high) / 2000) * 1000
      if (offset(middle) === offset(at)) low = middle
      else high = middle
    }
    assert.strictEqual(high % minute, 0, "clocks are changed at whole minutes")
    changes.push(high)
  }
  return changes
}

/** Every minute of a stretch of time, and what the clock showed. */
interface Window {
  readonly from: number
  readonly to: number
  readonly change: number
  readonly minutes: ReadonlyArray<{
    readonly instant: number
    readonly shown: Shown
    /** Whether the clock has shown this minute before, and will show it again. */
    readonly seen: boolean
    readonly again: boolean
    /** The minutes that the clock left out before this one. */
    readonly skipped: ReadonlyArray<Shown>
  }>
}

const windowOf = (timeZone: string, from: number, to: number, change = NaN): Window => {
  const clock = clockOf(timeZone)
  // A day more, for what was seen before and what is skipped at the edge.
  const instants = Array.from({ length: (to - from) / minute + 2880 }, (_, n) => from - day + n * minute)
  const walls = instants.map(clock)
  const first = new Map<number, number>()
  const final = new Map<number, number>()
  for (const [n, wall] of walls.entries()) {
    if (!first.has(wall)) first.set(wall, n)
    final.set(wall, n)
  }
  const minutes = instants.map((instant, n) => {
    const left = n === 0 ? 0 : Math.max(0, (walls[n]! - walls[n - 1]!) / minute - 1)
    return {
      instant,
      shown: shownAt(walls[n]!),
      seen: first.get(walls[n]!)! < n,
      again: final.get(walls[n]!)! > n,
      skipped: Array.from({ length: left }, (_, k) => shownAt(walls[n - 1]! + (k + 1) * minute))
    }
  })
  return { from, to, change, minutes }
}

type Overlap = "both" | "earlier" | "later"
type Gap = "skip" | "move" | "end"

/** The rule, literally. `gap`: what becomes of a time that the clocks left out. */
const byRule = (window: Window, fields: Fields, overlap: Overlap, gap: Gap): ReadonlyArray<number> => {
  const found = new Set<number>()
  for (const { again, instant, seen, shown, skipped } of window.minutes) {
    if (fields.matches(shown) && !(overlap === "earlier" && seen) && !(overlap === "later" && again)) {
      for (const second of fields.seconds) found.add(instant + second * 1000)
    }
    for (const [n, time] of skipped.entries()) {
      if (gap === "skip" || !fields.matches(time)) continue
      for (const second of fields.seconds) found.add(gap === "end" ? instant : instant + n * minute + second * 1000)
    }
  }
  return [...found].filter((tick) => tick >= window.from && tick < window.to).toSorted((a, b) => a - b)
}

// ---------------------------------------------------------------------------
// The three answers
// ---------------------------------------------------------------------------

const ticksOf = (spec: string, zone: string) => Result.getOrThrow(Ticks.parse(spec, zone, begin))

const ours = (ticks: Ticks.Ticks, from: number, to: number) => Ticks.between(ticks, from - 1, to - 1, Infinity)

const cronerOf = (expression: string, timezone: string) => {
  const options = { timezone, fixedTimeRule: "no-wildcard", domAndDow: fieldsOf(expression).bothDays } as const
  const cron = new Croner(expression, options)
  return (from: number, to: number): ReadonlyArray<number> => {
    const found: Array<number> = []
    for (let at: Date | null = new Date(from - 1); (at = cron.nextRun(at)) !== null && at.getTime() < to;) {
      found.push(at.getTime())
    }
    return found
  }
}

const iso = (instants: ReadonlyArray<number>) => instants.map((instant) => new Date(instant).toISOString())

const assertEqual = (actual: ReadonlyArray<number>, expected: ReadonlyArray<number>, what: string) => {
  const isEqual = actual.length === expected.length && actual.every((tick, n) => tick === expected[n])
  if (isEqual) return
  const missing = iso(expected.filter((tick) => !actual.includes(tick)).slice(0, 5))
  const extra = iso(actual.filter((tick) => !expected.includes(tick)).slice(0, 5))
  assert.fail(`${what}: missing ${missing.join(", ")}; too many ${extra.join(", ")}`)
}

/** How densely an expression fires when it does, which decides how much of it is looked at. */
const isBySecond = (fields: Fields) => fields.seconds.length > 2
const isDense = (expression: string) => fieldsOf(expression).rhythm && !/^\d+ \S+ \S+ \S+ \S+$/.test(expression)

const reach = (expression: string, change: number) =>
  isBySecond(fieldsOf(expression))
    ? 4 * hour
    : isDense(expression) && !long && change > Date.UTC(2025, 0, 1)
    ? 6 * hour
    : 2 * day

describe.each(zones)("%s", (zone) => {
  const changes = changesOf(zone)
  const windows = [
    ...changes.map((change) => windowOf(zone, change - 2 * day, change + 2 * day, change)),
    windowOf(zone, Date.UTC(2024, 1, 27), Date.UTC(2024, 2, 2)),
    windowOf(zone, Date.UTC(2026, 11, 30), Date.UTC(2027, 0, 3))
  ]
  /** The part of a window that is looked at for an expression. */
  const around = (window: Window, expression: string): Window => {
    const middle = Number.isNaN(window.change) ? window.from + 2 * day : window.change
    const within = reach(expression, window.change)
    const [from, to] = [middle - within, middle + within]
    const minutes = window.minutes.filter(({ instant }) => instant >= from - hour && instant < to)
    return { ...window, from, to, minutes }
  }

  it("follows the rule around every change of the clocks", () => {
    for (const [n, expression] of expressions.entries()) {
      const ticks = ticksOf(expression, zone)
      const fields = fieldsOf(expression)
      const [overlap, gap] = fields.rhythm ? ["both", "skip"] as const : ["earlier", "move"] as const
      for (const [k, window] of windows.entries()) {
        if (!long && (k + n) % 2 !== 0) continue
        const part = around(window, expression)
        assertEqual(ours(ticks, part.from, part.to), byRule(part, fields, overlap, gap), `${expression} in ${zone}`)
      }
    }
  })

  it("follows the words for repeated times", () => {
    for (const expression of ["30 1 * * *", "0,20,40 0-4 * * *", "*/15 2 * * *", "*/30 * * * *", "0 */2 * * *"]) {
      const fields = fieldsOf(expression)
      for (const overlap of ["both", "earlier", "later"] as const) {
        const ticks = ticksOf(`${expression} dst=${overlap}`, zone)
        for (const window of windows) {
          const expected = byRule(window, fields, overlap, fields.rhythm ? "skip" : "move")
          assertEqual(ours(ticks, window.from, window.to), expected, `${expression} dst=${overlap} in ${zone}`)
        }
      }
    }
  })

  it("agrees with croner, except near changes of the clocks in ways that are known", () => {
    const near = (tick: number) => changes.some((change) => Math.abs(tick - change) <= 2 * day)
    for (const [n, expression] of expressions.entries()) {
      const fields = fieldsOf(expression)
      const ticks = ticksOf(expression, zone)
      const croner = cronerOf(expression, zone)
      // Near changes: what croner does is exactly this. With a time of day that was left out it goes to the end of the
      // gap, and not as far beyond it as the time was in it. And a step or a `*` in any of seconds, minutes and hours
      // makes a rhythm of an expression, which here only a `*` at the beginning of the hours does.
      const [overlap, gap] = fields.timeForCroner ? ["earlier", "end"] as const : ["both", "skip"] as const
      for (const [k, window] of windows.entries()) {
        if (!long && (isBySecond(fields) || (k + n) % (isDense(expression) ? 48 : 18) !== 0)) continue
        const part = around(window, expression)
        assertEqual(croner(part.from, part.to), byRule(part, fields, overlap, gap), `croner: ${expression} in ${zone}`)
      }
      // Elsewhere there is one answer.
      if (isBySecond(fields) || isDense(expression)) {
        const from = begin + ((n * 7919 + zone.length * 104_729) % 2400) * day + 11 * hour
        const to = from + (isBySecond(fields) ? 10 * minute : day)
        const quiet = (instants: ReadonlyArray<number>) => instants.filter((tick) => !near(tick))
        assertEqual(quiet(ours(ticks, from, to)), quiet(croner(from, to)), `${expression} in ${zone}`)
        continue
      }
      const perYear = Ticks.between(ticks, Date.UTC(2026, 0, 1), Date.UTC(2027, 0, 1), 400).length
      const years = perYear < (long ? 2000 : 20) ? 7 : perYear < 400 ? 0.5 : 0.05
      const length = years * 365 * day
      const from = years === 7 ? begin : begin + Math.floor(((n * 37 + zone.length * 11) % 100) / 100 * 5.5 * 365) * day
      const to = Math.min(end, from + length)
      const quiet = (instants: ReadonlyArray<number>) => instants.filter((tick) => !near(tick))
      assertEqual(quiet(ours(ticks, from, to)), quiet(croner(from, to)), `${expression} in ${zone}`)
    }
  })
})
