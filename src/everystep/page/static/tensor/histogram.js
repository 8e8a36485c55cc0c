// A histogram of a tensor's numbers.

import { button, drawing, element } from "../shared/elements.js";
import { distinct, whole } from "../shared/format.js";
import { setText } from "../shared/part.js";

const WIDTH = 256;
const HEIGHT = 96;

export class Histogram {
  constructor() {
    this.plot = drawing("svg", {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
      preserveAspectRatio: "none",
      role: "img",
      tabindex: "0",
      "data-own-keys": "",
    });
    this.low = element("span");
    this.zero = element("span", { class: "zero" });
    this.high = element("span");
    this.readout = element("p", { class: "readout", "aria-live": "polite" });
    this.log = button("log", () => this.#toggle(), { class: "plain", "aria-pressed": "false", title: "counts on a logarithmic scale" });
    const ends = element("div", { class: "ends", "aria-hidden": "true" }, this.low, this.zero, this.high);
    const beneath = element("div", { class: "beneath" }, this.readout, this.log);
    this.node = element("figure", { class: "histogram" }, this.plot, ends, beneath);
    this.bars = [];
    this.at = null;
    this.plot.addEventListener("pointermove", (event) => {
      const { left, width } = this.plot.getBoundingClientRect();
      if (this.bars.length) this.#point(this.#within(Math.floor(((event.clientX - left) / width) * this.bars.length)));
    });
    this.plot.addEventListener("pointerleave", () => this.counted && this.#point(null));
    this.plot.addEventListener("keydown", (event) => {
      const moved = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
      if (moved === undefined || !this.bars.length) return;
      event.preventDefault();
      this.#point(this.#within((this.at ?? Math.floor(this.bars.length / 2)) + moved));
    });
  }

  /** Show counts: {edges, counts, nonfinite}. */
  update(counted) {
    this.counted = counted;
    const { edges, counts } = counted;
    const most = this.#heightOf(Math.max(...counts, 1));
    const width = WIDTH / Math.max(counts.length, 1);
    this.bars = counts.map((count, place) => {
      const height = count ? Math.max((HEIGHT * this.#heightOf(count)) / most, 1) : 0;
      return drawing("rect", { x: place * width, y: HEIGHT - height, width: Math.max(width - 0.75, 0.5), height });
    });
    const zero = zeroAt(edges);
    this.plot.replaceChildren(...(zero === null ? [] : [zeroLine(zero)]), ...this.bars);
    this.plot.setAttribute("aria-label", labelOf(counted));
    const ends = distinct([edges[0], edges.at(-1)], 3);
    [this.low, this.high].forEach((end, place) => setText(end, ends[place]));
    // The 0 is written only if it does not overlap the ends.
    setText(this.zero, zero > 0.25 && zero < 0.75 ? "0" : "");
    this.zero.style.left = `${100 * (zero ?? 0)}%`;
    this.#point(this.at !== null && this.at < counts.length ? this.at : null);
  }

  #point(place) {
    this.bars[this.at]?.classList.remove("pointed");
    this.at = place;
    if (place === null) return setText(this.readout, summary(this.counted));
    this.bars[place].classList.add("pointed");
    const { edges, counts } = this.counted;
    setText(this.readout, `${whole(counts[place])} from ${distinct(edges.slice(place, place + 2), 4).join(" to ")}`);
  }

  #toggle() {
    this.log.setAttribute("aria-pressed", String(!this.#isLog));
    this.update(this.counted);
  }

  get #isLog() {
    return this.log.getAttribute("aria-pressed") === "true";
  }

  #heightOf(count) {
    return this.#isLog ? Math.log1p(count) : count;
  }

  #within(place) {
    return Math.min(Math.max(place, 0), this.bars.length - 1);
  }
}

function zeroLine(at) {
  return drawing("line", { class: "zero", x1: at * WIDTH, x2: at * WIDTH, y1: 0, y2: HEIGHT });
}

function zeroAt(edges) {
  const [low, high] = [edges[0], edges.at(-1)];
  return low < 0 && high > 0 ? -low / (high - low) : null;
}

function summary({ counts, nonfinite }) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  return `${whole(total)} numbers${nonfinite ? `, ${whole(nonfinite)} not finite` : ""}`;
}

function labelOf(counted) {
  const { edges, counts } = counted;
  const most = counts.indexOf(Math.max(...counts));
  const range = distinct([edges[0], edges.at(-1)], 4).join(" to ");
  const peak = `${whole(counts[most])}, between ${distinct(edges.slice(most, most + 2), 4).join(" and ")}`;
  return `Histogram of ${summary(counted)} from ${range}; most, ${peak}`;
}
