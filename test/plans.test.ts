/**
 * The plans of the hot statements: look-ups at any size, whatever the statistics say. One database with statistics of
 * empty tables that are then filled, one with fresh statistics; the settings are those of the queue's own connections.
 */
import { assert, layer } from "@effect/vitest"
import { Effect } from "effect"
import { SqlClient } from "effect/sql"
import * as Cleanup from "../src/Cleanup.ts"
import * as Database from "../src/Database.ts"
import * as Migrations from "../src/Migrations.ts"
import * as Settlement from "../src/Settlement.ts"
import * as Store from "../src/Store.ts"
import { databaseLayer } from "./support/database.ts"
import { entry, failure, jobs, keyed, uuid } from "./support/storage.ts"

interface Plan {
  readonly "Node Type": string
  readonly "Relation Name"?: string
  readonly "Index Name"?: string
  readonly "Index Cond"?: string
  readonly "Output"?: ReadonlyArray<string>
  readonly "Filter"?: string
  readonly "Actual Rows"?: number
  readonly "Actual Loops"?: number
  readonly "Shared Hit Blocks"?: number
  readonly "Shared Read Blocks"?: number
  readonly Plans?: ReadonlyArray<Plan>
}

const tables = ["job", "ready", "lease", "worker", "attempt", "finished", "archive", "unique_key", "parked"]
const firstId = "00000000-0000-0000-0000-000000000000"
/** Below this many pages a table is read at once for less than it costs to look anything up, and stays so. */
const smallTable = 64

const nodesOf = (plan: Plan): ReadonlyArray<Plan> => [plan, ...(plan.Plans ?? []).flatMap(nodesOf)]
/** The condition of an index scan; that of a bitmap scan is on its child. */
const condition = (plan: Plan): string =>
  plan["Index Cond"] ?? (plan["Node Type"] === "Bitmap Heap Scan" ? plan.Plans?.[0]?.["Index Cond"] : undefined) ?? ""
const reads = (plan: Plan) => (plan["Shared Hit Blocks"] ?? 0) + (plan["Shared Read Blocks"] ?? 0)
/** The least of three readings: whatever changes the catalog meanwhile has it read again. */
const leastOfThree = <E, R>(reading: Effect.Effect<number, E, R>) =>
  Effect.map(Effect.all([reading, reading, reading]), (all) => Math.min(...all))

/** A value in the text of a statement: what is executed by name takes no parameters. */
const literal = (value: unknown): string => {
  if (value === undefined || value === null) return "null"
  const text = Array.isArray(value)
    ? `{${value.map((one) => `"${String(one).replace(/["\\]/g, "\\$&")}"`).join(",")}}`
    : String(value)
  return `'${text.replaceAll("'", "''")}'`
}

