/** The types an application sees. The compiler is the test; what it must refuse is marked. */
// What must not compile is marked for the compiler; Effect's own diagnostics need not say it again.
// @effect-diagnostics missingEffectError:off missingEffectContext:off
import { Context, Cron, DateTime, Effect, type Exit, Layer, type Option, Schedule, Schema } from "effect"
import type { SqlClient, SqlError } from "effect/sql"
import { describe, expectTypeOf, it } from "vitest"
import { Admin, CronScheduler, Job, JobQueue, type JobQueueError, Worker } from "../src/index.ts"

class Bounced extends Schema.TaggedError<Bounced>()("Bounced", { address: Schema.String }) {}
class Down extends Schema.TaggedError<Down>()("Down", { code: Schema.Number }) {}
class Mailer extends Context.Service<Mailer, {
  readonly send: (to: string, subject: string) => Effect.Effect<string, Bounced>
}>()("effect-pgqueue/test/types.test/Mailer") {}
class Tenant extends Context.Service<Tenant, string>()("effect-pgqueue/test/types.test/Tenant") {}
class Other extends Context.Service<Other, string>()("effect-pgqueue/test/types.test/Other") {}
class Kms extends Context.Service<Kms, object>()("effect-pgqueue/test/types.test/Kms") {}

class SendEmail extends Job.make("email.send", {
  payload: { to: Schema.String, subject: Schema.String },
  error: Bounced,
  success: Schema.String,
  queue: "mail",
  priority: "high",
  maxAttempts: 5,
  timeout: "30 seconds",
  retry: Schedule.exponential("1 second").pipe(Schedule.jittered),
  unique: ({ to }) => `welcome:${to}`
}) {}
class Report extends Job.make("report", { payload: { day: Schema.Number } }) {}
class Ping extends Job.make("ping") {}
class Reports extends Job.family("report:", { payload: { day: Schema.Number }, queue: "reports" }) {}

// What only has to compile is never run.
const never = (body: () => unknown) => void body

describe("a definition", () => {
  it("keeps its literals", () => {
    expectTypeOf(SendEmail._tag).toEqualTypeOf<"email.send">()
    expectTypeOf(SendEmail.queue).toEqualTypeOf<"mail">()
    expectTypeOf(Ping.queue).toEqualTypeOf<"default">()
    expectTypeOf(Reports.prefix).toEqualTypeOf<"report:">()
    expectTypeOf(Reports.of("report:daily")._tag).toEqualTypeOf<"report:daily">()
    expectTypeOf<Schema.Schema.Type<typeof SendEmail.payloadSchema>>()
      .toEqualTypeOf<{ readonly to: string; readonly subject: string }>()
  })

  it("takes every form of retry", () => {
    Job.make("r1", {
      error: Schema.Union([Bounced, Down]),
      retry: { schedule: Schedule.exponential("1 second"), while: (e) => e._tag === "Down" && e.code !== 550 }
    })
    Job.make("r2", {
      error: Bounced,
      retry: Schedule.exponential("1 second").pipe(
        Schedule.setInputType<Job.Failure<Bounced>>(),
        Schedule.while(({ input }) => input._tag !== "Failed" || input.error.address !== "x"),
        Schedule.upTo({ duration: "1 day" }),
        Schedule.jittered
      )
    })
    Job.make("r3", { retry: Schedule.recurs(3) })
    Job.make("r4", {
      error: Bounced,
      retry: Schedule.min([Schedule.exponential("1 second"), Schedule.spaced("5 minutes")])
    })
    Job.make("r5", { error: Bounced, retry: { until: (e) => e.address === "x" } })
    Job.make("r6", { retry: Job.defaultSchedule })
    Job.make("r7", {
      error: Bounced,
      // @ts-expect-error the input of the schedule is another
      retry: Schedule.recurs(3).pipe(Schedule.setInputType<number>(), Schedule.while((m) => m.input > 1))
    })
    // @ts-expect-error not a field of the error
    Job.make("r8", { error: Bounced, retry: { while: (e) => e.code === 1 } })
  })

  it("refuses what is out of range", () => {
    // @ts-expect-error no such priority
    Job.make("p", { priority: 10 })
    // @ts-expect-error no such priority
    Job.make("p", { priority: "urgent" })
    // @ts-expect-error the key is computed from the payload
    Job.make("p", { payload: { a: Schema.String }, unique: ({ b }) => b })
  })
})

