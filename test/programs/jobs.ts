/** The jobs that the test's processes handle and the tests enqueue. */
import * as Effect from "effect/Effect"
import * as Schema from "effect/Schema"
import { Job } from "../../src/index.ts"
import { Ledger } from "../support/ledger.ts"

/** Writes that it started, nothing else. */
export class Count extends Job.make("count", { payload: { n: Schema.Number } }) {}

/** Writes that it started, works for `millis`, writes that it ended. */
export class Step extends Job.make("step", {
  payload: {
    millis: Schema.Number,
    /** Goes on when it is told to stop. */
    stubborn: Schema.optionalKey(Schema.Boolean)
  }
}) {}

/** A step in a queue of its own. */
export class Aside extends Job.make("aside", { payload: { millis: Schema.Number }, queue: "aside" }) {}

const step = Effect.fnUntraced(function*(millis: number) {
  const { mention, record } = yield* Ledger
  yield* record("start")
  yield* Effect.onInterrupt(Effect.sleep(millis), () => mention("interrupted"))
  yield* record("end")
})

export const CountHandler = Count.toLayer(() => Effect.flatMap(Ledger, ({ record }) => record("start")))
export const StepHandler = Step.toLayer(({ millis, stubborn }) =>
  stubborn === true ? Effect.uninterruptible(step(millis)) : step(millis)
)
export const AsideHandler = Aside.toLayer(({ millis }) => step(millis))
