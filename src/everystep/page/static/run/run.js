// One run: its facts, its loss, every step as a table, and the open step.

import * as address from "../shared/address.js";
import * as keys from "../shared/keys.js";
import { element } from "../shared/elements.js";
import { addressOf, ask } from "../shared/server.js";
import { awaited, awayBanner } from "../shared/away.js";
import { LossPlot } from "../plot/plot.js";
import { serverCurves } from "../plot/source.js";
import { serverRows } from "../table/source.js";
import { StepTable } from "../table/table.js";
import { Stepper } from "./stepper.js";
import { Player } from "./stepping.js";
import { listenToRun, listenToThose, Speed } from "./live.js";
import { compare, fork, share, stop } from "./actions.js";
import { arrange, runParts } from "./parts.js";
import { factsBrief, factsList, landmarks, lineage, ranksSwitch, statusLine } from "./head.js";
import { StepPlace } from "./place.js";

/** Show a run. */
export async function open(place, main) {
  return new RunView(main, await awaited(main, "Loading the run.", addressOf(place.run)), place);
}

class RunView {
  #isWalking = false; // the history entry is from stepping: the next step replaces it
  #isOwn = false; // we are changing the address ourselves
  #isFollowing = false;
  #isKeepingUp = false;
  #closed = new AbortController();
  #speed = new Speed();
  #questions = null;

  constructor(main, about, place) {
    this.main = main;
    this.about = about;
    this.name = about.name;
    this.place = { ...place, step: null, overlay: [] };
    this.leftOpen = []; // what was unfolded in the previous step
    this.away = awayBanner();
    this.parts = runParts(this.name, { fork: () => this.fork(), compare: () => compare(this.place, this.about), share: () => share(this.about, this.step), stop: () => stop(this.about), goTo: (step) => this.jump(step) });
    const { header, body, bar } = this.parts;
    main.append(header, body, this.away.host);
    this.player = new Player(() => this.#advance(), () => this.#drawBar());
    this.bar = new Stepper({
      walk: (stride) => this.walk(stride),
      jump: (step) => this.jump(step),
      play: () => this.togglePlay(),
      pace: (pace) => (this.player.pace = pace),
      follow: () => this.#follow(!this.#isFollowing),
      leave: () => this.leave(),
    });
    bar.append(this.bar.host);
    this.stepPlace = new StepPlace(this.name, () => this.about, this.parts);
    const sortedBy = (sorted) => this.#goOwn({ ...this.place, ...sorted }, true);
    this.table = new StepTable(this.parts.table, serverRows(this.name), { step: place.step, sorted: place, goTo: (step) => this.jump(step), sortedBy });
    this.wide = window.matchMedia("(min-width: 80rem)");
    this.arrange = () => this.#arrange();
    this.wide.addEventListener("change", this.arrange);
    this.free = keys.bind(runKeys(this));
    this.end = listenToRun(this.name, about.steps, {
      losses: (steps, losses) => this.#hearLosses(steps, losses),
      state: (state) => this.#hearState(state),
      gone: () => this.#hearGone(),
      server: (isThere) => this.#hearServer(isThere),
    });
    const current = element("span", { "aria-current": "page" }, this.name);
    document.querySelector("#trail").replaceChildren(element("a", { href: "/" }, "All runs"), " / ", current);
    this.#drawAbout();
    this.update(place);
    this.#openQuestions();
  }

  get step() {
    return this.place.step;
  }

  get #isClosed() {
    return this.#closed.signal.aborted;
  }

