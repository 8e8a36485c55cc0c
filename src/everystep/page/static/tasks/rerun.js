// Rerun: the steps of a run under other numerics, or in another precision.

import { element } from "../shared/elements.js";
import { pointsBetween } from "../plot/curves.js";
import { plotBeside, serverCurves } from "../plot/source.js";
import { numberOf } from "../shared/format.js";
import { detailsOf, labelled, questionForm } from "./question.js";

/** The values of the options, as in `everystep rerun`. */
const CAPABILITIES = ["default", "avx2", "avx512"];
const BRANCHES = ["OFF", "AUTO", "COMPATIBLE", "SSE4_2", "AVX", "AVX2", "AVX512"];
const PRECISIONS = ["float64", "bfloat16"];
/** Curves with a smaller relative difference look the same. */
const VISIBLE = 0.002;

/** Return the question. */
export function rerunning(place) {
  const threads = element("input", { type: "number", min: 1, step: 1, placeholder: "same" });
  const [precision, mkl, capability] = [PRECISIONS, BRANCHES, CAPABILITIES].map(choice);
  let endPlot = () => {};
  const question = questionForm(place, {
    title: "Rerun",
    description: "Repeats every step under different conditions, and reports where it diverges from the recording, and how far.",
    options: [labelled("precision", precision), labelled("threads", threads), labelled("MKL", mkl), labelled("CPU", capability)],
    verb: "Rerun",
    path: "rerun",
    content: () => ({
      threads: threads.value ? Number(threads.value) : null,
      capability: capability.value || null,
      mkl: mkl.value || null,
      precision: precision.value || null,
    }),
    done(result) {
      const host = element("div", { class: "overlay" });
      endPlot();
      if (result.losses) endPlot = overlay(place, host, result);
      return [
        element("p", { class: "result" }, `${result.sentence}.`),
        result.losses && numberOf(result.apart) < VISIBLE && element("p", { class: "muted small" }, "In the plot, the curves coincide."),
        host,
        detailsOf(result.text),
      ];
    },
  });
  const close = () => {
    endPlot();
    question.close();
  };
  return { ...question, close };
}

function choice(names) {
  return element("select", {}, element("option", { value: "" }, "as recorded"), ...names.map((name) => element("option", { value: name }, name)));
}

// The recorded losses and those of the rerun.
function overlay({ about, goTo }, host, { place, losses }) {
  const other = `${about.name}, ${place.precision ?? "rerun"}`;
  const source = (run, query, options) => (run === other ? pointsBetween(losses, query) : serverCurves(run, query, options));
  return plotBeside(host, [about.name, other], { source, goTo });
}
