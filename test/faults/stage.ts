/**
 * What a scenario plays on: a PostgreSQL that may be harmed, a network in front of it, processes behind that, and a second
 * PostgreSQL that nobody harms, for the evidence.
 */
import { PgClient } from "@effect/sql-pg"
import { assert } from "@effect/vitest"
import { Context, Effect, Layer, Redacted, Schedule, type Scope } from "effect"
import * as Reactivity from "effect/reactivity/Reactivity"
import { readdirSync, readFileSync } from "node:fs"
import { inject } from "vitest"
import * as Database from "../../src/Database.ts"
import { JobQueue } from "../../src/index.ts"
import type * as Queue from "../../src/JobQueue.ts"
import type { ActorProgram } from "../programs/actor.ts"
import { makeDatabase, onServer, ownServer, TestDatabase } from "../support/database.ts"
import type { EmbeddedPostgres, StartOptions } from "../support/embedded.ts"
import { createLedger, Ledger } from "../support/ledger.ts"
import { type Ended, keepProgram, type Program, startProgram } from "../support/processes.ts"
import { allInPlace, now, until } from "../support/queue.ts"
import { full } from "./form.ts"
import { type Allowed, evidence, invariants, ledgerTables, runs, theirs, watch } from "./invariants.ts"
import { makeNet } from "./net.ts"

/** The reference settings, ten times as fast: what a scenario measures in leases is measured in these. */
export const timing = { lease: 3000, heartbeat: 1000, rescueInterval: 1500, gracePeriod: 2000 }

/** Jobs a second of a fleet. Two cores are half busy with them and their evidence: more, and a recovery is that of the machine. */
export const load = 150

/** When the jobs of a dead process have been taken back at the latest: a lease, a sweep with its jitter, and 5 s. */
export const rescuedWithin = timing.lease + timing.rescueInterval * 1.2 + 5000

/** How many jobs a worker has that it could not settle, at least, before it starts no more. */
export const fullBuffer = 2500

/** The server that is harmed; the scenarios of a file share it. */
export class Victim extends Context.Service<Victim, EmbeddedPostgres>()("effect-pgqueue/test/faults/stage/Victim") {
  static readonly layer = (options?: StartOptions): Layer.Layer<Victim> => Layer.effect(Victim, ownServer(options))
}

/** A process of the stage. */
export interface Actor extends Program {
  readonly name: string
  /** What it calls itself in the ledger and as a worker. */
  readonly boot: string
  /** Waits for an end that nobody has told it to come to, and that is a part of the scenario all the same. */
  readonly died: Effect.Effect<Ended>
  /** Kills it, or freezes it, within a callback. */
  readonly strike: (signal: NodeJS.Signals) => void
  /** Whether it may have ended: somebody has told it to, or killed it, or it is one that is started again. */
  readonly mayEnd: () => boolean
  /** Freezes it, in the current scope. */
  readonly frozen: Effect.Effect<void, never, Scope.Scope>
  /** Tells it to end and returns how it did, and how long that took in milliseconds. */
  readonly end: (signal?: NodeJS.Signals) => Effect.Effect<{ readonly code: number | null; readonly took: number }>
  /** Kilobytes of memory that it has resident now. */
  readonly memory: () => number
  /** How many files and sockets it has open. */
  readonly files: () => number
}

/** A process that is started again whenever it ends. */
export interface KeptActor {
  /** The process of the moment. */
  readonly current: () => Actor
  /** How those before it have ended. */
  readonly ends: () => ReadonlyArray<Ended>
}

type Settings = Partial<Omit<ActorProgram, "role" | "name">> & {
  /** A command that becomes the process: one that leads it into another network, for instance. */
  readonly through?: ReadonlyArray<string>
}

