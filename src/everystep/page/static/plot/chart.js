// The look of the loss plot: the options of uPlot.

import { distinct, whole } from "../shared/format.js";

/** The maximum number of decades with a line on a log axis, and the minimum pixels between two lines. */
const MOST_DECADES = 12;
const APART = 16;
/** First digits of the labels of a log axis, as many as there is room for. */
const LEADING = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 5, 7], [1, 2, 5], [1]];
/** A measurement of at most so many values is also drawn as points: one alone makes no line. */
const FEW = 40;
const FONT = "12px system-ui, sans-serif";
/** Characters of the title of an axis that fit next to the plot. */
const LONGEST_TITLE = 26;
/** Steps between two grid lines: integers. */
const STRIDES = [...Array(12).keys()].flatMap((power) => [1, 2, 5].map((leading) => leading * 10 ** power));

let [loading, ruler] = [null, null];

/** Load uPlot, a classic script that makes `window.uPlot`, once. */
export function loadUPlot() {
  if (window.uPlot) return Promise.resolve(window.uPlot);
  loading ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = "/static/uPlot.js";
    script.onload = () => resolve(window.uPlot);
    script.onerror = () => {
      loading = null;
      reject(new Error("the plot library failed to load; is `everystep view` still running?"));
    };
    document.head.append(script);
  });
  return loading;
}

/** Return the width and the height of a plot: nearly half of the window's, or --plot-height of the style sheet. */
export function sizeOf(place) {
  const width = place.clientWidth;
  const given = Number.parseFloat(getComputedStyle(place).getPropertyValue("--plot-height"));
  return { width, height: given || Math.round(Math.max(260, innerHeight * 0.46)) };
}

/** Return a colour of the style sheet. */
export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/**
 * Return the options of uPlot.
 *
 * `lines`: what is drawn, each {title, colour, scale, kind}; kind: "raw" (a loss), "faint" (one under
 * its average), "average", "measured" or "rate". `has`: {isLog, isLine, isDense, last, width, height, hooks}.
 */
export function chartOptions(lines, has) {
  const [left, right] = [true, false].map((isLoss) => lines.filter(({ scale }) => (scale === "loss") === isLoss));
  const [hasLeft, hasRight] = [left, right].map((side) => side.some(({ curve }) => curve.points()[1].some(Number.isFinite)));
  return {
    width: has.width,
    height: has.height,
    scales: {
      x: { time: false, range: (_, low, high) => (low === null ? [1, 2] : low === high ? [low - 1, high + 1] : [low, high]) },
      ...Object.fromEntries(lines.map(({ scale }) => [scale, scale === "loss" && has.isLog ? { distr: 3 } : { range: rangeOf }])),
    },
    series: [{}, ...lines.map((line) => seriesOptions(line, has))],
    axes: [stepAxis(), axis("loss", "loss", 3, has.isLog), ...right.map((line) => axis(line.scale, line.title, 1, false, line.colour))],
    legend: { show: false },
    // An axis without numbers takes no place: the labels of the steps need it.
    padding: [18, hasRight ? 4 : 8 + 3.5 * whole(has.last).length, 0, hasLeft ? 0 : 12],
    cursor: { y: false, points: { size: 8 }, drag: { x: true, y: false, uni: 10, dist: 4 } },
    hooks: has.hooks,
  };
}

/** Draw marks at the bottom of a plot: where the loss is not finite. */
export function drawMarks(chart, steps) {
  const { left, top, width, height } = chart.bbox;
  const ratio = window.devicePixelRatio;
  chart.ctx.fillStyle = colour("--alarm");
  for (const step of steps) {
    const x = chart.valToPos(step, "x", true);
    if (x >= left && x <= left + width) chart.ctx.fillRect(x - ratio / 2, top + height - 9 * ratio, 1.5 * ratio, 9 * ratio);
  }
}

function seriesOptions({ title, colour: token, scale, kind, curve }, { isLine, isDense }) {
  const stroke = colour(token);
  const common = { label: title, scale, stroke };
  if (kind === "average") return { ...common, width: 2, points: { show: false } };
  // A learning rate is constant until it changes; between other measurements, a line is only a guide, with a gap where one is not finite.
  const guide = { ...common, width: 2, points: { show: () => curve.points()[0].length <= FEW, size: 6, fill: stroke } };
  if (kind === "rate") return { ...guide, paths: window.uPlot.paths.stepped({ align: 1 }) };
  if (kind === "measured") return guide;
  const alpha = kind === "faint" ? 0.28 : 1;
  if (isLine) return { ...common, alpha, width: 1.5, points: { show: false } };
  return { ...common, alpha, paths: () => null, points: { show: true, size: isDense ? 3 : 4.5, width: 0, fill: stroke, stroke } };
}

function stepAxis() {
  return { ...plainAxis("x", "step", 2), grid: { stroke: colour("--line"), width: 1 }, size: 32, space: 80, incrs: STRIDES };
}

function axis(scale, title, side, isLog, token = "--muted") {
  return {
    // The button above the plot has the whole name.
    ...plainAxis(scale, title.length > LONGEST_TITLE ? `${title.slice(0, LONGEST_TITLE - 1)}…` : title, side),
    stroke: colour(token),
    grid: { show: side === 3, stroke: colour("--line"), width: 1, filter: (chart, splits) => gridLines(chart, splits, isLog) },
    // uPlot adds up the distance of two lines: what remains of it at zero is rounding.
    values: (_, splits) => distinct(splits.map((split) => (split && Math.abs(split) < 1e-9 * (splits[1] - splits[0]) ? 0 : split)), 6),
    size: (_, values) => 14 + Math.max(14, ...(values ?? []).map((value) => widthOf(value))),
    filter: (chart, splits) => gridLines(chart, splits, isLog),
  };
}

// Numbers below 1e-24 are zero to uPlot.
function rangeOf(chart, low, high) {
  const unit = Math.max(Math.abs(low), Math.abs(high)) < 1e-9 ? 2 ** -100 : 1;
  return low === null ? [low, high] : window.uPlot.rangeNum(low / unit, high / unit, 0.1, true).map((end) => end * unit);
}

function widthOf(text) {
  ruler ??= document.createElement("canvas").getContext("2d");
  ruler.font = FONT;
  return ruler.measureText(text).width;
}

function plainAxis(scale, label, side) {
  return { scale, label, side, stroke: colour("--muted"), font: FONT, labelFont: FONT, labelSize: 20, gap: 6, ticks: { show: false } };
}

// A log axis has a line only where its label fits: 9, 5, 3 or 1 per decade, or 1 for every second decade, third, ...
function gridLines(chart, splits, isLog) {
  if (!isLog) return splits;
  const { min, max } = chart.scales.loss;
  const decades = Math.log10(max / min);
  const height = (chart.bbox.height / window.devicePixelRatio || chart.height) / decades; // pixels per decade
  const leading = decades > 3 ? [1] : (LEADING.find((each) => nearest(each) * height >= APART) ?? [1]);
  const every = Math.ceil(Math.max(decades / MOST_DECADES, APART / height));
  return splits.map((split) => {
    const power = Math.floor(Math.log10(split) + 1e-9);
    const isLeading = leading.includes(Math.round(split / 10 ** power));
    return isLeading && (leading.length > 1 || power % every === 0) ? split : null;
  });
}

// The distance of the nearest two numbers of a decade, in decades.
function nearest(leading) {
  return Math.min(...leading.map((number, place) => Math.log10((leading[place + 1] ?? 10) / number)));
}
