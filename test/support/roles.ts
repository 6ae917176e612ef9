/** The roles of docs/roles.sql. */
import { readFileSync } from "node:fs"
import { join } from "node:path"

const file = readFileSync(join(import.meta.dirname, "../../docs/roles.sql"), "utf8")

/** The statements of the file for a queue in this schema, one by one, as any client can send them. */
export const roleStatements = (schema = "pgqueue"): ReadonlyArray<string> =>
  file.replaceAll("pgqueue", schema).split(/(\$\w+\$[^]*?\$\w+\$)/).reduce<ReadonlyArray<string>>(
    (all, part, index) => {
      const pieces = index % 2 === 1 ? [part] : part.replaceAll(/^--.*$/gm, "").split(";")
      return [...all.slice(0, -1), (all.at(-1) ?? "") + pieces[0]!, ...pieces.slice(1)]
    },
    []
  ).filter((statement) => statement.trim() !== "")
