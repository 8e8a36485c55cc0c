// An open step: its operations in order, as one column to read.

import { element, showText } from "../shared/elements.js";
import { heading } from "./heading.js";
import { index } from "./index.js";
import { keyOfOperation } from "./operation.js";
import { operationsOf, outline } from "./outline.js";
import { whole } from "../shared/format.js";
import { rebuilt, unfoldAround } from "../shared/part.js";
import { section } from "./section.js";

/** Delay before the previous step is drawn as outdated. */
const PATIENCE = 300;

/**
 * The view of a run's steps in `host`.
 *
 * open: the keys of what is unfolded in addition to the operation and its first result. go({phase, operation, open}): called to change the
 * address, which calls show again; source: has content(step), numbers(step, id, region) and histogram(step, id), each with {signal}, and
 * perhaps leave(), for when no step is open, and slices(step, id), where it has only so many of a tensor.
 */
export class StepView {
  constructor(run, host, { go, source }) {
    Object.assign(this, { run, go, source });
    this.content = null;
    this.opened = new Set(); // keys of what is unfolded
    this.rows = new Map(); // operations by number
    this.pointedAt = [];
    this.sections = new Map(); // by key
    this.place = { phase: null, operation: null, open: [] };
    this.asked = new AbortController();
    this.heading = heading();
    this.body = rebuilt(element("div"), outline, (content) => this.#build(content));
    this.missing = element("p", { class: "alarm", role: "alert", hidden: true });
    this.node = element("div", { class: "step", hidden: true }, this.heading.node, this.missing, this.body.node);
    this.node.addEventListener("click", (event) => this.#follow(event));
    for (const name of ["pointerover", "focusin"]) {
      this.node.addEventListener(name, ({ target }) => {
        const { operation } = target.closest?.(".reference")?.dataset ?? {};
        this.highlight(operation === undefined ? [] : [Number(operation)]);
      });
    }
    host.append(this.node);
  }

  /** Show a step; the promise is kept when it is drawn. */
  async show(step, { phase = null, operation = null, open = this.place.open } = {}) {
    this.asked.abort();
    this.asked = new AbortController();
    const content = this.content?.step === step ? this.content : await this.#ask(step, this.asked.signal);
    this.node.removeAttribute("aria-busy");
    const isOther = open.join("\n") !== this.place.open.join("\n");
    if (isOther) this.opened = new Set([...open, ...impliedBy(content, operation, open)]);
    if (isOther || content !== this.content) this.#draw(content);
    this.#goTo({ phase, operation, open });
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
    this.body.close();
    this.node.remove();
  }

  /** Mark operations. */
  highlight(numbers) {
    this.pointedAt.forEach((row) => row.classList.remove("pointed-at"));
    this.pointedAt = numbers.flatMap((number) => this.rows.get(number)?.node ?? []);
    this.pointedAt.forEach((row) => row.classList.add("pointed-at"));
  }

  /** The reader opened or closed an operation: update the address. */
  chosen(number, isOpen) {
    if (isOpen) this.#choose(number);
    else if (this.place.operation === number) this.#choose(null);
    else this.unfolded();
  }

  /** The reader opened or closed something else: update the address. */
  unfolded() {
    this.#go(this.place);
  }

  async #ask(step, signal) {
    const late = setTimeout(() => this.node.setAttribute("aria-busy", "true"), PATIENCE);
    try {
      const content = await this.source.content(step, { signal });
      signal.throwIfAborted();
      return content;
    } catch (error) {
      if (!signal.aborted && error.status !== 0) this.clear(); // if the server is away, the shown step stays
      throw error;
    } finally {
      clearTimeout(late);
    }
  }

  #draw(content) {
    this.content = content;
    this.node.hidden = false;
    this.heading.update(content);
    this.body.update(content);
    this.rows.get(this.place.operation)?.node.classList.add("marked");
  }

