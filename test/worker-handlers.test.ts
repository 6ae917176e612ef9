/** What a handler has around it: its own context, a scope, a span, middleware; and which handler gets a job. */
import { PgClient } from "@effect/sql-pg"
import { assert, describe, it } from "@effect/vitest"
import {
  Context,
  DateTime,
  Deferred,
  Effect,
  Exit,
  Layer,
  Logger,
  Redacted,
  References,
  Schema,
  Scope,
  Tracer
} from "effect"
import { SqlClient } from "effect/sql"
import { Job, Worker } from "../src/index.ts"
import { makeDatabase } from "./support/database.ts"
import {
  allInPlace,
  assertRows,
  rows,
  running,
  tracing,
  until,
  untilAllEnded,
  untilValue,
  value,
  withQueue
} from "./support/queue.ts"

class Ping extends Job.make("ping") {}

class Name extends Context.Service<Name, string>()("effect-pgqueue/test/worker-handlers.test/Name") {}

describe("a handler", () => {
  it.live("knows its job", () =>
    withQueue(Effect.gen(function*() {
      class Task extends Job.make("task", { queue: "tasks", priority: "high", maxAttempts: 7 }) {}
      const infos: Array<Job.Info> = []
      const annotations: Array<unknown> = []
      yield* running(
        Worker.layer({ jobs: [Task] }).pipe(
          Layer.provide(Task.toLayer(() =>
            Effect.gen(function*() {
              infos.push(yield* Job.Current)
              annotations.push(yield* References.CurrentLogAnnotations)
            })
          ))
        )
      )
      const { id } = yield* Task.enqueue(undefined, { delay: 60, metadata: { tenant: "t" } })
      yield* untilAllEnded()
      const info = infos[0]!
      const [times] = yield* rows("select enqueued_at, scheduled_for from pgqueue.finished")
      assert.deepStrictEqual(
        {
          ...info,
          enqueuedAt: DateTime.toDate(info.enqueuedAt),
          scheduledFor: DateTime.toDate(info.scheduledFor),
          lastFailure: info.lastFailure._tag,
          progress: info.progress._tag
        },
        {
          id,
          kind: "task",
          queue: "tasks",
          priority: 2,
          attempt: 1,
          maxAttempts: 7,
          enqueuedAt: times.enqueued_at,
          scheduledFor: times.scheduled_for,
          metadata: { tenant: "t" },
          lastFailure: "None",
          progress: "None"
        }
      )
      assert.deepInclude(annotations[0], { "job.id": id, "job.kind": "task", "job.queue": "tasks", "job.attempt": 1 })
    })))

  it.live("has a scope that is closed when its run ends, before it is settled, however it ends", () =>
    withQueue(Effect.gen(function*() {
      const open = new Set<string>()
      const settledOpen: Array<number> = []
      class Scoped extends Job.make("scoped", { payload: { how: Schema.String }, timeout: 200 }) {}
      yield* running(
        Worker.layer({ jobs: [Scoped] }).pipe(
          Layer.provide(Scoped.toLayer(({ how }) =>
            Effect.gen(function*() {
              yield* Effect.acquireRelease(
                Effect.sync(() => open.add(how)),
                () => Effect.sync(() => open.delete(how))
              )
              if (how === "die") return yield* Effect.die(how)
              if (how === "cancel") return yield* Job.cancel(how)
              if (how === "time out") return yield* Effect.never
            })
          ))
        )
      )
      for (const how of ["succeed", "die", "cancel", "time out"]) {
        const { id } = yield* Scoped.enqueue({ how }, { maxAttempts: 1 })
        yield* untilValue("select count(*)::int from pgqueue.finished where id = $1::uuid", 1, { params: [id] })
        settledOpen.push(open.size)
      }
      assert.deepStrictEqual(settledOpen, [0, 0, 0, 0])
    })))

  it.live("has the context its layer was built in, and its own database, not the worker's", () =>
    withQueue(Effect.gen(function*() {
      const { name, url } = yield* makeDatabase()
      const seen: Array<string> = []
      const Handler = Ping.toLayer(() =>
        Effect.gen(function*() {
          const sql = yield* SqlClient.SqlClient
          const [row] = yield* sql<{ name: string }>`select current_database()::text as name`
          seen.push(row!.name, yield* Name)
        }).pipe(Effect.orDie)
      ).pipe(
        Layer.provide(PgClient.layer({ url: Redacted.make(Redacted.value(url)), maxConnections: 1 })),
        Layer.provide(Layer.succeed(Name, "handler's"))
      )
      yield* running(
        Worker.layer({ jobs: [Ping] }).pipe(Layer.provide(Handler), Layer.provideMerge(Layer.succeed(Name, "worker's")))
      )
      yield* Ping.enqueue()
      yield* untilAllEnded()
      assert.deepStrictEqual(seen, [name, "handler's"])
    })))

  it.live("is part of the enqueuer's trace", () =>
    withQueue(Effect.gen(function*() {
      const { spans, tracer } = tracing()
      yield* running(
        Worker.layer({ jobs: [Ping] }).pipe(Layer.provide(Ping.toLayer(() => Effect.withSpan(Effect.void, "inner"))))
      ).pipe(Effect.provideService(Tracer.Tracer, tracer))
      yield* Ping.enqueue().pipe(Effect.withSpan("request"), Effect.provideService(Tracer.Tracer, tracer))
      yield* untilAllEnded()
      yield* Ping.enqueue()
      yield* untilAllEnded()
      const named = (name: string) => spans.filter((span) => span.name === name)
      const [request] = named("request")
      const [first, second] = named("job ping")
      assert.strictEqual(first!.traceId, request!.traceId)
      assert.strictEqual((first!.parent as any).value.spanId, request!.spanId)
      assert.strictEqual(first!.kind, "consumer")
      assert.strictEqual((named("inner")[0]!.parent as any).value.spanId, first!.spanId)
      // Enqueued by nobody in particular: a trace of its own.
      assert.strictEqual(second!.parent._tag, "None")
      // Neither claims nor beats are in anybody's trace. What is done once an interval has one of its own.
      const names = spans.map(({ name }) => name).filter((name) => !name.startsWith("Maintenance."))
      assert.deepStrictEqual([...new Set(names)].toSorted(), ["inner", "job ping", "request"])
    })))

  it.live("has its own span, log annotations and scope, whatever is around its worker", () =>
    withQueue(Effect.gen(function*() {
      const log: Array<string> = []
      const seen: Array<Record<string, unknown>> = []
      const logged: Array<unknown> = []
      const closing = (what: string) => Effect.addFinalizer(() => Effect.sync(() => void log.push(`${what} closes`)))
      const logger = Logger.make(({ fiber, message }) => {
        const annotations = fiber.getRef(References.CurrentLogAnnotations)
        if (annotations["job.id"] !== undefined) logged.push([message, annotations])
      })
      const around = yield* Scope.make()
      const handler = Effect.gen(function*() {
        const span = yield* Effect.currentSpan
        const scope = yield* Scope.Scope
        yield* closing("the run")
        yield* Effect.annotateCurrentSpan("by", "handler")
        yield* Effect.log("from the handler")
        seen.push({
          span: span.name,
          parent: span.parent._tag,
          attempt: span.attributes.get("job.attempt"),
          annotations: yield* References.CurrentLogAnnotations,
          own: scope !== around
        })
      }).pipe(Effect.orDie)
      const surroundings = <A, E, R>(self: Effect.Effect<A, E, R>, what: string) =>
        self.pipe(
          Effect.annotateLogs({ what, "job.kind": "not mine", around: what }),
          Effect.withSpan(what, { attributes: { what } })
        )
      // The handler's layer and the worker, each inside a span, annotations and a scope.
      const Handler = Ping.toLayer(() => handler).pipe(
        Layer.provide(Layer.effectDiscard(closing("the handler's layer")))
      )
      const context = yield* surroundings(Layer.build(Handler), "handler's layer").pipe(Scope.provide(around))
      const layer = Worker.layer({ jobs: [Ping] }).pipe(
        Layer.provide(Layer.succeedContext(context)),
        Layer.provide(Logger.layer([logger]))
      )
      yield* surroundings(closing("around").pipe(Effect.andThen(running(layer))), "worker").pipe(
        Scope.provide(around)
      )
      const ids = [yield* Ping.enqueue(), yield* Ping.enqueue()].map(({ id }) => id)
      yield* untilAllEnded()
      // The scope of a run has been closed with it, and nothing else has.
      assert.deepStrictEqual(log, ["the run closes", "the run closes"])
      assert.sameDeepMembers(
        seen.map(({ annotations: { "job.id": id, ...annotations }, ...rest }: any) => ({ ...rest, id, annotations })),
        ids.map((id) => ({
          span: "job ping",
          parent: "None",
          attempt: 1,
          own: true,
          id,
          annotations: {
            "job.kind": "ping",
            "job.queue": "default",
            "job.attempt": 1,
            // As with everything else of its context, the handler's own wins over its worker's.
            what: "handler's layer",
            around: "handler's layer"
          }
        }))
      )
      assert.lengthOf(logged, 2)
      yield* Scope.close(around, Exit.void)
      assert.deepStrictEqual(log.slice(2).toSorted(), ["around closes", "the handler's layer closes"])
    })))

  it.live("may enqueue, also in a transaction of its own", () =>
    withQueue(Effect.gen(function*() {
      class Parent extends Job.make("parent", { payload: { depth: Schema.Number } }) {}
      yield* running(
        Worker.layer({ jobs: [Parent] }).pipe(
          Layer.provide(Parent.toLayer(({ depth }) =>
            Effect.gen(function*() {
              if (depth === 0) return
              const sql = yield* SqlClient.SqlClient
              yield* sql.withTransaction(Parent.enqueueAll([{ depth: depth - 1 }, { depth: depth - 1 }]))
            }).pipe(Effect.orDie)
          ))
        )
      )
      yield* Parent.enqueue({ depth: 7 })
      yield* untilAllEnded()
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.finished"), 2 ** 8 - 1)
    })))
})

