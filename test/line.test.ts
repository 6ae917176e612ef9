/** How much a worker claims, and when: pure functions of what it has seen. */
import { assert, describe, it } from "@effect/vitest"
import * as Line from "../src/Line.ts"

/** A line of ten slots, all of them taken, whose claims have taken so many milliseconds; ten jobs have ended in the last 200. */
const busy = (...took: ReadonlyArray<number>): Line.Line => {
  const line = Line.make("default", 10, 0)
  for (const millis of took) Line.claimed(line, [], { sweep: false, startedAt: 0, now: millis })
  for (let n = 0; n < 20; n++) Line.started(line, 1000)
  for (let n = 1; n <= 10; n++) Line.ended(line, 1000 + n * 20)
  return line
}
const wanted = (...took: ReadonlyArray<number>) => Line.wanted(busy(...took), 1200)

describe("line", () => {
  it("claims ahead what ends in 100 ms where claims are fast", () => {
    assert.isAtLeast(wanted(2, 2), 3)
    assert.isAtMost(wanted(2, 2), 6)
    assert.strictEqual(wanted(99, 99), wanted(2, 2))
  })

  it("claims ahead what ends while a claim is under way where that takes longer", () => {
    assert.isAbove(wanted(200, 200), wanted(2, 2))
    assert.isAbove(wanted(400, 400), wanted(200, 200))
  })

  it("is not misled by one claim that was slow, and does not claim ahead for longer than jobs may wait", () => {
    assert.strictEqual(wanted(2, 400), wanted(2, 2))
    assert.strictEqual(wanted(400, 2), wanted(2, 2))
    assert.strictEqual(wanted(10_000, 10_000), wanted(500, 500))
  })

  it("asks for half as many after a claim that was too much, and for more again when one was quick", () => {
    const line = Line.make("default", 100, 0)
    const claim = (took: number) => Line.claimed(line, [], { sweep: false, startedAt: 0, now: took })
    assert.strictEqual(Line.wanted(line, 0), 100)
    Line.tooMuch(line, 100)
    assert.strictEqual(Line.wanted(line, 0), 50)
    for (let n = 0; n < 10; n++) Line.tooMuch(line, Line.wanted(line, 0))
    assert.strictEqual(Line.wanted(line, 0), 1)
    claim(10_000)
    assert.strictEqual(Line.wanted(line, 0), 1)
    claim(100)
    claim(100)
    assert.strictEqual(Line.wanted(line, 0), 3)
    for (let n = 0; n < 50; n++) claim(100)
    assert.strictEqual(Line.wanted(line, 0), 100)
  })
})
