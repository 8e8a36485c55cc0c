// All runs of a directory, as a table.

import * as address from "../shared/address.js";
import { element, button } from "../shared/elements.js";
import { awaited, awayBanner } from "../shared/away.js";
import { listen } from "../shared/server.js";
import { arranged, usualOf } from "./order.js";
import { valueOf } from "./kinds.js";
import { RunRow, classOf } from "./row.js";

// Rows drawn at first, and then whenever their end comes near: the layout of thousands takes seconds.
const SOME = 100;

// Kept for the return from a run, unless the address has another order.
const sorting = { key: "started", direction: "descending" };

/** Show all runs. */
export async function open(place, main) {
  document.title = "everystep";
  document.querySelector("#trail").replaceChildren();
  return new Runs(main, await awaited(main, "Loading the runs.", "/api/runs?soon"), place);
}

class Runs {
  #runs = new Map(); // by name
  #rows = new Map(); // by name, those that were drawn
  #most = SOME; // rows that are drawn
  #picked = new Set(); // in the order in which they were picked

  constructor(main, { directory, columns, runs, unread }, place) {
    this.columns = columns;
    this.#read(place);
    this.away = awayBanner();
    this.head = element("p", { class: "lead" });
    this.search = element("input", { type: "search", placeholder: "search", "aria-label": "search the runs", title: "in name, status, optimizer, tags, config and note" });
    this.search.addEventListener("input", () => this.#arrange());
    this.overlay = button("Overlay", () => address.go({ view: "overlay", runs: [...this.#picked] }), { title: "pick two or more runs to plot their losses together" });
    const compare = ([one, other]) => address.go({ view: "compare", one, other });
    this.compare = button("Compare", () => compare([...this.#picked]), { title: "pick exactly two runs to find where they diverge" });
    this.chosen = element("span", { class: "muted small", role: "status" });
    this.headings = element("tr", { role: "row" });
    this.body = element("tbody", { role: "rowgroup" });
    this.nothing = element("p", { class: "muted", hidden: true });
    this.tools = element("div", { class: "runs-tools" }, this.search, this.#sortField(), this.chosen, this.overlay, this.compare);
    const head = element("thead", { role: "rowgroup" }, this.headings);
    this.table = element("table", { class: "runs", role: "table", "aria-label": "runs" }, head, this.body);
    this.end = element("div");
    main.classList.add("wide");
    this.watcher = new IntersectionObserver((entries) => this.#see(entries), { rootMargin: "200px" });
    main.append(element("header", { class: "runs-head" }, element("h1", {}, directory), this.head), this.tools, this.table, this.end, this.nothing, this.away.host);
    this.#take({ runs, unread, gone: [] });
    this.reach = new IntersectionObserver((entries) => entries.at(-1).isIntersecting && this.#drawMore(), { rootMargin: "1500px" });
    this.reach.observe(this.end);
    this.stop = listen("/api/events", { runs: (news) => this.#hear(news) }, (isThere) => this.away.tell(isThere));
  }

  /** Sort by the address. */
  update(place) {
    this.#read(place);
    this.#arrange();
  }

  close() {
    this.stop();
    this.reach.disconnect();
    this.away.close();
    this.watcher.disconnect();
    this.#rows.forEach((row) => row.see(false)); // no more pictures are requested
  }

  // Runs may have been deleted while the stream was closed: those that a new stream does not name until all are read.
  #hear({ runs, gone, begins, unread }) {
    if (begins) this.named = new Set();
    for (const { name } of runs) this.named?.add(name);
    const missing = this.named && !unread ? [...this.#runs.keys()].filter((name) => !this.named.has(name)) : [];
    if (!unread) this.named = null;
    this.#take({ runs, unread, gone: [...gone, ...missing] });
  }

  #take({ runs, unread, gone }) {
    this.unread = unread;
    for (const name of gone) {
      this.#runs.delete(name);
      this.#picked.delete(name);
      const row = this.#rows.get(name);
      if (!row) continue;
      this.watcher.unobserve(row.host);
      row.see(false);
      row.host.remove();
      this.#rows.delete(name);
    }
    for (const run of runs) {
      this.#runs.set(run.name, run);
      this.#rows.get(run.name)?.update(run);
    }
    this.#arrange();
    this.#tellPicked();
  }

  #row(name) {
    return this.#rows.get(name) ?? this.#newRow(this.#runs.get(name));
  }

  #newRow(run) {
    const row = new RunRow(run, this.columns, (isPicked) => {
      this.#picked[isPicked ? "add" : "delete"](run.name);
      this.#tellPicked();
    });
    this.#rows.set(run.name, row);
    this.watcher.observe(row.host);
    return row;
  }

  #drawMore() {
    if (this.#most >= this.#runs.size) return;
    this.#most += SOME;
    this.#arrange();
    // Observe again, because an end that stays near causes no new event.
    this.reach.unobserve(this.end);
    this.reach.observe(this.end);
  }

  #see(entries) {
    for (const { target, isIntersecting } of entries) this.#rows.get(target.dataset.name)?.see(isIntersecting);
  }

  #arrange() {
    const all = [...this.#runs.values()];
    const shown = arranged(all, this.sorted, sorting.direction, this.search.value);
    const hosts = shown.slice(0, this.#most).map(({ name, depth }) => {
      const { host, indent } = this.#row(name);
      indent(depth);
      return host;
    });
    const usual = usualOf(all, this.columns);
    const empty = new Set(this.columns.filter((column) => column.first && all.every((run) => valueOf(column, run) === null)));
    this.#rows.forEach((row) => row.compare(usual, empty));
    const isSame = hosts.length === this.body.children.length && hosts.every((host, index) => host === this.body.children[index]);
    if (!isSame) this.body.replaceChildren(...hosts);
    this.#drawHeadings();
    this.columns.forEach((column, place) => (this.headings.children[place + 1].hidden = empty.has(column)));
    this.#tellCount(all, shown.length);
  }

  #tellCount(all, shown) {
    const running = all.filter(({ status }) => status === "running").length;
    const words = [`${all.length} ${all.length === 1 ? "run" : "runs"}`, ...(running ? [`${running} running`] : []), ...(this.unread ? [`${this.unread} not read yet`] : [])];
    this.head.textContent = all.length || this.unread ? words.join(" · ") : "";
    this.table.hidden = !shown;
    this.tools.hidden = !all.length;
    this.nothing.hidden = shown > 0 || this.unread > 0;
    const none = ["There are no runs here yet. Runs appear as soon as they start: ", element("code", {}, "everystep train")];
    this.nothing.replaceChildren(...(all.length ? [`No run matches “${this.search.value}”.`] : none));
  }

  #drawHeadings() {
    if (this.headings.dataset.sorting === JSON.stringify(sorting)) return;
    this.headings.dataset.sorting = JSON.stringify(sorting);
    const isFocused = this.headings.contains(document.activeElement);
    const cells = this.columns.map((column) => {
      const { key, header, first } = column;
      const isSorted = this.sorted === column;
      const heading = { scope: "col", role: "columnheader", class: classOf(column), "aria-sort": first && (isSorted ? sorting.direction : "none") };
      if (!first) return element("th", heading, header);
      const sign = element("span", { class: "sign", "aria-hidden": "true" }, isSorted ? ARROWS[sorting.direction] : "↕");
      const label = button(header, () => this.#sort(key, isSorted ? OTHER[sorting.direction] : first), { class: "sort" });
      label.append(sign);
      return element("th", heading, label);
    });
    const pick = element("th", { scope: "col", role: "columnheader", class: "pick" }, element("span", { class: "unseen" }, "pick"));
    this.headings.replaceChildren(pick, ...cells);
    if (isFocused) this.headings.querySelector("[aria-sort$=ending] button")?.focus();
    this.field.value = `${sorting.key} ${sorting.direction}`;
  }

  // Stacked rows have no headings to click.
  #sortField() {
    const choices = this.columns.filter(({ first }) => first).flatMap(({ key, header, first }) =>
      [first, OTHER[first]].map((direction) => element("option", { value: `${key} ${direction}` }, `${header} ${ARROWS[direction]}`)),
    );
    const change = () => this.#sort(...this.field.value.split(" "));
    this.field = element("select", { class: "sort-field", "aria-label": "sort by", onchange: change }, ...choices);
    return this.field;
  }

  #read({ sort, direction }) {
    const column = this.columns.find(({ key, first }) => first && key === sort);
    if (column) Object.assign(sorting, { key: sort, direction: direction in OTHER ? direction : column.first });
    this.sorted = this.columns.find(({ key }) => key === sorting.key) ?? this.columns[0];
  }

  #sort(key, direction) {
    address.go({ view: "runs", sort: key, direction }, { replace: true });
  }

  #tellPicked() {
    const count = this.#picked.size;
    this.overlay.disabled = count < 2;
    this.compare.disabled = count !== 2;
    this.chosen.textContent = count ? `${count} picked` : "";
  }
}

const ARROWS = { ascending: "↑", descending: "↓" };
const OTHER = { ascending: "descending", descending: "ascending" };
