/** What happens to PostgreSQL itself: sessions that end, servers that restart, crash, hang, fill up or refuse. */
import { PgClient } from "@effect/sql-pg"
import { assert } from "@effect/vitest"
import { Cause, Context, Duration, Effect, Exit, Fiber, Layer, Option, Redacted } from "effect"
import { execFileSync } from "node:child_process"
import {
  chmodSync,
  closeSync,
  existsSync,
  mkdtempSync,
  openSync,
  readFileSync,
  rmSync,
  writeFileSync,
  writeSync
} from "node:fs"
import { tmpdir } from "node:os"
import { dirname, join } from "node:path"
import { Pay, Work } from "../programs/actor.ts"
import { Count, Step } from "../programs/jobs.ts"
import { ownServer } from "../support/database.ts"
import type { EmbeddedPostgres } from "../support/embedded.ts"
import { serverProcesses } from "../support/processes.ts"
import { now, until } from "../support/queue.ts"
import { statements } from "../support/wire.ts"
import { full } from "./form.ts"
import { allRun, frozen, listening, terminating, untilNoneLeft } from "./inside.ts"
import { theirs } from "./invariants.ts"
import type { Cut } from "./net.ts"
import { scenarios } from "./scenario.ts"
import { type Actor, fullBuffer, load, timing, Victim } from "./stage.ts"

const pgCtl = (server: EmbeddedPostgres, ...args: ReadonlyArray<string>) => Effect.promise(() => server.pgCtl(args))

/** After a crash the postmaster of before may still be letting go of its memory. */
const startAgain = (server: EmbeddedPostgres) =>
  Effect.retry(Effect.tryPromise(() => server.pgCtl(["start"])), { times: 50 })

/** What a process calls itself; empty when there is none. */
const titleOf = (pid: number): string => {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, "latin1").replaceAll("\0", " ").trim()
  } catch {
    return ""
  }
}

