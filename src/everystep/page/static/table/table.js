// The table of every step, by DataTables: its source sorts, filters and returns pages.

import { copy } from "../shared/copy.js";
import { button, element, showText } from "../shared/elements.js";
import { whole } from "../shared/format.js";
import { Timers } from "../shared/timers.js";
import { Filters } from "./filters.js";

const COPIED = 10000; // rows, at most

/** The layout of DataTables. */
const LAYOUT = {
  topStart: null,
  topEnd: null,
  bottomStart: ["info", "pageLength"],
  bottomEnd: { paging: { buttons: 5, firstLast: false } },
};

/** The texts of DataTables. */
const WORDS = {
  lengthMenu: "_MENU_ per page",
  info: "_START_ to _END_ of _TOTAL_",
  infoEmpty: "no rows",
  infoFiltered: "(filtered from _MAX_)",
  zeroRecords: "no matching steps",
  emptyTable: "no steps",
  paginate: { previous: "←", next: "→" },
};

// A saved report contains the library, and has already set it.
async function dataTables() {
  window.everystepDataTables ??= import("/static/datatables.js").then(({ default: DataTable }) => DataTable);
  const DataTable = await window.everystepDataTables;
  DataTable.ext.errMode = "throw";
  return DataTable;
}

/**
 * A table of steps in `host`.
 *
 * `source`: of the rows, like `serverRows`; `sorted`: {sort, direction}, the title of a column, and `asc` or `desc`; null: by the steps.
 * `goTo(step)`: called for a row; `sortedBy(sorted)`: when the reader sorts.
 */
export class StepTable {
  #table = null;
  #columns = [];
  #step;
  #answer = null; // a page that was loaded before DataTables requests it
  #isFinding = false;
  #asking = new AbortController();
  #ended = new AbortController();
  #timers = new Timers();

