// Rows of the table from the server.

import * as address from "../shared/address.js";
import { addressOf, ask, withQuery } from "../shared/server.js";

/**
 * Return the source of a run's table.
 *
 * `page(wanted, {signal})`: {columns, total, filtered, start, left_out, rows}, of `wanted`: {sort, direction, first, last, low, high},
 * null if absent, and {start, length, around}, the step that must be on the page; `csv(wanted)`: the address of a file with all such rows;
 * `link(step)`: the address of a step.
 */
export function serverRows(run) {
  return {
    page: (wanted, options) => ask(withQuery(addressOf(run, "table"), wanted), options),
    csv: (wanted) => withQuery(addressOf(run, "losses.csv"), wanted),
    link: (step) => address.write({ view: "run", run, step }),
  };
}