  #build(content) {
    const outer = outline(content).map((entry) => section(this, entry));
    const listed = index(outer);
    const all = outer.flatMap((one) => [one, ...one.inner]);
    this.sections = new Map(all.map((one) => [one.entry.key, one]));
    return [listed, ...outer];
  }

  #goTo({ phase, operation, open }) {
    const before = this.place;
    this.place = { phase, operation, open };
    if (before.operation !== operation) this.#open(before.operation, operation);
    this.#tellMissing();
    const chosen = this.#keyOf(operation) ?? phase;
    this.sections.forEach(({ node }, key) => node.classList.toggle("marked", key === chosen));
    if (phase === null || phase === before.phase || operation !== null) return;
    const node = this.sections.get(phase)?.node;
    unfoldAround(node);
    node?.scrollIntoView();
  }

  // A link may name something that this step does not have.
  #tellMissing() {
    const { phase, operation } = this.place;
    const { step, operations } = this.content;
    const all = operations.length ? `it has #0 to #${operations.length - 1}` : "it has none";
    const texts = {
      operation: operation !== null && !operations[operation] && `Step ${whole(step)} has no operation #${operation}; ${all}.`,
      phase: phase !== null && !this.sections.has(phase) && `Step ${whole(step)} has no phase “${phase}”; its phases are listed here.`,
    };
    showText(this.missing, texts.operation || texts.phase || "");
  }

  // Return the key of the section that an operation is in.
  #keyOf(number) {
    const holds = ({ entry }) => entry.phase && operationsOf(entry, this.content).some((one) => one.number === number);
    return [...this.sections.values()].find(holds)?.entry.key ?? null;
  }

  #open(before, operation) {
    if (before !== null) this.rows.get(before)?.node.classList.remove("marked");
    // Back to a place where it was not open yet.
    if (operation === null) return this.rows.get(before)?.set(false);
    const row = this.rows.get(operation);
    if (!row) return;
    row.node.classList.add("marked");
    unfoldAround(row.node);
    row.set(true);
    const { top } = row.node.getBoundingClientRect();
    if (top < 0 || top > innerHeight - 80) row.node.scrollIntoView();
  }

  #choose(operation) {
    this.#go({ phase: operation === null ? this.place.phase : this.#keyOf(operation), operation });
  }

  // The target address determines what is open.
  #go({ phase, operation }) {
    const implied = new Set(impliedBy(this.content, operation, [...this.opened]));
    const open = [...this.opened].filter((key) => !implied.has(key) && this.#isSeen(key));
    this.place.open = open;
    this.go({ phase, operation, open });
  }

  // Open tensors of a folded operation are remembered.
  #isSeen(key) {
    const [, number] = /^operations\/(\d+)\//.exec(key) ?? [];
    return number === undefined || this.opened.has(keyOfOperation(number));
  }

  #follow(event) {
    const link = event.target.closest("a[data-operation], a[data-phase]");
    if (!link || event.metaKey || event.ctrlKey || event.shiftKey) return;
    event.preventDefault();
    const { operation, phase } = link.dataset;
    if (phase) return this.#again({ phase, operation: null });
    this.#again({ phase: this.#keyOf(Number(operation)), operation: Number(operation) });
  }

  // A link to the current place still scrolls there.
  #again(place) {
    const isThere = place.phase === this.place.phase && place.operation === this.place.operation;
    if (isThere) this.place = { phase: null, operation: null, open: this.place.open };
    this.#go(place);
  }
}

// The operation of the address is open, and so is the first result of each open operation.
function impliedBy({ operations }, operation, open) {
  const numbers = [operation, ...open.map((key) => Number(/^operation (\d+)$/.exec(key)?.[1] ?? NaN))];
  const results = numbers.flatMap((number) => operations[number]?.results[0]?.tensor ?? []);
  return [...(operation === null ? [] : [keyOfOperation(operation)]), ...results];
}
