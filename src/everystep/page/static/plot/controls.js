// The buttons above a plot.

import { element, button } from "../shared/elements.js";
import { lineChooser } from "./chooser.js";

/** If there are more measurements than this, all except the first ones are in a list to search. */
const MOST = 6;

/**
 * Make the buttons; return {host, draw(lines, has)}.
 *
 * `does`: {line(line), remove(name) or null, isLine(), isLog(), weight(number), whole()}; `has`: {hasLoss, isLine, isLog, isZoomed}.
 */
export function plotControls(does) {
  const host = element("div", { class: "toggles", role: "group", "aria-label": "what the plot shows" });
  const smoothing = smoothingSlider(does.weight, does.smooth);
  const toggle = (text, isOn, press, title) => button(text, press, { "aria-pressed": String(isOn), title });
  const series = (line, index) => {
    const made = toggle(line.title, line.isShown, () => does.line(line));
    made.classList.add("series");
    made.disabled = Boolean(line.problem);
    made.title = line.problem ?? "";
    made.style.setProperty("--swatch", `var(${line.colour})`);
    if (!does.remove || index === 0 || line.curve.measurement !== null) return made;
    const label = `remove ${line.title} from the plot`;
    const remove = button("×", () => does.remove(line.curve.run), { title: label, "aria-label": label });
    return element("span", { class: "removable" }, made, remove);
  };
  const ofLoss = (isLine, isLog) => [
    toggle("line", isLine, does.isLine, "a line instead of points"),
    toggle("log axis", isLog, does.isLog, "a logarithmic axis for the loss (l)"),
    smoothing,
  ];
  const [ofLines, others] = ["", ""].map(() => element("div", { class: "loose" }));
  const chooser = lineChooser(does.line);
  host.append(ofLines, chooser.node, others);
  const placed = new Set(); // lines with a button: a chosen one keeps its button, so that it can be removed
  const draw = (lines, { hasLoss, isLine, isLog, isZoomed }) => {
    const listed = further(lines);
    lines.filter((line) => line.isShown || !listed.includes(line)).forEach((line) => placed.add(line));
    const buttons = () => [...ofLines.children, ...others.children].flatMap((each) => (each.matches("button") ? each : [...each.querySelectorAll("button")]));
    const focused = buttons().indexOf(document.activeElement);
    const shown = lines.length > 1 ? lines.filter((line) => placed.has(line)) : [];
    ofLines.replaceChildren(...shown.map((line) => series(line, lines.indexOf(line))).slice(hasLoss ? 0 : 1));
    chooser.update(listed);
    others.replaceChildren(
      ...(hasLoss ? ofLoss(isLine, isLog) : []),
      button("whole run", does.whole, { class: "plain reset", hidden: !isZoomed }),
    );
    if (focused >= 0) buttons()[focused]?.focus();
  };
  return { host, draw };
}

// The measurements in the list, if there are many.
function further(lines) {
  const measured = lines.filter(({ curve }) => curve.measurement !== null);
  return measured.length > MOST ? measured.slice(MOST - 1) : [];
}

function smoothingSlider(changed, first) {
  const label = "Exponential moving average of the points, corrected for its start; 0: none";
  const shown = element("output", {}, String(first));
  const change = ({ target }) => {
    shown.textContent = target.value;
    changed(Number(target.value));
  };
  const range = element("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: first, "data-own-keys": "", oninput: change });
  return element("label", { class: "smoothing", title: label }, "smoothing", range, shown);
}
