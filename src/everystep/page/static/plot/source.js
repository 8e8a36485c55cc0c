// Curves of runs from the server.

import { addressOf, ask, withQuery } from "../shared/server.js";

/** Return the points of a run's loss or measurement, for `Curve`. */
export function serverCurves(run, query, { signal } = {}) {
  return ask(withQuery(addressOf(run, "curve"), query), { signal });
}
