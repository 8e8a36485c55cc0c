// The operations of a step: each a line of mathematics that unfolds to its arguments and tensors.

import { copyMark } from "../shared/copy.js";
import { element } from "../shared/elements.js";
import { fixed, rebuilt, setText, unfolding } from "../shared/part.js";
import { statisticsLine } from "../tensor/statistics.js";
import { typeset } from "./mathematics.js";
import { tensorRow } from "../tensor/tensor.js";
import { thumbnail } from "../tensor/thumbnail.js";

/** Operations in a block, which the browser draws only near the screen. */
const BLOCK = 40;
/** A longer module name is below the mathematics if there is little room. */
const BESIDE = 14;

/** Return the key of an unfolded operation. */
export function keyOfOperation(number) {
  return `operation ${number}`;
}

/** Return the part that lists operations; of(content): which. */
export function operationList(view, of) {
  const node = element("div", { class: "operations" });
  return rebuilt(node, structureOf, build);

  function structureOf(content) {
    return of(content).map(({ number, operator, module }) => [number, operator, module]);
  }

  function build(content) {
    const rows = of(content).map(({ number }) => operationRow(view, number));
    const blocks = [];
    for (let start = 0; start < rows.length; start += BLOCK) blocks.push(block(rows.slice(start, start + BLOCK)));
    return blocks.length ? blocks : [fixed(element("p", { class: "muted small" }, "no operations"))];
  }
}

function block(rows) {
  return {
    node: element("div", { class: "block" }, ...rows.map((row) => row.node)),
    update: (content) => rows.forEach((row) => row.update(content)),
    close: () => rows.forEach((row) => row.close()),
  };
}

function operationRow(view, number) {
  const mathematics = element("span", { class: "mathematics" });
  const module = element("span", { class: "module" });
  const operator = element("span", { class: "operator" });
  const statistics = statisticsLine();
  const picture = thumbnail(view, ({ operations }) => operations[number].results[0]?.tensor);
  let line = null;
  const { source } = view;
  const copies = element(
    "span",
    { class: "copies" },
    copyMark(() => line, `copy the formula of #${number}`),
    source.link ? copyMark(() => source.link(view.content.step, number), `copy the link to #${number}`, "link") : null,
  );
  const part = unfolding(view, {
    key: keyOfOperation(number),
    name: `#${number}`,
    beside: [mathematics, module, element("span", { class: "quiet" }, operator, statistics.node), picture.node, copies],
    className: "operation",
    open: () => insides(view, number),
    changed: (isOpen) => view.chosen(number, isOpen),
    update({ operations, tensors, network }) {
      const operation = operations[number];
      const now = operation.left ? `${operation.left} = ${operation.right}` : operation.right;
      if (now !== line) {
        line = now;
        mathematics.replaceChildren(...typeset(now));
        part.toggle.setAttribute("aria-label", `operation #${number}: ${now}`);
        const layer = network.find(({ path }) => path === operation.module);
        const origin = [layer?.type, operation.module].filter(Boolean).join(" ");
        setText(module, origin);
        module.classList.toggle("long", origin.length > BESIDE);
        setText(operator, operation.operator);
        operator.title = operation.operator;
      }
      statistics.update(tensors[operation.results[0]?.tensor]);
      picture.update(view.content);
    },
  });
  part.node.dataset.number = number;
  part.node.id = `operation-${number}`;
  view.rows.set(number, part);
  const close = () => {
    if (view.rows.get(number) === part) view.rows.delete(number); // it may be in another list now
    picture.close();
    part.close();
  };
  return { ...part, close };
}

function insides(view, number) {
  const node = element("div", { class: "insides" });
  const structureOf = ({ operations }) => {
    const { operator, inputs, results } = operations[number];
    return [operator, inputs.map((one) => one.tensor), results.map((one) => one.tensor)];
  };
  return rebuilt(node, structureOf, ({ operations }) => {
    const { inputs, results } = operations[number];
    if (results.length) view.opened.add(results[0].tensor);
    return [...tensors(view, "Results", results), ...tensors(view, "Inputs", inputs), argumentList(number)];
  });
}

function tensors(view, title, given) {
  if (!given.length) return [];
  const rows = given.map(({ called, name, tensor }) => tensorRow(view, { id: tensor, name: called, note: name === called ? "" : name }));
  return [fixed(element("h4", {}, title)), ...rows];
}

function argumentList(number) {
  const list = element("dl", { class: "arguments" });
  let shown = null;
  const update = ({ operations }) => {
    const given = operations[number].arguments;
    const now = JSON.stringify(given);
    if (now === shown) return;
    shown = now;
    list.replaceChildren(...given.flatMap(argument));
  };
  return fixed(element("div", {}, element("h4", {}, "Arguments"), list), update);
}

function argument([name, text, isDefault]) {
  const className = isDefault ? "default" : "";
  const value = element("dd", { class: className }, text, isDefault ? element("span", {}, " by default") : null);
  return [element("dt", { class: className }, name), value];
}