describe("enqueue", () => {
  it("needs the queue and what encodes, and tells its errors", () => {
    expectTypeOf(SendEmail.enqueue({ to: "a", subject: "b" }, {
      delay: "5 minutes",
      unique: { key: "x", period: "1 hour", until: "started", onConflict: "debounce" }
    })).toEqualTypeOf<Effect.Effect<Job.Enqueued, Job.EnqueueError | SqlError.SqlError, JobQueue>>()
    expectTypeOf(Report.enqueueAll([{ day: 1 }], (p) => ({ unique: String(p.day) })))
      .toEqualTypeOf<Effect.Effect<ReadonlyArray<Job.Enqueued>, Job.EnqueueError | SqlError.SqlError, JobQueue>>()
    expectTypeOf(Reports.of("report:daily").enqueue({ day: 1 }, { runAt: DateTime.makeUnsafe(0) }))
      .toEqualTypeOf<Effect.Effect<Job.Enqueued, Job.EnqueueError | SqlError.SqlError, JobQueue>>()
    expectTypeOf<Job.Enqueued["status"]>().toEqualTypeOf<"inserted" | "existing" | "replaced">()
  })

  it("may leave out what may be left out, and nothing else", () => {
    class AllOptional extends Job.make("all optional", { payload: { a: Schema.optionalKey(Schema.String) } }) {}
    never(() => [Ping.enqueue(), Ping.enqueue(undefined, { delay: 1 }), AllOptional.enqueue(), AllOptional.enqueue({})])
    never(() => [
      // @ts-expect-error a field is missing
      SendEmail.enqueue({ to: "a" }),
      // @ts-expect-error the payload is missing
      Report.enqueue(),
      // @ts-expect-error not of the family
      Reports.of("daily"),
      // @ts-expect-error another payload
      Report.enqueue({ day: "1" }),
      // @ts-expect-error an id can be that of one job only
      Report.enqueueAll([{ day: 1 }], { id: "x" }),
      // @ts-expect-error a plain string is no due time
      Report.enqueue({ day: 1 }, { runAt: "2030-01-01" })
    ])
  })

  it("is no callback of forEach: the index would be the options", () => {
    // @ts-expect-error see above
    never(() => Effect.forEach([{ day: 1 }], Report.enqueue))
  })

  it("can be destructured", () => {
    const { enqueue } = Report
    expectTypeOf(enqueue).parameter(0).toEqualTypeOf<{ readonly day: number }>()
  })
})

describe("execute and poll", () => {
  it("have the result and the error of the definition, and need what decodes them", () => {
    expectTypeOf(SendEmail.execute({ to: "a", subject: "b" }, { wait: "1 minute", priority: "high" })).toEqualTypeOf<
      Effect.Effect<string, Bounced | Job.ExecuteError | Job.EnqueueError | SqlError.SqlError, JobQueue>
    >()
    expectTypeOf(Ping.execute()).toEqualTypeOf<
      Effect.Effect<void, Job.ExecuteError | Job.EnqueueError | SqlError.SqlError, JobQueue>
    >()
    expectTypeOf(SendEmail.poll("from a route")).toEqualTypeOf<
      Effect.Effect<Option.Option<Exit.Exit<string, Bounced | Job.ExecuteError>>, SqlError.SqlError, JobQueue>
    >()
    const later = SendEmail.execute({ to: "a", subject: "b" }).pipe(
      Effect.catchTag("ExecuteError", ({ id }) => SendEmail.poll(id))
    )
    expectTypeOf<Effect.Services<typeof later>>().toEqualTypeOf<JobQueue>()
    const Secret = Schema.String as unknown as Schema.Codec<string, string, Kms, Other>
    class Sec extends Job.make("sec", { payload: { s: Secret }, success: Secret }) {}
    expectTypeOf<Effect.Services<ReturnType<typeof Sec.execute>>>().toEqualTypeOf<JobQueue | Kms | Other>()
    class AllOptional extends Job.make("all optional", { payload: { a: Schema.optionalKey(Schema.String) } }) {}
    never(() => [
      AllOptional.execute(),
      Ping.execute(undefined, { wait: "1 second" }),
      // @ts-expect-error a field is missing
      SendEmail.execute({ to: "a" }),
      // @ts-expect-error the payload is missing
      SendEmail.execute()
    ])
  })
})

