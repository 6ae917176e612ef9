/** A loop says once that it fails, and does not fill the log when it fails again and again. */
import { assert, describe, it } from "@effect/vitest"
import { Cause, Effect, Logger } from "effect"
import { TestClock } from "effect/testing"
import * as Episode from "../src/Episode.ts"

describe("an episode", () => {
  it.effect("of failures that come and go is told of every ten seconds", () => {
    const said: Array<string> = []
    const logger = Logger.make(({ logLevel, message }) => void said.push(`${logLevel} ${String(message)}`))
    return Effect.gen(function*() {
      const episode = Episode.make("it")
      const fails = episode.failed(Cause.fail(new Error("no")))
      const begun = "Warn effect-pgqueue: it does not go through (Error: no)"
      const over = "Info effect-pgqueue: it goes through again"
      for (let n = 0; n < 100; n++) {
        yield* fails
        yield* fails
        yield* episode.succeeded
        yield* episode.succeeded
        yield* TestClock.adjust(10)
      }
      assert.deepStrictEqual(said.splice(0), [begun, over, begun, over, begun, over])
      // It does not come to an end any more, and is told of though some were a moment before.
      yield* fails
      yield* TestClock.adjust("9 seconds")
      yield* fails
      assert.deepStrictEqual(said.splice(0), [begun])
      yield* TestClock.adjust("1 minute")
      yield* fails
      yield* episode.succeeded
      assert.deepStrictEqual(said, [over])
    }).pipe(Effect.provide(Logger.layer([logger])))
  })
})
