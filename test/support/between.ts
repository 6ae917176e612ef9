/** What every server that stands between clients and PostgreSQL has in common. */
import { Effect, type Scope } from "effect"
import type { Server } from "node:net"

/** Has a server listen in the current scope, at whose end `clear` ends its sessions; returns the URL of `target`, over it. */
export const listenBetween = Effect.fnUntraced(function*(
  server: Server,
  target: string,
  clear: () => void,
  address = "127.0.0.1"
): Effect.fn.Return<string, never, Scope.Scope> {
  yield* Effect.acquireRelease(
    Effect.callback<void>((resume) => {
      server.listen(0, address, () => resume(Effect.void))
    }),
    () =>
      Effect.sync(() => {
        clear()
        server.close()
      })
  )
  const bound = server.address()
  const url = new URL(target)
  url.hostname = address
  url.port = String(typeof bound === "object" && bound !== null ? bound.port : 0)
  return url.href
})
