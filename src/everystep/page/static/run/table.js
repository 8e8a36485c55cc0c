// The table of every step, by DataTables: the server sorts, searches and cuts out pages.

import { element, button } from "../shared/elements.js";
import { whole } from "../shared/format.js";
import { addressOf, ask, withQuery } from "../shared/server.js";
import { Timers } from "../shared/timers.js";

const COPIED = 10000; // rows, at most

let loading = null;

/**
 * Show the table of a run's steps in `host`; return {setStep(step), setSort(sorted), refresh(), close()}.
 *
 * `sorted`: {sort, direction}, the title of a column, and `asc` or `desc`; null: by the steps. `goTo(step)`: is called for
 * a row; `sortedBy(sorted)`: when the reader sorts.
 */
export function stepTable(host, name, { step = null, sorted = {}, goTo = () => {}, sortedBy = () => {} } = {}) {
  return new StepTable(host, name, { step, sorted, goTo, sortedBy });
}

async function dataTables() {
  loading ??= import("/static/datatables.js").then(({ default: DataTable }) => {
    DataTable.ext.errMode = "throw";
    return DataTable;
  });
  return loading;
}

class StepTable {
  #table = null;
  #columns = [];
  #step;
  #answer = null; // a page that is there before DataTables asks for it
  #isFinding = false;
  #asking = new AbortController();
  #ended = new AbortController();
  #timers = new Timers();

