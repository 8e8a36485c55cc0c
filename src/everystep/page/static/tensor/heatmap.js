// A heat map of a tensor, with a cell for every number, at any zoom.

import { coloursOf, isLight, painter, rangeOf } from "./colours.js";
import { watchAppearance } from "../shared/appearance.js";
import { copyMark } from "../shared/copy.js";
import { element } from "../shared/elements.js";
import { Extract } from "./extract.js";
import { numberOf, shapeText, short } from "../shared/format.js";
import { handle } from "./hands.js";
import { legend, slices, zoomButtons } from "./controls.js";
import { setText, show } from "../shared/part.js";
import { Patch } from "./patch.js";
import { isComplex } from "./statistics.js";

const HIGHEST = 320;
const MOST = 1024;
/** Minimum size of cells with their numbers written in them. */
const READABLE = { width: 50, height: 15 };

/** A heat map; `chosen`: called with the index of a clicked number. */
export class HeatMap {
  constructor(chosen) {
    this.chosen = chosen;
    this.canvas = element("canvas", { tabIndex: 0, role: "img", "data-own-keys": "" });
    this.readout = element("p", { class: "readout" });
    this.legend = legend((isRooted) => {
      this.isRooted = isRooted;
      this.paint();
    });
    this.slices = slices((index) => this.turnTo(index));
    this.buttons = zoomButtons({ zoom: (factor) => this.zoom(factor), reset: () => this.reset() });
    this.frame = element("div", { class: "frame" }, this.canvas);
    this.copying = copyMark(() => this.#patchAt(this.cursor).text(this.cursor), "copy this number in full precision");
    show(this.copying, false);
    const spoken = element("div", { class: "spoken" }, this.readout, this.copying);
    const beneath = element("div", { class: "beneath" }, this.legend.node, this.buttons.node, spoken);
    this.node = element("figure", { class: "heat-map" }, this.slices.node, this.frame, beneath);
    this.isRooted = false;
    this.index = 0; // of the slice that was asked for last; that of the numbers shown is in their patch
    this.whole = null; // the patch of all the numbers
    this.fine = null; // the patch of the visible ones, when zoomed
    this.cursor = null;
    const sized = new ResizeObserver(() => {
      if (!this.whole || this.frame.clientWidth === this.sizedFor) return;
      this.#size(false);
      this.draw();
    });
    sized.observe(this.frame);
    const recoloured = () => {
      this.colours = null;
      if (this.whole) this.paint();
    };
    this.watching = [() => sized.disconnect(), watchAppearance(recoloured), handle(this)];
  }

  /** Request the numbers; the promise returns a function that shows them. `classes`: their names, or null. */
  async load(ask, { seen, label, classes = null, signal }) {
    const isAnother = String(seen.shape) !== String(this.shape);
    const index = isAnother ? 0 : this.index;
    const region = isAnother || this.extract?.isWhole !== false ? null : this.#wanted();
    const [whole, fine] = await Promise.all([
      ask({ index, most: MOST }, { signal }),
      region ? ask({ index, ...region, most: MOST }, { signal }) : null,
    ]);
    return () => {
      Object.assign(this, { ask, signal, index, shape: seen.shape, seen, classes });
      this.whole = new Patch(whole);
      this.fine = fine && new Patch(fine);
      this.canvas.setAttribute("aria-label", `Heat map of ${label}`);
      this.slices.update(whole, seen.shape);
      this.#size(isAnother);
      this.paint();
    };
  }

  /** Colour the numbers again, and draw them. */
  paint() {
    this.colours ??= coloursOf(this.node);
    const { lowest, highest } = this.whole;
    this.range = rangeOf(numberOf(lowest), numberOf(highest));
    this.colourOf = painter(this.colours, this.range, this.isRooted);
    this.whole.paint(this.colourOf);
    this.fine?.paint(this.colourOf);
    this.legend.update(this.colours, this.range, this.whole);
    this.draw();
  }

  /** Draw the visible part. */
  draw() {
    const { canvas, extract } = this;
    const ratio = devicePixelRatio;
    const context = canvas.getContext("2d");
    const [width, height] = [Math.round(extract.width * ratio), Math.round(extract.height * ratio)];
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, extract.width, extract.height);
    const { left, top, width: wide, height: high } = extract.place([0, extract.rows], [0, extract.columns]);
    context.save();
    context.beginPath();
    context.rect(left, top, wide, high);
    context.clip();
    this.whole.draw(context, extract);
    this.fine?.draw(context, extract);
    context.restore();
    this.#write(context);
    this.#mark(context);
    this.buttons.update(!extract.isWhole);
    canvas.classList.toggle("near", !extract.isWhole);
    this.#say();
  }

