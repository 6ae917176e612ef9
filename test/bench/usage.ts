/** What processes have used, from /proc; nothing where there is none. */
import { readdirSync, readFileSync } from "node:fs"
import { join } from "node:path"

/** The most memory this process has held, in MB. */
export const peakMemory = (): number => {
  try {
    const found = /^VmHWM:\s+(\d+) kB/m.exec(readFileSync("/proc/self/status", "utf8"))
    if (found !== null) return Math.round(Number(found[1]) / 1024)
  } catch {}
  return Math.round(process.resourceUsage().maxRSS / 1024)
}

/** CPU time of this process, in milliseconds. */
export const ownCpu = (): number => {
  const { system, user } = process.cpuUsage()
  return (system + user) / 1000
}

/** The fields of a process after its name, from the state on. */
const statOf = (pid: string): ReadonlyArray<string> | undefined => {
  try {
    const text = readFileSync(`/proc/${pid}/stat`, "utf8")
    return text.slice(text.lastIndexOf(")") + 2).split(" ")
  } catch {
    return undefined
  }
}

const ticksPerSecond = 100

/** CPU time of a process and its children, the ended ones too, in milliseconds. */
export const cpuOf = (pid: number): number | undefined => {
  let ticks = 0
  let processes: ReadonlyArray<string>
  try {
    processes = readdirSync("/proc").filter((name) => /^\d+$/.test(name))
  } catch {
    return undefined
  }
  for (const name of processes) {
    const stat = statOf(name)
    if (stat === undefined) continue
    const used = (from: number, to: number) => stat.slice(from, to).reduce((sum, field) => sum + Number(field), 0)
    if (Number(name) === pid) ticks += used(11, 15)
    else if (Number(stat[1]) === pid) ticks += used(11, 13)
  }
  return ticks * 1000 / ticksPerSecond
}

/** The process that a PostgreSQL data directory belongs to. */
export const postmasterOf = (dataDir: string): number =>
  Number(readFileSync(join(dataDir, "postmaster.pid"), "utf8").split("\n")[0])
