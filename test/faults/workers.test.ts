/** What happens to processes that work: killed, frozen, blocked, poisoned, out of memory, cut off from their heartbeat. */
import { assert } from "@effect/vitest"
import { Effect } from "effect"
import { SqlClient } from "effect/sql"
import * as Database from "../../src/Database.ts"
import * as Store from "../../src/Store.ts"
import { Poison, Step, Trial } from "../programs/jobs.ts"
import { until } from "../support/queue.ts"
import {
  bury,
  claim,
  claimed,
  claimOptions,
  entry,
  job,
  makeDue,
  schema,
  session,
  stateOf,
  Storage
} from "../support/storage.ts"
import { statements } from "../support/wire.ts"
import { full, limit } from "./form.ts"
import { idsOf } from "./inside.ts"
import type { Cut } from "./net.ts"
import { scenarios } from "./scenario.ts"
import { type Actor, rescuedWithin, type Stage, timing } from "./stage.ts"

/** By what requests are known. */
const { claim: claiming, settle: settling } = statements
const beating = "beat_at = clock_timestamp() where id"
const reaping = "delete from \"pgqueue\".worker where id = any"
const rescuing = "for update of l skip locked"
const firing = "as i(name, next_at, updated_at, last_job, following, passed)"

interface Death {
  readonly boot: string
  readonly at: string
}

const clock = (stage: Stage) => stage.value<string>("select clock_timestamp()::text")

/** Kills a process and tells when that was. */
const kill = Effect.fnUntraced(function*(stage: Stage, actor: Actor) {
  const at = yield* clock(stage)
  yield* actor.kill("SIGKILL")
  yield* actor.ended
  return { boot: actor.boot, at } satisfies Death
})

/**
 * What was taken from the dead, lost for the first time, and how long after its death the last of it was in somebody's hands
 * again, in milliseconds; by what the database has written down. Later losses are made to wait.
 */
const orphans = (stage: Stage, deaths: ReadonlyArray<Death>) =>
  Effect.map(
    stage.rows<{ orphans: number; reclaimed: number }>(
      `with death as (
        select distinct b.worker, d.at from json_to_recordset($1::json) as d(boot text, at timestamptz) join watch.beat b on b.name = d.boot
      )
      select count(*)::int as orphans, coalesce(max(extract(epoch from n.at - d.at) * 1000), 0)::float8 as reclaimed
      from death d join watch.transition t on t.worker = d.worker and t.what = 'left' and t.at > d.at and not exists (
        select 1 from pgqueue.attempt a where a.job = t.job and a.tag = 'Lost' and a.ended_at < t.at - interval '1 second')
      cross join lateral (select at from watch.transition n where n.job = t.job and n.seq > t.seq and n.what <> 'left' order by seq limit 1) n`,
      [JSON.stringify(deaths)]
    ),
    ([row]) => row!
  )

/**
 * How much of what came in from one moment on was done meanwhile, in percent. Not by the rate before that: how much a machine
 * that has other work does in a second changes by the minute, for those who enqueue as well.
 */
const doneSince = (stage: Stage, from: string) =>
  stage.recorded(
    `select (100.0 * (select count(*) from ledger where phase = 'end' and at > $1::timestamptz)
      / greatest(1, (select count(*) from intent where outcome = 'acked' and answered_at > $1::timestamptz)))::float8`,
    [from]
  )

/** How often each of these jobs was started. */
const startsOf = (stage: Stage, ids: ReadonlyArray<string>) =>
  Effect.map(
    stage.ledger.query<{ count: number }>(
      "select (select count(distinct run)::int from ledger where job = u.id) as count from unnest($1::uuid[]) as u(id)",
      [ids]
    ),
    (found) => found.map(({ count }) => count)
  )

const statusOf = (stage: Stage, ids: ReadonlyArray<string>) =>
  Effect.map(
    stage.rows<{ status: string }>("select status from pgqueue.finished where id = any ($1::uuid[])", [ids]),
    (found) => found.map(({ status }) => status)
  )

const untilStarted = (stage: Stage, ids: ReadonlyArray<string>, within = 20_000) =>
  until(
    "they have started",
    Effect.map(
      stage.recorded("select count(distinct job)::int from ledger where job = any ($1::uuid[])", [ids]),
      (started) => started === ids.length
    ),
    { within }
  )

