/** A client that is not known to be a `PgClient`. */
import { PgClient } from "@effect/sql-pg"
import type { SqlClient } from "effect/sql"

/** The same client, as any other one on PostgreSQL. */
export const hidden = (client: PgClient.PgClient): SqlClient.SqlClient =>
  // Sound: it lacks nothing that a `SqlClient` has.
  new Proxy(client, {
    has: (target, key) => key !== PgClient.TypeId && key in target,
    get: (target, key) => key === PgClient.TypeId || key === "config" ? undefined : Reflect.get(target, key)
  }) as SqlClient.SqlClient
