/** graphile-worker. It deletes what it has done, and cannot keep it. */
import { Logger, makeWorkerUtils, run } from "graphile-worker"
import { Pool } from "pg"
import { ask } from "../ask.ts"
import { type Payload, type Peer, poolSize } from "../peer.ts"

const logger = new Logger(() => () => {})

const profiles = {
  // Its documentation on performance; localQueue sizes of 2 000 were no faster.
  best: {
    concurrentJobs: 24,
    maxPoolSize: 25,
    localQueue: { size: 500 },
    completeJobBatchDelay: 0,
    failJobBatchDelay: 0
  },
  slots: { concurrentJobs: 24, maxPoolSize: 25 },
  stock: {}
}

export default {
  title: "graphile-worker",
  store: "postgres",
  profiles,
  note: "deletes finished jobs",
  install: async (place) => {
    const utils = await makeWorkerUtils({ connectionString: place.postgres, logger })
    await utils.migrate()
    await utils.release()
  },
  produce: async (place) => {
    const pgPool = new Pool({ connectionString: place.postgres, max: poolSize })
    pgPool.on("error", (error) => console.error(error))
    pgPool.on("connect", (client) => void client.on("error", (error) => console.error(error)))
    const utils = await makeWorkerUtils({ pgPool, logger })
    return {
      enqueue: (payload) => utils.addJob("noop", payload),
      bulk: (payloads) => utils.addJobs(payloads.map((payload) => ({ identifier: "noop", payload }))),
      close: async () => {
        await utils.release()
        await pgPool.end()
      }
    }
  },
  work: async (place, profile, handle) => {
    const runner = await run({
      noHandleSignals: true,
      preset: { worker: { connectionString: place.postgres, logger, ...profiles[profile as keyof typeof profiles] } },
      taskList: { noop: (payload) => handle(payload as Payload) }
    })
    return () => runner.stop()
  },
  unsettled: async (place) =>
    (await ask<{ n: number }>(place.postgres, "select count(*)::int as n from graphile_worker._private_jobs"))[0]!.n
} satisfies Peer
