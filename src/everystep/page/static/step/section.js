// A section of an open step: its heading and its parts.

import { batch } from "./batch.js";
import { element } from "../shared/elements.js";
import { short, whole } from "../shared/format.js";
import { network } from "./network.js";
import { operationList } from "./operation.js";
import { operationsOf } from "./outline.js";
import { composed, fixed, rebuilt, setText, show } from "../shared/part.js";
import { tensorRow } from "../tensor/tensor.js";
import { changes, formulas, parameterName, scale, settingsText, update } from "./update.js";

/** Explanations of the phases for newcomers. */
const EXPLANATIONS = {
  batch: "The rows (samples) that this step learns from.",
  forward: "What does the model predict for these rows with its current parameters?",
  loss: "How far are the predictions from the targets, as one number?",
  zero_grad: "PyTorch adds new gradients to old ones, so each step first drops those of the previous step.",
  backward: "How much would the loss change if a number changed a little?",
  update: "Each parameter moves a little against its gradient, which makes the loss smaller.",
};
const UPDATED_BEFORE = "This optimizer updates several times in this step; the changes are those of all its updates together.";

/**
 * Return the part of an entry of the outline, with {entry, inner}.
 *
 * level: of its heading; inner: the sections in it, if it has several passes.
 */
export function section(view, entry, level = 3) {
  const link = element("a", { href: `#phase-${entry.key}`, "data-phase": entry.key }, ...titleOf(entry));
  const settings = isSegment(entry) && entry.phase === "update" ? [settingsBeside(entry)] : [];
  const passes = entry.passes?.map((entries, number) => pass(view, entries, number, entry.passes.length)) ?? [];
  const parts = [...settings, ...(entry.passes ? [...networksOf(view, entry.passes[0]), ...passes] : partsOf(view, entry))];
  const about = { class: "phase", id: `phase-${entry.key}`, "aria-label": entry.label };
  const title = element(`h${level}`, {}, link, ...settings.map((part) => part.node));
  const explanation = entry.key === entry.phase && EXPLANATIONS[entry.phase] ? element("p", { class: "explanation" }, EXPLANATIONS[entry.phase]) : "";
  const node = element("section", about, title, explanation, ...parts.slice(settings.length).map((part) => part.node));
  return { ...composed(node, parts), entry, inner: passes.flatMap((one) => one.sections) };
}

function isSegment({ place }) {
  return place !== undefined;
}

function titleOf({ number, title }) {
  return number ? [element("span", { class: "muted" }, String(number)), " ", title] : [title];
}

function partsOf(view, entry) {
  const { phase } = entry;
  if (phase === "batch") return [batch(view)];
  if (entry.pending) return [tensors(view, "gradients", entry.pending)];
  if (entry.changed) return [changes(view, () => entry.changed)];
  const list = operationList(view, (content) => operationsOf(entry, content));
  if (isSegment(entry)) return partsOfSegment(view, entry, list);
  if (phase === "forward") return [network(view), list];
  if (phase === "loss") return [lossFunction(), list];
  if (phase === "zero_grad") return [dropping(), tensors(view, "dropped"), zeroing(list)];
  if (phase === "backward") return [list, tensors(view, "gradients", null, "Gradients")];
  if (phase === "update") return [...update(view), operationFold(list, entry)];
  return [list];
}

function partsOfSegment(view, entry, list) {
  const { phase, parameters } = entry;
  if (phase === "forward" && !entry.isInPass) return [...networksOf(view, [entry]), list];
  if (phase !== "update" || !parameters.length) return [list];
  return [
    ...(entry.count > 1 ? [fixed(element("p", { class: "small muted" }, UPDATED_BEFORE))] : []),
    formulas(() => parameters),
    changes(view, () => parameters),
    scale(),
    tensors(view, "gradients", parameters, "Gradients, as backward left them"),
    operationFold(list, entry),
  ];
}

/** Return the networks that entries go through for the first time in the step. */
function networksOf(view, entries) {
  return entries.filter(({ phase, count }) => phase === "forward" && count === 1).map(({ part }) => network(view, { part }));
}

/** Return the settings of an update's optimizer, for its heading. */
function settingsBeside({ place }) {
  const node = element("span", { class: "alongside" });
  return fixed(node, ({ segments }) => setText(node, segments[place].optimizer ? settingsText(segments[place]) : ""));
}

/** Return one of several passes, folded; its line has its operations, and the tensor on which backward was called. */
function pass(view, entries, number, count) {
  const sections = entries.map((entry) => section(view, { ...entry, isInPass: true, label: `${entry.title}, pass ${number + 1}` }, 4));
  const range = element("span", { class: "range small muted" });
  const from = element("span", { class: "small muted" });
  const summary = element("summary", {}, `Pass ${number + 1} of ${count}`, range, from);
  const node = element("details", { class: "pass" }, summary, ...sections.map((one) => one.node));
  const line = fixed(summary, (content) => {
    setText(range, rangeText(entries, content));
    setText(from, beginningText(entries, content));
  });
  return { ...composed(node, [line, ...sections]), sections };
}

function rangeText(entries, { segments }) {
  const [first, last] = [segments[entries[0].place].first, segments[entries.at(-1).place].last];
  return first === last ? `#${first}` : `#${first} to #${last}`;
}

// Autograd starts with a 1 as the gradient of that number.
function beginningText(entries, { segments, operations, tensors }) {
  const backward = entries.find(({ phase }) => phase === "backward");
  if (!backward) return "";
  const { first } = segments[backward.place];
  const beginning = [operations[first], operations[first - 1]].find((one) => one?.operator === "aten.ones_like.default");
  if (!beginning) return "";
  const [{ called, tensor }] = beginning.inputs;
  return `backward from ${called} = ${short(tensors[tensor].mean)}`;
}

function lossFunction() {
  const node = element("p", { class: "settings-line" });
  return fixed(node, ({ loss_function }) => setText(node, loss_function.text));
}

function dropping() {
  const node = element("p", { class: "settings-line" });
  return fixed(node, ({ step, dropped }) =>
    setText(node, dropped.length ? `drops the gradients of step ${whole(step - 1)}` : "no gradients yet"),
  );
}

/** Return the part of the operations of zero_grad, if it has any. */
function zeroing(list) {
  return {
    ...list,
    update(content) {
      show(list.node, content.operations.some(({ phase }) => phase === "zero_grad"));
      list.update(content);
    },
  };
}

/** Return the part of the operations of an update, folded, because its formulas describe them. */
function operationFold(list, entry) {
  const summary = element("summary");
  const node = element("details", { class: "fold" }, summary, list.node);
  return {
    ...list,
    node,
    update(content) {
      const { length } = operationsOf(entry, content);
      setText(summary, length === 1 ? "its operation" : `its ${whole(length)} operations`);
      show(node, length > 0);
      list.update(content);
    },
  };
}

/** Return the part that lists a tensor of each parameter; parameters: only of these. */
function tensors(view, kind, parameters = null, title = "") {
  const of = (content) => {
    if (parameters === null) return content[kind];
    const known = new Map(content[kind].map((one) => [one.parameter, one]));
    return parameters.flatMap((parameter) => known.get(parameter) ?? []);
  };
  return rebuilt(element("div", { class: "tensors" }), of, (content) => {
    const rows = of(content).map(({ parameter, tensor }) => tensorRow(view, { id: tensor, name: `${parameterName(content, parameter)} grad`, title: `${parameter}.grad` }));
    return title && rows.length ? [fixed(element("h4", {}, title)), ...rows] : rows;
  });
}
