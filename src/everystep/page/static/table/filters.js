// The filters of the table: fields for the steps and for the range of the loss.

import { element } from "../shared/elements.js";
import { numberOf } from "../shared/format.js";
import { Timers } from "../shared/timers.js";

const BETWEEN = /^(\d{1,18})?(?:-|–|\.\.|…)(\d{1,18})?$/u;
const BEYOND = /^(>=?|<=?|≥|≤)(\d{1,18})$/u;

/** The fields; `changed()`: called when the reader changes one. */
export class Filters {
  #timers = new Timers();

  constructor(changed) {
    const field = (label) =>
      element("input", { type: "text", inputMode: "decimal", placeholder: label, "aria-label": `losses ${label}`, onchange: changed });
    this.search = element("input", { type: "search", placeholder: "137 or 100-200", "aria-label": "steps: one, or a range" });
    this.search.addEventListener("input", () => this.#timers.rest("search", changed));
    this.low = field("from");
    this.high = field("to");
    const losses = [element("span", { "aria-hidden": "true" }, "losses"), this.low, this.high];
    this.range = element("span", { class: "range", role: "group", "aria-label": "losses" }, ...losses);
    this.nodes = [this.search, this.range];
  }

  /** Offer the range of the loss only where the table has losses. */
  setColumns(columns) {
    this.range.hidden = !columns.includes("loss");
  }

  /**
   * The values of the fields: {first, last, low, high}, the last two as strings, each null if empty.
   *
   * Throws an error for the reader if a field is invalid.
   */
  get wanted() {
    return { ...stepsOf(this.search.value), low: boundOf("from", this.low.value), high: boundOf("to", this.high.value) };
  }

  /** Stop listening. */
  close() {
    this.#timers.clear();
  }
}

// Reads 137, 100-200, 100.., >137 and the like.
function stepsOf(text) {
  const plain = text.replace(/[\s_,]/gu, "");
  if (!plain) return { first: null, last: null };
  if (/^\d{1,18}$/u.test(plain)) return { first: Number(plain), last: Number(plain) };
  const [, ...ends] = BETWEEN.exec(plain) ?? [];
  if (ends.some((end) => end !== undefined)) {
    const [first, last] = ends.map((end) => (end === undefined ? null : Number(end)));
    return { first, last };
  }
  const [, sign, digits] = BEYOND.exec(plain) ?? [];
  if (!sign) throw new Error(`search '${text.trim().slice(0, 80)}' is not a range of steps; write 137, 137-200, >137 or <137`);
  const step = Number(digits);
  if (sign === ">" || sign === "<") return sign === ">" ? { first: step + 1, last: null } : { first: null, last: step - 1 };
  return sign === ">=" || sign === "≥" ? { first: step, last: null } : { first: null, last: step };
}

// Reads a number as Python writes it, so that the text of a loss finds it.
function boundOf(word, text) {
  const plain = text.trim();
  if (!plain) return null;
  if (Number.isNaN(numberOf(plain))) throw new Error(`losses ${word} '${plain.slice(0, 80)}': not a number; write 0.25 or 1e-3`);
  return plain;
}
