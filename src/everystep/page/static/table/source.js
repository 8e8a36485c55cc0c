// Where the rows of the table come from when a server is there.

import * as address from "../shared/address.js";
import { addressOf, ask, withQuery } from "../shared/server.js";

/**
 * Return what the table asks a server for, of a run.
 *
 * `page(wanted, {signal})`: {columns, total, filtered, start, left_out, rows}, of `wanted`: {sort, direction, first, last, low, high},
 * null where not wanted, and {start, length, around}, the step that is to be on the page; `csv(wanted)`: the address of a file with all
 * such rows; `link(step)`: the address of a step.
 */
export function serverRows(run) {
  return {
    page: (wanted, options) => ask(withQuery(addressOf(run, "table"), wanted), options),
    csv: (wanted) => withQuery(addressOf(run, "losses.csv"), wanted),
    link: (step) => address.write({ view: "run", run, step }),
  };
}
