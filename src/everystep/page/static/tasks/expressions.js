// The language of expressions: what to try on a run, and a short description.

import { element } from "../shared/elements.js";

const withWeights = /^(Linear|Bilinear|Conv|Embedding|LazyLinear|LazyConv)/;

/** Return expressions worth measuring in a run. */
export function toMeasure(about) {
  const { weight, active } = layersOf(about);
  const rate = about.measurements.find(({ is_rate: isRate }) => !isRate && true)?.name;
  return [
    weight && `norm(gradients['${weight}'])`,
    weight && `norm(updates['${weight}']) / norm(parameters['${weight}'])`,
    active && `zeros(activations['${active}'])`,
    "loss / previous.loss",
    rate && /^[a-z_]\w*$/i.test(rate) && /loss/.test(rate) && `${rate} - loss`,
  ].filter(Boolean);
}

/** Return conditions worth looking for in a run. */
export function toFind(about) {
  const { weight } = layersOf(about);
  const measured = about.measurements.map(({ name }) => name).find((name) => name === "accuracy" || name === "validation_accuracy");
  return [
    about.nonfinite ? "isnan(loss)" : "loss < 1",
    "loss > previous.loss",
    measured && `${measured} > 0.9`,
    weight && `norm(gradients['${weight}']) > 10`,
  ].filter(Boolean);
}

// The first weight, and the first activation function, by their paths in the model as PyTorch prints it.
function layersOf(about) {
  const text = about.facts.find(([label]) => label === "model")?.[1] ?? "";
  const paths = [];
  const found = { weight: null, active: null };
  for (const line of text.split("\n")) {
    const [, indent, name, type] = /^(\s*)\(([^)]+)\): (\w+)/.exec(line) ?? [];
    if (!name || name.includes("'")) continue;
    paths.length = Math.max(0, paths.findLastIndex((each) => each.indent < indent.length) + 1);
    paths.push({ indent: indent.length, name });
    const path = paths.map((each) => each.name).join(".");
    if (withWeights.test(type)) found.weight ??= `${path}.weight`;
    if (/^(ReLU|LeakyReLU|GELU)/.test(type)) found.active ??= path;
  }
  return found;
}

const language = [
  ["loss  step  lr", "what is recorded; any measurement by its name"],
  ["parameters['0.weight']", "before the update; likewise gradients, buffers, activations['1'], batch.x, batch.y"],
  ["updates['0.weight']", "after minus before; also .before and .after"],
  ["previous.loss", "of the step before; likewise previous.gradients['0.weight'] and all others"],
  ["norm mean std min max sum median", "one number of a tensor; also rms, var, quantile(x, q), numel"],
  ["zeros(x)  nonfinite(x)", "the share of zeros; how many are NaN or infinite"],
  ["dot(a, b)  cosine(a, b)", "of two tensors of one shape"],
  ["abs sqrt exp log log10 sign isnan isinf", "of each element; any(x) and all(x) make one answer of them"],
  ["+ - * / // % ** @", "and comparisons, and, or, not, a if c else b, x[0, :3]"],
];

/** Return the language of expressions, folded away. */
export function languageHelp() {
  return element(
    "details",
    { class: "more language" },
    element("summary", {}, "What an expression can say"),
    element("dl", {}, ...language.flatMap(([code, says]) => [element("dt", { class: "mono" }, code), element("dd", {}, says)])),
    element("p", { class: "muted small" }, "Expressions are read as such; nothing in them is run as Python."),
  );
}