/** A schema with its store, filled on the server. */
const open = Effect.fnUntraced(function*(schema: string) {
  const sql = yield* SqlClient.SqlClient
  const db = yield* Database.make(sql, { maxConnections: 2 })
  yield* Migrations.run(db.own, schema)
  const store = Store.make(db, schema)
  const query = <A extends object = Record<string, unknown>>(text: string, params: Array<unknown> = []) =>
    db.query<A>(text.replaceAll("$schema", schema), params)
  for (const table of tables) yield* query(`alter table $schema.${table} set (autovacuum_enabled = off)`)
  const analyze = query(`analyze ${tables.map((table) => `$schema.${table}`).join(", ")}`)

  const fill = (count: number) =>
    query(
      `with source as materialized (select gen_random_uuid() as id, i from generate_series(1, $1::int4) as i),
        job as (
          insert into $schema.job (id, kind, queue, priority, run_at, scheduled_for, max_attempts, unique_key, payload)
          select id, 'k', 'default', 5, now(), now(), 5, case when i % 10 = 0 then uuid_send(id) end,
            '{"to":"somebody@example.com","subject":"sixty bytes or so"}' from source
        ), line as (
          insert into $schema.ready (queue, lane, run_at, id, kind, attempt) select 'default', 5, now(), id, 'k', 0 from source
        ), keys as (
          insert into $schema.unique_key (key, job, until) select uuid_send(id), id, 'finished' from source where i % 10 = 0
        ), tried as (
          insert into $schema.attempt (job, n, tag) select id, 1, 'Failed' from source where i % 10 = 1
        ), old as (
          insert into $schema.archive (id, kind, queue, priority, status, attempt, max_attempts, rescued, snoozed, metadata,
            enqueued_at, scheduled_for, payload)
          select gen_random_uuid(), 'k', 'default', 5, 'completed', 1, 5, 0, 0, '{}', now(), now(), '{}' from source where i % 10 = 2
        )
        insert into $schema.finished (id, kind, queue, priority, status, attempt, max_attempts, rescued, snoozed, metadata,
          enqueued_at, scheduled_for, payload)
        select gen_random_uuid(), 'k', 'default', 5, case when i % 10 = 3 then 'discarded' else 'completed' end, 1, 5, 0, 0, '{}', now(),
          now(), '{}' from source`,
      [count]
    )

  /** Schedules, one in ten of them with ticks that wait, and one in a hundred due. */
  const fillSchedules = (count: number) =>
    query(
      `insert into $schema.schedule (name, spec, kind, overlap, unique_key, declared_at, next_at, last_job, waiting)
       select 'schedule ' || i, '* * * * *', 'k', 'queue', case when i % 10 = 3 then sha256(i::text::bytea) end, now(),
         now() + case when i % 100 = 0 then interval '-1 hour' else interval '1 hour' end, gen_random_uuid(),
         case when i % 10 = 0 then array[now()] else '{}' end
       from generate_series(1, $1::int4) i`,
      [count]
    )

  const explain = (text: string, params: ReadonlyArray<unknown>, options = "verbose") =>
    Effect.map(
      query<{ "QUERY PLAN": ReadonlyArray<{ Plan: Plan }> }>(`explain (format json, ${options}) ${text}`, [...params]),
      ([row]) => row!["QUERY PLAN"][0]!.Plan
    )

  /** As statements of the cleanup are planned. */
  const explainInOrder = (text: string, params: ReadonlyArray<unknown>, options = "verbose") =>
    store.apart(
      Effect.map(
        db.own.unsafe<{ "QUERY PLAN": ReadonlyArray<{ Plan: Plan }> }>(
          `explain (format json, ${options}) ${text.replaceAll("$schema", schema)}`,
          params
        ).unprepared,
        ([row]) => row!["QUERY PLAN"][0]!.Plan
      ),
      { inOrder: true }
    )

  /** As a session plans once what every job goes through: without a look at the values. */
  const explainOnce = Effect.fnUntraced(function*(
    text: string,
    params: ReadonlyArray<unknown> = [],
    options = "verbose"
  ) {
    const hot = (text: string) => db.hot.unsafe<any>(text).unprepared
    const count = Math.max(...[...text.matchAll(/\$(\d+)/g)].map(([, n]) => Number(n)))
    yield* hot(`prepare once as ${text}`)
    const values = Array.from({ length: count }, (_, n) => literal(params[n]))
    const [row] = yield* hot(`explain (format json, ${options}) execute once (${values.join(", ")})`)
    yield* hot("deallocate once")
    return row["QUERY PLAN"][0].Plan as Plan
  })

  const lanes = [2, 5, 8, 102, 105]
  const me = uuid()
  yield* store.register({ id: me, name: "plans", queues: ["default"], kinds: ["k"], prefixes: [], lease: 30_000 })
  const claim = (lease: string, limit: number, kinds = ["k"]) => ({
    worker: me,
    lease,
    queue: "default",
    lanes: lanes.map(Store.laneStart),
    kinds,
    prefixes: ["report:"],
    limit
  })
  const claimParams = (kinds: ReadonlyArray<string>) => [
    me,
    uuid(),
    "default",
    lanes,
    lanes.map(() => "-1"),
    lanes.map(() => firstId),
    kinds,
    ["report:"],
    100
  ]
  /** Claims four leases and returns a settlement of everything in them, all verbs. */
  const settlement = Effect.fnUntraced(function*(size: number) {
    const verbs = ["completed", "completed", "failed", "snoozed", "released", "discarded"] as const
    const all: Array<Settlement.Entry> = []
    for (let i = 0; i < 4; i++) {
      const lease = uuid()
      const rows = yield* store.claim(claim(lease, size / 4))
      all.push(...rows.map((row, i) => entry(lease, row.id, verbs[i % verbs.length]!, { delay: 1000, failure })))
    }
    assert.strictEqual(all.length, size)
    return all
  })
  return {
    schema,
    me,
    store,
    query,
    analyze,
    fill,
    fillSchedules,
    explain,
    explainInOrder,
    explainOnce,
    claimParams,
    lanes,
    settlement
  }
})