describe("middleware", () => {
  it.live("that logs has something to say of each run, however it ends", () =>
    withQueue(Effect.gen(function*() {
      class End extends Job.make("end", { payload: { how: Schema.String }, timeout: "200 millis", maxAttempts: 1 }) {}
      const said: Array<string> = []
      const logger = Logger.make(({ message }) => void said.push(String(message)))
      yield* running(
        Worker.layer({ jobs: [End], middleware: [Worker.logged], concurrency: 1 }).pipe(
          Layer.provide(End.toLayer(({ how }) =>
            how === "completed" ? Effect.void : how === "failed" ? Effect.die("x") : Effect.never
          )),
          Layer.provide(Logger.layer([logger]))
        )
      )
      for (const how of ["completed", "failed", "stopped"]) {
        yield* End.enqueue({ how })
        yield* untilAllEnded()
        assert.match(
          said.findLast((text) =>
            text.startsWith("job end")
          ) ?? "",
          new RegExp(`^job end ${how} `)
        )
      }
    })))

  it.live("and handlers that return no Effect fail their attempt, and leave no transaction open", () =>
    withQueue(Effect.gen(function*() {
      class Untyped extends Job.make("untyped", { maxAttempts: 1 }) {}
      // What a program without types may do.
      const run = (async () => {}) as unknown as () => Effect.Effect<void>
      yield* running(
        Worker.layer({ jobs: [Untyped] }).pipe(Layer.provide(Untyped.toLayer(run, { transactional: true })))
      )
      yield* Untyped.enqueue()
      yield* untilAllEnded()
      const [ended] = yield* rows(
        "select status, error->>'tag' as tag, error->>'message' as message from pgqueue.finished"
      )
      assert.deepInclude(ended, { status: "discarded", tag: "Defect" })
      assert.match(ended.message, /returned no Effect/)
    })))

  it.live("wraps every run, outermost first, with what it requires", () =>
    withQueue(Effect.gen(function*() {
      const log: Array<string> = []
      const around = (name: string) =>
        Worker.middleware((run, job) =>
          Effect.gen(function*() {
            log.push(`${name} ${job.kind} ${yield* Name}`)
            return yield* Effect.ensuring(run, Effect.sync(() => log.push(`${name} ends`)))
          })
        )
      yield* running(
        Worker.layer({ jobs: [Ping], middleware: [around("outer"), around("inner"), Worker.logged] }).pipe(
          Layer.provide(Ping.toLayer(() => Effect.sync(() => void log.push("handler")))),
          Layer.provide(Layer.succeed(Name, "worker's"))
        )
      )
      yield* Ping.enqueue()
      yield* untilAllEnded()
      assert.deepStrictEqual(log, [
        "outer ping worker's",
        "inner ping worker's",
        "handler",
        "inner ends",
        "outer ends"
      ])
    })))

  it.live("that dies or refuses fails the attempt and not the worker", () =>
    withQueue(Effect.gen(function*() {
      let ran = 0
      yield* running(
        Worker.layer({
          jobs: [Ping],
          middleware: [Worker.middleware((run, job) => {
            if (job.metadata["bad"] !== undefined) throw new Error("middleware")
            return job.metadata["cancel"] === undefined ? run : Effect.andThen(Job.cancel("by middleware"), run)
          })]
        }).pipe(Layer.provide(Ping.toLayer(() => Effect.sync(() => void ran++))))
      )
      yield* Ping.enqueue(undefined, { metadata: { bad: "1" }, maxAttempts: 1 })
      yield* Ping.enqueue(undefined, { metadata: { cancel: "1" } })
      yield* Ping.enqueue()
      yield* untilAllEnded()
      yield* assertRows("select status, reason, error ->> 'tag' as tag from pgqueue.finished order by status", [
        { status: "cancelled", reason: "by middleware", tag: null },
        { status: "completed", reason: null, tag: null },
        { status: "discarded", reason: null, tag: "Defect" }
      ])
      assert.strictEqual(ran, 1)
    })))
})

