// Questions about a whole run: measure in hindsight, find the steps that meet a condition, verify, rerun.

import { button, element } from "../shared/elements.js";
import { fullText, numberOf, short, whole } from "../shared/format.js";
import { detailsOf, labelled, questionForm } from "./question.js";
import { rerunning } from "./rerun.js";
import { operationLink, stepLink } from "../run/head.js";

/** Steps listed at once. */
const LISTED = 60;
/** The language of expressions. */
const LANGUAGE = [
  ["loss  step  lr", "recorded values; any measurement by its name"],
  ["parameters['0.weight']", "before the update; also gradients, buffers, activations['1'], batch.x, batch.y"],
  ["updates['0.weight']", "after minus before; also .before and .after"],
  ["previous.loss", "of the previous step; also previous.gradients['0.weight'] and all others"],
  ["norm mean std min max sum median", "one number of a tensor; also rms, var, quantile(x, q), numel"],
  ["zeros(x)  nonfinite(x)", "the fraction of zeros; the number of NaN and infinite elements"],
  ["dot(a, b)  cosine(a, b)", "of two tensors of the same shape"],
  ["abs sqrt exp log log10 sign isnan isinf", "of each element; any(x) and all(x) reduce them to one answer"],
  ["+ - * / // % ** @", "and comparisons, and, or, not, a if c else b, x[0, :3]"],
];

/** Show the questions about a run in `host`; return {update(about), close()}. */
export function questions(host, about, { goTo, changed }) {
  const place = { about, goTo, changed };
  const parts = [measuring(place), finding(place), findingOrigin(place), verifying(place), rerunning(place)];
  host.replaceChildren(
    element(
      "section",
      { class: "questions", "aria-labelledby": "ask-title" },
      element("h2", { id: "ask-title" }, "Ask"),
      ...parts.map(({ node }) => node),
      languageHelp(),
    ),
  );
  const update = (now) => {
    place.about = now;
    parts.forEach((part) => part.update());
  };
  update(about);
  return { update, close: () => parts.forEach((part) => part.close()) };
}

function measuring(place) {
  const expression = expressionField("Measure", "measure");
  const name = element("input", { type: "text", autocomplete: "off", placeholder: "as the expression" });
  const every = element("input", { type: "number", min: 1, step: 1, value: "1", required: true });
  const overwrite = element("input", { type: "checkbox" });
  const overwriting = element("label", { class: "option", hidden: true }, overwrite, "overwrite an existing one");
  const question = questionForm(place, {
    title: "Measure",
    description: "Adds a number for each step, as if it had been logged during training.",
    expression,
    options: [labelled("name", name), labelled("every", every, "steps"), overwriting],
    verb: "Measure",
    path: "measure",
    content: () => ({
      expression: expression.input.value.trim(),
      name: name.value.trim() || null,
      every: Number(every.value),
      overwrite: overwrite.checked,
    }),
    // The server reports if the name is taken by a measurement that may be overwritten.
    failed: (message) => (overwriting.hidden = !message.includes("overwrite")),
    done(result) {
      overwriting.hidden = true;
      overwrite.checked = false;
      place.changed();
      return element("p", { class: "result" }, result.text);
    },
  });
  return { ...question, update: () => expression.suggest(toMeasure(place.about)) };
}

function finding(place) {
  const expression = expressionField("Find the step when", "when");
  const which = element("select", {}, ...["first", "last", "all"].map((each) => element("option", {}, each)));
  const question = questionForm(place, {
    title: "When",
    description: "Finds the steps at which a condition is true.",
    expression,
    options: [labelled("which", which)],
    verb: "Find",
    path: "when",
    content: () => ({ condition: expression.input.value.trim(), which: which.value }),
    done: (result) => foundSteps(place, result),
  });
  return { ...question, update: () => expression.suggest(toFind(place.about)) };
}

function findingOrigin(place) {
  const question = questionForm(place, {
    title: "First NaN or infinity",
    description: "Finds the operation that made it, and the rows behind it.",
    options: [],
    verb: "Find",
    path: "first-nonfinite",
    content: () => ({}),
    done: ({ found, text }) => (found ? originOf(place, found, text) : element("p", { class: "result" }, text)),
  });
  return { ...question, update: () => (question.node.hidden = !place.about.nonfinite) };
}

