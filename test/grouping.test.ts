/** Which single enqueues share a statement, and when it is sent. The storage is a stub that answers when it is told to. */
import { assert, describe, it } from "@effect/vitest"
import { Deferred, Effect, Exit, Fiber, Scope } from "effect"
import { SqlError, UnknownError } from "effect/sql/SqlError"
import * as Grouping from "../src/Grouping.ts"
import type * as Store from "../src/Store.ts"
import { job } from "./support/storage.ts"

const jobOf = (payload: string) => job({ payload })

/**
 * The entrance over a stub, the groups that were sent, those of them that were sent as if they had been sent before, and how
 * the oldest that has no answer gets one. A job that is "there" is met by an insert of what is new.
 */
const entrance = Effect.gen(function*() {
  const sent: Array<ReadonlyArray<string>> = []
  const again: Array<ReadonlyArray<string>> = []
  const told: Array<string> = []
  /** What inserts have announced by themselves, and whether they may. */
  const carried = { allowed: false, payloads: [] as Array<string>, done: 0 }
  const open: Array<Deferred.Deferred<void>> = []
  const failed = (code: string) => new SqlError({ reason: new UnknownError({ cause: { code }, message: code }) })
  const answering = (jobs: ReadonlyArray<Store.NewJob>, failures: Readonly<Record<string, string>>) =>
    Effect.suspend(() => {
      sent.push(jobs.map(({ payload }) => payload))
      const answer = Deferred.makeUnsafe<void>()
      open.push(answer)
      const code = jobs.map(({ payload }) => failures[payload]).find((code) => code !== undefined)
      return Effect.andThen(Deferred.await(answer), code === undefined ? Effect.void : Effect.fail(failed(code)))
    })
  const insertNew = (jobs: ReadonlyArray<Store.NewJob>, notification?: string) =>
    notification === undefined
      ? answering(jobs, { bad: "22P02", there: "23505" })
      : Effect.tap(
        answering(jobs, { bad: "22P02", there: "23505", "too much": "54000" }),
        () => Effect.sync(() => void carried.payloads.push(notification))
      )
  const insert = (jobs: ReadonlyArray<Store.NewJob>) =>
    Effect.suspend(() => {
      again.push(jobs.map(({ payload }) => payload))
      return Effect.as(
        answering(jobs, { bad: "22P02" }),
        new Set(jobs.filter(({ payload }) => payload !== "there").map(({ id }) => id))
      )
    })
  const enqueue = yield* Grouping.make({
    // Sound: jobs without a key are inserted, no more.
    store: { insert, insertNew, replayed: () => Effect.void } as unknown as Store.Store,
    withInsert: ({ payload }) =>
      carried.allowed ? { payload: `news of ${payload}`, done: () => void carried.done++ } : undefined,
    onEnqueued: (jobs) => told.push(jobs.map(({ payload }) => payload).join(" "))
  })
  const answer = Effect.suspend(() => Deferred.succeed(open.shift()!, undefined))
  return { enqueue, sent, again, told, carried, answer }
})

const start = <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.forkChild(effect, { startImmediately: true })

/** Lets the microtasks run, but no turn of the event loop begin. */
const microtasks = Effect.promise(async () => {
  for (let n = 0; n < 20; n++) await undefined
})