type Filled = Effect.Success<ReturnType<typeof open>>

/** Looks at the plans of all statements. */
const look = Effect.fnUntraced(function*(at: Filled) {
  const pages = new Map(
    (yield* at.query<{ name: string; pages: number }>(
      `select relname as name, (pg_relation_size(oid) / 8192)::int4 as pages from pg_class
       where relnamespace = '$schema'::regnamespace and relkind = 'r'`
    )).map((row) => [row.name, row.pages])
  )
  const small = (table: string) => (pages.get(table) ?? 0) < smallTable
  const { texts } = at.store
  const entries = yield* at.settlement(400)
  const plans: Record<string, Plan> = {}
  const explain = (name: string, text: string, params: ReadonlyArray<unknown>) =>
    Effect.map(at.explain(text, params), (plan) => {
      plans[name] = plan
    })

  for (const count of [1, 500]) {
    const columns = Store.columnsOf(jobs(count))
    yield* explain(`insert of ${count}`, texts.insert, columns)
    const unique = Array.from({ length: count }, (_, i) => keyed(`key ${i}`))
    yield* explain(`insertUnique of ${count}`, texts.insertUnique, Store.keyedColumnsOf(unique, 5))
    const three = [unique.map((job) => job.id), unique.map(() => "k"), unique.map((job) => job.unique!.key)]
    yield* explain(`holders of ${count}`, texts.holders, three)
    yield* explain(`expireKeys of ${count}`, texts.expireKeys, [...three.slice(1), "5"])
  }
  yield* explain("claim", texts.claim, at.claimParams(["k"]))
  yield* explain("claim of unknown kinds", texts.claim, at.claimParams(["nothing", "else"]))
  yield* explain("settle of 1", texts.settle, Settlement.columnsOf(at.me, entries.slice(0, 1)))
  yield* explain("settle of 400", texts.settle, Settlement.columnsOf(at.me, entries))
  const completed = entries.map((one) => entry(one.lease, one.id, "completed"))
  yield* explain("settle of 1 that completed", texts.complete, Settlement.columnsOf(at.me, completed.slice(0, 1)))
  yield* explain("settle of 400 that completed", texts.complete, Settlement.columnsOf(at.me, completed))
  yield* explain("rescue", texts.rescue, [100, firstId])
  yield* explain("release", texts.release, [at.me, [...new Set(entries.map((one) => one.lease))]])
  yield* explain("beat", texts.beat, [at.me])
  yield* explain("look", texts.look, [["default", "nothing"], at.lanes, ["10000000000000", "20"]])
  yield* explain("reap", texts.reap, ["", "", "0"])

  const idsOf = (table: string, count: number) =>
    Effect.map(
      at.query<{ id: string }>(`select id::text as id from $schema.${table} limit $1::int4`, [count]),
      (rows) => rows.map(({ id }) => id)
    )
  const waiting = (yield* idsOf("ready", 1))[0]!
  const ended = yield* idsOf("finished", 1000)
  const { id, lease } = entries[0]!
  for (const one of [waiting, id]) yield* explain(`lock of ${one}`, texts.lock, [one])
  yield* explain("cancel", texts.cancel, [waiting, "why"])
  for (const count of [1, 500]) yield* explain(`retry of ${count}`, texts.retry, [ended.slice(0, count), "discarded"])
  yield* explain("erase", texts.erase, [ended[0]])
  for (const kind of [null, "k"]) {
    yield* explain(`discarded of ${kind ?? "any kind"}`, texts.discarded, [
      kind,
      null,
      "-1",
      firstId,
      "4000000000000000",
      500
    ])
  }
  yield* explain("inspect", texts.inspect, [id])
  yield* explain("attempts", texts.attempts, [id])
  for (const count of [1, 1000]) yield* explain(`ends of ${count}`, texts.ends, [ended.slice(0, count)])
  yield* explain("awaits", texts.awaits, [id])
  yield* explain("progress", texts.progress, [lease, id, "1"])
  yield* explain("detach", texts.detach, [lease, id, uuid()])
  yield* explain("scatter", texts.scatter, [lease])
  yield* explain("park", texts.park, parkParams)
  yield* explain("unpark", texts.unpark, [at.me, parkedLanes, 2000])
  yield* explain("audit", texts.audit, [firstId, 5000])
  yield* explain("take", texts.take, ["cleanup", 1000, true])
  for (const ending of Cleanup.endings) {
    plans[`prune of ${ending}`] = yield* at.explainInOrder(texts.prune, [ending, 1000, "-1"])
  }
  plans["expire"] = yield* at.explainInOrder(texts.expire, [1000, "-1"])

  for (const [name, plan] of Object.entries(plans)) {
    const nodes = nodesOf(plan)
    const on = (table: string) => nodes.filter((n) => n["Relation Name"] === table && n["Node Type"] !== "ModifyTable")
    for (const table of ["job", "ready", "finished", "archive", "unique_key", "attempt"]) {
      for (const node of on(table)) {
        const where = `${name}: ${node["Node Type"]} on ${table}`
        if (small(table) && node["Node Type"] === "Seq Scan") continue
        // A page of the audit is 5 000 jobs, and of fewer pages than that a scan reads no more.
        if (name === "audit" && table === "job" && pages.get("job")! < 5000) continue
        assert.notStrictEqual(node["Node Type"], "Seq Scan", where)
        if (node["Node Type"] === "Tid Scan") continue
        if (table === "ready") {
          assert.match(node["Node Type"], /^Index (Only )?Scan$/, where)
          assert.strictEqual(node["Index Name"], "ready_pkey", where)
          // A short line is read as quickly without its lanes, and whether anything is parked has nothing to do with time.
          const wanted = small("ready") && /^(cancel|audit)/.test(name)
            ? /queue = .*run_at/
            : name === "unpark"
            ? /queue = .*lane = /
            : /queue = .*lane = .*run_at/
          assert.match(condition(node), wanted, where)
          if (name.startsWith("claim")) {
            assert.match(condition(node), /ROW\([\w.]*run_at, [\w.]*id\) > ROW.*run_at <= statement_timestamp/, where)
          }
        } else if (name.startsWith("discarded")) {
          // In order, or all of the discarded and sorted when there seem to be few; never the others.
          assert.match(condition(node), /status = .*finished_at/, where)
        } else if (name.startsWith("prune") && table === "finished") {
          assert.strictEqual(node["Node Type"], "Index Scan", where)
          assert.match(condition(node), /status = .*finished_at >= .*finished_at < /, where)
        } else if (name === "expire" && /expires_at/.test(condition(node))) {
          assert.match(condition(node), /expires_at >= .*expires_at <= statement_timestamp/, where)
        } else if (name === "audit" && table === "job") {
          assert.match(condition(node), /\bid > /, where)
        } else {
          const key = { job: "id", archive: "id", finished: "id", unique_key: "key", attempt: "job" }[table]!
          assert.match(condition(node), new RegExp(`\\b${key} = `), where)
        }
      }
    }
    if (name.startsWith("claim") && !small("ready")) {
      assert.strictEqual(
        on("ready").filter((node) => node["Node Type"] === "Tid Scan").length,
        1,
        `${name}: delete by ctid`
      )
    }
    if (/^(settle|rescue|release)/.test(name)) {
      const texts = nodes.flatMap((node) => [...(node.Output ?? []), node.Filter ?? ""])
      const memberships = texts.filter((text) => /\bIN\b|SubPlan/.test(text) && /hashed SubPlan/.test(text))
      assert.isNotEmpty(memberships, `${name}: membership by hash`)
    }
  }
  yield* at.store.release(at.me, [...new Set(entries.map((one) => one.lease))])
})

