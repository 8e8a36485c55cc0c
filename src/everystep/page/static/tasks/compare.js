// Two runs compared: their losses in one plot, their settings, and where they diverge.

import { go, write } from "../shared/address.js";
import { commandLine, quoted } from "../shared/dialog.js";
import { ofRun, partingView } from "./parting.js";
import { plotBeside } from "../plot/source.js";
import { button, element } from "../shared/elements.js";
import { short, whole } from "../shared/format.js";
import { awaited } from "../shared/away.js";
import { tell } from "../shared/server.js";
import { runTask } from "./task.js";

// Comparisons since the page was loaded, so that Back is immediate.
const known = new Map();

/** Open the comparison of two runs in `main`. */
export async function open({ one, other }, main) {
  const names = [one, other];
  document.title = names.every(Boolean) ? `${one} and ${other} – everystep` : "Compare – everystep";
  document.querySelector("#trail").replaceChildren(element("a", { href: "/" }, "All runs"), " / Compare");
  const { directory, runs } = await awaited(main, "Loading the runs.", "/api/runs");
  const found = names.map((name) => runs.find((run) => run.name === name));
  main.classList.add("wide");
  main.append(element("h1", { class: "unseen" }, document.title), headOf(names, found, runs));
  const view = { names, found, main, directory, closing: [] };
  const reason = unready(names, found);
  if (reason) main.append(element("p", { class: "verdict" }, reason));
  else compare(view);
  return { update() {}, close: () => view.closing.forEach((close) => close()) };
}

// Return why there is nothing to compare, or nothing yet.
function unready(names, found) {
  const missing = names.findIndex((name, place) => name && !found[place]);
  if (missing >= 0) return `There is no run ${names[missing]} here; choose another one.`;
  const broken = found.find((run) => run?.problem);
  if (broken) return `${broken.name} cannot be read: ${broken.problem}`;
  const open = names.findIndex((name) => !name);
  if (open >= 0) return names[1 - open] ? `Choose the run to compare ${names[1 - open]} with.` : "Choose two runs to compare.";
  if (names[0] === names[1]) return "These are the same run; choose another one to compare with.";
  const empty = found.find((run) => !run.steps);
  return empty ? `${empty.name} has no steps yet, so there are no common steps.` : null;
}

// Both names, each with a choice of other runs, and a button that swaps them.
function headOf(names, found, runs) {
  const [left, right] = names.map((name, place) => sideOf(name, found[place], place, names, runs));
  const exchange = () => go({ view: "compare", one: names[1], other: names[0] });
  const swap = button("⇄", exchange, { class: "swap", title: "swap", "aria-label": "swap the runs" });
  return element("div", { class: "versus" }, left, swap, right);
}

// A run without steps has no loss, nor has the run of a loop that logs none.
function briefOf({ steps, first_loss: first, last_loss: last }) {
  const count = `${whole(steps)} ${steps === 1 ? "step" : "steps"}`;
  return first === null ? count : `${count}, loss ${short(first)} to ${short(last)}`;
}

function sideOf(name, run, place, names, runs) {
  const text = run && !run.problem && briefOf(run);
  const choose = (event) => {
    const chosen = names.with(place, event.target.value);
    go({ view: "compare", one: chosen[0], other: chosen[1] });
  };
  const label = place ? "second run" : "first run";
  const others = runs.filter((each) => each.name !== name).map((each) => element("option", { value: each.name }, each.name));
  const none = element("option", { value: "", selected: true, disabled: true }, run ? "another run" : "choose");
  const title = run ? element("a", { href: write({ view: "run", run: name }) }, name) : (name ?? label);
  return ofRun(
    place,
    title,
    element("p", { class: "muted small" }, text || "\u00a0"),
    element("select", { onchange: choose, "aria-label": `${label}: choose another` }, none, others),
  );
}

