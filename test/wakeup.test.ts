/** When others are told, and when who listens hears of it. The sessions are stubs. */
import type * as PgConnection from "@effect/sql-pg/PgConnection"
import { assert, describe, it } from "@effect/vitest"
import { Clock, Effect, Queue } from "effect"
import type { SqlError } from "effect/sql/SqlError"
import type * as Database from "../src/Database.ts"
import * as Wakeup from "../src/Wakeup.ts"

/** A database whose sessions write down what is announced, and whose notifications are made up. */
const database = Effect.gen(function*() {
  const announced: Array<ReadonlyArray<string>> = []
  const sessions: Array<number> = []
  let notifications: Queue.Queue<PgConnection.Notification, SqlError> | undefined
  const connect = Effect.sync((): PgConnection.PgConnection => {
    sessions.push(sessions.length)
    const session = {
      processId: sessions.length,
      query: (_text: string, params?: ReadonlyArray<any>) =>
        Effect.sync(() => {
          if (params !== undefined) announced.push(params[1])
          return { rows: [] }
        }),
      listen: () =>
        Effect.tap(Queue.unbounded<PgConnection.Notification, SqlError>(), (queue) =>
          Effect.sync(() => {
            notifications = queue
          }))
    }
    // Sound: what a wake-up uses of a session.
    return Object.assign(session, { pin: Effect.succeed(session) }) as any
  })
  // Sound: a wake-up only connects.
  const database = { connect: () => connect, keepsSettings: true, listens: true } as unknown as Database.Database
  const wakeup = yield* Wakeup.make(database, "pgqueue")
  yield* Effect.sleep(20)
  const notify = (payload: string) => Queue.offerUnsafe(notifications!, { processId: 99, channel: "c", payload })
  return { wakeup, announced, sessions, notify }
})

/** A monotonic clock that stands still until it is moved. */
const stoppedClock = Effect.map(Clock.Clock, (real) => {
  let millis = 1000
  const clock = Object.assign(Object.create(real) as Clock.Clock, {
    monotonicTimeNanosUnsafe: () => BigInt(millis * 1_000_000)
  })
  return { clock, pass: (time: number) => void (millis += time) }
})

/** Runs something in a turn of the event loop, and returns what has come of it when the next one begins. */
const inOneTurn = <A>(act: () => void, look: () => A) =>
  Effect.promise(() =>
    new Promise<A>((resolve) =>
      setTimeout(() => {
        // Before anything that the act defers to the next turn.
        setImmediate(() => resolve(look()))
        act()
      })
    )
  )

describe("a mark", () => {
  it.live("finds the session open, and is announced at once", () =>
    Effect.gen(function*() {
      const { announced, sessions, wakeup } = yield* database
      assert.deepStrictEqual(sessions, [0])
      assert.deepStrictEqual(yield* inOneTurn(() => wakeup.mark("mail", 0), () => [...announced]), [["0 mail"]])
    }))

  it.live("goes with those of the same moment", () =>
    Effect.gen(function*() {
      const { announced, wakeup } = yield* database
      const act = () => {
        wakeup.mark("mail", 50)
        wakeup.mark("default", 0)
        wakeup.mark("mail", 20)
      }
      assert.deepStrictEqual(yield* inOneTurn(act, () => [...announced]), [["20 mail", "0 default"]])
    }))

  it.live("is alone a few times, and goes with others where they come fast", () =>
    Effect.gen(function*() {
      const { announced, wakeup } = yield* database
      const names = Array.from({ length: 300 }, (_, n) => `0 queue ${n}`)
      const begun = performance.now()
      for (let n = 0; n < names.length; n++) {
        wakeup.mark(`queue ${n}`, 0)
        yield* Effect.yieldNow
      }
      assert.deepStrictEqual(announced.slice(0, 10), names.slice(0, 10).map((name) => [name]))
      yield* Effect.promise(async () => {
        while (announced.flat().length < names.length) await new Promise((resolve) => setTimeout(resolve, 5))
      })
      // Twenty at once, and one in four milliseconds.
      assert.isAtMost(announced.length, 20 + Math.ceil((performance.now() - begun) / 4))
      assert.isBelow(announced.length, names.length / 2)
      assert.deepStrictEqual(announced.flat(), names)
    }))
})

describe("an insert", () => {
  it.live("announces its job where nobody here works the queue, and nothing was enqueued a moment ago", () =>
    Effect.scoped(Effect.gen(function*() {
      const { clock, pass } = yield* stoppedClock
      const { announced, wakeup } = yield* Effect.provideService(database, Clock.Clock, clock)
      assert.isUndefined(wakeup.withInsert("mail", 60_000))
      const first = wakeup.withInsert("mail", 0.2)
      assert.strictEqual(first?.payload, "1 mail")
      pass(5)
      // Not while another is on its way, nor right after it.
      assert.isUndefined(wakeup.withInsert("mail", 0))
      first?.done()
      assert.isUndefined(wakeup.withInsert("mail", 0))
      pass(5)
      yield* Effect.scoped(Effect.gen(function*() {
        yield* wakeup.subscribe({ ...Wakeup.deaf, works: (queue) => queue === "mail" })
        assert.isUndefined(wakeup.withInsert("mail", 0))
        assert.strictEqual(wakeup.withInsert("default", 0)?.payload, "0 default")
      }))
      const wakes = () => wakeup.mark("default", 0)
      assert.deepStrictEqual(yield* inOneTurn(wakes, () => [...announced]), [["0 default"]])
      assert.isUndefined(wakeup.withInsert("mail", 0))
      pass(5)
      assert.isDefined(wakeup.withInsert("mail", 0))
    })))

  it.live("does not, for a while after three that were slow", () =>
    Effect.scoped(Effect.gen(function*() {
      const { clock, pass } = yield* stoppedClock
      const { wakeup } = yield* Effect.provideService(database, Clock.Clock, clock)
      /** Whether one that takes so many milliseconds is let through. */
      const insert = (millis: number) => {
        const announcement = wakeup.withInsert("mail", 0)
        pass(millis)
        announcement?.done()
        pass(5)
        return announcement !== undefined
      }
      assert.deepStrictEqual([20, 20, 0, 20, 20, 0, 20, 20, 20].map(insert), Array.from({ length: 9 }, () => true))
      assert.isFalse(insert(0))
      pass(2000)
      assert.isTrue(insert(0))
    })))
})

describe("a notification", () => {
  it.live("is heard before the next turn of the event loop", () =>
    Effect.gen(function*() {
      const { notify, wakeup } = yield* database
      const heard: Array<unknown> = []
      yield* wakeup.subscribe({ ...Wakeup.deaf, onDue: (queue, delay) => heard.push([queue, delay]) })
      yield* wakeup.listen
      yield* Effect.sleep(20)
      const act = () => {
        heard.length = 0
        notify("0 mail")
        notify("20 default")
      }
      assert.deepStrictEqual(yield* inOneTurn(act, () => [...heard]), [["mail", 0], ["default", 20]])
    }))
})