describe("a job goes to", () => {
  const fields = { payload: { n: Schema.Number } }
  class Exact extends Job.make("report:daily", fields) {}
  class Reports extends Job.family("report:", fields) {}
  class Weekly extends Job.family("report:week", fields) {}

  const routed = Effect.sync(() => {
    const seen: Array<string> = []
    const to = (handler: string) => (payload: { readonly n: number }, kind?: string) =>
      Effect.map(Job.Current, (info) => void seen.push(`${handler} ${kind ?? info.kind} ${payload.n}`))
    return { seen, to }
  })

  it.live("the handler of its exact kind, else to the family with the longest prefix", () =>
    withQueue(Effect.gen(function*() {
      const { seen, to } = yield* routed
      yield* running(
        Worker.layer({ jobs: [Reports, Exact, Weekly], concurrency: 1 }).pipe(
          Layer.provide([Exact.toLayer(to("exact")), Reports.toLayer(to("family")), Weekly.toLayer(to("longer"))])
        )
      )
      const kinds = ["report:daily", "report:dailyx", "report:weekly", "report:week", "report:", "report:😀"] as const
      for (const [n, kind] of kinds.entries()) yield* Reports.of(kind).enqueue({ n })
      // Not of the family: a stranger's kind stays in line.
      yield* Job.make("reports", fields).enqueue({ n: 9 })
      yield* untilValue("select count(*)::int from pgqueue.finished", kinds.length)
      assert.deepStrictEqual(seen, [
        "exact report:daily 0",
        "family report:dailyx 1",
        "longer report:weekly 2",
        "longer report:week 3",
        "family report: 4",
        "family report:😀 5"
      ])
      yield* assertRows("select kind from pgqueue.ready", [{ kind: "reports" }])
    })))

  it.live("the handler that now has its old name", () =>
    withQueue(Effect.gen(function*() {
      const { seen, to } = yield* routed
      class Renamed extends Job.make("mail:send", { ...fields, aliases: ["email.send", "report:monthly"] }) {}
      yield* Job.make("email.send", fields).enqueue({ n: 1 })
      yield* Reports.of("report:monthly").enqueue({ n: 2 })
      yield* Renamed.enqueue({ n: 3 })
      yield* running(
        Worker.layer({ jobs: [Reports, Renamed], concurrency: 1 }).pipe(
          Layer.provide([Renamed.toLayer(to("renamed")), Reports.toLayer(to("family"))])
        )
      )
      yield* untilAllEnded()
      assert.deepStrictEqual(seen, ["renamed email.send 1", "renamed report:monthly 2", "renamed mail:send 3"])
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.finished where status = 'completed'"), 3)
    })))

  it.live("nobody when nobody has its kind: it waits untouched for somebody who does, and holds up no other", () =>
    withQueue(Effect.gen(function*() {
      class Stranger extends Job.make("stranger") {}
      yield* Stranger.enqueueAll(Array.from({ length: 500 }, () => undefined), { priority: "high" })
      yield* running(Worker.layer({ jobs: [Ping] }).pipe(Layer.provide(Ping.toLayer(() => Effect.void))))
      yield* Ping.enqueueAll(Array.from({ length: 200 }, () => undefined), { priority: "low" })
      yield* untilValue("select count(*)::int from pgqueue.finished where kind = 'ping'", 200)
      yield* assertRows("select attempt::int, rescued::int, count(*)::int as count from pgqueue.job group by 1, 2", [
        { attempt: 0, rescued: 0, count: 500 }
      ])
      yield* running(Worker.layer({ jobs: [Stranger] }).pipe(Layer.provide(Stranger.toLayer(() => Effect.void))))
      yield* untilAllEnded()
      yield* allInPlace
    })))
})

