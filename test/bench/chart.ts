/** The results as one picture: a panel per number, a bar per queue. */
import { cases } from "./modes.ts"
import { load, names } from "./peer.ts"
import { middle, type Results } from "./results.ts"
import { show } from "./table.ts"

/** The numbers that are drawn, as far as they were measured. */
const drawn = [
  ["drain-best", "perSecond"],
  ["mixed-closed", "perSecond"],
  ["concurrent", "perSecond"],
  ["bulk", "perSecond"],
  ["latency", "p50"],
  ["drain-best", "memory"]
] as const

const width = 880
const columns = 2
const bar = 18
const label = 150
const figure = 64
const gap = 24

const escape = (text: string) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;")

/** Draws it as SVG that reads on white and on black. */
export const render = async (results: Results): Promise<string> => {
  const panels: Array<{ readonly title: string; readonly bars: ReadonlyArray<readonly [string, number, boolean]> }> = []
  for (const [name, value] of drawn) {
    const row = cases.find((one) => one.name === name)!.rows.find((row) => row.value === value)!
    const bars: Array<readonly [string, number, boolean]> = []
    for (const peer of names) {
      const found = middle(results, name, peer, value)
      if (found !== undefined) bars.push([(await load(peer)).title, found.median, peer === "ours"])
    }
    if (bars.length > 0) {
      panels.push({ title: `${row.title}, ${row.unit}${row.better === "less" ? " (less is better)" : ""}`, bars })
    }
  }
  const panelWidth = (width - gap * (columns - 1)) / columns
  const panelHeight = 30 + Math.max(1, ...panels.map(({ bars }) => bars.length)) * (bar + 4) + gap
  const height = Math.ceil(panels.length / columns) * panelHeight
  const parts = panels.flatMap(({ bars, title }, n) => {
    const x = (n % columns) * (panelWidth + gap)
    const y = Math.floor(n / columns) * panelHeight
    const most = Math.max(...bars.map(([, value]) => value))
    return [
      `<text x="${x}" y="${y + 16}" class="title">${escape(title)}</text>`,
      ...bars.flatMap(([name, value, own], m) => {
        const top = y + 28 + m * (bar + 4)
        const length = Math.max(1, (panelWidth - label - figure) * value / most)
        return [
          `<text x="${x + label - 8}" y="${top + 13}" class="name">${escape(name)}</text>`,
          `<rect x="${x + label}" y="${top}" width="${length.toFixed(1)}" height="${bar}" class="${
            own ? "own" : "other"
          }"/>`,
          `<text x="${(x + label + length + 6).toFixed(1)}" y="${top + 13}">${show(value)}</text>`
        ]
      })
    ]
  })
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" width="${width}" height="${height}">`,
    "<style>text { font: 12px system-ui, sans-serif; fill: #777 } .title { font-weight: 600 } .name { text-anchor: end }",
    ".own { fill: #2f81f7 } .other { fill: #9aa4b0 }</style>",
    ...parts,
    "</svg>",
    ""
  ].join("\n")
}
