// A question about a whole run: its form, and its answer below.

import { element } from "../shared/elements.js";
import { addressOf, tell } from "../shared/server.js";
import { runTask } from "./task.js";

/**
 * Return a form with an optional expression, a button, and a place for progress and answer: {node, ask(), update(), close()}.
 *
 * `place.about`: the run; `path`, `content()`: of the request; `done(result)`: returns the view of the answer; `failed(message)`: called on
 * errors.
 */
export function questionForm(place, { title, description, expression, options, verb, path, content, done, failed = () => {} }) {
  const host = element("div", { class: "answer" });
  const asking = element("button", {}, verb);
  let task = null;
  const ask = () => {
    if (asking.disabled) return;
    asking.disabled = true;
    expression?.input.setAttribute("aria-invalid", "false");
    task = runTask(() => tell(addressOf(place.about.name, path), content()), host, {
      label: title,
      done,
      over(message) {
        asking.disabled = false;
        if (!message) return;
        expression?.input.setAttribute("aria-invalid", "true");
        failed(message);
      },
    });
  };
  const submit = (event) => {
    event.preventDefault();
    ask();
  };
  const node = element(
    "form",
    { class: "question", onsubmit: submit, "aria-label": title },
    element("h3", {}, title),
    element("p", { class: "muted small" }, description),
    expression?.node,
    element("div", { class: "options" }, ...options, asking),
    host,
  );
  return { node, ask, update() {}, close: () => task?.leave() };
}

/** Return the whole answer as text, folded. */
export function detailsOf(text) {
  return element("details", { class: "more" }, element("summary", {}, "Details"), element("pre", { tabIndex: 0 }, text));
}

/** Return an option of a question, with text before and perhaps after it. */
export function labelled(before, input, after = null) {
  return element("label", { class: "option" }, before, input, after);
}