  /** Zoom around a pixel, or around the cell of the cursor. */
  zoom(factor, left, top) {
    if (left === undefined && this.cursor) {
      const cell = this.extract.place([this.cursor[0], this.cursor[0] + 1], [this.cursor[1], this.cursor[1] + 1]);
      this.extract.zoom(factor, cell.left + cell.width / 2, cell.top + cell.height / 2);
      this.extract.reveal(this.cursor);
    } else this.extract.zoom(factor, left, top);
    this.#moved();
  }

  pan(left, top) {
    this.extract.pan(left, top);
    this.#moved();
  }

  reset() {
    this.extract.reset();
    this.#moved();
  }

  /** Point at a cell; `isByKey`: announce it, and scroll to it. */
  point(cell, isByKey = false) {
    this.cursor = cell;
    if (isByKey) this.readout.setAttribute("aria-live", "polite");
    else this.readout.removeAttribute("aria-live");
    if (isByKey && cell) {
      this.extract.reveal(cell);
      this.#moved();
    } else this.draw();
  }

  /** A number was clicked: report it, unless its cell represents several. */
  choose(cell) {
    if (cell && this.#patchAt(cell).isFine) this.chosen(this.#indexOf(cell));
  }

  /** Return the number of rows and columns per drawn cell. */
  get block() {
    return (this.#patchAt(this.cursor ?? [0, 0]) ?? this.whole).block;
  }

  /** Show another slice of a tensor of several dimensions. */
  async turnTo(index) {
    const { signal } = this;
    this.index = index;
    const whole = await this.ask({ index, most: MOST }, { signal }).catch((error) => error);
    if (signal.aborted || signal !== this.signal || index !== this.index) return;
    if (whole instanceof Error) {
      this.index = this.whole.index;
      this.slices.update(this.whole, this.shape);
      return setText(this.readout, whole.message);
    }
    this.whole = new Patch(whole);
    this.fine = null;
    this.slices.update(whole, this.shape);
    this.paint();
    this.#moved();
  }

  close() {
    this.watching.forEach((end) => end());
  }

  #size(isAnother) {
    const before = this.extract;
    this.sizedFor = this.frame.clientWidth;
    const [rows, columns] = grid(this.shape);
    this.extract = new Extract(rows, columns, Math.max(this.sizedFor, 40), HIGHEST);
    if (before && !isAnother) this.extract.follow(before);
    if (isAnother) this.cursor = null;
    this.canvas.style.width = `${this.extract.width}px`;
    this.canvas.style.height = `${this.extract.height}px`;
  }

  #moved() {
    this.draw();
    clearTimeout(this.waiting);
    if (!this.whole.isFine && !this.extract.isWhole && this.#isCoarse()) this.waiting = setTimeout(() => this.#refine(), 80);
  }

  /** Whether the visible part is available in smaller blocks than drawn. */
  #isCoarse() {
    if (!this.fine?.covers(this.extract.seen())) return true;
    const { rows, columns } = this.#wanted();
    return [rows, columns].some(([first, past], axis) => Math.ceil((past - first) / MOST) < this.fine.block[axis]);
  }

