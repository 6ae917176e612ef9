/**
 * The process in which a worker is measured: it loads one queue, handles, and tells its parent.
 *
 * It imports as little as it can, because its start and its memory are measured.
 */
import { now } from "./clock.ts"
import { load, type Name, type Payload, type Place, type Profile, type Shape } from "./peer.ts"
import { ownCpu, peakMemory } from "./usage.ts"

/** What the worker is to do. */
export interface Orders {
  readonly peer: Name
  readonly place: Place
  readonly profile: Profile
  readonly shape: Shape
  /** How many jobs there will be; told when all of them have been handled. */
  readonly expect?: number
  /** Tell of each job, for whoever sends the next one then. */
  readonly each?: boolean
  /** Tell every 5 ms how many have been handled. */
  readonly count?: boolean
}

/** What it has done so far. Times are milliseconds. */
export interface Report {
  /** Jobs handled, each counted once. */
  readonly handled: number
  /** Jobs that were handled again. */
  readonly repeated: number
  /** From the call that started the worker. */
  readonly elapsed: number
  /** From there to the first and the last job. */
  readonly first: number
  readonly last: number
  /** CPU time of this process since that call. */
  readonly cpu: number
  /** In MB. */
  readonly peakMemory: number
  /** From the call of enqueue to the handler, with when that was, of every job that carries a time. */
  readonly latencies: ReadonlyArray<number>
  readonly at: ReadonlyArray<number>
}

/** What it tells by itself. */
export type Told =
  | { readonly ready: true }
  | { readonly handled: number }
  | { readonly done: Report }
  | { readonly report: Report }
  | { readonly stopped: true }

process.on("disconnect", () => process.exit())
const orders: Orders = JSON.parse(process.argv[2]!)
const tell = (told: Told) => process.send!(told)

const seen = new Uint8Array(16_000_000)
let handled = 0
let repeated = 0
let first = 0
let last = 0
let latencies: Array<number> = []
let at: Array<number> = []

const handle = (payload: Payload): void => {
  const time = now()
  if (seen[payload.userId] === 1) {
    repeated++
    return
  }
  seen[payload.userId] = 1
  if (handled++ === 0) first = time
  last = time
  if (payload.t !== undefined) {
    latencies.push(time - payload.t)
    at.push(time)
  }
  if (orders.each === true) tell({ handled })
  if (handled === orders.expect) tell({ done: report() })
}

const report = (): Report => ({
  handled,
  repeated,
  elapsed: now() - begun,
  first: first - begun,
  last: last - begun,
  cpu: ownCpu() - cpuBefore,
  peakMemory: peakMemory(),
  latencies,
  at
})

const peer = await load(orders.peer)
const cpuBefore = ownCpu()
const begun = now()
const stop = await peer.work(orders.place, orders.profile, handle, orders.shape)
tell({ ready: true })
if (orders.count === true) setInterval(() => tell({ handled }), 5)

process.on("message", (message) => {
  if (message === "report") tell({ report: report() })
  // Measuring begins: what came before was to warm up.
  if (message === "clear") {
    latencies = []
    at = []
  }
  if (message === "stop") void stop().then(() => tell({ stopped: true }))
})