  /** Show another place of this run. */
  update(place) {
    const before = this.place;
    this.place = place;
    if (!this.#isOwn) this.#isWalking = false;
    if (!this.#isOwn && place.step !== before.step) {
      this.#isFollowing = false;
      this.player.stop();
    }
    const isFirst = !this.plot;
    // What the reader chooses on the plot is drawn there; Back and links bring another choice.
    const plotted = ({ overlay, line, log, smooth }) => JSON.stringify([overlay, ...(this.#isOwn ? [] : [line, log, smooth])]);
    if (isFirst || plotted(place) !== plotted(before)) this.#drawPlot();
    document.title = `${this.name}${place.step === null ? "" : ` · step ${place.step}`} – everystep`;
    this.#drawBar();
    if (isFirst || (before.step === null) !== (place.step === null)) this.#arrange();
    if (!isFirst && before.step !== null && place.step === null) window.scrollTo({ top: 0 });
    if (before.step !== place.step) {
      this.plot.setStep(place.step);
      this.table.setStep(place.step);
    }
    this.table.setSort(place);
    this.stepPlace.show(this.#target());
  }

  close() {
    this.#closed.abort();
    this.player.stop();
    this.free();
    this.end();
    this.endOverlay?.();
    this.away.close();
    this.wide.removeEventListener("change", this.arrange);
    this.plot.close();
    this.table.close();
    this.#questions?.close();
    this.stepPlace.close();
    this.parts.banner.close();
    this.main.classList.remove("wide");
    document.querySelector("#trail").replaceChildren();
  }

  /** Go some steps forward or back. */
  walk(stride) {
    const { steps } = this.about;
    if (!steps) return;
    this.player.stop();
    this.#isFollowing = false;
    const from = this.step ?? (stride > 0 ? 0 : steps + 1);
    this.#go(Math.max(1, Math.min(steps, from + stride)), true);
  }

  /** Go to a step from anywhere. */
  jump(step) {
    const { steps, status } = this.about;
    if (!steps) return;
    this.player.stop();
    this.#isFollowing = status === "running" && step >= steps;
    this.#go(Math.max(1, Math.min(steps, step)), false);
  }

  /** Close the step, or stop playing. */
  leave() {
    if (this.player.isPlaying) this.player.stop();
    else if (this.step !== null) {
      this.leftOpen = this.place.open;
      address.go({ ...this.place, step: null, phase: null, operation: null, open: [] });
    }
  }

  togglePlay() {
    if (this.player.isPlaying) return this.player.stop();
    this.#isFollowing = false;
    if (this.about.steps && this.step !== this.about.steps) this.player.play();
  }

  #go(step, isWalk) {
    if (step === this.step) return this.#drawBar();
    const replace = isWalk && this.#isWalking;
    this.#isWalking = isWalk;
    const { open } = this.place;
    this.#goOwn({ ...this.place, step, open: this.step === null && !open.length ? this.leftOpen : open }, replace);
  }

  #goOwn(place, replace) {
    this.#isOwn = true;
    address.go(place, { replace });
    this.#isOwn = false;
  }

  async #advance() {
    const { steps } = this.about;
    this.#go(Math.min(steps, (this.step ?? 0) + 1), true);
    await this.stepPlace.show(this.#target());
    return this.step < this.about.steps && !this.stepPlace.isFailed;
  }

  #follow(isFollowing) {
    this.player.stop();
    this.#isFollowing = isFollowing;
    if (isFollowing) this.#go(this.about.steps, true);
    this.#drawBar();
  }

  #target() {
    const { step, phase, operation, open } = this.place;
    return { step, phase, operation, open };
  }

  #drawPlot() {
    // All ranks are plotted, unless some are left out: the run itself stands for none.
    const given = this.place.overlay.length ? this.place.overlay : this.about.ranks;
    const overlay = given.filter((other) => other !== this.name);
    this.plot?.close();
    this.endOverlay?.();
    const remove = (name) => {
      const left = overlay.filter((other) => other !== name);
      address.go({ ...this.place, overlay: left.length || !this.about.ranks.length ? left : [this.name] });
    };
    const { line, log, smooth } = this.place;
    const looked = (look) => this.#goOwn({ ...this.place, ...look }, true);
    this.plot = new LossPlot(this.parts.plot, [this.name, ...overlay], { source: serverCurves, step: this.step, goTo: (step) => this.jump(step), remove, look: { line, log, smooth }, looked, hasLoss: this.about.has_loss });
    this.plot.setMeasurements(this.about.measurements);
    this.endOverlay = listenToThose(overlay, (name, steps, losses) => this.plot.extend(name, { steps, losses }));
  }