  async #refine() {
    const { whole, signal } = this;
    const answer = await this.ask({ index: whole.index, ...this.#wanted(), most: MOST }, { signal }).catch(() => null);
    if (!answer || whole !== this.whole) return;
    this.fine = new Patch(answer);
    this.fine.paint(this.colourOf);
    this.draw();
  }

  // The visible part and half as much on each side, so that a small move needs no request.
  #wanted() {
    const { rows, columns } = this.extract.seen();
    const wider = ([first, past], length) => {
      const more = Math.ceil((past - first) / 2);
      return [Math.max(first - more, 0), Math.min(past + more, length)];
    };
    return { rows: wider(rows, this.extract.rows), columns: wider(columns, this.extract.columns) };
  }

  #patchAt(cell) {
    return this.fine?.has(cell) ? this.fine : this.whole;
  }

  #write(context) {
    const { cell } = this.extract;
    if (cell.width < READABLE.width || cell.height < READABLE.height) return;
    const { rows, columns } = this.extract.seen();
    context.font = "11px system-ui, sans-serif";
    context.textAlign = "center";
    context.textBaseline = "middle";
    for (let row = rows[0]; row < rows[1]; row += 1) {
      for (let column = columns[0]; column < columns[1]; column += 1) {
        const patch = this.#patchAt([row, column]);
        if (!patch.isFine) continue;
        const value = patch.at([row, column]);
        const { left, top } = this.extract.place([row, row + 1], [column, column + 1]);
        context.fillStyle = isLight(this.colourOf(value)) ? "#111" : "#fff";
        context.fillText(short(value, 3), left + cell.width / 2, top + cell.height / 2 + 0.5);
      }
    }
  }

  #mark(context) {
    if (!this.cursor) return;
    const [[top, left], [bottom, right]] = this.#patchAt(this.cursor).blockOf(this.cursor);
    const place = this.extract.place([top, bottom + 1], [left, right + 1]);
    const [x, y, width, height] = [place.left - 1, place.top - 1, Math.max(place.width, 3) + 2, Math.max(place.height, 3) + 2];
    context.lineWidth = 3;
    context.strokeStyle = "#fff";
    context.strokeRect(x, y, width, height);
    context.lineWidth = 1.5;
    context.strokeStyle = "#000";
    context.strokeRect(x, y, width, height);
  }

  #say() {
    show(this.copying, this.cursor !== null);
    setText(this.readout, this.cursor ? this.#sentence(this.cursor) : this.#hint());
  }

  #sentence(cell) {
    const patch = this.#patchAt(cell);
    const value = patch.text(cell);
    const before = this.slices.indices(this.whole.index);
    const index = this.#indexOf(cell);
    const about = this.#classAt(cell, patch);
    if (patch.isFine) return (index.length ? `[${index.join(", ")}] = ${value}` : value) + about;
    const [first, last] = patch.blockOf(cell);
    const spans = [0, 1].map((axis) => (first[axis] === last[axis] ? first[axis] : `${first[axis]}–${last[axis]}`));
    return `[${[...before, ...(this.shape.length > 1 ? spans : spans.slice(1))].join(", ")}]: the largest is ${value}`;
  }

  #indexOf(cell) {
    const own = this.shape.length > 1 ? cell : this.shape.length ? [cell[1]] : [];
    return [...this.slices.indices(this.whole.index), ...own];
  }

  // The name of a class: of the number itself, or of its column.
  #classAt(cell, patch) {
    const kind = this.classes && this.seen.classes;
    if (!kind) return "";
    const number = kind === "columns" ? cell[1] : patch.at(cell);
    const name = this.classes[number];
    if (name === undefined || name === String(number)) return "";
    return kind === "columns" ? `, class ${name}` : `, ${name}`;
  }

  #hint() {
    const isAbsolute = isComplex(this.seen) ? "absolute values" : "";
    if (this.whole.isFine || this.fine?.isFine) return isAbsolute;
    return [isAbsolute, `each cell shows the largest of ${shapeText((this.fine ?? this.whole).block)}`].filter(Boolean).join("; ");
  }
}

function grid(shape) {
  return [shape.at(-2) ?? 1, shape.at(-1) ?? 1];
}
