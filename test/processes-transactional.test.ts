/** Processes whose transactional handlers are killed at any moment: what they write and the end of their job, or neither. */
import { assert, describe, it } from "@effect/vitest"
import { Effect } from "effect"
import { Pay } from "./programs/payer.ts"
import { long } from "./support/long.ts"
import { startProgram } from "./support/processes.ts"
import { allInPlace, assertRows, databaseUrl, rows, until, untilAllEnded, value, withQueue } from "./support/queue.ts"

const kills = long ? 50 : 5

/** In one snapshot: jobs that have ended and have not paid twice, or have paid and not ended. */
const torn = `select coalesce(f.id, p.job)::text as job, f.status, p.parts from pgqueue.finished f
  full join (select job, count(*)::int as parts from public.paid group by job) p on p.job = f.id
  where f.id is null or p.parts is distinct from 2`

describe("a process with ten transactional handlers at work", () => {
  it.live(`that is killed, ${kills} times, leaves no half of anything`, () =>
    withQueue(Effect.gen(function*() {
      const url = yield* databaseUrl
      yield* rows("create table public.paid (job uuid not null, part int not null)")
      const jobs = 200 + 60 * kills
      yield* Pay.enqueueAll(Array.from({ length: jobs }, (_, n) => ({ millis: n % 12 })))
      for (let kill = 0; kill < kills; kill++) {
        const before = yield* value("select count(*)::int from pgqueue.finished")
        const victim = yield* startProgram("payer.ts", { url })
        yield* until(
          "it works",
          // Each time a little later, and each time ten handlers are somewhere else in their transactions.
          Effect.map(value("select count(*)::int from pgqueue.finished"), (n) => n >= before + 5 + kill % 10),
          { every: 1 }
        )
        yield* victim.kill("SIGKILL")
        yield* victim.ended
        yield* until(
          "the server has noticed",
          Effect.map(
            value(
              "select count(*)::int from pg_stat_activity where state like 'idle in transaction%' and datname = current_database()"
            ),
            (n) => n === 0
          )
        )
        yield* assertRows(torn, [])
      }
      const left = yield* value("select count(*)::int from pgqueue.job")
      assert.isAbove(left, 0)
      yield* startProgram("payer.ts", { url })
      yield* untilAllEnded({ within: 60_000 })
      yield* assertRows(torn, [])
      yield* assertRows("select status, count(*)::int as count from pgqueue.finished group by 1", [
        { status: "completed", count: jobs }
      ])
      yield* allInPlace
    })), 300_000)
})
