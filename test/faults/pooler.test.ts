/** PgBouncer between the processes and PostgreSQL, and what happens to that. */
import * as PgConnection from "@effect/sql-pg/PgConnection"
import { assert } from "@effect/vitest"
import { Effect, Fiber, Redacted } from "effect"
import { Work } from "../programs/actor.ts"
import { Step } from "../programs/jobs.ts"
import { makePgBouncer, pgbouncerBinary, type PgBouncerSettings } from "../support/pgbouncer.ts"
import { quantile } from "../support/queue.ts"
import { full, limit } from "./form.ts"
import { allRun, queueAt, terminating, timed, untilNoneLeft, waits } from "./inside.ts"
import { theirs } from "./invariants.ts"
import { scenarios } from "./scenario.ts"
import { type Actor, load, type Stage } from "./stage.ts"

/** What an application has to say behind a pooler that does not keep what was prepared, as this one. */
const prepare = false

const without = pgbouncerBinary === undefined ? "without PgBouncer" : undefined

/**
 * Leads what processes say through PgBouncer, in the current scope. A session that it keeps at the server has the name of the
 * process that had it last, so it is not to keep those of processes that have ended.
 */
const pooled = Effect.fnUntraced(function*(stage: Stage, settings: PgBouncerSettings = {}) {
  const pooler = yield* makePgBouncer(stage.straight, { server_idle_timeout: 5, ...settings })
  yield* stage.net.lead(pooler.through(stage.straight))
  return pooler
})

/** Each has said once that it cannot hear, or, because it can, never. */
const assertModes = (actors: ReadonlyArray<Actor>, mode: "polls" | "listens") => {
  for (const { name, output } of actors) {
    // A beat that waits for more than half a second is a warning too, but of the machine.
    const warnings = output().split("\n").filter((line) => /WARN.*(pooler|polling|listen)/i.test(line))
    if (mode === "listens") assert.deepStrictEqual(warnings, [], name)
    else {
      assert.lengthOf(warnings, 1, `${name}: ${warnings.join("\n")}`)
      assert.match(warnings[0]!, /transaction pooler.*found by polling/, name)
    }
    assert.match(output(), mode === "listens" ? /LISTEN\/NOTIFY/ : /polling/, name)
  }
}

/** Tells them to end, one after the other. */
const ending = (actors: ReadonlyArray<Actor>) =>
  Effect.forEach(
    actors,
    (actor) => Effect.map(actor.end(), ({ code }) => assert.strictEqual(code, 0, actor.output())),
    { discard: true }
  )

/** How long jobs wait for a worker that has nothing else to do. */
const latency = Effect.fnUntraced(function*(stage: Stage, way: string) {
  const count = full ? 400 : 100
  const worker = yield* stage.worker(`worker ${way}`, { directUrl: stage.url, prepare })
  const pool = { applicationName: "latency", prepare }
  const queue = yield* queueAt(stage.net.url, pool, { directUrl: Redacted.make(stage.url) })
  yield* Effect.forEach(
    Array.from({ length: count }),
    () =>
      Effect.andThen(
        Effect.provideContext(Work.enqueue({ key: crypto.randomUUID(), millis: 0, fails: 0 }), queue),
        Effect.sleep(25)
      )
  )
  yield* stage.untilAllEnded()
  assertModes([worker], "listens")
  yield* ending([worker])
  return (yield* waits(stage, "work")).slice(-count)
}, Effect.scoped)

