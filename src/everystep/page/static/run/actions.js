// What the buttons above a run do; their dialogs are loaded when they are asked for.

import * as address from "../shared/address.js";
import { element } from "../shared/elements.js";
import { ask, tell } from "../shared/server.js";
import { chooseRun } from "./parts.js";

/** Train on from a step; null: from the beginning. */
export async function fork(about, step) {
  const { forkDialog } = await import("../tasks/fork.js");
  forkDialog(about, step ?? 0);
}

/** Save the run, and the step that is looked at, as a page. */
export async function share(about, step) {
  const { shareDialog } = await import("../tasks/share.js");
  shareDialog(about, step);
}

/** Stop the training of a fork that was begun from a page: its server trains it. */
export async function stop(about) {
  await tell(`/api/tasks/${encodeURIComponent(about.task)}`, null, { method: "DELETE" });
}

/** Offer the other runs, to compare the one at a place with, or to show beside it. */
export async function compare(place) {
  const { runs } = await ask("/api/runs");
  const link = (other, text) => element("a", { href: address.write(other) }, text);
  chooseRun(place.run, runs, (other) => [
    link({ view: "compare", one: place.run, other }, "compare"),
    link({ ...place, beside: [...new Set([...place.beside, other])] }, "plot together"),
  ]);
}
