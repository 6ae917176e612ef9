/**
 * Every example and the demo run as the processes they are, and the README shows nothing else than what they run.
 *
 * A TypeScript block of the README comes from a region of an example, named in a comment before it:
 *
 *     <!-- example: examples/10-hello.ts#hello -->
 *
 * A region goes from `// #region name` to `// #endregion`; regions of one name in a file are joined. Examples import
 * the sources, so that they run without a build; the README says the name of the package instead.
 */
import { NodeServices } from "@effect/platform-node"
import { assert, describe, it } from "@effect/vitest"
import { Effect, Stream } from "effect"
import { ChildProcess } from "effect/process"
import { existsSync, readdirSync, readFileSync } from "node:fs"
import { join } from "node:path"
import { makeDatabase } from "./support/database.ts"

const root = join(import.meta.dirname, "..")
const read = (file: string) => readFileSync(join(root, file), "utf8")

// ---------------------------------------------------------------------------
// Examples
// ---------------------------------------------------------------------------

/** What each example says when all is well; it checks the rest of its claims itself. */
const examples: Readonly<Record<string, ReadonlyArray<string>>> = {
  "10-hello.ts": ["inserted ", "Hello, world! (attempt 1 of 5)", "1 completed, 0 failed"],
  "20-transactional-enqueue.ts": ["its job was rolled back with it", "welcome, ada"],
  "25-transactional-handlers.ts": ["1 completed, 1 failed: ada 40, bob 60"],
  "30-retries-and-timeouts.ts": ["flaky: attempt 3, after TimedOut", "empty was discarded after its first"],
  "35-unique-keys-and-sql.ts": ["first inserted, second existing, third replaced", "digest: 2 messages, 1 mention"],
  "40-graceful-shutdown.ts": ["short: done", "long: interrupted", "long: attempt 1 at another worker"],
  "50-cron.ts": ["two pulses, ", "nightly-report: 20", "3 reports made up"],
  "60-families-and-middleware.ts": ["report:stock of day 2", "job report:stock completed in"],
  "70-results-and-progress.ts": ["21 degrees in Rome", "there is no Atlantis", "Oslo was cancelled"],
  "80-operations.ts": ["deliver is discarded after 1 of 1 attempts", "1 redriven, 2 completed"],
  "90-two-queues.ts": ["charged 990, sent to ada"]
}

/** Runs a program on a database of its own. */
const run = Effect.fn(
  function*(file: string, env: Readonly<Record<string, string>> = {}) {
    const { url } = yield* makeDatabase()
    const program = yield* ChildProcess.make(process.execPath, [join(root, file)], {
      env: { ...env, DATABASE_URL: url },
      extendEnv: true
    })
    const [output, code] = yield* Effect.all([Stream.mkString(Stream.decodeText(program.all)), program.exitCode], {
      concurrency: 2
    })
    return { output, code }
  },
  Effect.timeout("50 seconds"),
  Effect.scoped,
  Effect.provide(NodeServices.layer)
)

describe("examples", () => {
  it("are all listed here", () => {
    const files = readdirSync(join(root, "examples")).filter((file) => file.endsWith(".ts"))
    assert.sameMembers(files, Object.keys(examples))
  })

  for (const [file, lines] of Object.entries(examples)) {
    it.live(file, () =>
      Effect.gen(function*() {
        const { code, output } = yield* run(`examples/${file}`)
        for (const line of lines) assert.include(output, line)
        assert.strictEqual(code, 0, output)
      }))
  }

  it.live("the demo, a fifth of it", () =>
    Effect.gen(function*() {
      const { code, output } = yield* run("examples/demo/main.ts", { DEMO_SCALE: "0.2" })
      assert.notInclude(output, "✗")
      assert.match(output, /^✓ told to stop, both processes ended with code 0 +2$/m)
      assert.match(output, /^throughput +[\d ]+ jobs\/s/m)
      assert.strictEqual(code, 0, output)
    }))
})

// ---------------------------------------------------------------------------
// README
// ---------------------------------------------------------------------------

interface Block {
  readonly line: number
  /** The file and region it comes from, when the README says so. */
  readonly source: string | undefined
  readonly text: string
}

const blocksOf = (markdown: string): ReadonlyArray<Block> =>
  [...markdown.matchAll(/(?:<!-- example: (\S+) -->\n+)?```ts\n(.*?)```/gs)].map((
    { 0: all, 1: source, 2: text, index }
  ) => ({
    line: markdown.slice(0, index + all.indexOf("```ts")).split("\n").length,
    source,
    text: text!
  }))

const regionOf = (text: string, name: string): string | undefined => {
  const parts = [...text.matchAll(/^( *)\/\/ #region (\S+)\n(.*?)^ *\/\/ #endregion$/gms)].filter((part) =>
    part[2] === name
  )
  if (parts.length === 0) return undefined
  // A region that begins inside a function is shown without the function's indentation.
  const indentation = parts[0]![1]!
  return parts.map((part) => part[3]!.replaceAll(new RegExp(`^${indentation}`, "gm"), "")).join("")
}

const shown = (code: string) => code.replaceAll(/"(\.\.\/)+src\/index\.ts"/g, "\"effect-pgqueue\"")

/** What is wrong with the TypeScript blocks of a README. */
const problemsOf = (markdown: string, read: (file: string) => string): ReadonlyArray<string> =>
  blocksOf(markdown).flatMap(({ line, source, text }) => {
    if (source === undefined) return [`line ${line}: no example is named for this block`]
    const [file, name] = source.split("#")
    const region = regionOf(read(file!), name!)
    if (region === undefined) return [`line ${line}: there is no region ${source}`]
    return shown(region) === text ? [] : [`line ${line}: differs from ${source}`]
  })

describe("the README", () => {
  it("shows code only as it runs in an example", () => {
    const readme = read("README.md")
    assert.isNotEmpty(blocksOf(readme))
    assert.deepStrictEqual([...problemsOf(readme, read)], [])
  })

  it("names files that exist", () => {
    const names = [...read("README.md").matchAll(/\b(?:test|examples|docs)\/[\w./-]*\w/g)].map(([name]) => name)
    const missing = [...new Set(names)].filter((name) => !existsSync(join(root, name)))
    assert.deepStrictEqual(missing, [])
  })

  it("is noticed when it shows something else", () => {
    const example =
      "// #region a\nimport { Job } from \"../src/index.ts\"\n// #endregion\n  // #region b\n  b()\n  // #endregion\n"
    const problems = (markdown: string) => problemsOf(markdown, () => example).length
    const block = (marker: string, code: string) => `${marker}\n\`\`\`ts\n${code}\n\`\`\`\n`
    assert.strictEqual(problems(block("<!-- example: x.ts#a -->\n", "import { Job } from \"effect-pgqueue\"")), 0)
    assert.strictEqual(problems(block("<!-- example: x.ts#b -->", "b()")), 0)
    assert.strictEqual(problems(block("<!-- example: x.ts#b -->", "c()")), 1)
    assert.strictEqual(problems(block("<!-- example: x.ts#c -->", "c()")), 1)
    assert.strictEqual(problems(block("", "b()")), 1)
  })
})
