/** Every limit holds for SQL, too, and what a package brings is what is meant (S12, S15). */
import { assert, describe, it } from "@effect/vitest"
import { Effect, Exit, Layer, Option, Schema } from "effect"
import { execFileSync } from "node:child_process"
import { existsSync, readFileSync } from "node:fs"
import { join } from "node:path"
import * as Database from "../src/Database.ts"
import { Admin, CronScheduler, Job, Worker } from "../src/index.ts"
import { rows, running, untilAllEnded, value, withQueue } from "./support/queue.ts"

const root = join(import.meta.dirname, "..")
const json = (bytes: number) => `to_json(repeat('x', ${bytes - 2}))`

describe("a limit holds", () => {
  it.live("for jobs that SQL enqueues", () =>
    withQueue(Effect.gen(function*() {
      const at: ReadonlyArray<readonly [what: string, most: string, over: string]> = [
        ["kind", "repeat('k', 200)", "repeat('k', 201)"],
        ["kind", "'k'", "''"],
        ["queue", "repeat('q', 128)", "repeat('q', 129)"],
        ["queue", "'q'", "''"],
        ["priority", "9", "10"],
        ["priority", "0", "-1"],
        ["max_attempts", "1000", "1001"],
        ["max_attempts", "1", "0"],
        ["timeout", "'1 millisecond'", "'0'"],
        ["payload", json(1_048_576), json(1_048_577)],
        ["metadata", json(65_536), json(65_537)]
      ]
      for (const [what, most, over] of at) {
        const enqueue = (with_: string) =>
          rows(`select pgqueue.enqueue(${what === "kind" ? "" : "'k', "}${what} => ${with_})`)
        yield* enqueue(most)
        assert.strictEqual(Database.sqlState(yield* Effect.flip(enqueue(over))), "23514", `${what} => ${over}`)
      }
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.job"), at.length)
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.ready"), at.length)
      for (const set of [`progress = ${json(65_537)}`, "attempt = null", "run_at = 'infinity'"]) {
        const error = yield* Effect.flip(rows(`update pgqueue.job set ${set}`))
        assert.include(["23514", "23502"], Database.sqlState(error), set)
      }
    })))

  it.live("for what is written of runs, whoever writes it", () =>
    withQueue(Effect.gen(function*() {
      const text = (bytes: number) => `repeat('x', ${bytes})`
      yield* rows("select pgqueue.enqueue('k')")
      yield* rows(
        `insert into pgqueue.finished (id, kind, queue, priority, status, attempt, max_attempts, rescued, snoozed, metadata,
           enqueued_at, scheduled_for, payload)
         values (gen_random_uuid(), 'k', 'q', 1, 'completed', 1, 1, 0, 0, '{}', now(), now(), 'null')`
      )
      yield* rows("insert into pgqueue.attempt (job, n, tag) values (gen_random_uuid(), 1, 'Failed')")
      yield* rows(
        `insert into pgqueue.worker (id, name, queues, kinds, prefixes, lease_ms) values (gen_random_uuid(), 'w', '{}', '{}', '{}', 1)`
      )
      yield* rows("insert into pgqueue.queue (name) values ('q')")
      for (
        const [table, column, most, over] of [
          ["job", "progress", json(65_536), json(65_537)],
          ["job", "cancel_reason", text(8192), text(8193)],
          ["job", "trace", text(200), text(201)],
          ["finished", "result", json(1_048_576), json(1_048_577)],
          ["finished", "error", json(131_072), json(131_073)],
          ["finished", "reason", text(8192), text(8193)],
          ["finished", "progress", json(65_536), json(65_537)],
          ["attempt", "error", json(65_536), json(65_537)],
          ["attempt", "message", text(8192), text(8193)],
          ["attempt", "tag", text(200), text(201)],
          ["worker", "name", text(200), text(201)],
          ["queue", "name", text(128), text(129)]
        ] as const
      ) {
        const set = (value: string) => rows(`update pgqueue.${table} set ${column} = ${value}`)
        yield* set(most)
        assert.strictEqual(Database.sqlState(yield* Effect.flip(set(over))), "23514", `${table}.${column}`)
      }
    })))

  it.live("for schedules that SQL writes, and for those that are declared", () =>
    withQueue(Effect.gen(function*() {
      class Plain extends Job.make("plain") {}
      const insert = (columns: string, values: string) =>
        rows(`insert into pgqueue.schedule (spec${columns}) values ('@daily'${values})`)
      for (
        const [columns, values] of [
          [", kind, name", ", 'k', ''"],
          [", kind, name", ", 'k', repeat('n', 201)"],
          [", name, kind", ", 'n', repeat('k', 201)"],
          [", name, kind, queue", ", 'n', 'k', repeat('q', 129)"],
          [", name, kind, max_attempts", ", 'n', 'k', 1001"],
          [", name, kind, priority", ", 'n', 'k', 10"],
          [", name, kind, missed", ", 'n', 'k', 1001"],
          [", name, kind, payload", `, 'n', 'k', ${json(1_048_577)}`],
          [", name, kind, metadata", `, 'n', 'k', ${json(65_537)}`]
        ] as const
      ) {
        assert.strictEqual(Database.sqlState(yield* Effect.flip(insert(columns, values))), "23514", values)
      }
      for (const every of ["999 millis", "0 seconds", "-1 seconds"] as const) {
        const entry = CronScheduler.make("n", { every, job: Plain })
        assert.strictEqual((yield* Effect.flip(CronScheduler.schedule(entry)))._tag, "EnqueueError")
      }
    })))

  it.live("for what a handler says: a result, an error, its text and progress", () =>
    withQueue(Effect.gen(function*() {
      class Big extends Job.make("big", {
        payload: { what: Schema.String },
        success: Schema.String,
        error: Schema.String,
        maxAttempts: 1
      }) {}
      const big = "x".repeat(2_000_000)
      const ids: Record<string, string> = {}
      for (const what of ["result", "error", "defect", "progress", "reason"]) {
        ids[what] = (yield* Big.enqueue({ what })).id
      }
      yield* running(
        Worker.layer({ jobs: [Big] }).pipe(
          Layer.provide(Big.toLayer(({ what }) => {
            switch (what) {
              case "result":
                return Effect.succeed(big)
              case "error":
                return Effect.fail(big)
              case "defect":
                return Effect.die(new Error(big))
              case "reason":
                return Job.discard(big)
              default:
                return Effect.as(Job.progress(big), "progress is too large, and that is its handler's fault")
            }
          }))
        )
      )
      yield* untilAllEnded()
      const size = (column: string) =>
        value(`select coalesce(max(octet_length(${column}::text)), 0)::int from pgqueue.finished`)
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.finished where status = 'discarded'"), 5)
      assert.strictEqual(yield* size("result"), 0)
      assert.strictEqual(yield* size("progress"), 0)
      assert.isAtMost(yield* size("reason"), 8192)
      assert.isAtMost(yield* size("error"), 65_536 + 2 * 8192)
      assert.match((yield* Admin.attempts(ids["result"]!))[0]!.message, /over 1048576 bytes/)
      assert.match((yield* Admin.attempts(ids["progress"]!))[0]!.message, /over 65536 bytes/)
      const exit = Option.getOrThrow(yield* Big.poll(ids["error"]!))
      assert.isTrue(Exit.isFailure(exit))
    })))
})

