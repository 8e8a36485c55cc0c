// The images of a batch: as a grid, and one by one.

import { button, element } from "../shared/elements.js";
import { whole } from "../shared/format.js";
import { setText, show } from "../shared/part.js";
import { latest } from "../shared/timers.js";
import { forgive } from "../tensor/thumbnail.js";

const IMAGES_SHOWN = 16;
const IMAGES_MOST = 128;
/** Delay before pictures are requested, so that quick stepping requests none. */
const PATIENCE = 60;

/** Return the part that shows the images of a batch, with their targets below. */
export function images(view) {
  const grid = element("div", { class: "images" });
  const more = button("", () => showMore(), { class: "plain", hidden: true });
  const node = element("div", {}, grid, more);
  const figures = [];
  let shown = IMAGES_SHOWN;
  let content = null;

  const drawing = latest(async (given, signal) => {
    const { batch, tensors, step } = given;
    const [count, channels] = tensors[batch.images].shape;
    const kept = view.source.slices?.(step, batch.images) ?? Infinity; // a saved report has some only
    const length = Math.min(shown, count, Math.floor(kept / channels));
    if (!length) return;
    const found = await askImages(view, given, { first: 0, count: length }, signal);
    if (signal.aborted || !found.length) return;
    while (figures.length < length) figures.push(figure());
    grid.replaceChildren(...figures.slice(0, length).map((one) => one.node));
    found.forEach((image, place) => figures[place].draw(image, given, place));
    setText(more, `Show more (${whole(length)} of ${whole(count)})`);
    show(more, length === shown && length < Math.min(count, IMAGES_MOST));
  }, PATIENCE);

  function showMore() {
    shown = Math.min(2 * shown, IMAGES_MOST);
    drawing.update(content);
  }

  return {
    ...drawing,
    node,
    update(next) {
      content = next;
      drawing.update(next);
    },
  };
}

/** Return images of a batch that follow each other, each {width, height, channels}; none if the server has none. */
export async function askImages(view, { batch, tensors, step }, { first, count }, signal) {
  const [, channels] = tensors[batch.images].shape;
  try {
    const region = { index: first * channels, count: count * channels, most: 512 };
    const pixels = await view.source.numbers(step, batch.images, region, { signal });
    return Array.from({ length: count }, (_, place) => imageOf(pixels, place, channels));
  } catch (error) {
    forgive(error);
    return [];
  }
}

// Return the channels of one image of those that came.
function imageOf({ numbers, width, height }, place, channels) {
  const size = width * height;
  const channel = (which) => numbers.subarray((place * channels + which) * size, (place * channels + which + 1) * size);
  return { width, height, channels: Array.from({ length: channels }, (_, which) => channel(which)) };
}

function figure() {
  const canvas = element("canvas");
  const caption = element("figcaption");
  return {
    node: element("figure", {}, canvas, caption),
    draw(image, content, place) {
      drawImage(canvas, image, content, place);
      setText(caption, content.batch.targets?.[place] ?? "");
    },
  };
}

/** Draw the image of a row of a batch. */
export function drawImage(canvas, { width, height, channels }, { batch, tensors }, place) {
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const [dark, light] = brightness(tensors[batch.images]);
  const scale = 255 / (light - dark || 1);
  for (let pixel = 0; pixel < width * height; pixel += 1) {
    for (let channel = 0; channel < 3; channel += 1) {
      const numbers = channels[channels.length === 3 ? channel : 0];
      image.data[4 * pixel + channel] = (numbers[pixel] - dark) * scale;
    }
    image.data[4 * pixel + 3] = 255;
  }
  context.putImageData(image, 0, 0);
  const label = labelOf(batch, place);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `image of ${label}`);
  canvas.title = label;
}

function labelOf({ rows, targets }, place) {
  const row = `row ${rows ? rows[place] : place}`;
  return targets ? `${row}, target ${targets[place]}` : row;
}

// Outliers of standardised pixels would make all others grey, so they are clipped.
function brightness({ minimum, maximum, mean, std }) {
  return minimum < 0 ? [Math.max(minimum, mean - 2 * std), Math.min(maximum, mean + 2 * std)] : [minimum, maximum];
}
