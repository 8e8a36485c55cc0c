// The buttons above a run; their dialogs are loaded on demand.

import * as address from "../shared/address.js";
import { openDialog } from "../shared/dialog.js";
import { element } from "../shared/elements.js";
import { ask, tell } from "../shared/server.js";

/** Fork from a step; null: from the beginning. */
export async function fork(about, step) {
  const { forkDialog } = await import("../tasks/fork.js");
  forkDialog(about, step ?? 0);
}

/** Save the run and the open step as a page. */
export async function share(about, step) {
  const { shareDialog } = await import("../tasks/share.js");
  shareDialog(about, step);
}

/** Stop the training of a fork that the server trains. */
export async function stop(about) {
  await tell(`/api/tasks/${encodeURIComponent(about.task)}`, null, { method: "DELETE" });
}

/** List the other runs, to compare with the current one, or to plot together. A rank is compared as its whole run. */
export async function compare(place, { ranks: [one = place.run] }) {
  const { runs } = await ask("/api/runs");
  const link = (other, text) => element("a", { href: address.write(other) }, text);
  const rows = runs
    .filter((run) => run.name !== place.run && run.problem === null)
    .map(({ name: other }) => element(
      "li",
      {},
      element("span", { class: "name" }, other),
      link({ view: "compare", one, other }, "compare"),
      link({ ...place, overlay: [...new Set([...place.overlay, other])] }, "plot together"),
    ));
  const list = rows.length ? element("ul", { class: "other-runs" }, ...rows) : element("p", { class: "muted" }, "There are no other runs here.");
  const close = element("form", { method: "dialog" }, element("button", {}, "Close"));
  const dialog = openDialog(`${place.run} and …`, [list, close]);
  dialog.addEventListener("click", (event) => event.target.closest("a") && dialog.close());
}