scenarios("the server", (scenario) => {
  scenario(
    "D1",
    "every session is terminated every 2 s",
    { short: true, minutes: 8 },
    (stage) =>
      Effect.gen(function*() {
        const { producers, schedulers, workers } = yield* stage.fleet()
        const rounds = full ? 20 : 2
        yield* terminating(stage, rounds)
        const figures = yield* stage.recovered(2000)
        allRun([...producers, ...schedulers, ...workers])
        // A transaction that was cut off four times waits for more than a minute before its last attempt.
        return { rounds, ...figures, ...yield* stage.finish({ within: 150_000 }) }
      })
  )

  scenario("D2", "only sessions that listen are terminated", {}, (stage) =>
    Effect.gen(function*() {
      const worker = yield* stage.worker("worker")
      const listens = Effect.map(stage.value(`select count(*)::int from pg_stat_activity where ${listening}`), (n) =>
        n > 0)
      const [back, late]: [Array<number>, Array<number>] = [[], []]
      for (let round = 0; round < 50; round++) {
        yield* until("it listens", listens, { within: 10_000 })
        yield* stage.rows(`select pg_terminate_backend(pid, 1000) from pg_stat_activity where ${listening}`)
        const { id } = yield* Effect.provideContext(
          Work.enqueue({ key: crypto.randomUUID(), millis: 0, fails: 0 }),
          stage.services
        )
        back.push(yield* until("it listens again", listens, { within: 5000 }))
        late.push(
          yield* until(
            "it ran",
            Effect.map(
              stage.value("select count(*)::int from pgqueue.finished where id = $1::uuid", [id]),
              (n) =>
                n === 1
            )
          )
        )
      }
      assert.isBelow(Math.max(...back), 2000)
      // The poll interval, which is 5 s with LISTEN, and one more.
      assert.isBelow(Math.max(...late), 6000)
      allRun([worker])
      return { relistened: Math.max(...back), latest: Math.max(...late), ...yield* stage.finish() }
    }))

  const restarts = (
    id: string,
    what: string,
    short: boolean,
    rounds: number,
    forgets: boolean,
    restart: (server: EmbeddedPostgres) => Effect.Effect<unknown, unknown>
  ) =>
    scenario(id, what, { short, minutes: 8 }, (stage) =>
      Effect.gen(function*() {
        const { producers, schedulers, workers } = yield* stage.fleet()
        for (let round = 0; round < (full ? rounds : 1); round++) {
          yield* stage.during(`restart ${round}`, restart(stage.victim))
          if (forgets) stage.crashed(what)
          yield* stage.goesOn
        }
        const figures = yield* stage.recovered(3000)
        allRun([...producers, ...schedulers, ...workers])
        return { rounds: full ? rounds : 1, ...figures, ...yield* stage.finish() }
      }))

  restarts("D3", "the server restarts", false, 5, false, (server) => pgCtl(server, "restart", "-m", "fast"))
  restarts(
    "D4",
    "the server crashes and starts again",
    true,
    5,
    true,
    (server) => Effect.andThen(pgCtl(server, "stop", "-m", "immediate"), startAgain(server))
  )
  restarts("D5a", "a backend is killed, and all others with it", false, 3, true, (server) =>
    Effect.gen(function*() {
      const [postmaster, ...children] = serverProcesses(server.dataDir)
      const backends = children.filter((pid) => /postgres: postgres /.test(titleOf(pid)))
      process.kill(backends[Math.floor(backends.length / 2)]!, "SIGKILL")
      // The postmaster starts all over: none of the children that were there is left.
      yield* until(
        "it starts all over",
        Effect.sync(() => serverProcesses(server.dataDir).every((pid) => pid === postmaster || !children.includes(pid)))
      )
    }))
  restarts("D5b", "the postmaster is killed", false, 3, true, (server) =>
    Effect.gen(function*() {
      const [postmaster, ...children] = serverProcesses(server.dataDir)
      process.kill(postmaster!, "SIGKILL")
      yield* until("its children have ended", Effect.sync(() => children.every((pid) => titleOf(pid) === "")), {
        within: 60_000
      })
      yield* startAgain(server)
    }))

  // Nothing happens after the first ten seconds that does not happen all the time: the longest pause between tries is 1 s.
  scenario("D6", "the server is down for long", { minutes: 5 }, (stage) =>
    Effect.gen(function*() {
      const away = 60_000
      const { producers, schedulers, workers } = yield* stage.fleet()
      const all = [...producers, ...schedulers, ...workers]
      const lines = ({ output }: Actor) => output().split("\n").filter((line) => line.startsWith("[")).length
      let said: ReadonlyArray<number> = []
      let grown: ReadonlyArray<number> = []
      yield* stage.during(
        "down",
        Effect.gen(function*() {
          yield* pgCtl(stage.victim, "stop", "-m", "fast")
          const before = all.map((actor) => [lines(actor), actor.memory()] as const)
          yield* Effect.sleep(away)
          said = all.map((actor, n) => (lines(actor) - before[n]![0]) / (away / 60_000))
          // A producer keeps what it could not enqueue; that is its own.
          grown = workers.map((actor, n) =>
            (actor.memory() - before[producers.length + schedulers.length + n]![1]) / 1024
          )
          yield* pgCtl(stage.victim, "start")
        })
      )
      const figures = yield* stage.recovered(5000)
      allRun(all)
      assert.isBelow(Math.max(...said), 20, "log lines a minute of a process")
      assert.isBelow(Math.max(...grown), 20, "megabytes of memory of a worker")
      return {
        ...figures,
        "log lines a minute": Math.max(...said),
        "MB more": Math.max(...grown),
        ...yield* stage.finish({ within: 120_000 })
      }
    }))

  scenario(
    "D7",
    "the database gives up statements after 50 ms, and the disk is slow",
    {},
    (stage) =>
      Effect.gen(function*() {
        yield* stage.rows(
          "create function watch.slow() returns trigger language plpgsql as $$ begin if random() < 0.1 then perform pg_sleep(0.08); end if; return new; end $$"
        )
        for (const table of ["job", "finished", "lease"]) {
          yield* stage.rows(
            `create trigger slow before insert on pgqueue.${table} for each row execute function watch.slow()`
          )
        }
        yield* stage.rows(
          "do $$ begin execute format('alter database %I set statement_timeout = ''50ms''', current_database()); end $$"
        )
        // What claims and settles wait for is not what their jobs take: a lower rate.
        const { workers } = yield* stage.fleet({ rate: 60, warm: 8000 })
        allRun(workers)
        const unknown = yield* stage.recorded("select count(*)::int from intent where outcome = 'unknown'")
        // In the application's own transactions its own limits hold, and are typed errors.
        assert.isAbove(unknown, 0)
        return { "enqueues given up in transactions of the application": unknown, ...yield* stage.finish() }
      })
  )

  scenario("D8", "sessions that are idle in a transaction end after 100 ms, and handlers sleep in theirs", {
    short: true
  }, (stage) =>
    Effect.gen(function*() {
      yield* stage.rows(
        "do $$ begin execute format('alter database %I set idle_in_transaction_session_timeout = ''100ms''', current_database()); end $$"
      )
      const worker = yield* stage.worker("worker")
      const enqueue = (fails: number, millis = 1200) => Pay.enqueue({ key: crypto.randomUUID(), millis, fails })
      // A session that ends in the middle of a handler's transaction is a failed attempt.
      yield* Effect.provideContext(enqueue(0, 2500), stage.services)
      yield* until(
        "its session is lost",
        Effect.map(
          stage.rows(
            `select pg_terminate_backend(pid) from pg_stat_activity
             where ${theirs} and state = 'idle in transaction' and query like '%paid%'`
          ),
          (lost) => lost.length > 0
        )
      )
      // The handler's transaction has a limit of its own, the lease.
      yield* Effect.provideContext(Effect.all([enqueue(0), enqueue(1)]), stage.services)
      // And the application's own transaction is its own.
      const mine = yield* Effect.exit(Effect.scoped(
        Effect.gen(function*() {
          const sql = yield* PgClient.PgClient
          return yield* sql.withTransaction(
            Effect.andThen(enqueue(0), Effect.andThen(Effect.sleep(400), sql`select 1`))
          )
        }).pipe(
          Effect.provide(Layer.fresh(PgClient.layer({ url: Redacted.make(stage.url) }))),
          Effect.provideContext(stage.services)
        )
      ))
      assert.isTrue(Exit.isFailure(mine))
      yield* stage.untilAllEnded()
      allRun([worker])
      // The statement after the loss has failed with what its handler can handle: the server's last word, or none.
      const attempts = yield* stage.rows<{ tag: string; why: string }>(
        "select tag, error ->> 'why' as why from pgqueue.attempt order by why"
      )
      const whys = attempts.filter(({ tag }) => tag === "Failed").map(({ why }) => why).join(" ")
      assert.match(whys, /^(UnknownError|ConnectionError) .*it fails at first$/, JSON.stringify(attempts))
      assert.notMatch(worker.output(), /died|defect/i)
      return { attempts: whys, ...yield* stage.finish() }
    }))

  scenario("D10", "there are no connections left for 20 s", { minutes: 4 }, (stage) =>
    Effect.gen(function*() {
      const { producers, schedulers, workers } = yield* stage.fleet()
      let most = 0
      yield* stage.during(
        "no connections",
        Effect.gen(function*() {
          const greedy = yield* Effect.map(
            Layer.build(Layer.fresh(
              PgClient.layer({ url: Redacted.make(stage.url), maxConnections: 300, applicationName: "greedy" })
            )),
            Context.get(PgClient.PgClient)
          )
          const hold = Effect.forever(
            Effect.ignore(Effect.scoped(Effect.andThen(greedy.reserve, Effect.never))).pipe(
              Effect.andThen(Effect.sleep(20))
            )
          )
          yield* Effect.forEach(Array.from({ length: 250 }), () => Effect.forkScoped(hold))
          yield* Effect.sleep(1000)
          yield* stage.rows(`select pg_terminate_backend(pid) from pg_stat_activity where ${theirs}`)
          for (let n = 0; n < 95; n++) {
            most = Math.max(
              most,
              yield* stage.value(
                `select coalesce(max(count), 0)::int from
                 (select count(*) from pg_stat_activity where ${theirs} group by application_name) of_each`
              )
            )
            yield* Effect.sleep(200)
          }
        })
      )
      const figures = yield* stage.recovered(2000)
      allRun([...producers, ...schedulers, ...workers])
      // Those of the application, and of its queue.
      assert.isAtMost(most, 10 + 11)
      return { ...figures, "sessions of a process": `${most}`, ...yield* stage.finish({ within: 150_000 }) }
    }))

  scenario("D11", "the server is read-only for 10 s", {}, (stage) =>
    Effect.gen(function*() {
      const { producers, schedulers, workers } = yield* stage.fleet()
      const readOnly = (on: "on" | "off") =>
        Effect.andThen(
          stage.rows(`alter system set default_transaction_read_only = ${on}`),
          stage.rows("select pg_reload_conf()")
        )
      yield* stage.during(
        "read-only",
        Effect.andThen(readOnly("on"), Effect.sleep(10_000)).pipe(Effect.ensuring(Effect.orDie(readOnly("off"))))
      )
      const figures = yield* stage.recovered(3000)
      allRun([...producers, ...schedulers, ...workers])
      return { ...figures, ...yield* stage.finish() }
    }))
})

