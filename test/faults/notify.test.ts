/** NOTIFY and LISTEN: hints that come late, never, or in masses, and a server that takes no more of them. */
import { PgClient } from "@effect/sql-pg"
import { assert } from "@effect/vitest"
import { Context, Deferred, Effect, Fiber, Layer, Logger, Queue, Random } from "effect"
import { SqlClient } from "effect/sql"
import * as Database from "../../src/Database.ts"
import { Job, type JobQueue, Worker } from "../../src/index.ts"
import { Count, Step } from "../programs/jobs.ts"
import { makeProxy } from "../support/proxy.ts"
import { now, pollingQueueLayer, quantile, running, until } from "../support/queue.ts"
import { full, limit } from "./form.ts"
import { listening, queueAt, timed } from "./inside.ts"
import { scenarios } from "./scenario.ts"
import { type Stage, Victim } from "./stage.ts"

/** So rarely that what waits for a look or a heartbeat is seen to wait. */
const rare = {
  pollInterval: "60 seconds",
  heartbeat: "20 seconds",
  lease: "60 seconds",
  rescueInterval: "60 seconds"
} as const
const rarely = { pollInterval: 60_000, heartbeat: 20_000, lease: 60_000, rescueInterval: 60_000 }

/** Tells the scenario when it starts. */
class Ping extends Job.make("ping") {}

/** A worker in this process, in a queue of its own, and a way to wait for the next start of its only job. */
const pinged = Effect.fnUntraced(function*(stage: Stage, options: object = {}) {
  const queue = yield* queueAt(stage.url, { applicationName: "hearing", maxConnections: 2 }, options)
  let started = Deferred.makeUnsafe<number>()
  yield* running(
    Worker.layer({ jobs: [Ping], concurrency: 1, ...rare }).pipe(
      Layer.provide(Ping.toLayer(() => Effect.flatMap(now, (at) => Deferred.succeed(started, at)))),
      Layer.provide(Layer.succeedContext(queue))
    )
  )
  /** How long after the call of an enqueue its job has started. */
  return (enqueue: Effect.Effect<unknown, unknown, JobQueue>, services: Context.Context<JobQueue>) =>
    Effect.gen(function*() {
      started = Deferred.makeUnsafe()
      const begun = yield* now
      yield* Effect.provideContext(enqueue, services)
      return (yield* Deferred.await(started)) - begun
    })
})

/** What is announced on a channel, as it is heard. */
const hearing = Effect.fnUntraced(function*(stage: Stage, channel: string) {
  const heard: Array<string> = []
  const client = Context.get(stage.services, PgClient.PgClient)
  const notifications = yield* client.listen(channel)
  yield* Effect.forkScoped(Effect.forever(Effect.map(Queue.takeAll(notifications), (all) => {
    for (const { payload } of all) heard.push(payload)
  })))
  return heard
})

