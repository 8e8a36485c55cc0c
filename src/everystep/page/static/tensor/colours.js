// The colours of numbers in a heat map: around 0 in two directions, or in one if all have the same sign.

const SHADES = 128;

/** Return the colour range of a tensor's finite numbers: {kind, from, to}. */
export function rangeOf(lowest, highest) {
  if (lowest === null || highest === null || Number.isNaN(lowest)) return { kind: "both", from: -1, to: 1 };
  if (lowest < 0 && highest > 0) {
    const size = Math.max(-lowest, highest);
    return { kind: "both", from: -size, to: size };
  }
  if (lowest === highest) return lowest < 0 ? { kind: "below", from: lowest, to: 0 } : { kind: "above", from: 0, to: highest || 1 };
  return { kind: highest <= 0 ? "below" : "above", from: lowest, to: highest };
}

/** Return the colours of a node's style: shades from lowest to highest, and that of non-finite numbers. */
export function coloursOf(node) {
  const style = getComputedStyle(node);
  const of = (name) => parsed(style.getPropertyValue(`--map-${name}`));
  const [low, lower, zero, higher, high] = ["low", "lower", "zero", "higher", "high"].map(of);
  const below = blended([low, lower, zero]);
  const above = blended([zero, higher, high]);
  return { below, above, both: [...below, ...above], nan: of("nan"), Infinity: of("inf"), "-Infinity": of("minus-inf") };
}

/** Return a function that gives the colour, [r, g, b], of a number. `isRooted`: small numbers stand out. */
export function painter(colours, { kind, from, to }, isRooted) {
  const shades = colours[kind];
  const last = shades.length - 1;
  const span = to - from || 1;
  return (value) => {
    if (!Number.isFinite(value)) return Number.isNaN(value) ? colours.nan : colours[String(value)];
    const share = Math.min(Math.max((value - from) / span, 0), 1);
    return shades[Math.round(last * (isRooted ? rooted(share, kind) : share))];
  };
}

/** Return the position on the scale for the linear scale's `share`. */
function rooted(share, kind) {
  if (kind === "above") return Math.sqrt(share);
  if (kind === "below") return 1 - Math.sqrt(1 - share);
  const away = 2 * share - 1;
  return 0.5 + (Math.sign(away) * Math.sqrt(Math.abs(away))) / 2;
}

/** Return whether dark text is more readable on a colour. */
export function isLight([red, green, blue]) {
  return 0.299 * red + 0.587 * green + 0.114 * blue > 140;
}

/** Return a colour in CSS notation. */
export function css([red, green, blue]) {
  return `rgb(${red} ${green} ${blue})`;
}

function parsed(text) {
  const digits = text.trim().slice(1);
  return [0, 2, 4].map((start) => parseInt(digits.slice(start, start + 2), 16));
}

function blended(stops) {
  return Array.from({ length: SHADES }, (_, place) => {
    const along = (place / (SHADES - 1)) * (stops.length - 1);
    const first = Math.min(Math.floor(along), stops.length - 2);
    return stops[first].map((value, channel) => Math.round(value + (along - first) * (stops[first + 1][channel] - value)));
  });
}
