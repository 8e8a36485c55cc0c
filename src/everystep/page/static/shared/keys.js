// Keys that work anywhere on the page, and the list of them that `?` shows.

import { closing, openDialog } from "./dialog.js";
import { element } from "./elements.js";

const bound = [];

/**
 * Bind keys; return a function that unbinds them.
 *
 * Each binding: {keys: ["ArrowLeft"], shown: "←", label: "the step before", press: (event) => ...}.
 */
export function bind(bindings) {
  bound.push(...bindings);
  return () => bindings.forEach((one) => bound.splice(bound.indexOf(one), 1));
}

/** Listen to keys. */
export function begin() {
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.altKey || event.ctrlKey || event.metaKey) return;
    if (document.querySelector("dialog[open]")) return;
    if (isTyping(event)) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const found = bound.find((one) => one.keys.includes(event.key));
    if (!found) return;
    event.preventDefault();
    found.press(event);
  });
}

/** Show all keys. */
export function help() {
  const rows = bound.flatMap(({ shown, label }) => (label ? [element("dt", {}, ...shown.split(" ").map(cap)), element("dd", {}, label)] : []));
  openDialog("Keys", [element("dl", { class: "keys" }, ...rows), closing()]);
}

function cap(text) {
  return element(/^[a-z]{2,}$/.test(text) ? "span" : "kbd", {}, text);
}

// Ignore keys that go into a field, or arrows that belong to the focused element.
function isTyping(event) {
  const { target } = event;
  if (target.isContentEditable || target.closest?.("select, textarea, input:not([type=checkbox], [type=radio])")) return true;
  return Boolean(target.closest?.("[data-own-keys]")) && /^(Arrow|Home|End|Page|\+|-| )/.test(event.key);
}
