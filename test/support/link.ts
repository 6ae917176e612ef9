/** A link to PostgreSQL that goes dead, holds back what the server answers, or breaks, session by session. */
import { Effect } from "effect"
import { connect, createServer, type Socket } from "node:net"

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
}

interface Session {
  readonly client: Socket
  readonly upstream: Socket
  sent: string
  dead: boolean
  readonly held: Array<Buffer>
}

/** Starts a link in the current scope. */
export const makeLink = Effect.fnUntraced(function*(target: string) {
  const { hostname, port } = new URL(target)
  const sessions = new Set<Session>()
  const toLose = new Set<string>()
  let holding: string | undefined
  let dead = 0

  const server = createServer((client) => {
    const upstream = connect(Number(port), hostname)
    const session: Session = { client, upstream, sent: "", dead: false, held: [] }
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
      if (!session.dead) upstream.write(chunk)
    })
    upstream.on("data", (chunk) => {
      if (session.dead) return
      if (holding !== undefined && session.sent.includes(holding)) session.held.push(chunk)
      else client.write(chunk)
    })
  })
  yield* Effect.acquireRelease(
    Effect.callback<void>((resume) => {
      server.listen(0, "127.0.0.1", () => resume(Effect.void))
    }),
    () =>
      Effect.sync(() => {
        for (const { client, upstream } of sessions) {
          client.destroy()
          upstream.destroy()
        }
        server.close()
      })
  )
  const address = server.address()
  const url = new URL(target)
  url.hostname = "127.0.0.1"
  url.port = String(typeof address === "object" && address !== null ? address.port : 0)
  const having = (text: string) => [...sessions].filter(({ sent }) => sent.includes(text))
  const link: Link = {
    url: url.href,
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
    }
  }
  return link
})
