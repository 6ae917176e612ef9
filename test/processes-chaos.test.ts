/** Everything at once: processes that are killed and frozen, people who act, sessions that are lost; then nothing is amiss. */
import { assert, describe, it } from "@effect/vitest"
import { Cause, Effect, Fiber, Option } from "effect"
import { SqlClient } from "effect/sql"
import { Admin } from "../src/index.ts"
import { type ChaosProgram, Paid, Plain, Rare } from "./programs/chaos.ts"
import { long } from "./support/long.ts"
import { type Program, startProgram } from "./support/processes.ts"
import {
  allInPlace,
  assertRows,
  databaseUrl,
  now,
  rows,
  untilAllEnded,
  untilValue,
  value,
  withQueue
} from "./support/queue.ts"

const seconds = long ? 110 : 4

/** How long somebody waits for a result, in milliseconds. */
const longestWait = 3000

const chance = () => Math.random()
const any = <A>(from: ReadonlyArray<A>): A => from[Math.floor(chance() * from.length)]!

/** Each end of a job, of which the table of finished jobs shows only the last, and that only until somebody deletes it. */
const watchCompletions = Effect.gen(function*() {
  yield* rows("create table public.completed (job uuid not null)")
  yield* rows(`create function public.note_completion() returns trigger language plpgsql as
    $$ begin insert into public.completed values (new.id); return new; end $$`)
  yield* rows(`create trigger note_completion before insert on pgqueue.finished for each row
    when (new.kind = 'paid' and new.status = 'completed') execute function public.note_completion()`)
})

/** Jobs that have not completed as often as they were paid. */
const torn = `select coalesce(p.job, c.job)::text as job, p.count as paid, c.count as completed
  from (select job, count(*)::int from public.paid where kind = 'paid' group by job) p
  full join (select job, count(*)::int from public.completed group by job) c on c.job = p.job
  where p.count is distinct from c.count`

