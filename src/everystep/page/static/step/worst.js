// The table of the worst rows: the contribution of each to the loss and the gradients, and its content.

import { button, element } from "../shared/elements.js";
import { fullText, numberOf, short } from "../shared/format.js";

/**
 * Return the head and the body of the table.
 *
 * answer: {rows, measures, columns} of the server; places: of the rows in the batch; order: by which they are ranked; leaveOut(row): opens the
 * what-if dialog. Images are canvases with `data-place`, still to be drawn.
 */
export function worstRows({ rows, measures, columns }, places, order, { batch, tensors }, leaveOut) {
  const given = places.map((place) => ({ place, ...rows[place] }));
  const most = Math.max(...given.map((row) => numberOf(row[order])).filter(Number.isFinite));
  const measured = ({ key, header, is_share: isShare }) => numbers(header, (row) => row[key], { text: isShare ? percent : short, most: key === order ? most : null });
  const shown = [
    ...(batch.images ? [images(tensors[batch.images].shape)] : []),
    { title: "row", isNumber: true, cell: ({ row }) => element("th", { scope: "row", class: "number" }, rowButton(row, leaveOut)) },
    ...measures.map(measured),
    ...columns.map(({ name, is_number: isNumber }, which) => (isNumber ? numbers(name, ({ values }) => values[which]) : texts(name, which))),
  ];
  const head = shown.map(({ title, isNumber, isOrder }) => element("th", { scope: "col", class: isNumber ? "number" : "", "aria-sort": isOrder ? "descending" : null }, title));
  const body = given.map((row) => element("tr", {}, shown.map(({ cell }) => cell(row))));
  return [element("thead", {}, element("tr", {}, head)), element("tbody", {}, body)];
}

function rowButton(row, leaveOut) {
  return button(String(row), () => leaveOut(row), { class: "plain", title: `what if row ${row} is left out?` });
}

// Their size is set at once, so that nothing moves when they are drawn.
function images([, , height, width]) {
  return { title: "", cell: ({ place }) => element("td", {}, element("canvas", { width, height, "data-place": place })) };
}

function texts(title, which) {
  return { title, cell: ({ values }) => element("td", {}, values[which]) };
}

// `most`: the largest finite number, in the column by which rows are ranked: its numbers have bars.
function numbers(title, valueOf, { text = short, most = null } = {}) {
  const cell = (row) => {
    const number = numberOf(valueOf(row));
    const made = numberCell(number, text);
    if (number !== null && most > 0 && number >= 0) made.style.setProperty("--part", `${100 * Math.min(number / most, 1)}%`);
    return made;
  };
  return { title, isNumber: true, isOrder: most !== null, cell };
}

/** Return the cell of a number, null if it is unknown. */
export function numberCell(number, text = short) {
  if (number === null) return element("td", { class: "number" }, "–");
  return element("td", { class: Number.isFinite(number) ? "number" : "number nonfinite", title: fullText(number) }, text(number));
}

// Decimals as in the terminal, so that percentages align.
function percent(share) {
  return Number.isFinite(share) ? `${(100 * share).toFixed(1)}%` : short(share);
}
