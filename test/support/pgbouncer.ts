/** PgBouncer in front of a server of the tests, where it is installed. */
import { Effect, type Scope } from "effect"
import { execFile, spawn } from "node:child_process"
import { accessSync, constants } from "node:fs"
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises"
import { connect, createServer } from "node:net"
import { tmpdir } from "node:os"
import { delimiter, join } from "node:path"
import { promisify } from "node:util"
import { type Owner, serverOwner } from "./embedded.ts"

const run = promisify(execFile)
const host = "127.0.0.1"

/** The program, `undefined` where there is none. Debian keeps it out of a user's PATH. */
export const pgbouncerBinary: string | undefined = [...(process.env["PATH"] ?? "").split(delimiter), "/usr/sbin"]
  .map((folder) => join(folder, "pgbouncer"))
  .find((path) => {
    try {
      accessSync(path, constants.X_OK)
      return true
    } catch {
      return false
    }
  })

/** A running PgBouncer. */
export interface PgBouncer {
  /** The URL of a database, through the pooler. */
  readonly through: (url: string) => string
  /** Lets what has begun end, and holds back everything else. */
  readonly pause: Effect.Effect<void>
  readonly resume: Effect.Effect<void>
  /** Reads its settings again. */
  readonly reload: Effect.Effect<void>
  /** Ends it as a crash would. */
  readonly kill: Effect.Effect<void>
  /** Starts it again on the same port. */
  readonly start: Effect.Effect<void>
  /** What it has written to its log. */
  readonly log: Effect.Effect<string>
}

/** Lines for its configuration. */
export type PgBouncerSettings = Readonly<Record<string, string | number>>

/**
 * Starts PgBouncer in transaction mode in the current scope, in front of the server at `serverUrl`. It ends with the scope,
 * and with this process, whatever ends that.
 */
export const makePgBouncer = Effect.fnUntraced(function*(
  serverUrl: string,
  settings: PgBouncerSettings = {}
): Effect.fn.Return<PgBouncer, never, Scope.Scope> {
  const owner = yield* Effect.promise(() => serverOwner())
  const home = yield* Effect.acquireRelease(
    Effect.promise(() => mkdtemp(join(tmpdir(), "effect-pgqueue-pgbouncer-"))),
    (home) => Effect.promise(() => rm(home, { recursive: true, force: true }))
  )
  const server = new URL(serverUrl)
  const password = decodeURIComponent(server.password)
  const port = yield* Effect.promise(freePort)
  const config = Object.entries({
    listen_addr: host,
    listen_port: port,
    unix_socket_dir: "",
    logfile: join(home, "log"),
    pool_mode: "transaction",
    default_pool_size: 10,
    // By default PgBouncer does not try again for 15 s after a login at the server that failed, and a pause that catches
    // it at one counts as that: every client then waits.
    server_login_retry: 1,
    max_client_conn: 500,
    auth_type: "scram-sha-256",
    auth_file: join(home, "users"),
    ...settings
  }).map(([name, value]) => `${name} = ${value}\n`).join("")
  yield* Effect.promise(async () => {
    await writeFile(
      join(home, "ini"),
      `[databases]\n* = host=${server.hostname} port=${server.port}\n[pgbouncer]\n${config}`
    )
    await writeFile(join(home, "users"), `"${server.username}" "${password}"\n`, { mode: 0o600 })
    if (owner.uid !== undefined) await run("chown", ["-R", `${owner.uid}:${owner.gid}`, home])
  })

  let current: Running | undefined
  const start = Effect.promise(async () => {
    current = await startBinary(owner, home)
    await listening(port)
  })
  const signal = (signal: NodeJS.Signals) => Effect.sync(() => void process.kill(current!.pid, signal))
  yield* Effect.acquireRelease(start, () => Effect.promise(() => current!.end()))
  return {
    through: (url) => {
      const through = new URL(url)
      through.hostname = host
      through.port = String(port)
      return through.href
    },
    pause: signal("SIGUSR1"),
    resume: signal("SIGUSR2"),
    reload: signal("SIGHUP"),
    kill: Effect.promise(() => current!.end()),
    start,
    log: Effect.promise(() => readFile(join(home, "log"), "utf8").catch(() => ""))
  }
})

interface Running {
  readonly pid: number
  readonly end: () => Promise<void>
}

/** A shell waits for the end of its standard input, by `end` or by the end of this process, and then kills it. */
async function startBinary(owner: Owner, home: string): Promise<Running> {
  const script = `"$BINARY" -q "$HOME_DIR/ini" </dev/null >/dev/null 2>&1 &
    echo $!
    while read -r _; do :; done
    kill -9 $!
    wait`
  const child = spawn("sh", ["-c", script], {
    ...owner,
    cwd: home,
    env: { ...process.env, BINARY: pgbouncerBinary, HOME_DIR: home },
    detached: true,
    stdio: ["pipe", "pipe", "ignore"]
  })
  const ended = new Promise<void>((resolve) => child.once("close", () => resolve()))
  const pid = await new Promise<number>((resolve, reject) => {
    child.once("error", reject)
    child.stdout.once("data", (chunk: Buffer) => resolve(Number(chunk.toString("utf8"))))
  })
  return {
    pid,
    end: () => {
      child.stdin.end()
      return ended
    }
  }
}

/** Waits until somebody accepts connections. */
async function listening(port: number): Promise<void> {
  for (let attempt = 0;; attempt++) {
    const connected = await new Promise<boolean>((resolve) => {
      const socket = connect(port, host, () => {
        socket.destroy()
        resolve(true)
      })
      socket.once("error", () => resolve(false))
    })
    if (connected) return
    if (attempt === 200) throw new Error("PgBouncer could not be started")
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
}

function freePort(): Promise<number> {
  return new Promise((resolve, reject) => {
    const server = createServer()
    server.once("error", reject)
    server.listen(0, host, () => {
      const address = server.address()
      server.close(() => typeof address === "object" && address !== null ? resolve(address.port) : reject())
    })
  })
}
