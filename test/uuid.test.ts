/** The ids of jobs: version 7, unique, and in the order in which they were made. */
import { assert, describe, it } from "vitest"
import * as Uuid from "../src/Uuid.ts"

const at = Date.UTC(2026, 0, 2, 3, 4, 5, 678)

describe("an id", () => {
  it("is a UUID of version 7 that carries its millisecond", () => {
    const next = Uuid.make()
    for (let n = 0; n < 5000; n++) {
      const id = next(at + n)
      assert.match(id, /^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/)
      assert.strictEqual(parseInt(id.slice(0, 8) + id.slice(9, 13), 16), at + n)
    }
  })

  it("sorts after every one before it, in one millisecond, in many, and when the clock moves back", () => {
    const next = Uuid.make()
    const times = Array.from({ length: 50_000 }, (_, n) => at + Math.floor(n / 9000) - (n % 5 === 0 ? 1000 : 0))
    const ids = times.map((time) => next(time))
    assert.deepStrictEqual(ids.toSorted(), ids)
    assert.strictEqual(new Set(ids).size, ids.length)
  })

  it("differs from those of another process in 73 random bits", () => {
    const ids = Array.from({ length: 5000 }, () => Uuid.make()(at))
    // The last 32 bits, and the counter's beginning: 11 bits behind the version, 30 behind the variant.
    const bits = ids.map((id) => BigInt(`0x${id.slice(15).replaceAll("-", "")}`))
    for (let bit = 0n; bit < 74n; bit++) {
      // The two bits of the variant come between the two parts of the counter; the topmost of the counter is 0.
      const position = bit < 62n ? bit : bit + 2n
      const ones = bits.filter((value) => (value >> position & 1n) === 1n).length
      if (bit === 73n) assert.strictEqual(ones, 0)
      else assert.isTrue(ones > 2200 && ones < 2800, `bit ${bit} is set in ${ones} of 5000`)
    }
  })

  it("sorts after the one before it when the lower part of the counter runs over", () => {
    const next = Uuid.make((size) => new Uint8Array(size).fill(255))
    const [first, second, third] = [next(at), next(at), next(at)]
    assert.match(first, /-77ff-bfff-ffffffffffff$/)
    assert.match(second, /-7800-8000-0000ffffffff$/)
    assert.match(third, /-7800-8000-0001ffffffff$/)
  })

  it("is well-formed before 1970, too", () => {
    assert.match(Uuid.make()(-1), /^00000000-0000-7/)
  })
})
