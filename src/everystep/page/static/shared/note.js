// The user's note on a run: a line of text that can be edited in place.

import { button, element, icon, showText } from "./elements.js";
import { setText, show } from "./part.js";
import { addressOf, tell } from "./server.js";

const LONGEST = 1000; // characters, as in facts.py
const PENCIL = "M3 13L3.6 10.4 11 3 13 5 5.6 12.4z";
const IN_TRAINING = "You can write a note when the training has ended.";

/** The part of a run's note; `label`: the text of its button if there is no note yet. */
export class Note {
  #note = null;
  #isInTraining = false;

  constructor(name, { label = null } = {}) {
    this.name = name;
    this.label = label;
    this.words = element("span", { class: "words" });
    this.pen = button("", () => this.#edit(), { class: "pen", title: "change the note" });
    this.line = element("span", { class: "line" }, this.words, this.pen);
    this.field = element("input", { type: "text", maxLength: LONGEST, "aria-label": `note on ${name}`, placeholder: "your note" });
    const keep = element("button", { type: "submit" }, "Save");
    const form = { class: "edit", hidden: true, onsubmit: (event) => this.#save(event), onkeydown: (event) => this.#press(event) };
    this.form = element("form", form, this.field, keep, button("Cancel", () => this.#close()));
    this.problem = element("span", { class: "problem", role: "alert", hidden: true });
    this.host = element("div", { class: "own-note" }, this.line, this.form, this.problem);
  }

  update({ note, status }) {
    this.#note = note;
    this.#isInTraining = status === "running";
    setText(this.words, note ?? "");
    this.host.classList.toggle("is-empty", !note);
    const label = note ? `change the note on ${this.name}` : `add a note on ${this.name}`;
    if (this.pen.getAttribute("aria-label") === label) return;
    this.pen.setAttribute("aria-label", label);
    this.pen.title = note ? "change the note" : "add a note";
    this.pen.replaceChildren(icon(PENCIL), ...(this.label && !note ? [` ${this.label}`] : []));
  }

  #edit() {
    if (this.#isInTraining) return showText(this.problem, IN_TRAINING);
    showText(this.problem, "");
    this.field.value = this.#note ?? "";
    this.#open(true);
    this.field.focus();
  }

  #open(isOpen) {
    show(this.form, isOpen);
    show(this.line, !isOpen);
  }

  #close() {
    this.#open(false);
    showText(this.problem, "");
    this.pen.focus();
  }

  async #save(event) {
    event.preventDefault();
    try {
      const { note } = await tell(addressOf(this.name, "note"), { note: this.field.value });
      this.update({ note, status: null });
      this.#close();
    } catch (error) {
      showText(this.problem, error.message); // the written text stays, to be copied
    }
  }

  #press(event) {
    if (event.key !== "Escape") return;
    event.stopPropagation();
    this.#close();
  }
}
