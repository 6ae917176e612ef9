/**
 * When a schedule fires: cron expressions in a time zone, and intervals. Pure.
 *
 * @since 0.1.0
 */
import * as Cron from "effect/Cron"
import * as DateTime from "effect/DateTime"
import * as Duration from "effect/Duration"
import * as Option from "effect/Option"
import * as Predicate from "effect/Predicate"
import * as Result from "effect/Result"

/** When a schedule fires. */
export interface Ticks {
  readonly spec: string
  readonly timeZone: string
  readonly rule: Every | Calendar
}

/** The multiples of an interval since the epoch: the same for every process, and no deployment moves them. */
interface Every {
  readonly _tag: "Every"
  readonly interval: number
}

interface Calendar {
  readonly _tag: "Calendar"
  /** In a zone that is always at UTC, so that what it enumerates are the times a clock on the wall shows. */
  readonly cron: Cron.Cron
  /** The hour field begins with `*`: the schedule means a rhythm, not a time of day. */
  readonly everyHour: boolean
  /** Which of two equal wall times counts. */
  readonly overlap: Cron.DstOverlapPolicy
  readonly segmentAt: (instant: number) => Segment
}

/** A stretch of time, `start <= instant < end`, in which the clocks of a zone were not changed. */
interface Segment {
  readonly start: number
  readonly end: number
  readonly offset: number
  /** The offsets before `start` and from `end` on. */
  readonly before: number
  readonly after: number
}

/** Why a schedule without a next tick does not fire. */
export const over = "it will never fire again"

const second = 1000
const day = 86_400_000
/** How far ahead and back to look for a tick. 29 February can be eight years away. */
const horizon = 3653 * day
const maxLength = 1000
/** What `Date` can hold, less what offsets and looking around an instant may add. */
const latest = 8_640_000_000_000_000 - 30 * day

const names: Readonly<Record<string, string>> = {
  "@yearly": "0 0 1 1 *",
  "@annually": "0 0 1 1 *",
  "@monthly": "0 0 1 * *",
  "@weekly": "0 0 * * 0",
  "@daily": "0 0 * * *",
  "@midnight": "0 0 * * *",
  "@hourly": "0 * * * *",
  "@minutely": "* * * * *"
}

const units: Readonly<Record<string, number>> = { ms: 1, s: second, m: 60 * second, h: 3600 * second, d: day }

// ---------------------------------------------------------------------------
// Writing and reading specs
// ---------------------------------------------------------------------------

/**
 * Returns the text under which a schedule is stored, or says what is wrong with it.
 *
 * **Details**
 *
 * `cron` is an expression of five or six fields (six: seconds first), a name like `@daily`, or a `Cron`. An expression
 * may be followed by `dst=both`, `dst=earlier` or `dst=later`, which say what to do with wall times that occur twice, and
 * by `days=and`: day of the month and day of the week must both match. `every` is an interval from a second to ten years.
 * The zone of a `Cron` counts unless `timeZone` is given; else it is UTC.
 */
export const specOf = (options: {
  readonly cron?: string | Cron.Cron | undefined
  readonly every?: Duration.Input | undefined
  readonly timeZone?: string | DateTime.TimeZone | undefined
}): Result.Result<{ readonly spec: string; readonly timeZone: string }, string> => {
  const { cron, every, timeZone } = options
  if ((cron === undefined) === (every === undefined)) {
    return Result.fail("a schedule has either cron or every, and not both")
  }
  const text = every !== undefined ? textOfInterval(every) : Cron.isCron(cron) ? textOfCron(cron) : cron
  if (text === undefined) return Result.fail("every must be whole milliseconds, from a second to ten years")
  if (!Predicate.isString(text)) return Result.fail("cron must be an expression, a name like @daily, or a Cron")
  const zone = textOfZone(timeZone ?? (Cron.isCron(cron) ? Option.getOrUndefined(cron.tz) : undefined) ?? "UTC")
  return Result.flatMap(zone, (timeZone) => Result.map(read(text), ({ spec }) => ({ spec, timeZone })))
}

/**
 * Reads a stored spec, or says why it is none: it is not understood, the zone is unknown, or there is no tick within ten
 * years of `from`.
 */
export const parse = (spec: string, timeZone: string, from: number): Result.Result<Ticks, string> =>
  Result.flatMap(read(spec), (schedule) =>
    Result.flatMap(zoneOf(timeZone), (zone) => {
      const { rule } = schedule
      const ticks: Ticks = {
        spec: schedule.spec,
        timeZone,
        rule: rule._tag === "Every" ? rule : { ...rule, segmentAt: segmentsOf(zone) }
      }
      return (rule._tag === "Every" || isPossible(rule.cron)) && next(ticks, from) !== undefined
        ? Result.succeed(ticks)
        : Result.fail(`${quoted(spec)} has no tick within ten years`)
    }))

