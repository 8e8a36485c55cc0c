// The element that shows the open step.

import { showText } from "../shared/elements.js";
import * as address from "../shared/address.js";
import { duration, whole } from "../shared/format.js";
import { newestOnly } from "./stepping.js";

const LONG = 5; // seconds of a replay that are announced

/** Shows steps of a run one after the other; `about`: returns what is known of it; `parts`: {shown, problem, waiting}, the elements of the step and of messages. */
export class StepPlace {
  #view = null; // a promise
  #shown = null; // the target that was drawn, or failed
  #newest = null; // the target that was asked for last
  #isThere = false; // something is drawn
  #isClosed = false;
  #last = 0; // the step that was drawn last
  isFailed = false;

  constructor(run, about, { shown, problem, waiting }) {
    this.run = run;
    this.about = about;
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
    const key = JSON.stringify(target);
    // Back at the drawn step, while another is still being opened: that one must not arrive later.
    const isThere = key === this.#shown && key === this.#newest && !this.isFailed;
    if (isThere || this.#isClosed || (target.step === null && !this.#view)) return;
    this.#newest = key;
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
    this.#shown = key;
  }

  // Until the first step is loaded, and during a long replay, a message is shown.
  #wait(step) {
    const replay = step === null ? "" : this.#replay(step);
    showText(this.waiting, step === null || (this.#isThere && !replay) ? "" : `Opening step ${whole(step)}.${replay}`);
  }

  // Which steps are replayed first, if that takes long.
  #replay(step) {
    const { snapshots, seconds, steps } = this.about();
    const begin = Math.max(0, ...[this.#last, ...snapshots].filter((known) => known < step));
    const wait = steps ? ((seconds ?? 0) * (step - 1 - begin)) / steps : 0;
    return wait < LONG ? "" : ` Steps ${whole(begin + 1)} to ${whole(step - 1)} are replayed first: about ${duration(wait)}.`;
  }

  #tell(error, step) {
    this.isFailed = error !== null;
    this.waiting.hidden = true;
    this.#isThere = error === null && step !== null;
    this.#last = this.#isThere ? step : 0;
    showText(this.problem, error?.message ?? "");
    // A missing step shows nothing; if the server is away, the previous step stays.
    this.host.hidden = error?.status === 404;
  }

  async #open() {
    try {
      const [{ StepView }, { serverSource }] = await Promise.all([import("../step/step.js"), import("../step/source.js")]);
      const go = (place) => address.go({ ...address.read(), ...place });
      return new StepView(this.run, this.host, { go, source: serverSource(this.run, this.about().directory) });
    } catch (error) {
      this.#view = null;
      throw error;
    }
  }
}
