/** The servers of a run: durable PostgreSQL with the same settings for all, and Redis where it is installed. */
import { execFile, spawn, spawnSync } from "node:child_process"
import { rmSync } from "node:fs"
import { mkdtemp, statfs } from "node:fs/promises"
import { createServer } from "node:net"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { promisify } from "node:util"
import { type PostgresVersion, startPostgres } from "../support/embedded.ts"
import { ask } from "./ask.ts"
import { sleep } from "./clock.ts"

/** A running PostgreSQL, as a measurement needs to know it. */
export interface Server {
  readonly url: string
  readonly dataDir: string
  readonly logFile: string
  /** A role like any other, but the server logs how long each of its statements takes. */
  readonly loggedRole: string
}

/** Which PostgreSQL a case runs on. */
export interface Kind {
  readonly version: PostgresVersion
  /** Whether it counts statements, which costs a little. */
  readonly counting: boolean
}

/** What differs from the defaults. `fsync`, `synchronous_commit` and `full_page_writes` are on, as they are by default. */
export const settings = {
  shared_buffers: "1GB",
  max_wal_size: "4GB",
  min_wal_size: "1GB",
  checkpoint_timeout: "15min",
  jit: "off"
}

/** Starts servers as they are asked for, one at a time. */
export const makeServers = () => {
  let running: { readonly kind: string; readonly server: Server; readonly stop: () => Promise<void> } | undefined

  const stop = async () => {
    await running?.stop()
    running = undefined
  }

  const get = async ({ counting, version }: Kind): Promise<Server> => {
    const kind = `${version} ${counting}`
    if (running?.kind === kind) return running.server
    await stop()
    const postgres = await startPostgres({
      version,
      settings: {
        ...settings,
        fsync: "on",
        synchronous_commit: "on",
        log_line_prefix: "%n %p ",
        log_parameter_max_length: 0,
        ...(counting ? { shared_preload_libraries: "pg_stat_statements" } : {})
      }
    })
    const loggedRole = "logged"
    const { password } = new URL(postgres.url)
    await ask(postgres.url, `create role ${loggedRole} superuser login password '${password}'`)
    await ask(postgres.url, `alter role ${loggedRole} set log_min_duration_statement = 0`)
    if (counting) await ask(postgres.url, "create extension pg_stat_statements")
    const { dataDir, logFile, url } = postgres
    running = { kind, server: { url, dataDir, logFile, loggedRole }, stop: postgres.stop }
    return running.server
  }

  return { get, stop }
}

/** Where PostgreSQL keeps its data is memory: nothing that is measured there says anything about disks. */
export const onMemory = async (): Promise<boolean> => (await statfs(tmpdir())).type === 0x01021994

/** Whether there is a Redis to start. */
export const hasRedis = (): boolean => spawnSync("redis-server", ["--version"]).status === 0

const freePort = (): Promise<number> =>
  new Promise((resolve, reject) => {
    const server = createServer()
    server.once("error", reject)
    server.listen(0, "127.0.0.1", () => {
      const address = server.address()
      server.close(() => typeof address === "object" && address !== null ? resolve(address.port) : reject())
    })
  })

/** Starts a Redis with the persistence that it has by default. */
export const startRedis = async () => {
  const port = await freePort()
  const home = await mkdtemp(join(tmpdir(), "effect-pgqueue-redis-"))
  const persistence = ["--save", "3600 1 300 100 60 10000", "--maxmemory-policy", "noeviction"]
  const server = spawn(
    "redis-server",
    ["--port", String(port), "--bind", "127.0.0.1", "--dir", home, ...persistence],
    { stdio: "ignore" }
  )
  const kill = () => {
    server.kill("SIGKILL")
    rmSync(home, { recursive: true, force: true })
  }
  process.once("exit", kill)
  const ping = () => promisify(execFile)("redis-cli", ["-p", String(port), "ping"])
  for (let tries = 0;; tries++) {
    await sleep(100)
    if (await ping().then(({ stdout }) => stdout.trim() === "PONG", () => false)) break
    if (tries === 50) throw new Error("redis-server did not start")
  }
  return {
    port,
    stop: async () => {
      process.off("exit", kill)
      const gone = new Promise((resolve) => server.once("exit", resolve))
      kill()
      await gone
    }
  }
}
