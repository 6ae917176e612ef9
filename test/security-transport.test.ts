/** Nothing secret leaves this machine unless it is encrypted for the server that was meant (S10). */
import { PgClient } from "@effect/sql-pg"
import { assert, describe, it } from "@effect/vitest"
import { Config, ConfigProvider, Effect, Layer, Redacted } from "effect"
import { createServer, type Socket } from "node:net"
import { TLSSocket } from "node:tls"
import { inspect } from "node:util"
import { JobQueue } from "../src/index.ts"
import type * as Queue from "../src/JobQueue.ts"
import * as Transport from "../src/Transport.ts"
import * as certificates from "./support/certs.ts"

const password = "canary-of-the-password"

/** A server that pretends to be PostgreSQL: how it answers the question for TLS, and what it asks for after that. */
interface Pretence {
  readonly tls: "N" | { readonly cert: string }
  readonly asks?: "cleartext" | "scram" | "scram-unfinished"
}

const message = (type: string, body: Buffer) => {
  const head = Buffer.alloc(5)
  head.write(type, "latin1")
  head.writeInt32BE(body.length + 4, 1)
  return Buffer.concat([head, body])
}
const authentication = (code: number, rest: string | Buffer = "") => {
  const head = Buffer.alloc(4)
  head.writeInt32BE(code)
  return message("R", Buffer.concat([head, Buffer.from(rest)]))
}
const ready = Buffer.concat([authentication(0), message("Z", Buffer.from("I"))])

/** Starts one in the current scope; `received` is all that was sent to it, once decrypted. */
const pretend = Effect.fnUntraced(function*({ asks, tls }: Pretence) {
  const received: Array<Buffer> = []
  const sockets = new Set<Socket>()
  let connections = 0
  const talk = (socket: Socket) => {
    let step = 0
    socket.on("error", () => socket.destroy())
    socket.on("data", (chunk: Buffer) => {
      received.push(chunk)
      if (chunk.length === 8 && chunk.readInt32BE(4) === 80_877_103) {
        if (tls === "N") return void socket.write("N")
        socket.removeAllListeners("data")
        return void socket.write(
          "S",
          () => talk(new TLSSocket(socket, { isServer: true, key: certificates.key, cert: tls.cert }))
        )
      }
      step++
      if (asks === "cleartext") return void socket.write(step === 1 ? authentication(3) : ready)
      if (step === 1) return void socket.write(authentication(10, "SCRAM-SHA-256\0\0"))
      if (step === 2) {
        const nonce = /r=([^,]+)$/.exec(chunk.toString("latin1"))![1]!
        return void socket.write(authentication(11, `r=${nonce}server,s=${btoa("salt")},i=4096`))
      }
      socket.write(
        asks === "scram-unfinished" ? ready : Buffer.concat([authentication(12, `v=${btoa("wrong")}`), ready])
      )
    })
  }
  const server = createServer((socket) => {
    connections++
    sockets.add(socket)
    talk(socket)
  })
  yield* Effect.acquireRelease(
    Effect.callback<void>((resume) => {
      server.listen(0, "0.0.0.0", () => resume(Effect.void))
    }),
    () =>
      Effect.sync(() => {
        for (const socket of sockets) socket.destroy()
        server.close()
      })
  )
  const address = server.address()
  return {
    port: typeof address === "object" && address !== null ? address.port : 0,
    connections: () => connections,
    received: () => Buffer.concat(received).toString("latin1")
  }
})

/** An address that the check has to take for remote, and that leads to this machine all the same. */
const elsewhere = "0.0.0.0"

const start = (client: PgClient.PgClientConfig, options: Queue.Options = {}) =>
  Layer.build(
    Layer.fresh(JobQueue.layer({ onUnavailable: "fail", ...options })).pipe(
      Layer.provide(PgClient.layer({ connectTimeout: "2 seconds", ...client }))
    )
  ).pipe(Effect.scoped)

const urlOf = (host: string, port: number, parameters = "") =>
  Redacted.make(`postgresql://app:${password}@${host}:${port}/app${parameters}`)

/** The queue does not start; no secret is told, in what was sent or in the error. */
const refused = Effect.fnUntraced(function*(
  server: { readonly received: () => string },
  client: PgClient.PgClientConfig,
  options?: Queue.Options
) {
  const error = yield* Effect.flip(start(client, options))
  assert.notInclude(server.received(), password)
  assert.notInclude(`${String(error)} ${error.message} ${inspect(error, { depth: 20 })}`, password)
  return error
})

