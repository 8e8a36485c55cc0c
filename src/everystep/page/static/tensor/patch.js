// A region of a tensor's numbers, and its picture.

import { fullText } from "../shared/format.js";

/** A region in the server's format: {rows, columns, height, width, block, numbers}. */
export class Patch {
  constructor(answer) {
    Object.assign(this, answer);
    this.picture = null;
  }

  /** Whether each of its cells is one number. */
  get isFine() {
    return this.block[0] === 1 && this.block[1] === 1;
  }

  /** Whether it contains a region. */
  covers({ rows, columns }) {
    return this.rows[0] <= rows[0] && rows[1] <= this.rows[1] && this.columns[0] <= columns[0] && columns[1] <= this.columns[1];
  }

  /** Whether it contains a cell. */
  has([row, column]) {
    return this.covers({ rows: [row, row + 1], columns: [column, column + 1] });
  }

  /** Return the number at a cell of the tensor, or that of its block. */
  at([row, column]) {
    const across = Math.floor((column - this.columns[0]) / this.block[1]);
    return this.numbers[Math.floor((row - this.rows[0]) / this.block[0]) * this.width + across];
  }

  /** Return the number at a cell in full: the fewest digits that restore it in its dtype. */
  text(cell) {
    const number = this.at(cell);
    const text = fullText(number, this.format === "float32");
    // Larger whole numbers come as float64, which does not hold all of them.
    return /int64/.test(this.dtype) && Math.abs(number) >= 2 ** 53 ? `about ${text}` : text;
  }

  /** Return the first and the last cell of a cell's block. */
  blockOf([row, column]) {
    const along = (value, [first, past], size) => {
      const start = first + Math.floor((value - first) / size) * size;
      return [start, Math.min(start + size, past) - 1];
    };
    const [top, bottom] = along(row, this.rows, this.block[0]);
    const [left, right] = along(column, this.columns, this.block[1]);
    return [[top, left], [bottom, right]];
  }

  /** Draw it, a pixel for each number. */
  paint(colourOf) {
    const picture = document.createElement("canvas");
    picture.width = this.width;
    picture.height = this.height;
    const context = picture.getContext("2d");
    const image = context.createImageData(this.width, this.height);
    const pixels = image.data;
    for (let place = 0, pixel = 0; place < this.numbers.length; place += 1, pixel += 4) {
      const colour = colourOf(this.numbers[place]);
      pixels[pixel] = colour[0];
      pixels[pixel + 1] = colour[1];
      pixels[pixel + 2] = colour[2];
      pixels[pixel + 3] = 255;
    }
    context.putImageData(image, 0, 0);
    this.picture = picture;
  }

  /** Draw its picture at its place in an extract. */
  draw(context, extract) {
    const [height, width] = this.block;
    const rows = [this.rows[0], this.rows[0] + this.height * height];
    const columns = [this.columns[0], this.columns[0] + this.width * width];
    const { left, top, width: wide, height: high } = extract.place(rows, columns);
    // If several numbers share a pixel, they are blended; else each is a crisp rectangle.
    context.imageSmoothingEnabled = wide < this.width || high < this.height;
    context.drawImage(this.picture, left, top, wide, high);
  }
}