const untilFinished = (stage: Stage, ids: ReadonlyArray<string>, within = 60_000) =>
  until(
    "they have ended",
    Effect.map(
      stage.value("select count(*)::int from pgqueue.finished where id = any ($1::uuid[])", [ids]),
      (ended) => ended === ids.length
    ),
    { within, every: 50 }
  )

/** Waits until a worker has started again under a new id. */
const untilRegisteredAgain = (stage: Stage, actor: Actor, old: string) =>
  until(
    "it has started again under a new id",
    Effect.map(
      stage.value("select count(*)::int from pgqueue.worker where name = $1 and id <> $2::uuid", [actor.boot, old]),
      (count) => count === 1
    )
  )

const workerId = (stage: Stage, actor: Actor) =>
  stage.value<string>("select id::text from pgqueue.worker where name = $1", [actor.boot])

/** Where a process is killed, and whose it is. */
interface Point {
  readonly role: "worker" | "scheduler"
  readonly cut: Cut
  /** What has to be there so that it comes to that. */
  readonly first?: (stage: Stage, workers: ReadonlyArray<Actor>) => Effect.Effect<unknown, unknown>
}

const points: Record<string, Point | "dies before" | "dies after"> = {
  "claim.sent": { role: "worker", cut: { text: claiming, at: "sent" } },
  "claim.received": { role: "worker", cut: { text: claiming, at: "acknowledged" } },
  "handler.before": "dies before",
  "handler.after": "dies after",
  "complete.sent": { role: "worker", cut: { text: settling, at: "sent" } },
  "complete.acked": { role: "worker", cut: { text: settling, at: "acknowledged" } },
  "fail.sent": { role: "worker", cut: { text: settling, param: "failed", at: "sent" } },
  "heartbeat.sent": { role: "worker", cut: { text: beating, at: "sent" } },
  "cron.cas.before": { role: "scheduler", cut: { text: firing, at: "lost" } },
  "cron.cas.after": { role: "scheduler", cut: { text: firing, at: "answered" } },
  // What it had not ended in time it hands back.
  "shutdown.release": {
    role: "worker",
    cut: { text: settling, param: "released", at: "sent" },
    first: (stage, workers) =>
      Effect.gen(function*() {
        const ids = idsOf(
          yield* stage.here(
            Step.enqueueAll(Array.from({ length: 20 }, () => ({ millis: 1500 })), { priority: "high" })
          )
        )
        const holder = () =>
          stage.value<string | undefined>(
            `select w.name from pgqueue.lease l join pgqueue.worker w on w.id = l.worker
             where cardinality(array(select unnest(l.ids) intersect select unnest($1::uuid[]))) > 3 limit 1`,
            [ids]
          )
        yield* until("somebody holds them", Effect.map(holder(), (name) => name !== undefined))
        const name = yield* holder()
        yield* workers.find((actor) => actor.boot === name)?.kill("SIGTERM") ?? Effect.void
      })
  },
  "rescue.selected": { role: "worker", cut: { text: rescuing, at: "sent" } }
}

