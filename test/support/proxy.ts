/** A TCP proxy in front of PostgreSQL that can lose what the server answers. */
import { Effect } from "effect"
import { connect, createServer, type Socket } from "node:net"
import { listenBetween } from "./between.ts"
import { endsTransaction } from "./wire.ts"

/** A running proxy. */
export interface Proxy {
  /** The database's URL, through the proxy. */
  readonly url: string
  /**
   * The connection of the next request that contains `text` loses every answer from now on, and is reset once the server
   * has answered: what was asked for has happened, and nobody knows.
   */
  readonly loseAnswerTo: (text: string) => void
  /** Does so with every `nth` request that contains `text`. */
  readonly loseEvery: (nth: number, text: string) => void
  /** Answers lost so far. */
  readonly lost: () => number
  /** Messages that came from clients so far. */
  readonly requests: () => number
  /** Resets every connection. */
  readonly reset: () => void
}

/** Starts a proxy in the current scope. */
export const makeProxy = Effect.fnUntraced(function*(target: string) {
  const { hostname, port } = new URL(target)
  const sockets = new Set<Socket>()
  let needle: string | undefined
  let nth = 1
  let seen = 0
  let lost = 0
  let requests = 0

  const server = createServer((client) => {
    const upstream = connect(Number(port), hostname)
    let losing = false
    for (const [socket, other] of [[client, upstream], [upstream, client]] as const) {
      sockets.add(socket)
      socket.setNoDelay(true)
      socket.on("error", () => other.destroy())
      socket.on("close", () => {
        sockets.delete(socket)
        other.destroy()
      })
    }
    client.on("data", (chunk) => {
      requests++
      if (needle !== undefined && chunk.includes(needle) && ++seen % nth === 0) {
        losing = true
        if (nth === 1) needle = undefined
      }
      upstream.write(chunk)
    })
    upstream.on("data", (chunk) => {
      if (!losing) client.write(chunk)
      else if (endsTransaction(chunk)) {
        lost++
        client.resetAndDestroy()
      }
    })
  })
  const url = yield* listenBetween(server, target, () => {
    for (const socket of sockets) socket.destroy()
  })
  const proxy: Proxy = {
    url,
    loseAnswerTo: (text) => {
      needle = text
      nth = 1
    },
    loseEvery: (every, text) => {
      needle = text
      nth = every
    },
    lost: () => lost,
    requests: () => requests,
    reset: () => {
      for (const socket of sockets) socket.resetAndDestroy()
    }
  }
  return proxy
})
