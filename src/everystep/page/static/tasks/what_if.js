// The dialog of a what-if: a training without some rows of a step's batch.

import { commandLine, complain, fieldLine, openDialog, quoted, wholesIn } from "../shared/dialog.js";
import { button, element } from "../shared/elements.js";
import { numberOf, whole } from "../shared/format.js";
import { addressOf, tell } from "../shared/server.js";
import { numberCell } from "../step/worst.js";
import { runTask } from "./task.js";

/** Steps after which the trainings are compared, by default. */
const STEPS = 5;
const EACH = "one after the other";
/** Number of rows that are listed, as in the terminal. */
const NAMED = 8;

/** Open the dialog for an open step; `chosen`: rows that are already chosen; `argument`: the run in a command. */
export function whatIfDialog({ run, step, steps, batch, tensors }, chosen, argument) {
  const fields = fieldsOf(step, steps, chosen);
  const command = commandLine("The same from the command line");
  const host = element("div");
  const begin = element("button", { class: "primary" }, "Train again");
  let task = null;
  const say = () => {
    const asked = askedOf(fields, step, batch, tensors);
    complain({ input: fields.rows, fault: fields.fault }, asked.problem);
    command.node.hidden = Boolean(asked.problem);
    if (!asked.problem) command.set(commandOf(argument, asked, fields));
    return asked;
  };
  const start = (event) => {
    event.preventDefault();
    const { problem, ...asked } = say();
    if (problem) return fields.rows.focus();
    begin.disabled = true;
    const over = () => {
      begin.disabled = false;
      host.scrollIntoView({ block: "nearest" });
    };
    task = runTask(() => tell(addressOf(run, "what-if"), asked), host, { label: "training", done: casesTable, over });
  };
  const form = element(
    "form",
    { class: "asking", oninput: say, onsubmit: start },
    element("p", { class: "muted small" }, `Trains again from state ${whole(step - 1)} without rows of this batch, and compares with the recording. Nothing is recorded.`),
    fieldLine("rows to leave out", fields.rows),
    fields.fault,
    fieldLine("left out", fields.how),
    fieldLine("compare at step", fields.until),
    fieldLine("what to compare", fields.by),
    command.node,
    host,
    element("div", { class: "buttons" }, begin, button("Close", () => dialog.close())),
  );
  const dialog = openDialog(`What if: step ${whole(step)} without some rows`, form, { closed: () => task?.abandon() });
  say();
  return dialog;
}

function fieldsOf(step, steps, chosen = []) {
  const text = (value, placeholder) => element("input", { type: "text", class: "mono", value, placeholder, autocomplete: "off", spellcheck: false });
  return {
    rows: text(chosen.join(", "), "each row of the batch"),
    fault: element("p", { class: "alarm small", role: "alert", hidden: true }),
    how: element("select", {}, element("option", {}, EACH), element("option", {}, "all at once")),
    until: element("input", { type: "number", min: step, max: steps, step: 1, required: true, value: String(Math.min(step + STEPS, steps)) }),
    by: text("", "loss"),
  };
}

// The values of the fields; `problem`: an error in them.
function askedOf({ rows, how, until, by }, step, batch, tensors) {
  const { numbers, wrong } = wholesIn(rows.value);
  const given = numbers.length ? numbers : rowsOf(batch, tensors);
  return {
    at: step - 1,
    until: Number(until.value),
    rows: given,
    each: how.value === EACH,
    by: by.value.trim() || "loss",
    problem: wrong ? `“${wrong}” is not a row: write whole numbers, with commas between` : given.length ? "" : "this batch has no row numbers; name the rows to leave out",
  };
}

// A batch without numbers of rows has all rows of the data, in order.
function rowsOf({ rows, tensors: [first] }, tensors) {
  return rows ?? [...Array(tensors[first.tensor].shape[0] ?? 0).keys()];
}

function commandOf(argument, { at, until, rows, each, by }, fields) {
  const which = fields.rows.value.trim() ? ["--without-rows", rows.join(",")] : ["--without-rows-of", String(at + 1)];
  const words = ["everystep", "what-if", argument, "--at", String(at), "--until", String(until), ...which];
  if (each) words.push("--each");
  if (by !== "loss") words.push("--by", by);
  return words.map(quoted).join(" ");
}

/** Return the table of the trainings: the compared value at the last step, and its change against the recording. */
function casesTable({ until, by, recorded, cases }) {
  const known = numberOf(recorded.value);
  const changes = cases.map(({ value }) => (value === null || known === null ? null : numberOf(value) - known));
  const most = Math.max(...changes.map(Math.abs).filter(Number.isFinite), 0);
  const head = ["rows left out", `${by} at step ${whole(until)}`, "change"].map((title, place) => element("th", { scope: "col", class: place ? "number" : "" }, title));
  const first = element("tr", { class: "recorded" }, element("th", { scope: "row" }, "none, as recorded"), numberCell(known), element("td"));
  const rows = cases.map(({ rows: left, value }, place) => element("tr", {}, element("th", { scope: "row" }, namesOf(left)), numberCell(numberOf(value)), changeCell(changes[place], most)));
  const table = element("table", { class: "cases" }, element("thead", {}, element("tr", {}, head)), element("tbody", {}, first, rows));
  return element("div", { class: "cases-place", tabIndex: 0, role: "group", "aria-label": "trainings without rows" }, table);
}

function namesOf(rows) {
  const more = rows.length > NAMED ? ` and ${whole(rows.length - NAMED)} more` : "";
  return rows.slice(0, NAMED).join(", ") + more;
}

// The bar points left if the number is smaller than recorded.
function changeCell(change, most) {
  const cell = numberCell(change);
  if (change > 0) cell.textContent = `+${cell.textContent}`;
  if (Number.isFinite(change) && most) {
    cell.classList.add(change < 0 ? "less" : "more-than");
    cell.style.setProperty("--part", `${(100 * Math.abs(change)) / most}%`);
  }
  return cell;
}
