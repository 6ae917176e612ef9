/** This library, by its documented options. */
import { PgClient } from "@effect/sql-pg"
import { Effect, Layer, ManagedRuntime, Redacted, References, Schema } from "effect"
import { Job, JobQueue, Worker } from "../../../src/index.ts"
import type { Payload, Peer, Place, Profile, Shape } from "../peer.ts"

const payload = {
  userId: Schema.Int,
  kind: Schema.String,
  to: Schema.String,
  t: Schema.optionalKey(Schema.Finite),
  pad: Schema.optionalKey(Schema.String)
}

/** Definition number 0 is what everything but "many queues" and "many kinds" uses. */
const definitions = ({ kinds, queues }: Shape, keepCompleted = true) =>
  Array.from(
    { length: Math.max(kinds, queues) },
    (_, n) =>
      Job.make(n === 0 ? "noop" : `noop-${n}`, {
        payload,
        queue: n < queues && n > 0 ? `queue-${n}` : "default",
        keepCompleted
      })
  )

const queueAt = (place: Place) =>
  JobQueue.layer().pipe(
    Layer.provide(PgClient.layer({ url: Redacted.make(place.postgres) })),
    Layer.provideMerge(Layer.succeed(References.MinimumLogLevel, "Warn"))
  )

/** What the worker is told, and its definitions. */
interface Settings {
  readonly concurrency?: number
  readonly keepCompleted?: boolean
}

const profiles: Readonly<Record<Profile, Settings>> = {
  // The middle one of three that were equally fast: 100, 500 and 1 500.
  best: { concurrency: 500, keepCompleted: false },
  kept: { concurrency: 500 },
  slots: { concurrency: 24 },
  stock: {}
}

export default {
  title: "effect-pgqueue",
  store: "postgres",
  profiles,
  note: "finished jobs are kept, but not with the best settings",
  install: async (place) => {
    const runtime = ManagedRuntime.make(queueAt(place))
    await runtime.runPromise(JobQueue)
    await runtime.dispose()
  },
  produce: async (place, shape) => {
    const jobs = definitions(shape)
    const runtime = ManagedRuntime.make(queueAt(place))
    await runtime.runPromise(JobQueue)
    let calls = 0
    const next = () => jobs[calls++ % jobs.length]!
    return {
      enqueue: (payload) => runtime.runPromise(next().enqueue(payload)),
      bulk: (payloads, later) =>
        runtime.runPromise(next().enqueueAll(payloads, later === true ? { delay: "1 day", priority: "high" } : {})),
      close: () => runtime.dispose()
    }
  },
  work: async (place, profile, handle, shape) => {
    const { keepCompleted, ...settings } = profiles[profile]
    const jobs = definitions(shape, keepCompleted)
    const handler = (payload: Payload) => Effect.sync(() => handle(payload))
    const [first, ...others] = jobs.map((job) => job.toLayer(handler))
    const runtime = ManagedRuntime.make(
      Worker.layer({ jobs, ...settings }).pipe(
        Layer.provide(Layer.mergeAll(first!, ...others)),
        Layer.provide(queueAt(place))
      )
    )
    await runtime.runPromise(Effect.void)
    return () => runtime.dispose()
  },
  unsettled: async (place) => {
    const runtime = ManagedRuntime.make(queueAt(place))
    const stats = await runtime.runPromise(Effect.flatMap(JobQueue, (queue) => queue.stats))
    await runtime.dispose()
    return stats.reduce((sum, row) => sum + row.available + row.scheduled + row.retryable + row.running, 0)
  },
  claim: /^with me as materialized[^]*insert into "pgqueue"\.lease/
} satisfies Peer
