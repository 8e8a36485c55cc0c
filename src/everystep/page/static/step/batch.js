// The batch of a step: its rows of the data, and what is in them.

import { button, described, element } from "../shared/elements.js";
import { images } from "./images.js";
import { Ranking } from "./ranking.js";
import { whole } from "../shared/format.js";
import { composed, fixed, rebuilt, setText, show } from "../shared/part.js";
import { tensorRow } from "../tensor/tensor.js";

const ROWS_SHOWN = 12;
/** A batch with more tensors shows the others on demand. */
const TENSORS_SHOWN = 8;

/** Return the part that shows the batch. */
export function batch(view) {
  const structureOf = ({ batch, tensors }) => [
    batch.images !== null,
    batch.tensors.map(({ name, tensor }) => [name, tensors[tensor].shape.slice(1)]),
    batch.targets === null,
    batch.values.map(({ name }) => name),
  ];
  return rebuilt(element("div", { class: "batch" }), structureOf, ({ batch }) => [
    rowsOfData(),
    ...(batch.images ? [images(view)] : batch.targets ? [targets()] : []),
    ...(batch.values.length ? [values()] : []),
    ...(view.source.rows && batch.tensors.length ? [new Ranking(view)] : []),
    ...folded(batch.tensors.map(({ name, tensor }) => tensorRow(view, { id: tensor, name }))),
  ]);
}

function folded(rows) {
  const more = rows.slice(TENSORS_SHOWN);
  if (!more.length) return rows;
  const summary = element("summary", {}, more.length === 1 ? "1 more tensor" : `${whole(more.length)} more tensors`);
  const fold = element("details", { class: "fold" }, summary, ...more.map((row) => row.node));
  return [...rows.slice(0, TENSORS_SHOWN), composed(fold, more)];
}

function rowsOfData() {
  const text = element("span");
  const more = button("", () => tell(!isAll), { class: "plain" });
  const node = element("p", { class: "rows small muted" }, text, " ", more);
  let content = null;
  let isAll = false;

  function tell(all) {
    isAll = all;
    const { batch: { rows, rows_of: source }, is_of_loop: isOfLoop } = content;
    show(more, rows?.length > ROWS_SHOWN);
    if (!rows) return setText(text, isOfLoop ? "as in your loop" : "all rows of the data, in order");
    const listed = isAll ? rows : rows.slice(0, ROWS_SHOWN);
    setText(text, `${whole(rows.length)} rows of ${source}: ${listed.join(", ")}${listed.length < rows.length ? ", …" : ""}`);
    setText(more, isAll ? "fewer" : "all");
  }

  return fixed(node, (next) => {
    content = next;
    tell(isAll);
  });
}

// Images have their targets below them; targets of other rows are a list.
function targets() {
  const node = element("p", { class: "rows small muted" });
  return fixed(node, ({ batch }) => setText(node, `targets: ${listed(batch.targets, batch.targets.length)}`));
}

// Plain values of a loop's batch: names, texts, numbers.
function values() {
  const node = element("dl", { class: "arguments values" });
  return fixed(node, ({ batch }) => {
    node.replaceChildren(...described(batch.values.map(({ name, texts, count }) => [name, listed(texts, count)])));
  });
}

function listed(texts, count) {
  const shown = texts.slice(0, ROWS_SHOWN);
  return shown.join(", ") + (shown.length < count ? `, … (${whole(count)})` : "");
}
