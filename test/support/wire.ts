/** What goes over the wire between a client and PostgreSQL, as far as proxies need to know. */

/** A request: the text of its statement and its parameters as they were sent. */
export interface Request {
  readonly text: string
  readonly params: string
}

/** Reads what a client sends: the requests that are complete with each chunk, prepared ones with their text. */
export const readRequests = (): (chunk: Buffer) => ReadonlyArray<Request> => {
  const prepared = new Map<string, string>()
  let rest: Buffer = Buffer.alloc(0)
  let greeted = false
  let request: Request | undefined
  return (chunk) => {
    rest = rest.length === 0 ? chunk : Buffer.concat([rest, chunk])
    const complete: Array<Request> = []
    while (true) {
      // What a session begins with has no type.
      const head = greeted ? 1 : 0
      if (rest.length < head + 4) break
      const end = head + rest.readInt32BE(head)
      if (rest.length < end) break
      const type = greeted ? String.fromCharCode(rest[0]!) : ""
      const body = rest.subarray(head + 4, end)
      rest = rest.subarray(end)
      const string = (from: number) => body.toString("latin1", from, body.indexOf(0, from))
      switch (type) {
        case "":
          // The question for encryption is not the beginning yet.
          greeted = body.readInt32BE(0) !== 80_877_103
          break
        case "P":
          prepared.set(string(0), string(string(0).length + 1))
          break
        case "B":
          request = {
            text: prepared.get(string(string(0).length + 1)) ?? "",
            params: body.toString("latin1")
          }
          break
        case "Q":
          complete.push({ text: string(0), params: "" })
          break
        case "S":
          if (request !== undefined) complete.push(request)
          request = undefined
          break
      }
    }
    return complete
  }
}

/** The state that ReadyForQuery tells at the end of an answer. */
const stateOf = (chunk: Buffer) => chunk.at(-6) === 0x5a ? String.fromCharCode(chunk.at(-1)!) : ""

/** An answer ends, also within a transaction. */
export const endsAnswer = (chunk: Buffer) => /[ITE]/.test(stateOf(chunk))

/** An answer ends, and no transaction is open: by now the server has committed, or rolled back. */
export const endsTransaction = (chunk: Buffer) => stateOf(chunk) === "I"

/** What the queue's statements are known by, wherever a test waits for one, cuts it or counts it. */
export const statements = {
  enqueue: `insert into "pgqueue".job (`,
  claim: "array_agg(id) from picked",
  settle: "as i(lease, id, ",
  /** The short form, where everything has completed. */
  complete: "as i(lease, id, result, ran, age",
  tick: "moved as ("
}
