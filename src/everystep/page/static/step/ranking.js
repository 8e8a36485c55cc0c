// The rows that contribute most to a step's loss or gradients, ranked on demand.

import { button, element, showText } from "../shared/elements.js";
import { whole } from "../shared/format.js";
import { setText, show } from "../shared/part.js";
import { latest } from "../shared/timers.js";
import { askImages, drawImage } from "./images.js";
import { worstRows } from "./worst.js";

const ORDERS = ["loss", "gradient"];
/** Rows shown at first, as in the terminal. */
const SHOWN = 10;
/** Delay before ranking, which may take seconds, so that quick stepping does not start it. */
const PATIENCE = 300;

/** The part that ranks the rows of a batch by `source.rows`; its order is stored with the unfolded keys. */
export class Ranking {
  #content = null;
  #answer = null; // of the server, on `#ranked`
  #ranked = null; // the content of the step with the shown rows
  #shown = SHOWN;

  constructor(view) {
    this.view = view;
    this.buttons = ORDERS.map((order) => button(`by ${order}`, () => this.#choose(order), { "aria-pressed": "false" }));
    const chooser = element("div", { class: "chooser", role: "group", "aria-label": "worst rows" }, element("span", {}, "Worst rows"), ...this.buttons);
    const ask = button("What if rows are left out?", () => this.view.source.whatIf(this.#content), { class: "plain" });
    this.status = element("p", { class: "muted small", role: "status" });
    this.table = element("table", { class: "worst" });
    this.more = button("", () => this.#showMore(), { class: "plain" });
    this.about = element("div", { class: "about" });
    this.trouble = element("p", { class: "alarm small", role: "alert" });
    this.body = element("div", { class: "ranked", hidden: true }, this.status, element("div", { class: "wide" }, this.table), this.more, this.about, this.trouble);
    this.node = element("div", { class: "ranking" }, element("div", { class: "asks" }, chooser, ask), this.body);
    this.asking = latest((content, signal) => this.#ask(content, signal), PATIENCE);
    this.pictures = latest((content, signal) => this.#drawImages(content, signal), 0);
  }

  update(content) {
    this.#content = content;
    const order = this.#order;
    if (order === null && this.body.hidden) return; // the usual case
    this.buttons.forEach((each, place) => each.setAttribute("aria-pressed", String(ORDERS[place] === order)));
    this.close();
    show(this.body, order !== null);
    if (order === null) return;
    if (this.#ranked === content) return this.#draw();
    this.#wait();
    this.asking.update(content);
  }

  close() {
    this.asking.close();
    this.pictures.close();
  }

  get #order() {
    return ORDERS.find((order) => this.view.opened.has(keyOf(order))) ?? null;
  }

  #choose(order) {
    const isChosen = this.#order === order;
    ORDERS.forEach((each) => this.view.opened.delete(keyOf(each)));
    if (!isChosen) this.view.opened.add(keyOf(order));
    this.#shown = SHOWN;
    this.view.unfolded();
    this.update(this.#content);
  }

  // The rows of the previous step stay, labelled as such, until the new ones arrive.
  #wait() {
    const before = this.#ranked === null ? "" : `; these are of step ${whole(this.#ranked.step)}`;
    showText(this.status, `Ranking the rows of step ${whole(this.#content.step)}${before}.`);
    this.body.setAttribute("aria-busy", "true");
    showText(this.trouble, "");
  }

  async #ask(content, signal) {
    try {
      const answer = await this.view.source.rows(content.step, { signal });
      if (signal.aborted) return;
      this.#answer = answer;
      this.#ranked = content;
      this.#draw();
    } catch (error) {
      if (error.name === "AbortError") return;
      this.#answer = this.#ranked = null;
      this.#clear();
      showText(this.trouble, error.message);
    }
  }

  #clear() {
    this.body.removeAttribute("aria-busy");
    showText(this.status, "");
    this.table.replaceChildren();
    this.about.replaceChildren();
    show(this.more, false);
  }

  #draw() {
    this.#clear();
    showText(this.trouble, "");
    const { orders, count, about } = this.#answer;
    const content = this.#ranked;
    const places = orders[this.#order] ?? [];
    const leaveOut = (row) => this.view.source.whatIf(content, [row]);
    if (places.length) this.table.replaceChildren(...worstRows(this.#answer, places.slice(0, this.#shown), this.#order, content, leaveOut));
    const left = count - Math.min(this.#shown, places.length);
    setText(this.more, `${whole(left)} more`);
    show(this.more, places.length > 0 && left > 0);
    this.more.disabled = this.#shown >= places.length;
    this.more.title = this.more.disabled ? "everystep rows --first lists them" : "";
    this.about.replaceChildren(...about.map((line) => element("p", { class: "muted small" }, line)));
    this.pictures.update(content);
  }

  // One after the other, so that the next key waits for at most one.
  async #drawImages(content, signal) {
    for (const canvas of this.table.querySelectorAll("canvas")) {
      const first = Number(canvas.dataset.place);
      const [image] = await askImages(this.view, content, { first, count: 1 }, signal);
      if (signal.aborted) return;
      if (image) drawImage(canvas, image, content, first);
    }
  }

  #showMore() {
    this.#shown *= 2;
    this.#draw();
  }
}

function keyOf(order) {
  return `rows by ${order}`;
}
