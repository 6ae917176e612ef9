/** The results as Markdown: medians, ratios, targets, and what failed. */
import { cases, type Row } from "./modes.ts"
import { load, type Name, names } from "./peer.ts"
import { type Middle, middle, ratio, type Results } from "./results.ts"
import { targets } from "./targets.ts"

/** A number as people read it. */
export const show = (value: number, unit?: Row["unit"]): string => {
  const digits = Math.abs(value) >= 100 || unit === "MB" ? 0 : Math.abs(value) >= 10 ? 1 : 2
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits, useGrouping: true })
    .replaceAll(",", " ")
}

const range = ({ least, median, most }: Middle, unit?: Row["unit"]) =>
  least === most ? show(median, unit) : `${show(median, unit)} [${show(least, unit)}–${show(most, unit)}]`

const line = (cells: ReadonlyArray<string>) => `| ${cells.join(" | ")} |`

const tableOf = (head: ReadonlyArray<string>, rows: ReadonlyArray<ReadonlyArray<string>>) =>
  [line(head), line(head.map((_, n) => n === 0 ? "---" : "--:")), ...rows.map(line)].join("\n")

const titleOf = (name: string, value: string) => {
  const row = cases.find((one) => one.name === name)?.rows.find((row) => row.value === value)
  return row === undefined ? `${name} ${value}` : `${row.title} (${row.unit})`
}

/** Everything there is to say about a run. */
export const render = async (results: Results): Promise<string> => {
  const measured = new Set(results.measurements.map(({ peer }) => peer))
  const peers = names.filter((name) => measured.has(name))
  const loaded = new Map<Name, Awaited<ReturnType<typeof load>>>()
  for (const name of peers) loaded.set(name, await load(name))
  const others = (["graphile", "bullmq-redis"] as const).filter((name) => measured.has(name))

  const rowsFor = (ones: typeof cases, columns: ReadonlyArray<Name>, compared: ReadonlyArray<Name>) =>
    ones.flatMap(({ name, rows }) =>
      rows.flatMap((row) => {
        const found = columns.map((peer) => middle(results, name, peer, row.value))
        if (found.every((one) => one === undefined)) return []
        const ratios = compared.map((peer) => ratio(results, { case: name, value: row.value }, { case: name, peer }))
        return [[
          `${row.title} (${row.unit}${row.better === "less" ? ", less is better" : ""})`,
          ...found.map((one) => one === undefined ? "–" : range(one, row.unit)),
          ...ratios.map((one) => one === undefined ? "–" : `${range(one)}x`)
        ]]
      })
    )

  const shared = rowsFor(cases.filter((one) => one.peers.length > 1), peers, others)
  const own = rowsFor(cases.filter((one) => one.peers.length === 1), ["ours"], [])
  const wanted = targets.flatMap((target) => {
    const { atLeast, atMost, over } = target
    const found = over === undefined
      ? middle(results, target.case, "ours", target.value)
      : ratio(results, target, { case: over.case ?? target.case, peer: over.peer })
    if (found === undefined) return []
    const met = found.median >= (atLeast ?? -Infinity) && found.median <= (atMost ?? Infinity)
    const x = over === undefined ? "" : "x"
    return [[
      titleOf(target.case, target.value),
      over === undefined
        ? ""
        : over.peer === "ours"
        ? titleOf(over.case!, target.value)
        : [loaded.get(over.peer)!.title, over.case === undefined ? "" : `, ${titleOf(over.case, target.value)}`].join(
          ""
        ),
      `${atLeast === undefined ? "≤" : "≥"} ${atLeast ?? atMost}${x}`,
      `${range(found)}${x}`,
      met ? "yes" : "**no**"
    ]]
  })
  const failed = results.measurements.filter(({ failed }) => failed !== undefined)
  const loads = results.measurements.map(({ load }) => load)
  const facts = Object.entries({ ...results.machine, ...results.software, ...results.options })
    .filter(([name]) => name !== "rounds")
    .map(([name, value]) => `${name} ${value}`)

  return [
    `Medians [least–most] of ${results.options["rounds"]} rounds. ${facts.join(", ")}.`,
    `Load average before a measurement: ${show(Math.min(...loads))} to ${show(Math.max(...loads))}.`,
    "",
    ...(shared.length === 0 ? [] : [
      tableOf(
        ["", ...peers.map((name) => loaded.get(name)!.title), ...others.map((name) => `÷ ${loaded.get(name)!.title}`)],
        shared
      ),
      ""
    ]),
    ...(own.length === 0 ? [] : [tableOf(["ours only", loaded.get("ours")!.title], own), ""]),
    ...(wanted.length === 0 ? [] : [tableOf(["target", "over", "wanted", "found", "met"], wanted), ""]),
    ...peers.map((name) => {
      const { note, profiles, title } = loaded.get(name)!
      return `- ${title}${note === undefined ? "" : ` (${note})`}: ${JSON.stringify(profiles)}`
    }),
    "",
    ...failed.map((one) => `- FAILED ${one.case}, ${one.peer}, round ${one.round}: ${one.failed}`),
    ""
  ].join("\n")
}
