// The plot of the loss, by uPlot, of the numbers that the table holds.
(() => {
  "use strict";

  const find = (selector) => document.querySelector(selector);
  const plot = find(".plot");
  const toggles = find(".toggles");
  const readout = find(".readout");
  const data = JSON.parse(find(".everystep-table script.rows").textContent);
  const steps = data.columns[0];
  const series = data.titles.slice(1).map((title, index) => ({
    title,
    texts: data.columns[index + 1],
    numbers: data.columns[index + 1].map((text) => (text === "" ? null : Number(text.replace("inf", "Infinity")))),
    colour: `--series-${index % 5}`,
    // What is a loss shares the axis of the loss; everything else has an axis of its own, on the right.
    scale: index === 0 || title.endsWith("loss") ? "loss" : `measured ${index}`,
    shown: index === 0 || title.endsWith("loss"),
  }));
  const isRate = (one) => /^lr(\[|$)/.test(one.title);
  const nonfinite = steps.filter((_, row) => series[0].texts[row] !== "" && !Number.isFinite(series[0].numbers[row]));
  const narrow = window.matchMedia("(max-width: 30rem)").matches;
  const first = series.find((one) => !one.shown && !isRate(one));
  if (first && !narrow) first.shown = true;

  let isLog = false;
  let range = null; // of steps, where zoomed
  let at = null; // row under the cursor
  let chart = null;

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const short = (number) => {
    const rounded = Number(number.toPrecision(4));
    const size = Math.abs(rounded);
    return size !== 0 && (size >= 1e5 || size < 1e-4) ? rounded.toExponential() : String(rounded);
  };
  const fits = (number, one) => Number.isFinite(number) && !(isLog && one.scale === "loss" && number <= 0);
  const size = () => ({
    width: plot.clientWidth,
    height: Math.round(Math.min(440, Math.max(260, plot.clientWidth * 0.56))),
  });

  const button = (text, pressed, press) => {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = text;
    made.setAttribute("aria-pressed", pressed);
    made.addEventListener("click", () => {
      made.setAttribute("aria-pressed", press());
      build();
    });
    toggles.append(made);
    return made;
  };

  const seriesOptions = (one) => {
    const stroke = colour(one.colour);
    if (one !== series[0]) {
      // A learning rate stays until it is changed; between other measurements a line is but a guide.
      const paths = isRate(one) ? { paths: uPlot.paths.stepped({ align: 1 }) } : {};
      return { scale: one.scale, show: one.shown, stroke, width: 2, spanGaps: true, points: { show: false }, ...paths };
    }
    const points = { show: true, size: steps.length > 3000 ? 3 : 4.5, width: 0, fill: stroke, stroke };
    return { scale: one.scale, show: one.shown, stroke, paths: () => null, points };
  };

  // Over many decades a log axis has a line for each of them, and no more.
  const gridLines = (u, splits) => {
    const { min, max } = u.scales.loss;
    if (!isLog || max < 1000 * min) return splits;
    return splits.map((split) => (Math.abs(Math.log10(split) % 1) < 1e-6 ? split : null));
  };

  const axis = (one, side) => ({
    scale: one ? one.scale : "x",
    side,
    stroke: one && side === 1 ? colour(one.colour) : colour("--muted"),
    font: "12px system-ui, sans-serif",
    labelFont: "12px system-ui, sans-serif",
    labelSize: 20,
    label: one ? one.title : "step",
    gap: 6,
    grid: { show: side !== 1, stroke: colour("--line"), width: 1, ...(one && { filter: gridLines }) },
    ticks: { show: false },
    ...(!one && { size: 32, space: 80 }),
    ...(one && {
      values: (_, splits) => splits.map((split) => (split === null ? null : short(split))),
      size: (_, values) => 12 + 7 * Math.max(2, ...(values ?? []).map((value) => (value ?? "").length)),
    }),
  });

  // Marks at the bottom where the loss is not finite.
  const drawNonfinite = (u) => {
    const { left, top, width, height } = u.bbox;
    const ratio = window.devicePixelRatio;
    u.ctx.fillStyle = colour("--alarm");
    for (const step of nonfinite) {
      const x = u.valToPos(step, "x", true);
      if (x >= left && x <= left + width) u.ctx.fillRect(x - ratio / 2, top + height - 9 * ratio, 1.5 * ratio, 9 * ratio);
    }
  };

  const hint = () => {
    const said = ["Drag to zoom, double-click to reset; arrow keys move between steps."];
    const left = isLog ? series[0].numbers.filter((number) => number !== null && number <= 0).length : 0;
    if (left) said.push(`The log axis omits ${left.toLocaleString("en")} values of 0 or less.`);
    if (nonfinite.length) said.push("Losses that are not finite are marked at the bottom.");
    readout.textContent = said.join(" ");
  };

  const show = (row) => {
    at = row;
    if (row === null) return hint();
    const parts = [["step", steps[row].toLocaleString("en")]];
    for (const one of series) if (one.texts[row] !== "") parts.push([one.title, one.texts[row]]);
    readout.replaceChildren(...parts.map(([title, text]) => {
      const span = document.createElement("span");
      const bold = document.createElement("b");
      bold.textContent = text;
      span.append(`${title} `, bold);
      return span;
    }));
    plot.setAttribute("aria-valuenow", steps[row]);
    plot.setAttribute("aria-valuetext", parts.map((part) => part.join(" ")).join(", "));
  };

  const build = () => {
    chart?.destroy();
    const right = series.filter((one) => one.shown && one.scale !== "loss");
    const scales = { x: { time: false }, loss: { distr: isLog ? 3 : 1 } };
    if (range) scales.x.range = (_, low, high) => [low, high];
    const options = {
      ...size(),
      scales,
      series: [{}, ...series.map(seriesOptions)],
      axes: [axis(null, 2), axis(series[0], 3), ...right.map((one) => axis(one, 1))],
      legend: { show: false },
      padding: [8, right.length ? 4 : 12, 0, 0],
      cursor: { y: false, points: { size: 8 }, drag: { x: true, y: false, uni: 10 } },
      hooks: {
        draw: [drawNonfinite],
        setCursor: [(u) => { if (u.cursor.event) show(u.cursor.idx ?? null); }],
        setScale: [(u, scale) => {
          if (scale !== "x") return;
          const { min, max } = u.scales.x;
          range = min > steps[0] || max < steps.at(-1) ? [min, max] : null;
          reset.hidden = range === null;
        }],
      },
    };
    const columns = series.map((one) => one.numbers.map((number) => (fits(number, one) ? number : null)));
    const zoomed = range;
    chart = new uPlot(options, [steps, ...columns], plot);
    if (zoomed) chart.setScale("x", { min: zoomed[0], max: zoomed[1] });
    chart.over.addEventListener("mouseleave", () => show(null));
    hint();
  };

  const whole = () => chart.setScale("x", { min: steps[0], max: steps.at(-1) });

  const walkTo = (row) => {
    show(Math.max(0, Math.min(steps.length - 1, row)));
    const { min, max } = chart.scales.x;
    const step = steps[at];
    if (step < min || step > max) {
      const half = (max - min) / 2;
      const middle = Math.max(steps[0] + half, Math.min(steps.at(-1) - half, step));
      chart.setScale("x", { min: middle - half, max: middle + half });
    }
    chart.setCursor({ left: chart.valToPos(step, "x"), top: 0 });
  };

  const keys = {
    ArrowLeft: (stride) => walkTo((at ?? steps.length) - stride),
    ArrowRight: (stride) => walkTo((at ?? -1) + stride),
    Home: () => walkTo(0),
    End: () => walkTo(steps.length - 1),
    Escape: () => whole(),
  };

  if (series.length > 1) {
    for (const one of series) {
      button(one.title, one.shown, () => (one.shown = !one.shown)).style.setProperty("--swatch", `var(${one.colour})`);
    }
  }
  button("log axis", isLog, () => (isLog = !isLog));
  const reset = document.createElement("button");
  Object.assign(reset, { type: "button", textContent: "whole run", className: "reset", hidden: true });
  reset.addEventListener("click", whole);
  toggles.append(reset);

  plot.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || !(event.key in keys)) return;
    event.preventDefault();
    keys[event.key](event.shiftKey ? 10 : 1);
  });
  new ResizeObserver(() => chart && chart.width !== plot.clientWidth && chart.setSize(size())).observe(plot);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => build());
  window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => (one.open = true)));
  build();
})();
