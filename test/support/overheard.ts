/** A way to PostgreSQL on which everything that is asked is overheard. */
import { Effect } from "effect"
import { connect, createServer, type Socket } from "node:net"
import { readRequests } from "./wire.ts"

/** Opens one in the current scope; `texts` are the statements so far, in their order. */
export const overhear = Effect.fnUntraced(function*(target: string) {
  const url = new URL(target)
  const { hostname, port } = url
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
  yield* Effect.acquireRelease(
    Effect.callback<void>((resume) => {
      server.listen(0, "127.0.0.1", () => resume(Effect.void))
    }),
    () =>
      Effect.sync(() => {
        for (const socket of sockets) socket.destroy()
        server.close()
      })
  )
  const address = server.address()
  url.hostname = "127.0.0.1"
  url.port = String(typeof address === "object" && address !== null ? address.port : 0)
  return { url: url.href, texts }
})
