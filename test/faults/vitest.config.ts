import { writeFileSync } from "node:fs"
import { join } from "node:path"
import { defineConfig } from "vitest/config"
import type { Reporter, TestCase, TestModule } from "vitest/node"

/** Says how each scenario has ended when it has, and writes what all have measured where `FAULTS_RESULTS` says. */
const figures: Reporter = {
  onTestCaseResult: (test: TestCase) => {
    const { state } = test.result()
    if (state === "skipped") return
    const seconds = (test.diagnostic()?.duration ?? 0) / 1000
    const said = test.result().errors?.map(({ message }) => message).join("\n") || JSON.stringify(test.meta().figures)
    process.stdout.write(`${state}: ${test.name} (${seconds.toFixed(0)} s) ${said}\n`)
  },
  onTestRunEnd: (modules: ReadonlyArray<TestModule>) => {
    const results = modules.flatMap((module) =>
      [...module.children.allTests()].map((test) => ({
        name: test.name,
        state: test.result().state,
        seconds: Math.round((test.diagnostic()?.duration ?? 0) / 1000),
        figures: test.meta().figures ?? {}
      }))
    )
    const out = process.env["FAULTS_RESULTS"]
    if (out !== undefined) writeFileSync(out, JSON.stringify(results))
  }
}

/** All scenarios, one after the other: each has the machine for itself. */
export default defineConfig({
  test: {
    include: [join(import.meta.dirname, "*.test.ts")],
    // Half an hour of its own.
    exclude: process.env["FAULTS"] === "soak" ? [] : [join(import.meta.dirname, "soak.test.ts")],
    globalSetup: join(import.meta.dirname, "..", "support", "postgres.ts"),
    fileParallelism: false,
    reporters: ["default", figures],
    hookTimeout: 60_000
  }
})
