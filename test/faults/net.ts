/** The network between processes and PostgreSQL, as a TCP proxy that can be slow, narrow, deaf, dead or rude. */
import { Effect, type Scope } from "effect"
import { connect, createServer, type Socket } from "node:net"
import { listenBetween } from "../support/between.ts"
import { endsAnswer, readRequests, type Request } from "../support/wire.ts"

/** Which sessions: those of a process, those that have sent a text (a prepared statement is sent once), or all. */
export interface Which {
  /** What `application_name` begins with. */
  readonly process?: string
  readonly sent?: string
  /** Only those that have been silent both ways for so many milliseconds when it begins, and none that comes later. */
  readonly silent?: number
}

/** What a session is called that asks the server to cancel a statement of another one. */
export const cancelRequest = "(cancel)"

/** A point in the life of one request. */
export interface Cut {
  /** Part of the statement's text, or what all of it is. */
  readonly text: string | RegExp
  /** Part of its parameters, as they are sent. */
  readonly param?: string
  readonly process?: string
  /** The first such request, or a later one. */
  readonly nth?: number
  /**
   * The request never arrives (`lost`), arrives while its session ends (`sent`), is answered and the answer is lost
   * (`answered`), or the answer arrives and nothing is cut (`acknowledged`).
   */
  readonly at: "lost" | "sent" | "answered" | "acknowledged"
  /** The session is not reset: nothing of it arrives any more, and nobody is told. */
  readonly silent?: boolean
}

/** What can be done to the network. What has a scope ends with it. */
export interface Net {
  /** The URL of a database of the server, over the network. */
  readonly url: string
  readonly sessions: (which?: Which) => number
  /** Resets sessions, once. */
  readonly reset: (which?: Which) => Effect.Effect<number>
  /** Each way takes `delay` milliseconds, plus or minus at most `jitter`; the order is kept. */
  readonly slow: (
    options: Which & { readonly delay: number; readonly jitter?: number }
  ) => Effect.Effect<void, never, Scope.Scope>
  /** Bytes a second, each way. */
  readonly narrow: (options: Which & { readonly bytes: number }) => Effect.Effect<void, never, Scope.Scope>
  /**
   * Nothing arrives any more, one way or both, and nobody is told: sockets stay open, and new ones connect. At the end what
   * was withheld arrives, as it would by retransmission, or the sessions are reset.
   */
  readonly blackHole: (
    options: Which & { readonly way?: "requests" | "answers" | "both"; readonly heal: "deliver" | "reset" }
  ) => Effect.Effect<void, never, Scope.Scope>
  /** New sessions are accepted and get nothing, garbage, or a TLS alert; those that are there are reset. */
  readonly impostor: (answer: "nothing" | "garbage" | "alert") => Effect.Effect<void, never, Scope.Scope>
  /**
   * Resets one session at a point of a request, and acts at that very moment; what is returned waits until it has happened,
   * and tells whose session it was.
   */
  readonly cut: (cut: Cut, act?: (process: string) => void) => Effect.Effect<Effect.Effect<string>>
  /** Leads new sessions elsewhere; those that are there are reset. */
  readonly lead: (target: string) => Effect.Effect<void>
}

/** By its name or, when it only comes to cancel, by that. */
const nameOf = (chunk: Buffer, text: string): string =>
  chunk.length >= 8 && chunk.readInt32BE(4) === 80_877_102
    ? cancelRequest
    : /application_name\0([^\0]*)\0/.exec(text)?.[1] ?? ""

type Way = "requests" | "answers"

interface Rule {
  readonly which: Which
  /** Of these alone. */
  readonly among?: ReadonlySet<Session> | undefined
  readonly delay?: () => number
  readonly bytes?: number
  readonly hole?: ReadonlyArray<Way>
}

interface Session {
  readonly client: Socket
  readonly flows: Record<Way, Flow>
  name: string
  sent: string
  /** When something last went through it. */
  heard: number
}

interface Flow {
  readonly push: (chunk: Buffer) => void
  /** Looks again at what is withheld: a rule has changed. */
  readonly look: () => void
}

const matches = (which: Which, session: Session): boolean =>
  session.name.startsWith(which.process ?? "") && session.sent.includes(which.sent ?? "")

const ruling = (rule: Rule, session: Session): boolean =>
  matches(rule.which, session) && rule.among?.has(session) !== false

