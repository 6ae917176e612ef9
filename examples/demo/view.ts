/** The terminal: lines that stay and, below them, a block that is redrawn. Elsewhere a plain line now and then. */
import { Context, Duration, Effect, Layer } from "effect"

/** What is going on at the moment. */
export interface Moment {
  /** For a terminal. */
  readonly block: ReadonlyArray<string>
  /** The same in one line, for a log. */
  readonly summary: string
}

export class View extends Context.Service<View, {
  /** The width to draw for. */
  readonly columns: Effect.Effect<number>
  /** Prints a line that stays. */
  readonly line: (text: string) => Effect.Effect<void>
  /** Shows a moment in place of the one before. */
  readonly show: (moment: Moment) => Effect.Effect<void>
}>()("effect-pgqueue/examples/demo/view") {
  static readonly layer = Layer.sync(View, () => {
    const { stdout } = process
    let drawn = 0
    let logged = ""
    let loggedAt = -Infinity

    // One write for erasing and drawing, or the block would flicker.
    const draw = (above: string, block: ReadonlyArray<string>) => {
      const erase = drawn === 0 ? "" : `\u001b[${drawn}A\u001b[0J`
      const fitting = block.slice(0, Math.max(0, stdout.rows - 2)).map((line) => clip(line, stdout.columns))
      stdout.write(erase + above + fitting.map((line) => `${line}\n`).join(""))
      drawn = fitting.length
    }

    return View.of({
      columns: Effect.sync(() => stdout.columns ?? 80),
      line: (text) =>
        Effect.sync(() => {
          if (stdout.isTTY) draw(`${colored(text)}\n`, [])
          else stdout.write(`${text}\n`)
        }),
      show: ({ block, summary }) =>
        Effect.sync(() => {
          if (stdout.isTTY) return draw("", block)
          if (summary === "" || summary === logged || performance.now() - loggedAt < 1000) return
          logged = summary
          loggedAt = performance.now()
          stdout.write(`${summary}\n`)
        })
    })
  })
}

/** Runs an effect, says so, and says at its end what came of it and how long it took. */
export const step = Effect.fnUntraced(function*<A, E, R>(
  doing: string,
  effect: Effect.Effect<A, E, R>,
  done: (result: A) => string
) {
  const view = yield* View
  yield* view.show({ block: [`… ${doing}`], summary: "" })
  const [duration, result] = yield* Effect.timed(effect)
  yield* view.line(`✓ ${done(result)} (${seconds(Duration.toMillis(duration))})`)
  return result
})

export const seconds = (millis: number): string => `${(millis / 1000).toFixed(1)} s`

export const count = (n: number): string => n.toLocaleString("en").replaceAll(",", " ")

const clip = (line: string, columns: number) => line.length < columns ? line : `${line.slice(0, columns - 2)}…`

const colored = (text: string) =>
  process.env["NO_COLOR"] !== undefined
    ? text
    : text.replace(/^✓/, "\u001b[32m✓\u001b[0m").replace(/^✗/, "\u001b[31m✗\u001b[0m")
