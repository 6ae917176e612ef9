/** Holds the rules listed in CONTRIBUTING.md against the sources. Every rule also proves on examples that it notices. */
import { execFileSync } from "node:child_process"
import { existsSync, readdirSync, readFileSync } from "node:fs"
import { basename, join } from "node:path"
import { assert, describe, it } from "vitest"
import { parseAst } from "vitest/node"

const root = join(import.meta.dirname, "..")

// ---------------------------------------------------------------------------
// Reading sources
// ---------------------------------------------------------------------------

/** A node of the syntax tree (ESTree); fields are looked at as they are needed. */
interface Node {
  readonly type: string
  readonly start: number
  readonly [field: string]: unknown
}

interface Source {
  readonly file: string
  readonly text: string
  readonly nodes: ReadonlyArray<Node>
  readonly imports: ReadonlyArray<Import>
}

interface Import {
  readonly from: string
  /** Erased at compile time. */
  readonly typeOnly: boolean
  /** Imported names; none for a namespace import, a re-export of everything or a dynamic import. */
  readonly names: ReadonlyArray<string>
  readonly node: Node
}

const isNode = (value: unknown): value is Node => typeof value === "object" && value !== null && "type" in value

const children = (value: unknown): Array<Node> =>
  Array.isArray(value) ? value.flatMap(children) : isNode(value) ? [value] : []

function* walk(node: Node): Generator<Node> {
  yield node
  for (const child of Object.values(node).flatMap(children)) yield* walk(child)
}

/** The name of an identifier, a string literal or the property of a member expression. */
const nameOf = (value: unknown): string | undefined => {
  if (!isNode(value)) return undefined
  if (value.type === "Identifier") return value["name"] as string
  if (value.type === "Literal") return String(value["value"])
  if (value.type === "MemberExpression") return nameOf(value["property"])
  return undefined
}

const parse = (file: string, text: string): Source => {
  const nodes = [...walk(parseAst(text, { lang: "ts" }) as unknown as Node)]
  return { file, text, nodes, imports: nodes.flatMap(importOf) }
}

function importOf(node: Node): Array<Import> {
  const source = isNode(node["source"]) ? node["source"]["value"] : undefined
  if (typeof source !== "string") return []
  const names = children(node["specifiers"]).flatMap((s) => nameOf(s["imported"] ?? s["local"]) ?? [])
  const typeOnly = node["importKind"] === "type" || node["exportKind"] === "type" || node.type === "TSImportType"
  return [{ from: source, typeOnly, names, node }]
}

const at = (source: Source, node: Node, what: string) =>
  `${source.file}:${source.text.slice(0, node.start).split("\n").length} ${what}`

const src = join(root, "src")
const paths = existsSync(src) ? readdirSync(src, { recursive: true, encoding: "utf8" }).toSorted() : []
const sources = paths.filter((path) => path.endsWith(".ts")).map((path) =>
  parse(path, readFileSync(join(src, path), "utf8"))
)

// ---------------------------------------------------------------------------
// Rules
// ---------------------------------------------------------------------------

interface Rule {
  readonly rule: string
  readonly violations: (sources: ReadonlyArray<Source>) => ReadonlyArray<string>
  /** Each of these projects breaks the rule. */
  readonly caught: ReadonlyArray<Readonly<Record<string, string>>>
  /** This one does not. */
  readonly allowed: Readonly<Record<string, string>>
}

