// Stepping: at most one request at a time, and playing at a steady pace.

/**
 * Return a function that runs `work(target)`, one target at a time.
 *
 * During a run, only the newest target is remembered; after `patience` milliseconds, the function waits no longer. Its promise is fulfilled
 * when nothing is left to do.
 */
export function newestOnly(work, patience = 300) {
  let wanted = null;
  let running = null;
  let began = 0;
  let overtake = () => {};
  const run = async () => {
    while (wanted !== null) {
      const target = wanted;
      wanted = null;
      began = performance.now();
      await Promise.race([work(target), new Promise((resolve) => (overtake = resolve))]);
    }
  };
  return (target) => {
    wanted = target;
    if (running) setTimeout(overtake, patience - (performance.now() - began));
    running ??= run().finally(() => (running = null));
    return running;
  };
}

/** Plays steps: `advance()` takes a step; its promise is fulfilled when it is drawn, with whether there are more. */
export class Player {
  #turn = 0;
  isPlaying = false;
  pace = 5; // steps per second; Infinity: as fast as they are drawn

  constructor(advance, changed) {
    this.advance = advance;
    this.changed = changed;
  }

  async play() {
    const mine = ++this.#turn;
    this.#set(true);
    try {
      let isMore = true;
      while (isMore && mine === this.#turn) {
        const began = performance.now();
        isMore = await this.advance();
        const rest = 1000 / this.pace - (performance.now() - began);
        await new Promise((resolve) => setTimeout(resolve, Math.max(0, rest)));
      }
    } finally {
      if (mine === this.#turn) this.stop();
    }
  }

  stop() {
    this.#turn += 1;
    if (this.isPlaying) this.#set(false);
  }

  #set(isPlaying) {
    this.isPlaying = isPlaying;
    this.changed();
  }
}

/** Return the step that a text means: "137", or "+10" and "-1" relative to the current one; null if invalid. */
export function stepOf(text, step, steps) {
  const found = /^\s*([+\-−]?)\s*([\d,]+)\s*$/.exec(text);
  if (!found) return null;
  const number = Number(found[2].replaceAll(",", ""));
  const wanted = { "": number, "+": (step ?? 0) + number }[found[1]] ?? (step ?? steps + 1) - number;
  return Math.max(1, Math.min(steps, wanted));
}
