// Export of a tensor: as a line of Python, or as a NumPy file.

import { copyButton } from "../shared/copy.js";
import { element } from "../shared/elements.js";

/** Return the part: {node, update({run, step}, id)}; the file only with a server. */
export function takeAlong(source) {
  let python = "";
  const file = element("a", { class: "small" }, ".npy");
  const node = element("div", { class: "take-along" }, copyButton(() => python, "Copy as Python", { class: "plain" }), source.file ? file : null);
  return {
    node,
    update({ run, step }, id) {
      python = `everystep.open(${JSON.stringify(run)})[${step}]${pathOf(id)}`;
      if (!source.file) return;
      file.href = source.file(step, id);
      file.download = `${run} step ${step} ${id}.npy`.replace(/[^\w .-]/g, "_");
      file.title = "the whole tensor, for numpy.load";
    },
  };
}

/** Return where a tensor is in an open step: `gradients/0.weight` is `.gradients["0.weight"]`. */
export function pathOf(id) {
  const [kind, ...rest] = id.split("/");
  const name = rest.join("/");
  const quoted = (text) => `[${JSON.stringify(text)}]`;
  if (kind.startsWith("batch.")) return `.${kind}`;
  if (kind === "batch") return `.batch${quoted(name)}`;
  if (kind === "updates") return `.updates${quoted(rest.slice(0, -1).join("/"))}.${rest.at(-1)}`;
  if (kind === "operations") return `.operations[${rest[0]}].${rest[1]}${quoted(rest.slice(2).join("/"))}`;
  return `.${kind}${quoted(name)}`;
}
