/** The examples in docstrings compile, and what users call has one. */
import { execFileSync } from "node:child_process"
import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs"
import { join } from "node:path"
import { afterAll, assert, describe, it } from "vitest"

const root = join(import.meta.dirname, "..")
const sources = readdirSync(join(root, "src")).map((file) => ({
  file,
  text: readFileSync(join(root, "src", file), "utf8")
}))

/** The docstrings of a source, each with the name of what it describes. */
const docstrings = (text: string) =>
  [...text.matchAll(/\/\*\*((?:(?!\*\/)[\s\S])*)\*\/\s*(?:export |static |readonly |const |class )*(\w+)/g)].map(
    ([, comment, name]) => ({ name, comment: comment!.replace(/^ *\* ?/gm, "") })
  )

const examples = sources.flatMap(({ file, text }) =>
  docstrings(text).flatMap(({ comment, name }) =>
    [...comment.matchAll(/```ts\n([\s\S]*?)```/g)].map(([, code]) => ({
      title: `${file.replace(".ts", "")}_${name}`,
      code: code!.replace("from \"effect-pgqueue\"", "from \"../../src/index.ts\"")
    }))
  )
)

describe("docstrings", () => {
  // Inside the checkout, so that packages are found from there, and out of sight of git and of the other tools.
  const folder = join(root, "node_modules/.docstrings")
  afterAll(() => rmSync(folder, { recursive: true, force: true }))

  it("have examples where users call something", () => {
    const found = examples.map(({ title }) => title)
    const wanted = [
      "Job_make",
      "Job_family",
      "Current_cancel",
      "Current_snooze",
      "JobQueue_layer",
      "JobQueue_layerConfig"
    ]
    assert.includeMembers(found, [...wanted, "Worker_layer", "Worker_runUntilEmpty", "Worker_middleware"])
  })

  it("have examples that compile", () => {
    mkdirSync(folder, { recursive: true })
    for (const { code, title } of examples) writeFileSync(join(folder, `${title}.ts`), `${code}\nexport {}\n`)
    writeFileSync(
      join(folder, "tsconfig.json"),
      JSON.stringify({
        extends: "../../tsconfig.json",
        include: ["*.ts"],
        exclude: [],
        compilerOptions: { noUnusedLocals: false }
      })
    )
    try {
      execFileSync(process.execPath, [join(root, "node_modules/typescript/bin/tsc"), "--noEmit", "-p", folder], {
        encoding: "utf8"
      })
    } catch (error) {
      assert.fail((error as { readonly stdout: string }).stdout)
    }
  })
})
