// A line of mathematics, typeset: `∂#1 = ∂#2 · 2.weight`.

import { element } from "../shared/elements.js";

const WORDS = new Set(["if", "else", "at", "with", "probability", "of", "tensors"]);
const SIGNS = { "*": "×", "-": "−" };

// In order: a reference, a superscript, a number, a setting (`padding 1`, `p=0.5`), a name (of a function where a parenthesis follows),
// anything else.
const TOKEN = new RegExp(
  [
    String.raw`(?<reference>∂?#(?<number>\d+)(?:\.\d+)?)`,
    String.raw`(?<raised>[ᵀ²³]|\^-?[\w.]+)`,
    String.raw`(?<digits>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[+-]?\d+)?)(?![\w.])`,
    String.raw`(?<setting>[A-Za-z_]\w*(?==\S| \d))`,
    String.raw`(?<name>(?:\w+\.)*[A-Za-z_]\w*)(?<call>'?\()?`,
    String.raw`(?<other>[^])`,
  ].join("|"),
  "gu",
);
const RAISED = { ᵀ: "T", "²": "2", "³": "3" };

/** Return the nodes of a line; references like #3 are links to that operation. */
export function typeset(text) {
  return [...text.matchAll(TOKEN)].map(({ groups }) => nodeOf(groups));
}

/** Return a link to an operation. */
export function reference(number, text = `#${number}`) {
  return element("a", { class: "reference", href: `#operation-${number}`, "data-operation": number }, text);
}

function nodeOf({ reference: referred, number, raised, digits, setting, name, call, other }) {
  if (referred) return reference(number, referred);
  if (raised) return element("sup", {}, RAISED[raised] ?? raised.slice(1).replace("-", "−"));
  if (digits) return element("span", { class: "digits" }, digits);
  if (setting) return element("span", { class: "word" }, setting);
  if (!name) return SIGNS[other] ?? other;
  if (call) return element("span", { class: "function" }, name + call);
  if (WORDS.has(name)) return element("span", { class: "word" }, name);
  return named(name);
}

function named(name) {
  const isGradient = name.endsWith(".grad");
  const whole = isGradient ? name.slice(0, -".grad".length) : name;
  const dot = whole.lastIndexOf(".") + 1;
  return element(
    "span",
    { class: "name" },
    dot ? element("span", { class: "path" }, whole.slice(0, dot)) : null,
    element("i", {}, whole.slice(dot)),
    isGradient ? element("span", { class: "path" }, ".grad") : null,
  );
}
