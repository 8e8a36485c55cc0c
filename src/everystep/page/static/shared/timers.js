// Delayed calls.

const REST = 150; // milliseconds

/** Timers by name. */
export class Timers {
  #running = new Map();

  /** Call a function after a pause; each new call restarts the pause. */
  rest(name, does, pause = REST) {
    clearTimeout(this.#running.get(name));
    this.#start(name, does, pause);
  }

  /** Call a function after a delay, once for all calls in it. */
  soon(name, does, pause = 3 * REST) {
    if (!this.#running.has(name)) this.#start(name, does, pause);
  }

  /** Cancel all. */
  clear() {
    this.#running.forEach((timer) => clearTimeout(timer));
    this.#running.clear();
  }

  #start(name, does, pause) {
    const run = () => {
      this.#running.delete(name);
      does();
    };
    this.#running.set(name, setTimeout(run, pause));
  }
}

/** Return {update, close}: only the newest content is drawn, and not while the next one is already coming. */
export function latest(draw, patience) {
  let asked = new AbortController();
  let waiting = null;
  return {
    update(content) {
      asked.abort();
      clearTimeout(waiting);
      asked = new AbortController();
      const { signal } = asked;
      waiting = setTimeout(() => draw(content, signal), patience);
    },
    close() {
      clearTimeout(waiting);
      asked.abort();
    },
  };
}
