// The layout of a run's view, on wide and on narrow screens.

import { button, element } from "../shared/elements.js";
import { Note } from "../shared/note.js";
import { Banner } from "./banner.js";

/** Create the elements. `does`: {fork(), compare(), share(), stop(), goTo(step)}. */
export function runParts(name, does) {
  const stop = button("Stop", does.stop, { title: "stop the training of this fork; its steps are kept", hidden: true });
  const actions = element(
    "div",
    { class: "actions" },
    stop,
    button("Fork", does.fork, { title: "continue from a step with different settings (f)" }),
    button("Compare", does.compare, { title: "with another run" }),
    button("Save this view", does.share, { title: "as one file that opens without a server" }),
  );
  const state = element("p", { class: "lead" });
  const note = new Note(name, { label: "Add a note" });
  const family = element("p", { class: "family muted small" });
  const top = new Banner(does.goTo);
  const title = element("div", { class: "title" }, element("h1", {}, name), actions);
  const header = element("header", { class: "run-head" }, title, state, note.host, family, top.host);
  const brief = element("summary");
  const facts = element("details", { class: "facts-part" }, brief);
  const landmarks = element("div");
  const plot = element("div");
  const bar = element("div", { class: "bar" });
  const loss = element("section", { class: "loss-part", "aria-label": "loss of every step" }, plot, landmarks);
  const questions = element("div", { class: "questions-part", hidden: true });
  const table = element("section", { class: "table-part", "aria-label": "table of every step" }, element("h2", {}, "Steps"));
  const problem = element("p", { class: "alarm", role: "alert", hidden: true });
  const waiting = element("p", { class: "muted", role: "status", hidden: true });
  const shown = element("div", { class: "step-host" });
  const step = element("section", { class: "step-part", "aria-label": "Step" }, bar, problem, waiting, shown);
  const left = element("div", { class: "run-left" }, loss, table, questions);
  const body = element("div", { class: "run-body" }, left, step);
  // Sticky elements of the step stick below the bar.
  const measured = new ResizeObserver(() => step.style.setProperty("--step-top", `${bar.offsetHeight}px`));
  measured.observe(bar);
  return { header, stop, state, note, family, banner: top, facts, brief, landmarks, plot, bar, loss, questions, table, problem, waiting, shown, step, left, body };
}

/**
 * Arrange the parts.
 *
 * An open step is next to the plot and the table, or between them. The facts are a column at the right if there is room, else a line that
 * unfolds.
 */
export function arrange({ step, left, body, loss, facts }, main, { isOpen, isWide }) {
  const isColumn = isWide && !isOpen;
  if (isOpen && isWide) body.append(step);
  else if (step.previousSibling !== loss) loss.after(step);
  if (isColumn) body.append(facts);
  else if (isOpen) body.before(facts);
  else step.after(facts);
  main.classList.toggle("wide", isOpen || isWide);
  body.classList.toggle("with-step", isOpen);
  body.classList.toggle("with-facts", isColumn);
  left.toggleAttribute("data-narrow", isOpen && isWide);
  if (facts.classList.contains("is-column") !== isColumn) facts.open = isColumn;
  facts.classList.toggle("is-column", isColumn);
}
