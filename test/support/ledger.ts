/** The ledger: what handlers really did, in a table of their own, written over connections of their own. */
import * as PgClient from "@effect/sql-pg/PgClient"
import * as Context from "effect/Context"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Queue from "effect/Queue"
import * as Reactivity from "effect/reactivity/Reactivity"
import * as Redacted from "effect/Redacted"
import * as Scope from "effect/Scope"
import type { SqlError } from "effect/sql/SqlError"
import { randomUUID } from "node:crypto"
import { Job } from "../../src/index.ts"

/** Runs are numbered by a UUID, so that an entry that is sent again after an outage does not count twice. */
const createText = `create table if not exists public.ledger (
  run uuid not null, phase text not null, job uuid not null, attempt int not null, boot text not null, note text,
  at timestamptz not null default clock_timestamp(), primary key (run, phase))`

const insertText = `insert into public.ledger (run, phase, job, attempt, boot, note)
  select run, phase, job, attempt, boot, nullif(note, '')
  from unnest($1::uuid[], $2::text[], $3::uuid[], $4::int[], $5::text[], $6::text[]) as e(run, phase, job, attempt, boot, note)
  on conflict do nothing`

interface Entry {
  readonly values: readonly [run: string, phase: string, job: string, attempt: number, boot: string, note: string]
  readonly written: Deferred.Deferred<void>
}

/** Writes down what handlers do, and reads everything else of the same database. */
export class Ledger extends Context.Service<Ledger, {
  /** Writes a phase of the current run and returns when it is on disk, however long the database is away. */
  readonly record: (phase: string, note?: string) => Effect.Effect<void, never, Job.Current>
  /** Hands in a phase of the current run and does not wait. */
  readonly mention: (phase: string, note?: string) => Effect.Effect<void, never, Job.Current>
  /** Runs a statement on a connection that belongs to no queue and no application. */
  readonly query: <A extends object = any>(
    text: string,
    params?: ReadonlyArray<unknown>
  ) => Effect.Effect<ReadonlyArray<A>, SqlError>
  readonly sql: PgClient.PgClient
}>()("effect-pgqueue/test/support/ledger") {
  /** The ledger in the database at `url`. Entries carry `boot`, the name of the process. */
  static readonly layer = (url: string, boot: string): Layer.Layer<Ledger, SqlError> =>
    Layer.effect(Ledger, makeLedger(url, boot))
}

const makeLedger = Effect.fnUntraced(function*(url: string, boot: string) {
  // Left open: what a handler has to write must neither hold up the end of a process nor be lost at it.
  const scope = yield* Scope.make()
  const sql = yield* PgClient.make({
    url: Redacted.make(url),
    applicationName: `ledger of ${boot}`,
    maxConnections: 3
  }).pipe(Effect.provideServiceEffect(Reactivity.Reactivity, Reactivity.make), Scope.provide(scope))
  const entries = yield* Queue.unbounded<Entry>()
  const runs = new WeakMap<Job.Info, string>()

  const write = Effect.gen(function*() {
    const batch = yield* Queue.takeBetween(entries, 1, 1000)
    const column = (index: number) => batch.map(({ values }) => values[index])
    yield* sql.unsafe(insertText, [0, 1, 2, 3, 4, 5].map(column)).pipe(
      Effect.sandbox,
      Effect.tapError((cause) => Effect.andThen(Effect.logDebug("the ledger tries again", cause), Effect.sleep(50))),
      Effect.eventually
    )
    for (const { written } of batch) Deferred.doneUnsafe(written, Effect.void)
  })
  yield* Effect.forkIn(Effect.withTracerEnabled(Effect.forever(write), false), scope)

  const hand = (phase: string, note: string | undefined) =>
    Effect.gen(function*() {
      const info = yield* Job.Current
      const run = runs.get(info) ?? randomUUID()
      runs.set(info, run)
      const written = yield* Deferred.make<void>()
      yield* Queue.offer(entries, { values: [run, phase, info.id, info.attempt, boot, note ?? ""], written })
      return Deferred.await(written)
    })

  return Ledger.of({
    sql,
    record: (phase, note) => Effect.flatten(hand(phase, note)),
    mention: (phase, note) => Effect.asVoid(hand(phase, note)),
    query: <A extends object>(text: string, params?: ReadonlyArray<unknown>) => sql.unsafe<A>(text, params)
  })
})

/** Creates the table of the ledger. */
export const createLedger = Effect.flatMap(Ledger, ({ query }) => query(createText))
