// The batch of a step: its rows of the data, and what is in them.

import { button, element } from "../shared/elements.js";
import { images } from "./images.js";
import { ranking } from "./ranking.js";
import { whole } from "../shared/format.js";
import { fixed, rebuilt, setText, show } from "../shared/part.js";
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
    ...(view.source.rows && batch.tensors.length ? [ranking(view)] : []),
    ...folded(
      batch.tensors.map(({ name, tensor }) =>
        tensorRow(view, { id: tensor, name }),
      ),
    ),
  ]);
}

function folded(rows) {
  const more = rows.slice(TENSORS_SHOWN);
  if (!more.length) return rows;
  const summary = element("summary", {}, more.length === 1 ? "1 more tensor" : `${whole(more.length)} more tensors`);
  const fold = {
    node: element("details", { class: "fold" }, summary, ...more.map((row) => row.node)),
    update: (content) => more.forEach((row) => row.update(content)),
    close: () => more.forEach((row) => row.close()),
  };
  return [...rows.slice(0, TENSORS_SHOWN), fold];
}

function rowsOfData() {
  const text = element("span");
  const more = button("", () => tell(!isAll), { class: "plain" });
  const node = element("p", { class: "rows small muted" }, text, " ", more);
  let rows = null;
  let source = "";
  let isOfLoop = false;
  let isAll = false;

  function tell(all) {
    isAll = all;
    if (!rows) return setText(text, isOfLoop ? "as in your loop" : "all rows of the data, in order");
    const listed = isAll ? rows : rows.slice(0, ROWS_SHOWN);
    setText(text, `${whole(rows.length)} rows of ${source}: ${listed.join(", ")}${listed.length < rows.length ? ", …" : ""}`);
    setText(more, isAll ? "fewer" : "all");
  }

  return {
    node,
    update({ batch, is_of_loop }) {
      rows = batch.rows;
      source = batch.rows_of;
      isOfLoop = is_of_loop;
      show(more, Boolean(rows) && rows.length > ROWS_SHOWN);
      tell(isAll);
    },
  };
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
    node.replaceChildren(...batch.values.flatMap(({ name, texts, count }) => [element("dt", {}, name), element("dd", {}, listed(texts, count))]));
  });
}

function listed(texts, count) {
  const shown = texts.slice(0, ROWS_SHOWN);
  return shown.join(", ") + (shown.length < count ? `, … (${whole(count)})` : "");
}