  #drawAbout() {
    const { facts, brief, note } = this.parts;
    facts.replaceChildren(brief, factsList(this.about));
    brief.textContent = factsBrief(this.about);
    this.#drawFamily();
    note.update(this.about);
    this.#drawLandmarks();
    this.#drawState();
  }

  #drawFamily() {
    const { about } = this;
    this.parts.family.replaceChildren(...[...ranksSwitch(about), ...lineage(about)].flatMap((part) => [part, " "]));
    if (about.unread) setTimeout(() => this.#askForForks(about), 1000);
  }

  // The server reads other runs some at a time, and forks may be among them.
  async #askForForks(about) {
    if (this.#isClosed || about !== this.about) return;
    const { forks, unread } = await ask(addressOf(this.name), this.#closed).catch(() => about);
    if (this.#isClosed || about !== this.about) return;
    Object.assign(about, { forks, unread });
    this.#drawFamily();
  }

  #drawLandmarks() {
    this.parts.landmarks.replaceChildren(landmarks(this.about, (step) => this.jump(step)));
    this.parts.banner.update(this.about);
  }

  #drawState() {
    this.parts.stop.hidden = !this.about.task || this.about.status !== "running";
    this.parts.state.replaceChildren(...statusLine(this.about, this.#speed.now));
    this.#drawBar();
  }

  #drawBar() {
    this.bar.show({
      step: this.step,
      steps: this.about.steps,
      isPlaying: this.player.isPlaying,
      isRunning: this.about.status === "running",
      isFollowing: this.#isFollowing,
    });
  }

  #arrange() {
    arrange(this.parts, this.main, { isOpen: this.step !== null, isWide: this.wide.matches });
    this.plot.resize();
  }

  #hearLosses(steps, losses) {
    const isAgain = steps[0] <= this.about.steps; // cached data of these steps is invalid
    this.plot.extend(this.name, { steps, losses });
    this.about.steps = steps.at(-1);
    if (isAgain) return this.#askAgain();
    this.#drawState();
    this.table.refresh();
    this.#keepUp();
  }

  // One step after the other: where a step takes longer to open than the next one to come, each would be left for its successor.
  async #keepUp() {
    if (this.#isKeepingUp) return;
    this.#isKeepingUp = true;
    while (this.#isFollowing && !this.#isClosed && this.step !== this.about.steps) {
      this.#go(this.about.steps, true);
      await this.stepPlace.show(this.#target());
    }
    this.#isKeepingUp = false;
  }

  // Its steps are those of the losses that follow.
  #hearState({ steps, ...state }) {
    const isOther = state.status !== this.about.status;
    const isMeasured = JSON.stringify(state.measurements) !== JSON.stringify(this.about.measurements);
    Object.assign(this.about, state);
    this.parts.note.update(this.about);
    this.plot.setMeasurements(this.about.measurements);
    this.#speed.take(steps);
    this.#drawLandmarks();
    this.#drawState();
    if (isOther) this.#askAgain();
    else if (isMeasured) this.table.refresh();
  }

  async #askAgain() {
    const about = await ask(addressOf(this.name), this.#closed).catch(() => null);
    if (about === null || this.#isClosed) return;
    this.about = about;
    if (about.status !== "running") this.#isFollowing = false;
    this.#drawAbout();
    this.plot.setMeasurements(about.measurements);
    this.table.refresh();
    this.#questions?.update(about);
  }

  #hearGone() {
    const label = "This run was deleted. It remains on the screen until you leave it.";
    this.parts.header.append(element("p", { class: "alarm", role: "alert" }, label));
  }

  #hearServer(isThere) {
    this.away.tell(isThere);
    if (isThere && this.stepPlace.isFailed) this.stepPlace.show(this.#target());
  }

  async #openQuestions() {
    const module = await import("../tasks/questions.js").catch(() => null);
    if (module === null || this.#isClosed) return;
    this.parts.questions.hidden = false;
    const does = { goTo: (step) => this.jump(step), changed: () => this.#askAgain() };
    this.#questions = module.questions(this.parts.questions, this.about, does);
  }

  /** Fork from the open step. */
  fork() {
    return fork(this.about, this.step);
  }
}

function runKeys(view) {
  const stride = ({ shiftKey }) => (shiftKey ? 10 : 1);
  return [
    { keys: ["ArrowLeft"], shown: "←", label: "the previous step; ten with Shift", press: (event) => view.walk(-stride(event)) },
    { keys: ["ArrowRight"], shown: "→", label: "the next step; ten with Shift", press: (event) => view.walk(stride(event)) },
    { keys: ["Home"], shown: "Home", label: "the first step", press: () => view.jump(1) },
    { keys: ["End"], shown: "End", label: "the last step; during training, the newest", press: () => view.jump(view.about.steps) },
    { keys: ["/"], shown: "/", label: "go to a step: 137, -1, +10", press: () => view.bar.focus() },
    { keys: ["p"], shown: "p", label: "play through the run, or pause", press: () => view.togglePlay() },
    { keys: ["l"], shown: "l", label: "logarithmic axis", press: () => view.plot.toggleLog() },
    { keys: ["f"], shown: "f", label: "fork after this step", press: () => view.fork() },
    { keys: ["Escape"], shown: "Escape", label: "stop playing, or close the step", press: () => view.leave() },
  ];
}
