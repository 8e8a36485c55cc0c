// The text of a plot for the step under the cursor: every number in full precision.

import { element } from "../shared/elements.js";
import { fullText, short, whole } from "../shared/format.js";
import { smoothed } from "./curves.js";

/** Return the row of a step among ascending steps: the nearest ("near"), the last at or before it ("held"), or its own ("own"). */
export function rowOf(steps, step, which) {
  let low = 0;
  let high = steps.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1;
    else high = middle;
  }
  if (steps[low] === step) return low;
  if (which === "own" || !steps.length) return null;
  if (which === "held") return low ? low - 1 : null;
  if (low === 0 || low === steps.length) return low === 0 ? 0 : low - 1;
  return step - steps[low - 1] < steps[low] - step ? low - 1 : low;
}

/** Return [title, text, where] of every line drawn at a step. */
export function partsAt(lines, step, weight) {
  const parts = [["step", whole(step), ""]];
  for (const { curve, kind, title } of lines) {
    const [steps, values] = curve.points();
    const row = rowOf(steps, step, { measured: "own", rate: "held" }[kind] ?? "near");
    if (row === null || values[row] === null) continue; // a run without losses has none
    const where = steps[row] === step || kind === "rate" ? "" : ` at ${whole(steps[row])}`;
    if (kind !== "average") parts.push([title, fullText(values[row]), where]);
    else parts.push([`${title}, ${curve.isReduced ? "points smoothed" : "smoothed"}`, short(smoothed(values, weight)[row], 6), where]);
  }
  return parts;
}

/** Return the same for the open step, with `title` for the loss; nothing if none is open. */
export function partsOfStep({ step, loss }, title) {
  if (step === null) return [];
  return [["step", whole(step), ""], ...(loss === null ? [] : [[title, fullText(loss), ""]])];
}

/** Return such parts as elements. */
export function words(parts) {
  return parts.map(([title, text, where]) => element("span", {}, `${title} `, element("b", {}, text), where));
}

/** Return the hint of a plot without a cursor, and which values it does not show. */
export function hint({ goTo, walks, hasLoss }, curves, isLog, nonfinite) {
  const isOpening = goTo && !walks;
  const opens = isOpening ? "Click to open a step; drag" : "Drag";
  if (!curves.some((curve) => curve.points()[0].length)) return "No steps.";
  if (!hasLoss) return `This loop logs no loss.${isOpening ? " Click to open a step." : ""}`;
  const found = [`${opens} to zoom, double click to see the whole run.`];
  // Not how many: the points of a long run are only some of its losses.
  const isLeft = isLog && curves.some((curve) => curve.points()[1].some((value) => Number.isFinite(value) && value <= 0));
  if (isLeft) found.push("Losses of 0 or less are not shown on a log axis.");
  if (nonfinite.length) found.push("Marked at the bottom: losses that are not finite.");
  return found.join(" ");
}