describe("people's tools", () => {
  it("fail with Stale where they act", () => {
    expectTypeOf(Admin.cancel("x", { reason: "y" })).toEqualTypeOf<
      Effect.Effect<"cancelled" | "cancelling", Admin.Stale | SqlError.SqlError, JobQueue>
    >()
    expectTypeOf(Admin.retry("x")).toEqualTypeOf<Effect.Effect<void, Admin.Stale | SqlError.SqlError, JobQueue>>()
    expectTypeOf(Admin.delete("x")).toEqualTypeOf<Effect.Effect<void, Admin.Stale | SqlError.SqlError, JobQueue>>()
    expectTypeOf(Admin.redrive())
      .toEqualTypeOf<Effect.Effect<number, JobQueueError | SqlError.SqlError, JobQueue>>()
    expectTypeOf<Admin.FailedAttempt["tag"]>().toEqualTypeOf<Job.Failure<unknown>["_tag"]>()
    expectTypeOf(Admin.get("x"))
      .toEqualTypeOf<Effect.Effect<Option.Option<Admin.Details>, SqlError.SqlError, JobQueue>>()
  })
})

describe("a handler", () => {
  it("has its requirements in its layer, without its job and its scope", () => {
    const SendEmailHandler = SendEmail.toLayer(
      Effect.fn("SendEmail")(function*({ to, subject }) {
        const job = yield* Job.Current
        yield* Effect.acquireRelease(Effect.void, () => Effect.void)
        if (to === "x") return yield* Job.cancel("suppressed")
        if (to === "y") return yield* Job.discard("unknown")
        if (job.attempt > 2) return yield* Job.snooze("10 minutes")
        return yield* Effect.flatMap(Mailer, (m) => m.send(to, subject))
      })
    )
    expectTypeOf(SendEmailHandler).toEqualTypeOf<Layer.Layer<Job.Handler<"email.send">, never, Mailer>>()
    const built = Layer.unwrap(Effect.gen(function*() {
      const m = yield* Mailer
      return Report.toLayer(({ day }) => Effect.asVoid(Effect.orDie(m.send("a", String(day)))))
    }))
    expectTypeOf(built).toEqualTypeOf<Layer.Layer<Job.Handler<"report">, never, Mailer>>()
    const ReportsHandler = Reports.toLayer(({ day }, kind) => {
      expectTypeOf(kind).toEqualTypeOf<`report:${string}`>()
      return Effect.log(kind, day)
    })
    expectTypeOf(ReportsHandler).toEqualTypeOf<Layer.Layer<Job.FamilyHandler<"report:">>>()
  })

  it("succeeds and fails as its definition says", () => {
    never(() => [
      // @ts-expect-error the result is a string
      SendEmail.toLayer(() => Effect.succeed(1)),
      // @ts-expect-error the error is Bounced
      SendEmail.toLayer(() => new Down({ code: 1 })),
      // @ts-expect-error no typed error
      Ping.toLayer(() => Effect.fail("x")),
      SendEmail.toLayer(() => new Bounced({ address: "a" }))
    ])
  })

  it("may be transactional, which requires nothing more", () => {
    expectTypeOf(Report.toLayer(() => Effect.void, { transactional: true }))
      .toEqualTypeOf<Layer.Layer<Job.Handler<"report">>>()
    expectTypeOf(Reports.toLayer((_payload, kind) => Effect.log(kind), { transactional: true }))
      .toEqualTypeOf<Layer.Layer<Job.FamilyHandler<"report:">>>()
    never(() => [
      // @ts-expect-error no such option
      Report.toLayer(() => Effect.void, { transaction: true })
    ])
  })

  it("says how far it is with JSON, and nothing else", () => {
    expectTypeOf(Job.progress({ done: 1, of: [null, "x"] })).toEqualTypeOf<Effect.Effect<void, never, Job.Current>>()
    // @ts-expect-error not JSON
    never(() => Job.progress(new Map()))
  })

  it("can be stopped from anywhere without widening anything", () => {
    expectTypeOf(Job.cancel("x")).toEqualTypeOf<Effect.Effect<never, never, Job.Current>>()
    expectTypeOf(Job.discard("x")).toEqualTypeOf<Effect.Effect<never, never, Job.Current>>()
    expectTypeOf(Job.snooze("1 second")).toEqualTypeOf<Effect.Effect<never, never, Job.Current>>()
  })

  it("needs decoders, where a producer needs encoders", () => {
    const Secret = Schema.String as unknown as Schema.Codec<string, string, Kms, Other>
    class Sec extends Job.make("sec", { payload: { s: Secret }, success: Secret }) {}
    expectTypeOf<Effect.Services<ReturnType<typeof Sec.enqueue>>>().toEqualTypeOf<JobQueue | Other>()
    expectTypeOf<Layer.Services<ReturnType<typeof Sec.toLayer<never>>>>().toEqualTypeOf<Kms | Other>()
  })

  it("gets defaults, brands and classes", () => {
    const UserId = Schema.String.pipe(Schema.brand("UserId"))
    class Payload extends Schema.Class<Payload>("Payload")({
      id: UserId,
      n: Schema.Number.pipe(Schema.withConstructorDefault(Effect.succeed(1))),
      o: Schema.optionalKey(Schema.Date)
    }) {}
    class WithClass extends Job.make("with class", { payload: Payload }) {}
    never(() => [
      WithClass.enqueue({ id: UserId.make("u") }),
      WithClass.enqueue(new Payload({ id: UserId.make("u") })),
      WithClass.toLayer((p) => Effect.log(p.id satisfies typeof UserId.Type, p instanceof Payload, p.n.toFixed())),
      // @ts-expect-error not branded
      WithClass.enqueue({ id: "u" })
    ])
  })
})

