// Small pictures of tensors, in the rows that show them: a heat map, or of a vector a histogram.
//
// They must not delay anything else: only visible ones are requested, one after the other, while the browser is idle.

import { coloursOf, painter, rangeOf } from "./colours.js";
import { watchAppearance } from "../shared/appearance.js";
import { element } from "../shared/elements.js";
import { numberOf } from "../shared/format.js";
import { show } from "../shared/part.js";
import { Patch } from "./patch.js";

/** Delay before pictures are requested, so that quick stepping requests none. */
const PATIENCE = 120;
/** Cells along a side of a heat map. */
const MOST = 96;
/** Slices side by side, for a tensor of more dimensions. */
const SLICES = 4;
const PLACE = { width: 88, height: 34, least: 14 };

const pictures = new WeakMap();
const watcher = new IntersectionObserver((entries) => entries.forEach(({ target, isIntersecting }) => pictures.get(target)?.see(isIntersecting)), {
  rootMargin: "100px",
});

/** The part of a picture; `idOf(content)`: the tensor's id, or nothing. */
export class Thumbnail {
  #isSeen = false;
  #content = null;
  #asked = new AbortController();
  #timer = null;

  constructor(view, idOf) {
    Object.assign(this, { view, idOf });
    this.canvas = element("canvas", { width: 1, height: 1 });
    this.node = element("span", { class: "thumbnail", "aria-hidden": "true" }, this.canvas);
    this.unwatch = watchAppearance(() => {
      this.drawn = null;
      this.#draw();
    });
    pictures.set(this.node, this);
    watcher.observe(this.node);
  }

  update(content) {
    this.#content = content;
    this.#draw();
  }

  see(isSeen) {
    this.#isSeen = isSeen;
    if (isSeen) this.#draw();
  }

  close() {
    this.#asked.abort();
    clearTimeout(this.#timer);
    watcher.unobserve(this.node);
    this.unwatch();
  }

  #draw() {
    this.#asked.abort();
    clearTimeout(this.#timer);
    const content = this.#content;
    if (!content || !this.#isSeen) return;
    const id = this.idOf(content);
    const seen = content.tensors[id];
    const isDrawn = Boolean(seen) && !seen.unset && seen.shape.some((size) => size > 1) && seen.shape.every((size) => size > 0);
    show(this.canvas, isDrawn);
    const key = `${content.run} ${content.step} ${id}`;
    if (!isDrawn || this.drawn === key) return;
    this.#asked = new AbortController();
    const { signal } = this.#asked;
    const picture = isVector(seen.shape) ? bars : heat;
    this.#timer = setTimeout(() => inTurn(signal, async () => {
      await picture(this.canvas, this.view.source, content.step, { id, shape: seen.shape }, signal);
      if (!signal.aborted) this.drawn = key;
    }), PATIENCE);
  }
}

function isVector(shape) {
  return shape.slice(0, -1).every((size) => size === 1) || shape.at(-1) === 1;
}

async function heat(canvas, source, step, { id, shape }, signal) {
  const count = Math.min(slicesOf(shape), SLICES, source.slices?.(step, id) ?? SLICES);
  const answer = await source.numbers(step, id, { index: 0, count, most: count > 1 ? Math.ceil(MOST / count) : MOST }, { signal });
  if (signal.aborted || !answer.numbers.length) return;
  const paint = painter(coloursOf(canvas), rangeOf(numberOf(answer.lowest), numberOf(answer.highest)), false);
  const { width, height } = answer;
  Object.assign(canvas, { width: count * (width + 1) - 1, height });
  for (let slice = 0; slice < count; slice += 1) {
    const patch = new Patch({ ...answer, numbers: answer.numbers.subarray(slice * width * height, (slice + 1) * width * height) });
    patch.paint(paint);
    canvas.getContext("2d").drawImage(patch.picture, slice * (width + 1), 0);
  }
  fit(canvas);
}

// As large as fits; narrow matrices are stretched to be visible.
function fit(canvas) {
  const scale = Math.min(PLACE.width / canvas.width, PLACE.height / canvas.height);
  canvas.style.width = `${Math.max(canvas.width * scale, PLACE.least)}px`;
  canvas.style.height = `${Math.max(canvas.height * scale, PLACE.least)}px`;
}

function slicesOf(shape) {
  return shape.slice(0, -2).reduce((product, size) => product * size, 1);
}

async function bars(canvas, source, step, { id }, signal) {
  const { counts } = await source.histogram(step, id, { signal });
  if (signal.aborted) return;
  Object.assign(canvas, { width: 2 * PLACE.width, height: 2 * PLACE.height });
  const context = canvas.getContext("2d");
  const width = canvas.width / counts.length;
  const most = Math.max(...counts, 1);
  context.fillStyle = getComputedStyle(canvas).getPropertyValue("--accent");
  counts.forEach((count, place) => {
    const height = count && Math.max((canvas.height * count) / most, 2);
    context.fillRect(place * width, canvas.height - height, Math.max(width - 1, 1), height);
  });
  fit(canvas);
}

// One after the other, whenever the browser is idle.
let last = Promise.resolve();

function inTurn(signal, draw) {
  last = last.then(async () => {
    if (signal.aborted) return;
    await idle();
    if (!signal.aborted) await draw().catch(forgive);
  });
}

function idle() {
  return new Promise((resolve) => (window.requestIdleCallback ? requestIdleCallback(resolve, { timeout: 1000 }) : setTimeout(resolve, 30)));
}

/** Pass over that the server has no picture or is away: it is not drawn, and everything else is shown. */
export function forgive(error) {
  if (error.name !== "AbortError" && error.status === undefined) throw error;
}
