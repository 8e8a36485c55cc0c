// The results of trainings without some rows: a line for each, and one for the recording.

import { element } from "../shared/elements.js";
import { numberOf, whole } from "../shared/format.js";
import { numberCell } from "../step/worst.js";

/** Number of rows that are listed, as in the terminal. */
const NAMED = 8;

/** Return the table of the trainings: the compared value at the last step, and its change against the recording. */
export function casesTable({ until, by, recorded, cases }) {
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