  constructor(host, source, { step = null, sorted = {}, goTo = () => {}, sortedBy = () => {} } = {}) {
    Object.assign(this, { source, goTo, sortedBy });
    this.sorted = sortOf(sorted);
    this.#step = step;
    this.filters = new Filters(() => this.#table?.draw());
    this.csv = element("a", { class: "csv", download: source.file ?? "" }, "CSV");
    this.note = element("p", { class: "note", role: "status", hidden: true });
    const label = "copy the filtered rows, up to 10,000";
    const copying = button("Copy", ({ target }) => this.#copy(target), { title: label });
    const actions = element("span", { class: "actions" }, copying, this.csv);
    this.place = element("div");
    const fields = element("div", { class: "filters" }, ...this.filters.nodes, actions);
    this.host = element("div", { class: "everystep-table live" }, fields, this.note, this.place);
    host.append(this.host);
    this.#begin();
  }

  /** Select the row of a step, and turn to its page. */
  setStep(step) {
    this.#step = step;
    this.#mark();
    this.#find();
  }

  /** Sort as in the address. */
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
    this.filters.close();
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
      if (problem) showText(this.note, problem);
    } catch (error) {
      if (!this.#ended.signal.aborted) showText(this.note, `The table cannot be shown: ${error.message}`);
    }
  }

  // The first page, and the error of an invalid order in the address, which is replaced by that of the steps.
  async #first() {
    const query = { start: 0, length: 10, around: this.#step };
    try {
      return [await this.source.page({ ...query, ...this.sorted }, this.#ended), null];
    } catch (error) {
      if (error.status !== 400 || this.sorted.sort === null) throw error;
      this.sorted = sortOf({});
      return [await this.source.page(query, this.#ended), error.message];
    }
  }

  #build(DataTable, answer, length) {
    this.#table?.destroy();
    this.#table = null;
    this.#columns = answer.columns;
    this.filters.setColumns(answer.columns);
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

  // In the format of DataTables.
  #order() {
    const column = this.#columns.indexOf(this.sorted.sort);
    return column < 0 ? [] : [[column, this.sorted.direction]];
  }

  #tellSorted() {
    const now = this.#sortedNow();
    if (isSame(now, this.sorted)) return;
    this.sorted = now;
    this.sortedBy(now);
  }

  async #answerTo(DataTable, asked, done) {
    const answer = await this.#page(asked);
    if (answer === null || this.#ended.signal.aborted) return;
    if (answer.columns.join("\n") !== this.#columns.join("\n")) return this.#build(DataTable, answer, asked.length);
    done({ draw: asked.draw, recordsTotal: answer.total, recordsFiltered: answer.filtered, data: answer.rows });
  }

  // The page that DataTables requests, or null on an error: then the current rows stay.
  async #page({ start, length }) {
    const here = this.#answer;
    this.#answer = null;
    try {
      const wanted = this.#wanted();
      this.csv.href = this.source.csv(wanted);
      if (here !== null) return here;
      this.#asking.abort();
      this.#asking = new AbortController();
      const answer = await this.source.page({ ...wanted, start, length }, this.#asking);
      this.#sayLeftOut(answer);
      return answer;
    } catch (error) {
      if (error.name !== "AbortError") showText(this.note, error.message);
      return null;
    }
  }

  // The current query of the table, without the page.
  #wanted() {
    return { ...this.#sortedNow(), ...this.filters.wanted };
  }

  // The order of DataTables; before its start, the requested one.
  #sortedNow() {
    if (!this.#table) return this.sorted;
    const [first] = this.#table.order();
    return sortOf(first?.[1] ? { sort: this.#columns[first[0]], direction: first[1] } : {});
  }

  #furnish(row, [step]) {
    const go = (event) => {
      event.preventDefault();
      event.stopPropagation();
      this.goTo(step);
    };
    const link = element("a", { href: this.source.link(step), onclick: go }, whole(step));
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

  // Go to the page of the open step; during a request, only the newest step is remembered.
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
      if (error.name !== "AbortError") showText(this.note, error.message);
    } finally {
      this.#isFinding = false;
    }
  }

  #isShown(step) {
    return this.place.querySelector(`tbody tr[data-step="${step}"]`) !== null;
  }

  async #turnTo(step) {
    const length = this.#table.page.len();
    const answer = await this.source.page({ ...this.#wanted(), length, around: step }, this.#ended);
    if (this.#ended.signal.aborted || length !== this.#table.page.len() || !answer.rows.some(([own]) => own === step)) return;
    this.#answer = answer;
    // Not by `page()`: that goes back to the first page if there were fewer steps at the last draw.
    this.#table.settings()[0]._iDisplayStart = answer.start;
    this.#table.draw("page");
  }

  async #copy(pressed) {
    try {
      const { columns, rows, filtered } = await this.source.page({ ...this.#wanted(), start: 0, length: COPIED }, this.#ended);
      const isCopied = await copy([columns, ...rows].map((row) => row.join("\t")).join("\n"), pressed);
      if (!isCopied) throw new Error("the browser does not allow this; save the rows as CSV");
      const which = filtered > rows.length ? `The first ${whole(rows.length)} of ${whole(filtered)}` : whole(rows.length);
      showText(this.note, `${which} rows are in the clipboard.`);
    } catch (error) {
      showText(this.note, `Nothing was copied: ${error.message}`);
    }
  }

  #sayLeftOut({ left_out: count }) {
    showText(this.note, count ? `${whole(count)} more measurements have no column here; everystep losses RUN --csv has all.` : "");
  }
}

function sortOf({ sort, direction }) {
  return sort ? { sort, direction: direction === "desc" ? "desc" : "asc" } : { sort: null, direction: null };
}

function isSame(one, other) {
  return one.sort === other.sort && one.direction === other.direction;
}

// Scrolls only the table, if it is scrollable, never the page.
function reveal(row, box) {
  const head = box.querySelector("thead").offsetHeight;
  if (row.offsetTop - head < box.scrollTop) box.scrollTop = row.offsetTop - head;
  const end = row.offsetTop + row.offsetHeight;
  if (end > box.scrollTop + box.clientHeight) box.scrollTop = end - box.clientHeight;
}
