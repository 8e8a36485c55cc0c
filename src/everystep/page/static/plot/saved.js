// The plot of a saved report: that of the page, on the numbers that the table of the report holds.

import { lossPlot } from "./plot.js";

/** Draw the plot of the report that this stands in. */
export function begin() {
  const host = document.querySelector(".saved-plot");
  const { titles, columns } = JSON.parse(document.querySelector(".everystep-table script.rows").textContent);
  const [steps, ...texts] = columns;
  const measured = new Map(titles.slice(2).map((title, place) => [title, rowsWith(steps, texts[place + 1])]));
  const loss = rowsWith(steps, texts[0]);
  const source = async (run, { measurement = null }) => (measurement === null ? loss : measured.get(measurement));
  const plot = lossPlot(host, [host.dataset.run], { source, hasLoss: loss.total > 0 });
  plot.setMeasurements([...measured].map(([name, { total }]) => ({ name, count: total, is_rate: /^(.*\.)?lr(\[|$)/.test(name) })));
  window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => (each.open = true)));
}

// An empty cell of the table is a step without that number.
function rowsWith(steps, texts) {
  const rows = [...texts.keys()].filter((row) => texts[row] !== "");
  return { steps: rows.map((row) => steps[row]), values: rows.map((row) => texts[row]), total: rows.length };
}