scenarios("the server, of many kinds", (scenario) => {
  for (const level of ["serializable", "repeatable read"]) {
    scenario(
      `D14 ${level}`,
      "transactions are of this level by default",
      {},
      (stage) =>
        Effect.gen(function*() {
          yield* stage.rows(
            `do $$ begin execute format('alter database %I set default_transaction_isolation = ''${level}''', current_database()); end $$`
          )
          const { producers, schedulers, workers } = yield* stage.fleet({ warm: full ? 10_000 : 3000 })
          allRun([...producers, ...schedulers, ...workers])
          const counts = yield* stage.finish({ faultFree: true })
          // Not even in the application's own transactions, which do nothing but enqueue.
          const surfaced = yield* stage.recorded(
            "select count(*)::int from intent where outcome not in ('acked', 'rejected')"
          )
          assert.strictEqual(surfaced, 0)
          return { surfaced, ...counts }
        })
    )
  }

  scenario("D16", "all processes of the server are frozen for 20 s", {}, (stage) =>
    Effect.gen(function*() {
      const { producers, schedulers, workers } = yield* stage.fleet()
      // Once the last beat that was answered is too old nothing starts, of which more than enough has been claimed.
      const late = `select count(*)::int from ledger where phase = 'start'
        and at > (select max(begun_at) from fault) + interval '${timing.lease - timing.heartbeat + 250} milliseconds'`
      yield* stage.here(Step.enqueueAll(Array.from({ length: 170 }, () => ({ millis: 900 }))))
      let silent: ReadonlyArray<string> = []
      yield* stage.during(
        "frozen",
        Effect.gen(function*() {
          // Who only enqueues hears of it from his enqueues.
          const watching = [...schedulers, ...workers]
          const said = watching.map(({ output }) => output().length)
          yield* frozen(stage.victim)
          yield* Effect.sleep(15_000)
          silent = watching.filter(({ output }, n) => !/WARN/.test(output().slice(said[n]))).map(({ name }) => name)
          yield* Effect.sleep(5000)
        })
      )
      assert.deepStrictEqual(silent, [], "have not noticed")
      const between = yield* stage.recorded(`${late} and at < (select max(cleared_at) from fault)`)
      assert.strictEqual(between, 0, "runs begun without a lease")
      const figures = yield* stage.recovered(5000)
      allRun([...producers, ...schedulers, ...workers])
      return { ...figures, ...yield* stage.finish() }
    }))

  scenario("D18", "processes are started before their server", {}, (stage) =>
    Effect.gen(function*() {
      yield* pgCtl(stage.victim, "stop", "-m", "fast")
      const starting = yield* Effect.forkChild(Effect.all([
        stage.worker("worker 1"),
        stage.worker("worker 2"),
        stage.scheduler("scheduler"),
        stage.producer("producer", { rate: 50 })
      ], { concurrency: "unbounded" }))
      // One that is to fail fast does.
      const begun = yield* now
      const impatient = yield* Effect.exit(stage.worker("impatient", { queue: { onUnavailable: "fail" } }))
      assert.isTrue(Exit.isFailure(impatient) && /ended with 1/.test(Cause.pretty(impatient.cause)))
      assert.isBelow((yield* now) - begun, 10_000)
      yield* Effect.sleep(5000)
      assert.isUndefined(starting.pollUnsafe())
      yield* pgCtl(stage.victim, "start")
      const [ready] = yield* Effect.timed(Fiber.join(starting))
      const took = Duration.toMillis(ready)
      assert.isBelow(took, 2000)
      yield* until("it works", Effect.map(stage.runsEnded, (ended) => ended > 50))
      return { ready: took, ...yield* stage.finish() }
    }))

  /** Statements whose COMMIT is their own, by what they are known by, and who sends them. */
  const commits: ReadonlyArray<
    readonly [what: string, cut: Omit<Cut, "at" | "nth">]
  > = [
    ["an enqueue", { text: "refuse_", process: "producer" }],
    ["an enqueue in a transaction", { text: /^COMMIT$/, process: "producer" }],
    ["a claim", { text: statements.claim, process: "worker" }],
    ["a completion", { text: statements.complete, process: "worker" }],
    ["a failure", { text: statements.settle, param: "failed", process: "worker" }],
    ["the end of a transactional handler", { text: /^COMMIT$/, process: "worker" }],
    ["a rescue", { text: "'Lost'", process: "worker" }],
    ["a tick", { text: statements.tick, process: "scheduler" }]
  ]
  scenario("D19", "sessions end exactly at a COMMIT", { short: true, minutes: 15 }, (stage) =>
    Effect.gen(function*() {
      const { schedulers, workers } = yield* stage.fleet({ workers: 3 })
      const rounds = full ? 4 : 1
      const happened: Record<string, number> = {}
      for (let round = 0; round < rounds; round++) {
        for (const [what, cut] of commits) {
          for (const at of ["sent", "answered"] as const) {
            const done = yield* stage.net.cut({ ...cut, at, nth: 1 + round % 3 })
            // Somebody has to be dead for a rescue.
            if (what === "a rescue") {
              const mortal = yield* stage.worker("worker mortal")
              yield* until(
                "it works",
                Effect.map(
                  stage.recorded("select count(*)::int from ledger where boot like 'worker mortal%'"),
                  (n) => n > 0
                )
              )
              yield* mortal.kill("SIGKILL")
            }
            const hit = yield* Effect.timeoutOption(done, 15_000)
            assert.isTrue(Option.isSome(hit), `${what} has not been cut (${at})`)
            happened[what] = (happened[what] ?? 0) + 1
          }
        }
      }
      allRun([...schedulers, ...workers])
      return { ...happened, ...yield* stage.finish() }
    }))

  scenario("D20", "nothing can be settled for a while, and claims go on", {}, (stage) =>
    Effect.gen(function*() {
      // One, so that its buffer fills up.
      const { producers, schedulers, workers } = yield* stage.fleet({ workers: 1, rate: load / 4 })
      const held = stage.value("select coalesce(sum(cardinality(ids)), 0)::int from pgqueue.lease")
      yield* stage.rows(
        `create function watch.full() returns trigger language plpgsql as $$ begin raise 'no space' using errcode = '53100'; end $$`
      )
      let most = 0
      let waiting = 0
      yield* stage.during(
        "no settles",
        Effect.gen(function*() {
          yield* Effect.acquireRelease(
            stage.rows(
              "create trigger full_up before insert on pgqueue.finished for each row execute function watch.full()"
            ),
            () => Effect.orDie(stage.rows("drop trigger full_up on pgqueue.finished"))
          )
          yield* stage.here(Count.enqueueAll(Array.from({ length: 8000 }, (_, n) => ({ n }))))
          for (let n = 0; n < 150; n++) {
            most = Math.max(most, yield* held)
            yield* Effect.sleep(200)
          }
          waiting = yield* stage.value("select count(*)::int from pgqueue.ready")
        })
      )
      // It has all that it may have, and no more: what waits to be settled, and what is claimed ahead.
      assert.isAtLeast(most, fullBuffer)
      assert.isBelow(most, 2 * fullBuffer + 1000)
      assert.isAbove(waiting, 1000)
      allRun([...producers, ...schedulers, ...workers])
      yield* untilNoneLeft(stage, "count")
      const figures = yield* stage.recovered(5000)
      const counts = yield* stage.finish({ within: 120_000 })
      assert.strictEqual(counts.again, 0)
      return { "most held": `${most}`, ...figures, ...counts }
    }))
})

