/** BullMQ on PostgreSQL. */
import { createPostgresBackend, withBackend } from "bullmq"
import { type Payload, type Peer, type Place, poolSize } from "../peer.ts"

const { Queue, Worker } = withBackend(createPostgresBackend)
const name = "noop"

const profiles = {
  // Nothing was searched for here: three times its connections.
  best: { concurrency: 32, removeOnComplete: { count: 0 } },
  kept: { concurrency: 32 },
  slots: { concurrency: 24 },
  stock: {}
}

const connection = (place: Place) => ({ connectionString: place.postgres, schema: "bullmq", max: poolSize })

const open = async (place: Place) => {
  const queue = new Queue(name, { connection: connection(place) })
  await queue.waitUntilReady()
  return queue
}

export default {
  title: "BullMQ on PostgreSQL",
  store: "postgres",
  profiles,
  install: async (place) => {
    const queue = new Queue(name, { connection: { ...connection(place), migrate: true } })
    await queue.waitUntilReady()
    await queue.close()
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
    const worker = new Worker(name, async (job: { readonly data: Payload }) => handle(job.data), {
      connection: connection(place),
      ...profiles[profile]
    })
    worker.on("error", (error: Error) => console.error(error))
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
