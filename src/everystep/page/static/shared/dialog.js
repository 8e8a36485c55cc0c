// Dialogs, and texts to copy.

import { button, element } from "./elements.js";

let count = 0;

/** Open a dialog with a title; return it. `closed` is called when it is gone; Escape closes it. */
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

/** Return a button that copies the text that `text()` gives, and says so. */
export function copyButton(text, says = "Copy", properties = {}) {
  const made = button(says, async () => {
    const isCopied = await copy(text(), made);
    made.textContent = isCopied ? "Copied" : "Select it, and press Ctrl+C";
    said.textContent = made.textContent;
    clearTimeout(back);
    back = setTimeout(() => {
      made.textContent = says;
      said.textContent = "";
    }, 2000);
  }, properties);
  const said = element("span", { class: "unseen", role: "status" });
  let back = null;
  return element("span", { class: "copying" }, made, said);
}

/** Return a command line, or lines of Python, to be copied; `set(text)` changes it. */
export function commandLine(label, text = "") {
  const shown = element("code", {}, text);
  const block = element("pre", { class: "command", tabIndex: 0, role: "group", "aria-label": label }, shown);
  const title = element("span", { class: "small muted" }, label);
  const node = element("div", { class: "command-line" }, title, copyButton(() => shown.textContent), block);
  return { node, set: (changed) => (shown.textContent = changed) };
}

/** Return a word as a shell takes it. */
export function quoted(word) {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
}

async function copy(text, beside) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelecting(text, beside);
  }
}

// On another host than this one, without encryption, browsers have no clipboard to write to.
function copyBySelecting(text, beside) {
  const field = element("textarea", { value: text, class: "unseen", readOnly: true });
  beside.after(field);
  field.select();
  const isCopied = document.execCommand("copy");
  field.remove();
  beside.focus();
  return isCopied;
}
