/** What every end of a run means, and the text that is kept of an error: the pure functions, row by row. */
import { assert, describe, it } from "@effect/vitest"
import { Cause, Effect, Exit, Redactable, Redacted, Schema } from "effect"
import * as Outcome from "../src/Outcome.ts"

class Boom extends Schema.TaggedError<Boom>()("Boom", { n: Schema.Number }) {}
class Other extends Schema.TaggedError<Other>()("Other", {}) {}

const intents: ReadonlyArray<Outcome.Intent | undefined> = [
  undefined,
  { _tag: "Cancel", reason: "enough" },
  { _tag: "Discard", reason: "no good" },
  { _tag: "Snooze", delay: 1500 }
]
const interruptions: ReadonlyArray<Outcome.Interruption | undefined> = [
  undefined,
  "shutdown",
  "lost",
  "unheard",
  "cancelled",
  "timeout"
]
const known = intents.flatMap((intent) => interruptions.map((interruption) => ({ intent, interruption })))
const nameOf = ({ intent, interruption }: typeof known[number]) =>
  `${intent?._tag ?? "no intent"}, ${interruption ?? "no interruption"}`

/** An error that refuses to be looked at. */
const hostile = {
  get message() {
    throw new Error("message")
  },
  get name() {
    throw new Error("name")
  },
  get stack() {
    throw new Error("stack")
  },
  get cause() {
    throw new Error("cause")
  },
  toString() {
    throw new Error("toString")
  },
  toJSON() {
    throw new Error("toJSON")
  }
}

/** An error with a cause with a cause …; the last link says 0. */
const chain = (links: number, message = (n: number) => `link ${n}`): Error => {
  let error = new Error(message(0))
  for (let n = 1; n < links; n++) error = new Error(message(n), { cause: error })
  return error
}

const cyclic = () => {
  const inner = new Error("inner")
  const outer = new Error("outer", { cause: inner })
  inner.cause = outer
  return outer
}

/** 100 MB, in one piece in memory; shared, so that a copy of it shows. */
const huge = Buffer.alloc(100_000_000, "    at f (x:1)\n").toString("latin1")

const boom = new Boom({ n: 7 })
const interruption = Cause.interrupt(1)

