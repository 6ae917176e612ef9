/** BullMQ on Redis with its default persistence, a snapshot now and then: it may lose the last minutes. */
import { Queue, Worker } from "bullmq"
import { Redis } from "ioredis"
import type { Payload, Peer, Place } from "../peer.ts"

const name = "noop"

const profiles = {
  // The fastest of four settings tried.
  best: { concurrency: 100, removeOnComplete: { count: 0 } },
  kept: { concurrency: 100 },
  slots: { concurrency: 24 },
  stock: {}
}

const connection = (place: Place) => ({ host: "127.0.0.1", port: place.redisPort, maxRetriesPerRequest: null })

const open = async (place: Place) => {
  const queue = new Queue(name, { connection: connection(place) })
  await queue.waitUntilReady()
  return queue
}

export default {
  title: "BullMQ on Redis",
  store: "redis",
  profiles,
  note: "snapshots, no fsync per job",
  install: async (place) => {
    const redis = new Redis(connection(place))
    await redis.flushall()
    await redis.quit()
  },
  produce: async (place) => {
    const queue = await open(place)
    return {
      enqueue: (payload) => queue.add(name, payload),
      bulk: (payloads) => queue.addBulk(payloads.map((data) => ({ name, data }))),
      close: () => queue.close()
    }
  },
  work: async (place, profile, handle) => {
    const worker = new Worker<Payload>(name, async (job) => handle(job.data), {
      connection: connection(place),
      ...profiles[profile]
    })
    worker.on("error", (error) => console.error(error))
    await worker.waitUntilReady()
    return () => worker.close(true)
  },
  unsettled: async (place) => {
    const queue = await open(place)
    const counts = await queue.getJobCounts("waiting", "active", "prioritized", "delayed")
    await queue.close()
    return Object.values(counts).reduce((sum, count) => sum + count, 0)
  }
} satisfies Peer
