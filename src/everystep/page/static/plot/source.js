// Where the curves of runs come from when a server is there.

import { addressOf, ask, withQuery } from "../shared/server.js";

/** Return the points of a run's loss, or of a measurement of it, as `Curve` asks for them. */
export function serverCurves(run, query, { signal } = {}) {
  return ask(withQuery(addressOf(run, "curve"), query), { signal });
}
