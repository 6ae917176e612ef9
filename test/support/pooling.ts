/** A proxy in front of PostgreSQL that does to sessions what poolers do, one thing at a time. */
import { Effect } from "effect"
import { connect, createServer, type Socket } from "node:net"
import { listenBetween } from "./between.ts"

/** What it does. */
export interface Pooling {
  /** What becomes of settings that a session begins with: refused as PgBouncer does, or dropped without a word. */
  readonly settings?: "refused" | "dropped"
  /** LISTEN succeeds and nothing is ever heard, or it is an error. */
  readonly listen?: "deaf" | "refused"
}

/** A running proxy. */
export interface PoolingProxy {
  /** The database's URL, through the proxy. */
  readonly url: string
  /** Every session's texts so far, in latin1. */
  readonly sent: () => ReadonlyArray<string>
}

/** What any pooler knows of. */
const known = new Set(["user", "database", "application_name", "client_encoding", "datestyle", "timezone"])

/** An ErrorResponse of what PgBouncer says of itself: no function is named. */
const refusal = (name: string) => {
  const fields = Buffer.from(`SFATAL\0C08P01\0Munsupported startup parameter: ${name}\0\0`)
  const head = Buffer.alloc(5)
  head.write("E")
  head.writeInt32BE(fields.length + 4, 1)
  return Buffer.concat([head, fields])
}

/** Starts a proxy in the current scope. */
export const makePooling = Effect.fnUntraced(function*(target: string, pooling: Pooling) {
  const { hostname, port } = new URL(target)
  const sockets = new Set<Socket>()
  const sessions: Array<{ text: string }> = []

  const server = createServer((client) => {
    const upstream = connect(Number(port), hostname)
    const session = { text: "" }
    sessions.push(session)
    let startup: Buffer | undefined = Buffer.alloc(0)
    let answers: Buffer = Buffer.alloc(0)
    for (const [socket, other] of [[client, upstream], [upstream, client]] as const) {
      sockets.add(socket)
      socket.setNoDelay(true)
      socket.on("error", () => other.destroy())
      socket.on("close", () => {
        sockets.delete(socket)
        other.destroy()
      })
    }
    const begin = (packet: Buffer): void => {
      const fields = packet.toString("utf8", 8, packet.length - 2).split("\0")
      const settings = Array.from(
        { length: fields.length / 2 },
        (_, index) => [fields[2 * index]!, fields[2 * index + 1]!] as const
      )
      const unknown = settings.find(([name]) => !known.has(name))
      if (pooling.settings === "refused" && unknown !== undefined) {
        client.end(refusal(unknown[0]))
        return
      }
      if (pooling.settings !== "dropped") return void upstream.write(packet)
      const body = Buffer.from(
        settings.filter(([name]) => known.has(name)).map(([name, value]) => `${name}\0${value}\0`).join("") + "\0"
      )
      const head = Buffer.alloc(8)
      head.writeInt32BE(body.length + 8, 0)
      packet.copy(head, 4, 4, 8)
      upstream.write(Buffer.concat([head, body]))
    }
    client.on("data", (chunk) => {
      if (startup !== undefined) {
        startup = Buffer.concat([startup, chunk])
        if (startup.length < 4 || startup.length < startup.readInt32BE(0)) return
        const packet = startup
        startup = undefined
        return begin(packet)
      }
      session.text += chunk.toString("latin1")
      const at = pooling.listen === "refused" ? chunk.indexOf("LISTEN \"") : -1
      // A syntax error of the same length.
      if (at >= 0 && chunk[at - 1] !== 0x4e) chunk.write("LESTIN", at)
      upstream.write(chunk)
    })
    upstream.on("data", (chunk) => {
      if (pooling.listen !== "deaf") return void client.write(chunk)
      answers = Buffer.concat([answers, chunk])
      const passed: Array<Buffer> = []
      while (answers.length >= 5 && answers.length >= answers.readInt32BE(1) + 1) {
        const end = answers.readInt32BE(1) + 1
        // NotificationResponse.
        if (answers[0] !== 0x41) passed.push(answers.subarray(0, end))
        answers = answers.subarray(end)
      }
      client.write(Buffer.concat(passed))
    })
  })
  const url = yield* listenBetween(server, target, () => {
    for (const socket of sockets) socket.destroy()
  })
  const proxy: PoolingProxy = { url, sent: () => sessions.map(({ text }) => text) }
  return proxy
})
