// The dialog that starts a fork: a run that equals its parent up to a step, and continues with changes.

import { go } from "../shared/address.js";
import { closing, commandLine, fieldLine, openDialog, quoted } from "../shared/dialog.js";
import { button, element } from "../shared/elements.js";
import { whole } from "../shared/format.js";
import { addressOf, tell } from "../shared/server.js";
import { runTask } from "./task.js";

/** Open the dialog; when the fork has started, it is shown with its parent. */
export function forkDialog(about, step) {
  const title = step ? `Fork after step ${whole(step)}` : "Fork before the first step";
  if (!about.has_experiment) return openDialog(title, inPython(about, step));
  const fields = fieldsOf(about, step);
  const command = commandLine("The same from the command line");
  const host = element("div");
  let task = null;
  let hasBegun = false;
  const say = () => command.set(commandOf(about, askedOf(fields, step)));
  const start = (event) => {
    event.preventDefault();
    begin.disabled = true;
    // As soon as it runs, the fork is shown with its parent.
    const begun = ({ run }) => {
      hasBegun = true;
      task.leave();
      dialog.close();
      go({ view: "run", run, overlay: [about.name] });
    };
    const over = () => {
      begin.disabled = false;
      begin.scrollIntoView({ block: "nearest" });
    };
    task = runTask(() => tell(addressOf(about.name, "fork"), askedOf(fields, step)), host, { label: "training", begun, over });
  };
  const begin = element("button", { class: "primary" }, "Train it");
  const form = element(
    "form",
    { class: "asking", oninput: say, onsubmit: start },
    element("p", { class: "muted small" }, introduction(about, step)),
    ...linesOf([...fields.first, ...fields.last]),
    element("details", { class: "more" }, element("summary", {}, "More settings"), ...linesOf(fields.more)),
    command.node,
    host,
    element("div", { class: "buttons" }, begin, button("Close", () => dialog.close())),
  );
  const dialog = openDialog(title, form, { closed: () => hasBegun || task?.cancel() });
  say();
  return dialog;
}

function introduction({ name }, step) {
  const kept = step ? `${name}'s steps up to ${whole(step)}` : `${name}'s data and first parameters`;
  return `It has ${kept}, and continues with your changes.`;
}

// The settings of the experiment, the most frequently changed first. Only changes are sent.
function fieldsOf(about, step) {
  const setting = (path) => field(path, about.settings[path], { path, class: "mono" });
  const paths = Object.keys(about.settings).filter((path) => !["seed", "steps"].includes(path));
  const isRate = (path) => path === "optimizer.lr";
  const seed = field("seed", about.settings.seed, { path: "seed", inputMode: "numeric" });
  const steps = field("steps", about.planned ?? about.steps, { type: "number", min: step + 1, step: 1, hint: "in all" });
  const name = field("name", "the next free one");
  return {
    first: paths.filter(isRate).map(setting),
    more: [...paths.filter((path) => !isRate(path)).map(setting), seed],
    last: [steps, name],
    steps,
    name,
  };
}

function field(name, now, { path = null, hint = null, ...properties } = {}) {
  const placeholder = now === null || now === undefined ? "" : typeof now === "string" ? now : JSON.stringify(now);
  const input = element("input", { type: "text", placeholder, autocomplete: "off", spellcheck: false, ...properties });
  return { name, path, input, hint };
}

function linesOf(fields) {
  return fields.map(({ name, input, hint }) => fieldLine(name, input, hint));
}

function askedOf(fields, at) {
  const given = [...fields.first, ...fields.more].filter(({ input }) => input.value.trim());
  return {
    at,
    settings: Object.fromEntries(given.map(({ path, input }) => [path, input.value.trim()])),
    steps: fields.steps.input.value ? Number(fields.steps.input.value) : null,
    name: fields.name.input.value.trim() || null,
  };
}

function commandOf(about, { at, settings, steps, name }) {
  const words = ["everystep", "fork", about.directory ?? about.name, "--at", String(at)];
  for (const [path, text] of Object.entries(settings)) words.push("--set", `${path}=${text}`);
  if (steps) words.push("--steps", String(steps));
  if (name) words.push("--run", `${parentOf(about.directory)}${name}`);
  return words.map(quoted).join(" ");
}

function parentOf(directory) {
  return directory?.includes("/") ? directory.slice(0, directory.lastIndexOf("/") + 1) : "runs/";
}

function inPython(about, step) {
  const lines = [
    "import everystep",
    "",
    `run = everystep.open(${JSON.stringify(about.directory ?? about.name)})`,
    ...(about.is_of_loop
      ? [`fork = run.fork(${step}, lr=1e-3)  # or relabel={row: target}`, "", "# any change, in your code:", `with everystep.record(fork=run, at=${step}, model=model, optimizer=optimizer) as recording:`, "    ..."]
      : [`fork = run.fork(${step}, lr=1e-3, model=model, loss=loss, optimizer=optimizer)`]),
  ];
  const objects = `${about.name} was trained from Python objects, which a run does not hold. Create them again, and fork it in Python:`;
  const loop = `${about.name} was recorded from your own loop. Its programs alone can change the learning rate and targets:`;
  const problem = `${about.experiment_problem}. Or create the objects that trained the run, and fork it in Python:`;
  return element(
    "div",
    { class: "asking" },
    element("p", {}, about.experiment_problem ? problem : about.is_of_loop ? loop : objects),
    commandLine("In Python", lines.join("\n")).node,
    closing({ class: "buttons" }),
  );
}