describe("the package", () => {
  // Sound: the manifest of this package.
  const manifest = JSON.parse(readFileSync(join(root, "package.json"), "utf8")) as {
    readonly dependencies?: object
    readonly optionalDependencies?: object
    readonly bundledDependencies?: object
    readonly peerDependencies: object
    readonly scripts: Record<string, string>
    readonly publishConfig: object
  }

  it("brings no code of others and runs none when it is installed", () => {
    for (const field of ["dependencies", "optionalDependencies", "bundledDependencies", "bundleDependencies"]) {
      assert.notProperty(manifest, field)
    }
    assert.sameMembers(Object.keys(manifest.peerDependencies), ["effect", "@effect/sql-pg", "@effect/platform-node"])
    for (const script of ["preinstall", "install", "postinstall", "prepare", "prepublish", "dependencies"]) {
      assert.notProperty(manifest.scripts, script)
    }
    assert.propertyVal(manifest.publishConfig, "provenance", true)
    assert.isTrue(existsSync(join(root, "package-lock.json")))
  })

  it("holds the sources, what is compiled of them, the README and the license, and nothing else", () => {
    const [packed] = JSON.parse(
      execFileSync("npm", ["pack", "--dry-run", "--json", "--ignore-scripts"], {
        cwd: root,
        encoding: "utf8",
        stdio: "pipe"
      })
      // Sound: what npm writes.
    ) as [{ readonly files: ReadonlyArray<{ readonly path: string }>; readonly bundled: ReadonlyArray<string> }]
    const paths = packed.files.map(({ path }) => path)
    assert.includeMembers(paths, ["package.json", "README.md", "LICENSE", "src/index.ts", "docs/roles.sql"])
    const strange = paths.filter((path) =>
      !/^(package\.json|README\.md|LICENSE|docs\/roles\.sql|src\/\w+\.ts|dist\/\w+(\.js|\.d\.ts)(\.map)?)$/.test(path)
    )
    assert.deepStrictEqual(strange, [])
    assert.deepStrictEqual(packed.bundled, [])
  })
})
