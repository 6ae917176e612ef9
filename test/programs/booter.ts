/**
 * A process that starts queues on one database after the other, each at a word: it waits for a lock that the test holds.
 * Its options are JSON in the first argument; it says "ready" and dies with its parent.
 */
import * as PgClient from "@effect/sql-pg/PgClient"
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Layer from "effect/Layer"
import * as Redacted from "effect/Redacted"
import * as References from "effect/References"
import { JobQueue } from "../../src/index.ts"
import { ready } from "./ready.ts"

/** What the tests may say of a booter. */
export interface BooterProgram {
  /** Where the locks and the table `public.booted` are. */
  readonly controlUrl: string
  readonly name: string
  /** The databases of the rounds. */
  readonly urls: ReadonlyArray<string>
  /** How many queues it starts at once, each with a client of its own. */
  readonly queues: number
}

process.on("disconnect", () => process.kill(process.pid, "SIGKILL"))

// Sound: the tests write it from the same type.
const { controlUrl, name, queues, urls } = JSON.parse(process.argv[2]!) as BooterProgram

const boot = (url: string) =>
  Effect.gen(function*() {
    const begun = performance.now()
    const exit = yield* Effect.exit(Effect.scoped(Layer.build(Layer.fresh(
      JobQueue.layer({ onUnavailable: "fail" }).pipe(
        Layer.provide(PgClient.layer({ url: Redacted.make(url), applicationName: name, maxConnections: 1 }))
      )
    ))))
    return { took: performance.now() - begun, error: Exit.isFailure(exit) ? Cause.pretty(exit.cause) : null }
  })

const main = Effect.gen(function*() {
  const control = yield* PgClient.PgClient
  ready()
  for (const [round, url] of urls.entries()) {
    yield* control`select pg_advisory_lock_shared(${round}), pg_advisory_unlock_shared(${round})`
    const booted = yield* Effect.all(Array.from({ length: queues }, () => boot(url)), { concurrency: "unbounded" })
    for (const { error, took } of booted) {
      yield* control`insert into public.booted (round, took, error) values (${round}, ${took}::float8, ${error}::text)`
    }
  }
})

await Effect.runPromise(
  main.pipe(
    Effect.provide(
      PgClient.layer({ url: Redacted.make(controlUrl), applicationName: `control ${name}`, maxConnections: 1 })
    ),
    Effect.provideService(References.MinimumLogLevel, "Warn")
  )
)
process.exit(0)
