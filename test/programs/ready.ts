import { flushCompileCache } from "node:module"

/** Tells the test that started this process that it is ready; the channel to it keeps nothing alive. */
export const ready = (): void => {
  // For those who come after: whoever is killed leaves nothing behind.
  flushCompileCache()
  process.send?.("ready")
  process.channel?.unref()
}
