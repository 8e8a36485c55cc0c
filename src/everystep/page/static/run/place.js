// The element that shows the open step.

import { showText } from "../shared/elements.js";
import * as address from "../shared/address.js";
import { whole } from "../shared/format.js";
import { newestOnly } from "./stepping.js";

/** Shows steps of a run one after the other; `parts`: {shown, problem, waiting}, the elements of the step and of messages. */
export class StepPlace {
  #view = null; // a promise
  #shown = null; // the target that was drawn, or failed
  #isThere = false; // something is drawn
  #isClosed = false;
  isFailed = false;

  constructor(run, { shown, problem, waiting }) {
    this.run = run;
    this.waiting = waiting;
    this.host = shown;
    this.problem = problem;
    this.show = newestOnly((target) => this.#draw(target));
  }

  close() {
    this.#isClosed = true;
    this.#view?.then((view) => view.close(), () => {});
  }

  // `target`: {step, phase, operation, open}; a step of null: none.
  async #draw(target) {
    const isThere = JSON.stringify(target) === this.#shown && !this.isFailed;
    if (isThere || this.#isClosed || (target.step === null && !this.#view)) return;
    this.#view ??= this.#open();
    try {
      const view = await this.#view;
      if (this.#isClosed) return;
      this.#wait(target.step);
      if (target.step === null) view.clear();
      else await view.show(target.step, target);
      this.#tell(null, target.step);
    } catch (error) {
      if (error.name === "AbortError" || this.#isClosed) return;
      this.#tell(error, target.step);
    }
    this.#shown = JSON.stringify(target);
  }

  // Until the first step is loaded, a message is shown.
  #wait(step) {
    showText(this.waiting, step === null || this.#isThere ? "" : `Opening step ${whole(step)}.`);
  }

  #tell(error, step) {
    this.isFailed = error !== null;
    this.waiting.hidden = true;
    this.#isThere = error === null && step !== null;
    showText(this.problem, error?.message ?? "");
    // A missing step shows nothing; if the server is away, the previous step stays.
    this.host.hidden = error?.status === 404;
  }

  async #open() {
    try {
      const [{ StepView }, { serverSource }] = await Promise.all([import("../step/step.js"), import("../step/source.js")]);
      const go = (place) => address.go({ ...address.read(), ...place });
      return new StepView(this.run, this.host, { go, source: serverSource(this.run) });
    } catch (error) {
      this.#view = null;
      throw error;
    }
  }
}
