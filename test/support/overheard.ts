/** A way to PostgreSQL on which everything that is asked is overheard. */
import { Effect } from "effect"
import { connect, createServer, type Socket } from "node:net"
import { listenBetween } from "./between.ts"
import { readRequests } from "./wire.ts"

/** Opens one in the current scope; `texts` are the statements so far, in their order. */
export const overhear = Effect.fnUntraced(function*(target: string) {
  const { hostname, port } = new URL(target)
  const sockets = new Set<Socket>()
  const texts: Array<string> = []
  const server = createServer((client) => {
    const upstream = connect(Number(port), hostname)
    const read = readRequests()
    client.on("data", (chunk: Buffer) => {
      for (const { text } of read(chunk)) texts.push(text)
      upstream.write(chunk)
    })
    upstream.on("data", (chunk) => client.write(chunk))
    for (const [socket, other] of [[client, upstream], [upstream, client]] as const) {
      sockets.add(socket)
      socket.setNoDelay(true)
      socket.on("error", () => other.destroy())
      socket.on("close", () => other.destroy())
    }
  })
  const url = yield* listenBetween(server, target, () => {
    for (const socket of sockets) socket.destroy()
  })
  return { url, texts }
})
