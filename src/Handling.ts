/**
 * A handler ready to run: its definition, what its layer has registered, and its codecs, which are made once.
 *
 * @since 0.1.0
 */
import type * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Schema from "effect/Schema"
import * as Bounded from "./Bounded.ts"
import type * as Definition from "./Definition.ts"

/** A handler of one worker. */
export interface Handling {
  readonly definition: Definition.Definition
  readonly registered: Definition.Registered
  /** Decodes a payload. It may be interrupted, and is not bounded: that is part of the run. */
  readonly decode: Codec
  readonly encodeSuccess: Codec
  readonly encodeError: Codec
  readonly decodeError: Codec
}

type Codec = (value: unknown) => Effect.Effect<unknown, Schema.SchemaError | Bounded.TimedOut>

/** A retry policy or a codec that has not answered after this long, in milliseconds, counts as one that throws. */
export const undecided = 5000

/** Prepares a definition and its registered handler. */
export const make = (definition: Definition.Definition, registered: Definition.Registered): Handling => ({
  definition,
  registered,
  // Sound: the services of these codecs are requirements of the handler's layer, whose context every run is given.
  decode: Schema.decodeUnknownEffect(Schema.toCodecJson(definition.payloadSchema)) as Codec,
  encodeSuccess: answering(Schema.encodeUnknownEffect(Schema.toCodecJson(definition.successSchema)) as Codec),
  encodeError: answering(Schema.encodeUnknownEffect(Schema.toCodecJson(definition.errorSchema)) as Codec),
  decodeError: answering(Schema.decodeUnknownEffect(Schema.toCodecJson(definition.errorSchema)) as Codec)
})

/** Bounds a codec that runs where nothing can interrupt it. Most answer at once, and cost nothing here. */
const answering = (codec: Codec): Codec => (value) => {
  const answer = codec(value)
  return Exit.isExit(answer) ? answer : Bounded.bounded(answer, undecided)
}