  constructor(host, name, { step, sorted, goTo, sortedBy }) {
    Object.assign(this, { name, goTo, sortedBy });
    this.sorted = sortOf(sorted);
    this.#step = step;
    const draw = () => this.#table?.search(this.search.value).draw();
    this.search = element("input", { type: "search", placeholder: "137 or 100-200", "aria-label": "steps: one, or a range" });
    this.search.addEventListener("input", () => this.#timers.rest("search", draw));
    const field = (label) =>
      element("input", { type: "text", inputMode: "decimal", placeholder: label, "aria-label": `losses ${label}`, onchange: draw });
    this.low = field("from");
    this.high = field("to");
    this.csv = element("a", { class: "csv", download: "" }, "CSV");
    this.note = element("p", { class: "note", role: "status", hidden: true });
    const copy = button("Copy", () => this.#copy(), { title: "copy the rows that are filtered, up to 10,000" });
    const losses = [element("span", { "aria-hidden": "true" }, "losses"), this.low, this.high];
    this.filters = element(
      "div",
      { class: "filters" },
      this.search,
      element("span", { class: "range", role: "group", "aria-label": "losses" }, ...losses),
      element("span", { class: "actions" }, copy, this.csv),
    );
    this.place = element("div");
    this.host = element("div", { class: "everystep-table live" }, this.filters, this.note, this.place);
    host.append(this.host);
    this.#begin();
  }

  /** Select the row of a step, and turn to its page. */
  setStep(step) {
    this.#step = step;
    this.#mark();
    this.#find();
  }

  /** Sort as the address says. */
  setSort(sorted) {
    const wanted = sortOf(sorted);
    if (isSame(wanted, this.sorted)) return;
    this.sorted = wanted;
    this.#table?.order(this.#order()).draw();
  }

  /** Read what is shown again: there may be more steps and measurements. */
  refresh() {
    this.#timers.soon("refresh", () => this.#table?.ajax.reload(null, false));
  }

  /** Take the table away. */
  close() {
    this.#ended.abort();
    this.#asking.abort();
    this.#timers.clear();
    this.#table?.destroy();
    this.#table = null;
    this.host.remove();
  }

  async #begin() {
    try {
      const [DataTable, [answer, problem]] = await Promise.all([dataTables(), this.#first()]);
      if (this.#ended.signal.aborted) return;
      this.#build(DataTable, answer, 10);
      this.#sayLeftOut(answer);
      if (problem) this.#say(problem);
    } catch (error) {
      if (!this.#ended.signal.aborted) this.#say(`The table cannot be shown: ${error.message}`);
    }
  }

  // The first page, and what is wrong with the order that the address asks for: then it is that of the steps.
  async #first() {
    const query = { start: 0, length: 10, around: this.#step };
    try {
      return [await ask(this.#address("table", { ...query, ...this.sorted }), this.#ended), null];
    } catch (error) {
      if (error.status !== 400 || this.sorted.sort === null) throw error;
      this.sorted = sortOf({});
      return [await ask(this.#address("table", query), this.#ended), error.message];
    }
  }

  #build(DataTable, answer, length) {
    this.#table?.destroy();
    this.#table = null;
    this.#columns = answer.columns;
    this.#answer = answer;
    const head = element("tr", {}, ...this.#columns.map((title) => element("th", { scope: "col" }, title)));
    this.place.replaceChildren(element("table", { "aria-label": "steps" }, element("thead", {}, head), element("tbody")));
    this.#table = new DataTable(this.place.firstChild, {
      serverSide: true,
      processing: false,
      ajax: (asked, done) => this.#answerTo(DataTable, asked, done),
      columns: this.#columns.map(() => ({ render: DataTable.render.text() })),
      order: this.#order(),
      autoWidth: false,
      displayStart: answer.start,
      pageLength: length,
      lengthMenu: [10, 25, 100, 1000],
      createdRow: (row, cells) => this.#furnish(row, cells),
      drawCallback: () => {
        this.#mark();
        this.#tellSorted();
      },
      layout: LAYOUT,
      language: WORDS,
    });
  }

  // As DataTables has it.
  #order() {
    const column = this.#columns.indexOf(this.sorted.sort);
    return column < 0 ? [] : [[column, this.sorted.direction]];
  }

  #tellSorted() {
    const [first] = this.#table?.order() ?? [];
    const now = sortOf(first?.[1] ? { sort: this.#columns[first[0]], direction: first[1] } : {});
    if (!this.#table || isSame(now, this.sorted)) return;
    this.sorted = now;
    this.sortedBy(now);
  }

  async #answerTo(DataTable, asked, done) {
    const answer = await this.#page(asked);
    if (answer === null || this.#ended.signal.aborted) return;
    if (answer.columns.join("\n") !== this.#columns.join("\n")) return this.#build(DataTable, answer, asked.length);
    done({ draw: asked.draw, recordsTotal: answer.total, recordsFiltered: answer.filtered, data: answer.rows });
  }

  // The page that DataTables asks for, or null where the server says no: then what is shown stays.
  async #page(asked) {
    const here = this.#answer;
    const filters = this.#filters(asked);
    this.#answer = null;
    if (here !== null) return here;
    this.#asking.abort();
    this.#asking = new AbortController();
    try {
      const query = { ...filters, start: asked.start, length: asked.length };
      const answer = await ask(this.#address("table", query), this.#asking);
      this.#sayLeftOut(answer);
      return answer;
    } catch (error) {
      if (error.name !== "AbortError") this.#say(error.message);
      return null;
    }
  }

  #filters({ order, search }) {
    const [first] = order;
    const sort = first?.dir ? { sort: this.#columns[first.column], direction: first.dir } : {};
    const filters = { ...sort, search: search.value.trim(), low: this.low.value.trim(), high: this.high.value.trim() };
    this.csv.href = this.#address("losses.csv", filters);
    return filters;
  }

  // Of the table as it stands.
  #filtersNow() {
    const [first] = this.#table.order();
    return this.#filters({ order: first ? [{ column: first[0], dir: first[1] }] : [], search: { value: this.#table.search() } });
  }

  #address(what, query) {
    return withQuery(addressOf(this.name, what), query);
  }

  #furnish(row, [step]) {
    const go = (event) => {
      event.preventDefault();
      event.stopPropagation();
      this.goTo(step);
    };
    const link = element("a", { href: `${addressOf(this.name).replace("/api", "")}?step=${step}`, onclick: go }, whole(step));
    row.firstChild.replaceChildren(link);
    row.dataset.step = step;
    row.addEventListener("click", go);
  }

  #mark() {
    for (const row of this.place.querySelectorAll("tbody tr")) {
      const isSelected = Number(row.dataset.step) === this.#step;
      if (isSelected) row.setAttribute("aria-selected", "true");
      else row.removeAttribute("aria-selected");
      if (isSelected) reveal(row, row.closest(".dt-layout-table"));
    }
  }

  // Turn to the page of the step that is looked at; while one page is on its way, only the newest step is remembered.
  async #find() {
    if (this.#isFinding || !this.#table) return;
    this.#isFinding = true;
    try {
      let found = null;
      while (found !== this.#step && this.#step !== null && !this.#ended.signal.aborted) {
        found = this.#step;
        if (!this.#isShown(found)) await this.#turnTo(found);
      }
    } catch (error) {
      if (error.name !== "AbortError") this.#say(error.message);
    } finally {
      this.#isFinding = false;
    }
  }

  #isShown(step) {
    return this.place.querySelector(`tbody tr[data-step="${step}"]`) !== null;
  }

  async #turnTo(step) {
    const length = this.#table.page.len();
    const answer = await ask(this.#address("table", { ...this.#filtersNow(), length, around: step }), this.#ended);
    if (this.#ended.signal.aborted || length !== this.#table.page.len() || !answer.rows.some(([own]) => own === step)) return;
    this.#answer = answer;
    // Not by `page()`: that turns back to the first page where there were fewer steps at the last draw.
    this.#table.settings()[0]._iDisplayStart = answer.start;
    this.#table.draw("page");
  }

  async #copy() {
    try {
      const query = { ...this.#filtersNow(), start: 0, length: COPIED };
      const { columns, rows, filtered } = await ask(this.#address("table", query), this.#ended);
      await navigator.clipboard.writeText([columns, ...rows].map((row) => row.join("\t")).join("\n"));
      const which = filtered > rows.length ? `The first ${whole(rows.length)} of ${whole(filtered)}` : whole(rows.length);
      this.#say(`${which} rows are in the clipboard.`);
    } catch (error) {
      this.#say(`Nothing was copied: ${error.message}`);
    }
  }

  #sayLeftOut({ left_out: count }) {
    this.#say(count ? `${whole(count)} more measurements have no column here; everystep losses RUN --csv has all.` : "");
  }

  #say(text) {
    this.note.textContent = text;
    this.note.hidden = !text;
  }
}

function sortOf({ sort, direction }) {
  return sort ? { sort, direction: direction === "desc" ? "desc" : "asc" } : { sort: null, direction: null };
}

function isSame(one, other) {
  return one.sort === other.sort && one.direction === other.direction;
}

const LAYOUT = {
  topStart: null,
  topEnd: null,
  bottomStart: ["info", "pageLength"],
  bottomEnd: { paging: { buttons: 5, firstLast: false } },
};

const WORDS = {
  lengthMenu: "_MENU_ a page",
  info: "_START_ to _END_ of _TOTAL_",
  infoEmpty: "no rows",
  infoFiltered: "(filtered from _MAX_)",
  zeroRecords: "no step is like this",
  emptyTable: "no step was taken",
  paginate: { previous: "←", next: "→" },
};

// Scrolls the table where it scrolls by itself, and never the page.
function reveal(row, box) {
  const head = box.querySelector("thead").offsetHeight;
  if (row.offsetTop - head < box.scrollTop) box.scrollTop = row.offsetTop - head;
  const end = row.offsetTop + row.offsetHeight;
  if (end > box.scrollTop + box.clientHeight) box.scrollTop = end - box.clientHeight;
}
