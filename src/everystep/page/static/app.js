// The page: shows the view of its address.

import * as address from "./shared/address.js";
import * as keys from "./shared/keys.js";
import { applyAppearance, openAppearance } from "./shared/appearance.js";
import { element } from "./shared/elements.js";

const views = {
  runs: () => import("./runs/runs.js"),
  run: () => import("./run/run.js"),
  overlay: () => import("./runs/overlay.js"),
  compare: () => import("./tasks/compare.js"),
};

const NOT_LOADED =
  "A file of the page failed to load. Is everystep view still running? If everystep was updated since it started, start it again.";

const main = document.querySelector("main");
const failed = element("p", { class: "alarm", role: "alert" }); // what the reader asked for last, until the next place
let shown = null; // {key, view}
let turn = 0;

/** Show a place: update the current view, or open another one. */
async function show(place) {
  failed.remove();
  const key = place.view === "compare" ? JSON.stringify(place) : `${place.view} ${place.run ?? ""}`;
  if (shown?.key === key) return shown.view.update(place);
  closeDialogs();
  const mine = ++turn;
  shown?.view.close();
  shown = null;
  const host = element("div");
  try {
    const { open } = await views[place.view]().catch((cause) => {
      throw new Error(NOT_LOADED, { cause });
    });
    if (mine !== turn) return;
    main.replaceChildren(host);
    // open(place, host) fills `host` and returns {update(place), close()}.
    const view = await open(address.read(), host);
    if (mine !== turn) return view.close();
    shown = { key, view };
  } catch (error) {
    if (mine !== turn) return;
    host.replaceChildren(...failure(place, error.message));
    main.replaceChildren(host);
  }
  document.querySelector("#status").textContent = document.title;
}

// A dialog belongs to the previous view; it stays while a run plays or is followed, behind it.
function closeDialogs() {
  document.querySelectorAll("dialog[open]").forEach((dialog) => dialog.close());
}

function failure({ run }, message) {
  const link = element("a", { href: "/" }, "All runs");
  return [run ? element("h1", {}, run) : "", element("p", { class: "alarm", role: "alert" }, message), element("p", {}, link)];
}

// The token is a cookie now; remove it from the address, where it could be read or copied.
const here = new URL(location.href);
if (here.searchParams.has("token")) {
  here.searchParams.delete("token");
  history.replaceState(null, "", here.pathname + here.search);
}

window.addEventListener("unhandledrejection", ({ reason }) => {
  if (reason?.name === "AbortError") return;
  failed.textContent = reason?.message ?? String(reason);
  main.prepend(failed);
});
document.querySelector("#help").addEventListener("click", keys.help);
document.querySelector("#appearance").addEventListener("click", openAppearance);
applyAppearance();
keys.bind([{ keys: ["?"], shown: "?", label: "this list", press: keys.help }]);
keys.begin();
address.begin();
address.watch(show);
window.addEventListener("popstate", closeDialogs);
show(address.read());
