/** Contact: what the answers of the database say about its clock. */
import { assert, describe, it } from "@effect/vitest"
import * as Contact from "../src/Contact.ts"

/** The database's clock when this process's monotonic one was at 0. */
const origin = 1_700_000_000_000

describe("the database's clock", () => {
  it("is expected between the question and the answer", () => {
    const contact = Contact.make()
    assert.strictEqual(contact.heard(1000, 1200, origin + 1100), 0)
    assert.strictEqual(contact.expected(5000), origin + 5000)
    // A slow answer says less, and takes nothing away.
    assert.strictEqual(contact.heard(10_000, 20_000, origin + 11_000), 0)
    assert.strictEqual(contact.expected(30_000), origin + 30_000)
  })

  it("was moved when no answer in between explains the difference, and by more than 5 s", () => {
    for (const by of [3_600_000, -3_600_000, 5200, -5200]) {
      const contact = Contact.make()
      contact.heard(1000, 1010, origin + 1005)
      assert.approximately(contact.heard(2000, 2010, origin + 2005 + by), by, 10)
      // Then that is its clock.
      assert.approximately(contact.expected(3000), origin + 3000 + by, 5)
      assert.strictEqual(contact.heard(3000, 3010, origin + 3005 + by), 0)
      assert.approximately(contact.heard(4000, 4010, origin + 4005), -by, 10)
    }
    for (const by of [4000, -4000]) {
      const contact = Contact.make()
      contact.heard(1000, 1010, origin + 1005)
      assert.strictEqual(contact.heard(2000, 2010, origin + 2005 + by), 0)
      assert.approximately(contact.expected(3000), origin + 3000 + by, 5)
    }
  })

  it("that an answer of ten seconds may explain was not moved, and is known when a quick one comes", () => {
    const contact = Contact.make()
    contact.heard(0, 10_000, origin + 9000)
    assert.strictEqual(contact.heard(20_000, 20_010, origin + 20_005), 0)
    assert.approximately(contact.expected(30_000), origin + 30_000, 5)
  })

  it("is followed when the two drift apart", () => {
    const contact = Contact.make()
    // Half a second a minute, for a day.
    for (let minute = 0; minute < 1440; minute++) {
      const at = minute * 60_000
      const clock = origin + at + minute * 500
      assert.strictEqual(contact.heard(at - 2, at + 2, clock), 0)
      assert.approximately(contact.expected(at), clock, 2)
    }
  })
})
