// The batch of a step: its rows of the data, and what is in them.

import { button, element } from "../shared/elements.js";
import { whole } from "../shared/format.js";
import { fixed, rebuilt, setText, show } from "../shared/part.js";
import { tensorRow } from "../tensor/tensor.js";

const ROWS_SHOWN = 12;
/** A batch of more tensors, of several passes, shows the others on demand. */
const TENSORS_SHOWN = 8;
const IMAGES_SHOWN = 16;
const IMAGES_MOST = 128;
/** Pictures wait so long for the next step: they are not asked for while one steps quickly. */
const PATIENCE = 60;

/** Return the part that shows the batch. */
export function batch(view) {
  const structureOf = ({ batch, tensors }) => [
    batch.images !== null,
    batch.tensors.map(({ name, tensor }) => [name, tensors[tensor].shape.slice(1)]),
    batch.targets === null,
    batch.values.map(({ name }) => name),
  ];
  return rebuilt(element("div", { class: "batch" }), structureOf, ({ batch }) => [
    rowsOfData(),
    ...(batch.images ? [images(view)] : batch.targets ? [targets()] : []),
    ...(batch.values.length ? [values()] : []),
    ...folded(
      batch.tensors.map(({ name, tensor }) =>
        tensorRow(view, { id: tensor, name }),
      ),
    ),
  ]);
}

function folded(rows) {
  const more = rows.slice(TENSORS_SHOWN);
  if (!more.length) return rows;
  const summary = element("summary", {}, more.length === 1 ? "1 more tensor" : `${whole(more.length)} more tensors`);
  const fold = {
    node: element("details", { class: "fold" }, summary, ...more.map((row) => row.node)),
    update: (content) => more.forEach((row) => row.update(content)),
    close: () => more.forEach((row) => row.close()),
  };
  return [...rows.slice(0, TENSORS_SHOWN), fold];
}

function rowsOfData() {
  const text = element("span");
  const more = button("", () => tell(!isAll), { class: "plain" });
  const node = element("p", { class: "rows small muted" }, text, " ", more);
  let rows = null;
  let isOfLoop = false;
  let isAll = false;

  function tell(all) {
    isAll = all;
    if (!rows) return setText(text, isOfLoop ? "as your loop had it" : "all rows of the data, in order");
    const listed = isAll ? rows : rows.slice(0, ROWS_SHOWN);
    setText(text, `${whole(rows.length)} rows of the data: ${listed.join(", ")}${listed.length < rows.length ? ", …" : ""}`);
    setText(more, isAll ? "fewer" : "all");
  }

  return {
    node,
    update({ batch, is_of_loop }) {
      rows = batch.rows;
      isOfLoop = is_of_loop;
      show(more, Boolean(rows) && rows.length > ROWS_SHOWN);
      tell(isAll);
    },
  };
}

// Images have their targets beneath them; of other rows they are a list.
function targets() {
  const node = element("p", { class: "rows small muted" });
  return fixed(node, ({ batch }) => setText(node, `targets: ${listed(batch.targets, batch.targets.length)}`));
}

// What a loop's batch has besides tensors: names, texts, numbers.
function values() {
  const node = element("dl", { class: "arguments values" });
  return fixed(node, ({ batch }) => {
    node.replaceChildren(...batch.values.flatMap(({ name, texts, count }) => [element("dt", {}, name), element("dd", {}, listed(texts, count))]));
  });
}

function listed(texts, count) {
  const shown = texts.slice(0, ROWS_SHOWN);
  return shown.join(", ") + (shown.length < count ? `, … (${whole(count)})` : "");
}

function images(view) {
  const grid = element("div", { class: "images" });
  const more = button("", () => showMore(), { class: "plain", hidden: true });
  const node = element("div", {}, grid, more);
  const figures = [];
  let shown = IMAGES_SHOWN;
  let content = null;

  const drawing = latest(async (given, signal) => {
    const { batch, tensors, step } = given;
    const [count, channels] = tensors[batch.images].shape;
    const length = Math.min(shown, count);
    const pixels = await view.source.numbers(step, batch.images, { index: 0, count: length * channels, most: 512 }, { signal });
    if (signal.aborted) return;
    while (figures.length < length) figures.push(figure());
    grid.replaceChildren(...figures.slice(0, length).map((one) => one.node));
    for (let place = 0; place < length; place += 1) {
      figures[place].draw(imageOf(pixels, place, channels), tensors[batch.images], textsOf(batch, place));
    }
    setText(more, `more: ${whole(length)} of ${whole(count)} shown`);
    show(more, length < Math.min(count, IMAGES_MOST));
  });

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

// Return the channels of one image of those that came.
function imageOf({ numbers, width, height }, place, channels) {
  const size = width * height;
  const channel = (which) => numbers.subarray((place * channels + which) * size, (place * channels + which + 1) * size);
  return { width, height, channels: Array.from({ length: channels }, (_, which) => channel(which)) };
}

function textsOf({ rows, targets }, place) {
  const row = rows ? `row ${rows[place]}` : `row ${place}`;
  return { target: targets?.[place] ?? "", label: targets ? `${row}, target ${targets[place]}` : row };
}

function figure() {
  const canvas = element("canvas", { role: "img" });
  const caption = element("figcaption");
  return {
    node: element("figure", {}, canvas, caption),
    draw({ width, height, channels }, seen, { target, label }) {
      if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
      const context = canvas.getContext("2d");
      const image = context.createImageData(width, height);
      const [dark, light] = brightness(seen);
      const scale = 255 / (light - dark || 1);
      for (let place = 0; place < width * height; place += 1) {
        for (let channel = 0; channel < 3; channel += 1) {
          const numbers = channels[channels.length === 3 ? channel : 0];
          image.data[4 * place + channel] = (numbers[place] - dark) * scale;
        }
        image.data[4 * place + 3] = 255;
      }
      context.putImageData(image, 0, 0);
      canvas.setAttribute("aria-label", `image of ${label}`);
      canvas.title = label;
      setText(caption, target);
    },
  };
}

// Standardised pixels have outliers that would leave all others grey: they are cut off.
function brightness({ minimum, maximum, mean, std }) {
  return minimum < 0 ? [Math.max(minimum, mean - 2 * std), Math.min(maximum, mean + 2 * std)] : [minimum, maximum];
}

// A picture that cannot be had, since the server says no or is away, is not drawn: all else is there.
function forgive(error) {
  if (error.name !== "AbortError" && error.status === undefined) throw error;
}

/** Return {update, close}: only the newest content is drawn, and not while the next is coming already. */
function latest(draw) {
  let asked = new AbortController();
  let waiting = null;
  return {
    update(content) {
      asked.abort();
      clearTimeout(waiting);
      asked = new AbortController();
      const { signal } = asked;
      waiting = setTimeout(() => draw(content, signal).catch(forgive), PATIENCE);
    },
    close() {
      clearTimeout(waiting);
      asked.abort();
    },
  };
}