const actorOf = (name: string, program: Program, mayEnd = false): Actor => {
  const tell = (signal: NodeJS.Signals) => {
    mayEnd ||= signal !== "SIGSTOP" && signal !== "SIGCONT"
  }
  return {
    ...program,
    name,
    kill: (signal) => Effect.andThen(Effect.sync(() => tell(signal)), program.kill(signal)),
    strike: (signal) => {
      tell(signal)
      process.kill(program.pid, signal)
    },
    boot: `${name} ${program.pid}`,
    died: Effect.tap(program.ended, () => Effect.sync(() => tell("SIGKILL"))),
    mayEnd: () => mayEnd,
    frozen: Effect.asVoid(Effect.acquireRelease(program.kill("SIGSTOP"), () => program.kill("SIGCONT"))),
    end: Effect.fnUntraced(function*(signal = "SIGTERM") {
      const told = yield* now
      tell(signal)
      yield* program.kill(signal)
      const { at, code } = yield* Effect.timeoutOrElse(program.ended, {
        duration: "90 seconds",
        orElse: () => Effect.die(new Error(`${name} still runs:\n${program.output()}`))
      })
      return { code, took: at - told }
    }),
    memory: () => Number(/VmRSS:\s+(\d+)/.exec(readFileSync(`/proc/${program.pid}/status`, "utf8"))?.[1] ?? 0),
    files: () => readdirSync(`/proc/${program.pid}/fd`).length
  }
}

/** What a stage may be told. */
export interface StageOptions {
  /** The queue of the scenario's own process. */
  readonly queue?: Queue.Options
}

