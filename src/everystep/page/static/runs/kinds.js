// The values of the list of runs, by the kinds that the server names: see `VALUE_KINDS` in lists.py.

import { ago, duration, fullText, numberOf, percent, short, whole } from "../shared/format.js";

const plain = { value: (value) => value, text: (value) => value };
const words = (texts) => texts.join(", ");

/** Of a value that is not null, and its run: `value`, a number or a text to sort by, null if unknown; `text`; and `title`, in full. */
export const KINDS = {
  name: plain,
  status: plain,
  steps: { ...plain, text: (steps, { planned }) => (steps === planned ? whole(steps) : `${whole(steps)} of ${whole(planned)}`) },
  loss: { value: numberOf, text: (loss) => short(loss), title: String },
  picture: plain,
  measured: {
    value: ({ value }) => numberOf(value),
    text: ({ value, is_share: isShare }) => (isShare && numberOf(value) <= 1 ? percent(value) : short(value)),
    title: ({ name, value }) => `${name} on the validation rows: ${fullText(numberOf(value))}`,
  },
  rates: { value: ([first]) => first, text: (rates) => words(rates.map((rate) => short(rate, 8))) },
  whole: { ...plain, text: whole },
  duration: { ...plain, text: duration },
  time: { value: Date.parse, text: ago, title: (time) => `${new Date(time).toISOString().replace("T", " ").slice(0, 19)} UTC` },
  fork: { value: ([parent]) => parent, text: ([parent, step]) => `${parent}, step ${whole(step)}` },
  words: { value: words, text: words },
  text: plain,
};

// What runs are sorted by, the text of a cell, and what the pointer shows at it.
export const valueOf = (column, run) => of("value", column, run) ?? null;
export const textOf = (column, run) => of("text", column, run) ?? "";
export const titleOf = (column, run) => of("title", column, run) ?? column.about;

function of(what, { key, kind }, run) {
  const value = run[key] ?? null;
  return value === null ? null : KINDS[kind][what]?.(value, run);
}
