/** The options of a run. */
import { join } from "node:path"
import { parseArgs } from "node:util"
import { type Name, names } from "./peer.ts"

export const help = `npm run bench -- [options]

  --peers    ${names.join(",")} (default: all there is)
  --modes    sequential,concurrent,bulk,drain,memory,latency,mixed,startup,idle,backlog,held,payload,many
             (default: all; other names of modes and cases, as in modes.ts, will do, too)
  --rounds   how often each is measured, in turn (default 3)
  --scale    0.01 for a hundredth of the jobs and seconds, to try it out (default 1)
  --out      a folder for results.json, table.md and chart.svg (default test/bench/results)
  --cpu-prof a folder for CPU profiles of what is measured, which is slower then
  --render   only render the results in that folder again`

export const read = (argv: ReadonlyArray<string>) => {
  const { values } = parseArgs({
    args: [...argv],
    options: {
      peers: { type: "string", default: names.join(",") },
      modes: { type: "string", default: "" },
      rounds: { type: "string", default: "3" },
      scale: { type: "string", default: "1" },
      out: { type: "string", default: join(import.meta.dirname, "results") },
      "cpu-prof": { type: "string" },
      render: { type: "boolean", default: false },
      help: { type: "boolean", default: false }
    }
  })
  const list = (text: string) => text.split(",").map((one) => one.trim()).filter((one) => one !== "")
  const peers = list(values.peers)
  const stranger = peers.find((one) => !names.some((name) => name === one))
  if (stranger !== undefined) throw new Error(`there is no queue "${stranger}", only ${names.join(", ")}`)
  const rounds = Number(values.rounds)
  const scale = Number(values.scale)
  if (!(Number.isInteger(rounds) && rounds > 0)) throw new Error("--rounds must be a positive integer")
  if (!(scale > 0 && scale <= 10)) throw new Error("--scale must be greater than 0 and at most 10")
  return { ...values, rounds, scale, peers: peers as ReadonlyArray<Name>, modes: list(values.modes) }
}
