/** Worker processes: real ones, started and stopped as an orchestrator would. */
import { Effect, Stream } from "effect"
import { ChildProcess } from "effect/process"
import { fileURLToPath } from "node:url"
import { DatabaseUrl, DemoFailed } from "./database.ts"
import { View } from "./view.ts"

const program = fileURLToPath(new URL("worker.ts", import.meta.url))

/** Starts a worker process, which is stopped at the latest when the scope closes. */
export const startWorker = Effect.fn("startWorker")(function*() {
  const view = yield* View
  const worker = yield* ChildProcess.make(process.execPath, [program], {
    env: { DATABASE_URL: yield* DatabaseUrl },
    extendEnv: true,
    forceKillAfter: "15 seconds"
  })
  // It has nothing to say unless something is wrong.
  yield* worker.all.pipe(
    Stream.decodeText(),
    Stream.splitLines,
    Stream.runForEach((line) => view.line(`  worker ${worker.pid}: ${line}`)),
    Effect.ignore,
    Effect.forkScoped
  )
  return {
    pid: worker.pid,
    /** Fails when the process ends. */
    neverEnds: Effect.flatMap(
      Effect.exit(worker.exitCode),
      () => new DemoFailed({ message: `the worker process ${worker.pid} ended by itself` })
    ),
    /** Sends SIGTERM and returns the exit code. */
    stop: Effect.andThen(worker.kill(), worker.exitCode)
  }
})
