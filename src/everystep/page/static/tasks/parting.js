// The operation at which two runs diverge, side by side, down to the numbers that differ.

import { write } from "../shared/address.js";
import { button, element } from "../shared/elements.js";
import { fullText, shapeText, short, whole } from "../shared/format.js";
import { typeset } from "../step/mathematics.js";
import { isComplex } from "../tensor/statistics.js";

/** How much of a tensor is shown, around the first number that differs. */
const ROWS = 6;
const COLUMNS = 4;
/** Positions in full precision shown at first. */
const POSITIONS = 4;
/** Units in the last place up to which the count is shown, as in the server's sizes. */
const READABLE = 9999;

/** Return the view of the operation at which two runs diverge; `result`: of the comparison. */
export function partingView({ names: runs, operation, sides }) {
  const { step, index, causes, rows } = operation;
  const tensors = [["Result", operation.results, "result"], ["What differs in its inputs", operation.inputs, "input"]];
  return element(
    "section",
    { class: "parting" },
    element("h2", {}, `Step ${whole(step)}, operation ${whole(index)}`),
    ...(causes.length ? causes : [null]).map((cause) => element("p", {}, causeText(cause))),
    rows.length ? element("p", {}, rowsText(rows)) : null,
    element("div", { class: "both" }, ...[0, 1].map((place) => sideOf(runs[place], step, sides?.[place], place))),
    ...tensors.flatMap(([title, found, role]) => tensorsOf(title, found, role, runs, sides)),
    operation.results.length && sides?.every(Boolean) ? restOf(operation, sides) : null,
  );
}

/** Return the column of one of two runs, below its name. */
export function ofRun(place, name, ...children) {
  const title = element("p", { class: "side-name" }, element("span", { class: "run-line", "aria-hidden": "true" }), name);
  return element("div", { class: `side series-${place}` }, title, ...children);
}

function causeText(cause) {
  if (cause === null) return "Its inputs already differ.";
  if (cause.startsWith("another operation")) return `From here, the two runs execute different operations${cause.slice("another operation".length)}.`;
  return cause.startsWith("the same inputs") ? `${cause[0].toUpperCase()}${cause.slice(1)}.` : `Because of ${cause}.`;
}

function rowsText(rows) {
  const called = (a, b) => (a === b ? `row ${a}` : `rows ${a} and ${b}`);
  const nameOf = ([place, a, b]) => (a === b && a === place ? called(a, b) : `${called(a, b)} at place ${place}`);
  const named = rows.slice(0, 6).map(nameOf);
  return `The batches differ in: ${named.join(", ")}${rows.length > 6 ? `, and ${whole(rows.length - 6)} more` : ""}.`;
}

function sideOf(run, step, side, place) {
  if (!side) return ofRun(place, run, element("p", { class: "muted" }, "has no such operation"));
  const link = write({ view: "run", run, step, phase: side.phase, operation: side.number });
  const facts = [["operator", side.operator], ["phase", side.phase], ["module", side.module], ["line", side.line]].filter(([, text]) => text);
  return ofRun(
    place,
    run,
    formulaOf(run, step, side),
    element("dl", {}, ...facts.flatMap(([label, text]) => [element("dt", {}, label), element("dd", { class: "mono" }, text)])),
    element("p", {}, element("a", { href: link }, `Open it in step ${whole(step)}`)),
  );
}

// The line of mathematics, with links to operations in that run's step.
function formulaOf(run, step, { mathematics }) {
  const line = element("p", { class: "mathematics" }, typeset(mathematics));
  for (const link of line.querySelectorAll("a[data-operation]")) {
    link.href = write({ view: "run", run, step, operation: link.dataset.operation });
  }
  return line;
}

function tensorsOf(title, found, role, runs, sides) {
  return found.map((each, place) => {
    const pair = [0, 1].map((side) => tensorOf(sides?.[side], role, each.name));
    return element(
      "div",
      { class: "differing" },
      place ? null : element("h3", {}, title),
      element("p", {}, element("code", {}, pair[0]?.called ?? each.name), pair[0] ? kindOf(pair[0]) : null),
      element("p", { class: "small" }, sizeText(each)),
      pair.every((tensor) => tensor?.shape.length) ? grids(pair, each, runs) : null,
      each.positions.length ? positionsOf(each, runs, pair[0] ?? {}) : null,
    );
  });
}

function kindOf({ shape, dtype }) {
  return element("span", { class: "muted" }, ` ${shapeText(shape)} ${dtype}${isComplex({ dtype }) ? ", here as absolute values" : ""}`);
}

