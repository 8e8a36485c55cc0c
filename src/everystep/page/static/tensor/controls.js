// The controls of a heat map: the slice of a tensor of several dimensions, zoom, and the legend.

import { css } from "./colours.js";
import { button, element } from "../shared/elements.js";
import { distinct, whole } from "../shared/format.js";
import { setText, show } from "../shared/part.js";

/** Return the choice of a slice: {node, update(about, shape), indices(index)}. */
export function slices(turnTo) {
  const before = button("‹", () => move(-1), { "aria-label": "slice before", class: "plain" });
  const after = button("›", () => move(1), { "aria-label": "next slice", class: "plain" });
  const field = element("input", { type: "number", min: 0, "aria-label": "slice", onchange: () => to(Number(field.value)) });
  const text = element("span", { class: "muted" });
  const node = element("div", { class: "slices", hidden: true }, before, field, after, text);
  let leading = [];
  let count = 1;
  let index = 0;

  function to(wanted) {
    index = Math.min(Math.max(Math.round(wanted) || 0, 0), count - 1);
    turnTo(index);
  }

  function move(by) {
    to(index + by);
  }

  return {
    node,
    move,
    /** Return the leading indices of a slice: of the 7th of 4×16, [0, 7]. */
    indices: (of) => indicesOf(of, leading),
    update(about, shape) {
      ({ slices: count, index } = about);
      leading = shape.slice(0, -2);
      show(node, count > 1);
      field.max = count - 1;
      field.value = index;
      before.disabled = index === 0;
      after.disabled = index === count - 1;
      setText(text, `of ${whole(count)} slices: [${[...indicesOf(index, leading), ":", ":"].join(", ")}]`);
    },
  };
}

function indicesOf(index, sizes) {
  const found = [];
  for (const size of sizes.toReversed()) {
    found.unshift(index % size);
    index = Math.floor(index / size);
  }
  return found;
}

/** Return the buttons that zoom: {node, update(isNear)}. */
export function zoomButtons({ zoom, reset }) {
  const out = button("−", () => zoom(1 / 1.6), { "aria-label": "zoom out", class: "plain" });
  const all = button("all", reset, { class: "plain", title: "show everything (0, or a double click)" });
  const node = element("span", { class: "zoom" }, out, button("+", () => zoom(1.6), { "aria-label": "zoom in", class: "plain" }), all);
  return { node, update: (isNear) => [out, all].forEach((each) => (each.disabled = !isNear)) };
}

/** Return the legend: {node, update(colours, range, patch)}. */
export function legend(rooted) {
  const bar = element("canvas", { width: 256, height: 1, "aria-hidden": "true" });
  const ends = [element("span"), element("span")];
  const others = element("span", { class: "not-finite" });
  const isRooted = button("√", () => toggle(), {
    class: "plain",
    "aria-pressed": "false",
    "aria-label": "square root scale",
    title: "colours by square root, so that small numbers stand out",
  });
  const node = element("div", { class: "legend" }, ends[0], bar, ends[1], isRooted, others);

  function toggle() {
    const now = isRooted.getAttribute("aria-pressed") !== "true";
    isRooted.setAttribute("aria-pressed", String(now));
    rooted(now);
  }

  return {
    node,
    update(colours, range, { numbers, lowest }) {
      for (const part of [bar, isRooted, ends[0], ends[1]]) show(part, lowest !== null);
      const context = bar.getContext("2d");
      const shades = colours[range.kind];
      for (let pixel = 0; pixel < bar.width; pixel += 1) {
        context.fillStyle = css(shades[Math.round((pixel / (bar.width - 1)) * (shades.length - 1))]);
        context.fillRect(pixel, 0, 1, 1);
      }
      distinct([range.from, range.to], 3).forEach((text, place) => setText(ends[place], text));
      others.replaceChildren(...key(colours, numbers));
    },
  };
}

function key(colours, numbers) {
  const found = new Set();
  for (const number of numbers) if (!Number.isFinite(number)) found.add(String(number));
  return [...found].map((name) => {
    const swatch = element("span", { class: "swatch", "aria-hidden": "true" });
    swatch.style.background = css(colours[name === "NaN" ? "nan" : name]);
    return element("span", {}, swatch, name.replace("Infinity", "inf").replace("NaN", "nan"));
  });
}