/** Looks at the plans that a session keeps: look-ups whatever the tables were like when they were made, empty or not. */
const lookOnce = Effect.fnUntraced(function*(at: Filled) {
  const names = [
    "claim",
    "complete",
    "completeForgotten",
    "completeKept",
    "expireKeys",
    "holders",
    "insert",
    "insertNew",
    "insertNewOne",
    "insertUnique",
    "replace",
    "settle"
  ] as const
  for (const name of names) {
    const text = at.store.texts[name]
    const nodes = nodesOf(yield* at.explainOnce(text))
    for (const node of nodes) {
      const table = node["Relation Name"]
      if (table === undefined || ["ModifyTable", "Tid Scan"].includes(node["Node Type"])) continue
      const where = `${name}, planned once: ${node["Node Type"]} on ${table}`
      assert.match(node["Node Type"], /^Index (Only )?Scan$/, where)
      const key =
        { job: "id", finished: "id", unique_key: "key", ready: "queue", lease: "id", worker: "id", attempt: "job" }[
          table
        ]
      assert.isDefined(key, where)
      assert.match(condition(node), new RegExp(`\\b${key} = `), where)
      if (table === "ready" && name === "claim") {
        assert.match(
          condition(node),
          /queue = .*lane = .*ROW\([\w.]*run_at, [\w.]*id\) > ROW.*run_at <= statement_timestamp/,
          where
        )
      }
    }
    if (/^(settle|complete)/.test(name)) {
      const texts = nodes.flatMap((node) => [...(node.Output ?? []), node.Filter ?? ""])
      assert.isNotEmpty(
        texts.filter((text) => /hashed SubPlan/.test(text)),
        `${name}, planned once: membership by hash`
      )
    }
  }
})