/** Builds a stage on the {@link Victim}, in the current scope. */
export const makeStage = Effect.fnUntraced(function*(options: StageOptions = {}) {
  const victim = yield* Victim
  const { name: databaseName, url: redacted } = yield* makeDatabase(victim.url)
  const net = yield* makeNet(Redacted.value(redacted))
  // The way of those who only look: nothing is done to it.
  const direct = yield* makeNet(Redacted.value(redacted))
  const { url } = direct
  const elsewhere = yield* makeDatabase(inject("databaseUrl"))
  const ledgerUrl = Redacted.value(elsewhere.url)
  // Nobody harms that server, and its disk is not what is looked at.
  yield* onServer(inject("databaseUrl"), `alter database "${elsewhere.name}" set synchronous_commit = off`)
  const ledger = Context.get(yield* Layer.build(Layer.fresh(Ledger.layer(ledgerUrl, "stage"))), Ledger)
  const truth = Context.get(yield* Layer.build(Layer.fresh(Ledger.layer(url, "truth"))), Ledger)
  yield* Effect.provideService(createLedger, Ledger, ledger)
  yield* Effect.forEach(ledgerTables, (text) => ledger.query(text))

  /** A queue of this process, directly on the server, for what a scenario enqueues and asks itself. */
  const PgLive = PgClient.layer({ url: Redacted.make(url), applicationName: "stage", maxConnections: 4 })
  const services = yield* Layer.build(Layer.fresh(
    Layer.provideMerge(
      JobQueue.layer(options.queue),
      Layer.merge(PgLive, Layer.succeed(TestDatabase, { name: databaseName, url: redacted }))
    )
  ))
  yield* Effect.forEach(watch, (text) => truth.query(text))

  const actors: Array<Actor> = []
  /** Those who start processes again: not once they are to stop. */
  const keepers: Array<() => void> = []
  /** Faults so far that the server has forgotten claims in. */
  const crashes: Array<string> = []

  /** Asks again while the server is away. */
  const rows: typeof truth.query = (text, params) =>
    Effect.retry(truth.query(text, params), { while: Database.isTransient, schedule: Schedule.spaced(50), times: 1200 })
  const value = <A = number>(text: string, params?: ReadonlyArray<unknown>) =>
    Effect.map(rows(text, params), ([row]) => Object.values(row ?? {})[0] as A)
  const recorded = <A = number>(text: string, params?: ReadonlyArray<unknown>) =>
    Effect.map(ledger.query(text, params), ([row]) => Object.values(row ?? {})[0] as A)

  const programOf = (
    role: ActorProgram["role"],
    name: string,
    settings: Omit<Settings, "through">
  ): ActorProgram => ({
    ...timing,
    url: net.url,
    ledgerUrl,
    ...settings,
    role,
    name
  })
  const start = (role: ActorProgram["role"]) =>
    Effect.fnUntraced(function*(name: string, { through, ...settings }: Settings = {}) {
      const actor = actorOf(name, yield* startProgram("actor.ts", programOf(role, name, settings), through))
      actors.push(actor)
      return actor
    })
  const worker = start("worker")
  const producer = start("producer")
  const scheduler = start("scheduler")

  /** Keeps a worker running, whatever its jobs do to it, until the play is finished. */
  const kept = Effect.fnUntraced(function*(
    name: string,
    settings: Settings = {},
    nodeOptions: ReadonlyArray<string> = []
  ) {
    let current: Actor | undefined
    const keeper = yield* keepProgram("actor.ts", programOf("worker", name, settings), nodeOptions, (program) => {
      current = actorOf(name, program, true)
      actors.push(current)
    })
    keepers.push(keeper.letGo)
    return { current: () => current!, ends: keeper.ends } satisfies KeptActor
  })

  /** Takes locks, on a session of its own, until they are released or the play is over. */
  const locker = Effect.fnUntraced(function*(text: string) {
    const sql = yield* PgClient.make({ url: redacted, applicationName: "locker", maxConnections: 1 }).pipe(
      Effect.provideServiceEffect(Reactivity.Reactivity, Reactivity.make)
    )
    yield* sql.unsafe("begin")
    yield* sql.unsafe(text)
    return { release: Effect.asVoid(sql.unsafe("commit")) }
  })

  /** How many runs have come to their end so far. */
  const runsEnded = recorded("select count(*)::int from ledger where phase = 'end'")

  /** Starts workers, producers and schedulers, and waits until a load has gone through them. */
  const fleet = Effect.fnUntraced(function*(
    { producers = 2, rate = load, schedulers = 2, settings = {}, workers = 4, warm = 2000 }: {
      readonly workers?: number
      readonly producers?: number
      readonly schedulers?: number
      /** Jobs a second, of all producers together. */
      readonly rate?: number
      readonly settings?: Settings
      /** How long it runs before the scenario goes on, in milliseconds. */
      readonly warm?: number
    } = {}
  ) {
    const named = (role: string, count: number) => Array.from({ length: count }, (_, n) => `${role} ${n + 1}`)
    const all = <E, R>(names: ReadonlyArray<string>, begin: (name: string) => Effect.Effect<Actor, E, R>) =>
      Effect.forEach(names, begin, { concurrency: 2 })
    const cast = {
      workers: yield* all(named("worker", workers), (name) => worker(name, settings)),
      schedulers: yield* all(named("scheduler", schedulers), (name) => scheduler(name, settings)),
      producers: yield* all(
        named("producer", producers),
        (name) => producer(name, { ...settings, rate: rate / producers })
      )
    }
    yield* until("the fleet works", Effect.map(runsEnded, (ended) => ended > Math.min(100, rate)))
    yield* Effect.sleep(warm)
    return cast
  })

  /** Notes a fault in the ledger, and its end with the scope: recovery is measured from there. */
  const fault = (what: string) =>
    Effect.asVoid(Effect.acquireRelease(
      Effect.orDie(ledger.query("insert into public.fault (what) values ($1)", [what])),
      () =>
        Effect.orDie(
          ledger.query(
            "update public.fault set cleared_at = clock_timestamp() where what = $1 and cleared_at is null",
            [what]
          )
        )
    ))

  /** Does something to the stage, and notes when it began and when it was over. */
  const during = <A, E, R>(
    what: string,
    effect: Effect.Effect<A, E, R>
  ): Effect.Effect<A, E, Exclude<R, Scope.Scope>> => Effect.scoped(Effect.andThen(fault(what), effect))

  /**
   * How long after each fault was over, in milliseconds, runs ended again at nine tenths of their rate before the first one:
   * the first moment from which they did so for `over` milliseconds.
   */
  const recoveries = (over = 2000) =>
    Effect.gen(function*() {
      const faults = yield* ledger.query<{ begun: number; cleared: number }>(
        `select (extract(epoch from begun_at) * 1000)::float8 as begun, (extract(epoch from cleared_at) * 1000)::float8 as cleared
         from fault where cleared_at is not null order by cleared_at`
      )
      const ends = (yield* ledger.query<{ at: number }>(
        `select (extract(epoch from at) * 1000)::float8 as at from ledger
         where phase = 'end' and at > (select min(begun_at) from fault) - interval '3 seconds' order by at`
      )).map(({ at }) => at)
      const between = (from: number, to: number) => ends.filter((at) => at >= from && at < to).length
      const first = faults[0]?.begun ?? 0
      const windows = Array.from({ length: 9 }, (_, n) => between(first - 3000 + n * 250, first - 2000 + n * 250))
      const rate = windows.toSorted((a, b) => a - b)[4]! / 1000
      return faults.map(({ cleared }) => {
        const later = ends.filter((at) => at >= cleared && at < cleared + 60_000)
        const needed = Math.ceil(0.9 * rate * over)
        // The first of as many ends as there have to be within that time.
        const from = later.findIndex((at, n) => n + needed - 1 < later.length && later[n + needed - 1]! - at <= over)
        return needed === 0 ? 0 : from < 0 ? Infinity : later[from]! - cleared
      })
    })

  /** Waits until runs end as before the last fault. */
  const goesOn = until("it goes on", Effect.map(recoveries(), (all) => Number.isFinite(all.at(-1))), {
    within: 60_000,
    every: 500
  })

  /**
   * Waits for that, and fails unless it took less than so many milliseconds after each fault; 20 s in the short form, whose
   * machine may just be slower than it was before the fault.
   */
  const recovered = (within: number) =>
    Effect.gen(function*() {
      yield* goesOn
      const all = yield* recoveries()
      assert.isBelow(Math.max(...all), full ? within : 20_000, all.map(Math.round).join(" "))
      return { recovered: Math.max(...all) }
    })

  const untilAllEnded = (within = 60_000) =>
    until(
      "all jobs have ended",
      Effect.map(value("select count(*)::int from pgqueue.job where kind <> 'tick'"), (left) => left === 0),
      { within, every: 50 }
    ).pipe(
      Effect.tapCause(() =>
        Effect.flatMap(
          rows(`select kind, attempt, rescued, (run_at - clock_timestamp())::text as due,
            (select w.name from pgqueue.lease l left join pgqueue.worker w on w.id = l.worker where j.id = any (l.ids)) as holder
            from pgqueue.job j limit 20`),
          (left) => Effect.logError("what is left", left)
        )
      )
    )

  /** Copies the evidence beside the queue's tables. */
  const collect = Effect.gen(function*() {
    yield* Effect.forEach(evidence, (text) => rows(text))
    const copy = Effect.fnUntraced(function*(table: string, columns: string, text: string) {
      const all = yield* ledger.query(text)
      for (let at = 0; at < all.length; at += 5000) {
        yield* rows(
          `insert into evidence.${table} (${columns}) select ${columns} from json_populate_recordset(null::evidence.${table}, $1::json)`,
          [JSON.stringify(all.slice(at, at + 5000))]
        )
      }
    })
    yield* copy("intent", "key, outcome, job", "select key::text, outcome, job::text from public.intent")
    yield* copy("run", "run, job, attempt, boot, key, begun_at, ended_at, stopped_at", runs)
    yield* rows("insert into evidence.crash select unnest($1::text[])", [crashes])
    yield* rows("analyze evidence.run, evidence.intent, watch.transition, pgqueue.finished, pgqueue.attempt")
  })

  /** Fails unless each invariant holds. */
  const judge = (allowed: Allowed = {}) =>
    Effect.gen(function*() {
      yield* collect
      const violations: Record<string, ReadonlyArray<object>> = {}
      for (const [name, query] of invariants(allowed)) {
        const found = yield* Effect.tapError(rows(query), () => Effect.logError(`cannot be asked: ${name}`))
        if (found.length > 0) violations[name] = found.slice(0, 5)
      }
      if ("I13 no defect" in violations) {
        const said = actors.flatMap(({ output }) => /an enqueue died[^]{0,2000}/.exec(output()) ?? [])
        yield* Effect.logError(said.join("\n"))
      }
      assert.deepStrictEqual(violations, {})
      yield* Effect.provideService(allInPlace, Ledger, truth)
      for (const { name, output } of actors) {
        assert.notMatch(output(), /unhandledRejection|uncaughtException|\] (ERROR|FATAL) \(/i, name)
        const seconds = Object.values(Object.groupBy(
          output().match(/^\[\d\d:\d\d:\d\d/gm) ?? [],
          (second) => second
        ))
        assert.isAtMost(
          Math.max(0, ...seconds.map((lines) => lines!.length)),
          20,
          `lines of ${name} in a second:\n${output()}`
        )
      }
    })

  /**
   * Ends the play as it should end: producers stop, all jobs end, everybody stops when told with code 0, nothing is left
   * behind, and every invariant holds. Returns what is counted.
   */
  const finish = Effect.fnUntraced(function*(options: Allowed & { readonly within?: number } = {}) {
    const alive = (role: string) => actors.filter((actor) => actor.running() && actor.name.startsWith(role))
    const stop = (role: string) =>
      Effect.forEach(
        alive(role),
        (actor) =>
          Effect.map(actor.end(), ({ code }) => assert.strictEqual(code, 0, `${actor.name}:\n${actor.output()}`)),
        {
          concurrency: "unbounded"
        }
      )
    for (const actor of actors) {
      assert.isTrue(
        actor.running() || actor.mayEnd(),
        `${actor.name} has ended:\n${actor.output()}`
      )
    }
    if (alive("scheduler").length > 0) {
      const due =
        "select count(*)::int from pgqueue.schedule where next_at <= $1::timestamptz and undeclared_at is null"
      const at = yield* value<string>("select clock_timestamp()::text")
      yield* until("each tick so far has been fired", Effect.map(value(due, [at]), (left) => left === 0), {
        within: 15_000
      })
    }
    yield* stop("scheduler")
    yield* stop("producer")
    // Of a fleet in which nobody is left to work nothing would ever end.
    if (alive("worker").length === 0) yield* worker("worker last")
    yield* untilAllEnded(options.within)
    yield* until(
      "all ticks have ended",
      Effect.map(value("select count(*)::int from pgqueue.job"), (left) => left === 0),
      { within: 30_000 }
    )
    // Those of processes that were killed go with the next sweep.
    yield* until(
      "nothing is held for the dead",
      Effect.map(value("select count(*)::int from pgqueue.worker"), (left) => left <= alive("worker").length),
      { within: 30_000 }
    )
    for (const letGo of keepers) letGo()
    yield* stop("worker")
    yield* until(
      "the sessions of processes that ended are gone",
      Effect.map(
        value(`select count(*)::int from pg_stat_activity where ${theirs}`),
        (left) => left === 0
      ),
      { within: 60_000 }
    )
    yield* judge(options)
    const jobs = yield* recorded("select count(distinct job)::int from ledger")
    const failed = yield* value("select count(*)::int from pgqueue.attempt where tag <> 'Lost'")
    const again = yield* recorded("select (count(distinct run) - count(distinct (job, attempt)))::int from ledger")
    return { jobs, failed, again }
  })

  return {
    victim,
    /** The database for who only looks, over a way of its own in this process. */
    url,
    /** The database for what this process waits for without letting anything else go on. */
    straight: Redacted.value(redacted),
    net,
    ledger,
    ledgerUrl,
    rows,
    value,
    recorded,
    services,
    /** Runs what uses a queue on the scenario's own, directly on the server. */
    here: <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.provideContext(effect, services),
    worker,
    kept,
    producer,
    scheduler,
    fleet,
    locker,
    runsEnded,
    during,
    /** Leads everybody to another server that has the same database. */
    lead: (target: string) => Effect.andThen(net.lead(target), direct.lead(target)),
    /** Says that the server has crashed: claims of its last moments are forgotten, and their jobs started again. */
    crashed: (what: string) => crashes.push(what),
    goesOn,
    recovered,
    untilAllEnded,
    finish
  }
})

/** A stage. */
export type Stage = Effect.Success<ReturnType<typeof makeStage>>
