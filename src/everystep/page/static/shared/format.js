// Formats of numbers and times.

/** Return a number of the server's JSON, in which nan and infinities are strings. */
export function numberOf(value) {
  if (typeof value === "number") return value;
  if (value === null || value === undefined) return null;
  return Number(String(value).replace("inf", "Infinity"));
}

/** Compare numbers for sorting, upwards or (`sign` -1) downwards: NaN counts as larger than all others, and null comes last in both. */
export function compared(a, b, sign) {
  if (a === null || b === null) return (a === null) - (b === null);
  if (Number.isNaN(a) || Number.isNaN(b)) return sign * (Number.isNaN(a) - Number.isNaN(b));
  return sign * (a - b || 0);
}

/** Return four significant digits. */
export function short(value, digits = 4) {
  const number = numberOf(value);
  if (number === null) return "";
  if (!Number.isFinite(number)) return Number.isNaN(number) ? "nan" : number > 0 ? "inf" : "-inf";
  // As in Python, a number in the middle of two goes to the even one: 2.0625 to 2.062, a little nearer to zero.
  const figures = number.toPrecision(40).replace(/e.*|[-.]/g, "").replace(/^0+/, "");
  const isDown = /^[02468]50*$/.test(figures.slice(digits - 1));
  const rounded = Number((isDown ? number * (1 - 2 ** -50) : number).toPrecision(digits));
  const size = Math.abs(rounded);
  // Exponents as in Python, because the server's texts are next to them.
  if (size !== 0 && (size >= 10 ** Math.max(digits, 4) || size < 1e-4)) return rounded.toExponential().replace(/e([+-])(\d)$/, "e$10$2");
  return String(rounded);
}

/** Return an integer with commas between thousands. */
export function whole(number) {
  return number.toLocaleString("en");
}

/** Return a shape: 64×1,000; "number" if it has no dimensions. */
export function shapeText(shape) {
  return shape.length ? shape.map(whole).join("×") : "number";
}

/** Return numbers in `digits`, or in more if two different ones would look the same: the ends of a scale. */
export function distinct(numbers, digits) {
  const textsIn = (count) => numbers.map((number) => short(number, count));
  let count = digits;
  while (count < 17 && new Set(textsIn(count)).size < new Set(numbers).size) count += 1;
  // One digit more: between neighbours, the last one alone may be off by half their distance.
  return textsIn(count > digits ? count + 1 : count);
}

/** Return a share as percent in three digits; in more if it would look like all, but is not. */
export function percent(share) {
  const number = numberOf(share);
  return Number.isFinite(number) ? `${distinct([100 * number, 100], 3)[0]}%` : short(number);
}

/** Return how long ago a time was, or its date if that is long. */
export function ago(iso) {
  const seconds = (Date.now() - new Date(iso).getTime()) / 1000;
  if (seconds < 60) return "just now";
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ago`;
  return new Date(iso).toISOString().slice(0, 10);
}

/** Return seconds in readable units. */
export function duration(seconds) {
  if (seconds < 10) return `${short(seconds, 2)} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${Math.round(seconds / 3600)} h`;
}

/** Return a number in the fewest digits that restore it; `isSingle`: as a float32, by default if it is one, as in the server's texts. */
export function fullText(value, isSingle = Math.fround(value) === value) {
  if (!Number.isFinite(value)) return String(value).replace("NaN", "nan").replace("Infinity", "inf");
  if (Object.is(value, -0)) return "-0";
  const size = Math.abs(value);
  const shortest = isSingle ? ofSingle(value) : value;
  // Switch to exponents at the same sizes as the table's texts, which Python writes.
  if (size === 0 || (size >= 1e-4 && size < (isSingle ? 1e6 : 1e16))) return String(shortest);
  return shortest.toExponential().replace(/e([+-])(\d)$/, "e$10$2");
}

function ofSingle(value) {
  for (let digits = 1; digits < 10; digits++) {
    const number = Number(value.toPrecision(digits));
    if (Math.fround(number) === value) return number;
  }
  return value;
}