function verifying(place) {
  return questionForm(place, {
    title: "Verify",
    description: "Replays every step, and compares each loss and each snapshot, bit for bit.",
    options: [],
    verb: "Verify",
    path: "verify",
    content: () => ({}),
    done: ({ is_exact: isExact, text }) => [
      element("p", { class: isExact ? "result" : "alarm" }, text.split("\n").at(-1)),
      detailsOf(text),
    ],
  });
}

function expressionField(label, id) {
  const input = element("input", {
    type: "text", class: "mono", id: `ask-${id}`, required: true, autocomplete: "off", spellcheck: false, autocapitalize: "off",
  });
  const examples = element("p", { class: "examples" });
  const set = (text) => {
    input.value = text;
    input.focus();
  };
  return {
    input,
    node: element("div", { class: "expression" }, element("label", { class: "unseen", htmlFor: input.id }, label), input, examples),
    suggest(texts) {
      if (examples.textContent === texts.join("")) return;
      input.placeholder = texts[0] ?? "";
      examples.replaceChildren(...texts.map((text) => button(text, () => set(text), { class: "example mono" })));
    },
  };
}

function foundSteps(place, { steps, count: all, inexact: leftOut }) {
  const from = leftOut.map(whole).join(", ");
  const left = leftOut.length > 0 && element("p", { class: "note" }, `Not evaluated, because the replay was not exact or ended: from step ${from}.`);
  if (!steps.length) return [element("p", { class: "result" }, "at no step"), left];
  const list = element("ul", { class: "found" });
  const more = button("", () => show(list.children.length + 10 * LISTED), { class: "plain" });
  const show = (count) => {
    list.append(...steps.slice(list.children.length, count).map((each) => foundStep(place, each)));
    const rest = steps.length - list.children.length;
    more.textContent = `${whole(rest)} more`;
    more.hidden = !rest;
  };
  show(LISTED);
  const listed = all > steps.length ? `; the first ${whole(steps.length)} are listed` : "";
  const count = all > 1 && element("p", { class: "result" }, `${whole(all)} steps${listed}`);
  return [count, list, more, left];
}

function foundStep(place, { step, loss }) {
  const loss4 = element("span", { class: "muted", title: fullText(numberOf(loss)) }, `loss ${short(loss)}`);
  return element("li", {}, stepLink(place.about.name, step, place.goTo), " ", loss4);
}

function originOf({ about }, found, text) {
  const [first, ...others] = text.split("\n");
  return [
    element("p", { class: "result" }, first),
    others.length > 0 && element("pre", { tabIndex: 0, class: "origin" }, others.join("\n")),
    element("p", {}, operationLink(about.name, found)),
  ];
}

/** Return expressions worth measuring in a run. */
function toMeasure(about) {
  const { weight, active } = about.layers;
  const measured = about.measurements.find(({ is_rate: isRate }) => !isRate)?.name;
  return [
    weight && `norm(gradients['${weight}'])`,
    weight && `norm(updates['${weight}']) / norm(parameters['${weight}'])`,
    active && `zeros(activations['${active}'])`,
    about.has_loss && "loss / previous.loss",
    about.has_loss && measured && /^[a-z_]\w*$/i.test(measured) && /loss/.test(measured) && `${measured} - loss`,
  ].filter(Boolean);
}

/** Return conditions worth looking for in a run. */
function toFind(about) {
  const { weight } = about.layers;
  const measured = about.measurements.find(({ better }) => better === "up")?.name;
  return [
    about.has_loss && (about.nonfinite ? "isnan(loss)" : "loss < 1"),
    about.has_loss && "loss > previous.loss",
    measured && `${measured} > 0.9`,
    weight && `norm(gradients['${weight}']) > 10`,
  ].filter(Boolean);
}

/** Return the language of expressions, folded away. */
function languageHelp() {
  return element(
    "details",
    { class: "more language" },
    element("summary", {}, "What an expression can contain"),
    element("dl", {}, ...LANGUAGE.flatMap(([code, meaning]) => [element("dt", { class: "mono" }, code), element("dd", {}, meaning)])),
    element("p", { class: "muted small" }, "Expressions are parsed; nothing in them runs as Python."),
  );
}
