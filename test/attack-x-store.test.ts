/** Attacks on the statements. */
import { assert, describe, layer } from "@effect/vitest"
import { Effect } from "effect"
import { bury, claim, claimed, entry, job, query, rule, stateOf, Storage, worker } from "./support/storage.ts"

layer(Storage.layer, { excludeTestServices: true })("attack", (it) => {
  describe("store", () => {
    it.effect(
      "S1 a job that waits is not told to stop, whatever the snapshot of the transaction that cancels it",
      rule(Effect.gen(function*() {
        const { sql, store } = yield* Storage
        const held = yield* claimed([job()])
        const id = held.ids[0]!
        const done = yield* sql.withTransaction(Effect.gen(function*() {
          yield* sql`set transaction isolation level repeatable read`
          yield* sql`select 1 from pgqueue.job`
          // Its worker hands it back: it waits from now on.
          yield* store.settle(held.worker, [entry(held.lease, id, "released")])
          return yield* store.cancel(id, "no", true)
        })).pipe(Effect.exit)
        console.log("S1", String(done), JSON.stringify(done).slice(0, 200), yield* stateOf(id))
        const again = yield* claim(yield* worker())
        const answers = yield* store.settle(again.lease, [entry(again.lease, id, "completed")]).pipe(Effect.exit)
        console.log("S1 claimed", again.ids.length, String(answers), (yield* stateOf(id))["status"])
      }))
    )
    it.effect(
      "S2 what is parked comes back for a worker that does not bring it back itself",
      rule(Effect.gen(function*() {
        const { store } = yield* Storage
        const mine = yield* worker()
        yield* store.insert([job({ kind: "old" })], false)
        assert.strictEqual(yield* store.park([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 100), 1)
        // A process of version 1 that was declared dead and registers again.
        const old = yield* worker({ kinds: ["old"] })
        yield* store.unpark(mine, 100)
        const { ids } = yield* claim(old, { kinds: ["old"] })
        yield* bury(old)
        yield* query("select 1")
        assert.strictEqual(ids.length, 1)
      }))
    )
  })
})
