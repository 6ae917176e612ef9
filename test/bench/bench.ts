/** What a case measures with. */
import type * as Child from "./child.ts"
import type { Peer, Place, Profile, Shape } from "./peer.ts"
import type * as Producing from "./producer.ts"
import type { Server } from "./server.ts"
import type * as Working from "./worker.ts"

/** Numbers by name; what each means is with the case. */
export type Values = Readonly<Record<string, number>>

/** What a case measures with. */
export interface Bench {
  readonly peer: Peer
  readonly place: Place
  readonly server: Server
  /** A number of jobs, at the scale of this run. */
  readonly jobs: (count: number, least?: number) => number
  /** A number of seconds, at the scale of this run. */
  readonly seconds: (seconds: number, least: number) => number
  readonly worker: (
    profile: Profile,
    orders?: Pick<Working.Orders, "expect" | "each" | "count"> & { readonly shape?: Shape; readonly logged?: boolean }
  ) => Child.Child<Working.Told>
  readonly producer: (task: Producing.Orders["task"]) => Child.Child<Producing.Told>
  /** CPU time of the server so far, in milliseconds; NaN where nobody tells. */
  readonly serverCpu: () => number
  /** Frees what is dead and counts what is alive, so that plans and drains start from the same. */
  readonly vacuum: () => Promise<void>
  /** Fails unless the queue holds so many jobs that are not over. */
  readonly holds: (count: number) => Promise<void>
  /** Fails unless all is over within ten seconds, and returns how long that took. */
  readonly settles: () => Promise<number>
}

/** One queue, one kind. */
export const plain: Shape = { kinds: 1, queues: 1 }

/** Why a measurement does not count. */
export const refuse = (why: string): never => {
  throw new Error(`refused: ${why}`)
}
