// The content of an open step from the server.

import * as address from "../shared/address.js";
import { addressOf, ask, askNumbers, withQuery } from "../shared/server.js";

/** Delay before the next step is requested, in which the current one requests its tensors. */
const PATIENCE = 80;

/** Return the source of a step's view: content, numbers, histograms, reasons and ranked rows of a run; `argument`: the run in a command. */
export function serverSource(run, argument) {
  const of = (step, ...what) => addressOf(run, "steps", step, ...what);
  return {
    argument,
    ...lookingAhead((step, options) => ask(of(step), options)),
    numbers: (step, id, region, options) => askNumbers(withQuery(of(step, "tensor"), { id, ...asTexts(region) }), options),
    link: (step, operation) => location.origin + address.write({ view: "run", run, step, operation }),
    file: (step, id) => withQuery(of(step, "file"), { id }),
    why: (step, asked, options) => ask(withQuery(of(step, "why"), asked), options),
    rows: (step, options) => ask(of(step, "rows"), options),
    whatIf: (content, rows) => import("../tasks/what_if.js").then(({ whatIfDialog }) => whatIfDialog(content, rows, argument)),
    histogram: (step, id, options) => ask(withQuery(of(step, "histogram"), { id }), options),
  };
}

// Prefetch the next step, because stepping usually continues.
function lookingAhead(content) {
  let last = null;
  let ahead = null; // {step, answer, asked}
  let waiting = null;

  function prepare(step) {
    const asked = new AbortController();
    const answer = content(step, { signal: asked.signal }).catch(() => null);
    ahead = { step, answer, asked };
  }

  function leave() {
    clearTimeout(waiting);
    ahead?.asked.abort();
    ahead = null;
  }

  async function next(step, { signal } = {}) {
    clearTimeout(waiting);
    const stride = last === null ? 0 : step - last;
    last = step;
    const known = ahead?.step === step ? ahead : null;
    if (!known) ahead?.asked.abort();
    signal?.addEventListener("abort", () => known?.asked.abort(), { once: true });
    ahead = null;
    const answer = (await known?.answer) ?? (await content(step, { signal }));
    if (Math.abs(stride) === 1 && step + stride > 0 && step + stride <= answer.steps && !signal?.aborted) {
      waiting = setTimeout(() => prepare(step + stride), PATIENCE);
    }
    return answer;
  }

  return { content: next, leave };
}

function asTexts({ index, count, rows, columns, most }) {
  return { index, count, rows: rows?.join(":"), columns: columns?.join(":"), most };
}
