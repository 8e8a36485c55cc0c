// A step opened: what happened in it, in the chapter's order, as one column to read.

import { batch } from "./batch.js";
import { element } from "../shared/elements.js";
import { whole } from "../shared/format.js";
import { network } from "./network.js";
import { operationList } from "./operation.js";
import { fixed, rebuilt, setText, show } from "../shared/part.js";
import { heading } from "./heading.js";
import { tensorRow } from "../tensor/tensor.js";
import { update } from "./update.js";

const PHASES = [
  ["batch", "Batch", ""],
  ["forward", "Forward", "1"],
  ["loss", "Loss", "2"],
  ["zero_grad", "Zero grad", "3"],
  ["backward", "Backward", "4"],
  ["update", "Update", "5"],
  ["other", "Other", "6"],
];
/** So long the step before stays as it is; then it is drawn as one that is about to change. */
const PATIENCE = 300;

/**
 * Open the view of a run's steps in `host`; return {show(step, {phase, operation}), clear(), close()}.
 *
 * go({phase, operation}): asked to change the address, and to call show again; source: gives
 * content(step), numbers(step, id, region) and histogram(step, id), each with {signal}; leave(), if it
 * has that, when no step is looked at any more.
 */
export function stepView(run, host, { go, source }) {
  return new StepView(run, host, go, source);
}

class StepView {
  constructor(run, host, go, source) {
    Object.assign(this, { run, go, source });
    this.content = null;
    this.opened = new Set(); // keys of what is unfolded
    this.rows = new Map(); // operations by number
    this.pointedAt = [];
    this.layer = null; // which one the network shows more of
    this.place = { phase: null, operation: null };
    this.asked = new AbortController();
    this.heading = heading();
    this.sections = new Map(PHASES.map(([phase, ...titles]) => [phase, this.#section(phase, ...titles)]));
    this.index = index(this.sections);
    const nodes = [...this.sections.values()].map((section) => section.node);
    this.node = element("div", { class: "step", hidden: true }, this.heading.node, this.index.node, ...nodes);
    this.node.addEventListener("click", (event) => this.#follow(event));
    for (const name of ["pointerover", "focusin"]) {
      this.node.addEventListener(name, ({ target }) => this.#point(target.closest?.(".reference")));
    }
    host.append(this.node);
  }

  /** Show a step; the promise is kept when it is drawn. */
  async show(step, { phase = null, operation = null } = {}) {
    this.asked.abort();
    this.asked = new AbortController();
    if (this.content?.step !== step) this.#draw(await this.#ask(step, this.asked.signal));
    this.#goTo({ phase, operation });
  }

  /** Show nothing. */
  clear() {
    this.asked.abort();
    this.source.leave?.();
    this.content = null;
    this.node.hidden = true;
  }

  close() {
    this.asked.abort();
    this.source.leave?.();
    this.index.close();
    this.sections.forEach((section) => section.parts.forEach((part) => part.close?.()));
    this.node.remove();
  }

  /** Mark operations. */
  highlight(numbers) {
    this.pointedAt.forEach((row) => row.classList.remove("pointed-at"));
    this.pointedAt = numbers.flatMap((number) => this.rows.get(number)?.node ?? []);
    this.pointedAt.forEach((row) => row.classList.add("pointed-at"));
  }

  /** An operation was opened, or closed, by the reader: the address follows. */
  chosen(number, isOpen) {
    if (isOpen) this.#choose(number);
    else if (this.place.operation === number) this.#choose(null);
  }

  async #ask(step, signal) {
    const late = setTimeout(() => this.node.setAttribute("aria-busy", "true"), PATIENCE);
    try {
      const content = await this.source.content(step, { signal });
      signal.throwIfAborted();
      return content;
    } catch (error) {
      if (!signal.aborted && error.status !== 0) this.clear(); // with the server away, what is seen stays
      throw error;
    } finally {
      clearTimeout(late);
    }
  }

  #draw(content) {
    this.content = content;
    this.node.hidden = false;
    this.node.removeAttribute("aria-busy");
    this.heading.update(content);
    const hasOthers = content.operations.some(({ phase }) => phase === "other");
    show(this.sections.get("other").node, hasOthers);
    this.index.setOthers(hasOthers);
    for (const { parts } of this.sections.values()) parts.forEach((part) => part.update(content));
    this.rows.get(this.place.operation)?.node.classList.add("marked");
  }

  #section(phase, title, number) {
    const numbered = number ? [element("span", { class: "muted" }, number), " "] : [];
    const link = element("a", { href: `#phase-${phase}`, "data-phase": phase }, ...numbered, title);
    const parts = partsOf(this, phase);
    const about = { class: "phase", id: `phase-${phase}`, "aria-label": title };
    const node = element("section", about, element("h3", {}, link), ...parts.map((part) => part.node));
    return { node, parts, title };
  }

  #goTo({ phase, operation }) {
    const before = this.place;
    this.place = { phase, operation };
    if (before.operation !== operation) this.#open(before.operation, operation);
    if (phase !== before.phase) this.sections.forEach(({ node }, name) => node.classList.toggle("marked", name === phase));
    if (phase !== null && phase !== before.phase && operation === null) this.sections.get(phase)?.node.scrollIntoView();
  }

  #open(before, operation) {
    if (before !== null) this.rows.get(before)?.node.classList.remove("marked");
    // Back, to where it was not open yet.
    if (operation === null) return this.rows.get(before)?.set(false);
    const row = this.rows.get(operation);
    if (!row) return;
    row.node.classList.add("marked");
    row.node.closest("details")?.setAttribute("open", "");
    row.set(true);
    const { top } = row.node.getBoundingClientRect();
    if (top < 0 || top > innerHeight - 80) row.node.scrollIntoView();
  }