function compare(view) {
  const { names, found, main } = view;
  const verdict = element("div", { role: "status", tabIndex: -1, class: "verdict-place" });
  const progress = element("div");
  const plot = element("div", { class: "overlay" });
  const details = element("div");
  main.append(verdict, progress, plot, details);
  const goTo = (step) => go({ view: "run", run: names[0], step, overlay: [names[1]] });
  view.closing.push(plotBeside(plot, names, { goTo }));
  // Another run may have the name by now.
  const key = (thorough) => JSON.stringify([found.map(({ name, steps, started, last_loss: loss }) => [name, steps, started, loss]), thorough]);
  const show = (result) => {
    verdict.replaceChildren(...verdictOf(result));
    details.replaceChildren(...detailsOf(view, result, lookAtAll));
  };
  const begin = (thorough) => {
    const start = () => tell("/api/compare", { one: names[0], other: names[1], thorough });
    const done = (result) => {
      known.set(key(thorough), result);
      show(result);
    };
    const task = runTask(start, progress, { label: "comparing", done });
    view.closing.push(() => task.abandon());
  };
  const lookAtAll = () => {
    begin(true);
    verdict.scrollIntoView({ block: "nearest" });
    verdict.focus();
  };
  const before = known.get(key(true)) ?? known.get(key(false));
  if (before) show(before);
  else begin(false);
}

function verdictOf(result) {
  return [
    element("p", { class: "verdict" }, result.sentence),
    ...result.problems.map((problem) => element("p", { class: "alarm" }, problem)),
  ];
}

function detailsOf(view, result, lookAtAll) {
  return [
    result.operation && partingView(result),
    differencesTable("Settings that differ", view.names, result.asked.map(({ name, values }) => [name, values])),
    differencesTable("Numerics that differ", view.names, Object.entries(result.numerics)),
    statesOf(result),
    isWorthAll(result) ? thoroughOf(result, lookAtAll) : null,
    terminalOf(view, result),
  ].filter(Boolean);
}

function differencesTable(title, names, pairs) {
  if (!pairs.length) return null;
  const head = element("tr", {}, element("td"), ...names.map((name) => element("th", { scope: "col" }, name)));
  const cell = (value, _, pair) => element("td", { class: "mono", colSpan: 3 - pair.length }, textOf(value));
  const rows = pairs.map(([path, pair]) => element("tr", {}, element("th", { scope: "row" }, path), ...pair.map(cell)));
  const table = element("table", { class: "differences" }, element("thead", {}, head), element("tbody", {}, rows));
  return element("section", {}, element("h2", {}, title), table);
}

function textOf(value) {
  if (value === null || value === undefined) return "–";
  return typeof value === "string" ? value : JSON.stringify(value);
}

// The comparison of losses and states on disk.
function statesOf({ loss, steps, states, common_state: common }) {
  const lines = [];
  if (loss) lines.push(`The losses diverge at step ${whole(loss.step)}: ${short(loss.recorded, 8)} and ${short(loss.replayed, 8)}.`);
  else lines.push(`The losses are identical up to step ${whole(Math.min(...steps))}.`);
  if (steps[0] !== steps[1]) lines.push(`They took ${whole(steps[0])} and ${whole(steps[1])} steps.`);
  if (common !== null) lines.push(`The states on disk are identical up to state ${whole(common)}.`);
  const rows = states.map((each) => element("li", {}, element("code", {}, each.tensor), ` ${stateText(each)}`));
  const first = states.length > 0 && element(
    "details",
    { class: "more" },
    element("summary", {}, `State ${whole(states[0].state)} differs in ${whole(states.length)} ${states.length === 1 ? "tensor" : "tensors"}`),
    element("ul", { class: "plain-list" }, rows),
  );
  const title = element("h2", {}, "Losses and states");
  return element("section", { class: "states" }, title, ...lines.map((line) => element("p", {}, line)), first);
}

function stateText({ elements, size }) {
  if (!elements) return "has a different shape, or is only in one run";
  return `${whole(elements)} numbers${size && `, ${size}`}`;
}

// If losses or states differ and no operation was found, comparing all of them finds none either.
function isWorthAll({ is_thorough: thorough, operation, loss, states }) {
  return !thorough && (operation || !(loss || states.length));
}

function thoroughOf({ operation }, lookAtAll) {
  const text = operation
    ? "These are the first differences in the losses and the states on disk. An operation may have differed earlier, without effect on either."
    : "Losses and states on disk are identical. An operation may still differ, without effect on either.";
  return element("section", { class: "thorough" },
    element("h2", {}, "More thoroughly"), element("p", { class: "muted" }, text), button("Compare every operation", lookAtAll));
}

function terminalOf({ names, directory }, { text, is_thorough: thorough }) {
  const places = names.map((name) => quoted(directory === "runs" ? name : `${directory}/${name}`));
  const command = ["everystep", "diff", ...places, ...(thorough ? ["--thorough"] : [])].join(" ");
  return element("details", { class: "more terminal" }, element("summary", {}, "As text"),
    commandLine("From the command line", command).node, commandLine("Its output", text).node);
}
