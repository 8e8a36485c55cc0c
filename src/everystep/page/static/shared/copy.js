// Buttons that copy texts, and confirm it.

import { button, element, icon } from "./elements.js";

const FAILED = "Select it, and press Ctrl+C";
/** Milliseconds for which a button shows that it has copied. */
const SAID = 2000;
const SIGNS = {
  copy: "M6 6V3.5h6.5V10H10M3.5 6H10v6.5H3.5z",
  link: "M7 9a2.5 2.5 0 0 0 3.6 0l2-2A2.5 2.5 0 0 0 9 3.4L8 4.4M9 7a2.5 2.5 0 0 0-3.6 0l-2 2A2.5 2.5 0 0 0 7 12.6l1-1",
  done: "M3.5 8.5l3 3 6-7",
};

/** Return a button that copies the result of `text()`, and confirms it. */
export function copyButton(text, label = "Copy", properties = {}) {
  return copying(text, button("", null, properties), () => label, () => "Copied");
}

/** Return a small icon that copies the result of `text()`; `label`: what it copies, `sign`: `copy` or `link`. */
export function copyMark(text, label, sign = "copy") {
  const made = button("", null, { class: "copy-mark", title: label, "aria-label": label });
  return copying(text, made, () => icon(SIGNS[sign]), () => icon(SIGNS.done));
}

// `before()` and `after()`: what is on the button before and after it has copied.
function copying(text, made, before, after) {
  const spoken = element("span", { class: "unseen", role: "status" });
  let back = null;
  const reset = () => {
    made.replaceChildren(before());
    spoken.textContent = "";
  };
  made.addEventListener("click", async () => {
    const isCopied = await copy(text(), made);
    made.replaceChildren(isCopied ? after() : FAILED);
    spoken.textContent = isCopied ? "Copied" : FAILED;
    clearTimeout(back);
    back = setTimeout(reset, SAID);
  });
  reset();
  return element("span", { class: "copying" }, made, spoken);
}

/** Copy a text for a button on the page; return whether that worked. */
export async function copy(text, near) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelecting(text, near);
  }
}

// On other hosts without encryption, and in a frame of a notebook, browsers do not allow writing to the clipboard.
function copyBySelecting(text, near) {
  const field = element("textarea", { value: text, class: "unseen", readOnly: true });
  near.after(field);
  field.select();
  const isCopied = document.execCommand("copy");
  field.remove();
  near.focus();
  return isCopied;
}
