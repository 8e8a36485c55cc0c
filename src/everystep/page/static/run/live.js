// Live events of a run and of those plotted with it.

import { addressOf, ask, listen } from "../shared/server.js";
import { numberOf } from "../shared/format.js";

const MOST = 2; // streams of other runs: a browser has only six connections to a server
const SPAN = 5000; // milliseconds over which the speed is measured

/** Listen to a run; return a function that stops. `hears`: {losses(steps, losses), state(state), gone(), server(isThere)}. */
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

/** Listen to the runs in training; return a function that stops. */
export function listenToThose(names, extend) {
  const ended = new AbortController();
  let ends = [];
  Promise.all(names.map((name) => ask(addressOf(name), ended).catch(() => null))).then((found) => {
    if (ended.signal.aborted) return;
    const running = found.filter((about) => about?.status === "running").slice(0, MOST);
    ends = running.map(({ name, steps }) => {
      const hears = { losses: (at, losses) => extend(name, at, losses), state: () => {}, gone: () => {}, server: () => {} };
      return listenToRun(name, steps, hears);
    });
  });
  return () => {
    ended.abort();
    ends.forEach((end) => end());
  };
}

/** The speed of a training, from its events. */
export class Speed {
  #heard = [];
  now = null; // steps per second; null: unknown

  /** Note the current number of steps. */
  take(steps) {
    const time = performance.now();
    this.#heard = [...this.#heard.filter(([then]) => time - then < SPAN), [time, steps]];
    const [[since, before]] = this.#heard;
    this.now = time - since > 500 && steps > before ? (1000 * (steps - before)) / (time - since) : null;
  }
}
