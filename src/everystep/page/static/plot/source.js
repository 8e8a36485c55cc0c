// Curves of runs from the server, and a plot of them next to an answer.

import { element } from "../shared/elements.js";
import { addressOf, ask, withQuery } from "../shared/server.js";

/** Return the points of a run's loss or measurement, for `Curve`. */
export function serverCurves(run, query, { signal } = {}) {
  return ask(withQuery(addressOf(run, "curve"), query), { signal });
}

/**
 * Plot the losses of runs next to an answer, which is shown even if the plot fails; return a function that ends it.
 *
 * `options`: of `LossPlot`.
 */
export function plotBeside(host, names, options) {
  let plot = null;
  let isClosed = false;
  const draw = ({ LossPlot }) => {
    if (!isClosed) plot = new LossPlot(host, names, { source: serverCurves, ...options });
  };
  const fail = ({ message }) => host.replaceChildren(element("p", { class: "alarm" }, `the losses cannot be drawn: ${message}`));
  import("./plot.js").then(draw).catch(fail);
  return () => {
    isClosed = true;
    plot?.close();
  };
}
