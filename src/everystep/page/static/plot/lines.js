// What a plot draws: losses of runs, measurements of the first of them, averages.

import { Curve, smoothed } from "./curves.js";

/** Losses of one run, and of several, need a log axis if the largest is more than so many times the smallest. */
const APART = 1000;
const APART_OF_SEVERAL = 100;

/** Return the line of the loss of a run: {title, curve, colour, scale, kind, isShown, count}. */
export function lossLine(name, index, isAlone, source) {
  const title = isAlone ? "loss" : name;
  return { title, curve: new Curve(name, source), colour: `--series-${index % 5}`, scale: "loss", kind: "raw", isShown: true, count: 0 };
}

/** Return the line of a measurement that comes after other lines. */
export function measuredLine(run, name, isRate, lines, source) {
  // Losses share the axis of the loss; each other measurement has its own, on the right.
  const isLoss = /loss(?: \(rank \d+\))?$/u.test(name);
  const isAlone = lines.filter(({ curve }) => curve.measurement === null).length === 1;
  const isNarrow = window.matchMedia("(max-width: 30rem)").matches;
  const isFirst = !lines.some((line) => line.isShown && line.scale !== "loss");
  return {
    title: name,
    curve: new Curve(run, source, name),
    colour: `--series-${lines.length % 5}`,
    scale: isLoss ? "loss" : `measured ${name}`,
    kind: isRate ? "rate" : "measured",
    isShown: isAlone && (isLoss || (isFirst && !isRate && !isNarrow)),
    count: 0,
  };
}

/** Return whether positive losses are so far apart that a linear axis shows only the largest. */
export function needLogAxis(lines) {
  const runs = lines.filter(({ curve }) => curve.measurement === null);
  let [low, high] = [Infinity, 0];
  for (const loss of runs.flatMap(({ curve }) => curve.points()[1])) {
    if (!Number.isFinite(loss)) continue;
    low = Math.min(low, loss);
    high = Math.max(high, loss);
  }
  return low > 0 && high > (runs.length > 1 ? APART_OF_SEVERAL : APART) * low;
}

/** Return the lines to draw: the shown ones, with the losses faint under their averages. */
export function drawnOf(lines, weight) {
  const shown = lines.filter((line) => line.isShown);
  if (!weight) return shown;
  const averages = shown.filter(({ kind }) => kind === "raw").map((line) => ({ ...line, kind: "average" }));
  return [...shown.map((line) => (line.kind === "raw" ? { ...line, kind: "faint" } : line)), ...averages];
}

/** Return the lines in drawing order: the first run over the others, measurements over the losses. */
export function stacked(drawn) {
  const of = (...kinds) => drawn.filter(({ kind }) => kinds.includes(kind));
  return [...of("raw", "faint").reverse(), ...of("average").reverse(), ...of("measured", "rate")];
}

/**
 * Return {data, nonfinite}: the columns that uPlot draws, and the steps with a loss that is not finite.
 *
 * The columns: the steps of all lines, then the values of each line, blank where it has none.
 */
export function columnsOf(drawn, { weight, isLog }) {
  const nonfinite = [];
  const tables = drawn.map(({ curve, scale, kind }) => {
    const [steps, values] = curve.points();
    if (kind === "raw" || kind === "faint") nonfinite.push(...steps.filter((_, row) => values[row] !== null && !Number.isFinite(values[row])));
    const shown = kind === "average" ? smoothed(values, weight) : values;
    const fits = (value) => Number.isFinite(value) && !(isLog && scale === "loss" && value <= 0);
    return [steps, shown.map((value) => (fits(value) ? value : null))];
  });
  return { data: tables.length ? window.uPlot.join(tables) : [[]], nonfinite };
}
