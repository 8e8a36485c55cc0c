// What is heard of a run while it is shown: its training, and of those beside it.

import { addressOf, ask, listen } from "../shared/server.js";
import { numberOf } from "../shared/format.js";

const MOST = 2; // streams of runs beside: a browser holds but six connections to a server
const SPAN = 5000; // milliseconds over which the speed is taken

/** Listen to a run; return a function that ends it. `hears`: {losses(steps, losses), state(state), gone(), server(isThere)}. */
export function listenToRun(name, after, hears) {
  const heard = {
    losses: ({ steps, losses }) => hears.losses(steps, losses.map(numberOf)),
    state: hears.state,
    gone: () => {
      end();
      hears.gone();
    },
  };
  const end = listen(addressOf(name, "events"), heard, hears.server, { after });
  return end;
}

/** Listen to those of the runs that are being trained; return a function that ends it. */
export function listenToThose(names, extend) {
  let isEnded = false;
  let ends = [];
  Promise.all(names.map((name) => ask(addressOf(name)).catch(() => null))).then((found) => {
    if (isEnded) return;
    const running = found.filter((about) => about?.status === "running").slice(0, MOST);
    ends = running.map(({ name, steps }) => {
      const hears = { losses: (at, losses) => extend(name, at, losses), state: () => {}, gone: () => {}, server: () => {} };
      return listenToRun(name, steps, hears);
    });
  });
  return () => {
    isEnded = true;
    ends.forEach((end) => end());
  };
}

/** How fast a training goes, of what was heard of it. */
export class Speed {
  #heard = [];
  now = null; // steps a second; null: not known

  /** Take in how many steps there are by now. */
  take(steps) {
    const time = performance.now();
    this.#heard = [...this.#heard.filter(([then]) => time - then < SPAN), [time, steps]];
    const [[since, before]] = this.#heard;
    this.now = time - since > 500 && steps > before ? (1000 * (steps - before)) / (time - since) : null;
  }
}
