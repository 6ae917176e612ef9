/**
 * The loop of a worker: claim, buffer, run, settle; and how it stops.
 *
 * @since 0.1.0
 */
import * as Cause from "effect/Cause"
import * as Clock from "effect/Clock"
import type * as Context from "effect/Context"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Latch from "effect/Latch"
import * as Schedule from "effect/Schedule"
import { isSqlError, type SqlError } from "effect/sql/SqlError"
import * as Bounded from "./Bounded.ts"
import * as Database from "./Database.ts"
import * as Ending from "./Ending.ts"
import * as Episode from "./Episode.ts"
import type * as Handling from "./Handling.ts"
import type * as Job from "./Job.ts"
import * as Leases from "./Leases.ts"
import * as Line from "./Line.ts"
import * as Liveness from "./Liveness.ts"
import { Stop } from "./Main.ts"
import * as Outcome from "./Outcome.ts"
import * as Report from "./Report.ts"
import type * as Router from "./Router.ts"
import * as Run from "./Run.ts"
import type * as Settlement from "./Settlement.ts"
import * as Settler from "./Settler.ts"
import * as Store from "./Store.ts"
import * as Tasks from "./Tasks.ts"
import * as Timekeeper from "./Timekeeper.ts"
import * as Transactional from "./Transactional.ts"
import * as Wakeup from "./Wakeup.ts"

/**
 * A running loop.
 */
export interface Loop {
  /** Stops as promised, inside the grace period and 5 s. */
  readonly drain: Effect.Effect<void>
  /** Waits until nothing is due and nothing runs. */
  readonly idle: Effect.Effect<void, SqlError>
  readonly counts: () => { readonly completed: number; readonly failed: number }
}

/** What a claim brought. */
interface Claimed {
  readonly taken: number
  readonly sweep: boolean
  /** When it was sent, by this process's monotonic clock. */
  readonly sentAt: number
}

/** A claim on a dead link never answers; after this the lease counts as unknown and is handed back when found. */
const claimBound = 15_000

/** How long a loop that is about to end waits to learn what the dead have left, in milliseconds. */
const idleBound = 5000

/** How long a handler waits for its progress to be stored, in milliseconds. */
const progressBound = 5000

/** How long it waits before it asks again when somebody has locked the job or its lease, in milliseconds. */
const progressPause = 20

/**
 * How many handlers that do not wait are run before what has come from the database meanwhile has a turn: so the next claim
 * and settle are sent half-way through a batch (49 400 jobs/s instead of 46 900), and nobody else waits for all of it.
 */
const inOneGo = 64

/** How many cancellations of jobs that a claim may bring are kept in mind: anybody can announce them. */
const mostCancelling = 1000

const uninterruptible = { uninterruptible: true }

/**
 * Starts the loop in the current scope.
 */