/** What makes a server's clock step when told. */
const stepped = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"

{
  const without = existsSync(stepped) ? undefined : "without libfaketime"
  const clock = join(mkdtempSync(join(tmpdir(), "clock-")), "step")
  const step = (by: string) => Effect.sync(() => writeFileSync(clock, by))
  writeFileSync(clock, "+0")
  chmodSync(dirname(clock), 0o755)
  scenarios(
    "a server whose clock steps",
    (scenario) => {
      for (const by of ["-1h", "+1h"]) {
        scenario(`D21 ${by}`, "the server's clock steps", { without }, (stage) =>
          Effect.gen(function*() {
            const { producers, schedulers, workers } = yield* stage.fleet()
            const rescued = stage.value("select count(*)::int from pgqueue.attempt where tag = 'Lost'")
            yield* step(by)
            yield* Effect.sleep(15_000)
            const lost = yield* rescued
            assert.strictEqual(lost, 0, "jobs of living workers that were rescued")
            if (by.startsWith("-")) {
              yield* step("+0")
              yield* Effect.sleep(10_000)
            } // The other way round, what was enqueued meanwhile would not be due for an hour.
            allRun([...producers, ...schedulers, ...workers])
            const counts = yield* stage.finish({ clockStepped: true })
            yield* step("+0")
            return { lost, ...counts }
          }))
      }
    },
    Victim.layer({
      environment: {
        LD_PRELOAD: stepped,
        FAKETIME_TIMESTAMP_FILE: clock,
        FAKETIME_NO_CACHE: "1",
        FAKETIME_DONT_FAKE_MONOTONIC: "1",
        FAKETIME_DONT_RESET: "1"
      }
    })
  )
}