describe("a run that ends", () => {
  it("with success has completed with its value, whatever was asked for or interrupted", () => {
    for (const value of [undefined, null, 0, "value", boom]) {
      for (const row of known) {
        assert.deepStrictEqual(Outcome.fromExit(Exit.succeed(value), row), { _tag: "Complete", value }, nameOf(row))
      }
    }
  })

  const failed: ReadonlyArray<readonly [how: string, cause: Cause.Cause<Boom | Other>]> = [
    ["with its typed error", Cause.fail(boom)],
    ["with its typed error and an interruption", Cause.combine(Cause.fail(boom), interruption)],
    ["with an interruption and its typed error", Cause.combine(interruption, Cause.fail(boom))],
    ["with a defect and its typed error", Cause.combine(Cause.die("defect"), Cause.fail(boom))],
    ["with several typed errors, of which the first counts", Cause.combine(Cause.fail(boom), Cause.fail(new Other()))],
    [
      "with everything at once",
      Cause.fromReasons<Boom | Other>([
        Cause.makeInterruptReason(1),
        Cause.makeDieReason("defect"),
        Cause.makeFailReason(boom),
        Cause.makeFailReason(new Other())
      ])
    ]
  ]
  for (const [how, cause] of failed) {
    it(`${how} has failed with it, whatever was asked for or interrupted`, () => {
      for (const row of known) {
        const outcome = Outcome.fromExit(Exit.failCause(cause), row)
        if (outcome._tag !== "Retry" || outcome.failure._tag !== "Failed") return assert.fail(nameOf(row))
        assert.strictEqual(outcome.failure.error, boom, nameOf(row))
        assert.strictEqual(outcome.message, Outcome.describe(cause), nameOf(row))
        assert.include(outcome.message, "Boom")
      }
    })
  }

  const died: ReadonlyArray<readonly [how: string, cause: Cause.Cause<never>, message: RegExp]> = [
    ["an Error", Cause.die(new TypeError("broken")), /^TypeError: broken\n +at /],
    ["an error of its own", Cause.die(boom), /^Boom/],
    ["a string", Cause.die("just text"), /^Error: just text$/],
    ["an empty string", Cause.die(""), /./],
    ["a number", Cause.die(42), /42/],
    ["a bigint", Cause.die(42n), /42/],
    ["a symbol", Cause.die(Symbol("s")), /./],
    ["a function", Cause.die(() => 1), /./],
    ["undefined", Cause.die(undefined), /undefined/],
    ["null", Cause.die(null), /null/],
    ["a plain object", Cause.die({ code: 42 }), /\{"code":42\}/],
    ["an object without a prototype", Cause.die(Object.create(null)), /\{\}/],
    ["an object that refuses to be looked at", Cause.die(hostile), /^Error: the error could not be described$/],
    ["an Error whose message throws", Cause.die(Object.create(hostile, {})), /could not be described/],
    [
      "an Error that has a cause that refuses to be looked at",
      Cause.die(new Error("good", { cause: hostile })),
      /good/
    ],
    ["a 100 MB message", Cause.die(new Error(huge)), /at f/],
    ["a cause chain that ends in itself", Cause.die(cyclic()), /outer[^]*inner/],
    ["a cause chain of 10 000 links", Cause.die(chain(10_000)), /link 9999[^]*link 9998/],
    ["an interruption and a defect", Cause.combine(interruption, Cause.die("defect")), /^Error: defect$/],
    ["a defect and an interruption", Cause.combine(Cause.die("defect"), interruption), /^Error: defect$/],
    ["several defects", Cause.combine(Cause.die("one"), Cause.die("two")), /^Error: one\nError: two$/],
    ["an empty cause", Cause.empty, /./]
  ]
  for (const [how, cause, message] of died) {
    it(`by ${how} has failed as a Defect, whatever was asked for or interrupted`, () => {
      for (const row of known) {
        const outcome = Outcome.fromExit(Exit.failCause(cause), row)
        if (outcome._tag !== "Retry" || outcome.failure._tag !== "Defect") return assert.fail(nameOf(row))
        assert.strictEqual(outcome.failure.message, outcome.message, nameOf(row))
        assert.match(outcome.message, message, nameOf(row))
      }
    })
  }

  const timedOut = {
    _tag: "Retry",
    failure: { _tag: "TimedOut" },
    message: "the attempt ran longer than the job's timeout"
  } as const
  const interrupted = {
    _tag: "Retry",
    failure: { _tag: "Interrupted" },
    message: "the handler was interrupted"
  } as const
  const [, cancel, discard, snooze] = intents
  const byInterruption: ReadonlyArray<
    readonly [intent: Outcome.Intent | undefined, by: Outcome.Interruption | undefined, outcome: unknown]
  > = [
    // Nobody claims it: the handler's own, or it would loop for ever.
    [undefined, undefined, interrupted],
    // The worker's: told apart by why.
    [undefined, "shutdown", { _tag: "Release", lost: false }],
    [undefined, "lost", { _tag: "Release", lost: false }],
    [undefined, "unheard", { _tag: "Release", lost: true }],
    [undefined, "cancelled", { _tag: "Cancel", reason: "" }],
    [undefined, "timeout", timedOut],
    // What the handler asked for comes first.
    [cancel, undefined, cancel],
    [cancel, "shutdown", cancel],
    [cancel, "lost", cancel],
    [cancel, "unheard", cancel],
    [cancel, "cancelled", cancel],
    [cancel, "timeout", cancel],
    [discard, undefined, discard],
    [discard, "shutdown", discard],
    [discard, "lost", discard],
    [discard, "unheard", discard],
    [discard, "cancelled", discard],
    [discard, "timeout", discard],
    [snooze, undefined, snooze],
    [snooze, "shutdown", snooze],
    [snooze, "lost", snooze],
    [snooze, "unheard", snooze],
    [snooze, "cancelled", snooze],
    [snooze, "timeout", snooze]
  ]
  assert.lengthOf(byInterruption, known.length)
  for (const [intent, by, outcome] of byInterruption) {
    const row = { intent, interruption: by }
    it(`by interruption alone (${nameOf(row)}) means what was asked for, else why it was interrupted`, () => {
      const several = Cause.fromReasons([1, 2, 3].map((fiber) => Cause.makeInterruptReason(fiber)))
      for (const cause of [interruption, Cause.interrupt(), several]) {
        assert.deepStrictEqual<unknown>(Outcome.fromExit(Exit.failCause(cause), row), outcome)
      }
    })
  }
})

