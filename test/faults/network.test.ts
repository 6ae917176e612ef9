/** What happens between processes and PostgreSQL: resets, silence, latency, narrow lines, lost answers, impostors. */
import { assert } from "@effect/vitest"
import { Effect, Exit, Fiber, Random } from "effect"
import { SqlClient } from "effect/sql"
import { execFileSync } from "node:child_process"
import { randomUUID } from "node:crypto"
import { readFileSync } from "node:fs"
import { appendFile } from "node:fs/promises"
import { join } from "node:path"
import { Admin, type Job } from "../../src/index.ts"
import { Pay } from "../programs/actor.ts"
import { Count, Step } from "../programs/jobs.ts"
import { now, quantile, until } from "../support/queue.ts"
import { statements } from "../support/wire.ts"
import { full } from "./form.ts"
import { allRun, cpuDuring, queueAt, timed, waits } from "./inside.ts"
import { cancelRequest, makeNet } from "./net.ts"
import { scenarios } from "./scenario.ts"
import { rescuedWithin, type Stage, timing, Victim } from "./stage.ts"

/** The default of a worker that can LISTEN, in milliseconds. */
const poll = 5000

const { enqueue: insert, settle } = statements

const largest = (all: ReadonlyArray<number>) => all.reduce((a, b) => Math.max(a, b), 0)

/** Nobody was taken for dead who was not. */
const noFalseRescue = Effect.fnUntraced(function*(stage: Stage) {
  assert.strictEqual(yield* stage.value("select count(*)::int from pgqueue.attempt where tag = 'Lost'"), 0)
  assert.strictEqual(yield* stage.value("select count(*)::int from pgqueue.finished where rescued > 0"), 0)
})

/** How often processes have said that they were declared dead, or that no heartbeat got through. */
const lostHeartbeats = (actors: ReadonlyArray<{ readonly output: () => string }>) =>
  actors.flatMap(({ output }) => output().match(/declared dead; its|no heartbeat of/g) ?? []).length

