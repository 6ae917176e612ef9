/** Half an hour of mixed load, in which everything happens to everybody; `npm run faults:soak`. */
import { assert } from "@effect/vitest"
import { Clock, Effect, Fiber, Random } from "effect"
import { now, until } from "../support/queue.ts"
import { theirs } from "./invariants.ts"
import { scenarios } from "./scenario.ts"
import type { Actor } from "./stage.ts"

const minutes = 30
/** How long processes may grow before they are measured, in milliseconds. */
const warmUp = 6 * 60_000

const any = <A>(from: ReadonlyArray<A>): A => from[Math.floor(Math.random() * from.length)]!

/**
 * What a process has said of its memory, in bytes. What V8 compiles is looked at, and not judged: it compiles, and forgets,
 * for as long as there are paths that are seldom taken.
 */
const memoryOf = (actor: Actor, from: number) =>
  [...actor.output().matchAll(/^memory (\d+) (\d+) (\d+)$/gm)]
    .map(([, at, size, withCode]) => ({ at: Number(at), size: Number(size), withCode: Number(withCode) }))
    .filter(({ at }) => at >= from)

/** How many MiB an hour a straight line through the samples rises. */
const slopeOf = (samples: ReadonlyArray<readonly [at: number, size: number]>): number => {
  const mean = (values: ReadonlyArray<number>) => values.reduce((sum, value) => sum + value, 0) / values.length
  const [at, size] = [mean(samples.map(([at]) => at)), mean(samples.map(([, size]) => size))]
  const above = samples.reduce((sum, [x, y]) => sum + (x - at) * (y - size), 0)
  return above / samples.reduce((sum, [x]) => sum + (x - at) ** 2, 0) * 3_600_000 / 1024 / 1024
}

scenarios("a soak", (scenario) => {
  scenario("soak", "everything at once, for long", { minutes: minutes + 10 }, (stage) =>
    Effect.gen(function*() {
      const cast = yield* stage.fleet({ settings: { tellsMemory: true } })
      /** These are never killed, so that their memory can be measured. */
      const measured = [cast.workers[0]!, cast.schedulers[0]!]
      const begun = yield* now
      const end = begun + minutes * 60_000
      const warm = (yield* Clock.currentTimeMillis) + warmUp
      const files = new Map<Actor, Array<number>>(measured.map((actor) => [actor, []]))
      const tables: Array<number> = []
      const backlog: Array<number> = []
      const watching = yield* Effect.forkChild(Effect.gen(function*() {
        while ((yield* now) < end) {
          const at = (yield* now) - begun
          if (at > warmUp) {
            for (const actor of measured) files.get(actor)!.push(actor.files())
            tables.push(
              yield* stage.value(
                "select (pg_relation_size('pgqueue.ready') + pg_relation_size('pgqueue.lease') + pg_relation_size('pgqueue.worker'))::float8"
              )
            )
            backlog.push(yield* stage.value("select count(*)::int from pgqueue.job"))
          }
          yield* Effect.sleep(2000)
        }
      }))

      const mortal: Array<Actor> = [...cast.workers.slice(1), ...cast.schedulers.slice(1)]
      let deeds = 0
      const replace = Effect.fnUntraced(function*(how: NodeJS.Signals) {
        const victim = any(mortal)
        mortal.splice(mortal.indexOf(victim), 1)
        if (how === "SIGTERM") {
          const { code } = yield* victim.end()
          assert.strictEqual(code, 0, victim.output())
        } else yield* victim.kill(how)
        mortal.push(yield* victim.name.startsWith("worker") ? stage.worker(victim.name) : stage.scheduler(victim.name))
      })
      const deed: ReadonlyArray<Effect.Effect<unknown, unknown, any>> = [
        replace("SIGKILL"),
        replace("SIGTERM"),
        Effect.scoped(
          Effect.andThen(
            Effect.suspend(() => any(mortal).frozen),
            Effect.suspend(() => Effect.sleep(any([1000, 5000])))
          )
        ),
        stage.net.reset(),
        Effect.suspend(() => stage.net.reset({ process: any(mortal).name })),
        stage.rows(`select pg_terminate_backend(pid) from pg_stat_activity where ${theirs} and random() < 0.3`),
        Effect.scoped(Effect.andThen(stage.net.slow({ delay: 100, jitter: 50 }), Effect.sleep(3000))),
        Effect.scoped(Effect.andThen(
          Effect.suspend(() => stage.net.blackHole({ process: any(mortal).name, heal: any(["deliver", "reset"]) })),
          Effect.sleep(6000)
        ))
      ]
      while ((yield* now) < end) {
        yield* any(deed)
        deeds++
        yield* Effect.sleep(yield* Random.nextIntBetween(1000, 10_000))
      }
      yield* Fiber.join(watching)
      yield* until(
        "it has caught up",
        Effect.map(stage.value("select count(*)::int from pgqueue.job"), (left) => left < 400),
        {
          within: 60_000
        }
      )
      const memory = measured.map((actor) => memoryOf(actor, warm))
      const slopes = memory.map((samples) => slopeOf(samples.map(({ at, size }) => [at, size])))
      const withCode = memory.map((samples) => slopeOf(samples.map(({ at, withCode }) => [at, withCode])))
      const opened = measured.map((actor) => Math.max(...files.get(actor)!) - Math.min(...files.get(actor)!))
      const third = Math.ceil(tables.length / 3)
      const grown = Math.max(...tables.slice(-third)) / Math.max(...tables.slice(0, third))
      const counts = yield* stage.finish({ within: 120_000 })
      const said = memory.map((samples) => samples.map(({ size }) => (size / 1024 / 1024).toFixed(1)).join(" "))
      assert.isBelow(grown, 1.5, "tables of the line")
      assert.isBelow(Math.max(...slopes), 1, `MiB an hour: ${slopes.join(" ")}\n${said.join("\n")}`)
      return {
        minutes,
        deeds,
        "MiB an hour": slopes.map((slope) => slope.toFixed(2)).join(" and "),
        "with compiled code": withCode.map((slope) => slope.toFixed(2)).join(" and "),
        "files opened": Math.max(...opened),
        "growth of the line's tables": grown,
        "longest backlog": Math.max(...backlog),
        ...counts
      }
    }))
})
