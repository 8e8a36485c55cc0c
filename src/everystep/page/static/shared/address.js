// The address of the current place, and navigation; Back and Forward work.
//
// A place: {view: "runs", sort, direction}, {view: "run", run, step, phase, operation, open: [keys], sort, direction, line,
// log, smooth, overlay: [names]} (`open`: what is unfolded in the step; how the table is sorted and the plot is drawn; null: the default),
// {view: "overlay", runs: [names]} or {view: "compare", one, other}.

/** Servers refuse longer addresses, as of several hundred open tensors. */
const MOST_OPEN = 200;

const watchers = new Set();

/** Return the place that an address shows. */
export function read(address = location.href) {
  const { pathname, searchParams } = new URL(address, location.origin);
  const whole = (name) => (/^\d+$/.test(searchParams.get(name) ?? "") ? Number(searchParams.get(name)) : null);
  const sorted = { sort: searchParams.get("sort"), direction: searchParams.get("direction") };
  const [, first, name] = pathname.split("/");
  if (first === "runs" && name) {
    return {
      view: "run",
      run: decoded(name),
      step: whole("step"),
      phase: searchParams.get("phase"),
      operation: whole("operation"),
      open: searchParams.getAll("open"),
      ...sorted,
      line: whole("line"),
      log: whole("log"),
      smooth: Math.min(Math.max(Number(searchParams.get("smooth")) || 0, 0), 0.99) || null,
      overlay: searchParams.getAll("overlay"),
    };
  }
  if (first === "overlay") return { view: "overlay", runs: searchParams.getAll("run") };
  if (first === "compare") {
    const [one = null, other = null] = searchParams.getAll("run");
    return { view: "compare", one: searchParams.get("one") ?? one, other: searchParams.get("other") ?? other };
  }
  return { view: "runs", ...sorted };
}

// An invalid name stays unchanged: the server reports that there is no such run.
function decoded(name) {
  try {
    return decodeURIComponent(name);
  } catch {
    return name;
  }
}

/** Return the address of a place. */
export function write(place) {
  const { view, run, runs = [], step, phase, operation, open = [], sort, direction, line, log, smooth, overlay = [], one, other } = place;
  const query = new URLSearchParams();
  const sorted = { sort, direction };
  const given = { compare: { one, other }, run: { step, phase, operation, ...sorted, line, log, smooth }, runs: sorted }[view] ?? {};
  for (const [key, value] of Object.entries(given)) {
    if (value !== null && value !== undefined) query.set(key, value);
  }
  if (view === "run") open.slice(-MOST_OPEN).forEach((key) => query.append("open", key));
  if (view === "run") overlay.forEach((name) => query.append("overlay", name));
  runs.forEach((name) => query.append("run", name));
  const path = { runs: "/", overlay: "/overlay", run: `/runs/${encodeURIComponent(run)}`, compare: "/compare" }[view];
  return query.size ? `${path}?${query}` : path;
}

/** Go to a place; `replace`: without a new history entry (stepping quickly). */
export function go(place, { replace = false } = {}) {
  const address = write(place);
  if (address !== location.pathname + location.search) history[replace ? "replaceState" : "pushState"](null, "", address);
  tellAll();
}

/** Call a function with the current place whenever it changes; return a function that stops. */
export function watch(changed) {
  watchers.add(changed);
  return () => watchers.delete(changed);
}

/** Follow internal links without reloading the page, and listen to Back and Forward. */
export function begin() {
  window.addEventListener("popstate", tellAll);
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.("a[href]");
    if (!link || event.defaultPrevented || event.button || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
    if (link.origin !== location.origin || link.target || link.hasAttribute("download") || link.pathname.startsWith("/api/")) return;
    if (link.getAttribute("href").startsWith("#")) return;
    event.preventDefault();
    go(read(link.href));
  });
}

function tellAll() {
  const place = read();
  for (const changed of [...watchers]) changed(place);
}