/** Starts a network in front of the server at `target`, in the current scope. It listens on an address of this machine. */
export const makeNet = Effect.fnUntraced(function*(
  target: string,
  address = "127.0.0.1"
): Effect.fn.Return<Net, never, Scope.Scope> {
  const sessions = new Set<Session>()
  const rules = new Set<Rule>()
  const cuts = new Set<{ readonly on: Cut; left: number; readonly hit: (process: string) => void }>()
  /** Sessions of which one side has gone behind a black hole: the other side hears of it when the hole ends. */
  const orphans = new Map<Session, () => void>()
  let to = new URL(target)
  let impostor: "nothing" | "garbage" | "alert" | undefined

  /** One way of one session: in order, as late and as slow as the rules say at the time. */
  const makeFlow = (session: () => Session, way: Way, write: (chunk: Buffer) => void): Flow => {
    const waiting: Array<{ readonly chunk: Buffer; readonly since: number; readonly delay: number }> = []
    let free = 0
    let timer: NodeJS.Timeout | undefined
    const applying = () => [...rules].filter((rule) => ruling(rule, session()))
    const pump = (): void => {
      timer = undefined
      while (waiting.length > 0) {
        const now = performance.now()
        const mine = applying()
        if (mine.some((rule) => rule.hole?.includes(way))) return
        const { chunk, delay, since } = waiting[0]!
        const at = Math.max(since + delay, free)
        if (at > now) {
          timer = setTimeout(pump, at - now)
          return
        }
        waiting.shift()
        const bytes = mine.map((rule) => rule.bytes).find((found) => found !== undefined)
        free = bytes === undefined ? 0 : now + chunk.length / bytes * 1000
        write(chunk)
      }
    }
    return {
      push: (chunk) => {
        const mine = applying()
        const narrow = mine.some((rule) => rule.bytes !== undefined)
        const delay = mine.reduce((sum, rule) => sum + (rule.delay?.() ?? 0), 0)
        if (waiting.length === 0 && delay === 0 && !narrow && !mine.some((rule) => rule.hole?.includes(way))) {
          return write(chunk)
        }
        const since = performance.now()
        const piece = narrow ? 1024 : chunk.length
        for (let at = 0; at < chunk.length; at += piece) {
          waiting.push({ chunk: chunk.subarray(at, at + piece), since, delay })
        }
        if (timer === undefined) pump()
      },
      look: () => {
        if (timer === undefined) pump()
      }
    }
  }

  const server = createServer({ noDelay: true }, (client) => {
    client.on("error", () => client.destroy())
    if (impostor !== undefined) {
      // What is not read has no end.
      client.resume()
      if (impostor === "garbage") client.write("HTTP/1.1 400 Bad Request\r\n\r\n")
      else if (impostor === "alert") client.write(Buffer.from([0x15, 0x03, 0x01, 0x00, 0x02, 0x02, 0x28]))
      const silent: Flow = { push: () => {}, look: () => {} }
      const one: Session = { client, name: "", sent: "", heard: 0, flows: { requests: silent, answers: silent } }
      sessions.add(one)
      client.on("close", () => sessions.delete(one))
      return
    }
    const upstream = connect({ port: Number(to.port), host: to.hostname, noDelay: true })
    const session: Session = {
      client,
      name: "",
      sent: "",
      heard: performance.now(),
      flows: {
        requests: makeFlow(() => session, "requests", (chunk) => upstream.write(chunk)),
        answers: makeFlow(() => session, "answers", (chunk) => client.write(chunk))
      }
    }
    sessions.add(session)
    const requests = readRequests()
    let struck: { readonly on: Cut; readonly act: () => void } | undefined
    let dead = false
    const end = (on: Cut) => {
      if (on.silent === true) dead = true
      else {
        client.resetAndDestroy()
        upstream.destroy()
      }
    }
    for (const [socket, other] of [[client, upstream], [upstream, client]] as const) {
      socket.on("error", () => other.destroy())
      socket.on("close", () => {
        sessions.delete(session)
        // Nobody is told what happens on the other side of a black hole.
        const holes = [...rules].filter((rule) => rule.hole !== undefined && ruling(rule, session))
        if (holes.length === 0) other.destroy()
        else orphans.set(session, () => other.destroy())
      })
    }
    client.on("data", (chunk) => {
      const text = chunk.toString("latin1")
      session.heard = performance.now()
      if (session.name === "") session.name = nameOf(chunk, text)
      // What rules ask for are texts of statements; a session that sends much data is not to be remembered for it.
      if (session.sent.length < 200_000) session.sent += text
      if (dead) return
      const hit = hitBy(session, requests(chunk))
      if (hit === undefined) return session.flows.requests.push(chunk)
      const { act, on } = hit
      if (on.at === "answered" || on.at === "acknowledged") {
        struck = hit
        return session.flows.requests.push(chunk)
      }
      if (on.at === "lost") {
        end(on)
        act()
      } else {
        // The server has it, and whoever sent it does not know.
        upstream.write(chunk, () => {
          if (on.silent === true) dead = true
          else {
            client.resetAndDestroy()
            upstream.end()
          }
          act()
        })
      }
    })
    upstream.on("data", (chunk) => {
      if (dead) return
      session.heard = performance.now()
      if (struck === undefined) return session.flows.answers.push(chunk)
      const { act, on } = struck
      if (on.at === "acknowledged") session.flows.answers.push(chunk)
      if (!endsAnswer(chunk)) return
      struck = undefined
      if (on.at === "answered") end(on)
      act()
    })
  })

  const hitBy = (session: Session, requests: ReadonlyArray<Request>) => {
    for (const { params, text } of requests) {
      for (const cut of cuts) {
        const { on } = cut
        if (
          !session.name.startsWith(on.process ?? "") ||
          !(typeof on.text === "string" ? text.includes(on.text) : on.text.test(text))
        ) continue
        if (!params.includes(on.param ?? "") || --cut.left > 0) continue
        cuts.delete(cut)
        return { on, act: () => cut.hit(session.name) }
      }
    }
    return undefined
  }

  const url = yield* listenBetween(server, target, () => {
    rules.clear()
    for (const { client } of sessions) client.destroy()
    for (const tell of orphans.values()) tell()
  }, address)

  const having = (which: Which = {}) => [...sessions].filter((session) => matches(which, session))
  const resetAll = (which?: Which) => {
    const found = having(which)
    for (const { client } of found) client.resetAndDestroy()
    return found.length
  }
  const ruled = (rule: Rule, end: () => void = () => {}) =>
    Effect.asVoid(Effect.acquireRelease(
      Effect.sync(() => rules.add(rule)),
      () =>
        Effect.sync(() => {
          end()
          rules.delete(rule)
          for (const { flows } of [...sessions, ...orphans.keys()]) {
            flows.requests.look()
            flows.answers.look()
          }
          for (const [session, tell] of orphans) {
            if ([...rules].some((rule) => rule.hole !== undefined && ruling(rule, session))) continue
            orphans.delete(session)
            tell()
          }
        })
    ))
  const posing = (as: NonNullable<typeof impostor>) =>
    Effect.asVoid(Effect.acquireRelease(
      Effect.sync(() => {
        impostor = as
        resetAll()
      }),
      () =>
        Effect.sync(() => {
          impostor = undefined
          resetAll()
        })
    ))

  return {
    url,
    sessions: (which) => having(which).length,
    reset: (which) => Effect.sync(() => resetAll(which)),
    slow: ({ delay, jitter = 0, ...which }) =>
      ruled({ which, delay: () => Math.max(0, delay + (Math.random() * 2 - 1) * jitter) }),
    narrow: ({ bytes, ...which }) => ruled({ which, bytes }),
    blackHole: ({ heal, silent, way = "both", ...which }) =>
      Effect.suspend(() => {
        const since = performance.now() - (silent ?? 0)
        const among = silent === undefined ? undefined : new Set(having(which).filter(({ heard }) => heard < since))
        return ruled({ which, among, hole: way === "both" ? ["requests", "answers"] : [way] }, () => {
          if (heal === "reset") resetAll(which)
        })
      }),
    impostor: posing,
    cut: (on, act = () => {}) =>
      Effect.sync(() => {
        let tell: (process: string) => void = () => {}
        const happened = new Promise<string>((resolve) => (tell = resolve))
        cuts.add({
          on,
          left: on.nth ?? 1,
          hit: (process) => {
            act(process)
            tell(process)
          }
        })
        return Effect.promise(() => happened)
      }),
    lead: (target) =>
      Effect.sync(() => {
        to = new URL(target)
        resetAll()
      })
  }
})
