import { defineConfig } from "vitest/config"

/** Scenarios of faults measure how soon everything goes on, so nothing else runs meanwhile. */
const faults = ["test/faults/*.test.ts"]

export default defineConfig({
  test: {
    globalSetup: "test/support/postgres.ts",
    maxWorkers: 2,
    testTimeout: 60_000,
    hookTimeout: 60_000,
    projects: [
      {
        extends: true,
        test: {
          name: "tests",
          include: ["test/**/*.test.ts"],
          exclude: ["test/bench/**", "**/node_modules/**", ...faults],
          sequence: { groupOrder: 0 }
        }
      },
      {
        extends: true,
        test: {
          name: "faults",
          include: faults,
          // It has no short form.
          exclude: ["test/faults/soak.test.ts"],
          maxWorkers: 1,
          sequence: { groupOrder: 1 }
        }
      }
    ]
  }
})
