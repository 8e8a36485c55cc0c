// A tensor: its name and statistics; unfolded, a heat map and a histogram.

import { element } from "../shared/elements.js";
import { heatMap } from "./heatmap.js";
import { histogram } from "./histogram.js";
import { reasons } from "./reasons.js";
import { show, setText, unfolding } from "../shared/part.js";
import { statisticsLine, statisticsText } from "./statistics.js";
import { takeAlong } from "./take.js";
import { thumbnail } from "./thumbnail.js";

/** Return the part of a tensor that unfolds to its panel. */
export function tensorRow(view, { id, key = id, name, title = "", note = "" }) {
  const statistics = statisticsLine({ norm: true });
  const noted = note ? element("span", { class: "note-of-name" }, note) : null;
  const quiet = element("span", { class: "quiet" }, statistics.node);
  const picture = thumbnail(view, () => id);
  const row = unfolding(view, {
    key,
    name,
    className: "tensor",
    beside: [noted, quiet, picture.node].filter(Boolean),
    open: () => tensorPanel(view, id, title || name),
    update(content) {
      statistics.update(content.tensors[id]);
      picture.update(content);
    },
  });
  row.toggle.title = title;
  const close = () => {
    picture.close();
    row.close();
  };
  return { ...row, close };
}

/** Return the part that shows the numbers of a tensor; its `choose(id, name)` shows another one. */
export function tensorPanel(view, id, name) {
  return new TensorPanel(view, id, name);
}

class TensorPanel {
  constructor(view, id, name) {
    Object.assign(this, { view, id, name });
    this.reasons = view.source.why ? reasons(view.source) : null;
    this.map = heatMap((index) => this.#chosen(index));
    this.bars = histogram();
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

  #chosen(index) {
    if (this.id !== "batch.images") this.reasons?.begin(this.content.step, { id: this.id, index: index.join(",") });
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
    if (!isDrawn) return this.#tell(seen ? empty : "not at this step");
    this.node.setAttribute("aria-busy", "true");
    try {
      const [showMap, counted] = await this.#ask(seen, signal);
      if (signal.aborted) return;
      showMap();
      if (counted) this.bars.update(counted);
      this.#tell("");
    } catch (error) {
      if (error.name !== "AbortError") this.#tell(error.message);
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

  #tell(text) {
    setText(this.trouble, text);
    show(this.trouble, Boolean(text));
  }
}
