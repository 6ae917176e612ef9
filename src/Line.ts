/**
 * One queue as one worker sees it: how much to claim, from where, and what to start next.
 *
 * @since 0.1.0
 */
import type * as Run from "./Run.ts"
import * as Store from "./Store.ts"

/** Every lane that a look has to consider: all but those of the parked. */
export const everyLane: ReadonlyArray<number> = [...Store.priorityLanes, ...Store.suspectLanes]

/** Claim ahead as many jobs as ended in about this many milliseconds … */
const ahead = 100

/**
 * … or in as long as a claim takes, when that is longer, up to this: else a worker far from its database would ask for one
 * slot that has become free, and keep the others empty until the answer is there.
 */
const mostAhead = 500

/** The most jobs of one claim, and the most that wait in the buffer. */
const mostClaimed = 500

/** A claim that took less than this, in milliseconds, could have brought some more. */
const easily = 2000

/** A sweep from the front at least this often, in milliseconds … */
const sweepEvery = 1000
/** … and whenever it costs less than this part of the time. */
const sweepShare = 0.03

/** Buffered jobs go back to the others when every slot is taken and none has become free for this long … */
const stuckAfter = 150

/** … or when one of them has waited this long. */
const waitedTooLong = 500

/**
 * The state of one queue in one worker. Times are milliseconds of the monotonic clock.
 */
export interface Line {
  readonly queue: string
  readonly concurrency: number
  /** Claimed and not started: the last is the next to start. */
  readonly buffer: Array<Run.Running>
  /** The most jobs of the next claim: fewer after one that was too much. */
  most: number
  running: number
  /** How many jobs ended in the time that is claimed ahead, roughly: a count that decays. */
  endings: number
  endingsAt: number
  /** When a job was last started or ended. */
  movedAt: number
  /** How long the last claim took. */
  took: number
  /** For how long is claimed ahead. */
  ahead: number
  readonly cursors: Map<number, Store.LaneCursor>
  sweptAt: number
  /** Time spent in sweeps, decaying. */
  sweepCost: number
  sweepCostAt: number
}

/** A line with nothing claimed. */
export const make = (queue: string, concurrency: number, now: number): Line => ({
  queue,
  concurrency,
  buffer: [],
  most: mostClaimed,
  running: 0,
  endings: 0,
  endingsAt: now,
  movedAt: now,
  took: 0,
  ahead,
  cursors: new Map(),
  sweptAt: -Infinity,
  sweepCost: 0,
  sweepCostAt: now
})

const decayed = (line: Line, now: number): number => line.endings * Math.exp((line.endingsAt - now) / line.ahead)

/**
 * How many jobs to claim now: the free slots, and ahead of them only as many as ended in the last 100 ms or so, or while a
 * claim is under way, whatever the handlers do, so that no job waits here while another worker is idle.
 */
export const wanted = (line: Line, now: number): number => {
  const free = Math.max(0, line.concurrency - line.running)
  // Nothing ahead of handlers that do not end: what was handed back would be claimed again at once.
  const held = free === 0 && now - line.movedAt >= stuckAfter
  const reserve = held ? 0 : Math.min(mostClaimed, Math.floor(decayed(line, now)))
  const room = free + reserve - line.buffer.length
  // Half the reserve at a time, or every job that ends would cost a claim.
  return room >= Math.max(1, reserve / 2) || (room > 0 && free > line.buffer.length) ? Math.min(room, line.most) : 0
}

/** Notes that a claim of so many was more than could be had: it is tried with a half. */
export const tooMuch = (line: Line, limit: number): void => {
  line.most = Math.max(1, limit >> 1)
}

/**
 * Decides whether the next claim reads the lanes from the front. From the cursor, a claim does not walk the dead rows
 * that somebody's open transaction keeps alive (24.9 ms a claim after 40 s of one, against 0.5 ms); from the front it
 * finds what was committed late.
 */
export const sweeps = (line: Line, now: number): boolean => sweepsIn(line, now) <= 0

/** How long until then, in milliseconds. */
export const sweepsIn = (line: Line, now: number): number =>
  Math.min(
    line.sweptAt + sweepEvery - now,
    // When what has been spent of it has halved often enough.
    line.sweepCostAt + 2000 * Math.log2(line.sweepCost / (sweepShare * 2000)) - now
  )

/** The lanes of the next claim, in order of priority. */
export const lanes = (line: Line, sweep: boolean, suspects: boolean): ReadonlyArray<Store.LaneCursor> =>
  (suspects ? everyLane : Store.priorityLanes).map((lane) =>
    sweep ? Store.laneStart(lane) : line.cursors.get(lane) ?? Store.laneStart(lane)
  )

/** Notes what a claim brought and what it cost. */
export const claimed = (
  line: Line,
  rows: ReadonlyArray<Store.ClaimedRow>,
  options: { readonly sweep: boolean; readonly startedAt: number; readonly now: number }
): void => {
  for (let i = 0; i < rows.length; i++) {
    const { id, lane, run_at: runAt } = rows[i]!
    // Only the last of each lane counts.
    if (rows[i + 1]?.lane !== lane) line.cursors.set(lane, { lane, runAt, id })
  }
  const took = options.now - options.startedAt
  if (took < easily) line.most = Math.min(mostClaimed, line.most + Math.ceil(line.most / 8))
  // A single claim that was slow says nothing of the next one.
  line.ahead = Math.max(ahead, Math.min(took, line.took, mostAhead))
  line.took = took
  if (options.sweep) {
    line.sweptAt = options.now
    line.sweepCost = line.sweepCost * Math.pow(0.5, (options.now - line.sweepCostAt) / 2000) + took
    line.sweepCostAt = options.now
  }
}

/** Puts claimed jobs into the buffer at their place. */
export const add = (line: Line, jobs: ReadonlyArray<Run.Running>): void => {
  line.buffer.push(...jobs)
  line.buffer.sort(backwards)
}

/** The order of the line, from its end. */
const backwards = ({ row: a }: Run.Running, { row: b }: Run.Running): number =>
  b.lane - a.lane ||
  // Microseconds since 1970 as text, never negative: what is longer is later.
  b.run_at.length - a.run_at.length ||
  (a.run_at === b.run_at ? (a.id < b.id ? 1 : -1) : a.run_at < b.run_at ? 1 : -1)

/** Notes that a job was started. */
export const started = (line: Line, now: number): void => {
  line.running++
  line.movedAt = now
}

/** Notes that a job ended. */
export const ended = (line: Line, now: number): void => {
  line.running--
  line.movedAt = now
  line.endings = decayed(line, now) + 1
  line.endingsAt = now
}

/** Whether the jobs in the buffer are held up: other workers may be idle. */
export const stuck = (line: Line, now: number): boolean => now >= stuckAt(line)

/** When the jobs in the buffer count as held up, if nothing moves. */
export const stuckAt = (line: Line): number =>
  line.buffer.length === 0 || line.running < line.concurrency
    ? Infinity
    : Math.min(line.movedAt + stuckAfter, waitedTooLong + Math.min(...line.buffer.map((running) => running.claimedAt)))
