// The language of expressions: what to try on a run, and a short description.

import { element } from "../shared/elements.js";

/** Return expressions worth measuring in a run. */
export function toMeasure(about) {
  const { weight, active } = about.layers;
  const measured = about.measurements.find(({ is_rate: isRate }) => !isRate)?.name;
  return [
    weight && `norm(gradients['${weight}'])`,
    weight && `norm(updates['${weight}']) / norm(parameters['${weight}'])`,
    active && `zeros(activations['${active}'])`,
    about.has_loss && "loss / previous.loss",
    about.has_loss && measured && /^[a-z_]\w*$/i.test(measured) && /loss/.test(measured) && `${measured} - loss`,
  ].filter(Boolean);
}

/** Return conditions worth looking for in a run. */
export function toFind(about) {
  const { weight } = about.layers;
  const measured = about.measurements.find(({ better }) => better === "up")?.name;
  return [
    about.has_loss && (about.nonfinite ? "isnan(loss)" : "loss < 1"),
    about.has_loss && "loss > previous.loss",
    measured && `${measured} > 0.9`,
    weight && `norm(gradients['${weight}']) > 10`,
  ].filter(Boolean);
}

const language = [
  ["loss  step  lr", "recorded values; any measurement by its name"],
  ["parameters['0.weight']", "before the update; also gradients, buffers, activations['1'], batch.x, batch.y"],
  ["updates['0.weight']", "after minus before; also .before and .after"],
  ["previous.loss", "of the previous step; also previous.gradients['0.weight'] and all others"],
  ["norm mean std min max sum median", "one number of a tensor; also rms, var, quantile(x, q), numel"],
  ["zeros(x)  nonfinite(x)", "the fraction of zeros; the number of NaN and infinite elements"],
  ["dot(a, b)  cosine(a, b)", "of two tensors of the same shape"],
  ["abs sqrt exp log log10 sign isnan isinf", "of each element; any(x) and all(x) reduce them to one answer"],
  ["+ - * / // % ** @", "and comparisons, and, or, not, a if c else b, x[0, :3]"],
];

/** Return the language of expressions, folded away. */
export function languageHelp() {
  return element(
    "details",
    { class: "more language" },
    element("summary", {}, "What an expression can contain"),
    element("dl", {}, ...language.flatMap(([code, says]) => [element("dt", { class: "mono" }, code), element("dd", {}, says)])),
    element("p", { class: "muted small" }, "Expressions are parsed; nothing in them runs as Python."),
  );
}