/** A server that was left read-only is as it was. */
const writable = (url: string) =>
  Effect.gen(function*() {
    const sql = yield* PgClient.PgClient
    yield* sql`alter system reset all`
    yield* sql`select pg_reload_conf()`
  }).pipe(
    Effect.provide(Layer.fresh(PgClient.layer({ url: Redacted.make(url) }))),
    Effect.orDie
  )

scenarios("a primary with a standby", (scenario) => {
  for (const kind of ["sync", "async"] as const) {
    scenario(
      `D12 ${kind}`,
      "a standby takes over, and the primary of before stays as it is",
      { minutes: 4 },
      (stage) =>
        Effect.gen(function*() {
          yield* pgCtl(stage.victim, "stop", "-m", "fast")
          const standby = yield* ownServer({ standbyOf: stage.victim })
          yield* pgCtl(stage.victim, "start")
          if (kind === "sync") {
            yield* stage.rows("alter system set synchronous_standby_names = '*'")
            yield* stage.rows("select pg_reload_conf()")
          }
          yield* until(
            "it follows",
            Effect.map(
              stage.value<string>(
                "select coalesce(max(sync_state), '') from pg_stat_replication where state = 'streaming'"
              ),
              (state) => state === kind
            )
          )
          const { producers, schedulers, workers } = yield* stage.fleet()
          yield* Effect.addFinalizer(() => writable(stage.victim.url))
          yield* stage.during(
            "fail-over",
            Effect.gen(function*() {
              yield* stage.rows("alter system set default_transaction_read_only = on")
              yield* stage.rows("select pg_reload_conf()")
              yield* pgCtl(standby, "promote")
              yield* stage.lead(standby.url)
            })
          )
          stage.crashed("fail-over")
          const figures = yield* stage.recovered(10_000)
          allRun([...producers, ...schedulers, ...workers])
          if (kind === "sync") return { ...figures, ...yield* stage.finish() }
          // What was acknowledged and not yet copied is lost with such a standby: of the last moment before, and nothing else.
          const counts = yield* stage.finish({ lossy: true })
          const lost = yield* stage.value(
            "select count(*)::int from evidence.intent i where outcome = 'acked' and not exists (select 1 from pgqueue.finished f where f.id = i.job)"
          )
          const early = yield* stage.recorded(
            `select count(*)::int from intent where outcome = 'acked' and key = any ($1::uuid[])
           and answered_at < (select min(begun_at) from fault) - interval '1 second'`,
            [(yield* stage.rows<{ key: string }>(
              "select i.key::text from evidence.intent i where outcome = 'acked' and not exists (select 1 from pgqueue.finished f where f.id = i.job)"
            )).map(({ key }) => key)]
          )
          assert.strictEqual(early, 0)
          return { ...figures, lost, ...counts }
        })
    )
  }
}, Victim.layer({ settings: { wal_level: "replica", max_wal_senders: 5, wal_keep_size: "256MB" } }))

