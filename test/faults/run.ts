/**
 * Runs the scenarios of faults and writes what they measured into docs/faults.md.
 *
 * ```sh
 * npm run faults                      # everything once
 * npm run faults -- D4 "C6"           # some, by name
 * npm run faults -- --repeat 5        # everything five times
 * npm run faults -- D4 --write        # one again, in the place of what it measured before
 * npm run faults -- --from a.json     # everything once, and what runs before it have said
 * ```
 *
 * Five repetitions take hours: each run keeps its results in a file whose name it says, and `--repeat 0 --from a.json --from
 * b.json` is the page of some that were run at different times, of everything or of single scenarios that were repeated.
 */
import { spawnSync } from "node:child_process"
import { mkdtempSync, readFileSync, statSync, writeFileSync } from "node:fs"
import { cpus, tmpdir } from "node:os"
import { join } from "node:path"
import { parseArgs } from "node:util"

interface Result {
  readonly name: string
  readonly state: "passed" | "failed" | "skipped" | "pending"
  readonly seconds: number
  readonly figures: Readonly<Record<string, string | number>>
}

const { positionals: ids, values } = parseArgs({
  allowPositionals: true,
  options: {
    repeat: { type: "string", default: "1" },
    write: { type: "boolean", default: false },
    from: { type: "string", multiple: true, default: [] }
  }
})
const home = join(import.meta.dirname, "..", "..")
// Sound: what the configuration of these tests writes.
const resultsOf = (file: string) => JSON.parse(readFileSync(file, "utf8")) as ReadonlyArray<Result>
const files = [...values.from]

for (let round = 1; round <= Number(values.repeat); round++) {
  const out = join(mkdtempSync(join(tmpdir(), "faults-")), "results.json")
  const named = ids.length === 0 ? [] : ["-t", ids.map((id) => `(^| )${id}[: ]`).join("|")]
  const { status } = spawnSync(
    process.execPath,
    [
      join(home, "node_modules", "vitest", "vitest.mjs"),
      "run",
      "--config",
      join(import.meta.dirname, "vitest.config.ts"),
      ...named
    ],
    { cwd: home, stdio: "inherit", env: { ...process.env, FAULTS: "full", FAULTS_RESULTS: out } }
  )
  if (status !== 0) process.exitCode = 1
  process.stdout.write(`\nresults: ${out}\n`)
  files.push(out)
}
// Some were not asked for; of all, those that were skipped cannot be played on this machine.
const results = files.map(resultsOf).map((all) =>
  ids.length === 0 ? all : all.filter(({ state }) => state !== "skipped")
)

const written = (value: string | number): string =>
  typeof value === "string" ? value : value >= 100 ? String(Math.round(value)) : String(Math.round(value * 10) / 10)

/** The figures of all rounds: the worst, which is the largest, of each that is a number. */
const figuresOf = (rounds: ReadonlyArray<Result>): string => {
  const worst = new Map<string, string | number>()
  for (const { figures } of rounds) {
    for (const [name, value] of Object.entries(figures)) {
      const known = worst.get(name)
      worst.set(name, typeof value === "number" && typeof known === "number" ? Math.max(value, known) : value)
    }
  }
  return [...worst].map(([name, value]) => `${name} ${written(value)}`).join(", ")
}

const names = [...new Set(results.flat().map(({ name }) => name))].toSorted((a, b) =>
  a.localeCompare(b, "en", { numeric: true })
)
const playedOf = (name: string) => results.flat().filter((result) => result.name === name && result.state !== "skipped")
const rows = names.map((name) => {
  const [id, what] = name.split(": ")
  const played = playedOf(name)
  const passed = played.filter(({ state }) => state === "passed").length
  return `| ${id} | ${what} | ${played.length === 0 ? "not here" : `${passed} of ${played.length}`} | ${
    figuresOf(played)
  } |`
})
const day = new Date(Math.max(...files.map((file) => statSync(file).mtimeMs))).toISOString().slice(0, 10)
// Some may have been repeated more often.
const times = [...new Set(names.map((name) => playedOf(name).length))].filter((times) => times > 0).toSorted((a, b) =>
  a - b
)
const [least, most] = [times[0] ?? 0, times.at(-1) ?? 0]
const often = most === 1 ? "once" : `${least === most ? "" : `${least} to `}${most} times`
const minutes = results.map((round) => Math.round(round.reduce((sum, { seconds }) => sum + seconds, 0) / 60))
const report = [
  `The last run: ${day}, ${often}, ${
    Math.max(...minutes)
  } minutes for all of it, on ${cpus().length} cores. What is a time is in milliseconds, and the largest of all runs, as other numbers are; what has a unit is that of the last one.`,
  "",
  "| | what happens | passed | measured |",
  "| - | - | - | - |",
  ...rows
].join("\n")
process.stdout.write(`\n${report}\n`)

// Some scenarios are no report: at most they have a place in the last one.
if (ids.length === 0 || values.write) {
  const page = join(home, "docs", "faults.md")
  const text = readFileSync(page, "utf8")
  const keyOf = (row: string) => row.split("|").slice(1, 3).map((cell) => cell.trim()).join(" ")
  const replaced = new Map(rows.map((row) => [keyOf(row), row.replace(/( of \d+) \|/, `$1, ${day} |`)]))
  writeFileSync(
    page,
    ids.length > 0
      ? text.replaceAll(/^\|.*\|$/gm, (row) => replaced.get(keyOf(row)) ?? row)
      : text.replace(
        /(<!-- results -->\n)[\s\S]*(\n<!-- \/results -->)/,
        (_, before, after) => `${before}\n${report}\n${after}`
      )
  )
}
