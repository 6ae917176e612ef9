/**
 * One measurement, in a process of its own: a fresh database, the children that are measured, one line of JSON.
 *
 * This process fills, waits and checks; it is not measured itself.
 */
import { ask } from "./ask.ts"
import { type Bench, plain, refuse, type Values } from "./bench.ts"
import * as Child from "./child.ts"
import { sleep } from "./clock.ts"
import { caseNamed } from "./modes.ts"
import { load, type Name, type Place } from "./peer.ts"
import type * as Producing from "./producer.ts"
import type { Server } from "./server.ts"
import { cpuOf, postmasterOf } from "./usage.ts"
import type * as Working from "./worker.ts"

/** What to measure. */
export interface Orders {
  readonly case: string
  readonly peer: Name
  readonly scale: number
  readonly server: Server
  readonly redisPort: number
}

const benchOf = async (orders: Orders, place: Place): Promise<Bench> => {
  const peer = await load(orders.peer)
  const child = { peer: orders.peer, place }
  return {
    peer,
    place,
    server: orders.server,
    jobs: (count, least = 100) => Math.max(least, Math.round(count * orders.scale)),
    seconds: (seconds, least) => Math.max(least, seconds * orders.scale),
    worker: (profile, { logged = false, shape = plain, ...rest } = {}) =>
      Child.start<Working.Told>("worker", {
        ...child,
        ...(logged ? { place: { ...place, postgres: asLogged(place.postgres, orders.server) } } : {}),
        profile,
        shape,
        ...rest
      }),
    producer: (task) => Child.start<Producing.Told>("producer", { ...child, task }),
    serverCpu: () => peer.store === "redis" ? NaN : cpuOf(postmasterOf(orders.server.dataDir)) ?? NaN,
    vacuum: async () => {
      if (peer.store === "postgres") await ask(place.postgres, "vacuum analyze")
    },
    holds: async (count) => {
      const held = await peer.unsettled(place)
      if (held !== count) refuse(`${count} jobs were enqueued, ${held} are there`)
    },
    settles: async () => {
      const begun = performance.now()
      while (true) {
        const left = await peer.unsettled(place)
        if (left === 0) return performance.now() - begun
        if (performance.now() - begun > 10_000) refuse(`${left} jobs are not settled`)
        await sleep(20)
      }
    }
  }
}

/** The same place as the role whose statements the server logs. */
const asLogged = (url: string, server: Server): string => {
  const logged = new URL(url)
  logged.username = server.loggedRole
  return String(logged)
}

const measure = async (orders: Orders): Promise<Values> => {
  const database = `bench_${process.pid}`
  await ask(orders.server.url, `create database ${database}`)
  const url = new URL(orders.server.url)
  url.pathname = `/${database}`
  const place: Place = { postgres: String(url), redisPort: orders.redisPort }
  try {
    const bench = await benchOf(orders, place)
    await bench.peer.install(place)
    // Nobody pays for what the one before has left to be written.
    await ask(orders.server.url, "checkpoint")
    return await caseNamed(orders.case).run(bench)
  } finally {
    await Child.endAll()
    // Some close their connections a little later than they say.
    await sleep(100)
    await ask(orders.server.url, `drop database ${database} with (force)`)
  }
}

if (import.meta.main) {
  process.on("disconnect", () => process.exit())
  const orders: Orders = JSON.parse(process.argv[2]!)
  const outcome = await measure(orders).then(
    (values) => ({ values }),
    (error: unknown) => ({ failed: error instanceof Error ? error.message : String(error) })
  )
  process.stdout.write(JSON.stringify(outcome) + "\n", () => process.exit())
}