  #choose(operation) {
    this.go({ phase: operation === null ? this.place.phase : this.content.operations[operation].phase, operation });
  }

  #follow(event) {
    const link = event.target.closest("a[data-operation], a[data-phase]");
    if (!link || event.metaKey || event.ctrlKey || event.shiftKey) return;
    event.preventDefault();
    const { operation, phase } = link.dataset;
    if (phase) return this.#again({ phase, operation: null });
    this.#again({ phase: this.content.operations[operation]?.phase ?? null, operation: Number(operation) });
  }

  // Where one is already, a link still leads there: one may have scrolled away.
  #again(place) {
    if (place.phase === this.place.phase && place.operation === this.place.operation) this.place = { phase: null, operation: null };
    this.go(place);
  }

  #point(link) {
    this.highlight(link ? [Number(link.dataset.operation)] : []);
  }
}

function partsOf(view, phase) {
  if (phase === "batch") return [batch(view)];
  if (phase === "forward") return [network(view), operationList(view, phase)];
  if (phase === "loss") return [lossFunction(), operationList(view, phase)];
  if (phase === "zero_grad") return [dropping(), tensors(view, "dropped"), zeroing(view)];
  if (phase === "other") return [operationList(view, phase)];
  if (phase === "backward") return [operationList(view, phase), fixed(element("h4", {}, "Gradients")), tensors(view, "gradients")];
  return [...update(view), operationFold(view)];
}

function lossFunction() {
  const node = element("p", { class: "settings-line" });
  return fixed(node, ({ loss_function }) => setText(node, loss_function.text));
}

function dropping() {
  const node = element("p", { class: "settings-line" });
  return fixed(node, ({ step, dropped }) =>
    setText(node, dropped.length ? `drops the gradients of step ${whole(step - 1)}` : "no gradients to drop: there are none yet"),
  );
}

/** Return the part of the operations of zero_grad, where it has any. */
function zeroing(view) {
  const list = operationList(view, "zero_grad");
  return fixed(list.node, (content) => {
    show(list.node, content.operations.some(({ phase }) => phase === "zero_grad"));
    list.update(content);
  });
}

/** Return the part of the operations of the update, which its formulas tell already: folded. */
function operationFold(view) {
  const list = operationList(view, "update");
  const summary = element("summary");
  const node = element("details", { class: "operations-fold" }, summary, list.node);
  return fixed(node, (content) => {
    const { length } = content.operations.filter(({ phase }) => phase === "update");
    setText(summary, length === 1 ? "its operation" : `its ${whole(length)} operations`);
    show(node, length > 0);
    list.update(content);
  });
}

function tensors(view, kind) {
  return rebuilt(
    element("div", { class: "tensors" }),
    (content) => content[kind],
    (content) => content[kind].map(({ parameter, tensor }) => tensorRow(view, { id: tensor, name: `${parameter}.grad` })),
  );
}

/** Return the list of phases that stays in sight, and marks the one that is read. */
function index(sections) {
  const links = new Map(
    [...sections].map(([phase, { title }]) => [phase, element("a", { href: `#phase-${phase}`, "data-phase": phase }, title)]),
  );
  const node = element("nav", { class: "phases", "aria-label": "phases of the step" }, ...links.values());
  const seen = new Set();
  const watching = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) seen[isIntersecting ? "add" : "delete"](target);
      const current = [...sections].find(([, section]) => seen.has(section.node))?.[0];
      links.forEach((link, phase) => {
        if (phase === current) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      });
    },
    { rootMargin: "-20% 0px -60% 0px" },
  );
  sections.forEach((section) => watching.observe(section.node));
  return { node, setOthers: (has) => show(links.get("other"), has), close: () => watching.disconnect() };
}