scenarios("the network", (scenario) => {
  scenario("E1", "every session is reset at random", {}, (stage) =>
    Effect.gen(function*() {
      const cast = yield* stage.fleet()
      const rounds = full ? 15 : 3
      yield* stage.during(
        "resets",
        Effect.gen(function*() {
          for (let round = 0; round < rounds; round++) {
            if (round > 0) yield* Effect.sleep((full ? 1000 : 500) + (yield* Random.next) * (full ? 4000 : 1000))
            yield* stage.net.reset()
          }
        })
      )
      const figures = yield* stage.recovered(2000)
      allRun([...cast.producers, ...cast.schedulers, ...cast.workers])
      return { resets: `${rounds}`, ...figures, ...yield* stage.finish() }
    }))

  scenario("E2", "the session that listens gets nothing any more", {}, (stage) =>
    Effect.gen(function*() {
      const worker = yield* stage.worker("worker")
      const enqueue = Effect.provideContext(Count.enqueue({ n: 0 }), stage.services)
      yield* enqueue
      yield* stage.untilAllEnded()
      let noticed = 0
      yield* Effect.scoped(Effect.gen(function*() {
        yield* stage.net.blackHole({ sent: "LISTEN", heal: "reset" })
        assert.isAbove(stage.net.sessions({ sent: "LISTEN" }), 0)
        const enqueuing = yield* Effect.forkScoped(Effect.forever(Effect.andThen(enqueue, Effect.sleep(200))))
        noticed = yield* until(
          "it is noticed",
          Effect.sync(() => /the listener's session does not go through/.test(worker.output())),
          { within: 20_000 }
        )
        yield* Fiber.interrupt(enqueuing)
      }))
      yield* until("it listens again", Effect.sync(() => stage.net.sessions({ sent: "LISTEN" }) > 0))
      yield* Effect.sleep(1500)
      const during = largest(yield* waits(stage, "count"))
      yield* enqueue
      yield* stage.untilAllEnded()
      const all = yield* waits(stage, "count")
      yield* stage.finish()
      assert.isBelow(noticed, 15_000)
      assert.isBelow(during, poll + 1000)
      return { noticed, "longest wait": largest(all), p50: quantile(all, 0.5), after: all.at(-1)! }
    }))

  // 20 s: longer than a lease (3 s) and than every wait for an answer (15 s at most).
  scenario("E3", "nothing arrives from anywhere, and then resets", {}, (stage) =>
    Effect.gen(function*() {
      const heir = yield* stage.worker("worker heir", { url: stage.url })
      const cast = yield* stage.fleet({ settings: { concurrency: 20 } })
      // Long enough that all of them are running when it begins, and short enough that they end elsewhere.
      yield* Effect.provideContext(
        Step.enqueueAll(Array.from({ length: 60 }, () => ({ millis: 8000 }))),
        stage.services
      )
      yield* until(
        "they run",
        Effect.map(
          stage.recorded(
            "select count(*)::int from ledger where phase = 'start' and note is null and boot like 'worker _ %'"
          ),
          (n) => n >= 20
        )
      )
      yield* stage.during(
        "black hole",
        Effect.andThen(stage.net.blackHole({ heal: "reset" }), Effect.sleep(20_000))
      )
      const { recovered } = yield* stage.recovered(3000)
      const interrupted = yield* stage.recorded(
        "select count(*)::int from ledger where phase = 'interrupted' and boot like 'worker _ %'"
      )
      const counts = yield* stage.finish({ within: 90_000 })
      for (const actor of [heir, ...cast.workers]) assert.strictEqual((yield* actor.ended).code, 0)
      // A handler that waits for a statement is stopped when the driver has given up its request to cancel that one, after 5 s:
      // less than is left of a lease at the default, and more than these leases are.
      const paying = yield* stage.value<ReadonlyArray<string>>(
        "select array(select id::text from pgqueue.finished where kind = 'pay')"
      )
      const stopped = (inStatement: boolean) =>
        stage.recorded<number | null>(
          `select (extract(epoch from max(l.at) - min(f.begun_at)) * 1000)::float8 from ledger l, fault f
           where l.phase = 'interrupted' and l.boot like 'worker _ %' and l.at > f.begun_at
             and (l.job = any ($1::uuid[])) = $2::boolean`,
          [paying, inStatement]
        )
      const [last, lastInStatement] = [yield* stopped(false), yield* stopped(true)]
      assert.isAtLeast(interrupted, 20)
      assert.isBelow(last!, timing.lease)
      assert.isBelow(lastInStatement ?? 0, timing.lease + 5000)
      return {
        ...counts,
        interrupted: `${interrupted}`,
        "last handler stopped": last!,
        ...(lastInStatement === null ? {} : { "the last one in a statement": lastInStatement }),
        recovered: recovered!
      }
    }))

  // Until the server has given up all its sessions, which is some ten leases. The link is a pair of virtual interfaces, and its end goes down.
  scenario("E4", "one of four workers loses its link", {}, (stage) =>
    Effect.gen(function*() {
      const cast = yield* stage.fleet({ workers: 3, settings: { concurrency: 20 } })
      const link = yield* makeLink(stage)
      // Those of the application are its own: the server notices of them when it was told to.
      for (const setting of ["tcp_user_timeout = '20s'", "tcp_keepalives_idle = 10", "tcp_keepalives_interval = 5"]) {
        yield* stage.rows(
          `do $$ begin execute format('alter database %I set ${
            setting.replaceAll("'", "''")
          }', current_database()); end $$`
        )
      }
      const lonely = yield* stage.worker("worker lonely", { ...link.settings, concurrency: 20 })
      yield* Effect.provideContext(
        Effect.andThen(
          Step.enqueueAll(Array.from({ length: 90 }, () => ({ millis: 6000 }))),
          Pay.enqueueAll(Array.from({ length: 30 }, () => ({ key: randomUUID(), millis: 2500, fails: 0 })))
        ),
        stage.services
      )
      const mine = stage.recorded(
        "select count(*)::int from ledger where phase = 'start' and boot like 'worker lonely%' and note is null"
      )
      yield* until("it has long jobs, too", Effect.map(mine, (n) => n >= 3))
      const open = stage.value(
        `select count(*)::int from pg_stat_activity where datname = current_database() and state like 'idle in transaction%'
         and application_name = 'worker lonely'`
      )
      yield* until("it has transactions open", Effect.map(open, (n) => n > 0))
      let takenOver = 0
      let idle = 0
      let gone = 0
      yield* stage.during(
        "link down",
        Effect.gen(function*() {
          yield* link.down
          const others = until(
            "others have its jobs",
            Effect.map(
              stage.value(
                `select count(*)::int from pgqueue.lease l where not exists (select 1 from pgqueue.worker w where w.id = l.worker)
                 or exists (select 1 from pgqueue.worker w where w.id = l.worker and w.name like 'worker lonely%')`
              ),
              (n) => n === 0
            ),
            { within: 30_000, every: 50 }
          )
          const closed = until("nothing of it is left open", Effect.map(open, (n) => n === 0), {
            within: 40_000,
            every: 50
          })
          ;[takenOver, idle] = yield* Effect.all([others, closed], { concurrency: 2 })
          if (!link.real) return
          gone = yield* until(
            "the server has noticed of each of its sessions",
            Effect.map(
              stage.value(
                "select count(*)::int from pg_stat_activity where datname = current_database() and application_name = 'worker lonely'"
              ),
              (n) => n === 0
            ),
            { within: 60_000, every: 50 }
          )
        })
      )
      yield* until(
        "it is back",
        Effect.map(
          stage.value(
            "select count(*)::int from pgqueue.worker where name like 'worker lonely%' and beat_at > clock_timestamp() - interval '2 seconds'"
          ),
          (n) => n === 1
        )
      )
      assert.isTrue(cast.workers.every((actor) => actor.running()) && lonely.running())
      const counts = yield* stage.finish({ within: 90_000 })
      assert.isBelow(takenOver, rescuedWithin)
      assert.isBelow(idle, 30_000)
      assert.isBelow(Math.max(takenOver, idle) + gone, 45_000)
      return {
        ...counts,
        how: link.how,
        "taken over": takenOver,
        "no open transaction": idle,
        "no session": Math.max(takenOver, idle) + gone
      }
    }))

  // Each way takes 100 ms ± 50 ms, so that an answer takes 200 ms ± 100 ms. To connect takes six of these: a lease of 3 s would
  // leave no room for one heartbeat that does not get through. The pools take some seconds to grow to what that needs. A job in a transaction takes eight answers, and that long a slot.
  scenario("E5", "every answer takes 200 ms more", {}, (stage) =>
    Effect.gen(function*() {
      yield* stage.net.slow({ delay: 100, jitter: 50 })
      const cast = yield* stage.fleet({
        rate: 200,
        warm: 20_000,
        settings: { lease: 6000, heartbeat: 2000, concurrency: 25, connections: 25 }
      })
      const waited = yield* stage.ledger.query<{ kind: string; ms: number }>(
        `select (extract(epoch from min(l.at) - i.begun_at) * 1000)::float8 as ms from intent i
         join ledger l on l.phase = 'start' and l.note = i.key::text
         where i.begun_at > (select min(begun_at) from intent) + interval '8 seconds' group by i.key, i.begun_at`
      )
      const counts = yield* stage.finish()
      yield* noFalseRescue(stage)
      assert.strictEqual(lostHeartbeats(cast.workers), 0)
      const all = waited.map(({ ms }) => ms)
      const p99 = quantile(all, 0.99)
      assert.isBelow(p99, 1500, `p50 ${quantile(all, 0.5)}`)
      return { ...counts, p50: quantile(all, 0.5), p99 }
    }))

  scenario("E6", "each connection has 64 kbit/s", { minutes: 5 }, (stage) =>
    Effect.gen(function*() {
      yield* stage.net.narrow({ bytes: 8000 })
      const cast = yield* stage.fleet({ rate: 30, warm: 1000, settings: { lease: 6000, heartbeat: 2000 } })
      // A claim of ten of these takes seven seconds to arrive, more than a lease.
      const blob = "x".repeat(6000)
      yield* Effect.provideContext(
        Step.enqueueAll(Array.from({ length: 200 }, () => ({ millis: 50 })), { metadata: { blob } }),
        stage.services
      )
      yield* Effect.sleep(15_000)
      const counts = yield* stage.finish({ within: 90_000 })
      yield* noFalseRescue(stage)
      assert.strictEqual(lostHeartbeats(cast.workers), 0)
      return counts
    }))

  scenario(
    "E8",
    "the answer to an enqueue is lost, and it is sent again",
    { short: true },
    (stage) =>
      Effect.gen(function*() {
        const mine = yield* queueAt(stage.net.url, { applicationName: "mine" })
        const sql = Effect.provideContext(SqlClient.SqlClient, mine)
        const inTransaction = (n: number, options: Job.EnqueueOptions) =>
          Effect.flatMap(sql, (sql) => sql.withTransaction(Count.enqueue({ n }, options)))
        const ways: ReadonlyArray<
          readonly [what: string, text: string, (n: number) => Effect.Effect<unknown, unknown, any>]
        > = [
          ["alone", insert, (n) => Count.enqueue({ n })],
          ["under an id", insert, (n) => Count.enqueue({ n }, { id: randomUUID() })],
          ["under a key", insert, (n) => Count.enqueue({ n }, { unique: `${n}` })],
          ["many", insert, (n) => Count.enqueueAll([{ n }])],
          // Of a transaction of the caller's the outcome is unknown, and the caller has a key to send it again.
          ["in a transaction under a key", "COMMIT", (n) => Effect.eventually(inTransaction(n, { unique: `${n}` }))],
          ["in a transaction under an id", "COMMIT", (n) => {
            const id = randomUUID()
            return Effect.eventually(inTransaction(n, { id }))
          }]
        ]
        let n = 0
        for (let round = 0; round < (full ? 20 : 2); round++) {
          for (const at of ["answered", "sent", "lost"] as const) {
            for (const [what, text, enqueue] of ways) {
              const hit = yield* stage.net.cut({ text, process: "mine", at })
              yield* Effect.provideContext(enqueue(n++), mine)
              yield* Effect.timeoutOrElse(hit, { duration: "5 seconds", orElse: () => Effect.die(`not hit: ${what}`) })
            }
          }
        }
        assert.deepStrictEqual(
          yield* stage.rows(
            "select payload->>'n' as n, count(*)::int from pgqueue.job group by 1 having count(*) <> 1"
          ),
          []
        )
        assert.strictEqual(yield* stage.value("select count(*)::int from pgqueue.job"), n)
        const counts = yield* stage.finish()
        assert.deepStrictEqual(counts, { jobs: n, failed: 0, again: 0 })
        return { ...counts, cuts: `${n}` }
      })
  )

  scenario("E9", "the answer to a settlement is lost", { short: true }, (stage) =>
    Effect.gen(function*() {
      const worker = yield* stage.worker("worker", { concurrency: 20 })
      const rounds = full ? 30 : 3
      const size = 40
      let longest = 0
      for (let round = 0; round < rounds; round++) {
        const hit = yield* stage.net.cut({ text: settle, process: "worker", at: "answered", nth: 1 + round % 3 })
        yield* Effect.provideContext(
          Step.enqueueAll(Array.from({ length: size }, () => ({ millis: 20 }))),
          stage.services
        )
        yield* hit
        longest = Math.max(longest, yield* timed(stage.untilAllEnded(20_000)))
      }
      assert.isTrue(worker.running())
      const counts = yield* stage.finish({})
      assert.deepStrictEqual(counts, { jobs: rounds * size, failed: 0, again: 0 })
      assert.deepStrictEqual(
        yield* stage.rows("select status, attempt::int, count(*)::int from pgqueue.finished group by 1, 2"),
        [{ status: "completed", attempt: 1, count: rounds * size }]
      )
      return { ...counts, "longest until all ended": longest }
    }))

  // A NAT forgets what was silent for 60 s. The queue's own sessions are never: what they send or the kernel sends for them
  // (keep-alive, which this network does not see) comes each 10 s. Here it forgets what has sent nothing for 12 s.
  scenario("E10", "what was silent for a while is forgotten by the network", {}, (stage) =>
    Effect.gen(function*() {
      const worker = yield* stage.worker("worker")
      const enqueue = Effect.provideContext(Count.enqueue({ n: 0 }), stage.services)
      yield* Effect.repeat(enqueue, { times: 20 })
      yield* stage.untilAllEnded()
      yield* Effect.sleep(14_000)
      const port = Number(new URL(stage.net.url).port)
      const timers = keepAlives(worker.pid, port)
      assert.strictEqual(timers.length, stage.net.sessions({ process: "worker" }))
      // The application's own client says nothing of keep-alive, and has a session from its start.
      const kept = timers.filter((millis) => millis < 86_400_000)
      assert.isAtLeast(kept.length, timers.length - 1)
      assert.isBelow(largest(kept), 10_500, timers.join(" "))
      const longest = yield* stage.during(
        "silence",
        Effect.gen(function*() {
          yield* stage.net.blackHole({ process: "worker", silent: 12_000, heal: "deliver" })
          yield* enqueue
          yield* stage.untilAllEnded()
          return (yield* waits(stage, "count")).at(-1)!
        })
      )
      const counts = yield* stage.finish()
      assert.isBelow(longest, poll + 1000)
      return { ...counts, "keep-alive within": largest(kept), waited: longest }
    }))

  scenario(
    "E11",
    "requests to cancel arrive 2 s late, while statements are interrupted all the time",
    {},
    (stage) =>
      Effect.gen(function*() {
        yield* stage.net.slow({ process: cancelRequest, delay: 2000 })
        yield* stage.net.slow({ process: "mine", delay: 4, jitter: 2 })
        const mine = yield* queueAt(stage.net.url, { applicationName: "mine", maxConnections: 4 })
        yield* stage.worker("worker")
        let interrupted = 0
        const surfaced: Array<string> = []
        const interrupting = Effect.gen(function*() {
          const fiber = yield* Effect.forkChild(Admin.get(randomUUID()), { startImmediately: true })
          yield* Effect.sleep((yield* Random.next) * 12)
          yield* Fiber.interrupt(fiber)
          if (Exit.isFailure(yield* Fiber.await(fiber))) interrupted++
        })
        const sleeping = Effect.flatMap(
          SqlClient.SqlClient,
          (sql) => Effect.timeoutOption(sql`select pg_sleep(0.2)`, 20 + Math.random() * 20)
        )
        let enqueued = 0
        const enqueuing = Effect.gen(function*() {
          const sql = yield* SqlClient.SqlClient
          yield* sql.withTransaction(Count.enqueue({ n: 1 }))
          yield* Count.enqueue({ n: 2 })
          enqueued += 2
        }).pipe(Effect.tapCause((cause) => Effect.sync(() => void surfaced.push(String(cause)))), Effect.ignoreCause)
        const until = (yield* now) + (full ? 20_000 : 5000)
        const repeat = <E, R>(effect: Effect.Effect<unknown, E, R>) =>
          Effect.repeat(effect, { while: () => Effect.map(now, (at) => at < until) })
        yield* Effect.provideContext(
          Effect.all([interrupting, interrupting, interrupting, sleeping, enqueuing, enqueuing].map(repeat), {
            concurrency: "unbounded"
          }),
          mine
        )
        assert.deepStrictEqual(surfaced, [])
        const counts = yield* stage.finish()
        assert.deepStrictEqual(counts, { jobs: enqueued, failed: 0, again: 0 })
        return { ...counts, interrupted: `${interrupted}` }
      })
  )

  scenario("E12", "somebody else answers, or nobody does", {}, (stage) =>
    Effect.gen(function*() {
      const worker = yield* stage.worker("worker")
      const producer = yield* stage.producer("producer", { rate: 20 })
      yield* until("it works", Effect.map(stage.runsEnded, (n) => n > 20))
      const used: Record<string, string> = {}
      const files = worker.files()
      let recovered = 0
      for (const answer of ["nothing", "garbage", "alert"] as const) {
        const before = worker.output().length
        const length = full ? 12_000 : 3000
        yield* stage.during(
          answer,
          Effect.gen(function*() {
            yield* stage.net.impostor(answer)
            // Its first reaction is over.
            yield* Effect.sleep(500)
            const cpu = yield* cpuDuring(worker.pid, Effect.sleep(length))
            used[answer] = `${cpu.toFixed(1)} % of a core`
            assert.isBelow(cpu, 5, answer)
            assert.isBelow(stage.net.sessions(), 60, "sessions that are tried and not given up")
          })
        )
        const ended = yield* stage.runsEnded
        const took = yield* until("it works again", Effect.map(stage.runsEnded, (n) => n > ended + 10), {
          within: 15_000
        })
        recovered = Math.max(recovered, took)
        const lines = worker.output().slice(before).split("\n").length
        assert.isBelow(lines, 20, worker.output().slice(before))
      }
      assert.isTrue(worker.running() && producer.running())
      assert.isBelow(worker.files(), files + 10)
      const counts = yield* stage.finish()
      assert.isBelow(recovered, 3000)
      return { ...counts, ...used, recovered }
    }))
}, Victim.layer({ settings: { max_connections: 400, listen_addresses: "*" } }))

/** When the kernel will ask whether each session of a process to a port is still there, in milliseconds; a day if never. */
const keepAlives = (pid: number, port: number): ReadonlyArray<number> => {
  const lines = readFileSync(`/proc/${pid}/net/tcp`, "utf8").trim().split("\n").slice(1)
  const to = `:${port.toString(16).toUpperCase().padStart(4, "0")}`
  return lines.map((line) => line.trim().split(/\s+/)).flatMap(([, , remote, state, , timer]) => {
    if (remote?.endsWith(to) !== true || state !== "01") return []
    const [kind, when] = timer!.split(":")
    return [kind === "02" ? parseInt(when!, 16) * 10 : 86_400_000]
  })
}

/** A link into a network of its own for one process, and one for its evidence that is left alone. */
const makeLink = Effect.fnUntraced(function*(stage: Stage) {
  const name = `pgq${process.pid % 10_000}`
  const ip = (...args: ReadonlyArray<string>) => execFileSync("ip", args, { stdio: "pipe" })
  const [outer, inner] = [`${name}a`, `${name}b`]
  const addresses = { queue: "10.213.1", ledger: "10.213.2" }
  const lay = (pair: string, network: string) => {
    ip("link", "add", `${outer}${pair}`, "type", "veth", "peer", "name", `${inner}${pair}`, "netns", name)
    ip("addr", "add", `${network}.1/24`, "dev", `${outer}${pair}`)
    ip("link", "set", `${outer}${pair}`, "up")
    ip("-n", name, "addr", "add", `${network}.2/24`, "dev", `${inner}${pair}`)
    ip("-n", name, "link", "set", `${inner}${pair}`, "up")
  }
  const tried = yield* Effect.exit(Effect.acquireRelease(
    Effect.try(() => {
      ip("netns", "add", name)
      lay("q", addresses.queue)
      lay("l", addresses.ledger)
    }),
    () =>
      Effect.sync(() => {
        for (const pair of ["q", "l"]) {
          try {
            ip("link", "del", `${outer}${pair}`)
          } catch { /* it went with the network */ }
        }
        ip("netns", "del", name)
      })
  ))
  if (Exit.isFailure(tried)) {
    return {
      how: "a black hole: networks of one's own are not allowed here",
      real: false,
      settings: {},
      down: stage.net.blackHole({ process: "worker lonely", heal: "deliver" })
    }
  }
  // To the server itself: a proxy in between would go on answering its kernel.
  const victim = yield* Victim
  yield* Effect.promise(() =>
    appendFile(join(victim.dataDir, "pg_hba.conf"), `host all all ${addresses.queue}.0/24 scram-sha-256\n`)
  )
  yield* Effect.promise(() => victim.pgCtl(["reload"]))
  const queue = new URL(stage.straight)
  queue.hostname = `${addresses.queue}.1`
  const ledger = yield* makeNet(stage.ledgerUrl, `${addresses.ledger}.1`)
  return {
    how: "a virtual interface that is down",
    real: true,
    settings: {
      queue: { allowInsecure: true },
      url: queue.href,
      ledgerUrl: ledger.url,
      through: ["ip", "netns", "exec", name]
    },
    down: Effect.asVoid(Effect.acquireRelease(
      Effect.sync(() => ip("link", "set", `${outer}q`, "down")),
      () => Effect.sync(() => ip("link", "set", `${outer}q`, "up"))
    ))
  }
})
