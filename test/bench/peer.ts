/** What a queue has to offer to be measured. */

/** How a worker is set up; what each means for a queue is in its file. */
export type Profile =
  /** The fastest that its documentation and a handful of trial runs give. */
  | "best"
  /** The same, and what has been handled stays in the database. */
  | "kept"
  /** 24 jobs at once, one by one. */
  | "slots"
  /** Nothing said. */
  | "stock"

/** What travels: 60 bytes of JSON, and now and then more. */
export interface Payload {
  /** Which of the jobs of this measurement it is, from 0. */
  readonly userId: number
  readonly kind: string
  readonly to: string
  /** When its enqueue was called, by `clock.ts`. */
  readonly t?: number
  readonly pad?: string
}

/** Where a queue lives during one measurement: a fresh database, or an empty Redis. */
export interface Place {
  readonly postgres: string
  readonly redisPort: number
}

/** How jobs are spread; only ours is asked for anything but one queue and one kind. */
export interface Shape {
  readonly queues: number
  readonly kinds: number
}

/** Connections of a producer, for all that have such an option. */
export const poolSize = 10

/** Enqueues from one process. */
export interface Producer {
  readonly enqueue: (payload: Payload) => Promise<unknown>
  /** All in one call; `later` puts them a day into the future, in front of all others; only ours is asked for that. */
  readonly bulk: (payloads: ReadonlyArray<Payload>, later?: boolean) => Promise<unknown>
  readonly close: () => Promise<unknown>
}

/** A queue. */
export interface Peer {
  readonly title: string
  readonly store: "postgres" | "redis"
  /** What each profile sets; a queue that lacks one is left out of its measurements. */
  readonly profiles: Readonly<Partial<Record<Profile, object>>>
  /** What a reader of its numbers has to know. */
  readonly note?: string
  /** Creates what it needs in an empty database. */
  readonly install: (place: Place) => Promise<void>
  readonly produce: (place: Place, shape: Shape) => Promise<Producer>
  /** Starts a worker whose handler does nothing but call `handle`; resolves with how to stop it. */
  readonly work: (
    place: Place,
    profile: Profile,
    handle: (payload: Payload) => void,
    shape: Shape
  ) => Promise<() => Promise<unknown>>
  /** How many jobs are not over: waiting, or claimed and not settled. */
  readonly unsettled: (place: Place) => Promise<number>
  /** Tells the claims among its statements. */
  readonly claim?: RegExp
}

/** The queues, in the order of the table. Ours comes first. */
export const names = ["ours", "graphile", "pgboss", "persisted", "bullmq-postgres", "bullmq-redis"] as const

export type Name = (typeof names)[number]

/** Only the file of the queue that is measured is ever loaded. */
export const load = async (name: Name): Promise<Peer> => (await import(`./peers/${name}.ts`)).default
