/** A fleet under load whose processes are killed again and again: nothing is lost, nothing ends twice. */
import { assert, describe, it } from "@effect/vitest"
import { Effect, Fiber } from "effect"
import { Step } from "./programs/jobs.ts"
import { long } from "./support/long.ts"
import { keepWorker } from "./support/processes.ts"
import {
  allInPlace,
  assertRows,
  burnt,
  databaseUrl,
  endedTwice,
  now,
  rows,
  startedForNothing,
  until,
  untilAllEnded,
  untilValue,
  value,
  watchEnds,
  withQueue
} from "./support/queue.ts"

const lease = 2000
const timing = { heartbeat: 300, lease, rescueInterval: 500 }

describe("a fleet of four worker processes", () => {
  const kills = long ? 30 : 3

  it.live(
    `loses no job and ends none twice while one of them is killed, ${kills} times`,
    () =>
      withQueue(Effect.gen(function*() {
        const url = yield* databaseUrl
        yield* watchEnds
        const begun = yield* now
        const names = [0, 1, 2, 3].map((n) => `worker ${n}`)
        const fleet = yield* Effect.forEach(names, (name) => keepWorker({ url, name, concurrency: 10, ...timing }))
        let enqueued = 0
        let producing = true
        const producer = yield* Effect.forkChild(Effect.gen(function*() {
          while (producing) {
            if ((yield* value("select count(*)::int from pgqueue.ready")) < 200) {
              yield* Step.enqueueAll(Array.from({ length: 200 }, (_, n) => ({ millis: 5 + n % 46 })))
              enqueued += 200
            }
            yield* Effect.sleep(50)
          }
        }))
        yield* until("all work", Effect.map(value("select count(distinct boot)::int from ledger"), (n) => n === 4))

        // A machine that is slow to start processes has as much more time for everything else.
        const within = lease + 500 * 1.2 + 5000 + (yield* now) - begun
        for (let kill = 0; kill < kills; kill++) {
          const [name, kept] = [names[kill % 4]!, fleet[kill % 4]!]
          // The newest of this name: earlier ones may not have been declared dead yet.
          const id = yield* value<string>(
            "select id::text from pgqueue.worker where name = $1 order by started_at desc limit 1",
            [name]
          )
          const held = `select coalesce(sum(cardinality(ids)), 0)::int from pgqueue.lease where worker = $1::uuid`
          yield* until(`${name} has work`, Effect.map(value(held, [id]), (n) => n > 5))
          const victim = kept.current()
          const killed = yield* now
          yield* victim.kill("SIGKILL")
          yield* victim.ended
          const orphans = (yield* rows<{ id: string }>(
            "select u.id::text from pgqueue.lease l cross join unnest(l.ids) as u(id) where l.worker = $1::uuid",
            [id]
          )).map(({ id }) => id)
          assert.isAbove(orphans.length, 0)
          const died = yield* value<string>("select clock_timestamp()::text")
          yield* until(
            "every orphan has been started again",
            Effect.map(
              value(
                `select count(*)::int from unnest($1::uuid[]) as o(id)
               where not exists (select 1 from pgqueue.finished f where f.id = o.id)
                 and not exists (select 1 from ledger l where l.job = o.id and phase = 'start' and at > $2::timestamptz)`,
                [orphans, died]
              ),
              (n) => n === 0
            ),
            { within }
          )
          // What its last statements had not settled was held until its lease was over.
          assert.isAbove((yield* now) - killed, lease - 300 - 500)
          yield* untilValue("select count(*)::int from pgqueue.job where id = any ($1::uuid[])", 0, {
            params: [orphans]
          })
          assert.deepStrictEqual(kept.ends().map(({ signal }) => signal), kept.ends().map(() => "SIGKILL" as const))
        }
        // Not interrupted: what it is just enqueueing counts.
        producing = false
        yield* Fiber.join(producer)
        yield* untilAllEnded()

        yield* assertRows("select status, count(*)::int as count from pgqueue.finished group by 1", [
          { status: "completed", count: enqueued }
        ])
        assert.deepStrictEqual(yield* endedTwice, [])
        assert.deepStrictEqual(yield* startedForNothing, [])
        assert.deepStrictEqual(yield* burnt, [])
        assert.isAbove(yield* value("select count(*)::int from pgqueue.finished where rescued > 0"), 0)
        yield* allInPlace
      })),
    kills * 10_000 + 60_000
  )
})