/** Writes until there is no room left. */
const fill = (path: string): void => {
  const file = openSync(path, "w")
  try {
    for (;;) writeSync(file, Buffer.alloc(65_536, 1))
  } catch {
    closeSync(file)
  }
}

/** A file system with so much room. */
const small = Effect.acquireRelease(
  Effect.sync(() => {
    const folder = mkdtempSync(join(tmpdir(), "small-"))
    execFileSync("mount", ["-t", "tmpfs", "-o", "size=512m,mode=0755", "tmpfs", folder])
    return folder
  }),
  (folder) =>
    Effect.sync(() => {
      execFileSync("umount", ["-l", folder])
      rmSync(folder, { recursive: true, force: true })
    })
)

const fullDisk = Layer.effect(
  Victim,
  // What is written again and again is to be written to new files soon.
  Effect.flatMap(
    small,
    (within) => ownServer({ within, settings: { max_wal_size: "64MB", min_wal_size: "32MB", wal_recycle: "off" } })
  )
)

scenarios("a server on a small disk", (scenario) => {
  const without = process.getuid?.() === 0 ? undefined : "who may mount nothing"
  scenario("D13", "the disk is full for 20 s", { without, minutes: 4 }, (stage) =>
    Effect.gen(function*() {
      const { producers, schedulers, workers } = yield* stage.fleet()
      const filler = join(stage.victim.dataDir, "..", "..", "filler")
      yield* stage.during(
        "full",
        Effect.gen(function*() {
          fill(filler)
          yield* Effect.sleep(20_000)
          rmSync(filler)
          // When the log of changes had no room either it has given up.
          const up = yield* Effect.exit(pgCtl(stage.victim, "status"))
          if (Exit.isFailure(up)) {
            stage.crashed("full")
            yield* startAgain(stage.victim)
          }
        })
      )
      const figures = yield* stage.recovered(10_000)
      allRun([...producers, ...schedulers, ...workers])
      return { ...figures, ...yield* stage.finish({ within: 120_000 }) }
    }))
}, fullDisk)
