// The visible part of a grid of cells: its corner, and the pixels per cell.

/** The largest size of cells with numbers in them. */
const LARGEST = { width: 84, height: 30 };
/** The largest size of cells of a grid that fits. */
const FITTING = 28;
/** The minimum height and width of a grid of many rows. */
const LOWEST = 140;
const NARROWEST = 280;
/** The maximum ratio of a cell's sides. */
const LONGEST = 2.5;

/** An extract of a grid of rows and columns, drawn on so many pixels. */
export class Extract {
  /** `width`: available, in pixels; `most`: its maximum height. */
  constructor(rows, columns, width, most) {
    let [wide, high] = [Math.min(FITTING, width / columns), Math.min(FITTING, most / rows)];
    // Cells are nearly square, unless the grid would be too flat or too narrow to be readable.
    if (rows > 1) {
      wide = Math.min(wide, Math.max(LONGEST * high, NARROWEST / columns));
      high = Math.min(high, Math.max(LONGEST * wide, LOWEST / rows));
    }
    this.rows = rows;
    this.columns = columns;
    this.fit = { width: wide, height: high };
    this.width = Math.max(Math.round(this.fit.width * columns), 1);
    this.height = Math.max(Math.round(this.fit.height * rows), 1);
    this.reset();
  }

  /** Show everything. */
  reset() {
    this.x = 0;
    this.y = 0;
    this.cell = { ...this.fit };
  }

  get isWhole() {
    // Zooming in and out again shows the whole, although factors are rounded.
    return ["width", "height"].every((name) => this.cell[name] <= this.fit[name] * (1 + 1e-9));
  }

  /** Copy the position of another extract of a grid of the same size. */
  follow(other) {
    const share = { width: other.cell.width / other.fit.width, height: other.cell.height / other.fit.height };
    this.x = other.x;
    this.y = other.y;
    if (!other.isWhole) this.cell = { width: this.fit.width * share.width, height: this.fit.height * share.height };
    this.#keepInside();
  }

  /** Make cells `factor` times as large, around a pixel. */
  zoom(factor, left = this.width / 2, top = this.height / 2) {
    const [column, row] = [this.x + left / this.cell.width, this.y + top / this.cell.height];
    const sized = (name) => Math.min(Math.max(this.cell[name] * factor, this.fit[name]), Math.max(LARGEST[name], this.fit[name]));
    this.cell = { width: sized("width"), height: sized("height") };
    this.x = column - left / this.cell.width;
    this.y = row - top / this.cell.height;
    this.#keepInside();
  }

  /** Move by pixels. */
  pan(left, top) {
    this.x -= left / this.cell.width;
    this.y -= top / this.cell.height;
    this.#keepInside();
  }

  /** Move so that a cell is visible. */
  reveal([row, column]) {
    this.x = Math.min(Math.max(this.x, column + 1 - this.width / this.cell.width), column);
    this.y = Math.min(Math.max(this.y, row + 1 - this.height / this.cell.height), row);
    this.#keepInside();
  }

  /** Return the cell, [row, column], at a pixel; null outside the grid. */
  at(left, top) {
    const row = Math.floor(this.y + top / this.cell.height);
    const column = Math.floor(this.x + left / this.cell.width);
    return row >= 0 && row < this.rows && column >= 0 && column < this.columns ? [row, column] : null;
  }

  /** Return the visible rows and columns, as [first, past the last]. */
  seen() {
    const past = (start, size, length) => [Math.max(Math.floor(start), 0), Math.min(Math.ceil(start + size), length)];
    return {
      rows: past(this.y, this.height / this.cell.height, this.rows),
      columns: past(this.x, this.width / this.cell.width, this.columns),
    };
  }

  /** Return the pixels of a region: {left, top, width, height}. */
  place([firstRow, pastRow], [firstColumn, pastColumn]) {
    return {
      left: (firstColumn - this.x) * this.cell.width,
      top: (firstRow - this.y) * this.cell.height,
      width: (pastColumn - firstColumn) * this.cell.width,
      height: (pastRow - firstRow) * this.cell.height,
    };
  }

  #keepInside() {
    this.x = Math.max(Math.min(this.x, this.columns - this.width / this.cell.width), 0);
    this.y = Math.max(Math.min(this.y, this.rows - this.height / this.cell.height), 0);
  }
}
