/** One worker process of the demo. `main.ts` starts two of them. */
import { PgClient } from "@effect/sql-pg"
import { Config, Effect, Layer, Random } from "effect"
import { CronScheduler, Job, JobQueue, Worker } from "../../src/index.ts"
import * as jobs from "./jobs.ts"
import { Ledger } from "./ledger.ts"

/** Handlers sleep where a real one would wait for a server. */
const work = Effect.fnUntraced(function*(from: number, to: number) {
  const { started } = yield* Ledger
  yield* started
  yield* Effect.sleep(yield* Random.nextIntBetween(from, to))
})

const Handlers = Layer.mergeAll(
  jobs.ConfirmOrder.toLayer(() => work(5, 15)),
  jobs.SendEmail.toLayer(() => work(20, 40)),
  jobs.ResizeImage.toLayer(() => work(60, 120)),
  jobs.SendReminder.toLayer(() => work(5, 15)),
  jobs.DeliverWebhook.toLayer(
    Effect.fn("DeliverWebhook")(function*({ url }) {
      yield* work(10, 30)
      const { attempt } = yield* Job.Current
      if (attempt < 3) return yield* new jobs.Unreachable({ url })
    })
  ),
  jobs.PrintInvoice.toLayer(({ invoice }) =>
    Effect.andThen(work(5, 15), Effect.die(new Error(`no printer for invoice ${invoice}`)))
  ),
  jobs.CountStock.toLayer(() => work(5, 15)),
  jobs.Ping.toLayer(() => Effect.flatMap(Ledger, ({ started }) => started))
)

// The parent holds the other end of stdin; when the parent is gone, however it ended, stdin is closed.
process.stdin.resume().once("close", () => process.kill(process.pid, "SIGTERM"))

// #region main
const PgLive = PgClient.layerConfig({ url: Config.Redacted("DATABASE_URL") })
const QueueLive = JobQueue.layer({ schema: jobs.schema, migrate: false }).pipe(Layer.provideMerge(PgLive))

const WorkerLive = Worker.layer({
  jobs: [
    jobs.ConfirmOrder,
    jobs.SendEmail,
    jobs.ResizeImage,
    jobs.SendReminder,
    jobs.DeliverWebhook,
    jobs.PrintInvoice,
    jobs.CountStock,
    jobs.Ping
  ],
  queues: { default: { concurrency: 20 }, mail: { concurrency: 10 }, pings: { concurrency: 50 } },
  gracePeriod: "5 seconds"
}).pipe(
  Layer.provide(Handlers),
  Layer.provide(Ledger.layer)
)

const Main = Layer.merge(WorkerLive, CronScheduler.layer([jobs.everySecond])).pipe(Layer.provide(QueueLive))

Worker.runMain(Layer.launch(Main))
// #endregion