describe("a run", () => {
  it.live("never gets the same Info, scope or interruption as another", () =>
    withQueue(Effect.gen(function*() {
      const gate = yield* Deferred.make<void>()
      const waiting = new Set<string>()
      class Waits extends Job.make("waits", { payload: { stop: Schema.Boolean } }) {}
      yield* running(
        Worker.layer({ jobs: [Waits], concurrency: 20 }).pipe(
          Layer.provide(Waits.toLayer(({ stop }) =>
            Effect.gen(function*() {
              const { id } = yield* Job.Current
              yield* Effect.addFinalizer(() => Effect.sync(() => waiting.delete(id)))
              waiting.add(id)
              if (stop) return yield* Job.cancel(id)
              yield* Deferred.await(gate)
            })
          ))
        )
      )
      yield* Waits.enqueueAll(Array.from({ length: 20 }, (_, n) => ({ stop: n % 2 === 0 })))
      yield* untilValue(
        "select count(*)::int from pgqueue.finished where status = 'cancelled' and reason = id::text",
        10
      )
      yield* until("ten wait", Effect.sync(() => waiting.size === 10))
      yield* Deferred.succeed(gate, undefined)
      yield* untilAllEnded()
      assert.strictEqual(waiting.size, 0)
      assert.strictEqual(yield* value("select count(*)::int from pgqueue.finished where status = 'completed'"), 10)
    })))
})