describe("everything at once", () => {
  it.live(
    `for ${seconds} seconds costs no job its place, its end or its result`,
    () =>
      withQueue(Effect.gen(function*() {
        const url = yield* databaseUrl
        const sql = yield* SqlClient.SqlClient
        yield* rows("create table public.paid (job uuid not null, kind text not null)")
        yield* watchCompletions
        const complaints: Array<string> = []
        const end = (yield* now) + seconds * 1000
        const going = Effect.map(now, (at) => at < end)

        /** Does something again and again. It may fail for many reasons, but is never a defect. */
        const again = <E, R>(pause: number, step: Effect.Effect<unknown, E, R>) =>
          Effect.gen(function*() {
            while (yield* going) {
              yield* Effect.catchCause(step, (cause) =>
                Effect.sync(() => {
                  if (Cause.hasDies(cause)) complaints.push(Cause.pretty(cause))
                }))
              yield* Effect.sleep(chance() * pause * 2)
            }
          })

        const ids: Array<string> = []
        const enqueue = Effect.suspend(() => {
          const key = `k${Math.floor(chance() * 20)}`
          const options = any([
            {},
            {},
            { delay: any([50, 2000]) },
            { timeout: 100 },
            { unique: key },
            {
              unique: {
                key,
                onConflict: any(["replace", "debounce", "keep"] as const),
                until: any(["started", "finished"] as const)
              }
            },
            { unique: { key: `period ${key}`, period: 500 } },
            ids.length === 0 ? {} : { id: any(ids) },
            { maxAttempts: 1 },
            { priority: any([0, 9] as const) }
          ])
          return Effect.map(any([Paid, Paid, Plain, Rare]).enqueue(payload(), options), ({ id }) => ids.push(id))
        })
        const payload = () => ({ millis: any([0, 0, 5, 30, 300, 1500]), how: Math.floor(chance() * 10_000) })

        const act = Effect.suspend((): Effect.Effect<unknown, unknown> => {
          if (ids.length === 0) return Effect.void
          const id = any(ids)
          const deed = any<typeof acts[number]>(acts)(id)
          return any([
            deed,
            sql.withTransaction(Effect.andThen(deed, Effect.sleep(chance() * 400))),
            sql.withTransaction(Effect.andThen(deed, Effect.andThen(Effect.sleep(50), Effect.fail("rolled back"))))
          ])
        })
        const services = yield* Effect.context<any>()
        const acts = [
          Admin.cancel,
          Admin.cancel,
          Admin.retry,
          Admin.retry,
          Admin.delete,
          () => Admin.redrive({ limit: 20 }),
          Admin.get
        ].map((deed) => (id: string) =>
          // Sound: what they need is what the test has at hand.
          Effect.provideContext(deed(id) as Effect.Effect<unknown, unknown, any>, services)
        )

        const execute = Effect.gen(function*() {
          const begun = yield* now
          const options = any([{}, {}, { unique: `k${Math.floor(chance() * 20)}` }])
          yield* Effect.exit(any([Paid, Plain, Rare]).execute(payload(), { ...options, wait: longestWait }))
          // The enqueue may take its time when sessions are lost.
          const took = (yield* now) - begun
          if (took > longestWait + 16_000) complaints.push(`somebody waited for ${took} ms`)
        })

        const check = (program: Program) => {
          if (program.output().includes("in no place")) complaints.push(program.output())
        }
        const start = (options: Omit<ChaosProgram, "url">) => startProgram("chaos.ts", { ...options, url })
        const life = (options: Omit<ChaosProgram, "url">) =>
          Effect.scoped(Effect.gen(function*() {
            const program = yield* start(options)
            yield* Effect.sleep(1000 + chance() * (long ? 8000 : 2000))
            const how = any(["SIGKILL", "SIGTERM", "SIGTERM", "freeze"] as const)
            if (how === "freeze") {
              yield* program.kill("SIGSTOP")
              // Less than its lease, or more.
              yield* Effect.sleep(any([500, 3500]))
              yield* program.kill("SIGCONT")
              yield* program.kill("SIGTERM")
            } else yield* program.kill(how)
            const ended = yield* Effect.timeoutOption(program.ended, "9 seconds")
            if (Option.isNone(ended)) complaints.push(`a process did not end:\n${program.output()}`)
            else if (how !== "SIGKILL" && ended.value.code !== 0) {
              complaints.push(`a process ended with ${ended.value.code ?? ended.value.signal}:\n${program.output()}`)
            }
            check(program)
          }))

        const fibers = yield* Effect.forEach([
          again(200, life({ name: "chaos 1", kinds: ["paid", "plain"] })),
          again(200, life({ name: "chaos 2", kinds: ["paid", "plain", "rare"] })),
          again(200, life({ name: "chaos 3", kinds: ["paid"] })),
          ...Array.from({ length: 4 }, () => again(60, enqueue)),
          ...Array.from({ length: 6 }, () => again(30, act)),
          ...Array.from({ length: 10 }, () => again(100, execute)),
          again(
            1500,
            rows(
              `select pg_terminate_backend(pid) from pg_stat_activity
             where datname = current_database() and application_name like 'chaos%' and random() < 0.3`
            )
          )
        ], (effect) => Effect.forkChild(effect))
        // Who waits is among them: nobody waits for ever.
        yield* Effect.forEach(fibers, Fiber.join, { discard: true })

        const last = yield* start({ name: "last", kinds: ["paid", "plain", "rare"] })
        yield* untilAllEnded({ within: 60_000, every: 50 })
        yield* untilValue("select count(*)::int from pgqueue.lease", 0)
        yield* untilValue(
          "select count(*)::int from pg_stat_activity where datname = current_database() and state like 'idle in transaction%'",
          0
        )
        check(last)
        assert.deepStrictEqual(complaints, [])
        yield* allInPlace
        assert.isAbove(yield* value("select count(*)::int from public.completed"), 0)
        yield* assertRows(torn, [])
        yield* assertRows("select id from pgqueue.finished where attempt > max_attempts", [])
      })),
    (seconds + 120) * 1000
  )
})
