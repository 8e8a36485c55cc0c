// A saved report: the plot and the table of the page, with the numbers in the report.

import { pointsBetween } from "../plot/curves.js";
import { LossPlot } from "../plot/plot.js";
import { StepTable } from "../table/table.js";
import { savedRows } from "./rows.js";

/** Draw the plot and the table of this report. */
export function begin() {
  const [host, place] = document.querySelectorAll(".saved-plot, .saved-table");
  const held = JSON.parse(document.querySelector("script.losses").textContent);
  const step = chosenStep();
  const plot = plotOf(host, held, step);
  const table = new StepTable(place, savedRows(held), { step, goTo: choose });
  onChosen((chosen) => [plot, table].forEach((each) => each.setStep(chosen)));
  window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => (each.open = true)));
}

function plotOf(host, { name, titles, columns }, step) {
  const curves = new Map(titles.map((title, place) => [title, rowsWith(columns[0], columns[place])]));
  const hasLoss = curves.has("loss");
  if (!hasLoss) curves.set("loss", rowsWith(columns[0], columns[0].map(() => null)));
  const source = async (run, { measurement, first, last }) => pointsBetween(curves.get(measurement ?? "loss"), { first, last });
  const measured = [...curves].filter(([title]) => title !== "step" && title !== "loss");
  const plot = new LossPlot(host, [name], { source, step, goTo: choose, walks: true, hasLoss });
  plot.setMeasurements(measured.map(([title, { steps }]) => ({ name: title, count: steps.length, is_rate: /^(.*\.)?lr(\[|$)/.test(title) })));
  return plot;
}

// A step without the number has an empty cell.
function rowsWith(steps, texts) {
  const rows = [...texts.keys()].filter((row) => texts[row] !== "");
  return { steps: rows.map((row) => steps[row]), values: rows.map((row) => texts[row]) };
}

/** Return the open step, or null: it is in the address (`report.html#step=137`), and Back works. */
export function chosenStep() {
  const [, digits] = /^#step=(\d{1,15})$/u.exec(location.hash) ?? [];
  return digits ? Number(digits) : null;
}

function choose(step) {
  location.hash = `step=${step}`;
}

/** Call `changed(step)` whenever another step is opened. */
export function onChosen(changed) {
  window.addEventListener("hashchange", () => changed(chosenStep()));
}
