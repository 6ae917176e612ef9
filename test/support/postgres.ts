/** Vitest's global setup: one PostgreSQL server for the whole run, its URL provided as `databaseUrl`. */
import type { TestProject } from "vitest/node"
import { startPostgres } from "./embedded.ts"

declare module "vitest" {
  interface ProvidedContext {
    readonly databaseUrl: string
  }
}

/** Uses the server at `DATABASE_URL` when it is set, and starts an embedded one otherwise. */
export default async function setup(project: TestProject): Promise<(() => Promise<void>) | undefined> {
  const url = process.env["DATABASE_URL"]
  if (url !== undefined && url !== "") {
    project.provide("databaseUrl", url)
    return undefined
  }
  const server = await startPostgres()
  project.provide("databaseUrl", server.url)
  return server.stop
}
