// The head of a run: its name, its state, the facts in the chapter's order, its most important losses.

import * as address from "../shared/address.js";
import { copyMark } from "../shared/copy.js";
import { described, element } from "../shared/elements.js";
import { whole } from "../shared/format.js";

/** Return a link to a step of a run. `go(step)`: goes there, keeping what else is shown. */
export function stepLink(run, step, go) {
  const place = { view: "run", run, step, overlay: address.read().overlay };
  return element("a", { href: address.write(place), onclick: plainly(() => go(step)) }, `step ${whole(step)}`);
}

// Return what a click on a link does, unless it opens a tab or a window.
function plainly(does) {
  return (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
    event.preventDefault();
    does();
  };
}

/** Return a link to an operation of a run, which keeps what is plotted with it. */
export function operationLink(run, { step, phase, index: operation }) {
  const place = { view: "run", run, step, phase, operation, overlay: address.read().overlay };
  return element("a", { href: address.write(place) }, "Open");
}

/** Return the text of a run's state; `speed`: steps per second, or null. */
export function statusLine(about, speed) {
  const { status, steps, planned } = about;
  const last = about.landmarks.find(({ what }) => what === "last");
  const words = [
    `${whole(steps)}${planned && planned !== steps ? ` of ${whole(planned)}` : ""} ${planned === 1 ? "step" : "steps"}`,
    ...(last ? [`loss ${last.short}`] : []),
    ...(status === "running" && speed ? [`${whole(Math.round(speed))} steps/s`] : []),
  ];
  return [element("span", { class: `state ${status}` }, status), ` · ${words.join(" · ")}`];
}

/** Return the ranks of a run, to switch between them at the open step; they are plotted together. */
export function ranksSwitch({ name, ranks }) {
  const link = (run, rank) => {
    const press = plainly(() => address.go({ view: "run", run, step: address.read().step }));
    if (run === name) return element("strong", { "aria-current": "true" }, `${rank}`);
    return element("a", { href: address.write({ view: "run", run }), onclick: press }, `${rank}`);
  };
  const links = ranks.flatMap((run, rank) => [rank ? " · " : "rank ", link(run, rank)]);
  return ranks.length ? [element("span", { class: "ranks" }, ...links)] : [];
}

/** Return where a run comes from and what was forked from it. */
export function lineage({ name, parent, forks, unread }) {
  const link = (run, overlay = []) => element("a", { href: address.write({ view: "run", run, overlay }) }, run);
  const overlay = (other) => element("a", { href: address.write({ view: "run", run: name, overlay: [other] }) }, "plot together");
  const parts = [];
  if (parent) parts.push(element("span", {}, "fork of ", link(parent[0]), ` at ${whole(parent[1])} (`, overlay(parent[0]), ")"));
  for (const fork of forks) {
    parts.push(element("span", {}, `forked at ${whole(fork.at)}: `, link(fork.name), " (", overlay(fork.name), ")"));
  }
  if (unread) parts.push(element("span", {}, `${whole(unread)} runs are not read yet; forks among them are missing here`));
  return parts;
}

/** Return the facts as a list of descriptions. */
export function factsList({ facts, details, times }) {
  const rows = facts.flatMap(([label, text]) => [
    element("dt", {}, label),
    label === "model" ? element("dd", { class: "model" }, ...text.split("\n").map((line) => element("span", {}, `${line}\n`))) : element("dd", {}, text),
  ]);
  const fold = (brief, pairs) => element("details", {}, element("summary", {}, brief), element("dl", { class: "pairs" }, ...described(pairs)));
  const more = details.map(([title, brief, pairs]) => [title, fold(brief, pairs)]);
  return element("dl", { class: "facts" }, ...rows, ...described([...more, ["times", times]]));
}

/** Return the facts in a line. */
export function factsBrief({ facts, is_of_loop: isOfLoop }) {
  const of = new Map(facts);
  return (isOfLoop ? ["update"] : ["data", "loss", "update"]).filter((label) => of.has(label)).map((label) => inLine(of.get(label))).join(" · ");
}

// Several named optimizers show their classes only: a line has no room for all settings.
function inLine(text) {
  const lines = text.split("\n").map((line) => line.trim());
  const named = /^([^\s:]+: \w+)\(.*\)$/;
  const areSeveral = lines.filter((line) => named.test(line)).length > 1;
  return lines.map((line) => (areSeveral ? line.replace(named, "$1") : line)).join("; ");
}

/** Return the first, the last and the smallest loss. */
export function landmarks({ name, landmarks: found }, go) {
  const one = ({ what, step, short: brief, full }) => {
    const number = element("span", { class: "number", title: full }, brief);
    const at = element("span", { class: "at" }, stepLink(name, step, go));
    const copying = copyMark(() => full, `copy the ${what} loss in full precision`);
    return element("div", {}, element("dt", {}, what), element("dd", {}, number, " ", at, copying));
  };
  return element("dl", { class: "landmarks" }, ...found.map(one));
}
