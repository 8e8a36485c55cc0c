// Dialogs, and command lines to copy.

import { copyButton } from "./copy.js";
import { element, showText } from "./elements.js";

let count = 0;

/** Return a form with a button that closes its dialog. */
export function closing(properties = {}) {
  return element("form", { method: "dialog", ...properties }, element("button", { autofocus: true }, "Close"));
}

/** Open a dialog with a title; return it. `closed`: called after it was closed; Escape closes it. */
export function openDialog(title, content, { closed = () => {} } = {}) {
  const id = `dialog-${++count}`;
  const dialog = element("dialog", { "aria-labelledby": id }, element("h2", { id }, title), content);
  document.querySelector("dialog[open]")?.close(); // a double click opens it once
  const opener = document.activeElement;
  dialog.addEventListener("close", () => {
    dialog.remove();
    closed();
    if (opener?.isConnected) opener.focus();
  });
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

/** Return a command line, or lines of Python, to copy; `set(text)` changes it. */
export function commandLine(label, text = "") {
  const shown = element("code", {}, text);
  const block = element("pre", { class: "command", tabIndex: 0, role: "group", "aria-label": label }, shown);
  const title = element("span", { class: "small muted" }, label);
  const node = element("div", { class: "command-line" }, title, copyButton(() => shown.textContent), block);
  return { node, set: (changed) => (shown.textContent = changed) };
}

/** Return a line of a form: a name, perhaps with an explanation, and its field. */
export function fieldLine(name, input, hint = null) {
  return element("label", { class: "line" }, element("span", {}, name, hint && element("span", { class: "hint" }, hint)), input);
}

/** Return the whole numbers in a text, with commas or spaces between; or the first word that is not one, as `wrong`. */
export function wholesIn(text) {
  const words = text.split(/[\s,;]+/).filter(Boolean);
  return { numbers: words.map(Number), wrong: words.find((word) => !/^\d+$/.test(word)) };
}

/** Show the problem of a field, empty if there is none. */
export function complain({ input, fault }, problem) {
  showText(fault, problem);
  input.setAttribute("aria-invalid", String(Boolean(problem)));
}

/** Return a word quoted for a shell. */
export function quoted(word) {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
}