describe("the text that is kept", () => {
  const bytes = (text: string) => new TextEncoder().encode(text).length

  it("has no NUL, is well-formed, and is as much as fits of what was given", () => {
    const rows: ReadonlyArray<readonly [text: string, kept: string]> = [
      ["", ""],
      ["plain", "plain"],
      ["a\0b\0", "a\uFFFDb\uFFFD"],
      ["half \ud800 and \udc00 half", "half \uFFFD and \uFFFD half"],
      ["😀", "😀"],
      ["a".repeat(8192), "a".repeat(8192)],
      ["a".repeat(8193), "a".repeat(8192)],
      ["é".repeat(8000), "é".repeat(4096)],
      ["€".repeat(8000), "€".repeat(2730)],
      ["a" + "é".repeat(8000), "a" + "é".repeat(4095)],
      ["😀".repeat(8000), "😀".repeat(2048)],
      ["abc" + "😀".repeat(8000), "abc" + "😀".repeat(2047)],
      // Cut inside a character: what is left of it is no character.
      ["a".repeat(8191) + "😀", "a".repeat(8191)],
      ["a".repeat(8190) + "€", "a".repeat(8190)],
      ["\0".repeat(10_000), "\uFFFD".repeat(2730)],
      // Characters that were replaced, at the end, are kept.
      ["a".repeat(8180) + "\0".repeat(100), "a".repeat(8180) + "\uFFFD".repeat(4)]
    ]
    for (const [text, kept] of rows) {
      assert.strictEqual(Outcome.sanitize(text), kept)
      assert.isAtMost(bytes(kept), 8192)
    }
    assert.strictEqual(Outcome.sanitize(huge), huge.slice(0, 8192))
  })

  const ordinary: ReadonlyArray<readonly [what: string, cause: Cause.Cause<unknown>]> = [
    ["an Error", Cause.die(new TypeError("broken"))],
    ["an Error with a chain of causes", Cause.fail(chain(4))],
    ["an Error with a cause that is no Error", Cause.fail(new Error("outer", { cause: { status: 500 } }))],
    ["an Error with null as its cause", Cause.fail(new Error("outer", { cause: null }))],
    ["an Error with properties", Cause.fail(Object.assign(new Error("x"), { code: "E42", detail: { n: 1 } }))],
    ["an Error whose message was changed", Cause.fail(Object.assign(new Error("before"), { message: "after" }))],
    ["an Error without a stack", Cause.fail(Object.assign(new Error("x"), { stack: undefined }))],
    ["an error of many lines", Cause.fail(new Error("one\ntwo\nthree"))],
    ["a typed error", Cause.fail(boom)],
    ["a typed error and a defect", Cause.combine(Cause.fail(boom), Cause.die(new Error("and")))],
    ["interruptions alone", Cause.combine(interruption, Cause.interrupt(2))],
    ["an interruption and an error", Cause.combine(interruption, Cause.fail("no"))],
    ["a cause chain that ends in itself", Cause.die(cyclic())],
    ["a string", Cause.die("text")],
    ["nothing", Cause.die(undefined)],
    ["a plain object", Cause.die({ a: [1, "two", { three: 3n }], when: new Date(0), none: null, gone: undefined })],
    [
      "an object that contains itself",
      Cause.die((() => {
        const self: Record<string, unknown> = { name: "self" }
        self["self"] = self
        return self
      })())
    ],
    ["an object with its own toString", Cause.die({ toString: () => "in my words" })],
    ["an object with an error in it", Cause.die({ error: new RangeError("inside") })],
    ["a list", Cause.die([1, 2, { three: 3 }])],
    ["a Date", Cause.die(new Date(0))]
  ]
  for (const [what, cause] of ordinary) {
    it(`of ${what} is what Effect prints of it`, () => {
      assert.strictEqual(Outcome.describe(cause), Cause.pretty(cause))
    })
  }

  it("names the spans in which the error was raised", () => {
    const exit = Effect.runSyncExit(Effect.fail(boom).pipe(Effect.withSpan("inner"), Effect.withSpan("outer")))
    if (Exit.isSuccess(exit)) return assert.fail()
    assert.strictEqual(Outcome.describe(exit.cause), Cause.pretty(exit.cause))
    assert.match(Outcome.describe(exit.cause), /inner[^]*outer/)
  })

  it("never shows what is redacted", () => {
    const secret = Redacted.make("hunter2")
    class Login extends Schema.TaggedError<Login>()("Login", { password: Schema.Redacted(Schema.String) }) {}
    const login = { password: "hunter2", [Redactable.symbolRedactable]: () => "not for you" }
    const thrown = [
      login,
      { login },
      { secret },
      [[secret]],
      { nested: { secret } },
      secret,
      {
        get password() {
          return secret
        }
      },
      new Error("x", { cause: { secret } }),
      new Login({ password: secret })
    ]
    for (const one of thrown) {
      const text = Outcome.describe(Cause.die(one))
      assert.notInclude(text, "hunter2")
      assert.strictEqual(text, Cause.pretty(Cause.die(one)))
    }
  })

  it("never shows a value that PostgreSQL quotes, in whatever language and however long", () => {
    const value = `hunter2 ${"x".repeat(9000)}\n    at hunter2`
    const messages: ReadonlyArray<readonly [text: string, kept: string]> = [
      [`invalid input syntax for type integer: "${value}"`, "invalid input syntax for type integer: …"],
      [`ungültige Eingabesyntax für Typ integer: »${value}«`, "ungültige Eingabesyntax für Typ integer: …"],
      [
        `syntaxe en entrée invalide pour le type integer : « ${value} »`,
        "syntaxe en entrée invalide pour le type integer : …"
      ],
      [`integer 型の入力構文が不正です: 「${value}」`, "integer 型の入力構文が不正です: …"],
      ["invalid byte sequence for encoding \"UTF8\": 0x68756e", "invalid byte sequence for encoding …"],
      ["Zeichen mit Byte-Folge 0xe2 0x82 0xac in Kodierung »UTF8«", "Zeichen mit Byte-Folge … … … in Kodierung …"],
      ["division by zero", "division by zero"]
    ]
    for (const [text, kept] of messages) {
      const error = Object.assign(new Error(text), { code: "22P02", severity: "ERROR" })
      assert.strictEqual(Outcome.describe(Cause.die(error)), `Error: ${kept}`)
      const holders = [new Error("outer", { cause: error }), { error }, { cause: error }, [error], {
        _tag: "E",
        in: { error }
      }]
      for (const holder of holders) assert.notInclude(Outcome.describe(Cause.fail(holder)), "hunter2")
    }
    const error = Object.assign(new Error("duplicate key value"), {
      code: "23505",
      severity: "ERROR",
      constraint: "one_a_day",
      detail: "Key (email)=(hunter2) already exists.",
      where: "hunter2"
    })
    const text = Outcome.describe(Cause.fail({ _tag: "DbFailed", error }))
    assert.notInclude(text, "hunter2")
    assert.match(text, /23505.*one_a_day.*duplicate key value/)
  })

  it("says at least that there is none", () => {
    const revoked = Proxy.revocable({}, {})
    revoked.revoke()
    for (const thrown of [hostile, revoked.proxy, new Error("", { cause: revoked.proxy }), ""]) {
      assert.notStrictEqual(Outcome.describe(Cause.die(thrown)), "")
    }
    assert.notStrictEqual(Outcome.describe(Cause.empty), "")
  })

  it("of one error does not get lost by its neighbour, its cause or one of its properties", () => {
    const two = Cause.fromReasons<unknown>([Cause.makeDieReason(hostile), Cause.makeFailReason(boom)])
    assert.match(Outcome.describe(two), /could not be described\nBoom/)
    const property = Object.defineProperty(new Error("good"), "bad", {
      enumerable: true,
      get() {
        throw new Error("no")
      }
    })
    assert.match(Outcome.describe(Cause.die(property)), /^Error: good\n +at /)
    assert.match(Outcome.describe(Cause.die(new Error("good", { cause: hostile }))), /^Error: good\n[^]*\[cause\]: /)
    assert.match(
      Outcome.describe(Cause.die({
        message: "good",
        get stack() {
          throw new Error("no")
        }
      })),
      /^Error: good$/
    )
  })

  const many = <A>(count: number, make: (n: number) => A) => Array.from({ length: count }, (_, n) => make(n))
  const large: ReadonlyArray<readonly [what: string, make: () => Cause.Cause<unknown>, kept: RegExp]> = [
    ["an Error with 100 MB of message", () => Cause.die(new Error(huge)), /^Error: {5}at f \(x:1\)\n/],
    [
      "an Error with 100 MB of stack",
      () => Cause.die(Object.assign(new Error("short"), { stack: huge })),
      /^Error: short\n {4}at f \(x:1\)\n/
    ],
    ["an Error with 100 MB of name", () => Cause.die(Object.assign(new Error("x"), { name: huge })), /^ {4}at f/],
    ["a typed error with 100 MB of message", () => Cause.fail({ _tag: "E", message: huge }), /^Error: {5}at f/],
    ["100 MB of text", () => Cause.die(huge), /^Error: {5}at f/],
    ["100 MB from its own toString", () => Cause.die({ toString: () => huge }), /^Error: {5}at f/],
    ["an object with 100 MB of text", () => Cause.die({ a: [{ huge }] }), /^Error: \{"a":\[\{"huge":" {4}at f/],
    ["an object with a name of 100 MB", () => Cause.die({ [huge]: 1 }), /^Error: \{" {4}at f/],
    ["an object with 10 MB of bytes", () => Cause.die({ body: new Uint8Array(10_000_000) }), /^Error: \{"body":/],
    ["a Buffer of 10 MB", () => Cause.die(Buffer.alloc(10_000_000)), /^Error: /],
    ["a list of a million objects", () => Cause.die(many(1_000_000, (n) => ({ n }))), /^Error: \[\{"n":0\},\{"n":1\}/],
    [
      "an object with 100 000 keys",
      () => Cause.die(Object.fromEntries(many(100_000, (n) => [`k${n}`, n]))),
      /"k99":99/
    ],
    [
      "an object 100 000 deep",
      () => Cause.die(many(100_000, () => 0).reduce<object>((o) => ({ o }), {})),
      /\{"o":\{"o":/
    ],
    [
      "a chain of 100 000 causes",
      () => Cause.die(chain(100_000)),
      /^Error: link 99999\n[^]*\[cause\]: Error: link 99998\n/
    ],
    [
      "a chain of 100 000 causes that say nothing",
      () => Cause.die(many(100_000, () => "").reduce<object>((cause, message) => ({ message, cause }), {})),
      /\[cause\]: /
    ],
    ["a chain of 100 000 long causes", () => Cause.die(chain(100_000, () => huge)), /^Error: {5}at f/],
    ["a chain of causes of lines", () => Cause.die(chain(10_000, () => "\n".repeat(5000))), /^Error: \n/],
    ["a chain of causes that never ends", () => {
      class Endless extends Error {
        override get cause(): unknown {
          return new Endless("again")
        }
      }
      return Cause.die(new Endless("first"))
    }, /^Error: first\n[^]*\[cause\]: Error: again\n/],
    [
      "an AggregateError of 100 000",
      () => Cause.die(new AggregateError(many(100_000, (n) => `e${n}`), "all")),
      /^AggregateError: all\n/
    ],
    [
      "10 000 reasons",
      () => Cause.fromReasons(many(10_000, (n) => Cause.makeFailReason(`e${n}`))),
      /^Error: e0\nError: e1\n[^]*\nError: e600\n/
    ],
    [
      "10 000 reasons of 100 MB",
      () => Cause.fromReasons(many(10_000, () => Cause.makeDieReason(new Error(huge)))),
      /^Error: {5}at f/
    ],
    [
      "100 000 interruptions",
      () => Cause.fromReasons(many(100_000, (n) => Cause.makeInterruptReason(n))),
      /fiber \(#0\)/
    ],
    [
      "100 000 interruptions and an error",
      () => Cause.fromReasons([...many(100_000, (n) => Cause.makeInterruptReason(n)), Cause.makeFailReason("e")]),
      /^Error: e$/
    ]
  ]
  for (const [what, make, kept] of large) {
    it(`of ${what} is made in little time and memory`, () => {
      const cause = make()
      const memory = process.resourceUsage().maxRSS
      const begun = process.cpuUsage()
      const text = Outcome.describe(cause)
      const { system, user } = process.cpuUsage(begun)
      const took = (system + user) / 1000
      const grown = (process.resourceUsage().maxRSS - memory) / 1024
      assert.match(text, kept)
      assert.isAtMost(bytes(text), 8192)
      assert.isTrue(text.isWellFormed())
      assert.isBelow(took, 1000, "milliseconds")
      assert.isBelow(grown, 32, "MB")
    })
  }
})
