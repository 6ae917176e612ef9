/** Many workers at one line, each with a session of its own: every job is claimed once, and every settle counts. */
import { assert, layer } from "@effect/vitest"
import { Effect } from "effect"
import * as Store from "../src/Store.ts"
import { long } from "./support/long.ts"
import { now, quantile } from "./support/queue.ts"
import { claimOptions, entry, jobs, query, rule, session, Storage, value, worker } from "./support/storage.ts"

const workers = 32

layer(Storage.layer, { excludeTestServices: true })("32 workers with one slot each", (it) => {
  for (const limit of [1, 10, 100]) {
    const count = long ? 100_000 : limit === 1 ? 2000 : 6000
    it.effect(
      `claim everything once and settle it once: ${limit} at a time`,
      rule(Effect.gen(function*() {
        const { store } = yield* Storage
        const expected: Array<string> = []
        while (expected.length < count) {
          const batch = jobs(Math.min(1000, count - expected.length), { priority: [2, 5, 8][expected.length % 3]! })
          yield* store.insert(batch, false)
          for (const { id } of batch) expected.push(id)
        }
        // As a server that has been up for a while knows it.
        yield* query("analyze pgqueue.ready, pgqueue.job")
        const took: Array<number> = []
        const claimed: Array<string> = []
        const one = Effect.gen(function*() {
          const own = yield* session
          const me = yield* worker()
          // To connect is no part of a claim.
          yield* own.query("select 1")
          for (;;) {
            const options = claimOptions(me, { lanes: [2, 5, 8].map(Store.laneStart), limit })
            const begun = yield* now
            const rows = yield* own.store.claim(options)
            took.push((yield* now) - begun)
            for (const { id } of rows) claimed.push(id)
            assert.isAtMost(rows.length, limit)
            const answers = yield* own.store.settle(me, rows.map(({ id }) => entry(options.lease, id, "completed")))
            // Only what did not go as usual is answered.
            assert.deepStrictEqual(answers, [])
            // Empty-handed, and not because others hold the rows.
            if (rows.length === 0 && (yield* value("select count(*)::int4 from pgqueue.ready")) === 0) return
          }
        })
        const begun = yield* now
        yield* Effect.all(Array.from({ length: workers }, () => one), { concurrency: "unbounded", discard: true })
        const all = (yield* now) - begun
        assert.strictEqual(claimed.length, count)
        assert.deepStrictEqual(claimed.toSorted(), expected.toSorted())
        assert.deepStrictEqual(
          yield* query(
            `select status, count(*)::int4 as jobs, count(distinct lease)::int4 <= $1::int4 as leases, max(attempt)::int4 as attempt
             from pgqueue.finished group by status`,
            [took.length]
          ),
          [{ status: "completed", jobs: count, leases: true, attempt: 1 }]
        )
        for (const table of ["job", "ready", "lease", "attempt"]) {
          assert.strictEqual(yield* value(`select count(*)::int4 from pgqueue.${table}`), 0, table)
        }
        const [p50, p99, worst] = [0.5, 0.99, 1].map((part) => quantile(took, part).toFixed(1))
        yield* Effect.log(
          `${limit} at a time: ${took.length} claims, p50 ${p50} ms, p99 ${p99} ms, max ${worst} ms, ` +
            `${Math.round(count / all * 1000)} jobs/s`
        )
      })),
      600_000
    )
  }
})