/** Looks at the plans of the statements of a scheduler. The table of schedules may be read whole only by who wants them all. */
const lookAtSchedules = Effect.fnUntraced(function*(at: Filled, analyzed: boolean) {
  const texts = at.store.texts.schedules
  const names = Array.from({ length: 500 }, (_, n) => `schedule ${n * 7 + 1}`)
  const rows = yield* at.query<{ next_at: string; updated_at: string; last_job: string }>(
    `select (extract(epoch from next_at) * 1000000)::int8::text as next_at, (extract(epoch from updated_at) * 1000000)::int8::text as updated_at,
      last_job::text as last_job from $schema.schedule where name = any ($1::text[]) order by array_position($1::text[], name::text)`,
    [names]
  )
  const column = (key: keyof typeof rows[number]) => rows.map((row) => row[key])
  const ticks = names.map(() => "1767225600000")
  const statements = {
    look: [texts.look, []],
    due: [texts.due, ["0", "", true, 500]],
    "due after one": [texts.due, ["1767225600000000", "schedule 5", false, 500]],
    fire: [texts.fire, [
      names,
      ticks,
      names,
      column("next_at"),
      column("updated_at"),
      column("last_job"),
      ticks,
      ticks,
      "200"
    ]],
    "fire of 1": [texts.fire, [
      names.slice(0, 1),
      ticks.slice(0, 1),
      names.slice(0, 1),
      column("next_at").slice(0, 1),
      column("updated_at").slice(0, 1),
      column("last_job").slice(0, 1),
      ticks.slice(0, 1),
      ticks.slice(0, 1),
      "200"
    ]],
    follow: [texts.follow, [names, column("last_job"), "200"]],
    backfill: [texts.backfill, [names.map(() => "schedule 8"), ticks, "schedule 8"]],
    trigger: [texts.trigger, ["schedule 8", uuid()]],
    expire: [texts.expire, [names]],
    declare: [texts.declare, [names.slice(0, 20), 1000]],
    disable: [texts.disable, ["schedule 8", "", "why"]],
    one: [texts.one, ["schedule 8"]],
    pause: [texts.pause, ["schedule 8"]]
  } as const
  for (const [name, [text, params]] of Object.entries(statements)) {
    const plan = yield* at.explain(text, params)
    for (const node of nodesOf(plan)) {
      const table = node["Relation Name"]
      if (table === undefined || node["Node Type"] === "ModifyTable" || node["Node Type"] === "Tid Scan") continue
      const where = `${name}: ${node["Node Type"]} on ${table}`
      if (["job", "ready", "finished", "unique_key"].includes(table)) {
        assert.notStrictEqual(node["Node Type"], "Seq Scan", where)
        assert.match(condition(node), /\b(id|key) = /, where)
      }
      // Without statistics, the few hundred pages of the schedules are read whole for what is due or waits: some 2 ms.
      const looked = analyzed
        ? /^(look|due|one|pause|disable|trigger|backfill)/
        : /^(one|pause|disable|trigger|backfill)/
      if (table === "schedule" && looked.test(name)) {
        assert.notStrictEqual(node["Node Type"], "Seq Scan", where)
      }
    }
    if (analyzed && ["look", "due", "fire", "follow", "expire"].includes(name)) {
      // Twice, because the first one reads the catalog.
      const options = "analyze, buffers, timing off"
      const count = Effect.fnUntraced(function*() {
        return reads(yield* at.explain(text, params, options))
      })
      yield* count()
      const most = { look: 5000, due: 2000, fire: 40_000, follow: 40_000, expire: 5000 }[name]!
      assert.isBelow(yield* count(), most, `buffers of ${name}`)
    }
  }
})