describe("an enqueue", () => {
  it.live("that is alone is sent before the next turn of the event loop", () =>
    Effect.gen(function*() {
      const { answer, enqueue, sent } = yield* entrance
      for (const payload of ["1", "2"]) {
        let turned = false
        const turn = setImmediate(() => {
          turned = true
        })
        const fiber = yield* start(enqueue(jobOf(payload)))
        yield* microtasks
        assert.deepStrictEqual(sent.at(-1), [payload])
        assert.isFalse(turned)
        clearImmediate(turn)
        yield* answer
        assert.propertyVal(yield* Fiber.join(fiber), "status", "inserted")
      }
    }))

  it.live("goes with those of its turn, and waits with the others while one is in flight, in order", () =>
    Effect.gen(function*() {
      const { answer, enqueue, sent, told } = yield* entrance
      const fibers = yield* Effect.forEach(["1", "2"], (payload) => start(enqueue(jobOf(payload))))
      yield* microtasks
      fibers.push(...yield* Effect.forEach(["3", "4", "5"], (payload) => start(enqueue(jobOf(payload)))))
      yield* microtasks
      assert.deepStrictEqual(sent, [["1", "2"]])
      yield* answer
      yield* microtasks
      assert.deepStrictEqual(sent, [["1", "2"], ["3", "4", "5"]])
      assert.deepStrictEqual(told, ["1 2"])
      yield* answer
      yield* Fiber.joinAll(fibers)
      assert.deepStrictEqual(told, ["1 2", "3 4 5"])
    }))

  it.live("from each of many promises in a closed loop goes with all the others", () =>
    Effect.gen(function*() {
      const { answer, enqueue, sent } = yield* entrance
      const context = yield* Effect.context<never>()
      const callers = Array.from({ length: 50 }, async () => {
        for (let n = 0; n < 4; n++) await Effect.runPromiseWith(context)(enqueue(jobOf(`${n}`)))
      })
      for (let n = 0; n < 4; n++) {
        yield* microtasks
        yield* answer
      }
      yield* Effect.promise(() => Promise.all(callers))
      assert.deepStrictEqual(sent, Array.from({ length: 4 }, (_, n) => Array.from({ length: 50 }, () => `${n}`)))
    }))

  it.live("that is given up before it is sent never is", () =>
    Effect.gen(function*() {
      const { answer, enqueue, sent } = yield* entrance
      const first = yield* start(enqueue(jobOf("1")))
      yield* microtasks
      const [second, third] = [yield* start(enqueue(jobOf("2"))), yield* start(enqueue(jobOf("3")))]
      yield* Fiber.interrupt(second)
      yield* answer
      yield* Fiber.join(first)
      yield* microtasks
      yield* Fiber.interrupt(third)
      yield* answer
      yield* microtasks
      assert.deepStrictEqual(sent, [["1"], ["3"]])
      const last = yield* start(enqueue(jobOf("4")))
      yield* microtasks
      yield* answer
      yield* Fiber.join(last)
      assert.deepStrictEqual(sent, [["1"], ["3"], ["4"]])
    }))

  it.live("that was sent before, and whose answer was lost, is sent again as such, with those of its statement", () =>
    Effect.gen(function*() {
      const { again, answer, enqueue, sent } = yield* entrance
      const fibers = yield* Effect.forEach(["1", "there", "3"], (payload) => start(enqueue(jobOf(payload))))
      yield* microtasks
      assert.deepStrictEqual(again, [])
      for (let n = 0; n < 2; n++) {
        yield* answer
        yield* microtasks
      }
      const enqueued = yield* Fiber.joinAll(fibers)
      // Its own earlier insert is what it met.
      assert.deepStrictEqual(enqueued.map(({ status }) => status), ["inserted", "inserted", "inserted"])
      assert.deepStrictEqual(sent, [["1", "there", "3"], ["1", "there", "3"]])
      assert.deepStrictEqual(again, [["1", "there", "3"]])
    }))

  it.live("whose id is the caller's is never sent as new, and may be there already", () =>
    Effect.gen(function*() {
      const { again, answer, enqueue } = yield* entrance
      const fiber = yield* start(enqueue({ ...jobOf("there"), idGiven: true }))
      yield* microtasks
      assert.deepStrictEqual(again, [["there"]])
      yield* answer
      assert.propertyVal(yield* Fiber.join(fiber), "status", "existing")
    }))

  it.live("with bad data fails alone", () =>
    Effect.gen(function*() {
      const { answer, enqueue, sent, told } = yield* entrance
      const fibers = yield* Effect.forEach(["1", "2", "bad", "4"], (payload) => start(enqueue(jobOf(payload))))
      for (let n = 0; n < 5; n++) {
        yield* microtasks
        yield* answer
      }
      const exits = yield* Effect.forEach(fibers, (fiber) => Fiber.await(fiber))
      assert.deepStrictEqual(exits.map(Exit.isSuccess), [true, true, false, true])
      assert.deepStrictEqual(sent, [["1", "2", "bad", "4"], ["1", "bad"], ["1"], ["bad"], ["2", "4"]])
      assert.deepStrictEqual(told, ["1", "2 4"])
    }))

  it.live("beyond a thousand goes into the next statement", () =>
    Effect.gen(function*() {
      const { answer, enqueue, sent } = yield* entrance
      const fibers = yield* Effect.forEach(
        Array.from({ length: Grouping.maxRows + 5 }, (_, n) => `${n}`),
        (payload) => start(enqueue(jobOf(payload)))
      )
      yield* microtasks
      yield* answer
      yield* microtasks
      yield* answer
      yield* Fiber.joinAll(fibers)
      assert.deepStrictEqual(sent.map((group) => group.length), [Grouping.maxRows, 5])
    }))

  it.live("in flight or behind it is interrupted when the layer closes", () =>
    Effect.gen(function*() {
      const scope = yield* Scope.make()
      const { enqueue } = yield* Scope.provide(entrance, scope)
      const first = yield* start(enqueue(jobOf("1")))
      yield* microtasks
      const second = yield* start(enqueue(jobOf("2")))
      yield* Scope.close(scope, Exit.void)
      assert.isTrue(Exit.hasInterrupts(yield* Fiber.await(first)))
      assert.isTrue(Exit.hasInterrupts(yield* Fiber.await(second)))
      assert.isTrue(Exit.hasDies(yield* Effect.exit(enqueue(jobOf("3")))))
    }))

  it.live("announces itself when it is alone and may, and is announced when it could not", () =>
    Effect.gen(function*() {
      const { answer, carried, enqueue, sent, told } = yield* entrance
      carried.allowed = true
      const alone = yield* start(enqueue(jobOf("1")))
      yield* microtasks
      const together = yield* Effect.forEach(["2", "3"], (payload) => start(enqueue(jobOf(payload))))
      yield* microtasks
      yield* answer
      yield* Fiber.join(alone)
      assert.deepStrictEqual([carried.payloads, told], [["news of 1"], []])
      yield* microtasks
      yield* answer
      yield* Effect.forEach(together, Fiber.join)
      assert.deepStrictEqual([carried.payloads, told, carried.done], [["news of 1"], ["2 3"], 1])
      assert.deepStrictEqual(sent, [["1"], ["2", "3"]])

      for (const payload of ["too much", "there"]) {
        const fiber = yield* start(enqueue(jobOf(payload)))
        for (let n = 0; n < 3; n++) {
          yield* microtasks
          yield* Effect.ignoreCause(Effect.suspend(() => answer))
        }
        assert.propertyVal(yield* Fiber.join(fiber), "status", "inserted")
        assert.strictEqual(told.at(-1), payload)
      }
      assert.deepStrictEqual([carried.payloads, carried.done], [["news of 1"], 3])
    }))
})