scenarios("workers", (scenario) => {
  scenario("B1", "one of four workers is killed every 3 s", { minutes: 10 }, (stage) =>
    Effect.gen(function*() {
      const { workers: [...workers] } = yield* stage.fleet()
      const deaths: Array<Death> = []
      for (let round = 0; round < (full ? 30 : 3); round++) {
        const begun = performance.now()
        const at = round % workers.length
        deaths.push(yield* kill(stage, workers[at]!))
        workers[at] = yield* stage.worker(workers[at]!.name)
        yield* Effect.sleep(Math.max(0, 3000 - (performance.now() - begun)))
      }
      const throughput = yield* doneSince(stage, deaths[0]!.at)
      const counts = yield* stage.finish()
      const lost = yield* orphans(stage, deaths)
      assert.isAbove(lost.orphans, 0)
      assert.isBelow(lost.reclaimed, rescuedWithin)
      assert.isAbove(throughput, 70)
      return { ...counts, ...lost, kills: deaths.length, throughput: `${Math.round(throughput)} %` }
    }))

  scenario(
    "B2",
    "a worker or a scheduler is killed at each point of its work",
    { minutes: 12 },
    (stage) =>
      Effect.gen(function*() {
        const cast = yield* stage.fleet({ producers: 1, rate: 60, warm: 0, settings: { gracePeriod: 300 } })
        const actors = new Map([...cast.workers, ...cast.schedulers].map((actor) => [actor.name, actor]))
        const deaths: Array<Death> = []
        for (const [name, point] of Object.entries(points)) {
          for (let round = 0; round < (full ? 4 : 1); round++) {
            const workers = [...actors.values()].filter((actor) => actor.name.startsWith("worker"))
            let victim: Actor | undefined
            if (typeof point === "string") {
              yield* stage.here(Trial.enqueue({ first: 20, next: 20, how: point }, { priority: "high" }))
              victim = yield* Effect.raceAll(workers.map((actor) => Effect.as(actor.ended, actor)))
            } else {
              const happened = yield* stage.net.cut({ ...point.cut, process: point.role }, (name) => {
                victim = actors.get(name)!
                victim.strike("SIGKILL")
              })
              if (point.first !== undefined) yield* point.first(stage, workers)
              yield* Effect.timeoutOrElse(happened, {
                duration: "30 seconds",
                orElse: () => Effect.die(new Error(`nobody comes to ${name}`))
              })
            }
            const { signal } = yield* victim!.died
            assert.strictEqual(signal, "SIGKILL", victim!.output())
            deaths.push({ boot: victim!.boot, at: yield* clock(stage) })
            // One that was told to stop, and was not the one that came to the point, is replaced, too.
            for (const actor of actors.values()) {
              if (actor.running()) continue
              const role = actor.name.startsWith("worker") ? stage.worker : stage.scheduler
              actors.set(actor.name, yield* role(actor.name, { gracePeriod: 300 }))
            }
          }
        }
        const counts = yield* stage.finish()
        // Whatever was acknowledged was over.
        assert.deepStrictEqual(
          yield* stage.rows(
            `select r.job from evidence.run r join watch.transition t on t.job = r.job and t.what = 'completed' and r.begun_at > t.at`
          ),
          []
        )
        const lost = yield* orphans(stage, deaths)
        return { ...counts, ...lost, kills: deaths.length }
      })
  )

  scenario(
    "B3",
    "a worker is frozen for three leases while another one ends its jobs",
    { short: true },
    (stage) =>
      Effect.gen(function*() {
        const holder = yield* stage.worker("worker 1")
        const trials = (count: number, first: number, how: "completes" | "fails" | "notes") =>
          Array.from({ length: count }, () => ({ first, next: 20, how }))
        // Some have nothing to say for long, the others want to be settled as soon as it goes on.
        const ids = idsOf(
          yield* stage.here(Trial.enqueueAll([
            ...trials(4, 600_000, "completes"),
            ...trials(2, 2 * timing.lease, "completes"),
            ...trials(2, 2 * timing.lease, "fails"),
            ...trials(2, 2 * timing.lease, "notes")
          ]))
        )
        yield* untilStarted(stage, ids)
        const old = yield* workerId(stage, holder)
        yield* stage.worker("worker 2")
        const everything = Effect.gen(function*() {
          return [
            yield* stage.rows("select * from pgqueue.finished order by id"),
            yield* stage.rows("select * from pgqueue.attempt order by id"),
            yield* stage.rows("select * from pgqueue.job order by id")
          ]
        })
        const { after, taken, thawed } = yield* Effect.scoped(Effect.gen(function*() {
          yield* holder.frozen
          const begun = performance.now()
          yield* untilFinished(stage, ids, rescuedWithin)
          const taken = performance.now() - begun
          yield* Effect.sleep(3 * timing.lease - (performance.now() - begun))
          return { taken, after: yield* everything, thawed: yield* clock(stage) }
        }))
        yield* untilRegisteredAgain(stage, holder, old)
        yield* until(
          "its handlers have stopped",
          Effect.map(
            stage.recorded(
              "select count(*)::int from ledger where boot = $1 and phase in ('end', 'interrupted')",
              [holder.boot]
            ),
            (count) => count === ids.length
          )
        )
        const interrupted = yield* stage.recorded(
          `select (extract(epoch from max(at) - $1::timestamptz) * 1000)::float8 from ledger where boot = $2 and phase = 'interrupted'`,
          [thawed, holder.boot]
        )
        // What it claims now is settled after whatever it had to say about the others.
        const [next] = idsOf(
          yield* stage.here(
            Trial.enqueueAll([1, 2, 3, 4].map(() => ({ first: 300, next: 0, how: "completes" as const })))
          )
        )
        yield* untilFinished(stage, [next!])
        const now = yield* everything
        assert.includeDeepMembers([...now[0]!], [...after[0]!])
        assert.deepStrictEqual(now[1], after[1])
        assert.strictEqual(
          yield* stage.value("select count(*)::int from watch.beat where worker = $1::uuid and at > $2::timestamptz", [
            old,
            thawed
          ]),
          0
        )
        assert.isBelow(interrupted, limit(timing.heartbeat))
        assert.deepStrictEqual(yield* startsOf(stage, ids), ids.map(() => 2))
        const counts = yield* stage.finish()
        return { ...counts, taken, interrupted }
      })
  )

  scenario("B4", "a worker is frozen for half a lease", {}, (stage) =>
    Effect.gen(function*() {
      const { workers: [frozen] } = yield* stage.fleet({ workers: 2, producers: 1, rate: 100, schedulers: 0 })
      for (let round = 0; round < (full ? 8 : 2); round++) {
        const ids = idsOf(
          yield* stage.here(Step.enqueueAll(Array.from({ length: 10 }, () => ({ millis: timing.lease }))))
        )
        yield* untilStarted(stage, ids)
        // At whatever is left of the time between two of its heartbeats: the last one is as old as it can be, too.
        yield* Effect.sleep(round * timing.heartbeat * 0.37 % timing.heartbeat)
        yield* stage.during(`freeze ${round}`, Effect.andThen(frozen!.frozen, Effect.sleep(timing.lease / 2)))
        yield* untilFinished(stage, ids)
        assert.deepStrictEqual(yield* startsOf(stage, ids), ids.map(() => 1))
      }
      assert.notMatch(frozen!.output(), /interrupted/)
      return yield* stage.finish({ faultFree: true })
    }))

  scenario(
    "B5",
    "a job takes more memory than there is, of the heap and of the machine",
    {},
    (stage) =>
      Effect.gen(function*() {
        const most = 300_000
        const poison = yield* Effect.forEach(
          ["heap", "memory"] as const,
          (how) => stage.here(Poison.enqueue({ how }, { maxAttempts: 2, priority: "high" }))
        )
        const neighbours = idsOf(
          yield* stage.here(Step.enqueueAll(Array.from({ length: 20 }, () => ({ millis: 500 }))))
        )
        const kept = yield* Effect.forEach([1, 2], (n) => stage.kept(`worker ${n}`, {}, ["--max-old-space-size=64"]))
        // What the kernel does in a group of processes that is out of memory.
        yield* Effect.forkScoped(Effect.forever(Effect.gen(function*() {
          for (const { current } of kept) {
            const actor = current()
            if (actor.running() && actor.memory() > most) yield* actor.kill("SIGKILL")
          }
          yield* Effect.sleep(10)
        })))
        yield* untilFinished(stage, [...neighbours, ...idsOf(poison)], 120_000)
        const ends = kept.flatMap(({ ends }) => ends().map(({ signal }) => signal))
        const starts = yield* startsOf(stage, idsOf(poison))
        for (const count of starts) assert.isAtMost(count, 3)
        assert.include(ends, "SIGKILL")
        assert.include(ends, "SIGABRT")
        assert.deepStrictEqual(yield* statusOf(stage, idsOf(poison)), ["discarded", "discarded"])
        assert.deepStrictEqual(yield* statusOf(stage, neighbours), neighbours.map(() => "completed"))
        const counts = yield* stage.finish()
        return { ...counts, starts: starts.join(" and "), ends: ends.length }
      })
  )

  scenario("B6", "a handler blocks its process for three leases", {}, (stage) =>
    Effect.gen(function*() {
      const holder = yield* stage.worker("worker 1")
      const other = yield* stage.worker("worker 2")
      // Long enough for it to judge.
      yield* Effect.sleep(timing.lease + timing.heartbeat)
      // It takes none of them.
      const { id, steps } = yield* Effect.scoped(Effect.gen(function*() {
        yield* other.frozen
        const first = 2 * timing.lease
        const steps = idsOf(
          yield* stage.here(Trial.enqueueAll([1, 2, 3].map(() => ({ first, next: 20, how: "completes" as const }))))
        )
        yield* untilStarted(stage, steps)
        const { id } = yield* stage.here(Trial.enqueue({ first: 3 * timing.lease, next: 20, how: "blocks" }))
        yield* untilStarted(stage, [id])
        return { id, steps }
      }))
      const old = yield* workerId(stage, holder)
      const taken = yield* untilFinished(stage, [...steps, id], rescuedWithin)
      yield* untilRegisteredAgain(stage, holder, old)
      yield* until("it warns", Effect.sync(() => holder.output().includes("the event loop stood still for")))
      const counts = yield* stage.finish()
      assert.deepStrictEqual(
        yield* stage.rows(
          "select t.job from watch.transition t where t.worker = $1::uuid and t.what not in ('claimed', 'left')",
          [old]
        ),
        []
      )
      return { ...counts, taken }
    }))

  scenario("B7", "a handler ends its process, by exit and by abort", {}, (stage) =>
    Effect.gen(function*() {
      const poison = yield* Effect.forEach(
        ["exit", "abort"] as const,
        (how) => stage.here(Poison.enqueue({ how }, { maxAttempts: 2, priority: "high" }))
      )
      const neighbours = idsOf(yield* stage.here(Step.enqueueAll(Array.from({ length: 20 }, () => ({ millis: 300 })))))
      const kept = yield* Effect.forEach([1, 2], (n) => stage.kept(`worker ${n}`))
      const took = yield* untilFinished(stage, [...neighbours, ...idsOf(poison)], 120_000)
      const ends = kept.flatMap(({ ends }) => ends().map(({ code, signal }) => signal ?? code))
      const starts = yield* startsOf(stage, idsOf(poison))
      for (const count of starts) assert.isAtMost(count, 3)
      assert.deepStrictEqual([...new Set(ends)].map(String).toSorted(), ["3", "SIGABRT"])
      assert.deepStrictEqual(yield* statusOf(stage, idsOf(poison)), ["discarded", "discarded"])
      assert.deepStrictEqual(yield* statusOf(stage, neighbours), neighbours.map(() => "completed"))
      const counts = yield* stage.finish()
      return { ...counts, starts: starts.join(" and "), ends: ends.length, took }
    }))

  scenario("B8", "handlers leave errors behind that nobody hears of", {}, (stage) =>
    Effect.gen(function*() {
      const late = ["rejects", "throws late", "emits late"] as const
      // An application that says what is to become of such errors keeps its process and its jobs.
      const forgiving = yield* stage.worker("worker 1", { forgiving: true })
      const forgiven = yield* Effect.forEach(late, (how) => stage.here(Poison.enqueue({ how }, { maxAttempts: 1 })))
      // What is thrown where the handler runs is the handler's: it fails its job and nothing else.
      const own = yield* stage.here(Poison.enqueue({ how: "emits" }, { maxAttempts: 1 }))
      yield* untilFinished(stage, [...idsOf(forgiven), own.id])
      assert.strictEqual(forgiving.output().split("forgiven:").length, 1 + late.length, forgiving.output())
      assert.deepStrictEqual(yield* statusOf(stage, idsOf(forgiven)), late.map(() => "completed"))
      assert.strictEqual(
        yield* stage.value<string>("select error ->> 'tag' from pgqueue.finished where id = $1::uuid", [own.id]),
        "Defect"
      )
      assert.strictEqual((yield* forgiving.end()).code, 0, forgiving.output())
      // Without a word of the application Node ends the process, and the job counts as one that kills it.
      const kept = yield* stage.kept("worker 2")
      const poison = yield* Effect.forEach(
        late,
        (how) => stage.here(Poison.enqueue({ how }, { maxAttempts: 1, priority: "high" }))
      )
      const neighbours = idsOf(yield* stage.here(Step.enqueueAll(Array.from({ length: 10 }, () => ({ millis: 300 })))))
      const took = yield* untilFinished(stage, [...neighbours, ...idsOf(poison)], 120_000)
      assert.deepStrictEqual([...new Set(kept.ends().map(({ code }) => code))], [1])
      for (const count of yield* startsOf(stage, idsOf(poison))) assert.isAtMost(count, 2)
      assert.deepStrictEqual(yield* statusOf(stage, neighbours), neighbours.map(() => "completed"))
      const counts = yield* stage.finish()
      return { ...counts, ends: kept.ends().length, took }
    }))

  scenario(
    "B9",
    "all workers are killed and started again 3 s later",
    { minutes: 6 },
    (stage) =>
      Effect.gen(function*() {
        let { workers } = yield* stage.fleet()
        const deaths: Array<Death> = []
        for (let round = 0; round < (full ? 4 : 1); round++) {
          const killed = yield* Effect.forEach(workers, (actor) => kill(stage, actor), { concurrency: "unbounded" })
          yield* Effect.sleep(3000)
          workers = yield* Effect.forEach(workers, ({ name }) => stage.worker(name), { concurrency: 2 })
          // What counts is the time from when somebody is there again.
          const at = yield* clock(stage)
          deaths.push(...killed.map(({ boot }) => ({ boot, at })))
          const boots = killed.map(({ boot }) => boot)
          yield* until(
            "the dead hold nothing",
            Effect.map(
              stage.value("select count(*)::int from pgqueue.worker where name = any ($1::text[])", [boots]),
              (count) => count === 0
            ),
            { within: rescuedWithin + 5000 }
          )
          yield* until(
            "nobody waits any more",
            Effect.map(
              stage.value("select count(*)::int from pgqueue.ready where run_at <= clock_timestamp()"),
              (count) => count < 10
            )
          )
        }
        const counts = yield* stage.finish()
        const lost = yield* orphans(stage, deaths)
        assert.isAbove(lost.orphans, 0)
        assert.isBelow(lost.reclaimed, rescuedWithin)
        return { ...counts, ...lost, kills: deaths.length }
      })
  )

  scenario(
    "B10",
    "five jobs kill whoever runs them, in a fleet of four",
    { minutes: 4 },
    (stage) =>
      Effect.gen(function*() {
        const kept = yield* Effect.forEach([1, 2, 3, 4], (n) => stage.kept(`worker ${n}`))
        yield* stage.producer("producer 1", { rate: 100 })
        yield* until("the fleet works", Effect.map(stage.runsEnded, (ended) => ended > 100))
        const poison = idsOf(
          yield* stage.here(
            Poison.enqueueAll([1, 2, 3, 4, 5].map(() => ({ how: "SIGKILL" as const })), { maxAttempts: 2 })
          )
        )
        const took = yield* untilFinished(stage, poison, 150_000)
        const done = yield* stage.value(
          "select (100.0 * (select count(*) from pgqueue.finished where kind in ('work', 'pay')) / greatest(1, (select count(*) from pgqueue.finished where kind in ('work', 'pay')) + (select count(*) from pgqueue.job)))::float8"
        )
        const ends = () => kept.reduce((sum, { ends }) => sum + ends().length, 0)
        const deaths = ends()
        const ended = yield* stage.runsEnded
        yield* Effect.sleep(5000)
        assert.strictEqual(ends(), deaths, "the fleet is stable")
        assert.isAbove(((yield* stage.runsEnded) - ended) / 5, 0.9 * 90)
        assert.isAtLeast(done, 90)
        const starts = yield* startsOf(stage, poison)
        for (const count of starts) assert.isAtMost(count, 3)
        assert.deepStrictEqual(yield* statusOf(stage, poison), poison.map(() => "discarded"))
        const counts = yield* stage.finish()
        return { ...counts, starts: starts.join(" "), deaths, done: `${Math.round(done)} %`, took }
      })
  )

  scenario(
    "B12",
    "a worker is killed while what it has done waits to be settled",
    { short: true },
    (stage) =>
      Effect.gen(function*() {
        const ids = idsOf(yield* stage.here(Step.enqueueAll(Array.from({ length: 300 }, () => ({ millis: 5 })))))
        const session = yield* stage.locker("select id from pgqueue.job for update")
        const victim = yield* stage.worker("worker 1")
        yield* until("its buffer is full of them", Effect.map(stage.runsEnded, (ended) => ended >= 100))
        yield* kill(stage, victim)
        // What it asked last would find the rows free.
        yield* until(
          "nothing of it is under way",
          Effect.map(
            stage.value(
              "select count(*)::int from pg_stat_activity where datname = current_database() and application_name = 'worker 1'"
            ),
            (count) => count === 0
          )
        )
        yield* session.release
        const buffered = yield* stage.recorded("select count(distinct job)::int from ledger where phase = 'end'")
        assert.strictEqual(yield* stage.value("select count(*)::int from pgqueue.finished"), 0)
        const held = yield* stage.value("select sum(cardinality(ids))::int from pgqueue.lease")
        yield* stage.worker("worker 2")
        yield* untilFinished(stage, ids)
        const counts = yield* stage.finish()
        const again = yield* stage.recorded(
          "select count(*)::int from (select job from ledger where phase = 'end' group by job having count(*) > 1) twice"
        )
        assert.isAtMost(again, buffered)
        assert.isAtMost(counts.again, held)
        return { ...counts, buffered, held }
      })
  )

  scenario(
    "B13",
    "a rescue finds that the job has ended, or is somebody else's",
    { short: true },
    (stage) =>
      Effect.gen(function*() {
        const sql = yield* stage.here(SqlClient.SqlClient)
        const db = yield* Database.make(sql, { maxConnections: 8 })
        const storage = Storage.of({ sql, db, store: Store.make(db, schema) })
        yield* Effect.provideService(rescues, Storage, storage)
        return yield* stage.finish()
      })
  )

  scenario("B14", "a handler takes ten leases", {}, (stage) =>
    Effect.gen(function*() {
      yield* stage.worker("worker 1")
      yield* stage.worker("worker 2")
      const ids = idsOf(
        yield* stage.here(Step.enqueueAll(Array.from({ length: 20 }, () => ({ millis: 10 * timing.lease }))))
      )
      yield* untilStarted(stage, ids)
      yield* untilFinished(stage, ids, 15 * timing.lease)
      const counts = yield* stage.finish()
      assert.deepStrictEqual(yield* startsOf(stage, ids), ids.map(() => 1))
      assert.deepStrictEqual(yield* stage.rows("select id from pgqueue.attempt"), [])
      return counts
    }))

  scenario("B16", "whoever takes back the jobs of the dead is killed, or hangs", {}, (stage) =>
    Effect.gen(function*() {
      const names = [1, 2, 3].map((n) => `worker ${n}`)
      const workers = new Map<string, Actor>()
      for (const name of names) workers.set(name, yield* stage.worker(name))
      const swept: Array<number> = []
      for (let round = 0; round < (full ? 3 : 2); round++) {
        const signal = round % 2 === 0 ? "SIGKILL" : "SIGSTOP"
        // Long enough for each of them to judge, and somebody to take back from.
        yield* Effect.sleep(timing.lease + timing.heartbeat)
        const dead = yield* stage.worker("worker dead")
        const ids = idsOf(
          yield* stage.here(Step.enqueueAll(Array.from({ length: 40 }, () => ({ millis: 1500 }))))
        )
        yield* until(
          "it holds some of them",
          Effect.map(
            stage.value(
              "select count(*)::int from pgqueue.lease l join pgqueue.worker w on w.id = l.worker where w.name = $1",
              [
                dead.boot
              ]
            ),
            (count) => count > 0
          )
        )
        yield* kill(stage, dead)
        let sweeper: string | undefined
        let at = 0
        yield* Effect.flatten(
          stage.net.cut({ text: reaping, process: "worker", at: "answered", silent: true }, (name) => {
            sweeper = name
            at = performance.now()
            workers.get(name)!.strike(signal)
          })
        )
        yield* Effect.flatten(stage.net.cut({ text: reaping, process: "worker", at: "acknowledged" }))
        swept.push(performance.now() - at)
        const stuck = workers.get(sweeper!)!
        yield* untilFinished(stage, ids, 3 * rescuedWithin)
        if (signal === "SIGSTOP") yield* stuck.kill("SIGCONT")
        else workers.set(sweeper!, yield* stage.worker(sweeper!))
      }
      const counts = yield* stage.finish()
      for (const millis of swept) assert.isBelow(millis, 2 * timing.rescueInterval)
      return { ...counts, swept: Math.max(...swept) }
    }))

  scenario("B18", "a worker loses its heartbeat and nothing else", {}, (stage) =>
    Effect.gen(function*() {
      const cut = yield* stage.worker("worker 1")
      const ids = idsOf(
        yield* stage.here(
          Trial.enqueueAll([1, 2, 3, 4].map(() => ({ first: 600_000, next: 20, how: "completes" as const })))
        )
      )
      yield* untilStarted(stage, ids)
      yield* stage.worker("worker 2")
      yield* stage.producer("producer 1", { rate: 50 })
      yield* until("both work", Effect.map(stage.runsEnded, (ended) => ended > 100))
      const old = yield* workerId(stage, cut)
      yield* stage.during(
        "no heartbeat",
        Effect.gen(function*() {
          yield* stage.net.blackHole({ process: "worker 1", sent: beating, heal: "reset" })
          yield* untilFinished(stage, ids, rescuedWithin)
          yield* Effect.sleep(timing.lease)
        })
      )
      const last = yield* stage.value<string>("select max(at)::text from watch.beat where worker = $1::uuid", [old])
      const since = (text: string, params: ReadonlyArray<unknown>) =>
        stage.recorded(`select (extract(epoch from (${text}) - $1::timestamptz) * 1000)::float8`, [last, ...params])
      const stopped = yield* since(
        "select max(at) from ledger where boot = $2 and phase = 'interrupted'",
        [cut.boot]
      )
      const claimedFor = yield* stage.value(
        `select coalesce(max(extract(epoch from at - $1::timestamptz) * 1000), 0)::float8 from watch.transition
         where worker = $2::uuid and what = 'claimed'`,
        [last, old]
      )
      yield* untilRegisteredAgain(stage, cut, old)
      const counts = yield* stage.finish()
      // The first loss is free.
      assert.strictEqual(
        yield* stage.value("select max(attempt)::int from pgqueue.finished where id = any ($1::uuid[])", [ids]),
        1
      )
      assert.isBelow(claimedFor, timing.lease)
      // A heartbeat before the end of the lease, by a clock that begins when the last beat was sent; 100 ms to interrupt.
      assert.isBelow(stopped, timing.lease - timing.heartbeat + 100)
      return { ...counts, claimedFor, stopped }
    }))
})

