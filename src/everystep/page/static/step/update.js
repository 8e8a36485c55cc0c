// The update of a step: its formula in both notations, and every parameter before and after it.

import { button, element } from "../shared/elements.js";
import { numberOf, percent, short } from "../shared/format.js";
import { reference } from "./mathematics.js";
import { composed, fixed, rebuilt, setText, unfolding } from "../shared/part.js";
import { TensorPanel } from "../tensor/tensor.js";
import { Thumbnail } from "../tensor/thumbnail.js";

/** The bar of relative sizes ranges from 10 to this power to 1. */
const SMALLEST = -6;

/** Return `Linear 0 · weight` of the parameter `0.weight`, for readers who do not know the path; the path itself if the layer is unknown. */
export function parameterName({ network }, parameter) {
  const dot = parameter.lastIndexOf(".");
  const path = parameter.slice(0, Math.max(dot, 0));
  const layer = network.find((one) => one.path === path);
  return layer?.type && dot > 0 ? `${layer.type} ${path} · ${parameter.slice(dot + 1)}` : parameter;
}

/** Return the parts that show the update of all parameters. */
export function update(view) {
  const settings = element("p", { class: "settings-line" });
  const all = ({ updates }) => updates.map(({ parameter }) => parameter);
  return [fixed(settings, (content) => setText(settings, settingsText(content))), clipping(), formulas(all), changes(view, all), scale()];
}

/** Return an optimizer with its settings, first those recorded at each step. */
export function settingsText({ optimizer, hyperparameters }) {
  const recorded = Object.entries(hyperparameters).map(([key, value]) => `${key} = ${short(value, 8)}`);
  const others = Object.entries(optimizer.settings).flatMap(([key, value]) => (key in hyperparameters ? [] : `${key} = ${value}`));
  return [optimizer.name, ...recorded, ...others].join(", ");
}

/** Return the part that shows the changes of parameters; parametersOf(content): which, by name. */
export function changes(view, parametersOf) {
  const structureOf = (content) => updatesOf(content, parametersOf).map(({ parameter, numbers }) => [parameter, numbers]);
  return rebuilt(element("div", { class: "updates" }), structureOf, (content) =>
    updatesOf(content, parametersOf).map((one) => updateRow(view, one)),
  );
}

function updatesOf(content, parametersOf) {
  const parameters = new Set(parametersOf(content));
  return content.updates.filter(({ parameter }) => parameters.has(parameter));
}

function clipping() {
  const node = element("p", { class: "small" });
  return fixed(node, ({ max_grad_norm, gradients, tensors }) => {
    node.hidden = max_grad_norm === null;
    if (max_grad_norm === null) return;
    const squares = gradients.map(({ tensor }) => numberOf(tensors[tensor]?.norm) ** 2);
    const norm = Math.sqrt(squares.reduce((sum, square) => sum + square, 0));
    const effect = norm + 1e-6 <= max_grad_norm ? "are not clipped" : "are clipped";
    setText(node, `First, the gradients, of norm ${short(norm)}, ${effect}: max_grad_norm = ${short(max_grad_norm)}.`);
  });
}

/** Return the part of the formulas of parameters, each once for all that share it. */
export function formulas(parametersOf) {
  const groups = (content) => {
    const found = new Map();
    for (const { parameter, operators, calls } of updatesOf(content, parametersOf)) {
      const key = JSON.stringify([operators, calls]);
      if (!found.has(key)) found.set(key, { operators, calls, parameters: [] });
      found.get(key).parameters.push(parameter);
    }
    return [...found.values()].filter(({ operators, calls }) => operators.length || calls.length);
  };
  return rebuilt(element("div", { class: "formulas" }), groups, (content) => {
    const all = groups(content);
    return all.map((one) => fixed(formula(one, all.length > 1)));
  });
}

function formula({ operators, calls, parameters }, isNamed) {
  const inCalls = element("span", { class: "calls" }, calls.join("\n"));
  return element(
    "figure",
    {},
    isNamed ? element("figcaption", {}, named(parameters)) : null,
    element("pre", { tabIndex: 0, "aria-label": "the formula of the update" }, operators.join("\n"), "\n", inCalls),
  );
}

function named(parameters) {
  const more = parameters.length > 4 ? `, … (${parameters.length} parameters)` : "";
  return parameters.slice(0, 4).join(", ") + more;
}

function updateRow(view, { parameter, numbers }) {
  const values = Object.fromEntries(["before", "after", "change"].map((name) => [name, element("span", { class: "value" })]));
  const size = element("span", { class: "value" });
  const bar = element("span", { class: "relative-bar", "aria-hidden": "true" }, element("span"));
  const statistic = (name, value) => element("span", { class: "statistic" }, element("span", { class: "what" }, name), " ", value);
  const by = element("span", { class: "by" }, ...references(numbers));
  const norms = Object.entries(values).map(([name, value]) => statistic(name, value));
  const quiet = element("span", { class: "quiet" }, element("span", { class: "statistics" }, ...norms, by));
  const row = unfolding(view, {
    key: `updates/${parameter}`,
    name: parameterName(view.content, parameter),
    className: "update-row",
    alongside: [bar, element("span", { class: "relative" }, size), quiet, new Thumbnail(view, () => `updates/${parameter}/change`)],
    open: () => threePanels(view, parameter),
    update({ updates, tensors }) {
      const one = updates.find((each) => each.parameter === parameter);
      for (const [name, value] of Object.entries(values)) {
        const norm = tensors[one[name]]?.norm;
        setText(value, short(norm));
        value.title = String(norm);
      }
      const relative = numberOf(one.relative_size);
      setText(size, percent(relative));
      size.title = String(relative);
      bar.classList.toggle("nonfinite", !Number.isFinite(relative));
      bar.firstChild.style.width = `${100 * along(relative)}%`;
    },
  });
  row.toggle.title = parameter;
  return row;
}

function references(numbers) {
  if (!numbers.length) return [];
  const [first, last] = [numbers[0], numbers.at(-1)];
  if (numbers.length > 2 && last - first + 1 === numbers.length) return ["by ", reference(first), " to ", reference(last)];
  return ["by", ...numbers.flatMap((number) => [" ", reference(number)])];
}

function along(relative) {
  if (!(relative > 0)) return 0;
  return Math.min(Math.max(1 - Math.log10(relative) / SMALLEST, 0), 1);
}

/** Return the explanation of the rows of changes. */
export function scale() {
  const text = "Norms of the parameter before, after, and of the change; the bar is their relative size, from 0.0001% to 100% on a logarithmic scale.";
  return fixed(element("p", { class: "small muted" }, text));
}

/** Return the panel of a parameter's change, or of the parameter before or after it. */
function threePanels(view, parameter) {
  const panel = new TensorPanel(view, `updates/${parameter}/change`, `${parameter}, change`);
  const buttons = ["change", "before", "after"].map((name) =>
    button(name, () => choose(name), { "aria-pressed": String(name === "change") }),
  );
  function choose(name) {
    buttons.forEach((one) => one.setAttribute("aria-pressed", String(one.textContent === name)));
    panel.choose(`updates/${parameter}/${name}`, `${parameter}, ${name}`);
  }
  const chooser = element("div", { class: "chooser", role: "group", "aria-label": "which numbers" }, ...buttons);
  return composed(element("div", {}, chooser, panel.node), [panel]);
}