interface Spec {
  /** The text in its canonical form. */
  readonly spec: string
  readonly rule: Every | Omit<Calendar, "segmentAt">
}

const read = (text: string): Result.Result<Spec, string> => {
  if (!Predicate.isString(text) || text.length > maxLength) {
    return Result.fail(`a schedule is a text of at most ${maxLength} characters`)
  }
  const tokens = text.trim().split(/\s+/)
  if (tokens[0]?.toLowerCase() === "@every") return readInterval(text, tokens)
  const given = tokens.filter((token) => token.includes("="))
  const fields = tokens.slice(0, tokens.length - given.length)
  const words = new Map(given.map((word) => [word.slice(0, word.indexOf("=")), word]))
  // After the fields and each once: anything else is a mistake, and guessing would hide it.
  if (words.size !== given.length || fields.some((field) => field.includes("="))) {
    return Result.fail(`${quoted(text)}: words like dst=both come last, and each at most once`)
  }
  for (const word of given) {
    if (!/^(dst=(both|earlier|later)|days=and)$/.test(word)) {
      return Result.fail(`${quoted(text)}: ${quoted(word)} is none of dst=both, dst=earlier, dst=later and days=and`)
    }
  }
  const name = fields.length === 1 && fields[0]!.startsWith("@") ? fields[0]!.toLowerCase() : undefined
  const expression = name === undefined ? fields.join(" ") : Object.hasOwn(names, name) ? names[name]! : undefined
  if (expression === undefined) {
    return Result.fail(`${quoted(text)} is none of ${Object.keys(names).join(", ")} and "@every 90s"`)
  }
  const parts = expression.split(" ")
  if (parts.length !== 5 && parts.length !== 6) {
    return Result.fail(`${quoted(text)} is not a schedule: a cron expression has five or six fields`)
  }
  const cron = Cron.parse(expression, wall)
  if (Result.isFailure(cron)) {
    const { input = expression, message } = cron.failure
    const separator = message.startsWith("Expected") ? ", not " : " "
    return Result.fail(`${quoted(text)} is not a schedule: ${message.toLowerCase()}${separator}${quoted(input)}`)
  }
  const both = words.has("days")
  const overlap = words.get("dst")?.slice(4) as Cron.DstOverlapPolicy | undefined // Sound: checked above.
  const everyHour = parts.at(-4)!.startsWith("*")
  return Result.succeed({
    spec: [name ?? expression, words.get("dst"), words.get("days")].filter(Predicate.isNotUndefined).join(" "),
    rule: {
      _tag: "Calendar",
      cron: both ? Cron.make({ ...cron.success, and: true, tz: wall }) : cron.success,
      everyHour,
      overlap: overlap ?? (everyHour ? "both" : "earlier")
    }
  })
}

const readInterval = (text: string, tokens: ReadonlyArray<string>): Result.Result<Spec, string> => {
  const [, amount, unit = ""] = /^(\d{1,15})(ms|s|m|h|d)$/.exec(tokens.slice(1).join(" ")) ?? []
  const interval = Number(amount) * (units[unit] ?? NaN)
  return isInterval(interval)
    ? Result.succeed({ spec: textOfMillis(interval), rule: { _tag: "Every", interval } })
    : Result.fail(`${quoted(text)} is not like "@every 90s": a number and ms, s, m, h or d, from a second to ten years`)
}

const isInterval = (millis: number): boolean => Number.isInteger(millis) && millis >= second && millis <= horizon

const textOfMillis = (millis: number): string =>
  millis % second === 0 ? `@every ${millis / second}s` : `@every ${millis}ms`

const textOfInterval = (every: Duration.Input): string | undefined => {
  const millis = Option.match(Duration.fromInput(every), { onNone: () => NaN, onSome: Duration.toMillis })
  return isInterval(millis) ? textOfMillis(millis) : undefined
}

const textOfCron = (cron: Cron.Cron): string => {
  const fields = Cron.format(cron).split(" ")
  // The set of hours does not say how it was written, and what it says in the row decides about clock changes.
  fields[fields.length - 4] = hoursField(cron.hours) ?? fields.at(-4)!
  // Effect's default is not to be told from a choice; it means the default of this library.
  if (cron.onDstOverlap !== "earlier") fields.push(`dst=${cron.onDstOverlap}`)
  // `Cron.format` drops it. With one of the two unrestricted it makes no difference.
  if (needsBothDays(cron) && cron.days.size > 0 && cron.weekdays.size > 0) fields.push("days=and")
  return fields.join(" ")
}

/** The flag is there and counts in comparisons, but Effect does not declare it. */
const needsBothDays = (cron: Cron.Cron): boolean => Predicate.hasProperty(cron, "and") && cron.and === true

