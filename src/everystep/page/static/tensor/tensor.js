// A tensor: its name and statistics; unfolded, a heat map and a histogram.

import { copyButton } from "../shared/copy.js";
import { element, showText } from "../shared/elements.js";
import { HeatMap } from "./heatmap.js";
import { Histogram } from "./histogram.js";
import { Reasons } from "./reasons.js";
import { show, unfolding } from "../shared/part.js";
import { statisticsLine, statisticsText } from "./statistics.js";
import { Thumbnail } from "./thumbnail.js";

/** Return the part of a tensor that unfolds to its panel. */
export function tensorRow(view, { id, key = id, name, title = "", note = "" }) {
  const statistics = statisticsLine({ norm: true });
  const noted = note ? element("span", { class: "note-of-name" }, note) : null;
  const quiet = element("span", { class: "quiet" }, statistics.node);
  const row = unfolding(view, {
    key,
    name,
    className: "tensor",
    alongside: [noted, quiet, new Thumbnail(view, () => id)],
    open: () => new TensorPanel(view, id, title || name),
    update: ({ tensors }) => statistics.update(tensors[id]),
  });
  row.toggle.title = title;
  return row;
}

/** The part that shows the numbers of a tensor. */
export class TensorPanel {
  constructor(view, id, name) {
    Object.assign(this, { view, id, name });
    this.reasons = view.source.why ? new Reasons(view.source) : null;
    this.map = new HeatMap((index) => {
      if (this.id !== "batch.images") this.reasons?.begin(this.content.step, { id: this.id, index: index.join(",") });
    });
    this.bars = new Histogram();
    this.trouble = element("p", { class: "alarm small", role: "alert", hidden: true });
    this.along = takeAlong(view.source);
    this.node = element("div", { class: "panel" }, this.map.node, this.bars.node, this.along.node, this.reasons?.node, this.trouble);
    this.content = null;
    this.asked = new AbortController();
  }

  update(content) {
    this.content = content;
    this.#draw();
  }

  /** Show another tensor. */
  choose(id, name) {
    Object.assign(this, { id, name });
    if (this.content) this.#draw();
  }

  close() {
    this.asked.abort();
    this.reasons?.clear();
    this.map.close();
  }

  // The old drawing stays until the new one is complete.
  async #draw() {
    this.asked.abort();
    this.asked = new AbortController();
    const { signal } = this.asked;
    this.reasons?.clear();
    const seen = this.content.tensors[this.id];
    const isDrawn = Boolean(seen) && !seen.unset && seen.shape.every((size) => size > 0);
    show(this.map.node, isDrawn);
    show(this.along.node, isDrawn && this.id !== "batch.images");
    this.along.update(this.content, this.id);
    show(this.bars.node, isDrawn && seen.shape.some((size) => size > 1));
    const empty = seen?.unset ? "no numbers, only memory" : "no numbers: its shape has a 0";
    this.trouble.className = isDrawn ? "alarm small" : "muted small";
    if (!isDrawn) return showText(this.trouble, seen ? empty : "not at this step");
    this.node.setAttribute("aria-busy", "true");
    try {
      const [showMap, counted] = await this.#ask(seen, signal);
      if (signal.aborted) return;
      showMap();
      if (counted) this.bars.update(counted);
      showText(this.trouble, "");
    } catch (error) {
      if (error.name !== "AbortError") showText(this.trouble, error.message);
    }
    if (!signal.aborted) this.node.removeAttribute("aria-busy");
  }

  #ask(seen, signal) {
    const { id, name } = this;
    const { source } = this.view;
    const { step } = this.content;
    const numbers = (region, options) => source.numbers(step, id, region, options);
    return Promise.all([
      this.map.load(numbers, { seen, label: `${name}: ${statisticsText(seen)}`, classes: this.content.batch.classes, signal }),
      this.bars.node.hidden ? null : source.histogram(step, id, { signal }),
    ]);
  }
}

// A tensor as a line of Python, and as a NumPy file; the file only with a server.
function takeAlong(source) {
  let python = "";
  const file = element("a", { class: "small" }, ".npy");
  const node = element("div", { class: "take-along" }, copyButton(() => python, "Copy as Python", { class: "plain" }), source.file ? file : null);
  return {
    node,
    update({ run, step }, id) {
      // By its place: a run of the same name may be in runs/, which Python would open.
      python = `everystep.open(${JSON.stringify(source.argument ?? run)})[${step}]${pathOf(id)}`;
      if (!source.file) return;
      file.href = source.file(step, id);
      file.download = `${run} step ${step} ${id}.npy`.replace(/[^\w .-]/g, "_");
      file.title = "the whole tensor, for numpy.load";
    },
  };
}

/** Return where a tensor is in an open step: `gradients/0.weight` is `.gradients["0.weight"]`. */
function pathOf(id) {
  const [kind, ...rest] = id.split("/");
  const name = rest.join("/");
  const quoted = (text) => `[${JSON.stringify(text)}]`;
  if (kind.startsWith("batch.")) return `.${kind}`;
  if (kind === "batch") return `.batch${quoted(name)}`;
  if (kind === "updates") return `.updates${quoted(rest.slice(0, -1).join("/"))}.${rest.at(-1)}`;
  if (kind === "operations") return `.operations[${rest[0]}].${rest[1]}${quoted(rest.slice(2).join("/"))}`;
  return `.${kind}${quoted(name)}`;
}
