// Where a number comes from: the operation that computed it, and its inputs, each of which can be followed.

import { button, element, showText } from "../shared/elements.js";
import { fullText, numberOf, whole } from "../shared/format.js";
import { show } from "../shared/part.js";

/** Lines of the way of a NaN that are shown before and after the omitted ones. */
const ENDS = 3;

/** The part that follows a number back; `source.why` answers. */
export class Reasons {
  constructor(source) {
    this.source = source;
    this.trail = [];
    this.asked = new AbortController();
    this.path = element("nav", { class: "trail", "aria-label": "numbers that were followed" });
    this.body = element("div", { "aria-live": "polite" });
    this.trouble = element("p", { class: "alarm small", role: "alert", hidden: true });
    this.node = element("section", { class: "reasons", "aria-label": "where this number comes from", hidden: true }, this.path, this.body, this.trouble);
  }

  /** Show where a number of a tensor comes from; `asked`: {id, index}. */
  begin(step, asked) {
    this.trail = [];
    this.#follow(step, asked);
  }

  clear() {
    this.asked.abort();
    this.trail = [];
    show(this.node, false);
  }

  async #follow(step, asked) {
    this.asked.abort();
    this.asked = new AbortController();
    const { signal } = this.asked;
    show(this.node, true);
    this.node.setAttribute("aria-busy", "true");
    try {
      const answer = await this.source.why(step, asked, { signal });
      if (signal.aborted) return;
      this.trail.push(answer);
      this.#draw();
      showText(this.trouble, "");
    } catch (error) {
      if (error.name === "AbortError") return;
      showText(this.trouble, error.message);
    }
    this.node.removeAttribute("aria-busy");
  }

  #draw() {
    const answer = this.trail.at(-1);
    this.path.replaceChildren(...this.trail.slice(0, -1).map((one, place) => this.#back(one, place)));
    show(this.path, this.trail.length > 1);
    const through = answer.has_begun ? [...answer.causes] : [];
    const last = through.pop();
    const began = last ? [...way(through, answer.left_out), element("h4", {}, "It began here"), ...this.#answer(last)] : [];
    this.body.replaceChildren(...this.#answer(answer), ...began);
  }

  #back(answer, place) {
    const back = () => {
      this.trail.length = place + 1;
      this.#draw();
    };
    return element("span", {}, button(answer.number.name, back, { class: "plain" }), " › ");
  }

  #answer({ number, made, observed, formula, groups, check, is_equal: isEqual, unknown, note, rows_text: rows }) {
    const first = this.trail[0].number.step;
    const step = number.step === first ? null : element("span", { class: "muted" }, ` at step ${whole(number.step)}`);
    const rank = number.rank === null ? null : element("span", { class: "muted" }, ` on rank ${whole(number.rank)}`);
    const lines = [element("p", { class: "reason-of" }, element("b", {}, number.name), ` = ${number.text}`, step, rank)];
    if (made) lines.push(element("p", { class: "made" }, made));
    if (observed?.line) lines.push(element("p", { class: "muted small" }, `${observed.line.file}:${observed.line.line}  `, element("code", {}, observed.line.text)));
    if (formula) lines.push(element("p", { class: "muted small" }, `from ${formula}`));
    if (note) lines.push(element("p", { class: "muted small" }, note));
    if (groups.length) lines.push(this.#table(groups));
    if (check) lines.push(element("p", { class: isEqual ? "small" : "muted small" }, check));
    if (unknown.length) lines.push(element("p", { class: "muted small" }, `Which numbers it used is unknown; its inputs were all of ${unknown.join(", ")}.`));
    if (rows) lines.push(element("p", { class: "muted small" }, rows));
    return lines;
  }

  #table(groups) {
    const most = Math.max(...groups.flatMap((group) => group.terms.map((term) => numbersOf(term).length)), 1);
    const rows = groups.flatMap((group) => [...group.terms.map((term) => this.#row(group, term, most)), left(group, most)]);
    return element("div", { class: "wide" }, element("table", { class: "terms" }, element("tbody", {}, rows.filter(Boolean))));
  }

  #row(group, term, most) {
    const numbers = numbersOf(term);
    const head = element("th", { scope: "row", class: term.text === null ? "" : "number" }, term.text ?? group.text);
    const cells = numbers.flatMap((number) => [element("td", {}, this.#name(number)), element("td", { class: "number" }, number.text)]);
    const empty = Array.from({ length: 2 * (most - numbers.length) }, () => element("td"));
    const row = numbers.map((number) => number.row).find((each) => each !== null);
    return element("tr", {}, head, cells, empty, element("td", { class: "muted" }, row === undefined ? "" : `row ${whole(row)}`));
  }

  #name(number) {
    if (!number.is_linked) return element("span", {}, number.name);
    const title = "where this number comes from";
    return button(number.name, () => this.#follow(number.step, { of: number.name }), { class: "plain", title });
  }
}

// The numbers of a term, and its factors that are in no tensor.
function numbersOf({ numbers, weights }) {
  const others = Object.entries(weights).map(([name, value]) => ({ name, text: fullText(numberOf(value)), row: null, is_linked: false }));
  return [...Object.values(numbers), ...others];
}

function left(group, most) {
  const count = group.count - group.terms.length;
  if (!count) return null;
  const of = group.rest_text === null ? ` of ${group.text}` : "";
  const head = element("th", { scope: "row", class: "number" }, group.rest_text ?? "");
  return element("tr", {}, head, element("td", { colSpan: 2 * most + 1, class: "muted" }, `${whole(count)} more${of}`));
}

// The way of a NaN or infinity, in lines.
function way(through, leftOut) {
  const rank = ({ rank }) => (rank === null ? "" : `rank ${whole(rank)}, `);
  const lines = through.map(({ number, made, note }) => element("li", {}, `${rank(number)}step ${whole(number.step)}, ${number.name} = ${number.text}, ${made ?? note}`));
  const more = Math.max(lines.length - 2 * ENDS, 0);
  if (more + leftOut) lines.splice(ENDS, more, element("li", { class: "muted" }, `${whole(more + leftOut)} more`));
  return lines.length ? [element("h4", {}, "It came through"), element("ul", { class: "small way" }, lines)] : [];
}
