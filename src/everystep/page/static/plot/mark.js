// The line in a plot at the open step. It is above the canvas, so that stepping redraws nothing.

import { element } from "../shared/elements.js";
import { short, whole } from "../shared/format.js";
import { Timers } from "../shared/timers.js";
import { rowOf } from "./readout.js";

/** The line; `curve`: of the loss; `hasLoss`: whether it is logged; `found()`: called when the loss of the step is known. */
export class StepMark {
  #timers = new Timers();
  #known = [null, null]; // a step and its loss
  #ended = new AbortController();

  constructor(curve, step, hasLoss, found) {
    this.curve = curve;
    this.hasLoss = hasLoss;
    this.step = step;
    this.found = found;
    this.node = element("div", { class: "at-step", "aria-hidden": "true", hidden: true }, element("span"));
  }

  /** The loss of the step, null while it is unknown. */
  get loss() {
    if (this.#known[0] === this.step) return this.#known[1];
    const [steps, values] = this.curve.points();
    const row = rowOf(steps, this.step, "own");
    return row === null ? null : values[row];
  }

  /** Move the line to its step. */
  place(chart) {
    if (this.step === null) return void (this.node.hidden = true);
    const width = chart.over.clientWidth;
    const left = chart.valToPos(this.step, "x");
    this.node.hidden = !(left >= -1 && left <= width + 1);
    this.node.style.transform = `translateX(${left}px)`;
    this.node.classList.toggle("to-left", left > width / 2);
    const text = whole(this.step);
    this.node.firstChild.textContent = this.loss === null ? text : `${text} · ${short(this.loss)}`;
    this.#timers.clear();
    if (this.loss === null && this.hasLoss) this.#timers.rest("find", () => this.#find()); // no point has it
  }

  /** Stop requests. */
  close() {
    this.#timers.clear();
    this.#ended.abort();
  }

  async #find() {
    const { step } = this;
    const loss = await this.curve.lossAt(step, this.#ended.signal).catch(() => null);
    if (loss === null || step !== this.step) return;
    this.#known = [step, loss];
    this.found();
  }
}