const hoursField = (hours: ReadonlySet<number>): string | undefined => {
  if (hours.size === 0 || hours.size === 24) return "*"
  const [first, step = 24] = hours
  const members = Math.ceil(24 / step)
  const isProgression = first === 0 && hours.size === members && [...hours].every((hour) => hour % step === 0)
  return isProgression && members >= 3 ? `*/${step}` : undefined
}

const textOfZone = (zone: string | DateTime.TimeZone): Result.Result<string, string> => {
  const isZone = DateTime.isTimeZone(zone)
  const text = isZone ? DateTime.zoneToString(zone) : zone
  return Result.flatMap(zoneOf(text), (parsed) => {
    if (DateTime.isTimeZoneNamed(parsed)) {
      // As it was written: Node has "Asia/Katmandu" for "Asia/Kathmandu", and the next version may not.
      return Result.succeed(text)
    }
    return isZone && DateTime.isTimeZoneOffset(zone) && zone.offset !== parsed.offset
      ? Result.fail("the offset of a time zone must be whole minutes")
      : Result.succeed(DateTime.zoneToString(parsed))
  })
}

const zoneOf = (text: string): Result.Result<DateTime.TimeZone, string> => {
  const zone = Predicate.isString(text) && text.length <= 100 ? DateTime.zoneFromString(text) : Option.none()
  return Option.isSome(zone) && !(DateTime.isTimeZoneOffset(zone.value) && Math.abs(zone.value.offset) >= day)
    ? Result.succeed(zone.value)
    : Result.fail(`the time zone ${quoted(text)} is unknown`)
}

/** Quoted for people: short, and without control characters. */
const quoted = (text: string): string => {
  const whole = String(text)
  return JSON.stringify(whole.length > 80 ? `${whole.slice(0, 80)}…` : whole)
}

const longestMonths = [31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] as const

/** Whether a day like 31 February is asked for. Effect finds out too, after ten thousand steps and a throw. */
const isPossible = (cron: Cron.Cron): boolean => {
  const dayCounts = cron.days.size > 0 && (cron.weekdays.size === 0 || needsBothDays(cron))
  if (!dayCounts) return true
  const earliest = Math.min(...cron.days)
  return longestMonths.some((days, n) => (cron.months.size === 0 || cron.months.has(n + 1)) && earliest <= days)
}

// ---------------------------------------------------------------------------
// Ticks
// ---------------------------------------------------------------------------

/**
 * Returns the first tick after an instant, or `undefined` when there is none within ten years.
 *
 * **Details**
 *
 * It costs about 5 µs in any zone, also near changes of the clocks. Effect's own search in a zone takes about 100 µs.
 */
export const next = (ticks: Ticks, after: number): number | undefined => {
  if (!(after < latest)) return undefined
  const from = Math.floor(Math.max(after, -latest))
  const { rule } = ticks
  return rule._tag === "Every" ? (Math.floor(from / rule.interval) + 1) * rule.interval : nextInZone(rule, from)
}

/**
 * Returns the last `count` ticks with `after < tick <= until`, ascending.
 *
 * **Details**
 *
 * It looks back from `until`, so that what lies further back costs nothing, and ends at ten years without a tick.
 */
export const last = (ticks: Ticks, after: number, until: number, count: number): ReadonlyArray<number> => {
  const found: Array<number> = []
  let to = Math.min(until, latest)
  while (found.length < count) {
    const tick = previous(ticks, after, to)
    if (tick === undefined) break
    found.push(tick)
    to = tick - 1
  }
  return found.toReversed()
}

/**
 * Returns the first `limit` ticks with `after < tick <= until`, ascending.
 */
export const between = (ticks: Ticks, after: number, until: number, limit: number): ReadonlyArray<number> => {
  const found: Array<number> = []
  let tick = next(ticks, after)
  while (found.length < limit && tick !== undefined && tick <= until) {
    found.push(tick)
    tick = next(ticks, tick)
  }
  return found
}

/** The last tick with `after < tick <= until`: steps back until there is one, then halves what lies after it. */
const previous = (ticks: Ticks, after: number, until: number): number | undefined => {
  if (!(after < until)) return undefined
  const upTo = (from: number): number | undefined => {
    const tick = next(ticks, from)
    return tick !== undefined && tick <= until ? tick : undefined
  }
  const { rule } = ticks
  if (rule._tag === "Every") {
    const multiple = Math.floor(until / rule.interval) * rule.interval
    return multiple > after ? multiple : undefined
  }
  const earliest = Math.max(after, until - horizon)
  // There is no tick after `none`, and there is one at `found`.
  let none = until
  let found: number | undefined
  for (let back = second; found === undefined; back *= 4) {
    const from = Math.max(until - back, earliest)
    found = upTo(from)
    if (found === undefined && from === earliest) return undefined
    if (found === undefined) none = from
  }
  for (;;) {
    const later = upTo(found)
    if (later === undefined) return found
    found = later
    const middle = Math.floor((found + none) / 2)
    const beyond = middle > found ? upTo(middle) : undefined
    if (beyond === undefined) none = middle
    else found = beyond
  }
}

