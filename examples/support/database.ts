/**
 * Imported first by every example: without `DATABASE_URL` it starts a throw-away PostgreSQL, which needs no Docker and
 * is gone when the process ends, and sets `DATABASE_URL` to it. With it, the examples use the schema `pgqueue` there.
 */
import { startPostgres } from "../../test/support/embedded.ts"

if ((process.env["DATABASE_URL"] ?? "") === "") {
  const server = await startPostgres()
  process.env["DATABASE_URL"] = server.url
}
