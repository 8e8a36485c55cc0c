// Statistics of a tensor, in a line.

import { element } from "../shared/elements.js";
import { numberOf, percent, shapeText, short, whole } from "../shared/format.js";
import { setText, show } from "../shared/part.js";

const ENTRIES = [
  ["mean", "mean"],
  ["std", "std"],
  ["min", "minimum"],
  ["max", "maximum"],
  ["norm", "norm"],
];

/** Return a line of statistics: {node, update(statistics)}; `norm`: with the 2-norm. */
export function statisticsLine({ norm = false } = {}) {
  const shape = element("span", { class: "shape" });
  const entries = ENTRIES.filter(([name]) => norm || name !== "norm").map(([name, key]) => ({ key, ...statistic(name) }));
  const zeros = statistic("zeros");
  const alarm = element("span", { class: "nonfinite" });
  const unset = element("span", { class: "what" });
  const node = element("span", { class: "statistics" }, shape, ...entries.map((one) => one.node), zeros.node, alarm, unset);
  return {
    node,
    update(seen) {
      show(node, Boolean(seen));
      if (!seen) return;
      // Nearly everything is float32: only other dtypes are named.
      setText(shape, shapeText(seen.shape) + (seen.dtype === "float32" ? "" : ` ${seen.dtype}`));
      shape.title = seen.dtype;
      setText(alarm, seen.nonfinite ? `${whole(seen.nonfinite)} not finite` : "");
      show(alarm, Boolean(seen.nonfinite));
      setText(unset, seen.unset ? "no numbers, only memory" : isComplex(seen) ? "of absolute values" : "");
      const isNumber = seen.shape.every((size) => size === 1);
      for (const { key, tell } of entries) {
        const isTold = isNumber ? key === "mean" : true;
        tell(isTold ? numberOf(seen[key]) : null, isNumber ? "value" : null);
      }
      zeros.tell(!isNumber && seen.zeros > 0 ? seen.zeros : null, null, percent);
    },
  };
}

/** Return statistics as a sentence, for labels. */
export function statisticsText(seen) {
  if (!seen) return "not at this step";
  if (seen.unset) return `${shapeText(seen.shape)} ${seen.dtype}, no numbers, only memory`;
  const numbers = ENTRIES.map(([name, key]) => `${name} ${short(seen[key])}`);
  if (isComplex(seen)) numbers.push("of absolute values");
  const bad = seen.nonfinite ? [`${whole(seen.nonfinite)} not finite`] : [];
  return [`${shapeText(seen.shape)} ${seen.dtype}`, ...numbers, ...bad].join(", ");
}

/** Return whether the statistics are of absolute values. */
export function isComplex({ dtype }) {
  return dtype.startsWith("complex");
}

function statistic(name) {
  const label = element("span", { class: "what" }, name);
  const value = element("span", { class: "value" });
  const node = element("span", { class: "statistic" }, label, " ", value);
  const tell = (number, otherLabel, write = short) => {
    const isTold = number !== null && number !== undefined && !Number.isNaN(number);
    show(node, isTold);
    if (!isTold) return;
    setText(label, otherLabel ?? name);
    setText(value, write(number));
    value.title = String(number);
  };
  return { node, tell };
}
