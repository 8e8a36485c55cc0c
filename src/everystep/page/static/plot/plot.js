// The plot of the loss of one run, or of several over each other, by uPlot.

import { watchAppearance } from "../shared/appearance.js";
import { element } from "../shared/elements.js";
import { chartOptions, drawMarks, loadUPlot, sizeOf } from "./chart.js";
import { plotControls } from "./controls.js";
import { columnsOf, drawnOf, lossLine, measuredLine, needLogAxis, stacked } from "./lines.js";
import { StepMark } from "./mark.js";
import { Timers } from "../shared/timers.js";
import { listenToInput } from "./input.js";
import { hint, partsAt, partsOfStep, words } from "./readout.js";

const DENSE = 3000; // points, from which on they are drawn smaller
const DOUBLE = 300; // milliseconds in which a second click makes a double one

/**
 * The plot of the loss of runs, named, in `host`.
 *
 * `source`: of the curves, as in `Curve`; `step`: the open one; `goTo(step)`: called for a click, if given; `walks`: arrow keys always walk
 * from point to point; `remove(name)`: removes a run other than the first from the plot, if that can be; `look`: {line, log, smooth} as the
 * reader chose before, or null; `looked(look)`: called when the reader chooses; `hasLoss`: whether the first run logs a loss at all.
 */
export class LossPlot {
  #lines;
  #drawn = []; // the shown lines of the chart, and their averages
  #nonfinite = []; // steps
  chart = null; // of uPlot
  #isLog = false;
  #isLine = false;
  #weight = 0; // weight of earlier values in the moving average
  #range = null; // of steps, if zoomed
  at = null; // the step under the cursor
  #mark;
  #timers = new Timers();
  #frame = 0;
  #ended = new AbortController();
  #refining = new AbortController();

  constructor(host, names, { source, step = null, goTo = null, walks = false, remove = null, look = {}, looked = () => {}, hasLoss = true }) {
    Object.assign(this, { names, goTo, walks, look, looked, hasLoss, source });
    this.#weight = look.smooth ?? 0;
    this.#lines = names.map((name, index) => lossLine(name, index, names.length === 1, source));
    this.#mark = new StepMark(this.#lines[0].curve, step, hasLoss, () => this.#drawMark());
    this.#furnish(host, remove);
    this.#begin();
  }

  /** Mark the open step. */
  setStep(step) {
    this.#mark.step = step;
    this.at = null;
    this.#drawMark();
  }

  /** Add the losses of newer steps. */
  extend(name, { steps, losses }) {
    const line = this.#lines.find(({ curve }) => curve.run === name && curve.measurement === null);
    if (!line) return;
    if (line.curve.extend(steps, losses)) this.#timers.soon("reload", () => this.#load([line]));
    this.#refresh();
  }

  /** Set the measurements of the first run, as the server sent them. */
  setMeasurements(measurements) {
    const changed = [];
    for (const { name, count, is_rate: isRate } of measurements) {
      let line = this.#lines.find(({ curve }) => curve.measurement === name);
      if (!line) this.#lines.push((line = measuredLine(this.names[0], name, isRate, this.#lines, this.source)));
      if (line.count !== count) changed.push(line);
      line.count = count;
    }
    if (!changed.length || !this.chart) return;
    this.#drawControls();
    this.#timers.soon("measured", () => this.#load(this.#lines.filter((line) => line.isShown && line.curve.measurement !== null)));
  }

  /** Toggle the logarithmic axis of the loss. */
  toggleLog() {
    this.#isLog = !this.#isLog;
    this.#build();
    this.#tellLook({ log: Number(this.#isLog) });
  }

  /** Fit the plot into its place. */
  resize() {
    if (this.chart && this.plot.clientWidth) this.chart.setSize(sizeOf(this.plot));
  }

  get isZoomed() {
    return this.#range !== null;
  }

  /** Whether arrow keys walk from point to point: no step is open. */
  get isWalked() {
    return this.walks || this.step === null;
  }

  /** The open step, or null. */
  get step() {
    return this.#mark.step;
  }

