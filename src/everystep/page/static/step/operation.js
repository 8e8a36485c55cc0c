// The operations of a step: each a line of mathematics that unfolds to its arguments and tensors.

import { copyMark } from "../shared/copy.js";
import { element } from "../shared/elements.js";
import { composed, fixed, rebuilt, setText, show, unfolding } from "../shared/part.js";
import { statisticsLine } from "../tensor/statistics.js";
import { typeset } from "./mathematics.js";
import { tensorRow } from "../tensor/tensor.js";
import { Thumbnail } from "../tensor/thumbnail.js";

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
    const numbers = of(content).map(({ number }) => number);
    const rows = numbers.map((number, place) => operationRow(view, number, numbers[place - 1]));
    const blocks = [];
    for (let start = 0; start < rows.length; start += BLOCK) blocks.push(block(rows.slice(start, start + BLOCK)));
    return blocks.length ? blocks : [fixed(element("p", { class: "muted small" }, "no operations"))];
  }
}

function block(rows) {
  return composed(element("div", { class: "block" }, ...rows.map((row) => row.node)), rows);
}

/** before: the operation above it, if there is one. */
function operationRow(view, number, before) {
  const mathematics = element("span", { class: "mathematics" });
  const module = element("span", { class: "module" });
  const operator = element("span", { class: "operator" });
  const statistics = statisticsLine();
  const picture = new Thumbnail(view, ({ operations }) => operations[number].results[0]?.tensor);
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
    alongside: [mathematics, module, element("span", { class: "quiet" }, operator, statistics.node), picture, copies],
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
    },
  });
  const code = codeLine(({ operations }) => (isSameLine(operations[number], operations[before]) ? null : operations[number].line));
  part.node.prepend(code.node);
  part.node.dataset.number = number;
  part.node.id = `operation-${number}`;
  view.rows.set(number, part);
  const close = () => {
    if (view.rows.get(number) === part) view.rows.delete(number); // it may be in another list now
    part.close();
  };
  const update = (content) => {
    code.update(content);
    part.update(content);
  };
  return { ...part, update, close };
}

function placeOf({ file, line }) {
  return `${file}:${line}`;
}

function isSameLine(one, other) {
  const text = ({ line }) => line && `${placeOf(line)} ${line.text}`;
  return Boolean(other) && text(one) === text(other);
}

/** Return the part of a line of code; of(content): which, null for none. */
function codeLine(of) {
  const place = element("span", { class: "place" });
  const text = element("code", {});
  const node = element("div", { class: "code-line" }, place, text);
  const update = (content) => {
    const line = of(content);
    show(node, Boolean(line));
    setText(place, line ? placeOf(line) : "");
    setText(text, line?.text ?? "");
    node.title = line ? [`in ${line.function}`, ...line.callers.map((each) => `called by ${placeOf(each)}`)].join("\n") : "";
  };
  return { node, update };
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
    return [...tensors(view, "Results", results), ...tensors(view, "Inputs", inputs), argumentList(number), calls(number)];
  });
}

function tensors(view, title, given) {
  if (!given.length) return [];
  const rows = given.map(({ called, name, tensor }) => tensorRow(view, { id: tensor, name: called, note: name === called ? "" : name }));
  return [fixed(element("h4", {}, title)), ...rows];
}

function argumentList(number) {
  const given = ({ operations }) => operations[number].arguments;
  const list = rebuilt(element("dl", { class: "arguments" }), given, (content) => given(content).flatMap(argument));
  return composed(element("div", {}, element("h4", {}, "Arguments"), list.node), [list]);
}

/** Return the part that lists the line of code of an operation, and those that led to it. */
function calls(number) {
  const linesOf = ({ operations }) => {
    const { line } = operations[number];
    return line ? [line, ...line.callers] : [];
  };
  const item = (each) => fixed(element("li", {}, element("span", { class: "place" }, placeOf(each)), element("code", {}, each.text)));
  const list = rebuilt(element("ol", { class: "calls" }), linesOf, (content) => linesOf(content).map(item));
  const node = element("div", {}, element("h4", {}, "Your code"), list.node);
  return composed(node, [list, fixed(node, (content) => show(node, linesOf(content).length > 0))]);
}

function argument([name, text, isDefault]) {
  const className = isDefault ? "default" : "";
  const value = element("dd", { class: className }, text, isDefault ? element("span", {}, " by default") : null);
  return [element("dt", { class: className }, name), value].map((node) => fixed(node));
}
