/** One statement on a connection of its own. */
import type pg from "pg"

/** Loads the driver only when asked: the memory of a worker that does not need it is measured, too. */
export const ask = async <Row extends pg.QueryResultRow>(
  url: string,
  text: string,
  values: ReadonlyArray<unknown> = []
): Promise<ReadonlyArray<Row>> => {
  const { Client } = await import("pg")
  const client = new Client({ connectionString: url })
  await client.connect()
  try {
    return (await client.query<Row>(text, [...values])).rows
  } finally {
    await client.end()
  }
}