scenarios("NOTIFY", (scenario) => {
  // A worker that has just found nothing is about to wait; it listens all the time, so there is no UNLISTEN.
  scenario(
    "F1",
    "a job comes just when the worker has found nothing",
    { short: true, minutes: 6 },
    (stage) =>
      Effect.gen(function*() {
        const measured: Array<number> = []
        const rounds = full ? 20_000 : 300
        yield* Effect.scoped(Effect.gen(function*() {
          const ping = yield* pinged(stage)
          for (let round = 0; round < rounds; round++) {
            measured.push(yield* ping(Ping.enqueue(), stage.services))
            // From "it has not settled yet" to "it waits".
            if (round % 4 > 0) yield* Effect.sleep((yield* Random.next) * 2 * (round % 4))
          }
        }))
        yield* stage.finish()
        // It must not be the poll, which is a minute, nor a beat, which is 20 s.
        const longest = measured.reduce((a, b) => Math.max(a, b))
        assert.isBelow(longest, full ? 250 : 5000)
        return {
          rounds: `${rounds}`,
          p50: quantile(measured, 0.5),
          p99: quantile(measured, 0.99),
          longest
        }
      })
  )

  scenario(
    "F2",
    "jobs come while the session that listens is down",
    { short: true },
    (stage) =>
      Effect.gen(function*() {
        yield* stage.worker("worker", rarely)
        const enqueue = Effect.provideContext(
          Count.enqueueAll(Array.from({ length: 20 }, () => ({ n: 0 }))),
          stage.services
        )
        const listens = Effect.sync(() => stage.net.sessions({ sent: "LISTEN" }) > 0)
        const measured: Array<number> = []
        for (let round = 0; round < (full ? 20 : 1); round++) {
          yield* until("it listens", listens)
          yield* enqueue
          yield* stage.untilAllEnded()
          yield* Effect.scoped(Effect.gen(function*() {
            yield* Effect.forkScoped(
              Effect.forever(Effect.flatten(stage.net.cut({ text: "LISTEN", process: "worker", at: "lost" })))
            )
            yield* Effect.sleep(0)
            yield* stage.net.reset({ sent: "LISTEN" })
            yield* Effect.sleep(500)
            yield* enqueue
            // Whoever else the loss has made look has looked.
            yield* Effect.sleep(500)
          }))
          // The last cut is still there for the next one.
          yield* until(
            "it listens again",
            Effect.map(
              stage.value(
                `select count(*)::int from pg_stat_activity where ${listening} and state = 'idle'`
              ),
              (n) => n === 1
            ),
            { every: 2 }
          )
          measured.push(yield* timed(stage.untilAllEnded()))
        }
        const counts = yield* stage.finish()
        const longest = measured.reduce((a, b) => Math.max(a, b))
        assert.isBelow(longest, limit(500))
        return { ...counts, rounds: `${measured.length}`, longest }
      })
  )

  // However long it is: what it takes is that the process hears nothing until all of them are there.
  scenario("F4", "a million notifications come while the process stands still", {}, (stage) =>
    Effect.gen(function*() {
      const worker = yield* stage.worker("worker", { ...rarely, concurrency: 1 })
      const sleep = (millis: number) => Effect.provideContext(Step.enqueue({ millis }), stage.services)
      yield* Effect.forEach([1, 1, 1, 1, 1], sleep)
      yield* stage.untilAllEnded()
      const flood = Effect.forEach(
        Array.from({ length: 10 }, (_, n) => n),
        (n) =>
          stage.rows(
            "select count(pg_notify($1, '0 some queue ' || i)) from generate_series($2::int, $2::int + 99999) i",
            [Database.channelOf("pgqueue"), n * 100_000]
          )
      )
      // Once while it runs, for what everything compiled and grown takes; then while it is stopped.
      yield* flood
      yield* Effect.sleep(3000)
      const before = worker.memory()
      let most = before
      yield* Effect.forkScoped(Effect.forever(Effect.andThen(
        Effect.sleep(20),
        Effect.sync(() => (most = Math.max(most, worker.running() ? worker.memory() : 0)))
      )))
      yield* Effect.scoped(Effect.andThen(worker.frozen, Effect.andThen(flood, Effect.sleep(10_000))))
      yield* until(
        "it has heard them all",
        Effect.map(stage.value("select pg_notification_queue_usage() = 0"), (empty) => empty as unknown as boolean),
        { within: 60_000, every: 100 }
      )
      yield* sleep(1)
      const waited = yield* timed(stage.untilAllEnded())
      yield* Effect.sleep(3000)
      const grown = (most - before) / 1024
      const counts = yield* stage.finish()
      assert.isBelow(grown, 30, "MB")
      return {
        ...counts,
        "before": `${Math.round(before / 1024)} MB`,
        grown: `${grown.toFixed(1)} MB`,
        "next job": waited
      }
    }))

  // 64 sessions in 8 queues, each with a notifier of its own, as 8 processes have; without NOTIFY the same clients, but of a
  // kind that the queue does not know to be able to. One job in each transaction of the caller's.
  scenario(
    "F6",
    "producers with 64 sessions, with NOTIFY and without",
    {},
    (stage) =>
      Effect.gen(function*() {
        const channel = Database.channelOf("pgqueue")
        const heard = yield* hearing(stage, channel)
        const queues = 8
        const pool = { maxConnections: 64 / queues, applicationName: "load" }
        const notifying = yield* Effect.forEach(Array.from({ length: queues }), () => queueAt(stage.straight, pool))
        const silent = yield* Effect.forEach(
          Array.from({ length: queues }),
          () => Effect.provideContext(Layer.build(pollingQueueLayer(pool)), stage.services)
        )
        const enqueue = Effect.flatMap(SqlClient.SqlClient, (sql) => sql.withTransaction(Count.enqueue({ n: 0 })))
        /** Jobs a second. */
        const measure = (services: ReadonlyArray<Context.Context<JobQueue | SqlClient.SqlClient>>, millis: number) =>
          Effect.gen(function*() {
            const begun = yield* now
            let done = 0
            yield* Effect.forEach(
              Array.from({ length: 64 }, (_, n) => services[n % queues]!),
              (own) =>
                Effect.provideContext(
                  Effect.repeat(Effect.tap(enqueue, () => Effect.sync(() => done++)), {
                    while: () => Effect.map(now, (at) => at - begun < millis)
                  }),
                  own
                ),
              { concurrency: "unbounded" }
            )
            return done / ((yield* now) - begun) * 1000
          })
        const millis = 1000
        yield* measure(notifying, 3 * millis)
        yield* measure(silent, 3 * millis)
        const rates: Record<"on" | "off", Array<number>> = { on: [], off: [] }
        const before = heard.length
        for (let round = 0; round < 30; round++) {
          rates.on.push(yield* measure(notifying, millis))
          rates.off.push(yield* measure(silent, millis))
        }
        const told = heard.length - before
        yield* stage.rows("truncate pgqueue.job, pgqueue.ready")
        yield* stage.finish()
        // All rounds together, each beside its other one: the machine is not as fast in one minute as in the next.
        const mean = (all: ReadonlyArray<number>) => all.reduce((a, b) => a + b) / all.length
        const [on, off] = [mean(rates.on), mean(rates.off)]
        const loss = (1 - on / off) * 100
        assert.isBelow(loss, 15, JSON.stringify(rates))
        const jobs = on * rates.on.length * millis / 1000
        assert.isBelow(told, jobs / 2)
        return {
          on: `${Math.round(on)}/s`,
          off: `${Math.round(off)}/s`,
          loss: `${loss.toFixed(1)} %`,
          notifications: `${told} for ${Math.round(jobs)} jobs`
        }
      })
  )

  scenario("F7", "a client that cannot LISTEN", { short: true }, (stage) =>
    Effect.gen(function*() {
      const interval = 500
      const said: Array<string> = []
      const logger = Logger.make(({ logLevel, message }) => void said.push(`${logLevel} ${String(message)}`))
      const count = full ? 100 : 10
      yield* Effect.scoped(Effect.gen(function*() {
        const queue = yield* Effect.provideContext(Layer.build(pollingQueueLayer()), stage.services)
        const started = new Map<string, number>()
        yield* running(
          Worker.layer({ jobs: [Ping], pollInterval: interval }).pipe(
            Layer.provide(Ping.toLayer(() =>
              Effect.gen(function*() {
                started.set((yield* Job.Current).id, yield* now)
              })
            )),
            Layer.provide(Layer.succeedContext(queue))
          )
        )
        const measured: Array<number> = []
        for (let n = 0; n < count; n++) {
          const begun = yield* now
          const { id } = yield* Effect.provideContext(Ping.enqueue(), stage.services)
          yield* until("it has started", Effect.sync(() => started.has(id)))
          measured.push(started.get(id)! - begun)
          // Anywhere between two looks.
          yield* Effect.sleep((yield* Random.next) * interval)
        }
        const p99 = quantile(measured, 0.99)
        assert.isBelow(p99, limit(interval + 100))
        said.push(`p50 ${quantile(measured, 0.5)}`, `p99 ${p99}`)
      })).pipe(Effect.provide(Logger.layer([logger])))
      yield* stage.finish()
      assert.strictEqual(said.filter((line) => line.includes("polling only")).length, 1, said.join("\n"))
      // A machine that stands still for a quarter of a second is warned of, too.
      assert.deepStrictEqual(
        said.filter((line) => /^(Warn|Error|Fatal)/i.test(line) && !line.includes("event loop stood still")),
        []
      )
      const figure = (name: string) => Number(said.find((line) => line.startsWith(name))!.split(" ")[1])
      return { poll: interval, p50: figure("p50"), p99: figure("p99") }
    }))

  scenario("F8", "two schemas in one database", {}, (stage) =>
    Effect.gen(function*() {
      const other = yield* queueAt(stage.url, {}, { schema: "other" })
      const heard = yield* hearing(stage, Database.channelOf("pgqueue"))
      const proxy = yield* makeProxy(stage.url)
      let [asked, announced] = [0, 0]
      const count = full ? 1000 : 200
      yield* Effect.scoped(Effect.gen(function*() {
        const ping = yield* pinged({ ...stage, url: proxy.url })
        yield* ping(Ping.enqueue(), stage.services)
        yield* Effect.sleep(1000)
        const [before, already] = [proxy.requests(), heard.length]
        const enqueue = Effect.forEach(Array.from({ length: count }), () =>
          Effect.andThen(Ping.enqueue(), Effect.sleep(2)))
        yield* Effect.provideContext(enqueue, other)
        yield* stage.rows("select other.enqueue('ping')")
        yield* Effect.sleep(500)
        asked = proxy.requests() - before
        announced = heard.length - already
        assert.isBelow(yield* ping(Ping.enqueue(), stage.services), limit(500))
      }))
      yield* stage.finish()
      assert.strictEqual(announced, 0)
      // Nothing but its own heartbeats, its shared tasks and the question whether its session is there.
      assert.isBelow(asked, count / 20)
      return { "cross wake-ups": `${announced}`, "requests meanwhile": `${asked}` }
    }))

  scenario("F9", "long names, many names, in any script", { short: true }, (stage) =>
    Effect.gen(function*() {
      const schema = `s${"_".repeat(39)}x`
      const long = ["q".repeat(128), "日".repeat(128), "😀".repeat(64), `${"ä".repeat(127)} `]
      const channel = Database.channelOf(schema)
      assert.isAtMost(Buffer.byteLength(channel), 63)
      const other = yield* queueAt(stage.url, {}, { schema })
      const heard = yield* hearing(stage, channel)
      const kinds = long.map((queue, n) => Job.make(`named ${n}`, { queue }))
      const measured: Array<number> = []
      let started = Deferred.makeUnsafe<number>()
      const count = full ? 10_000 : 1000
      yield* Effect.scoped(Effect.gen(function*() {
        const queue = yield* queueAt(stage.url, {}, { schema })
        const [first, ...others] = kinds.map((kind) =>
          kind.toLayer(() => Effect.flatMap(now, (at) => Deferred.succeed(started, at)))
        )
        const handlers = Layer.mergeAll(first!, ...others)
        yield* running(
          Worker.layer({ jobs: kinds, ...rare }).pipe(
            Layer.provide(handlers),
            Layer.provide(Layer.succeedContext(queue))
          )
        )
        const enqueues = kinds.flatMap((kind, n): ReadonlyArray<Effect.Effect<unknown, unknown, JobQueue>> => [
          kind.enqueue(),
          kind.enqueueAll([undefined]),
          Effect.orDie(stage.rows(`select ${schema}.enqueue('named ${n}', queue => $1)`, [long[n]]))
        ])
        for (const enqueue of enqueues) {
          started = Deferred.makeUnsafe()
          const begun = yield* now
          yield* Effect.provideContext(enqueue, other)
          measured.push((yield* Deferred.await(started)) - begun)
          yield* Effect.sleep(20)
        }
        yield* Effect.provideContext(
          Effect.forEach(
            Array.from({ length: count }, (_, n) => `${long[n % 4]!.slice(8)} ${n}`),
            (name) => Ping.enqueue(undefined, { queue: name }),
            { concurrency: 100 }
          ),
          other
        )
      }))
      yield* Effect.sleep(300)
      yield* stage.finish()
      const largest = heard.reduce((most, payload) => Math.max(most, Buffer.byteLength(payload)), 0)
      assert.isAtMost(largest, 200)
      const longest = measured.reduce((a, b) => Math.max(a, b))
      assert.isBelow(longest, limit(500))
      return {
        names: `${count}`,
        "largest payload": `${largest} B`,
        channel: `${Buffer.byteLength(channel)} B`,
        "longest wait": longest
      }
    }))
})

