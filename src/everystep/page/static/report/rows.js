// The rows of the table of a saved report, sorted and filtered here.

import { compared, numberOf } from "../shared/format.js";

/**
 * Return the source of the table, like `serverRows`.
 *
 * `titles` and `columns` of the rows, step first, strings except for the steps; `name`: of the run.
 */
export function savedRows({ name, titles, columns }) {
  const [steps, ...texts] = columns;
  const numbers = [steps, ...texts.map((column) => column.map((text) => (text === "" ? null : numberOf(text))))];
  const every = [...steps.keys()];
  const losses = numbers[titles.indexOf("loss")] ?? [];
  const rowOf = (row) => columns.map((column) => column[row]);
  const found = remembered((wanted) => sorted(filtered(every, steps, losses, wanted), numbers, titles, wanted));
  const file = remembered((wanted) => fileOf([titles, ...found(wanted).map(rowOf)]));

  async function page({ start = 0, length, around = null, ...wanted }) {
    const rows = found(wanted);
    const place = around === null ? -1 : rows.findIndex((row) => steps[row] === around);
    const asked = place < 0 ? start : place - (place % length);
    const last = rows.length ? rows.length - 1 - ((rows.length - 1) % length) : 0;
    const from = Math.max(0, Math.min(asked, last));
    const shown = rows.slice(from, from + length).map(rowOf);
    return { columns: titles, total: every.length, filtered: rows.length, start: from, left_out: 0, rows: shown };
  }

  return { page, csv: file, link: (step) => `#step=${step}`, file: `${name} losses.csv` };
}

function filtered(rows, steps, losses, { first = null, last = null, low = null, high = null }) {
  const [least, most] = [numberOf(low) ?? -Infinity, numberOf(high) ?? Infinity];
  const hasRange = low !== null || high !== null;
  const fits = (row) => steps[row] >= (first ?? 0) && steps[row] <= (last ?? Infinity);
  return rows.filter((row) => fits(row) && (!hasRange || (losses[row] !== null && losses[row] >= least && losses[row] <= most)));
}

// Equal ones are in the order of their steps.
function sorted(rows, numbers, titles, { sort = null, direction = null }) {
  if (sort === null) return rows;
  const column = numbers[titles.indexOf(sort)];
  const sign = direction === "desc" ? -1 : 1;
  return [...rows].sort((one, other) => compared(column[one], column[other], sign));
}

// The result for the last query, reused while the query is the same.
function remembered(make) {
  let asked = null;
  let made = null;
  return (wanted) => {
    const question = JSON.stringify([wanted.sort, wanted.direction, wanted.first, wanted.last, wanted.low, wanted.high]);
    if (question !== asked) [asked, made] = [question, make(wanted)];
    return made;
  };
}

function fileOf(rows) {
  const quoted = (cell) => (/[",\n]/u.test(cell) ? `"${String(cell).replaceAll('"', '""')}"` : cell);
  const lines = rows.map((row) => row.map(quoted).join(","));
  return URL.createObjectURL(new Blob([`${lines.join("\n")}\n`], { type: "text/csv" }));
}
