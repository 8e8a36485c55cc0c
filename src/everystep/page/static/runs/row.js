// One run in the table of all runs.

import * as address from "../shared/address.js";
import { drawing, element } from "../shared/elements.js";
import { addressOf, ask } from "../shared/server.js";
import { Note } from "../shared/note.js";
import { numberOf, whole } from "../shared/format.js";
import { textOf, titleOf } from "./kinds.js";

const REST = 2000; // milliseconds between pictures of a run in training

/** Return the class of a column's cells: what is in them, and how early they give way. */
export const classOf = ({ key, kind, rank }) => `${key} of-${kind} rank-${rank}`;

/** The row of a run; `columns`: of the server; `pick(isPicked)`: called for its checkbox. */
export class RunRow {
  #isSeen = false;
  #pictured = null; // what the picture shows: another run may take the name, with as many steps
  #isWaiting = false;

  constructor(run, columns, pick) {
    const box = element("input", { type: "checkbox", "aria-label": `pick ${run.name}`, onchange: () => pick(box.checked) });
    this.note = new Note(run.name);
    const cell = (column) => element("td", { class: classOf(column), role: "cell", "data-header": column.header });
    this.cells = new Map(columns.map((column) => [column, cell(column)]));
    this.host = element("tr", { role: "row", "data-name": run.name }, element("td", { class: "pick", role: "cell" }, box), ...this.cells.values());
    this.picture = this.host.querySelector(".of-picture");
    this.indent = (depth) => this.host.style.setProperty("--depth", Math.min(depth, 4));
    this.box = box;
    this.update(run);
  }

  update(run) {
    const isSame = (key) => JSON.stringify(run[key]) === JSON.stringify(this.run[key]);
    const isNamed = this.run && ["parent", "problem", "tags"].every(isSame);
    this.run = run;
    this.box.disabled = this.host.classList.toggle("unreadable", run.problem !== null);
    this.note.update(run);
    for (const [column, cell] of this.cells) {
      if (column.kind === "status") cell.replaceChildren(...this.#status());
      else if (column.kind === "name") {
        // Keep a link that is about to be clicked, or has the focus.
        if (!isNamed) cell.replaceChildren(...this.#name());
      } else if (column.kind !== "picture") Object.assign(cell, { textContent: textOf(column, run), title: titleOf(column, run) });
    }
    this.#draw();
  }

  /** Mark settings that are not the usual ones, which are given by column, and hide the columns without values. */
  compare(usual, empty) {
    for (const [column, cell] of this.cells) {
      cell.classList.toggle("unusual", usual.has(column) && !["", usual.get(column)].includes(textOf(column, this.run)));
      cell.hidden = empty.has(column);
    }
  }

  see(isSeen) {
    this.#isSeen = isSeen;
    this.#draw();
  }

  #name() {
    const { name, problem, tags, parent } = this.run;
    const marks = (tags ?? []).map((tag) => element("span", { class: "tag" }, tag));
    const below = (...content) => element("span", { class: "lineage" }, ...content);
    if (problem !== null) return [name, ...marks, below(problem)];
    const link = (run) => element("a", { href: address.write({ view: "run", run }) }, run);
    const fork = parent ? [below("fork of ", link(parent[0]), ` at ${whole(parent[1])}`)] : [];
    return [link(name), ...marks, this.note.host, ...fork];
  }

  #status() {
    const { problem, status, damage, nonfinite_step: step } = this.run;
    const [state, text] = problem === null ? [status, status] : ["failed", "cannot be read"];
    const damaged = damage && element("span", { class: "nonfinite", title: damage }, "damaged");
    const nonfinite = step && element("span", { class: "nonfinite" }, nonfiniteText(this.run));
    return [element("span", { class: `state ${state}` }, text), damaged, nonfinite].filter(Boolean);
  }

  // The picture, once the row is visible; redrawn from time to time while steps are added.
  async #draw() {
    const { name, steps, started, last_loss: loss } = this.run;
    const now = JSON.stringify([steps, started, loss]);
    if (!this.picture || !this.#isSeen || this.#isWaiting || !steps || now === this.#pictured) return;
    this.#isWaiting = true;
    const isFirst = this.#pictured === null;
    this.#pictured = now;
    try {
      this.picture.replaceChildren(sparkline(await ask(addressOf(name, "sparkline")), name));
    } catch {
      this.picture.replaceChildren(); // without a picture, the row is still correct
    }
    setTimeout(() => {
      this.#isWaiting = false;
      this.#draw();
    }, isFirst ? 0 : REST);
  }
}

/** Describe from which step the loss of a run is not finite. */
export function nonfiniteText({ nonfinite_step: step, last_loss: loss }) {
  return `not finite ${Number.isFinite(numberOf(loss)) ? "at" : "from"} step ${whole(step)}`;
}

function sparkline({ path, dot, marks, is_log: isLog, width, height }, name) {
  const label = `the loss of ${name}${isLog ? ", on a log axis" : ""}`;
  return drawing(
    "svg",
    { class: "sparkline", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label, preserveAspectRatio: "none" },
    drawing("path", { d: path }),
    ...marks.map((x) => drawing("line", { x1: x, x2: x, y1: height - 9, y2: height, class: "mark" })),
    dot && drawing("circle", { cx: dot[0], cy: dot[1], r: 4 }),
  );
}