const sqlFiles = [
  "Store.ts",
  "Claim.ts",
  "Insertion.ts",
  "Settlement.ts",
  "Inspection.ts",
  "Intervention.ts",
  "Upkeep.ts",
  "Schedules.ts",
  "Firing.ts",
  "Cleanup.ts",
  "Migrations.ts"
]
/** Runs the texts of the others, and holds none but what its own transactions begin with. */
const sqlRunner = "Database.ts"
const beginning = /^select pg_catalog\.set_config\(/
const pureFiles = ["Outcome.ts", "RetryPolicy.ts", "Ticks.ts", "Missed.ts"]
const producers = ["Job.ts", "JobQueue.ts", "Enqueue.ts"]

const statement = new RegExp(
  [
    "^\\s*select\\s",
    "insert\\s+into\\s",
    "^\\s*update\\s+\\S+\\s+(as\\s+\\w+\\s+|\\w\\s+)?set\\s",
    "^\\s*delete\\s+from\\s",
    "^\\s*with\\s+\\w+\\s*(\\([^)]*\\)\\s*)?as\\s",
    "^\\s*(create|alter|drop)\\s+(or\\s+replace\\s+)?(unique\\s+)?(table|index|schema|type|function|trigger|view|sequence)\\s",
    "^\\s*(truncate|vacuum|lock\\s+table|set\\s+(local|session|transaction))\\s",
    "^\\s*(begin|commit|rollback)\\s*;?\\s*$"
  ].join("|"),
  "i"
)

const sqlInOnePlace: Rule = {
  rule: `SQL only in ${sqlFiles.join(", ")}`,
  violations: (sources) =>
    sources.filter(({ file }) => !sqlFiles.includes(file)).flatMap((source) =>
      source.nodes.flatMap((node) => {
        if (node.type === "TaggedTemplateExpression" && nameOf(node["tag"]) === "sql") return at(source, node, "sql`…`")
        if (
          node.type === "CallExpression" && nameOf(node["callee"]) === "unsafe" && source.file !== sqlRunner
        ) return at(source, node, "unsafe(…)")
        const text = node.type === "Literal"
          ? node["value"]
          : node.type === "TemplateElement"
          ? (node["value"] as { readonly raw: string }).raw
          : undefined
        if (typeof text !== "string" || (source.file === sqlRunner && beginning.test(text))) return []
        return statement.test(text) ? at(source, node, "SQL text") : []
      })
    ),
  caught: [
    { "Worker.ts": "const claim = sql`delete from ready`" },
    { "Worker.ts": "const rows = sql<{ id: string }>`values (1)`" },
    { "Admin.ts": "client.sql`values (1)`" },
    { "Admin.ts": "sql.unsafe(text)" },
    { "Database.ts": "const claim = \"select id from ready\"" },
    { "Worker.ts": "const bound = \"select pg_catalog.set_config('a', 'b', true)\"" },
    { "Admin.ts": "run(\"SELECT 1 \")" },
    { "Admin.ts": "run(`update ${job} set x = 1`, `insert into ${job} values (1)`)" }
  ],
  allowed: {
    "Store.ts": "const ids = sql`select id from job`",
    "Database.ts":
      "const bound = \"select pg_catalog.set_config('a', 'b', true)\"; const query = (text) => sql.unsafe(text)",
    "Migrations.ts": "const ddl = \"create table job (id uuid)\"",
    "Worker.ts": "/** sql`select 1` in a comment */ const hint = \"begin with the selected rows of an update\""
  }
}

/** The names under which a text holds the quoted schema, or something made of it alone. */
const schemaNames = new Set(["s", "quoted", "table", "quotedSchema", "channel"])

/** What a template interpolates beside the schema. */
const interpolated = (template: Node): ReadonlyArray<Node> =>
  children(template["expressions"]).filter((expression) =>
    !(expression.type === "Identifier" && schemaNames.has(nameOf(expression)!))
  )

const isFunction = (node: Node) => /^(ArrowFunctionExpression|FunctionExpression|FunctionDeclaration)$/.test(node.type)

/** The text that a template or a literal begins with. */
const textOf = (node: Node): string | undefined => {
  if (node.type === "Literal") return typeof node["value"] === "string" ? node["value"] : undefined
  const first = node.type === "TemplateLiteral" ? children(node["quasis"])[0] : undefined
  return first === undefined ? undefined : (first["value"] as { readonly raw: string }).raw
}

const valuesAreBound: Rule = {
  rule: "values are bound: a verb writes nothing but the quoted schema into a statement",
  violations: (sources) =>
    sources.flatMap((source) => {
      const holdsSql = [...sqlFiles, sqlRunner].includes(source.file)
      // A verb is a function that is the member of an object. Whatever it is given is a value.
      const verbs = holdsSql
        ? source.nodes.filter((node) => node.type === "Property").flatMap((property) => children(property["value"]))
          .filter((value) => isFunction(value) || value.type === "CallExpression")
          .flatMap((value) => [...walk(value)].filter(isFunction))
        : []
      const templates = new Set(
        verbs.flatMap((verb) => [...walk(verb)]).filter(({ type }) => type === "TemplateLiteral")
      )
      return source.nodes.flatMap((node) => {
        if (node.type === "TemplateLiteral" && templates.has(node)) {
          return interpolated(node).map((expression) => at(source, expression, "in the text of a statement"))
        }
        if (node.type === "BinaryExpression" && node["operator"] === "+") {
          const text = children(node["left"]).map(textOf)[0]
          return text !== undefined && statement.test(text) ? at(source, node, "SQL text + …") : []
        }
        if (node.type !== "CallExpression" || !isNode(node["callee"])) return []
        if (node["callee"].type !== "MemberExpression") return []
        const callee = nameOf(node["callee"])
        if (callee === "literal") return at(source, node, "literal(…)")
        if (callee !== "unsafe") return []
        const text = children(node["arguments"])[0]!
        return text.type === "BinaryExpression" || (text.type === "TemplateLiteral" && interpolated(text).length > 0)
          ? at(source, node, "unsafe(…) of a text that is put together")
          : []
      })
    }),
  caught: [
    { "Admin.ts": "sql.literal(name)" },
    { "Store.ts": "const f = (name) => sql.unsafe(`select ${name}`)" },
    { "Store.ts": "const f = (name) => sql.unsafe(\"select \" + name)" },
    { "Store.ts": "const verbs = { get: (id) => db.query(`select from ${s}.job where id = '${id}'`) }" },
    {
      "Cleanup.ts":
        "const verbs = { get: Effect.fn(function*(one) { yield* run(`delete from ${s}.job where ${one.id}`) }) }"
    },
    { "Migrations.ts": "const text = \"select \" + name" }
  ],
  allowed: {
    "Store.ts": "const verbs = { get: (id) => db.query(`select from ${s}.job where id = $1`, [id]) }",
    "Claim.ts": "const statement = (s) => `select ${micros(\"run_at\")} from ${s}.job`",
    "Admin.ts": "const message = { of: (id) => `there is no ${id}` }",
    "Migrations.ts": "sql.unsafe(`create schema ${quoted}`)"
  }
}

const impureModules =
  /^(Clock|Config|Console|Deferred|FileSystem|Layer|Logger|ManagedRuntime|Metric|PubSub|Queue|Random|Ref|SynchronizedRef|Terminal|Tracer)$/
const impureMembers: Readonly<Record<string, RegExp>> = {
  Effect: /^(callback|delay|fork.*|log.*|promise|run(Promise|Fork|Callback).*|sleep|tryPromise)$/,
  DateTime: /^now/
}

const pure: Rule = {
  rule: `${pureFiles.join(", ")} are pure: values in, values out`,
  violations: (sources) =>
    sources.filter(({ file }) => pureFiles.includes(file)).flatMap((source) => [
      ...source.imports.filter(({ typeOnly }) => !typeOnly).flatMap(({ from, names, node }) => {
        const module = /^effect\/([A-Z]\w*)$/.exec(from)?.[1]
        const pureImport = from.startsWith("./")
          ? pureFiles.includes(from.slice(2))
          : from === "effect"
          ? !names.some((name) => impureModules.test(name))
          : module !== undefined && !impureModules.test(module)
        return pureImport ? [] : at(source, node, `imports ${[...names, "from", from].join(" ")}`)
      }),
      ...source.nodes.flatMap((node) => {
        if (node.type === "AwaitExpression") return at(source, node, "await")
        if (node.type !== "MemberExpression") return []
        const object = nameOf(node["object"]) ?? ""
        const member = nameOf(node["property"]) ?? ""
        return Object.hasOwn(impureMembers, object) && impureMembers[object]!.test(member)
          ? at(source, node, `${object}.${member}`)
          : []
      })
    ]),
  caught: [
    { "Outcome.ts": "import { insert } from \"./Store.ts\"" },
    { "Outcome.ts": "import { Clock } from \"effect\"" },
    { "Ticks.ts": "import * as Clock from \"effect/Clock\"" },
    { "Outcome.ts": "import * as Random from \"effect/Random\"" },
    { "RetryPolicy.ts": "import { SqlClient } from \"effect/sql\"" },
    { "RetryPolicy.ts": "import { readFileSync } from \"node:fs\"" },
    { "RetryPolicy.ts": "const at = DateTime.nowUnsafe()" },
    { "RetryPolicy.ts": "Effect.runFork(Effect.logInfo(\"retry\"))" }
  ],
  allowed: {
    "Outcome.ts":
      "import { Exit, Schedule } from \"effect\"; import type { Job } from \"./Job.ts\"; import * as R from \"./RetryPolicy.ts\"",
    "Worker.ts": "import { Clock } from \"effect\""
  }
}

/** Every module that a file loads at run time, directly or not. */
const loadedBy = (file: string, sources: ReadonlyArray<Source>, seen = new Set<string>()): ReadonlySet<string> => {
  const source = sources.find((source) => source.file === file)
  for (const { from, typeOnly } of source?.imports ?? []) {
    const target = basename(from)
    if (typeOnly || !from.startsWith("./") || seen.has(target)) continue
    seen.add(target)
    loadedBy(target, sources, seen)
  }
  return seen
}

const producersWithoutWorker: Rule = {
  rule: `producers (${producers.join(", ")}) do not import Worker.ts`,
  violations: (sources) =>
    producers.flatMap((file) => {
      const source = sources.find((source) => source.file === file)
      const directly = source?.imports.some(({ from }) => from === "./Worker.ts") === true
      if (directly) return [`${file} imports Worker.ts`]
      return loadedBy(file, sources).has("Worker.ts") ? [`${file} loads Worker.ts through another module`] : []
    }),
  caught: [
    { "Job.ts": "import { Worker } from \"./Worker.ts\"" },
    { "JobQueue.ts": "import type { Worker } from \"./Worker.ts\"" },
    { "Job.ts": "const worker = import(\"./Worker.ts\")" },
    { "JobQueue.ts": "export * from \"./Wakeup.ts\"", "Wakeup.ts": "import { Worker } from \"./Worker.ts\"" }
  ],
  allowed: {
    "Job.ts": "import type { Run } from \"./Run.ts\"",
    "Run.ts": "import { Worker } from \"./Worker.ts\"",
    "Worker.ts": "import { Job } from \"./Job.ts\""
  }
}

const ambientMembers = new Set(["Date.now", "Math.random", "process.env"])
const ambientFunctions = new Set(["setTimeout", "setInterval", "setImmediate"])

const nothingAmbient: Rule = {
  rule: "no Date.now, Math.random, setTimeout or process.env in src",
  violations: (sources) =>
    sources.flatMap((source) => [
      ...source.imports.flatMap(({ from, names, node }) =>
        /^(node:)?timers/.test(from) || (/^(node:)?process$/.test(from) && names.includes("env"))
          ? at(source, node, `import from ${from}`)
          : []
      ),
      ...source.nodes.flatMap((node) => {
        if (node.type === "MemberExpression") {
          const member = `${nameOf(node["object"])}.${nameOf(node["property"])}`
          return ambientMembers.has(member) ? at(source, node, member) : []
        }
        if (node.type === "CallExpression") {
          const callee = nameOf(node["callee"]) ?? ""
          return ambientFunctions.has(callee) ? at(source, node, callee) : []
        }
        if (node.type === "NewExpression") {
          const now = nameOf(node["callee"]) === "Date" && children(node["arguments"]).length === 0
          return now ? at(source, node, "new Date()") : []
        }
        if (node.type === "VariableDeclarator" && isNode(node["id"]) && nameOf(node["init"]) === "process") {
          const taken = children(node["id"]["properties"]).map((property) => nameOf(property["key"]))
          return taken.includes("env") ? at(source, node, "process.env") : []
        }
        return []
      })
    ]),
  caught: [
    { "Job.ts": "const t = Date.now()" },
    { "Job.ts": "const t = new Date()" },
    { "Job.ts": "xs.map(Math.random)" },
    { "Job.ts": "setTimeout(f, 1)" },
    { "Job.ts": "globalThis.setInterval(f, 1)" },
    { "Job.ts": "const url = globalThis.process?.env[\"X\"]" },
    { "Job.ts": "const { env } = process" },
    { "Job.ts": "import { setTimeout as sleep } from \"node:timers/promises\"" },
    { "Job.ts": "import { env } from \"node:process\"" }
  ],
  allowed: {
    "Job.ts": "/** Date.now() */ const day = new Date(0); const code = process.exitCode; const now = Clock.now()"
  }
}

const isDocumented = (source: Source, node: Node) => {
  const before = source.text.slice(0, node.start).trimEnd()
  return before.endsWith("*/") && before.slice(before.lastIndexOf("/*")).startsWith("/**")
}

/** The names a statement declares as values; types explain themselves. */
const declaredBy = (declaration: Node): Array<string> =>
  declaration.type === "VariableDeclaration"
    ? children(declaration["declarations"]).flatMap((declarator) => nameOf(declarator["id"]) ?? [])
    : /^(FunctionDeclaration|TSDeclareFunction|ClassDeclaration)$/.test(declaration.type)
    ? [nameOf(declaration["id"]) ?? "default"]
    : []

const documented: Rule = {
  rule: "every exported function, class and constant has a docstring",
  violations: (sources) =>
    sources.flatMap((source) => {
      const explained = new Set<string>()
      const exported = new Map<string, Node>()
      for (const node of source.nodes) {
        for (const name of declaredBy(node)) if (isDocumented(source, node)) explained.add(name)
        if (!/^Export(Named|Default)Declaration$/.test(node.type) || node["source"]) continue
        const names = isNode(node["declaration"])
          ? declaredBy(node["declaration"])
          : children(node["specifiers"])
            .filter((specifier) => specifier["exportKind"] !== "type" && node["exportKind"] !== "type")
            .flatMap((specifier) => {
              const name = nameOf(specifier["local"]) ?? []
              if (isDocumented(source, specifier)) return []
              return name
            })
        for (const name of names) {
          exported.set(name, node)
          if (isDocumented(source, node)) explained.add(name)
        }
      }
      return [...exported].filter(([name]) => !explained.has(name)).map(([name, node]) => at(source, node, name))
    }),
  caught: [
    { "Job.ts": "export const make = 1" },
    { "Job.ts": "/** a */\nexport function a() {}\nexport function b() {}" },
    { "Job.ts": "// not a docstring\nexport class Current {}" },
    { "Job.ts": "/* nor this */\nexport default function() {}" },
    { "Job.ts": "const catch_ = 1\nexport { catch_ as catch }" }
  ],
  allowed: {
    "Job.ts": [
      "/** a */\nexport function a(x: number): void\nexport function a(x: string): void\nexport function a() {}",
      "/** b */\nconst b = 1\nconst c = 2\nexport { b, /** c */ c }",
      "export type T = string\nexport interface I {}\nconst inside = 1"
    ].join("\n"),
    "index.ts": "export * as Job from \"./Job.ts\"; export { make } from \"./Job.ts\""
  }
}

const flat: Rule = {
  rule: "src is flat, and no module is a drawer for odds and ends",
  violations: (sources) =>
    sources.map(({ file }) => file).filter((file) =>
      /[/\\]/.test(file) || /^(utils?|helpers?|types|common|shared|misc)\.ts$/i.test(file)
    ),
  caught: [{ "store/claim.ts": "" }, { "utils.ts": "" }, { "Helpers.ts": "" }],
  allowed: { "Store.ts": "", "cli.ts": "", "index.ts": "" }
}

describe.each([sqlInOnePlace, valuesAreBound, pure, producersWithoutWorker, nothingAmbient, documented, flat])(
  "$rule",
  (rule) => {
    const project = (files: Readonly<Record<string, string>>) =>
      Object.entries(files).map(([file, text]) => parse(file, text))

    it("holds", () => {
      assert.deepStrictEqual([...rule.violations(sources)], [])
    })

    it("is noticed when broken", () => {
      for (const files of rule.caught) assert.isNotEmpty(rule.violations(project(files)), JSON.stringify(files))
      assert.deepStrictEqual([...rule.violations(project(rule.allowed))], [])
    })
  }
)

// ---------------------------------------------------------------------------
// Committed files
// ---------------------------------------------------------------------------

describe("no committed file names a place on somebody's machine", () => {
  const machinePath = new RegExp(`(^|[^\\w.@~-])/${"work"}/`)

  it("holds", ({ skip }) => {
    const listed = trackedFiles()
    if (listed === undefined) return skip("not a git checkout")
    const offenders = listed.filter((file) => machinePath.test(readFileSync(join(root, file), "utf8")))
    assert.deepStrictEqual(offenders, [])
  })

  it("is noticed when broken", () => {
    assert.match(`see /${"work"}/notes.md`, machinePath)
    assert.match(`"/${"work"}/notes.md"`, machinePath)
    assert.notMatch(`docs/${"work"}/notes.md, the network/${"work"}/load ratio, /${"work"}flows/ci.yml`, machinePath)
  })
})

function trackedFiles(): ReadonlyArray<string> | undefined {
  try {
    const output = execFileSync("git", ["ls-files", "-z"], { cwd: root, encoding: "utf8", stdio: "pipe" })
    return output.split("\0").filter((file) => file !== "" && existsSync(join(root, file)))
  } catch {
    return undefined
  }
}
