// What a reader must know first: damage, why the run ended, and where its loss stopped being finite.

import { copyMark } from "../shared/copy.js";
import { button, element } from "../shared/elements.js";
import { shapeText, short, whole } from "../shared/format.js";
import { addressOf, tell } from "../shared/server.js";
import { operationLink, stepLink } from "./head.js";

/** The banner; `goTo(step)`: opens a step. */
export class Banner {
  #task = null;
  #isClosed = false;

  constructor(goTo) {
    this.goTo = goTo;
    this.text = element("p");
    this.why = button("Where did it come from?", () => this.#ask());
    this.answer = element("div", { class: "answer" });
    this.host = element("div", { class: "alarm banner", hidden: true }, element("div", { class: "line" }, this.text, this.why), this.answer);
  }

  update(about) {
    const { ending, continue_with: continueWith, nonfinite, damage } = about;
    this.about = about;
    this.host.hidden = !ending && !nonfinite && !damage;
    this.why.hidden = !nonfinite || this.#task !== null;
    const known = JSON.stringify([ending, nonfinite, damage]);
    if (this.known === known) return; // keep a link that is about to be clicked
    this.known = known;
    const broken = damage ? [element("b", {}, damage), ending || nonfinite ? ". " : ""] : [];
    const copying = copyMark(() => continueWith, "copy how to continue the training");
    const continued = [`${ending}. To continue: `, element("code", {}, continueWith), copying, nonfinite ? " " : ""];
    this.text.replaceChildren(...broken, ...(ending ? continued : []), ...this.#nonfinite(nonfinite));
  }

  close() {
    this.#isClosed = true;
    this.#task?.leave();
  }

  #nonfinite(found) {
    if (!found) return [];
    const loss = found.loss === "nan" ? "NaN" : found.loss;
    return [element("b", {}, `The loss is ${loss} at `, stepLink(this.about.name, found.step, this.goTo)), ", the first that is not finite."];
  }

  async #ask() {
    this.why.hidden = true;
    const { runTask } = await import("../tasks/task.js");
    if (this.#isClosed) return;
    this.#task = runTask(() => tell(addressOf(this.about.name, "first-nonfinite"), {}), this.answer, {
      label: "Where did it come from?",
      done: (result) => this.#story(result),
      over: (message) => {
        this.#task = null;
        this.why.hidden = !message;
      },
    });
  }

  #story({ found, text }) {
    if (!found) return element("p", {}, text);
    const { step, phase, index: operation, name, nans, infinities, rows, inputs, mathematics, operation: made, by_own_code: how } = found;
    const counts = [nans && `${whole(nans)} NaN`, infinities && `${whole(infinities)} infinite ${infinities === 1 ? "number" : "numbers"}`].filter(Boolean).join(" and ");
    const where = operation === null ? `Step ${whole(step)}, before any operation` : `Step ${whole(step)}, ${phase}, operation #${operation}`;
    return [
      element(
        "p",
        { class: "origin" },
        `${where}: `,
        mathematics ? element("span", { class: "mono" }, mathematics) : name,
        ` has ${counts}${how && `; ${how}`}. `,
        operationLink(this.about.name, found),
      ),
      made?.line ? element("p", { class: "small" }, `${made.line.file}:${made.line.line}  `, element("code", {}, made.line.text)) : null,
      element("ul", { class: "inputs" }, ...Object.entries(inputs).map(inputLine)),
      rows.length ? element("p", {}, rowsText(found)) : null,
    ];
  }
}

function inputLine([name, { shape, minimum, maximum, nonfinite: bad }]) {
  const range = minimum === "nan" ? "no finite numbers" : `${short(minimum)} to ${short(maximum)}`;
  return element("li", {}, element("span", { class: "mono" }, name), ` ${shapeText(shape)}: ${range}${bad ? `, ${whole(bad)} not finite` : ""}`);
}

function rowsText({ rows, rows_of: of }) {
  const first = rows.slice(0, 8).map(whole).join(", ");
  const more = rows.length > 8 ? ` and ${whole(rows.length - 8)} more` : "";
  return `${rows.length === 1 ? "Row" : "Rows"} ${first}${more} of ${of}`;
}