describe("a schedule", () => {
  const nightly = CronScheduler.make("nightly", {
    cron: "0 3 * * *",
    timeZone: "Europe/Berlin",
    job: Report,
    payload: { day: 1 }
  })
  const ping = CronScheduler.make("ping", { cron: "* * * * *", job: Ping })
  const member = CronScheduler.make("f", { cron: "* * * * *", job: Reports.of("report:daily"), payload: { day: 2 } })

  it("has the payload of its job", () => {
    expectTypeOf(nightly).toEqualTypeOf<CronScheduler.Entry<never>>()
    never(() => [
      CronScheduler.make("n", { cron: "* * * * *", job: Ping, payload: undefined }),
      // @ts-expect-error another payload
      CronScheduler.make("n", { cron: "0 3 * * *", job: Report, payload: { day: "x" } }),
      // @ts-expect-error the payload is missing
      CronScheduler.make("n", { cron: "0 3 * * *", job: Report }),
      // @ts-expect-error a family is no job
      CronScheduler.make("n", { cron: "0 3 * * *", job: Reports, payload: { day: 1 } })
    ])
  })

  it("has a cron expression or an interval", () => {
    const cron = Cron.make({ minutes: [0], hours: [3], days: [], months: [], weekdays: [] })
    never(() => [
      CronScheduler.make("n", { cron, job: Ping }),
      CronScheduler.make("n", { cron: "@daily", timeZone: DateTime.zoneMakeOffset(0), job: Ping }),
      CronScheduler.make("n", { every: "15 minutes", job: Ping, missed: { all: 5 }, overlap: "queue", jitter: 500 }),
      // @ts-expect-error one of them
      CronScheduler.make("n", { job: Ping }),
      // @ts-expect-error not both
      CronScheduler.make("n", { cron: "* * * * *", every: "1 minute", job: Ping }),
      // @ts-expect-error an interval has no zone
      CronScheduler.make("n", { every: "1 minute", timeZone: "UTC", job: Ping }),
      // @ts-expect-error no such policy
      CronScheduler.make("n", { cron: "* * * * *", job: Ping, overlap: "maybe" }),
      // @ts-expect-error no such policy
      CronScheduler.make("n", { cron: "* * * * *", job: Ping, missed: "all" })
    ])
  })

  it("needs the queue, and what encodes its payload, where it is written", () => {
    const Secret = Schema.String as unknown as Schema.Codec<string, string, Kms, Other>
    class Sec extends Job.make("sec", { payload: { s: Secret } }) {}
    const secret = CronScheduler.make("s", { cron: "* * * * *", job: Sec, payload: { s: "x" } })
    expectTypeOf(secret).toEqualTypeOf<CronScheduler.Entry<Other>>()
    expectTypeOf(CronScheduler.schedule(secret)).toEqualTypeOf<
      Effect.Effect<void, Job.EnqueueError | SqlError.SqlError, JobQueue | Other>
    >()
    expectTypeOf(CronScheduler.schedule(ping)).toEqualTypeOf<
      Effect.Effect<void, Job.EnqueueError | SqlError.SqlError, JobQueue>
    >()
    expectTypeOf(CronScheduler.layer([nightly, secret])).toEqualTypeOf<
      Layer.Layer<never, Job.EnqueueError | JobQueueError | SqlError.SqlError, JobQueue | Other>
    >()
    const main = CronScheduler.layer([nightly, ping, member], { pollInterval: "2 seconds" })
    expectTypeOf<Layer.Services<typeof main>>().toEqualTypeOf<JobQueue>()
    const none = CronScheduler.layer([])
    expectTypeOf<Layer.Services<typeof none>>().toEqualTypeOf<JobQueue>()
  })

  it("is acted on with typed errors", () => {
    expectTypeOf(CronScheduler.pause("n")).toEqualTypeOf<
      Effect.Effect<void, CronScheduler.NoSuchSchedule | Job.EnqueueError | SqlError.SqlError, JobQueue>
    >()
    expectTypeOf(CronScheduler.trigger("n")).toEqualTypeOf<
      Effect.Effect<Job.Enqueued, CronScheduler.NoSuchSchedule | Job.EnqueueError | SqlError.SqlError, JobQueue>
    >()
    expectTypeOf(CronScheduler.list).toEqualTypeOf<
      Effect.Effect<ReadonlyArray<CronScheduler.Info>, SqlError.SqlError, JobQueue>
    >()
  })

  it("completes a program together with a worker", () => {
    const PgLive = Layer.empty as Layer.Layer<never> as unknown as Layer.Layer<SqlClient.SqlClient>
    const main = Layer.mergeAll(
      Worker.layer({ jobs: [Report, Reports] }),
      CronScheduler.layer([nightly, ping, member])
    ).pipe(
      Layer.provide([Report.toLayer(() => Effect.void), Reports.toLayer(() => Effect.void)]),
      Layer.provide(JobQueue.layer().pipe(Layer.provideMerge(PgLive)))
    )
    expectTypeOf<Layer.Services<typeof main>>().toEqualTypeOf<never>()
  })
})