function tensorOf(side, role, name) {
  return side?.tensors.find((tensor) => tensor.role === role && tensor.name === name) ?? null;
}

function sizeText({ elements, of, positions, size }) {
  if (!positions.length) return "Different shape or dtype.";
  const all = of === 1 ? "Differs" : `All ${whole(of)} numbers differ`;
  const share = elements === of ? all : `${whole(elements)} of ${whole(of)} numbers differ`;
  return `${share}${size && `, ${size}`}.`;
}

// Both tensors around the first number that differs, in as many digits as distinguish the two.
function grids(pair, { name }, runs) {
  const both = pair.map(({ values: rows, window: [[top], [left]] }) => ({ rows, first: [top, left] }));
  const [{ rows, first }] = both;
  const different = new Set(pair[0].different.map(([row, column]) => `${row},${column}`));
  const at = pair[0].different[0] ?? first;
  const part = {
    different,
    rows: around(at[0] - first[0], rows.length, ROWS),
    columns: around(at[1] - first[1], rows[0].length, COLUMNS),
  };
  return element("div", { class: "both" }, ...both.map((own, side) => grid(own, both[1 - side], part, `${name} of ${runs[side]}`, side)));
}

// Return at most so many places, one of them before the requested place.
function around(at, size, most) {
  const first = Math.max(0, Math.min(at - 1, size - most));
  return Array.from({ length: Math.min(most, size) }, (_, place) => first + place);
}

function grid(own, other, { rows, columns, different }, label, side) {
  const head = element("tr", {}, element("td"), ...columns.map((j) => element("th", { scope: "col" }, whole(own.first[1] + j))));
  const body = rows.map((i) => element(
    "tr",
    {},
    element("th", { scope: "row" }, whole(own.first[0] + i)),
    ...columns.map((j) => {
      const [value, counterpart] = [own.rows[i]?.[j], other.rows[i]?.[j]];
      const isDifferent = different.has(`${own.first[0] + i},${own.first[1] + j}`);
      const text = textOf(value, isDifferent ? digitsFor(value, counterpart) : 4);
      return element("td", { title: String(value) }, isDifferent ? element("mark", {}, text) : text);
    }),
  ));
  const caption = element("caption", { class: "unseen" }, `${label}; differences are marked`);
  const table = element("table", { class: "numbers" }, caption, element("thead", {}, head), element("tbody", {}, body));
  return element("div", { class: `scrolling series-${side}`, tabIndex: 0, role: "region", "aria-label": label }, table);
}

function digitsFor(one, other) {
  return [4, 6, 9, 12].find((digits) => textOf(one, digits) !== textOf(other, digits)) ?? 17;
}

function textOf(value, digits) {
  return typeof value === "number" ? short(value, digits) : String(value);
}

// The first numbers that differ, in full.
function positionsOf({ name, positions, values }, runs, { dtype, units = values.map(() => null) }) {
  const areFew = units.every((each) => each === null || each <= READABLE);
  const isFar = units.some((each) => each !== null);
  const distances = units.map((each, at) => (each === null ? "" : areFew ? whole(each) : short(Math.abs(values[at][0] - values[at][1]))));
  const headings = ["place", ...runs, ...(isFar ? [areFew ? "units apart" : "apart"] : [])];
  const head = element("tr", {}, ...headings.map((text) => element("th", { scope: "col" }, text)));
  const rows = positions.map((position, at) => element(
    "tr",
    { hidden: at >= POSITIONS },
    element("th", { scope: "row" }, position.length ? `[${position.join(", ")}]` : "the number"),
    ...values[at].map((value) => element("td", { title: String(value) }, typeof value === "number" ? fullText(value, dtype === "float32") : String(value))),
    isFar ? element("td", {}, distances[at]) : null,
  ));
  const table = element("table", { class: "positions" }, element("thead", {}, head), element("tbody", {}, rows));
  const more = button(`${positions.length - POSITIONS} more`, () => {
    rows.forEach((row) => (row.hidden = false));
    more.remove();
  }, { class: "plain" });
  const label = `${name}, the first numbers that differ`;
  const scrolling = element("div", { class: "scrolling", tabIndex: 0, role: "region", "aria-label": label }, table);
  return [scrolling, positions.length > POSITIONS ? more : null];
}

// The identical inputs of the operation, in a line.
function restOf({ results, inputs }, [one]) {
  const different = new Set([...results, ...inputs].map(({ name }) => name));
  const same = one.tensors.filter(({ name }) => !different.has(name));
  const texts = same.map((each) => `${each.called} (${shapeText(each.shape)})`);
  return same.length ? element("p", { class: "muted" }, `Identical in both: ${texts.join(", ")}.`) : null;
}
