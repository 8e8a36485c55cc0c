// Doing things in a moment, once.

const REST = 150; // milliseconds

/** Timers by name. */
export class Timers {
  #running = new Map();

  /** Do something once it has been quiet for a while: each call puts it off. */
  rest(name, does, pause = REST) {
    clearTimeout(this.#running.get(name));
    this.#start(name, does, pause);
  }

  /** Do something in a while, once for all calls until then. */
  soon(name, does, pause = 3 * REST) {
    if (!this.#running.has(name)) this.#start(name, does, pause);
  }

  /** Do nothing more. */
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

/** Return {update, close}: only the newest content is drawn, and not while the next is coming already. */
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
