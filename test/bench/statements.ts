/** How long statements took, read from the server's log: what a queue asks for needs no hook in the queue. */
import { createReadStream, statSync } from "node:fs"
import { createInterface } from "node:readline"
import type { Bench } from "./bench.ts"

/** Where the log ends now. */
export const mark = (bench: Bench): number => statSync(bench.server.logFile).size

/** One statement: when it ended, in milliseconds since the epoch, and how long planning and running it took together. */
export interface Timed {
  readonly at: number
  readonly millis: number
}

const entry = /^(\d+\.\d+) (\d+) LOG: {2}duration: (\d+\.\d+) ms {2}(parse|bind|execute) [^:]+: (.*)$/

/** The claims that workers whose statements are logged have made since the mark. */
export const claimsSince = async (bench: Bench, from: number): Promise<ReadonlyArray<Timed>> => {
  const { claim } = bench.peer
  if (claim === undefined) throw new Error("nobody knows a claim of this queue when it is seen")
  const timed: Array<Timed> = []
  /** What a session has spent on the statement that it has not run yet. */
  const planned = new Map<string, number>()
  const text = { head: undefined as RegExpExecArray | undefined, lines: [] as Array<string> }
  const finish = () => {
    if (text.head === undefined) return
    const [, at, session, millis, phase] = text.head
    if (claim.test(text.lines.join("\n"))) {
      const spent = (planned.get(session!) ?? 0) + Number(millis)
      if (phase === "execute") timed.push({ at: Number(at) * 1000, millis: spent })
      planned.set(session!, phase === "execute" ? 0 : spent)
    }
    text.head = undefined
  }
  for await (const line of createInterface({ input: createReadStream(bench.server.logFile, { start: from }) })) {
    const head = entry.exec(line)
    if (head !== null) {
      finish()
      text.head = head
      text.lines = [head[5]!]
    } else if (line.startsWith("\t")) text.lines.push(line.slice(1))
    else finish()
  }
  finish()
  return timed
}
