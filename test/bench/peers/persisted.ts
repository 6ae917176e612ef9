/** Effect's PersistedQueue over SQL. It keeps what it has done, and has no bulk enqueue. */
import { PgClient } from "@effect/sql-pg"
import { Duration, Effect, Fiber, Layer, ManagedRuntime, Redacted, References, Schema } from "effect"
import * as PersistedQueue from "effect/persistence/PersistedQueue"
import { ask } from "../ask.ts"
import { type Peer, type Place, poolSize } from "../peer.ts"

// The fastest of five settings tried.
const best = { takers: 500, pollMillis: 10, client: { maxConnections: 20 } }

const profiles = {
  best,
  kept: best,
  slots: { takers: 24, pollMillis: 1000, client: { maxConnections: 25 } },
  stock: { takers: 1, pollMillis: 1000, client: {} }
}

const runtimeAt = (place: Place, pollMillis: number, client: object) =>
  ManagedRuntime.make(
    PersistedQueue.layer.pipe(
      Layer.provide(PersistedQueue.layerStoreSql({ pollInterval: Duration.millis(pollMillis) })),
      Layer.provide(PgClient.layer({ url: Redacted.make(place.postgres), ...client })),
      Layer.provideMerge(Layer.succeed(References.MinimumLogLevel, "Warn"))
    )
  )

const make = PersistedQueue.make({
  name: "noop",
  schema: Schema.Struct({
    userId: Schema.Int,
    kind: Schema.String,
    to: Schema.String,
    t: Schema.optionalKey(Schema.Finite),
    pad: Schema.optionalKey(Schema.String)
  })
})

export default {
  title: "Effect PersistedQueue",
  store: "postgres",
  profiles,
  note: "keeps finished jobs in every profile; bulk is SQL by hand",
  install: async (place) => {
    const runtime = runtimeAt(place, 1000, {})
    await runtime.runPromise(make)
    await runtime.dispose()
  },
  produce: async (place) => {
    const runtime = runtimeAt(place, 1000, { maxConnections: poolSize })
    const queue = await runtime.runPromise(make)
    return {
      enqueue: (payload) => runtime.runPromise(queue.offer(payload)),
      bulk: (payloads) =>
        ask(
          place.postgres,
          `insert into effect_queue (id, queue_name, element, state, attempts, visible_at, created_at, updated_at)
           select gen_random_uuid()::text, 'noop', p, 'pending', 0, now(), now(), now() from unnest($1::text[]) p`,
          [payloads.map((payload) => JSON.stringify(payload))]
        ),
      close: () => runtime.dispose()
    }
  },
  work: async (place, profile, handle) => {
    const { client, pollMillis, takers } = profiles[profile]
    const runtime = runtimeAt(place, pollMillis, client)
    const queue = await runtime.runPromise(make)
    const taker = Effect.forever(queue.take((payload) => Effect.sync(() => handle(payload))))
    const fiber = runtime.runFork(
      Effect.forEach(Array.from({ length: takers }), () => taker, { concurrency: "unbounded", discard: true })
    )
    return async () => {
      await Effect.runPromise(Fiber.interrupt(fiber))
      await runtime.dispose()
    }
  },
  unsettled: async (place) =>
    (await ask<{ n: number }>(
      place.postgres,
      "select count(*)::int as n from effect_queue where state <> 'completed'"
    ))[0]!.n
} satisfies Peer
