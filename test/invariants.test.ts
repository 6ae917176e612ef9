/** The invariants notice what they are there for: each is violated once, on purpose. */
import { PgClient } from "@effect/sql-pg"
import { assert, describe, it } from "@effect/vitest"
import { Effect, Layer, Redacted } from "effect"
import { evidence, invariants, watch } from "./faults/invariants.ts"
import { databaseUrl, rows, withQueue } from "./support/queue.ts"

const [a, b, c, d] = ["a", "b", "c", "d"].map((letter) => `'${letter.repeat(8)}-0000-0000-0000-000000000000'::uuid`)
const now = "clock_timestamp()"
const finished = (
  id: string,
  more: { readonly kind?: string; readonly status?: string; readonly metadata?: string; readonly at?: string } = {}
) =>
  `insert into pgqueue.finished (id, kind, queue, priority, status, attempt, max_attempts, rescued, snoozed, lease, metadata, enqueued_at, scheduled_for, payload)
   values (${id}, '${more.kind ?? "work"}', 'default', 5, '${more.status ?? "completed"}', 1, 5, 0, 0, null, '${
    more.metadata ?? "{}"
  }', ${now},
     ${more.at ?? now}, '{"key": "aaaaaaaa-0000-0000-0000-000000000000"}')`
const run = (job: string, boot: string, begun: number, ended: number, n = begun) =>
  `insert into evidence.run (run, job, attempt, boot, key, begun_at, ended_at) values
   ('00000000-0000-0000-0000-${
    String(n).padStart(12, "0")
  }', ${job}, 1, '${boot}', 'aaaaaaaa-0000-0000-0000-000000000000',
    '2020-01-01'::timestamptz + ${begun} * interval '1 second', '2020-01-01'::timestamptz + ${ended} * interval '1 second')`
const moved = (job: string, what: string, lease: string, at = 0) =>
  `insert into watch.transition (job, what, lease, worker, at) values (${job}, '${what}', ${lease}, ${c}, '2020-01-01'::timestamptz + ${at} * interval '1 second')`
const intent = (outcome: string) => `insert into evidence.intent values (${a}, '${outcome}', ${a})`

const violations: Record<string, ReadonlyArray<string>> = {
  "I1 no loss": [intent("acked")],
  "I1 all have ended": ["select pgqueue.enqueue('work', '{}')"],
  "I2 no phantom": [intent("rejected"), run(b!, "worker", 1, 2)],
  "I3 one final": [moved(a!, "completed", d!), moved(a!, "discarded", d!)],
  "I3 one final, by who holds it": [moved(a!, "claimed", c!), moved(a!, "left", c!), moved(a!, "completed", c!)],
  "I4 no overlap under a valid lease": [
    moved(a!, "claimed", c!, 1),
    `insert into watch.beat values (${c}, 'one', 3000, '2020-01-01 00:00:01')`,
    run(a!, "one", 2, 10),
    run(a!, "two", 3, 10)
  ],
  "I4 no overlap at all": [run(a!, "one", 2, 10), run(a!, "two", 3, 10)],
  "I5 exactly once": [finished(a!), run(a!, "one", 1, 2), run(a!, "two", 3, 4)],
  "I6 bounded starts": [finished(a!), ...[1, 2, 3, 4, 5, 6].map((n) => run(a!, "one", n, n))],
  "I7 fenced side effects": [finished(a!, { kind: "pay" }), `insert into public.paid values (${a}, 1)`],
  "I8 each tick once": [
    finished(a!, { kind: "tick", metadata: "{\"schedule\": \"s\"}", at: "'2020-01-01 00:00:00'" }),
    finished(b!, { kind: "tick", metadata: "{\"schedule\": \"s\"}", at: "'2020-01-01 00:00:02'" })
  ],
  "I8 no tick twice": [a!, b!].map((id) =>
    finished(id, { kind: "tick", metadata: "{\"schedule\": \"s\"}", at: "'2020-01-01 00:00:00'" })
  ),
  "I9 unique": [
    "select pgqueue.enqueue('work', '{}', unique_key => 'k')",
    "insert into pgqueue.job (id, kind, queue, priority, run_at, scheduled_for, max_attempts, payload, unique_key) select gen_random_uuid(), kind, queue, priority, run_at, scheduled_for, max_attempts, payload, unique_key from pgqueue.job"
  ],
  "I9 one job for each enqueue": [finished(a!), finished(b!)],
  "I11 hygiene: workers": [
    "insert into pgqueue.worker (id, name, queues, kinds, prefixes, lease_ms) values (gen_random_uuid(), 'w', '{}', '{}', '{}', 1)"
  ],
  "I11 hygiene: leases": [`insert into pgqueue.lease (id, worker, ids) values (gen_random_uuid(), ${a}, array[${a}])`],
  "I11 hygiene: indexes": [
    "update pg_index set indisvalid = false where indexrelid = 'pgqueue.lease_worker'::regclass"
  ],
  "I13 accounting": [finished(a!), finished(b!), intent("acked")],
  "I13 no defect": [intent("defect")]
}

/** What a process leaves behind that does not clear away, by the text that its session has sent last. */
const leftBehind: Record<string, ReadonlyArray<string>> = {
  "I11 hygiene: transactions": ["begin", "select 1"],
  "I11 hygiene: locks": ["select pg_advisory_lock(1)"],
  "I11 hygiene: sessions": ["select 1"]
}

const all = new Map([...invariants({ faultFree: true }), ...invariants({ clockStepped: true })])

const found = Effect.fnUntraced(function*(name: string) {
  return yield* rows(all.get(name)!)
})

describe("an invariant is violated by", () => {
  it("something that is written down here", () => {
    assert.sameMembers([...all.keys()], [...Object.keys(violations), ...Object.keys(leftBehind)])
  })

  it.live.each(Object.keys(violations).concat(Object.keys(leftBehind)))(
    "%s",
    (name) =>
      withQueue(Effect.gen(function*() {
        yield* Effect.forEach([...watch, ...evidence], (text) => rows(text))
        assert.deepStrictEqual(yield* found(name), [])
        yield* Effect.forEach(violations[name] ?? [], (text) => rows(text))
        const url = yield* databaseUrl
        const Left = PgClient.layer({ url: Redacted.make(url), applicationName: "worker left", maxConnections: 1 })
        yield* Effect.gen(function*() {
          const session = yield* (yield* PgClient.PgClient).reserve
          yield* Effect.forEach(leftBehind[name] ?? [], (text) => session.executeRaw(text, []))
          assert.isNotEmpty(yield* found(name))
        }).pipe(Effect.scoped, Effect.provide(Layer.fresh(Left)))
      }))
  )
})