scenarios("a server that takes no more notifications", (scenario) => {
  scenario("F5", "somebody listens and holds a transaction", { short: true }, (stage) =>
    Effect.gen(function*() {
      const worker = yield* stage.worker("worker")
      const usage = stage.value("select pg_notification_queue_usage()::float8")
      yield* Effect.provideContext(Count.enqueue({ n: 0 }), stage.services)
      yield* stage.untilAllEnded()
      const fill = (to: number) =>
        Effect.gen(function*() {
          while ((yield* usage) < to) {
            yield* stage.rows("select pg_notify('elsewhere', repeat('x', 1000) || i) from generate_series(1, 10) i")
          }
        })
      const longest: Record<string, number> = {}
      let warned = 0
      yield* Effect.scoped(Effect.gen(function*() {
        const rogue = yield* queueAt(stage.url, { applicationName: "rogue", maxConnections: 1 })
        const sql = Context.get(rogue, SqlClient.SqlClient)
        const held = yield* Effect.forkScoped(Effect.scoped(Effect.gen(function*() {
          const connection = yield* sql.reserve
          yield* connection.executeUnprepared("listen elsewhere", [], undefined)
          yield* connection.executeUnprepared("begin", [], undefined)
          yield* connection.executeUnprepared("select 1", [], undefined)
          return yield* Effect.never
        })))
        yield* until(
          "it holds",
          Effect.map(
            stage.value(
              "select count(*)::int from pg_stat_activity where application_name = 'rogue' and state = 'idle in transaction'"
            ),
            (n) => n === 1
          )
        )
        yield* fill(0.55)
        warned = yield* until(
          "it is said",
          Effect.sync(() => /queue of notifications is \d+ % full/.test(worker.output())),
          {
            within: 20_000
          }
        )
        // To the last byte.
        yield* Effect.ignore(fill(1))
        const error = yield* Effect.flip(Effect.forever(stage.rows("select pg_notify('elsewhere', random()::text)")))
        assert.isTrue(Database.isFullOfNews(error), String(error))
        const ways: Record<string, Effect.Effect<unknown, unknown, JobQueue | SqlClient.SqlClient>> = {
          alone: Effect.andThen(Effect.sleep(50), Count.enqueue({ n: 1 })),
          many: Count.enqueueAll([{ n: 2 }, { n: 2 }]),
          together: Effect.all([Count.enqueue({ n: 3 }), Count.enqueue({ n: 3 })], { concurrency: 2 }),
          transaction: Effect.flatMap(SqlClient.SqlClient, (sql) => sql.withTransaction(Count.enqueue({ n: 4 }))),
          unique: Count.enqueue({ n: 5 }, { unique: "one" }),
          SQL: Effect.orDie(stage.rows(`select pgqueue.enqueue('count', '{"n":6}')`))
        }
        for (const [way, enqueue] of Object.entries(ways)) {
          yield* Effect.provideContext(enqueue, stage.services)
          longest[way] = yield* timed(stage.untilAllEnded())
        }
        yield* Fiber.interrupt(held)
      }))
      yield* until(
        "it is over",
        Effect.map(Effect.ignore(stage.rows("select pg_notify('elsewhere', 'z')")).pipe(Effect.andThen(usage)), (n) =>
          n < 0.1)
      )
      yield* Effect.provideContext(Count.enqueueAll([{ n: 7 }]), stage.services)
      const after = yield* timed(stage.untilAllEnded())
      const counts = yield* stage.finish()
      assert.isBelow(after, limit(1000))
      for (const [way, wait] of Object.entries(longest)) {
        assert.isBelow(wait, limit(6000), way)
      }
      return { ...counts, "warned after": warned, ...longest, after }
    }))
}, Victim.layer({ version: "18", settings: { max_notify_queue_pages: 64 } }))