describe("a worker", () => {
  const tenant = Worker.middleware((run, job) =>
    Effect.flatMap(Tenant, (t) => Effect.annotateLogs(run, { t, id: job.id }))
  )
  const worker = Worker.layer({
    jobs: [SendEmail, Report, Reports],
    queues: { mail: { concurrency: 10 }, default: {} },
    middleware: [Worker.logged, tenant]
  })

  it("requires a handler for every job it lists, and what its middleware needs", () => {
    expectTypeOf(tenant).toEqualTypeOf<Job.Middleware<Tenant>>()
    expectTypeOf(worker).toEqualTypeOf<
      Layer.Layer<
        never,
        JobQueueError | SqlError.SqlError,
        JobQueue | Tenant | Job.Handler<"email.send"> | Job.Handler<"report"> | Job.FamilyHandler<"report:">
      >
    >()
    const inline = Worker.layer({
      jobs: [SendEmail],
      middleware: [
        Worker.logged,
        (run, job) => Effect.flatMap(Tenant, (t) => Effect.annotateLogs(run, { t, id: job.id }))
      ]
    })
    expectTypeOf<Layer.Services<typeof inline>>().toEqualTypeOf<JobQueue | Job.Handler<"email.send"> | Tenant>()
    const mixed = Worker.layer({
      jobs: [SendEmail],
      middleware: [tenant, (run, _job) => Effect.andThen(Effect.flatMap(Other, Effect.log), run)]
    })
    expectTypeOf<Layer.Services<typeof mixed>>().toEqualTypeOf<
      JobQueue | Job.Handler<"email.send"> | Tenant | Other
    >()
    const plain = Worker.layer({ jobs: [Ping] })
    expectTypeOf<Layer.Services<typeof plain>>().toEqualTypeOf<JobQueue | Job.Handler<"ping">>()
    // A queue that is misspelt is found at start, not here.
    never(() => Worker.layer({ jobs: [SendEmail], queues: { mial: { concurrency: 1 } } }))
  })

  it("lets no middleware swallow or change a result", () => {
    never(() => [
      // @ts-expect-error another result
      Worker.middleware((_run, _job) => Effect.succeed(1)),
      // @ts-expect-error the failure is swallowed
      Worker.middleware((run) => Effect.ignore(run)),
      // @ts-expect-error another failure
      Worker.middleware((run) => Effect.mapError(run, () => "x"))
    ])
  })

  it("is complete when every handler is there, and not before", () => {
    const PgLive = Layer.empty as Layer.Layer<never> as unknown as Layer.Layer<SqlClient.SqlClient>
    const Queue = JobQueue.layer().pipe(Layer.provideMerge(PgLive))
    const SendEmailHandler = SendEmail.toLayer(() => Effect.succeed("sent"))
    const ReportHandler = Report.toLayer(() => Effect.void)
    const ReportsHandler = Reports.toLayer(() => Effect.void)
    const TenantLive = Layer.succeed(Tenant, "t")
    const main = worker.pipe(
      Layer.provide([SendEmailHandler, ReportHandler, ReportsHandler]),
      Layer.provide(TenantLive),
      Layer.provide(Queue)
    )
    expectTypeOf<Layer.Services<typeof main>>().toEqualTypeOf<never>()
    const missing = worker.pipe(
      Layer.provide([SendEmailHandler, ReportsHandler]),
      Layer.provide(TenantLive),
      Layer.provide(Queue)
    )
    never(() => Effect.runPromise(Layer.launch(main)))
    // @ts-expect-error nobody handles "report"
    never(() => Effect.runPromise(Layer.launch(missing)))
    const producer = Layer.effectDiscard(Ping.enqueue()).pipe(Layer.provide(Queue))
    expectTypeOf<Layer.Services<typeof producer>>().toEqualTypeOf<never>()
    const once = Worker.runUntilEmpty({ jobs: [Ping], limit: 100 }).pipe(
      Effect.provide(Layer.merge(Ping.toLayer(() => Effect.void), Queue))
    )
    expectTypeOf(once).toEqualTypeOf<
      Effect.Effect<{ readonly completed: number; readonly failed: number }, JobQueueError | SqlError.SqlError>
    >()
  })

  it("shows what a handler can know", () => {
    expectTypeOf<Job.Info["lastFailure"]>().toMatchTypeOf<{ readonly _tag: "None" | "Some" }>()
    expectTypeOf<Extract<Job.Failure<Bounced>, { _tag: "Failed" }>["error"]>().toEqualTypeOf<Bounced>()
    expectTypeOf<Job.Failure<never>["_tag"]>()
      .toEqualTypeOf<"Failed" | "Defect" | "TimedOut" | "Interrupted" | "Undecodable" | "Lost">()
  })
})
