// Keys and wheel of a plot; uPlot handles dragging.

import { rowOf } from "./readout.js";

/**
 * Listen to a plot's keys and wheel.
 *
 * `plot`: {chart, at (the step under the cursor), step (the open one), isWalked, zoom(range), show(step), goTo(step)}.
 */
export function listenToInput(node, plot) {
  node.addEventListener("keydown", (event) => press(plot, event));
  node.addEventListener("wheel", (event) => turn(plot, event), { passive: false });
}

// Arrow keys walk from point to point; if a step is open, they go from step to step.
function press(plot, event) {
  if (!plot.chart || event.altKey || event.ctrlKey || event.metaKey) return;
  const stride = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
  if (event.key === "Escape" && plot.isZoomed) plot.zoom(null);
  else if (event.key === "Enter" && plot.at !== null) plot.goTo?.(plot.at);
  else if (plot.isWalked && stride) walk(plot, stride * (event.shiftKey ? 10 : 1));
  else return;
  event.preventDefault();
}

function walk(plot, stride) {
  const { chart } = plot;
  const [steps] = chart.data;
  const at = plot.at ?? plot.step;
  const from = at === null ? (stride < 0 ? steps.length : -1) : rowOf(steps, at, "near");
  const step = steps[Math.max(0, Math.min(steps.length - 1, from + stride))];
  if (step === undefined) return;
  const { min, max } = chart.scales.x;
  if (step < min || step > max) {
    const half = (max - min) / 2;
    const middle = Math.max(steps[0] + half, Math.min(steps.at(-1) - half, step));
    plot.zoom([middle - half, middle + half]);
  }
  plot.show(step);
  chart.setCursor({ left: chart.valToPos(step, "x"), top: 0 });
}

function turn(plot, event) {
  const { chart } = plot;
  if (!event.ctrlKey || !chart) return;
  event.preventDefault();
  const { min, max } = chart.scales.x;
  const middle = chart.posToVal(event.clientX - chart.over.getBoundingClientRect().left, "x");
  const factor = Math.exp(Math.max(-1, Math.min(1, event.deltaY / 240)));
  if (factor < 1 && max - min < 4) return;
  plot.zoom([middle - (middle - min) * factor, middle + (max - middle) * factor]);
}
