// A task of the server on the page: its progress, the remaining time, and its result.

import { button, element } from "../shared/elements.js";
import { duration, whole } from "../shared/format.js";
import { isMissing, listen, tell } from "../shared/server.js";

/**
 * Start a task and show it in `host`; return the Task.
 *
 * `start` asks the server to begin, and returns its {task}. `done(result)` returns the view of the result; `begun(content)`: called with
 * announcements of the task; `over(message)`: called at the end, with the error if there was one.
 */
export function runTask(start, host, options = {}) {
  const task = new Task(host, options);
  start().then(({ task: id }) => task.follow(id), (error) => task.fail(error.message));
  return task;
}

class Task {
  #options;
  #view;
  #answer = element("div", { class: "task-answer", role: "status", tabIndex: -1 });
  #address = null;
  #stop = () => {};
  #isOver = false;
  #isCancelled = false;

  constructor(host, options) {
    this.#options = options;
    this.#view = progressView(options.label, () => this.cancel());
    host.replaceChildren(this.#view.line, this.#answer);
  }

  /** Follow the task's events to its end. */
  follow(id) {
    this.#address = `/api/tasks/${encodeURIComponent(id)}`;
    if (this.#isCancelled) this.cancel();
    if (this.#isOver) return;
    const heard = {
      progress: this.#view.advance,
      begun: (content) => this.#options.begun?.(content),
      result: (result) => this.#end(this.#options.done?.(result)),
      error: ({ error, cancelled }) => this.fail(error, cancelled),
    };
    this.#stop = listen(`${this.#address}/events`, heard, (isThere, hasEnded) => this.#wait(!isThere, hasEnded));
  }

  /** Show an error, and end. */
  fail(message, isCancelled = this.#isCancelled) {
    if (isCancelled) this.#end(element("p", { class: "note" }, message));
    else this.#end(errorText(message), message);
  }

  /** Stop the task; its results so far are kept. */
  async cancel() {
    this.#isCancelled = true;
    this.#view.cancelling();
    if (!this.#address) return;
    await tell(this.#address, {}, { method: "DELETE" }).catch((error) => this.fail(error.message));
  }

  /** Stop listening; the task continues. */
  leave() {
    this.#isOver = true;
    this.#view.end();
    this.#stop();
  }

  /** Stop listening, and stop the task. */
  abandon() {
    if (this.#isOver) return;
    this.leave();
    this.cancel();
  }

  async #wait(isWaiting, hasEnded) {
    this.#view.waiting(isWaiting);
    if (hasEnded && (await isMissing(`${this.#address}/events`))) this.fail("the server was restarted and lost this task; ask again");
  }

  #end(shown, message = null) {
    if (this.#isOver) return;
    this.leave();
    const hadFocus = this.#view.line.contains(document.activeElement);
    this.#view.line.remove();
    this.#answer.append(...[shown].flat().filter(Boolean));
    if (hadFocus) this.#answer.focus();
    this.#options.over?.(message);
  }
}

/** Return an error of the server with its lines kept, as a caret may point into the one above. */
function errorText(message) {
  if (!message.includes("\n")) return element("p", { class: "alarm" }, message);
  return element("pre", { class: "alarm", tabIndex: 0, "aria-label": "error" }, message);
}

function progressView(label, cancel) {
  const bar = element("progress", { "aria-label": label });
  const text = element("span", { class: "task-text" }, "starting");
  const stopping = button("Cancel", cancel);
  const begin = { time: null, done: 0 };
  let status = "starting";
  const started = performance.now();
  // If there is nothing to count yet, the seconds show that it is running.
  const ticking = setInterval(() => begin.done || tellSeconds(), 1000);
  const tellSeconds = () => {
    if (!stopping.disabled && !bar.hasAttribute("value")) text.textContent = `${status}, ${duration(Math.floor((performance.now() - started) / 1000))}`;
  };
  const advance = ({ done, total, what }) => {
    const now = performance.now();
    if (begin.time === null) Object.assign(begin, { time: now, done });
    bar.max = total || 1;
    // Until the first step is done, the bar is indeterminate: torch is being loaded, or a state read.
    if (done) bar.value = done;
    const left = ((now - begin.time) / 1000 / (done - begin.done)) * (total - done);
    const isKnown = now - begin.time > 700 && done > begin.done && done < total;
    status = done ? `${what}: ${whole(done)} of ${whole(total)}${isKnown ? `, ${duration(left)} left` : ""}` : what;
    if (!stopping.disabled) text.textContent = status;
  };
  return {
    line: element("div", { class: "task" }, bar, text, stopping),
    end: () => clearInterval(ticking),
    advance,
    waiting(isWaiting) {
      if (!stopping.disabled) text.textContent = isWaiting ? "waiting for the server" : status;
    },
    cancelling() {
      stopping.disabled = true;
      text.textContent = "stopping";
    },
  };
}
