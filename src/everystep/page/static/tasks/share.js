// The dialog that saves a view: the self-contained report with the chosen steps inside.

import { commandLine, complain, fieldLine, openDialog, quoted, wholesIn } from "../shared/dialog.js";
import { button, element } from "../shared/elements.js";
import { whole } from "../shared/format.js";
import { addressOf, askFile, withQuery } from "../shared/server.js";

/** Steps that one page may hold. */
const MOST_STEPS = 20;

const contentText =
  "One page that needs no server and no network: the description, the plot, the table, and these steps.";
const sizeText =
  `For example 1, 137, 500: at most ${MOST_STEPS} steps, or none. ` +
  "Each adds about a megabyte; large tensors are reduced.";

/** Open the dialog. */
export function shareDialog(about, step) {
  const properties = { autocomplete: "off", "aria-describedby": "share-size share-fault" };
  const input = element("input", { type: "text", class: "mono", value: step ? String(step) : "", ...properties });
  const fault = element("p", { class: "alarm", id: "share-fault", role: "alert", hidden: true });
  const status = element("p", { class: "muted small", role: "status" });
  const save = element("button", { class: "primary" }, "Save the page");
  const command = commandLine("The same from the command line");
  const asking = new AbortController();
  const show = () => {
    const { steps, problem } = stepsOf(input.value, about.steps);
    complain({ input, fault }, problem ?? "");
    command.node.hidden = Boolean(problem);
    if (steps) command.set(commandOf(about, steps));
    return steps;
  };
  const submit = (event) => {
    event.preventDefault();
    const steps = show();
    if (steps) saveReport(about.name, steps, { input, fault, status, save }, asking.signal);
    else input.focus();
  };
  const dialog = openDialog("Save this view", element(
    "form",
    { class: "asking", oninput: show, onsubmit: submit },
    element("p", { class: "muted small" }, contentText),
    fieldLine("steps", input),
    element("p", { class: "muted small", id: "share-size" }, sizeText),
    fault,
    command.node,
    element("div", { class: "buttons" }, save, button("Close", () => dialog.close())),
    status,
  ), { closed: () => asking.abort() });
  show();
}

async function saveReport(run, steps, fields, signal) {
  fields.save.disabled = true;
  fields.status.textContent = "Writing the page.";
  try {
    const address = withQuery(addressOf(run, "report"), { steps: steps.join(",") });
    keep(await askFile(address, { signal }), `${run}.html`);
    fields.status.textContent = "Saved.";
  } catch (error) {
    fields.status.textContent = "";
    if (error.name !== "AbortError") complain(fields, error.message);
  }
  fields.save.disabled = false;
}

// Download a file.
function keep(content, name) {
  const address = URL.createObjectURL(content);
  element("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

// The steps in a text, in order, or its problem.
function stepsOf(text, last) {
  const { numbers, wrong } = wholesIn(text);
  if (wrong) return { problem: `“${wrong}” is not a step: write whole numbers, with commas between` };
  const beyond = numbers.find((step) => step < 1 || step > last);
  if (beyond !== undefined) return { problem: `there is no step ${beyond}; steps are 1 to ${whole(last)}` };
  const steps = [...new Set(numbers)].sort((one, other) => one - other);
  if (steps.length <= MOST_STEPS) return { steps };
  return { problem: `${steps.length} steps would be too large to send: choose at most ${MOST_STEPS}` };
}

function commandOf(about, steps) {
  const named = steps.flatMap((step) => ["--step", String(step)]);
  return ["everystep", "report", about.directory ?? about.name, ...named, "-o", `${about.name}.html`].map(quoted).join(" ");
}