describe("a connection to another host without verified TLS", () => {
  for (const tls of ["N", { cert: certificates.good }] as const) {
    it.live(`is refused before anything is sent (${tls === "N" ? "no TLS there" : "TLS there"})`, () =>
      Effect.gen(function*() {
        const server = yield* pretend({ tls, asks: "cleartext" })
        const secret = Redacted.make(password)
        const username = "app"
        for (
          const [client, reason] of [
            [{ url: urlOf(elsewhere, server.port) }, /without TLS/],
            [{ url: urlOf(elsewhere, server.port, "?sslmode=disable") }, /sslmode=disable/],
            [{ url: urlOf(elsewhere, server.port, "?sslmode=prefer") }, /sslmode=prefer/],
            [{ url: urlOf(elsewhere, server.port, "?sslmode=allow") }, /sslmode=allow/],
            [{ url: urlOf(elsewhere, server.port, "?sslmode=no-verify") }, /sslmode=no-verify/],
            [{ url: urlOf("localhost", server.port, `?host=${elsewhere}`) }, /"0\.0\.0\.0".*without TLS/],
            [{ url: urlOf(elsewhere, server.port, "?sslmode=verify-full"), ssl: false }, /ssl: false/],
            [{ url: urlOf("localhost", server.port), host: elsewhere }, /"0\.0\.0\.0".*without TLS/],
            [{ host: elsewhere, port: server.port, username, password: secret }, /without TLS/],
            [
              { host: elsewhere, port: server.port, username, password: secret, ssl: { rejectUnauthorized: false } },
              /without verifying/
            ]
          ] as ReadonlyArray<readonly [PgClient.PgClientConfig, RegExp]>
        ) {
          const error = yield* refused(server, client)
          assert.strictEqual(error._tag, "JobQueueError", String(reason))
          assert.propertyVal(error, "reason", "InsecureConnection")
          assert.match(error.message, reason)
          assert.match(error.message, /ssl: true.*sslmode=verify-full.*allowInsecure: true/)
        }
        assert.strictEqual(server.connections(), 0)
      }))
  }

  it.live("is opened when that is accepted: what is refused above is what it says", () =>
    Effect.gen(function*() {
      const server = yield* pretend({ tls: "N", asks: "cleartext" })
      const client = { url: urlOf(elsewhere, server.port, "?sslmode=prefer") }
      yield* Effect.timeoutOption(Effect.exit(start(client, { allowInsecure: true })), "3 seconds")
      assert.include(server.received(), password)
    }))

  it.live("is refused for directUrl, too", () =>
    Effect.gen(function*() {
      const server = yield* pretend({ tls: "N", asks: "cleartext" })
      const direct = { directUrl: urlOf(elsewhere, server.port) }
      const error = yield* refused(server, { url: urlOf("localhost", server.port) }, direct)
      assert.propertyVal(error, "reason", "InsecureConnection")
      assert.strictEqual(server.connections(), 0)
    }))

  it.live("is refused by layerConfig, too", () =>
    Effect.gen(function*() {
      const server = yield* pretend({ tls: "N", asks: "cleartext" })
      const layer = (allowInsecure: string) =>
        JobQueue.layerConfig({
          onUnavailable: Config.succeed("fail" as const),
          allowInsecure: Config.Boolean("INSECURE")
        })
          .pipe(
            Layer.provide(PgClient.layer({ url: urlOf(elsewhere, server.port) })),
            Layer.provide(ConfigProvider.layer(ConfigProvider.fromEnv({ env: { INSECURE: allowInsecure } })))
          )
      const error = yield* Effect.flip(Effect.scoped(Layer.build(layer("false"))))
      assert.propertyVal(error, "reason", "InsecureConnection")
      assert.strictEqual(server.connections(), 0)
      yield* Effect.timeoutOption(Effect.exit(Effect.scoped(Layer.build(layer("true")))), "3 seconds")
      assert.isAbove(server.connections(), 0)
    }))
})

