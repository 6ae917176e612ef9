/** The loop of a scheduler that says what it declares, over a test clock: it takes an hour. */
import { assert, describe, it } from "@effect/vitest"
import { Clock, Effect, Logger, Random } from "effect"
import { TestClock } from "effect/testing"
import type * as Store from "../src/Store.ts"
import * as Ticker from "../src/Ticker.ts"

const minute = 60_000

/** Runs that loop over a storage that notes, by the minute, what it is asked; and fails when it is told to. */
const marking = Effect.fnUntraced(function*(undeclared: ReadonlyArray<ReadonlyArray<string>>) {
  const asked: Array<string> = []
  const marks = [...undeclared]
  let fails = false
  const note = (what: string) =>
    Effect.flatMap(Clock.currentTimeMillis, (now) => {
      asked.push(`${what} ${Math.round(now / minute / 5) * 5}`)
      return fails ? Effect.die("no database") : Effect.void
    })
  // Sound: the loop asks for nothing else.
  const store = {
    schedules: {
      declare: (names: ReadonlyArray<string>) => note(`declare ${names.join()}`),
      undeclare: () => Effect.as(note("undeclare"), marks.shift() ?? [])
    }
  } as unknown as Store.Store
  // The same jitter in every run.
  yield* Effect.forkScoped(Random.withSeed(Ticker.declaring(store, ["mine"]), "marking"))
  return { asked, fail: (now: boolean) => void (fails = now) }
})

/** Lets time pass, a second after the other. */
const pass = (minutes: number) =>
  Effect.forEach(Array.from({ length: minutes * 60 }), () => TestClock.adjust("1 second"), { discard: true })

/** What is warned of. */
const warnings = () => {
  const logged: Array<string> = []
  const layer = Logger.layer([
    Logger.make(({ logLevel, message }) => void (logLevel === "Warn" && logged.push(String(message))))
  ])
  return { logged, layer }
}

describe("a scheduler", () => {
  it.effect("says every five minutes what it declares, and judges what nobody does once it has been there long enough", () => {
    const { layer, logged } = warnings()
    return Effect.gen(function*() {
      const { asked } = yield* marking([[], ["a", "b"], ["c"]])
      yield* pass(33)
      assert.deepStrictEqual(asked.filter((text) => text.startsWith("declare")).length, 7)
      assert.deepStrictEqual(new Set(asked.map((text) => text.split(" ")[0])), new Set(["declare", "undeclare"]))
      const judged = asked.filter((text) => text.startsWith("undeclare"))
      assert.deepStrictEqual(judged, ["undeclare 20", "undeclare 25", "undeclare 30"])
      assert.deepStrictEqual(logged, [
        `effect-pgqueue: no running scheduler declares "a", "b" any more; they go on until somebody removes them`,
        `effect-pgqueue: no running scheduler declares "c" any more; it goes on until somebody removes it`
      ])
    }).pipe(Effect.scoped, Effect.provide(layer))
  })

  it.effect("judges anew only after as long when it was out of touch", () => {
    const { layer } = warnings()
    return Effect.gen(function*() {
      const { asked, fail } = yield* marking([])
      yield* pass(18)
      fail(true)
      yield* pass(5)
      fail(false)
      asked.length = 0
      yield* pass(17)
      assert.isFalse(asked.some((text) => text.startsWith("undeclare")))
      yield* pass(10)
      assert.isTrue(asked.some((text) => text.startsWith("undeclare")))
    }).pipe(Effect.scoped, Effect.provide(layer))
  })
})
