/** A process that belongs to a measurement: started, listened to, and gone at its end. */
import { type ChildProcess, fork } from "node:child_process"
import { extname, join } from "node:path"

const children = new Set<ChildProcess>()

type Field<T> = T extends unknown ? keyof T : never
type ValueOf<T, K extends PropertyKey> = Extract<T, Readonly<Record<K, unknown>>>[K]

/** A running child that tells messages of type `T`. */
export interface Child<T> {
  readonly send: (message: unknown) => void
  /** The next message with this field; nothing when it takes longer, an error when the process ends before. */
  readonly within: <K extends Field<T>>(millis: number, field: K) => Promise<ValueOf<T, K> | undefined>
  /** The same, but an error when it takes longer. */
  readonly next: <K extends Field<T>>(field: K, millis: number) => Promise<ValueOf<T, K>>
  /** Calls back for every message. */
  readonly on: (listen: (message: T) => void) => void
  readonly end: () => void
}

/** Where CPU profiles go, if somebody has asked for them. */
const profiles = process.env["BENCH_CPU_PROF"]

/** Starts a program of this folder, compiled as this one is, with its orders. */
export const start = <T extends object>(program: "worker" | "producer", orders: object): Child<T> => {
  const file = program + extname(import.meta.filename)
  const child = fork(join(import.meta.dirname, file), [JSON.stringify(orders)], {
    stdio: ["ignore", 2, 2, "ipc"],
    serialization: "advanced",
    execArgv: profiles === undefined ? [] : ["--cpu-prof", `--cpu-prof-dir=${profiles}`]
  })
  children.add(child)
  child.once("exit", () => children.delete(child))
  // The last message of each field that nobody has waited for yet.
  const inbox = new Map<string, unknown>()
  child.on("message", (message: object) => {
    for (const [field, value] of Object.entries(message)) inbox.set(field, value)
  })
  const within = (millis: number, field: PropertyKey) =>
    new Promise<unknown>((resolve, reject) => {
      const finish = (settle: () => void) => {
        clearTimeout(timer)
        child.off("message", listen)
        child.off("exit", gone)
        settle()
      }
      const listen = () => {
        if (!inbox.has(String(field))) return
        const value = inbox.get(String(field))
        inbox.delete(String(field))
        finish(() => resolve(value))
      }
      const gone = () => finish(() => reject(new Error(`${file} ended with ${child.signalCode ?? child.exitCode}`)))
      const timer = setTimeout(() => finish(() => resolve(undefined)), millis)
      child.on("message", listen)
      child.once("exit", gone)
      listen()
      if (child.exitCode !== null || child.signalCode !== null) gone()
    })
  // Sound, twice: what came under a field is of the type that the messages have there.
  return {
    send: (message) => {
      if (child.connected) child.send(message as object)
    },
    within: (millis, field) => within(millis, field) as Promise<never>,
    next: async (field, millis) => {
      const value = await within(millis, field)
      if (value === undefined) throw new Error(`no "${String(field)}" of ${file} within ${millis} ms`)
      return value as never
    },
    on: (listen) => void child.on("message", (message) => listen(message as T)),
    end: () => {
      if (child.connected) child.disconnect()
    }
  }
}

/** Ends all that still run, and waits until they are gone. */
export const endAll = async (): Promise<void> => {
  await Promise.all([...children].map((child) =>
    new Promise<void>((resolve) => {
      const timer = setTimeout(() => child.kill("SIGKILL"), 5000)
      child.once("exit", () => {
        clearTimeout(timer)
        resolve()
      })
      // They exit when nobody is there any more.
      if (child.connected) child.disconnect()
    })
  ))
}
