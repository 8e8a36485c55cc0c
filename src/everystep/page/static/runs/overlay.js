// Several runs together: their losses in one plot, and their differences.

import * as address from "../shared/address.js";
import { element, showText } from "../shared/elements.js";
import { awaited } from "../shared/away.js";
import { addressOf, ask } from "../shared/server.js";
import { duration, fullText, whole } from "../shared/format.js";
import { LossPlot } from "../plot/plot.js";
import { serverCurves } from "../plot/source.js";
import { listenToThose } from "../run/live.js";
import { textOf } from "./kinds.js";
import { nonfiniteText } from "./row.js";

/** The settings that are changed most often come first. */
const FIRST = ["optimizer", "scheduler", "batch_size", "seed", "model", "loss"];
/** Compare shows more settings than this. */
const MOST = 5;

/** Show several runs together. */
export async function open(place, main) {
  document.title = "Overlay – everystep";
  document.querySelector("#trail").replaceChildren(element("a", { href: "/" }, "All runs"), " / Overlay");
  main.classList.add("wide");
  const { runs, columns } = await awaited(main, "Loading the runs.", "/api/runs");
  const view = new Overlay(main, runs, columns);
  await view.update(place);
  return view;
}

class Overlay {
  constructor(main, runs, columns) {
    // Data of the list of runs: the only common data if not all are experiments.
    this.settings = columns.filter((column) => column.is_setting);
    this.summaries = new Map(runs.map((run) => [run.name, run]));
    this.title = element("h1");
    this.problem = element("p", { class: "alarm", hidden: true });
    this.place = element("section", { class: "loss-part", "aria-label": "losses of the runs" });
    this.body = element("div", { class: "overlay-table" });
    main.append(this.title, this.problem, this.place, this.body);
  }

  async update({ runs }) {
    const names = runs.filter((name) => this.summaries.get(name)?.problem === null);
    const missing = runs.filter((name) => !names.includes(name));
    this.title.textContent = names.length === 1 ? "1 run" : `${names.length} runs`;
    showText(this.problem, missing.length ? `Missing or unreadable: ${missing.join(", ")}.` : "");
    this.close();
    if (!names.length) return this.body.replaceChildren();
    const remove = (name) => address.go({ view: "overlay", runs: runs.filter((other) => other !== name) });
    const goTo = (step) => address.go({ view: "run", run: names[0], step, overlay: names.slice(1) });
    const plot = (this.plot = new LossPlot(this.place, names, { source: serverCurves, goTo, remove }));
    this.end = listenToThose(names, (name, steps, losses) => plot.extend(name, { steps, losses }));
    const about = await Promise.all(names.map((name) => ask(addressOf(name)).catch(() => null)));
    if (plot === this.plot) this.body.replaceChildren(this.#table(names, about));
  }

  close() {
    this.plot?.close();
    this.end?.();
    this.plot = this.end = null;
  }

  #listed(summary) {
    return new Map(this.settings.map((column) => [column.key, textOf(column, summary)]));
  }

  #table(names, about) {
    const areExperiments = about.every((one) => one?.has_experiment);
    const settings = names.map((name, place) => (areExperiments ? settingsOf(about[place]) : this.#listed(this.summaries.get(name))));
    const differing = settingsThatDiffer(settings);
    const head = ["run", ...differing.map(([key]) => key), "first loss", "last loss", "smallest loss", "steps", "duration"];
    const rows = names.map((name, place) => {
      const of = (what) => about[place]?.landmarks.find((mark) => mark.what === what);
      const summary = this.summaries.get(name);
      const { steps, seconds, nonfinite_step: step } = summary;
      const overlay = names.filter((other) => other !== name);
      const where = { view: "run", run: name, step, overlay };
      const exploded = step ? element("a", { class: "nonfinite", href: address.write(where) }, nonfiniteText(summary)) : null;
      const link = element("a", { href: address.write({ view: "run", run: name }) }, name);
      link.style.setProperty("--swatch", `var(--series-${place % 5})`);
      const texts = [
        ...differing.map(([, values]) => values[place]),
        ...["first", "last", "smallest"].map((what) => (of(what) ? `${of(what).short} at ${whole(of(what).step)}` : "")),
        whole(steps ?? 0),
        seconds === null ? "" : duration(seconds),
      ];
      return element("tr", {}, element("th", { scope: "row" }, link, exploded), ...texts.map((text) => element("td", {}, text)));
    });
    const headings = head.map((text) => element("th", { scope: "col" }, text));
    return element("table", { class: "overlaid" }, element("thead", {}, element("tr", {}, ...headings)), element("tbody", {}, ...rows));
  }
}

function settingsOf({ settings }) {
  return new Map(Object.entries(settings).map(([key, value]) => [key, typeof value === "number" ? fullText(value, false) : String(value)]));
}

function settingsThatDiffer(all) {
  const keys = [...new Set(all.flatMap((settings) => [...settings.keys()]))];
  const rows = keys.map((key) => [key, all.map((settings) => settings.get(key) ?? "")]);
  const found = rows.filter(([key, values]) => new Set(values).size > 1 && !["steps", "epochs"].includes(key));
  return found.sort(([one], [other]) => rank(one) - rank(other)).slice(0, MOST);
}

function rank(key) {
  const place = FIRST.indexOf(key.split(/[.[]/)[0]);
  return place < 0 ? FIRST.length : place;
}
