// The bar above a step: first, back, the step's number, forward, last, play.

import { button, element, icon } from "../shared/elements.js";
import { whole } from "../shared/format.js";
import { stepOf } from "./stepping.js";

const PACES = [["2 a second", 2], ["5 a second", 5], ["10 a second", 10], ["at full speed", Infinity]];

const SIGNS = {
  first: "M4 3v10M12 3l-5 5 5 5",
  back: "M10 3l-5 5 5 5",
  forth: "M6 3l5 5-5 5",
  last: "M12 3v10M4 3l5 5-5 5",
  play: "M5 3l8 5-8 5z",
  pause: "M5 3v10M11 3v10",
  leave: "M4 4l8 8M12 4l-8 8",
};

/** The bar; `does`: {walk(stride), jump(step), play(), pace(number), follow(), leave()}. */
export class Stepper {
  #has = { step: null, steps: 0 };

  constructor(does) {
    this.does = does;
    const signed = (name, label, press) => button(icon(SIGNS[name]), press, { title: label, "aria-label": label, class: "sign" });
    this.back = [
      signed("first", "first step (Home)", () => does.jump(1)),
      button("−10", () => does.walk(-10), { title: "ten steps back (Shift+←)" }),
      signed("back", "the previous step (←)", () => does.walk(-1)),
    ];
    this.forth = [
      signed("forth", "the next step (→)", () => does.walk(1)),
      button("+10", () => does.walk(10), { title: "ten steps forward (Shift+→)" }),
      signed("last", "last step (End)", () => does.jump(this.#has.steps)),
    ];
    this.field = element("input", { type: "text", inputMode: "numeric", autocomplete: "off", "aria-label": "step", placeholder: "step" });
    this.field.title = "137, -1 or +10 (/)";
    this.field.addEventListener("keydown", (event) => this.#press(event));
    this.field.addEventListener("focus", () => this.field.select());
    this.field.addEventListener("blur", () => this.show(this.#has));
    this.of = element("span", { class: "muted" });
    this.player = signed("play", "play (p)", does.play);
    this.player.classList.add("is-filled");
    const options = PACES.map(([text, pace]) => element("option", { value: String(pace), selected: pace === 5 }, text));
    this.pace = element("select", { "aria-label": "speed", "data-own-keys": "" }, ...options);
    this.pace.addEventListener("change", () => does.pace(Number(this.pace.value)));
    this.follow = button("follow", does.follow, { title: "always show the newest step (End)", hidden: true });
    this.leave = signed("leave", "close the step (Escape)", does.leave);
    this.leave.classList.add("leave");
    const group = (label, ...parts) => element("span", { class: "group", role: "group", "aria-label": label }, ...parts);
    const where = element("span", { class: "where" }, this.field, this.of);
    this.host = element(
      "div",
      { class: "stepper", role: "toolbar", "aria-label": "steps" },
      group("go", ...this.back, where, ...this.forth),
      group("play", this.player, this.pace, this.follow),
      this.leave,
    );
  }

  /** Show {step, steps, isPlaying, isRunning, isFollowing}. */
  show(has) {
    this.#has = has;
    const { step, steps, isPlaying, isRunning, isFollowing } = has;
    if (document.activeElement !== this.field) this.field.value = step ?? "";
    this.of.textContent = `of ${whole(steps)}`;
    this.host.classList.toggle("is-long", steps >= 1e5);
    const isNone = steps === 0;
    this.field.disabled = isNone;
    // Without an open step, next is the first step.
    this.back.forEach((one, index) => (one.disabled = isNone || (step === null ? index > 0 : step <= 1)));
    this.forth.forEach((one, index) => (one.disabled = isNone || (step === null ? index === 1 : step >= steps)));
    this.player.disabled = isNone || (!isPlaying && step !== null && step >= steps);
    const label = isPlaying ? "pause (p)" : "play (p)";
    if (this.player.title !== label) {
      this.player.replaceChildren(icon(SIGNS[isPlaying ? "pause" : "play"]));
      this.player.classList.toggle("is-filled", !isPlaying);
      this.player.title = label;
      this.player.setAttribute("aria-label", label);
    }
    this.follow.hidden = !isRunning;
    this.follow.setAttribute("aria-pressed", String(Boolean(isFollowing)));
    this.leave.hidden = step === null;
  }

  focus() {
    this.field.focus();
    this.field.select();
  }

  #press(event) {
    if (event.key === "Enter") {
      const step = stepOf(this.field.value, this.#has.step, this.#has.steps);
      this.field.toggleAttribute("aria-invalid", step === null);
      if (step === null) return this.field.select();
      this.field.blur();
      this.does.jump(step);
    } else if (event.key === "Escape") {
      this.field.blur();
    } else return;
    event.preventDefault();
  }
}