const parkedLanes = Store.priorityLanes.map((lane) => 200 + lane)
const parkParams = [[...Store.priorityLanes, ...Store.suspectLanes], 2000]

layer(databaseLayer({ maxConnections: 2 }), { excludeTestServices: true, timeout: "2 minutes" })("plans", (it) => {
  it.effect(
    "of a scheduler are look-ups with 10 000 schedules and 60 000 jobs, with the statistics of empty tables and with fresh ones",
    () =>
      Effect.scoped(Effect.gen(function*() {
        const at = yield* open("schedules")
        yield* at.query("alter table $schema.schedule set (autovacuum_enabled = off)")
        yield* at.query("analyze $schema.schedule")
        yield* at.analyze
        yield* at.fill(60_000)
        yield* at.fillSchedules(10_000)
        yield* lookAtSchedules(at, false)
        yield* at.query("analyze $schema.schedule")
        yield* at.analyze
        yield* lookAtSchedules(at, true)
      }))
  )

  it.effect(
    "are look-ups with fresh statistics: 1 000 and 60 000 jobs",
    () =>
      Effect.scoped(Effect.gen(function*() {
        const at = yield* open("fresh")
        yield* at.fill(1000)
        yield* at.analyze
        yield* look(at)
        yield* lookOnce(at)
        yield* at.fill(59_000)
        yield* at.analyze
        yield* look(at)
        yield* lookOnce(at)
      }))
  )

  it.effect(
    "are look-ups with the statistics of empty tables, and then with fresh ones: up to 1 000 000 jobs",
    () =>
      Effect.scoped(Effect.gen(function*() {
        const at = yield* open("stale")
        yield* lookOnce(at)
        yield* at.analyze
        yield* lookOnce(at)
        yield* at.fill(1000)
        yield* look(at)
        yield* lookOnce(at)
        yield* at.fill(59_000)
        yield* look(at)
        yield* at.fill(940_000)
        yield* look(at)
        yield* lookOnce(at)
        yield* bounded(at, false)
        yield* at.analyze
        yield* look(at)
        yield* lookOnce(at)
        yield* bounded(at, true)
      })),
    120_000
  )
})

