/** The process in which enqueueing is measured, or from which jobs come to a worker that is. */
import { now, sleep } from "./clock.ts"
import { load, type Name, type Payload, type Place, type Producer } from "./peer.ts"
import { ownCpu, peakMemory } from "./usage.ts"

/** What the producer is to do. */
export interface Orders {
  readonly peer: Name
  readonly place: Place
  readonly task:
    /** `count` jobs one by one, `concurrent` at a time. */
    | { readonly kind: "single"; readonly count: number; readonly concurrent: number }
    /** `count` jobs, `chunk` per call, one call after the other. */
    | { readonly kind: "bulk"; readonly count: number; readonly chunk: number }
    /** One job whenever told to. */
    | { readonly kind: "told" }
    /** So many jobs a second, until told to stop. */
    | { readonly kind: "rate"; readonly perSecond: number }
    /** As fast as it goes from so many callers, with a limit for what has not been handled, until told to stop. */
    | { readonly kind: "closed"; readonly callers: number; readonly outstanding: number }
}

/** What it tells. */
export type Told =
  | { readonly ready: true }
  | { readonly sent: number }
  | {
    readonly done: {
      readonly count: number
      readonly elapsed: number
      readonly cpu: number
      readonly peakMemory: number
    }
  }

export const payloadOf = (userId: number): Payload => ({ userId, kind: "email", to: "someone@example.com" })

/** Runs `count` calls, `concurrent` at a time. */
const inParallel = async (count: number, concurrent: number, call: (n: number) => Promise<unknown>) => {
  let next = 0
  await Promise.all(Array.from({ length: concurrent }, async () => {
    while (next < count) await call(next++)
  }))
}

/** Jobs from `from` on in calls of `chunk`. */
export const inBulk = async (
  producer: Producer,
  from: number,
  count: number,
  chunk: number,
  make: (userId: number) => Payload = payloadOf,
  later = false
) => {
  for (let sent = 0; sent < count; sent += chunk) {
    const payloads = Array.from({ length: Math.min(chunk, count - sent) }, (_, n) => make(from + sent + n))
    await producer.bulk(payloads, later)
  }
}

const produce = async (orders: Orders) => {
  const tell = (told: Told) => process.send!(told)
  const { task } = orders
  let sent = 0
  let handled = 0
  let stopping = false
  const producer = await (await load(orders.peer)).produce(orders.place, { kinds: 1, queues: 1 })
  const timed = () => ({ ...payloadOf(sent++), t: now() })
  const go = new Promise<void>((resolve) =>
    process.on("message", (message: "go" | "one" | "stop" | { readonly handled: number }) => {
      if (message === "go") resolve()
      else if (message === "stop") stopping = true
      else if (message === "one") void producer.enqueue(timed())
      else handled = message.handled
    })
  )

  const single = { call: (n: number) => producer.enqueue(payloadOf(n)), warm: 200 }
  if (task.kind === "single") await inParallel(single.warm, task.concurrent, single.call)
  if (task.kind === "bulk") await inBulk(producer, 0, 2 * task.chunk, task.chunk)
  tell({ ready: true })
  await go

  if (task.kind === "single" || task.kind === "bulk") {
    const cpuBefore = ownCpu()
    const begun = now()
    if (task.kind === "single") await inParallel(task.count, task.concurrent, single.call)
    else await inBulk(producer, 0, task.count, task.chunk)
    const elapsed = now() - begun
    const cpu = ownCpu() - cpuBefore
    tell({
      done: {
        // What the database must hold in the end.
        count: task.count + (task.kind === "single" ? single.warm : 2 * task.chunk),
        elapsed,
        cpu,
        peakMemory: peakMemory()
      }
    })
    // With its sessions goes what is known of their CPU time.
    while (!stopping) await sleep(1)
    await producer.close()
    tell({ sent: task.count })
  } else if (task.kind === "rate") {
    const begun = now()
    const pending = new Set<Promise<unknown>>()
    while (!stopping) {
      const due = Math.floor((now() - begun) / 1000 * task.perSecond)
      while (sent < due) {
        const one = producer.enqueue(timed()).finally(() => pending.delete(one))
        pending.add(one)
      }
      await sleep(2)
    }
    await Promise.all(pending)
    tell({ sent })
  } else if (task.kind === "closed") {
    await Promise.all(Array.from({ length: task.callers }, async () => {
      while (!stopping) {
        if (sent - handled >= task.outstanding) await sleep(2)
        else await producer.enqueue(timed())
      }
    }))
    tell({ sent })
  }
}

if (import.meta.main) {
  process.on("disconnect", () => process.exit())
  await produce(JSON.parse(process.argv[2]!))
}