export const start = Effect.fnUntraced(function*(options: {
  readonly database: Database.Database
  readonly store: Store.Store
  readonly wakeup: Wakeup.Wakeup
  readonly router: Router.Router
  readonly context: Context.Context<never>
  readonly middleware: ReadonlyArray<Job.Middleware>
  readonly name: string
  readonly queues: ReadonlyArray<readonly [name: string, concurrency: number]>
  /** These five in milliseconds. */
  readonly gracePeriod: number
  readonly pollInterval: number
  readonly heartbeat: number
  readonly lease: number
  readonly rescueInterval: number
  /** Start at most this many jobs, and do not listen: the loop is to end by itself. */
  readonly limit: number | undefined
}) {
  const { router, store, wakeup } = options
  const stop = yield* Stop
  const clock = yield* Clock.Clock
  const now = () => Bounded.monotonic(clock)
  const runFork = Effect.runForkWith(options.context)

  const lines = options.queues.map(([name, concurrency]) => Line.make(name, concurrency, now()))
  const lineOf = new Map(lines.map((line) => [line.queue, line]))
  const signals = new Map(lines.map((line) => [line.queue, Latch.makeUnsafe(true)]))
  const signal = (queue: string): void => void signals.get(queue)?.openUnsafe()
  const signalAll = (): void => signals.forEach((latch) => latch.openUnsafe())

  /** Whether a statement on the leases took effect is unknown: nothing starts until they have been compared. */
  const onFailed = (error: unknown): void => {
    if (error instanceof Bounded.TimedOut || Database.isConnectionLoss(error)) liveness.doubt()
  }
  const leases = Leases.make({ store, bound: claimBound, onFailed })
  /** Handlers that have started and not ended, of whatever lease. */
  const runs = new Set<Run.Running>()
  const counts = { completed: 0, failed: 0 }
  let stopping = false
  let suspects = 0
  let claiming = 0
  /** Jobs that somebody has cancelled and that a claim in flight may bring. */
  const cancelling = new Set<string>()
  let startable = options.limit ?? Infinity
  const claims = Episode.make("claiming")
  /** Whether what was parked while nobody listed its kind is back in line, and when to see to it. */
  let unparked = false
  const unparking = Latch.makeUnsafe(false)
  /** For a loop that is to end by itself: an error that trying again does not mend. */
  const hopeless = Deferred.makeUnsafe<never, SqlError>()

  const settling = {
    store,
    worker: () => liveness.id(),
    now,
    onDoubt: () => liveness.doubt(),
    onRelief: signalAll,
    onSettled: settled
  }
  // Every other lease has the other one: two statements at a time, of which none waits for a lease that the other has locked
  // (60 000 jobs/s that are kept instead of 54 000).
  const episode = Episode.make("settling")
  const settlers = [Settler.make({ ...settling, episode }), Settler.make({ ...settling, episode })]
  const settlerOf = (entry: Settlement.Entry) => settlers[(leases.all.get(entry.lease)?.nth ?? 0) % settlers.length]!
  // Apart: a transaction that broke off at its commit may keep its lease locked for as long as it may be idle, and whoever
  // settles that lease waits for it.
  const settlerOfTransactions = Settler.make({ ...settling, episode: Episode.make("settling in transactions") })
  const allSettlers = [...settlers, settlerOfTransactions]
  const unsettled = () => allSettlers.reduce((sum, settler) => sum + settler.size(), 0)

  function settled(entry: Settlement.Entry, answer: Settlement.Answer | undefined): void {
    const running = leases.settled(entry.lease, entry.id)
    // Back in line: this process and the others know when to look.
    if (answer?.state === "done" && answer.status === null && running !== undefined) {
      wakeup.mark(running.queue, entry.delay ?? 0)
    }
    if (answer?.awaited === true && answer.status !== null) wakeup.tellHere("end", entry.id)
  }

  const liveness: Liveness.Liveness = yield* Liveness.make({
    database: options.database,
    store,
    worker: {
      name: options.name,
      queues: lines.map((line) => line.queue),
      kinds: router.kinds,
      prefixes: router.prefixes
    },
    lease: options.lease,
    beat: options.heartbeat,
    leases: () => leases.all,
    onLost: (gone, unheard) => {
      for (const id of gone ?? [...leases.all.keys()]) {
        for (const running of leases.all.get(id)?.jobs.values() ?? []) interrupt(running, unheard ? "unheard" : "lost")
        if (gone !== undefined) leases.forget(id)
      }
    },
    onCancelled: (ids) => {
      for (const running of ids.flatMap(leases.find)) interrupt(running, "cancelled")
    },
    onAlive: () => {
      lines.forEach(fill)
      signalAll()
    },
    onRegistered: () => {
      unparked = false
      unparking.openUnsafe()
    }
  })

  // ---------------------------------------------------------------------------
  // Run
  // ---------------------------------------------------------------------------

  const run = Run.make({
    ...options,
    transactional: Transactional.make({ ...options, worker: () => liveness.id(), detach: leases.detach }),
    progress: (running, value) =>
      Effect.catchCause(
        Bounded.bounded(
          Effect.repeat(store.progress(running.lease, running.row.id, value), {
            until: (state) => state === "done",
            schedule: Schedule.spaced(progressPause)
          }),
          progressBound
        ),
        (cause) => Report.debug("the progress of a job could not be stored", Outcome.describe(cause))
      )
  })

  const isSuspect = (running: Run.Running) => running.row.lane >= Store.suspectLane

  const handBack = (running: Run.Running): void => {
    if (isSuspect(running)) suspects--
    running.entry = Ending.entryOf(running, "released")
    settlerOf(running.entry).push(running.entry)
  }

  /** What was claimed and has not started goes back, and another one may start instead of it. */
  const handBackBuffer = (line: Line.Line): void => {
    startable += line.buffer.length
    line.buffer.splice(0).forEach(handBack)
  }

  /** Tells a handler to stop; a job that has not started goes back. */
  const interrupt = (running: Run.Running, why: Run.Running["interruption"]): void => {
    if (running.entry !== undefined) return
    if (running.fiber !== undefined) {
      running.interruption ??= why
      running.fiber.interruptUnsafe()
      return
    }
    const buffer = lineOf.get(running.queue)!.buffer
    const index = buffer.indexOf(running)
    if (index >= 0) buffer.splice(index, 1)
    startable++
    handBack(running)
  }

  /** Lines that let others have a turn. */
  const resting = new Set<Line.Line>()

  /** Starts what is claimed for as long as there is a free slot. */
  const fill = (line: Line.Line): void => {
    if (resting.has(line)) return
    // A handler that does not wait has ended when it has been started, and its slot is free again.
    let endings = 0
    let at = now()
    while (line.running < line.concurrency && line.buffer.length > 0 && liveness.alive(at) && !stopping) {
      if (endings === inOneGo) {
        resting.add(line)
        runFork(Effect.andThen(
          Effect.yieldNow,
          Effect.sync(() => {
            resting.delete(line)
            fill(line)
            if (line.buffer.length > 0) timekeeper.poke()
          })
        ))
        break
      }
      const running = line.buffer.pop()!
      Line.started(line, at)
      // A route that was there when the job was claimed is there now.
      const { handling, kind } = router.find(running.row.kind!)!
      const fiber = runFork(run(running, handling, kind, at), uninterruptible)
      if (fiber.pollUnsafe() === undefined) {
        running.fiber = fiber
        runs.add(running)
        fiber.addObserver(() => {
          // What waits for its settlement needs to keep no fiber.
          running.fiber = undefined
          runs.delete(running)
          ended(line, running, handling, now())
          fill(line)
          timekeeper.freed(line.queue)
        })
        at = now()
      } else {
        // It is now: one clock reading a job, where four cost 0.4 µs.
        at = running.entry?.endedAt ?? now()
        ended(line, running, handling, at)
        endings++
      }
    }
    if (endings > 0) timekeeper.freed(line.queue)
  }

  const ended = (line: Line.Line, running: Run.Running, handling: Handling.Handling, at: number): void => {
    Line.ended(line, at)
    if (isSuspect(running)) suspects--
    const entry = running.entry ??= {
      ...Ending.entryOf(running, "failed"),
      delay: 60_000,
      failure: { tag: "Defect", message: "the run left no outcome", error: undefined }
    }
    if (entry.verb === "completed") counts.completed++
    else if (entry.verb === "failed" || entry.verb === "discarded") counts.failed++
    if (running.settled === undefined) {
      const its = handling.registered.transactional ? settlerOfTransactions : settlerOf(entry)
      its.push(entry)
    } else {
      settled(entry, running.settled.answer)
      // A handler's own transaction tells nobody.
      if (running.settled.answer?.awaited === true) wakeup.tell("end", entry.id)
    }
  }

  // ---------------------------------------------------------------------------
  // Claim
  // ---------------------------------------------------------------------------

  const claimHere = Effect.fnUntraced(function*(line: Line.Line, limit: number) {
    const worker = liveness.id()
    const lease = leases.open()
    const startedAt = now()
    const sweep = Line.sweeps(line, startedAt)
    startable -= limit
    const rows = yield* Bounded.bounded(
      store.claim({
        worker,
        lease: lease.id,
        queue: line.queue,
        // At most one suspect runs in a process: a job that kills its worker must not take a whole lease along.
        lanes: Line.lanes(line, sweep, suspects === 0),
        kinds: router.kinds,
        prefixes: router.prefixes,
        limit
      }),
      claimBound
    ).pipe(Effect.tapCause((cause) =>
      Effect.sync(() => {
        // Whether it took effect is unknown: if it did, the next comparison finds a lease that nobody knows.
        leases.forget(lease.id)
        startable += limit
        const error = cause.reasons.find(Cause.isFailReason)?.error
        // What does not arrive in time over a slow link, or is more than the server has room for, never does.
        if (error instanceof Bounded.TimedOut || Database.isTooMuch(error)) Line.tooMuch(line, limit)
        onFailed(error)
      })
    ))
    const claimedAt = now()
    Line.claimed(line, rows, { sweep, startedAt, now: claimedAt })
    if (rows.length === 0) leases.forget(lease.id)
    lease.confirmed = true
    const wanted: Array<Run.Running> = []
    for (const row of rows) {
      const running: Run.Running = {
        row,
        lease: lease.id,
        queue: line.queue,
        claimedAt,
        fiber: undefined,
        interruption: undefined,
        entry: undefined,
        settled: undefined
      }
      lease.jobs.set(row.id, running)
      if (cancelling.size > 0 && cancelling.has(row.id)) liveness.hurry()
      if (isSuspect(running)) suspects++
      // Told to stop, or declared dead, meanwhile; a job whose row is gone, that is cancelled, or that has another kind than
      // its place in line; one suspect too many: back, unburnt.
      const unwanted = stopping || worker !== liveness.id() || row.kind === null || row.cancelled ||
        router.find(row.kind) === undefined || (isSuspect(running) && suspects > 1)
      if (unwanted) handBack(running)
      else wanted.push(running)
    }
    startable += limit - wanted.length
    Line.add(line, wanted)
    // When there may be more, `pull` asks for that first, so that the server works while these are run.
    if (rows.length < limit) {
      timekeeper.fellShort(line.queue)
      fill(line)
    }
    // What is left in the buffer is watched from now on.
    if (line.buffer.length > 0) timekeeper.poke()
    return { taken: rows.length, sweep, sentAt: startedAt }
  })

  /**
   * One claim. It runs to its end in a fiber of its own: the rows of a claim that nobody waited for would be lost, and a
   * shutdown must not wait for one on a dead link.
   */
  const claim = (line: Line.Line, limit: number) => {
    const result = Deferred.makeUnsafe<Claimed, SqlError | Bounded.TimedOut>()
    claiming++
    return Effect.as(
      Effect.forkDetach(
        Effect.onExit(claimHere(line, limit), (exit) => {
          claiming--
          if (claiming === 0) cancelling.clear()
          return Deferred.done(result, exit)
        }),
        { startImmediately: true, uninterruptible: true }
      ),
      result
    )
  }

  /** Claims for one queue whenever there is room and something may be due. */
  const pull = (line: Line.Line) =>
    Effect.gen(function*() {
      const latch = signals.get(line.queue)!
      yield* latch.await
      latch.closeUnsafe()
      while (!stopping && liveness.alive() && !allSettlers.some((settler) => settler.full()) && startable > 0) {
        const room = Math.min(Line.wanted(line, now()), startable)
        if (room === 0) break
        timekeeper.busy(line.queue)
        const claimed = yield* claim(line, room)
        fill(line)
        const { sentAt, sweep, taken } = yield* Deferred.await(claimed)
        yield* claims.succeeded
        if (taken === room) continue
        // Short from the cursor: something may stand behind it, so look from the front as soon as that is affordable, and not
        // from the cursor again and again until then. What comes in meanwhile is announced.
        if (sweep) timekeeper.ranDry(line.queue, sentAt)
        else timekeeper.due(line.queue, Math.max(20, Line.sweepsIn(line, now())))
        return
      }
      fill(line)
    }).pipe(
      Effect.catchCause((cause) => {
        fill(line)
        timekeeper.due(line.queue, 200)
        const error = cause.reasons.find(Cause.isFailReason)?.error
        if (options.limit !== undefined && isSqlError(error) && !Database.isTransient(error)) {
          Deferred.doneUnsafe(hopeless, Effect.fail(error))
        }
        return claims.failed(cause)
      }),
      Effect.forever
    )

  const timekeeper = yield* Timekeeper.make({
    store,
    lines,
    pollInterval: options.pollInterval,
    onDue: signal,
    onTick: (at) => {
      for (const line of lines) if (Line.stuck(line, at)) handBackBuffer(line)
      return Math.min(...lines.map((line) => Line.stuckAt(line)))
    }
  })
  yield* wakeup.subscribe({
    ...Wakeup.deaf,
    works: (queue) => lineOf.has(queue),
    onDue: timekeeper.due,
    onLost: liveness.doubt,
    // Only a hint, which anybody can give: the heartbeat brings the marks of the jobs that are this worker's.
    onCancel: (id) => {
      if (leases.find(id).length > 0) liveness.hurry()
      else if (claiming > 0 && cancelling.size < mostCancelling) cancelling.add(id)
    }
  })

  // ---------------------------------------------------------------------------
  // Start and stop
  // ---------------------------------------------------------------------------

  // A loop that is to end by itself has no use for it.
  if (options.limit === undefined) yield* wakeup.listen
  // Without spans: a stream of claims and beats that never ends belongs to nobody's trace.
  yield* Effect.withTracerEnabled(
    Bounded.fork([
      ...allSettlers.map((settler) => settler.run),
      liveness.run,
      timekeeper.run,
      ...lines.map(pull),
      Tasks.unparking({
        store,
        wakeup,
        worker: liveness.id,
        interval: options.rescueInterval,
        latch: unparking,
        onUnparked: () => {
          unparked = true
        }
      })
    ]),
    false
  )
  yield* Bounded.fork(Tasks.loops({
    store,
    wakeup,
    intervals: Tasks.intervals(options.rescueInterval),
    standing: liveness.standing,
    stopping: () => stopping
  }))

  /** Waits until none of these runs any more, or the time is over, or `sooner` is. */
  const quiet = (
    these: (running: Run.Running) => boolean,
    millis: number,
    sooner: Effect.Effect<void> = Effect.never
  ) =>
    Effect.gen(function*() {
      const done = Deferred.makeUnsafe<void>()
      const check = () => {
        if (![...runs].some(these)) Deferred.doneUnsafe(done, Effect.void)
      }
      for (const running of runs) running.fiber?.addObserver(check)
      check()
      const hurrying = yield* Effect.forkDetach(Effect.andThen(sooner, Deferred.succeed(done, undefined)))
      yield* Effect.ignore(Bounded.bounded(Deferred.await(done), millis))
      hurrying.interruptUnsafe()
    })

  const claimsAnswered = Effect.gen(function*() {
    while (claiming > 0) yield* Effect.sleep(5)
  })

  const sayEnded = stop.begin()
  let leaving = false
  // In pools of the queue's own what has no answer keeps nobody.
  const isUnanswered = () =>
    options.database.connect === undefined &&
    (leaving || claiming > 0 || allSettlers.some((settler) => settler.sending()))
  const drain = Effect.gen(function*() {
    stopping = true
    // A handler may have told the worker to stop: first let it come to where it waits, and its fork return.
    yield* Effect.yieldNow
    const begun = now()
    const spare = () => Math.max(200, options.gracePeriod + 3000 - (now() - begun))
    lines.forEach(handBackBuffer)
    // One that has not stopped at its timeout has had its time.
    yield* quiet(({ interruption }) => interruption !== "timeout", options.gracePeriod, stop.urgent.await)
    for (const running of runs) interrupt(running, "shutdown")
    yield* quiet(() => true, 1500)
    const allSettled = Effect.forEach(allSettlers, (settler) => settler.drained, { discard: true })
    yield* Effect.ignore(Bounded.bounded(Effect.andThen(claimsAnswered, allSettled), spare()))
    liveness.retire()
    // A handler that does not stop keeps its lease until the others see that this process is gone.
    const kept = runs.size + unsettled()
    if (kept > 0) {
      yield* Report.warning(
        `${runs.size} handlers did not stop, ${unsettled()} jobs could not be settled; they are rescued after the lease time`
      )
    } else {
      // A lease whose statement was never answered is not to count as a loss.
      const leave = Effect.suspend(() => {
        leaving = true
        return store.leave(liveness.id())
      }).pipe(Effect.ensuring(Effect.sync(() => {
        leaving = false
      })))
      yield* Effect.ignoreCause(Bounded.bounded(leave, Math.min(1000, spare())))
    }
    sayEnded([...runs].flatMap(({ fiber }) => fiber ?? []), isUnanswered)
  })

  const isOver = () =>
    leases.all.size === 0 && unsettled() === 0 &&
    (startable <= 0 || (unparked && timekeeper.allDry() && liveness.alive()))
  const orphaned = Effect.orElseSucceed(Bounded.bounded(store.orphaned(), idleBound), () => 0)

  // What the dead have left is due, too, and where nobody lives longer than this loop nobody else takes it back. That takes
  // a lease, in which it is found out that they are dead, and a sweep.
  const untilEmpty = Effect.gen(function*() {
    const patience = options.lease + 2 * options.rescueInterval + 1000
    let some = (yield* orphaned) > 0
    let since: number | undefined
    while (true) {
      while (!isOver()) yield* Effect.sleep(5)
      if (startable <= 0) return
      if ((yield* orphaned) > 0) {
        some = true
        since ??= now()
        if (now() - since > patience) return
        yield* Effect.sleep(Math.min(1000, options.rescueInterval))
      } else if (some) {
        // What was lost for the first time is due within 2 s, whoever has taken it back.
        some = false
        since = undefined
        yield* Effect.sleep(2100)
        for (const line of lines) timekeeper.due(line.queue, 0)
      } else return
    }
  })

  const loop: Loop = {
    drain,
    idle: Effect.raceFirst(Deferred.await(hopeless), untilEmpty),
    counts: () => ({ ...counts })
  }
  return loop
})
