/** The settle buffer over a real storage: what it makes of a batch. */
import { assert, layer } from "@effect/vitest"
import { Effect } from "effect"
import * as Episode from "../src/Episode.ts"
import type * as Settlement from "../src/Settlement.ts"
import * as Settler from "../src/Settler.ts"
import type * as Store from "../src/Store.ts"
import { claimed, count, entry, failure, jobs, query, rule, Storage } from "./support/storage.ts"

/** A buffer, the batches that it has sent, and its answers. */
const buffer = Effect.fnUntraced(function*(worker: string) {
  const { store } = yield* Storage
  const sent: Array<ReadonlyArray<Settlement.Entry>> = []
  const answers = new Map<string, Settlement.Answer | undefined>()
  const settle: Store.Store["settle"] = (worker, entries, now) =>
    Effect.suspend(() => {
      sent.push(entries)
      return store.settle(worker, entries, now)
    })
  const settler = Settler.make({
    store: { ...store, settle },
    worker: () => worker,
    now: () => 0,
    episode: Episode.make("settling"),
    onDoubt: () => {},
    onRelief: () => {},
    onSettled: ({ id }, answer) => answers.set(id, answer)
  })
  return { settler, sent, answers }
})

layer(Storage.layer, { excludeTestServices: true })("a batch", (it) => {
  for (const [size, statements] of [[15, 1], [16, 2]] as const) {
    it.effect(
      `of ${size} jobs, some completed and some failed, is settled in ${statements}`,
      rule(Effect.gen(function*() {
        const all = jobs(size)
        const held = yield* claimed(all)
        const { answers, sent, settler } = yield* buffer(held.worker)
        const entries = all.map(({ id }, n) =>
          n % 4 === 0
            ? entry(held.lease, id, "failed", { delay: 60_000, failure })
            : entry(held.lease, id, "completed", { result: String(n) })
        )
        entries.forEach(settler.push)
        yield* Effect.forkChild(settler.run)
        yield* settler.drained
        assert.lengthOf(sent, statements)
        assert.lengthOf(sent.flat(), size)
        assert.strictEqual(answers.size, size)
        assert.strictEqual(yield* count("finished"), size - Math.ceil(size / 4))
        assert.strictEqual(yield* count("ready"), Math.ceil(size / 4))
        assert.strictEqual(yield* count("lease"), 0)
      }))
    )
  }

  it.effect(
    "of both sorts with one whose result the database refuses costs that one an attempt, and no other",
    rule(Effect.gen(function*() {
      const all = jobs(40)
      const held = yield* claimed(all)
      const { answers, settler } = yield* buffer(held.worker)
      for (const [n, { id }] of all.entries()) {
        settler.push(
          n % 2 === 0
            ? entry(held.lease, id, "failed", { delay: 60_000, failure })
            : entry(held.lease, id, "completed", { result: n === 21 ? "no json" : String(n) })
        )
      }
      yield* Effect.forkChild(settler.run)
      yield* settler.drained
      assert.strictEqual(answers.size, 40)
      assert.strictEqual(yield* count("finished"), 19)
      const [refused] = yield* query("select message from pgqueue.attempt where job = $1::uuid", [all[21]!.id])
      assert.deepStrictEqual(refused, { message: "the database refused what the handler left" })
      assert.strictEqual(yield* count("lease"), 0)
    }))
  )
})
