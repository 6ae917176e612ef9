/**
 * Whether what is sent to the database can be read or changed on its way there.
 *
 * @since 0.1.0
 */
import type * as PgClient from "@effect/sql-pg/PgClient"
import * as Predicate from "effect/Predicate"
import * as Redacted from "effect/Redacted"
import * as Net from "node:net"

/** What a connection URL says of the way, as the driver reads it. */
interface Address {
  readonly host: string | undefined
  readonly sslmode: string | undefined
}

/** `undefined` for what is no URL: the driver refuses it before it connects. */
const addressOf = (text: string): Address | undefined => {
  if (!URL.canParse(text)) return undefined
  const url = new URL(text)
  // As in the driver: the last parameter of a name wins, and `host` over the authority, where IPv6 is in brackets.
  const host = url.searchParams.getAll("host").at(-1) ??
    (/^\[.*\]$/.test(url.hostname) ? url.hostname.slice(1, -1) : decode(url.hostname))
  return { host: host === "" ? undefined : host, sslmode: url.searchParams.getAll("sslmode").at(-1) }
}

/** Percent-encoding that is none makes a name that is not local. */
const decode = (text: string): string => {
  try {
    return decodeURIComponent(text)
  } catch {
    return text
  }
}

/** Only what cannot leave this machine: a name that merely looks like an address is resolved by whoever answers for it. */
const isLocal = (host: string): boolean => {
  const name = host.toLowerCase()
  return name === "" || name === "localhost" || name.startsWith("/") || name === "::1" ||
    (Net.isIPv4(name) && name.startsWith("127."))
}

/** `require` and what is stronger verify the certificate and the name in it; `prefer` and `allow` go on without TLS. */
const verifying = new Set(["require", "verify-ca", "verify-full"])

/**
 * Returns why connections with these settings are not to be opened, or `undefined` when they may be. Holds no secret.
 *
 * **Details**
 *
 * Goes by the rules of the driver, whose default is no TLS at all: `ssl` wins over the URL's `sslmode`, `path` over `host`,
 * `host` over the URL. A `stream` of the application's own is its own affair. `of` names the settings in the message.
 */
export const problemOf = (config: PgClient.PgClientConfig, of: "the PgClient" | "directUrl"): string | undefined => {
  if (config.stream !== undefined || config.path !== undefined) return undefined
  const address = config.url === undefined ? undefined : addressOf(Redacted.value(config.url))
  const host = config.host ?? address?.host ?? "localhost"
  if (isLocal(host)) return undefined
  const verified = config.ssl === undefined
    ? address?.sslmode !== undefined && verifying.has(address.sslmode)
    : Predicate.isObject(config.ssl)
    ? config.ssl.rejectUnauthorized !== false
    : config.ssl
  if (verified) return undefined
  const now = config.ssl === undefined
    ? address?.sslmode === undefined ? "without TLS" : `with sslmode=${address.sslmode}`
    : config.ssl === false
    ? "with ssl: false"
    : "without verifying its certificate"
  return `The connection to the host ${
    JSON.stringify(host)
  } would be opened ${now}: whoever is on the way could read the password and every payload. ` +
    (of === "directUrl" && address?.sslmode !== undefined
      ? "Put sslmode=verify-full into directUrl, or leave it out there and give the PgClient ssl: true"
      : "Give the PgClient ssl: true, or { ca } for an authority of your own, or sslmode=verify-full in its URL") +
    "; or accept it with JobQueue.layer({ allowInsecure: true })."
}