/**
 * The first tick after an instant, segment by segment: within one, instants and wall times run in step.
 *
 * Effect's own search in the zone is not used. By default it leaves out the second of two equal hours, also for
 * schedules that mean every half an hour, and near a gap it may miss the nearest tick.
 */
const nextInZone = (rule: Calendar, after: number): number | undefined => {
  const limit = Math.min(after + horizon, latest)
  let from = after
  while (from < limit) {
    const { after: later, before, end, offset, start } = rule.segmentAt(from + 1)
    // Wall times until `start + before` have been shown when the clocks were put back.
    const seen = before > offset && rule.overlap === "earlier" ? start + before - 1 : -Infinity
    // Those from `end + later` on will be shown again.
    const shown = later < offset && rule.overlap === "later" ? end + later : end + offset
    const time = wallAfter(rule.cron, Math.max(from + offset, seen))
    let tick = time !== undefined && time < shown ? time - offset : Infinity
    // A time of day that was skipped when the clocks were put forward counts from where they were.
    if (!rule.everyHour && before < offset && from < start + offset - before) {
      const skipped = wallAfter(rule.cron, Math.max(from + before, start + before - 1))
      if (skipped !== undefined && skipped < start + offset) tick = Math.min(tick, skipped - before)
    }
    if (tick !== Infinity) return tick <= limit ? tick : undefined
    if (time === undefined) return undefined
    // Where the clocks stay as they are, nothing can match until shortly before the wall time that was found.
    from = later === offset ? Math.max(end - 1, time - 2 * day) : end - 1
  }
  return undefined
}

/**
 * The zone in which expressions enumerate wall times. An offset rather than "UTC": for a named zone, Effect formats a
 * date at every step.
 */
const wall = DateTime.zoneMakeOffset(0)

const wallAfter = (cron: Cron.Cron, time: number): number | undefined => {
  try {
    const found = Cron.next(cron, time).getTime()
    return Number.isNaN(found) ? undefined : found
  } catch {
    // Effect gives up after ten thousand steps.
    return undefined
  }
}

// ---------------------------------------------------------------------------
// Zones
// ---------------------------------------------------------------------------

const block = 4 * day
const maxBlocks = 256
/** By zone and by block, what `segmentsAround` has found: most schedules of an application are due in the same days. */
const known = new Map<string, Map<number, ReadonlyArray<Segment>>>()

const segmentsOf = (zone: DateTime.TimeZone): (instant: number) => Segment => {
  if (DateTime.isTimeZoneOffset(zone) || zone.id === "UTC") {
    const offset = DateTime.isTimeZoneOffset(zone) ? zone.offset : 0
    const always: Segment = { start: -Infinity, end: Infinity, offset, before: offset, after: offset }
    return () => always
  }
  // Bounded by the number of zones there are: the id is the canonical one.
  let blocks = known.get(zone.id)
  if (blocks === undefined) known.set(zone.id, blocks = new Map())
  const found = blocks
  return (instant) => {
    const n = Math.floor(instant / block)
    let segments = found.get(n)
    if (segments === undefined) {
      if (found.size >= maxBlocks) found.clear()
      found.set(n, segments = segmentsAround(zone, n))
    }
    // Sound: the segments cover the block.
    return segments.find(({ end }) => instant < end) as Segment
  }
}

/** The segments of a block and of a day before and after it, which is as far as a change of the clocks has effects. */
const segmentsAround = (zone: DateTime.TimeZone, n: number): ReadonlyArray<Segment> => {
  const offsetAt = (instant: number): number =>
    DateTime.zonedOffset(DateTime.makeZonedUnsafe(instant, { timeZone: zone }))
  const first = n * block - day
  const end = (n + 1) * block + day
  const segments: Array<Segment> = []
  let start = first
  let offset = offsetAt(first)
  let before = offset
  for (let at = first + day; at <= end; at += day) {
    const after = offsetAt(at)
    if (after === offset) continue
    let unchanged = at - day
    let changed = at
    while (changed - unchanged > 1) {
      const middle = Math.floor((unchanged + changed) / 2)
      if (offsetAt(middle) === offset) unchanged = middle
      else changed = middle
    }
    segments.push({ start, end: changed, offset, before, after })
    start = changed
    before = offset
    offset = after
  }
  segments.push({ start, end, offset, before, after: offset })
  return segments
}
