// One run in the table of all runs.

import * as address from "../shared/address.js";
import { drawing, element } from "../shared/elements.js";
import { addressOf, ask } from "../shared/server.js";
import { Note } from "../shared/note.js";
import { COMPARED, settingOf } from "./order.js";
import { ago, duration, fullText, numberOf, percent, short, whole } from "../shared/format.js";

const REST = 2000; // milliseconds between pictures of a run in training
const CELLS = ["status", "steps", "last_loss", "picture", "validation", "optimizer", "lr", "batch_size", "seconds", "started"];

/** The row of a run; `pick(isPicked)`: called for its checkbox. */
export class RunRow {
  #isSeen = false;
  #pictured = null; // what the picture shows: another run may take the name, with as many steps
  #isWaiting = false;

  constructor(run, pick) {
    const cell = (name) => element("td", { class: name, role: "cell" });
    const box = element("input", { type: "checkbox", "aria-label": `pick ${run.name}`, onchange: () => pick(box.checked) });
    this.name = element("td", { class: "name", role: "cell" });
    this.note = new Note(run.name);
    this.cells = Object.fromEntries(CELLS.map((name) => [name, cell(name)]));
    Object.assign(this, { status: this.cells.status, picture: this.cells.picture });
    const first = element("td", { class: "pick", role: "cell" }, box);
    this.host = element("tr", { role: "row", "data-name": run.name }, first, this.name, ...Object.values(this.cells));
    this.indent = (depth) => this.host.style.setProperty("--depth", Math.min(depth, 4));
    this.box = box;
    this.update(run);
  }

  update(run) {
    const isSame = (...keys) => keys.every((key) => JSON.stringify(run[key]) === JSON.stringify(this.run?.[key]));
    const isNamed = this.run && isSame("parent", "problem", "tags");
    this.run = run;
    const { name, problem, status } = run;
    this.host.classList.toggle("unreadable", problem !== null);
    this.box.disabled = problem !== null;
    if (!isNamed) {
      // Keep a link that is about to be clicked, or has the focus.
      const link = element("a", { href: address.write({ view: "run", run: name }) }, name);
      const own = problem === null ? [this.note.host] : [];
      const tags = (run.tags ?? []).map((tag) => element("span", { class: "tag" }, tag));
      this.name.replaceChildren(problem === null ? link : name, ...tags, ...own, ...this.#lineage());
    }
    this.note.update(run);
    const state = problem === null ? [status, status] : ["failed", "cannot be read"];
    this.status.replaceChildren(element("span", { class: `state ${state[0]}` }, state[1]), ...damaged(run), ...nonfinite(run));
    for (const [key, [text, title]] of Object.entries(textsOf(run))) Object.assign(this.cells[key], { textContent: text, title });
    this.#draw();
  }

  /** Mark the settings that differ from most runs; `usual`: their values by key. */
  tellUnusual(usual) {
    const isOther = (key) => usual.has(key) && this.run.optimizer !== null && settingOf(this.run, key) !== usual.get(key);
    for (const key of COMPARED) this.cells[key].classList.toggle("unusual", isOther(key));
  }

  see(isSeen) {
    this.#isSeen = isSeen;
    this.#draw();
  }

  #lineage() {
    const { parent, problem } = this.run;
    if (problem !== null) return [element("span", { class: "lineage" }, problem)];
    if (!parent) return [];
    const link = element("a", { href: address.write({ view: "run", run: parent[0] }) }, parent[0]);
    return [element("span", { class: "lineage" }, "fork of ", link, ` at ${whole(parent[1])}`)];
  }

  // The picture, once the row is visible; redrawn from time to time while steps are added.
  async #draw() {
    const { name, steps, started, last_loss: loss } = this.run;
    const now = JSON.stringify([steps, started, loss]);
    if (!this.#isSeen || this.#isWaiting || !steps || now === this.#pictured) return;
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

// Return the text and the title of each plain cell.
function textsOf(run) {
  const { problem, steps, planned, last_loss: loss, validation, optimizer, batch_size: batch, seconds, started } = run;
  const utc = (time) => `${new Date(time).toISOString().replace("T", " ").slice(0, 19)} UTC`;
  const { name, value, is_share: isShare } = validation ?? {};
  return {
    steps: [steps === null ? "" : steps === planned ? whole(steps) : `${whole(steps)} of ${whole(planned)}`, ""],
    last_loss: [short(loss), String(loss ?? "")],
    validation: [!validation ? "" : isShare && numberOf(value) <= 1 ? percent(value) : short(value), validation ? `${name} on the validation rows: ${fullText(numberOf(value))}` : ""],
    optimizer: [optimizer ?? "", ""],
    lr: [settingOf(run, "lr"), ""],
    batch_size: [batch === null ? "" : whole(batch), "rows (samples) in each step"],
    seconds: [seconds === null || seconds === undefined ? "" : duration(seconds), ""],
    started: [started ? ago(started) : "", started ? utc(started) : ""],
  };
}

function damaged({ damage }) {
  return damage ? [element("span", { class: "nonfinite", title: damage }, "damaged")] : [];
}

function nonfinite(run) {
  return run.nonfinite_step ? [element("span", { class: "nonfinite" }, nonfiniteText(run))] : [];
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