scenarios("a pooler", (scenario) => {
  scenario(
    "H1",
    "PgBouncer lends sessions by the transaction, workers are killed, and every session is terminated every 2 s",
    { short: true, without, minutes: 5 },
    (stage) =>
      Effect.gen(function*() {
        yield* pooled(stage)
        const { producers, schedulers, workers } = yield* stage.fleet({ settings: { prepare } })
        assertModes([...producers, ...schedulers, ...workers], "polls")
        const killed = workers.slice(0, full ? 4 : 1)
        const spare: Array<Actor> = []
        for (const worker of killed) {
          yield* stage.during(`kill ${worker.name}`, worker.kill("SIGKILL"))
          spare.push(yield* stage.worker(`${worker.name} again`, { prepare }))
          yield* Effect.sleep(2000)
        }
        yield* stage.goesOn
        yield* terminating(stage, full ? 10 : 2)
        const figures = yield* stage.recovered(2000)
        allRun([...producers, ...schedulers, ...workers.slice(killed.length), ...spare])
        return { ...figures, kills: killed.length, ...yield* stage.finish({ within: 150_000 }) }
      })
  )

  scenario(
    "H1 prepared",
    "the same, without kills, and the application prepares its statements and has no transactions of its own",
    { without },
    (stage) =>
      Effect.gen(function*() {
        yield* pooled(stage)
        const { producers, schedulers, workers } = yield* stage.fleet({ settings: { withoutTransactions: true } })
        const all = [...producers, ...schedulers, ...workers]
        assertModes(all, "polls")
        yield* terminating(stage, 5)
        const figures = yield* stage.recovered(2000)
        allRun(all)
        return { ...figures, ...yield* stage.finish() }
      })
  )

  scenario(
    "H2",
    "PgBouncer lends sessions by the transaction, and the queue has the server's own address",
    { short: true, without },
    (stage) =>
      Effect.gen(function*() {
        const direct = yield* latency(stage, "direct")
        yield* pooled(stage)
        const through = yield* latency(stage, "pooled")
        const [p50, p99] = [quantile(through, 0.5), quantile(through, 0.99)]
        assert.isBelow(p50, limit(10))
        // Of the few of the short form the 99th percentile is the slowest.
        if (full) assert.isBelow(p99, 50)
        const { producers, schedulers, workers } = yield* stage.fleet({
          settings: { directUrl: stage.url, prepare },
          warm: full ? 10_000 : 1000
        })
        assertModes([...producers, ...schedulers, ...workers], "listens")
        allRun([...producers, ...schedulers, ...workers])
        return { "p50 direct": quantile(direct, 0.5), p50, p99, ...yield* stage.finish({ faultFree: true }) }
      })
  )

  scenario(
    "H3",
    "PgBouncer lends 20 sessions for as long as they are wanted",
    { without },
    (stage) =>
      Effect.gen(function*() {
        // All that they open fits: in this mode who waits for one waits until somebody ends.
        const few = { connections: 2, queue: { maxConnections: 2 } }
        const small = { workers: 1, producers: 1, schedulers: 1, rate: load / 3, settings: few, warm: 5000 }
        /** How many jobs a second there are when there are more than its slots can do: the median of five times. */
        const rate = Effect.gen(function*() {
          const count = 3000
          const drain = timed(Effect.andThen(
            stage.here(Step.enqueueAll(Array.from({ length: count }, () => ({ millis: 5 })))),
            untilNoneLeft(stage, "step")
          ))
          return count / quantile(yield* Effect.replicateEffect(drain, 5), 0.5) * 1000
        })
        const first = yield* stage.fleet(small)
        const before = yield* waits(stage, "work")
        const direct = yield* rate
        yield* ending([...first.producers, ...first.schedulers])
        yield* stage.untilAllEnded()
        yield* ending(first.workers)
        const known = (yield* waits(stage, "work")).length

        yield* pooled(stage, { pool_mode: "session", default_pool_size: 20 })
        const { producers, schedulers, workers } = yield* stage.fleet(small)
        const after = (yield* waits(stage, "work")).slice(known)
        const through = yield* rate
        const sessions = yield* stage.value(`select count(*)::int from pg_stat_activity where ${theirs}`)
        assertModes([...producers, ...schedulers, ...workers], "listens")
        assert.isAbove(through, direct * 0.9)
        const counts = yield* stage.finish({ faultFree: true })
        const p50 = quantile(after, 0.5)
        // It refuses settings in this mode, too, so nothing is prepared and each statement is in a transaction.
        assert.isBelow(p50, limit(quantile(before, 0.5) + 25))
        return {
          sessions,
          direct: `${Math.round(direct)}/s`,
          through: `${Math.round(100 * through / direct)} %`,
          "p50 direct": quantile(before, 0.5),
          p50,
          ...counts
        }
      })
  )

  scenario(
    "H4",
    "PgBouncer pauses for 20 s, reads its settings again, and crashes",
    { short: true, without, minutes: 5 },
    (stage) =>
      Effect.gen(function*() {
        const pooler = yield* pooled(stage)
        const { producers, schedulers, workers } = yield* stage.fleet({ settings: { prepare } })
        const pausing = Effect.acquireRelease(pooler.pause, () => pooler.resume)
        yield* stage.during("pause", Effect.scoped(Effect.andThen(pausing, Effect.sleep(full ? 20_000 : 4000))))
        yield* stage.goesOn
        yield* stage.during("reload", pooler.reload)
        yield* stage.goesOn
        yield* stage.during(
          "crash",
          Effect.acquireUseRelease(pooler.kill, () => Effect.sleep(1000), () => pooler.start)
        )
        const figures = yield* stage.recovered(3000)
        allRun([...producers, ...schedulers, ...workers])
        return { ...figures, ...yield* stage.finish({ within: 150_000 }) }
      })
  )

  scenario("H6", "PgBouncer has no session to lend for 2.5 s, gives up after 1 s, and keeps none that is idle", {
    without
  }, (stage) =>
    Effect.gen(function*() {
      const sessions = 5
      const pooler = yield* pooled(stage, {
        default_pool_size: sessions,
        query_wait_timeout: 1,
        server_idle_timeout: 1
      })
      const { producers, schedulers, workers } = yield* stage.fleet({ settings: { prepare } })
      /** Somebody's transaction. */
      const holding = Effect.scoped(Effect.gen(function*() {
        const session = yield* PgConnection.make({ url: Redacted.make(pooler.through(stage.straight)), prepare: false })
        yield* session.query("begin")
        yield* Effect.sleep(2500)
        yield* session.query("commit")
      }))
      const rounds = 5
      for (let round = 0; round < rounds; round++) {
        yield* stage.during(
          `round ${round}`,
          Effect.gen(function*() {
            const strangers = yield* Effect.forEach(Array.from({ length: sessions }), () =>
              Effect.forkChild(Effect.ignoreCause(holding)))
            yield* Effect.forEach(strangers, Fiber.join)
          })
        )
        yield* stage.goesOn
      }
      const figures = yield* stage.recovered(3000)
      assert.match(yield* pooler.log, /query_wait_timeout/)
      allRun([...producers, ...schedulers, ...workers])
      const queue = yield* queueAt(pooler.through(stage.straight), { applicationName: "idle", prepare })
      yield* ending([...producers, ...schedulers])
      yield* stage.untilAllEnded()
      // Sessions that are idle are closed under it.
      yield* Effect.sleep(1500)
      yield* Effect.provideContext(Work.enqueue({ key: crypto.randomUUID(), millis: 0, fails: 0 }), queue)
      yield* stage.untilAllEnded(10_000)
      return { rounds, ...figures, ...yield* stage.finish({ within: 150_000 }) }
    }))
})
