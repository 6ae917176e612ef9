/** Programs of `test/programs` as processes of their own. They die with the scope, and with the test run. */
import { Clock, Deferred, Effect, type Scope } from "effect"
import { type ChildProcess, spawn } from "node:child_process"
import { readdirSync, readFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import type { WorkerProgram } from "../programs/worker.ts"

/** How a process ended, and when by the monotonic clock, in milliseconds. */
export interface Ended {
  readonly code: number | null
  readonly signal: NodeJS.Signals | null
  readonly at: number
}

/** A running program. */
export interface Program {
  readonly pid: number
  readonly kill: (signal: NodeJS.Signals) => Effect.Effect<void>
  /** Waits for the end of the process. */
  readonly ended: Effect.Effect<Ended>
  readonly running: () => boolean
  /** What it has written so far. */
  readonly output: () => string
}

const stop = (child: ChildProcess, ended: Deferred.Deferred<Ended>) =>
  Effect.suspend(() => {
    child.kill("SIGKILL")
    return Effect.timeoutOption(Deferred.await(ended), "5 seconds")
  })

/** Starts a program; `ready` waits until it says that it is. */
const spawnProgram = Effect.fnUntraced(function*(
  file: string,
  options: object,
  nodeOptions: ReadonlyArray<string>,
  through: ReadonlyArray<string> = []
): Effect.fn.Return<Program & { readonly ready: Effect.Effect<void> }, never, Scope.Scope> {
  const clock = yield* Clock.Clock
  const ended = yield* Deferred.make<Ended>()
  const ready = yield* Deferred.make<void>()
  let output = ""
  let running = true
  const command = [...through, process.execPath, ...nodeOptions, join(import.meta.dirname, "..", "programs", file)]
  const child = yield* Effect.acquireRelease(
    Effect.sync(() =>
      spawn(
        command[0]!,
        [...command.slice(1), JSON.stringify(options)],
        {
          // The channel is what it dies of when this process does.
          stdio: ["ignore", "pipe", "pipe", "ipc"],
          // Most of a start is to compile what has not changed: 1.0 s of a core without, 0.4 s with what others have left.
          env: { NODE_COMPILE_CACHE: join(tmpdir(), "effect-pgqueue-compiled"), ...process.env }
        }
      )
    ),
    (child) => stop(child, ended)
  )
  const hear = (chunk: Buffer) => {
    output = (output + chunk.toString("utf8")).slice(-100_000)
  }
  child.stdout?.on("data", hear)
  child.stderr?.on("data", hear)
  child.on("message", () => Deferred.doneUnsafe(ready, Effect.void))
  child.on("error", (error) => Deferred.doneUnsafe(ready, Effect.die(error)))
  child.on("exit", (code, signal) => {
    running = false
    const at = Number(clock.monotonicTimeNanosUnsafe()) / 1_000_000
    Deferred.doneUnsafe(ended, Effect.succeed({ code, signal, at }))
    Deferred.doneUnsafe(ready, Effect.die(new Error(`${file} ended with ${code ?? signal}:\n${output}`)))
  })
  return {
    pid: child.pid!,
    kill: (signal) => Effect.sync(() => child.kill(signal)),
    ended: Deferred.await(ended),
    running: () => running,
    output: () => output,
    ready: Effect.timeoutOrElse(Deferred.await(ready), {
      duration: "30 seconds",
      orElse: () => Effect.die(new Error(`${file} is not ready:\n${output}`))
    })
  }
})

/** Starts a program and waits until it says that it is ready; `through` is a command that becomes it. */
export const startProgram = Effect.fnUntraced(function*(
  file: string,
  options: object,
  through?: ReadonlyArray<string>
): Effect.fn.Return<Program, never, Scope.Scope> {
  const program = yield* spawnProgram(file, options, [], through)
  yield* program.ready
  return program
})

/** Starts a worker process. */
export const startWorker = (options: WorkerProgram) => startProgram("worker.ts", options)

/** A process that is started again whenever it ends, as a supervisor would. */
export interface Kept {
  /** The process of the moment; one that has just ended counts until the next one is there. */
  readonly current: () => Program
  /** How the processes before it have ended. */
  readonly ends: () => ReadonlyArray<Ended>
  /** It is not to be started again. */
  readonly letGo: () => void
}

/** Keeps a program running in the current scope. It may end before it is ready: a job may be the reason. */
export const keepProgram = Effect.fnUntraced(function*(
  file: string,
  options: object,
  nodeOptions: ReadonlyArray<string> = [],
  onStart: (program: Program) => void = () => {}
): Effect.fn.Return<Kept, never, Scope.Scope> {
  const ends: Array<Ended> = []
  const first = yield* Deferred.make<void>()
  let current: Program | undefined
  let kept = true
  const life = Effect.scoped(Effect.gen(function*() {
    current = yield* spawnProgram(file, options, nodeOptions)
    onStart(current)
    yield* Deferred.succeed(first, undefined)
    ends.push(yield* current.ended)
  }))
  yield* Effect.forkScoped(Effect.gen(function*() {
    while (kept) yield* life
  }))
  yield* Deferred.await(first)
  return {
    current: () => current!,
    ends: () => [...ends],
    letGo: () => {
      kept = false
    }
  }
})

/** Keeps a worker process running. */
export const keepWorker = (options: WorkerProgram, nodeOptions: ReadonlyArray<string> = []) =>
  keepProgram("worker.ts", options, nodeOptions)

/** Every process of a PostgreSQL server, the postmaster first. */
export const serverProcesses = (dataDir: string): ReadonlyArray<number> => {
  const postmaster = Number(readFileSync(join(dataDir, "postmaster.pid"), "utf8").split("\n")[0])
  const children = readdirSync("/proc").filter((name) => /^\d+$/.test(name)).map(Number).filter((pid) => {
    try {
      return Number(readFileSync(`/proc/${pid}/stat`, "utf8").replace(/^.*\) /s, "").split(" ")[1]) === postmaster
    } catch {
      return false
    }
  })
  return [postmaster, ...children]
}