describe("a connection that has to be encrypted", () => {
  for (
    const [what, pretence, reason] of [
      ["a server without TLS", { tls: "N" }, /does not support TLS/],
      ["a certificate signed by nobody", { tls: { cert: certificates.selfSigned } }, /DEPTH_ZERO_SELF_SIGNED_CERT/],
      ["an expired certificate", { tls: { cert: certificates.expired } }, /CERT_HAS_EXPIRED/],
      ["a certificate for another host", { tls: { cert: certificates.elsewhere } }, /ERR_TLS_CERT_ALTNAME_INVALID/]
    ] as ReadonlyArray<readonly [string, Pretence, RegExp]>
  ) {
    it.live(`is not made to ${what}`, () =>
      Effect.gen(function*() {
        const server = yield* pretend({ ...pretence, asks: "cleartext" })
        // As one configures an authority of one's own, and as the URL alone does it.
        for (
          const client of [
            { url: urlOf("localhost", server.port), ssl: { ca: certificates.authority } },
            { url: urlOf("localhost", server.port, "?sslmode=verify-full") },
            { url: urlOf("localhost", server.port, "?sslmode=require") },
            { url: urlOf("localhost", server.port), ssl: true }
          ]
        ) {
          const error = yield* refused(server, client)
          assert.strictEqual(error._tag, "SqlError")
          if (client.ssl !== true && client.ssl !== undefined) assert.match(inspect(error, { depth: 20 }), reason)
        }
        assert.isAbove(server.connections(), 0)
      }))
  }

  it.live("is made to the server that was meant", () =>
    Effect.gen(function*() {
      const server = yield* pretend({ tls: { cert: certificates.good }, asks: "cleartext" })
      const client = { url: urlOf("localhost", server.port), ssl: { ca: certificates.authority } }
      yield* Effect.timeoutOption(Effect.exit(start(client)), "3 seconds")
      assert.include(server.received(), password)
    }))
})

describe("a server that does not know the password", () => {
  for (const asks of ["scram", "scram-unfinished"] as const) {
    it.live(`is found out (${asks})`, () =>
      Effect.gen(function*() {
        const server = yield* pretend({ tls: "N", asks })
        const error = yield* refused(server, { url: urlOf("localhost", server.port) })
        assert.strictEqual(error._tag, "SqlError")
        assert.match(error.message, /SCRAM/)
        assert.include(server.received(), "SCRAM-SHA-256")
        // Authenticated it is not, and so no statement was sent.
        assert.notInclude(server.received(), "select")
      }))
  }
})

describe("local is only what cannot leave this machine", () => {
  const local = ["localhost", "LOCALHOST", "127.0.0.1", "127.255.0.9", "::1", "/run/postgresql", ""]
  const remote = [
    "db",
    "localhost.example.com",
    // Who asks a name server gets its answer.
    "db.localhost",
    "127.0.0.1.example.com",
    "127.1.evil",
    "127.0.0.1:5432",
    "xlocalhost",
    "0.0.0.0",
    "10.0.0.1",
    "::ffff:10.0.0.1",
    "2001:db8::1",
    "a,localhost"
  ]
  const by: ReadonlyArray<(host: string) => PgClient.PgClientConfig> = [
    (host) => ({ host }),
    (host) => ({ url: Redacted.make("postgres://elsewhere/app"), host }),
    (host) => ({ url: Redacted.make(`postgres://elsewhere/app?host=${encodeURIComponent(host)}`) })
  ]
  it("by every way to name a host", () => {
    for (const config of by) {
      for (const host of local) assert.isUndefined(Transport.problemOf(config(host), "the PgClient"), host)
      for (const host of remote) assert.isString(Transport.problemOf(config(host), "the PgClient"), host)
    }
    for (const authority of ["", "localhost:1", "[::1]:1", "%2Frun%2Fpostgresql", "a%40b@localhost"]) {
      assert.isUndefined(
        Transport.problemOf({ url: Redacted.make(`postgres://${authority}/app`) }, "the PgClient"),
        authority
      )
    }
    for (const authority of ["db", "[2001:db8::1]:1", "localhost@db", "local%68ost.db"]) {
      assert.isString(
        Transport.problemOf({ url: Redacted.make(`postgres://${authority}/app`) }, "the PgClient"),
        authority
      )
    }
    assert.isUndefined(Transport.problemOf({}, "the PgClient"))
    assert.isUndefined(Transport.problemOf({ host: "db", path: "/run/postgresql/.s.PGSQL.5432" }, "the PgClient"))
    // As in the driver, the last one wins.
    const twice = (a: string, b: string) =>
      Transport.problemOf({ url: Redacted.make(`postgres://db/app?sslmode=${a}&sslmode=${b}`) }, "the PgClient")
    assert.isString(twice("verify-full", "prefer"))
    assert.isUndefined(twice("prefer", "verify-full"))
  })
})
