// The points of a plot: a reduced number for a whole run, finer ones in the zoomed range.

import { numberOf } from "../shared/format.js";

const POINTS = 2000;

/**
 * One series: the loss of a run, or a measurement of it.
 *
 * `source(run, {measurement, first, last, points}, {signal})`: returns {steps, values, total}.
 */
export class Curve {
  #whole = { steps: [], values: [], isReduced: false };
  #part = null; // {first, last, steps, values}
  #source;

  constructor(run, source, measurement = null) {
    this.run = run;
    this.measurement = measurement;
    this.#source = source;
  }

  /** Whether it has only some of the steps, among them the extremes: no average of these is one of all. */
  get isReduced() {
    return this.#whole.isReduced;
  }

  /** Return the loss of one step in full precision. */
  async lossAt(step, signal) {
    const { values } = await this.#source(this.run, { first: step, last: step, points: POINTS }, { signal });
    return numberOf(values[0]);
  }

  /** Fetch the whole run's curve. */
  async load(signal) {
    const found = await this.#fetch(null, null, signal);
    // Points added by `extend` during the request are kept.
    const known = found.steps.at(-1) ?? 0;
    const from = this.#whole.steps.findIndex((step) => step > known);
    if (from >= 0 && this.measurement === null) {
      found.steps.push(...this.#whole.steps.slice(from));
      found.values.push(...this.#whole.values.slice(from));
    }
    this.#whole = found;
  }

  /** Fetch the curve between two steps in more detail, if there is more. */
  async refine(first, last, signal) {
    const isThere = this.#part && this.#part.first <= first && this.#part.last >= last && !this.#part.isReduced;
    if (!this.#whole.isReduced || isThere) return;
    this.#part = { first, last, ...(await this.#fetch(first, last, signal)) };
  }

  /** Forget the details. */
  coarsen() {
    this.#part = null;
  }

  /** Add newer points, replacing those of steps that ran again; return whether to reload the curve. */
  extend(steps, values) {
    const { steps: known, values: numbers } = this.#whole;
    const again = known.findIndex((step) => step >= steps[0]);
    if (again >= 0) {
      known.splice(again);
      numbers.splice(again);
      this.#part = null;
    }
    // The steps before were asked for together with those after them, and may have come earlier: between, some are missing.
    const isGap = steps[0] > (known.at(-1) ?? 0) + 1;
    known.push(...steps);
    numbers.push(...values.map(numberOf));
    return isGap || known.length > 4 * POINTS || (again >= 0 && this.#whole.isReduced);
  }

  /** Return [steps, values] in order. */
  points() {
    const { steps, values } = this.#whole;
    if (!this.#part) return [steps, values];
    const { first, last } = this.#part;
    const until = steps.findIndex((step) => step >= first);
    const from = steps.findIndex((step) => step > last);
    const before = until < 0 ? steps.length : until;
    const after = from < 0 ? steps.length : from;
    return [
      [...steps.slice(0, before), ...this.#part.steps, ...steps.slice(after)],
      [...values.slice(0, before), ...this.#part.values, ...values.slice(after)],
    ];
  }

  async #fetch(first, last, signal) {
    const query = { first, last, points: POINTS, measurement: this.measurement };
    const { steps, values, total } = await this.#source(this.run, query, { signal });
    return { steps, values: values.map(numberOf), isReduced: total > steps.length };
  }
}

/** Return the points between two steps (null: no bound) of those that are known already, as a source does. */
export function pointsBetween({ steps, values }, { first, last }) {
  const shown = [...steps.keys()].filter((row) => steps[row] >= (first ?? 0) && steps[row] <= (last ?? Infinity));
  return { steps: shown.map((row) => steps[row]), values: shown.map((row) => values[row]), total: shown.length };
}

/**
 * Return the exponential moving average of values; values that are not finite are left out.
 *
 * Corrected for its start at zero as Adam's averages are (Kingma and Ba 2015, section 3).
 */
export function smoothed(values, weight) {
  let sum = 0;
  let missing = 1;
  return values.map((value) => {
    if (!Number.isFinite(value)) return null;
    sum = weight * sum + (1 - weight) * value;
    missing *= weight;
    return sum / (1 - missing);
  });
}
