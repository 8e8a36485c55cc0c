// The opened steps of a saved report: the view of the page, with the data in the report.

import { button, element } from "../shared/elements.js";
import { whole } from "../shared/format.js";
import { StepView } from "../step/step.js";
import { chosenStep, onChosen } from "./report.js";

/** Show the steps of this report. */
export function begin() {
  const section = document.querySelector(".opened");
  const data = JSON.parse(section.querySelector("script.opened-steps").textContent);
  const host = element("div");
  const source = savedSource(data);
  const view = new StepView(data.run, host, { source, go: (place) => view.show(shown, place) });
  let shown = null;
  const buttons = data.steps.map(({ content }) => button(whole(content.step), () => show(content.step)));
  const show = (step) => {
    shown = step;
    buttons.forEach((each, place) => each.setAttribute("aria-pressed", String(data.steps[place].content.step === step)));
    view.show(step);
  };
  section.append(element("div", { class: "chosen", role: "group", "aria-label": "step" }, ...buttons), host);
  const showIfKept = (step) => {
    if (source.has(step)) show(step);
    return source.has(step);
  };
  onChosen(showIfKept);
  if (!showIfKept(chosenStep())) show(data.steps[0].content.step);
}

// The source of the view, in the server's format; tensors are returned as stored.
function savedSource({ steps, histograms, numbers }) {
  const known = new Map(steps.map((step) => [step.content.step, step]));
  return {
    has: (step) => known.has(step),
    content: async (step) => known.get(step).content,
    slices: (step, id) => known.get(step).regions[id].length,
    histogram: async (step, id) => histograms[known.get(step).histograms[id]],
    async numbers(step, id, { index = 0, count = 1 }) {
      const slices = known.get(step).regions[id];
      const own = slices.slice(index, index + count);
      if (own.length < count) throw new Error(`the report holds the first ${whole(slices.length)} slices of this tensor; everystep view shows all`);
      const parts = own.map((slice) => numbersOf(numbers[slice.numbers], slice.format ?? slices[0].format));
      return { ...slices[0], ...own[0], index, count, numbers: joined(parts) };
    },
  };
}

function joined([first, ...others]) {
  if (!others.length) return first;
  const made = new first.constructor(first.length * (1 + others.length));
  [first, ...others].forEach((part, place) => made.set(part, place * first.length));
  return made;
}

function numbersOf(text, format) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return format === "float64" ? new Float64Array(bytes.buffer) : new Float32Array(bytes.buffer);
}