/** Between the two halves of a rescue: a session that has found who is dead, and takes back what nobody holds any more. */
const rescues = Effect.gen(function*() {
  const { store } = yield* Storage
  const rescuer = yield* session
  const zombie = yield* session

  // It has selected the lease, and waits for whoever ends the job just now.
  const ended = yield* claimed([job()])
  yield* bury(ended.worker)
  yield* zombie.query("begin")
  yield* zombie.store.settle(ended.worker, [entry(ended.lease, ended.ids[0]!, "completed")], 0)
  assert.deepInclude(yield* rescuer.store.rescue(10), { back: 0, ended: 0 })
  yield* zombie.query("commit")
  assert.deepInclude(yield* rescuer.store.rescue(10), { back: 0, ended: 0 })
  assert.deepInclude(yield* stateOf(ended.ids[0]!), { place: "finished", status: "completed" })

  // Its snapshot is older than the rescue of somebody else, and than the claim after that.
  const moved = yield* claimed([job()])
  yield* bury(moved.worker)
  yield* zombie.query("begin isolation level repeatable read")
  yield* zombie.query("select from pgqueue.lease")
  assert.deepInclude(yield* rescuer.store.rescue(10), { back: 1, ended: 0 })
  yield* makeDue
  const next = yield* claimed([])
  const again = yield* claim(next.worker, { ...claimOptions(next.worker), limit: 1 })
  assert.deepStrictEqual(again.ids, moved.ids)
  const late = yield* Effect.exit(zombie.store.rescue(10))
  assert.notInclude(JSON.stringify(late), "\"back\":1")
  yield* zombie.query("rollback")
  assert.deepInclude(yield* rescuer.store.rescue(10), { back: 0, ended: 0 })
  assert.deepInclude(yield* stateOf(moved.ids[0]!), { place: "lease", rescued: 1 })
  yield* store.settle(next.worker, [entry(again.lease, again.ids[0]!, "completed")], 0)
  yield* bury(next.worker)
}).pipe(Effect.scoped)
