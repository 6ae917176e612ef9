/** What happens to PostgreSQL itself: sessions that end, servers that restart, crash, hang, fill up or refuse. */
import { assert } from "@effect/vitest"
import { Effect } from "effect"
import { full, scenarios } from "./scenario.ts"

scenarios("the server", (scenario) => {
  scenario("D1", "every session is terminated every 2 s", { short: true }, (stage) =>
    Effect.gen(function*() {
      const cast = yield* stage.fleet()
      for (let round = 0; round < (full ? 15 : 2); round++) {
        yield* stage.during(
          `terminate ${round}`,
          stage.rows(
            `select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database()
             and application_name like any (array['worker%', 'producer%', 'scheduler%'])`
          )
        )
        yield* Effect.sleep(2000)
      }
      yield* Effect.sleep(2000)
      for (const actor of cast.workers) assert.isTrue(actor.running(), actor.output())
      const recovered = yield* stage.recoveries()
      const counts = yield* stage.finish()
      assert.isBelow(recovered.at(-1)!, 2000, recovered.join(" "))
      return { ...counts, recovered: Math.max(...recovered) }
    }))
})
