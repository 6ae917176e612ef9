/** A link to PostgreSQL that goes dead, holds back what the server answers, or breaks, session by session or request by request. */
import { Effect } from "effect"
import { connect, createServer, type Socket } from "node:net"
import { listenBetween } from "./between.ts"
import { endsTransaction, readRequests } from "./wire.ts"

/** The way of a request and its answer, and how far they come. */
export interface Strike {
  /** Part of the statement's text, whether or not it was prepared earlier. */
  readonly text: string
  /** Part of its parameters, for one of many requests with the same text. */
  readonly param?: string
  /** Part of the answer, for one that matters; then `at` is `answered`. */
  readonly answer?: string
  /** The first such request, or a later one. */
  readonly nth?: number
  /**
   * How far it comes: never to the server (`lost`), to the server and its answer nowhere (`sent`), the same and not
   * before the server has answered (`answered`), or there and back (`acknowledged`).
   */
  readonly at: "lost" | "sent" | "answered" | "acknowledged"
}

/** A link under test. A session is known by the texts it has ever sent: a prepared statement is sent once. */
export interface Link {
  /** The database's URL, over the link. */
  readonly url: string
  /**
   * For each of these texts, the session that next sends it goes dead: neither that request nor anything after it
   * arrives, and no side is told.
   */
  readonly loseRequestWith: (...texts: ReadonlyArray<string>) => void
  /** Sessions that have gone dead. */
  readonly dead: () => number
  /** Holds back every answer to the sessions, now and later, that have sent `text`; until {@link letThrough}. */
  readonly holdAnswersTo: (text: string) => void
  /** How many answers are held back. */
  readonly held: () => number
  readonly letThrough: () => void
  /** Sessions that have sent `text` and are still there. */
  readonly sessions: (text: string) => number
  /** Resets the sessions that have sent `text`. */
  readonly cut: (text: string) => void
  /**
   * Does something at a point in the life of one request, once. Unless it was acknowledged, the session is dead from then
   * on; the returned function lets what did not arrive through after all, and what comes after it.
   */
  readonly strike: (strike: Strike, act: () => void) => () => void
}

interface Session {
  readonly client: Socket
  readonly upstream: Socket
  sent: string
  dead: boolean
  readonly held: Array<Buffer>
  readonly requests: ReturnType<typeof readRequests>
  /** The answer to the request that is out is what is waited for. */
  struck: boolean
}

/** Starts a link in the current scope. */
export const makeLink = Effect.fnUntraced(function*(target: string) {
  const { hostname, port } = new URL(target)
  const sessions = new Set<Session>()
  const toLose = new Set<string>()
  let holding: string | undefined
  let dead = 0
  let strike: { readonly on: Strike; readonly act: () => void; left: number } | undefined
  let revive: () => void = () => {}

  const hit = (session: Session, withheld: () => void) => {
    const { act, on } = strike!
    strike = undefined
    session.struck = false
    session.dead = on.at !== "acknowledged"
    revive = () => {
      session.dead = false
      withheld()
    }
    act()
  }

  const server = createServer((client) => {
    const upstream = connect(Number(port), hostname)
    let answer: Buffer = Buffer.alloc(0)
    const session: Session = {
      client,
      upstream,
      sent: "",
      dead: false,
      held: [],
      requests: readRequests(),
      struck: false
    }
    sessions.add(session)
    for (const [socket, other] of [[client, upstream], [upstream, client]] as const) {
      socket.setNoDelay(true)
      socket.on("error", () => other.destroy())
      socket.on("close", () => {
        sessions.delete(session)
        other.destroy()
      })
    }
    client.on("data", (chunk) => {
      const text = chunk.toString("latin1")
      session.sent += text
      for (const lost of toLose) {
        if (!session.dead && text.includes(lost)) {
          toLose.delete(lost)
          session.dead = true
          dead++
        }
      }
      for (const { params, text } of session.requests(chunk)) {
        if (strike === undefined || session.dead || session.struck) continue
        if (!text.includes(strike.on.text) || !params.includes(strike.on.param ?? "")) continue
        if (--strike.left <= 0) session.struck = true
      }
      if (session.struck && (strike?.on.at === "lost" || strike?.on.at === "sent")) {
        if (strike.on.at === "sent") upstream.write(chunk)
        hit(session, () => upstream.write(chunk))
      } else if (!session.dead) upstream.write(chunk)
    })
    upstream.on("data", (chunk) => {
      if (session.dead) return
      if (session.struck) {
        answer = Buffer.concat([answer, chunk])
        if (!endsTransaction(chunk)) return
        const whole = answer
        answer = Buffer.alloc(0)
        session.struck = false
        const matters = strike !== undefined && whole.includes(strike.on.answer ?? "")
        if (!matters || strike?.on.at === "acknowledged") client.write(whole)
        if (matters) hit(session, () => client.write(whole))
        return
      }
      if (holding !== undefined && session.sent.includes(holding)) session.held.push(chunk)
      else client.write(chunk)
    })
  })
  const url = yield* listenBetween(server, target, () => {
    for (const { client, upstream } of sessions) {
      client.destroy()
      upstream.destroy()
    }
  })
  const having = (text: string) => [...sessions].filter(({ sent }) => sent.includes(text))
  const link: Link = {
    url,
    loseRequestWith: (...texts) => texts.forEach((text) => toLose.add(text)),
    dead: () => dead,
    holdAnswersTo: (text) => {
      holding = text
    },
    held: () => [...sessions].reduce((sum, { held }) => sum + held.length, 0),
    letThrough: () => {
      holding = undefined
      for (const { client, held } of sessions) for (const chunk of held.splice(0)) client.write(chunk)
    },
    sessions: (text) => having(text).length,
    cut: (text) => {
      for (const { client } of having(text)) client.resetAndDestroy()
    },
    strike: (on, act) => {
      strike = { on, act, left: on.nth ?? 1 }
      revive = () => {}
      return () => revive()
    }
  }
  return link
})