/** What the statements really touch, with 1 000 000 jobs waiting. */
const bounded = Effect.fnUntraced(function*(at: Filled, fresh: boolean) {
  const analyzed = (text: string, params: ReadonlyArray<unknown>) =>
    at.explain(text, params, "analyze, buffers, timing off")
  /** As it is sent, in a session that has planned it once. */
  const analyzedOnce = (text: string, params: ReadonlyArray<unknown>) =>
    at.explainOnce(text, params, "analyze, buffers, timing off")
  for (const explained of [analyzed, analyzedOnce]) {
    const claim = Effect.suspend(() => Effect.map(explained(at.store.texts.claim, at.claimParams(["k"])), reads))
    assert.isBelow(yield* leastOfThree(claim), 8000, "buffers of a claim of 100")
  }
  const look = yield* analyzed(at.store.texts.look, [["default", "nothing"], at.lanes, ["10000000000000", "20"]])
  // A few pages a probe, and one for each row that the claims above have left dead at the front, where no vacuum has been:
  // 100 to 330 in all, and up to 3 300 when the catalog has to be read as well. A scan of the line reads over ten thousand.
  assert.isBelow(reads(look), 8000, "buffers of a look")

  const reading = Effect.fnUntraced(function*(text: string, params: ReadonlyArray<unknown>) {
    return reads(yield* analyzed(text, params))
  })
  // A page or two for each of the 2 000 rows at the front.
  const parking = reading(at.store.texts.park, parkParams)
  assert.isBelow(yield* leastOfThree(parking), 5000, "buffers of a look for what to park")
  yield* reading(at.store.texts.unpark, [at.me, parkedLanes, 2000])
  assert.isBelow(
    yield* reading(at.store.texts.unpark, [at.me, parkedLanes, 2000]),
    100,
    "buffers of nothing to bring back"
  )
  if (fresh) {
    for (const kind of [null, "k"]) {
      const page = [kind, null, "-1", firstId, "4000000000000000", 500]
      assert.isBelow(yield* reading(at.store.texts.discarded, page), 2000, "buffers of a page of the discarded")
    }
  }
  for (const ending of Cleanup.endings) {
    const prune = yield* at.explainInOrder(at.store.texts.prune, [ending, 1000, "-1"], "analyze, buffers, timing off")
    assert.isBelow(reads(prune), 1000, `buffers of a look for ${ending} jobs past their retention`)
  }
  // One probe of the line for each job.
  assert.isBelow(yield* reading(at.store.texts.audit, [firstId, 5000]), 50_000, "buffers of an audit of 5 000")

  const { completeForgotten, completeKept, settle } = at.store.texts
  const completed = (entries: ReadonlyArray<Settlement.Entry>) =>
    entries.map(({ id, lease }) => entry(lease, id, "completed"))
  const settles: Record<string, (entries: ReadonlyArray<Settlement.Entry>) => Effect.Effect<Plan, unknown>> = {
    "settle, planned each time": (entries) => analyzed(settle, Settlement.columnsOf(at.me, entries)),
    "settle, planned once": (entries) => analyzedOnce(settle, Settlement.columnsOf(at.me, entries)),
    "completeKept, planned once": (entries) =>
      analyzedOnce(completeKept, Settlement.keptColumnsOf(at.me, completed(entries), "", undefined)),
    "completeForgotten, planned once": (entries) =>
      analyzedOnce(completeForgotten, Settlement.forgottenColumnsOf(completed(entries)))
  }
  for (const [name, explained] of Object.entries(settles)) {
    const measured = Effect.fnUntraced(function*(count: number) {
      const plan = yield* explained(yield* at.settlement(count))
      for (const node of nodesOf(plan)) {
        const rows = (node["Actual Rows"] ?? 0) * (node["Actual Loops"] ?? 0)
        assert.isAtMost(rows, 50_000, `${node["Node Type"]} in a ${name} of ${count}`)
      }
      return reads(plan)
    })
    // The first one reads the catalog and warms the cache.
    yield* measured(500)
    const half = yield* measured(500)
    const whole = yield* measured(1000)
    assert.isBelow(whole, half * 3, `buffers of a ${name} of 1 000 beside one of 500`)
  }
})
