// Requests to the server.

/** An error response; `status` 0: the server did not respond. */
export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** Return JSON from an address. `signal`: of an AbortController. */
export async function ask(address, { signal } = {}) {
  return (await answer(address, { signal })).json();
}

/** Return the numbers of a region of a tensor, and their description. */
export async function askNumbers(address, { signal } = {}) {
  const response = await answer(address, { signal });
  const about = JSON.parse(response.headers.get("Everystep-Tensor"));
  const bytes = await response.arrayBuffer();
  return { ...about, numbers: about.format === "float64" ? new Float64Array(bytes) : new Float32Array(bytes) };
}

/** Send a POST request; return its JSON. */
export async function tell(address, content, { method = "POST" } = {}) {
  const body = JSON.stringify(content ?? {});
  return (await answer(address, { method, body, headers: { "Content-Type": "application/json" } })).json();
}

/** Return a file from an address. */
export async function askFile(address, { signal } = {}) {
  return (await answer(address, { signal })).blob();
}

/** Return whether the server responds that there is nothing at an address. */
export async function isMissing(address) {
  const found = await answer(address, {}).catch((error) => error);
  await found.body?.cancel();
  return found.status === 404;
}

async function answer(address, options) {
  let response;
  try {
    response = await fetch(address, { credentials: "same-origin", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("the server does not respond; is `everystep view` still running?", 0);
  }
  if (response.ok) return response;
  const content = await response.json().catch(() => ({}));
  throw new ServerError(content.error ?? `the server returned ${response.status}`, response.status);
}

/** Return an API address of a run: of("two-layer-1", "steps", 137). */
export function addressOf(run, ...parts) {
  return ["/api/runs", encodeURIComponent(run), ...parts].join("/");
}

/** Return an address with a query, without null values. */
export function withQuery(address, query) {
  const given = Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== "");
  return given.length ? `${address}?${new URLSearchParams(given)}` : address;
}

/**
 * Listen to a stream of events; return a function that stops.
 *
 * After a break, the stream continues after the last event, or `after`. It pauses while the page is hidden, because a browser has few
 * connections to a server. `heard`: a function by name of event; `changed`: called with whether the server responds, and whether it has
 * ended the stream.
 */
export function listen(address, heard, changed = () => {}, { after = "" } = {}) {
  let source = null;
  let again = null;
  let last = after;
  const begin = () => {
    source = new EventSource(withQuery(address, { after: last }));
    for (const [name, hear] of Object.entries(heard)) {
      source.addEventListener(name, (event) => {
        if (event.data === undefined) return; // a break in the connection, which is an error, too
        last = event.lastEventId || last;
        hear(JSON.parse(event.data));
      });
    }
    source.addEventListener("open", () => changed(true));
    source.addEventListener("error", ({ data, target }) => {
      if (data !== undefined) return;
      // An answer without a stream would end it permanently, but the server may just be restarting.
      const hasEnded = target.readyState === EventSource.CLOSED;
      if (hasEnded) again = setTimeout(begin, 2000);
      changed(false, hasEnded);
    });
  };
  const rest = () => {
    clearTimeout(again);
    source?.close();
    source = null;
  };
  const wakeOrRest = () => {
    if (document.hidden) rest();
    else if (!source) begin();
  };
  document.addEventListener("visibilitychange", wakeOrRest);
  wakeOrRest();
  return () => {
    document.removeEventListener("visibilitychange", wakeOrRest);
    rest();
  };
}
