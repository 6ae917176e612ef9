/**
 * One queue as one worker sees it: how much to claim, from where, and what to start next.
 *
 * @since 0.1.0
 */
import type * as Run from "./Run.ts"
import * as Store from "./Store.ts"

/** The lanes of the ten priorities. */
const priorityLanes = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9] as const
const suspectLanes = priorityLanes.map((priority) => Store.suspectLane + priority)

/** Every lane that a look has to consider. */
export const everyLane: ReadonlyArray<number> = [...priorityLanes, ...suspectLanes]

/** Claim ahead about this many milliseconds of work. */
const ahead = 100
/** The most jobs of one claim, and the most that wait in the buffer. */
const mostClaimed = 500

/** A sweep from the front at least this often, in milliseconds … */
const sweepEvery = 1000
/** … and whenever it costs less than this part of the time. */
const sweepShare = 0.03

/** A buffered job waits no longer than this for a slot while none becomes free: then it goes back to the others. */
export const stuckAfter = 150

/**
 * The state of one queue in one worker. Times are milliseconds of the monotonic clock.
 */
export interface Line {
  readonly queue: string
  readonly concurrency: number
  /** Claimed and not started, in the order in which to start. */
  readonly buffer: Array<Run.Running>
  running: number
  /** How long a handler takes, as a moving average; `undefined` until one has ended. */
  handlerTime: number | undefined
  /** When a slot last became free or a job was last started. */
  movedAt: number
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
  running: 0,
  handlerTime: undefined,
  movedAt: now,
  cursors: new Map(),
  sweptAt: -Infinity,
  sweepCost: 0,
  sweepCostAt: now
})

/**
 * How many jobs to claim now: the free slots, and ahead of them only as many as the handlers get through in about
 * 100 ms, so that no job waits here while another worker is idle.
 */
export const wanted = (line: Line, now: number): number => {
  const free = line.concurrency - line.running
  const reserve = line.handlerTime === undefined || (free <= 0 && now - line.movedAt >= stuckAfter)
    ? 0
    : Math.min(mostClaimed, Math.floor((line.concurrency * ahead) / Math.max(line.handlerTime, 0.01)))
  const room = free + reserve - line.buffer.length
  // Half the reserve at a time, or every job that ends would cost a claim.
  return room >= Math.max(1, Math.min(free, reserve / 2)) && (free > line.buffer.length || room >= reserve / 2)
    ? Math.min(room, mostClaimed)
    : 0
}

/**
 * Decides whether the next claim reads the lanes from the front. From the cursor, a claim does not walk the dead rows
 * that somebody's open transaction keeps alive (24.9 ms a claim after 40 s of one, against 0.5 ms); from the front it
 * finds what was committed late.
 */
export const sweeps = (line: Line, now: number): boolean =>
  now - line.sweptAt >= sweepEvery ||
  line.sweepCost * Math.pow(0.5, (now - line.sweepCostAt) / 2000) <= sweepShare * 2000

/** The lanes of the next claim, in order of priority. */
export const lanes = (line: Line, sweep: boolean, suspects: boolean): ReadonlyArray<Store.LaneCursor> =>
  (suspects ? [...priorityLanes, ...suspectLanes] : priorityLanes).map((lane) =>
    sweep ? Store.laneStart(lane) : line.cursors.get(lane) ?? Store.laneStart(lane)
  )

/** Notes what a claim brought and what it cost. */
export const claimed = (
  line: Line,
  rows: ReadonlyArray<Store.ClaimedRow>,
  options: { readonly sweep: boolean; readonly limit: number; readonly startedAt: number; readonly now: number }
): void => {
  for (const row of rows) line.cursors.set(row.lane, { lane: row.lane, runAt: row.run_at, id: row.id })
  if (options.sweep) {
    line.sweptAt = options.now
    line.sweepCost = line.sweepCost * Math.pow(0.5, (options.now - line.sweepCostAt) / 2000) +
      (options.now - options.startedAt)
    line.sweepCostAt = options.now
  }
}

/** Puts claimed jobs into the buffer at their place. */
export const add = (line: Line, jobs: ReadonlyArray<Run.Running>): void => {
  line.buffer.push(...jobs)
  line.buffer.sort((a, b) =>
    a.row.lane - b.row.lane || Number(BigInt(a.row.run_at) - BigInt(b.row.run_at)) || (a.row.id < b.row.id ? -1 : 1)
  )
}

/** Notes that a handler ended after `ran` milliseconds. Slower is believed at once, faster only by and by. */
export const ended = (line: Line, ran: number, now: number): void => {
  line.running--
  line.movedAt = now
  const known = line.handlerTime ?? ran
  line.handlerTime = known + (ran - known) * (ran > known ? 0.5 : 0.1)
}

/** Whether the jobs in the buffer are held up by handlers that do not end. */
export const stuck = (line: Line, now: number): boolean =>
  line.buffer.length > 0 && line.running >= line.concurrency && now - line.movedAt >= stuckAfter