  /** Remove the plot. */
  close() {
    this.#ended.abort();
    this.#refining.abort();
    this.#mark.close();
    this.#timers.clear();
    cancelAnimationFrame(this.#frame);
    this.observer.disconnect();
    this.chart?.destroy();
    this.parts.forEach((part) => part.remove());
  }

  #furnish(host, remove) {
    this.controls = plotControls({
      line: (line) => this.#toggle(line),
      remove,
      isLine: () => this.#toggleLine(),
      smooth: this.#weight,
      isLog: () => this.toggleLog(),
      weight: (weight) => this.#smooth(weight),
      whole: () => this.zoom(null),
    });
    this.plot = element("div", { class: "plot", tabIndex: 0, role: "slider", "aria-label": "step", "aria-valuemin": 1 });
    this.readout = element("p", { class: "readout" });
    this.parts = [this.controls.host, this.plot, this.readout];
    host.append(...this.parts);
    listenToInput(this.plot, this);
    this.observer = new ResizeObserver(() => this.chart && this.chart.width !== this.plot.clientWidth && this.resize());
    this.observer.observe(this.plot);
    this.#ended.signal.addEventListener("abort", watchAppearance(() => this.chart && this.#build()));
    this.#drawControls();
    this.#tell();
  }

  async #begin() {
    const { signal } = this.#ended;
    const [first, ...others] = this.#lines.filter(({ curve }) => curve.measurement === null);
    try {
      // The first run is drawn even if others fail.
      const hide = (line) => (error) => Object.assign(line, { isShown: false, problem: error.message });
      await Promise.all([loadUPlot(), first.curve.load(signal), ...others.map((line) => line.curve.load(signal).catch(hide(line)))]);
      if (signal.aborted) return;
      this.#isLine = Boolean(this.look.line ?? this.names.length > 1); // points of several runs would hide each other
      this.#isLog = this.#axis();
      this.#build();
      await this.#load(this.#lines.filter((line) => line.isShown && line.curve.measurement !== null));
    } catch (error) {
      if (!signal.aborted) this.readout.textContent = `The curve cannot be drawn: ${error.message}`;
    }
  }

  // As the reader chose, or the one on which the losses are readable.
  #axis() {
    return Boolean(this.look.log ?? needLogAxis(this.#lines));
  }

  async #load(lines) {
    await Promise.allSettled(lines.map(({ curve }) => curve.load(this.#ended.signal)));
    if (this.#ended.signal.aborted || !lines.length) return;
    const isNew = lines.some((line) => line.isShown && !this.#drawn.some(({ curve }) => curve === line.curve));
    if (isNew) this.#build();
    else this.#refresh();
  }

  #toggle(line) {
    line.isShown = !line.isShown;
    if (!line.isShown || line.curve.points()[0].length) this.#build();
    if (line.isShown) this.#load([line]); // it may have more points than when it was hidden
  }

  #toggleLine() {
    this.#isLine = !this.#isLine;
    this.#build();
    this.#tellLook({ line: Number(this.#isLine) });
  }

  #tellLook(changed) {
    this.look = { ...this.look, ...changed };
    this.looked(this.look);
  }

  #smooth(weight) {
    const isRedrawn = this.#weight > 0 === weight > 0;
    this.#weight = weight;
    if (isRedrawn) this.#refresh();
    else this.#build();
    this.#timers.rest("look", () => this.#tellLook({ smooth: weight || null }));
  }

  #drawControls() {
    this.controls.draw(this.#lines, {
      hasLoss: this.hasLoss || this.names.length > 1,
      isLine: this.#isLine,
      isLog: this.#isLog,
      isZoomed: this.isZoomed,
    });
  }

  #build() {
    this.#drawControls();
    if (!window.uPlot) return;
    this.chart?.destroy();
    this.#drawn = drawnOf(this.#lines, this.#weight);
    const data = this.#data();
    const zoomed = this.#range;
    const options = chartOptions(stacked(this.#drawn), {
      isLog: this.#isLog,
      isLine: this.#isLine,
      isDense: data[0].length > DENSE,
      last: data[0].at(-1) ?? 0,
      ...sizeOf(this.plot),
      hooks: {
        draw: [(chart) => drawMarks(chart, this.#nonfinite), (chart) => this.#mark.place(chart)],
        setCursor: [({ cursor, data: [steps] }) => cursor.event && this.show(steps[cursor.idx] ?? null)],
        setScale: [(chart, scale) => scale === "x" && this.#zoomed(chart)],
      },
    });
    this.chart = new window.uPlot(options, data, this.plot);
    this.chart.over.append(this.#mark.node);
    this.chart.over.addEventListener("mouseleave", () => this.show(null));
    this.chart.over.addEventListener("click", ({ detail }) => this.#click(detail));
    if (zoomed) this.chart.setScale("x", { min: zoomed[0], max: zoomed[1] });
    this.#drawMark();
  }

  // If the plot is zoomed, wait for a second click: a double click shows the whole run.
  #click(count) {
    const step = this.at;
    const isFirst = this.goTo && step !== null && count < 2;
    if (this.isZoomed) this.#timers.rest("click", () => isFirst && this.goTo(step), DOUBLE);
    else if (isFirst) this.goTo(step);
  }

  #data() {
    const { data, nonfinite } = columnsOf(stacked(this.#drawn), { weight: this.#weight, isLog: this.#isLog });
    this.#nonfinite = nonfinite;
    return data;
  }

  // Put new numbers into the existing chart, at most once per frame.
  #refresh() {
    if (!this.chart || this.#frame) return;
    this.#frame = requestAnimationFrame(() => {
      this.#frame = 0;
      const isLog = this.#axis();
      if (isLog !== this.#isLog) {
        this.#isLog = isLog;
        return this.#build();
      }
      const zoomed = this.#range;
      this.chart.batch(() => {
        this.chart.setData(this.#data());
        if (zoomed) this.chart.setScale("x", { min: zoomed[0], max: zoomed[1] });
      });
      this.#tell();
    });
  }

  #ends() {
    const [steps] = this.chart.data;
    return [steps[0] ?? 0, steps.at(-1) ?? 0];
  }

  /** Zoom to a range of steps; null: to the whole run. */
  zoom(range) {
    const [first, last] = this.#ends();
    const [min, max] = range ?? [first, last];
    this.chart.setScale("x", { min: Math.max(min, first), max: Math.min(max, last) });
  }

  #zoomed(chart) {
    const { min, max } = chart.scales.x;
    const range = min > chart.data[0][0] || max < chart.data[0].at(-1) ? [min, max] : null;
    const isSame = range?.[0] === this.#range?.[0] && range?.[1] === this.#range?.[1];
    if (isSame) return;
    this.#range = range;
    this.#drawControls();
    this.#timers.rest("refine", () => this.#refine());
  }

  async #refine() {
    this.#refining.abort();
    this.#refining = new AbortController();
    const { signal } = this.#refining;
    const curves = this.#lines.filter((line) => line.isShown).map(({ curve }) => curve);
    if (this.#range === null) curves.forEach((curve) => curve.coarsen());
    else {
      const [first, last] = [Math.floor(this.#range[0]), Math.ceil(this.#range[1])];
      await Promise.allSettled(curves.map((curve) => curve.refine(first, last, signal)));
    }
    if (!signal.aborted) this.#refresh();
  }

  /** Write the values at a step; null: nothing is under the cursor. */
  show(at) {
    this.at = at;
    this.#tell();
  }

  // As text: the values under the cursor, or of the open step, or a hint.
  #tell() {
    const parts = this.at !== null ? partsAt(this.#drawn, this.at, this.#weight) : partsOfStep(this.#mark, this.#lines[0].title);
    this.plot.toggleAttribute("data-own-keys", this.isWalked);
    this.plot.setAttribute("aria-valuemax", this.chart ? this.#ends()[1] : 1);
    this.plot.setAttribute("aria-valuenow", this.at ?? this.step ?? 1);
    this.plot.setAttribute("aria-valuetext", parts.map((part) => part.join(" ")).join(", ") || "no step chosen");
    const losses = this.#lines.filter(({ curve }) => curve.measurement === null).map(({ curve }) => curve);
    const can = this.chart ? hint(this, losses, this.#isLog, this.#nonfinite) : "";
    this.readout.replaceChildren(...(parts.length ? words(parts) : [can]));
  }

  #drawMark() {
    if (this.chart) this.#mark.place(this.chart);
    this.#tell();
  }
}
