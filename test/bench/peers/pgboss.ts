/** pg-boss. It keeps what it has done. */
import { PgBoss } from "pg-boss"
import { ask } from "../ask.ts"
import { type Payload, type Peer, type Place, poolSize } from "../peer.ts"

const queue = "noop"

const best = {
  boss: { useListenNotify: true },
  // The fastest of six settings tried.
  work: { batchSize: 2000, localConcurrency: 2, burstWhenBatchFull: true, pollingIntervalSeconds: 0.5 }
}

const profiles = {
  best,
  kept: best,
  slots: {
    boss: { useListenNotify: true, max: 25 },
    work: { batchSize: 1, localConcurrency: 24, pollingIntervalSeconds: 0.5, notifyPollingIntervalSeconds: 0.5 }
  },
  // One job every two seconds, as documented.
  stock: { boss: {}, work: {} }
}

const start = async (place: Place, options: object) => {
  const boss = new PgBoss({ connectionString: place.postgres, ...options })
  boss.on("error", (error) => console.error(error))
  await boss.start()
  return boss
}

export default {
  title: "pg-boss",
  store: "postgres",
  profiles,
  note: "keeps finished jobs in every profile",
  install: async (place) => {
    const boss = await start(place, { supervise: false, schedule: false })
    await boss.createQueue(queue, { notify: true })
    await boss.stop({ graceful: false })
  },
  produce: async (place) => {
    const boss = await start(place, { supervise: false, schedule: false, max: poolSize })
    return {
      enqueue: (payload) => boss.send(queue, payload),
      bulk: (payloads) => boss.insert(queue, payloads.map((data) => ({ data }))),
      close: () => boss.stop({ graceful: false })
    }
  },
  work: async (place, profile, handle) => {
    const { boss: options, work } = profiles[profile]
    const boss = await start(place, options)
    await boss.work<Payload>(queue, work, async (jobs) => {
      for (const job of jobs) handle(job.data)
    })
    return () => boss.stop({ graceful: false })
  },
  unsettled: async (place) =>
    (await ask<{ n: number }>(
      place.postgres,
      "select count(*)::int as n from pgboss.job where name = 'noop' and state < 'completed'"
    ))[0]!.n
} satisfies Peer
