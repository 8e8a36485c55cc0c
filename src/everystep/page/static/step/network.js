// The network, layer by layer, with the shapes between them and the details of the chosen layer.

import { element } from "../shared/elements.js";
import { shapeText, whole } from "../shared/format.js";
import { reference } from "./mathematics.js";
import { fixed, rebuilt } from "../shared/part.js";
import { tensorRow } from "../tensor/tensor.js";

const LIST = { class: "layers", tabIndex: 0, "aria-label": "the network, layer by layer" };
/** Default values of settings. */
const USUAL = [
  "bias=True",
  "inplace=False",
  "stride=\\(1, 1\\)",
  "dilation=1",
  "ceil_mode=False",
  "(?:elementwise_)?affine=True",
  "track_running_stats=True",
];
/** Below this width, layers are in one column. */
const NARROW = 520;
/** The maximum number of lines of layers from left to right. */
const LINES = 4;

/** Return the part that draws the network; part: the model's name, if a step has several. */
export function network(view, { part = null } = {}) {
  const node = element("div", { class: "network" });
  const structureOf = (content) => [
    layersOf(content, part).map(({ activation, ...layer }) => layer),
    content.loss_function,
    content.batch.tensors.slice(0, 1).map(({ name, tensor }) => [name, content.tensors[tensor].shape]),
  ];
  return rebuilt(node, structureOf, (content) => (layersOf(content, part).length ? diagram(view, content, part) : []));
}

function layersOf({ network }, part) {
  return part === null ? network : network.filter(({ path }) => path === part || path.startsWith(`${part}.`));
}

function diagram(view, content, part) {
  const buttons = new Map();
  const detail = layerDetail(view, part, buttons);
  const choose = (key) => {
    const isOpen = isChosen(view, part, key);
    for (const of of buttons.keys()) view.opened.delete(keyOfLayer(part, of));
    if (!isOpen) view.opened.add(keyOfLayer(part, key));
    detail.update(view.content);
    view.unfolded();
  };
  const shown = layersOf(content, part);
  const layers = shown.map((layer, place) => {
    const key = `${place} ${layer.path}`;
    const button = layerButton(layer, () => choose(key));
    for (const [name, isOver] of Object.entries({ pointerenter: true, focus: true, pointerleave: false, blur: false })) {
      button.addEventListener(name, () => view.highlight(isOver ? [...layer.operations, ...layer.backward] : []));
    }
    buttons.set(key, button);
    const isFollowed = shown[place + 1]?.follows ?? true;
    const item = element("li", { class: "layer" }, button, isFollowed ? flow(layer.output) : apart());
    item.style.setProperty("--depth", layer.depth);
    return item;
  });
  return [drawn(element("ol", LIST, given(content, shown), ...layers, end(content))), detail];
}

// A loop may pass anything to a model: only a step of the chapter begins with the batch and ends with the loss.
function given({ tensors, batch, is_of_loop }, [{ input }]) {
  if (is_of_loop) return element("li", { class: "end" }, element("span", { class: "loss" }, "input"), flow(input));
  const [first] = batch.tensors;
  const name = element("span", { class: "name" }, element("i", {}, first?.name ?? "input"));
  return element("li", { class: "end" }, name, ...(first ? [flow(tensors[first.tensor].shape)] : []));
}

function end({ loss_function, is_of_loop }) {
  if (is_of_loop) return element("li", { class: "end" }, element("span", { class: "loss" }, "output"));
  return element("li", { class: "end" }, element("span", { class: "loss", title: loss_function.text }, loss_function.name));
}

// From left to right, in a few lines if there is room, else from top to bottom.
function drawn(list) {
  let width = null;
  const sized = new ResizeObserver(() => {
    if (list.clientWidth === width) return;
    width = list.clientWidth;
    list.classList.remove("down");
    list.classList.toggle("down", width < NARROW || list.scrollHeight > LINES * list.lastChild.offsetHeight);
  });
  sized.observe(list);
  return { ...fixed(list), close: () => sized.disconnect() };
}

function layerButton({ path, type, text, arguments: settingsAsPrinted }, press) {
  const settings = briefly(settingsAsPrinted);
  return element(
    "button",
    { type: "button", class: "box", title: text, onclick: press },
    element("span", {}, element("span", { class: "type" }, type), " ", element("span", { class: "path" }, path)),
    settings ? element("span", { class: "settings" }, settings) : null,
  );
}

// The next layer does not use the output of this one: it begins another branch.
function apart() {
  return element("span", { class: "apart", title: "the next layer does not use this one's output" });
}

function flow(shape) {
  return element("span", { class: "flow" }, element("span", {}, shape ? shapeText(shape) : ""));
}

/** Return the settings of a layer, shorter than PyTorch prints them: `1,000 → 100`. */
function briefly(settings) {
  return settings
    .replace(/in_features=(\d+), out_features=(\d+)/, fromTo)
    .replace(/^(\d+), (\d+)(?=, kernel_size)/, fromTo)
    .replace(/kernel_size=\((\d+), (\d+)\)/, "$1×$2")
    .replace(new RegExp(`(, )?\\b(${USUAL.join("|")})`, "g"), "")
    .replace(/_/g, " ")
    .replace(/^, /, "");
}

function fromTo(_, from, to) {
  return `${whole(Number(from))} → ${whole(Number(to))}`;
}

// `buttons`: of the layers, by their keys.
function layerDetail(view, part, buttons) {
  const node = element("div", { class: "layer-detail" });
  const layerOf = (content) => layersOf(content, part).find(({ path }, place) => isChosen(view, part, `${place} ${path}`));
  const detail = rebuilt(node, (content) => layerOf(content) ?? null, (content) => {
    const layer = layerOf(content);
    return layer ? detailParts(view, layer, content) : [];
  });
  const update = (content) => {
    buttons.forEach((button, key) => button.setAttribute("aria-expanded", String(isChosen(view, part, key))));
    detail.update(content);
  };
  return { ...detail, update };
}

function isChosen(view, part, key) {
  return view.opened.has(keyOfLayer(part, key));
}

function keyOfLayer(part, key) {
  return `layer ${part ?? ""}/${key}`;
}

function detailParts(view, layer, { gradients }) {
  const { path, text, activation, parameters } = layer;
  const rows = [];
  if (activation) rows.push(tensorRow(view, { id: activation, name: "output" }));
  for (const [name, id] of Object.entries(parameters)) {
    rows.push(tensorRow(view, { id, name }));
    const whole = id.slice("parameters/".length);
    const gradient = gradients.find(({ parameter }) => parameter === whole);
    if (gradient) rows.push(tensorRow(view, { id: gradient.tensor, key: `layer ${gradient.tensor}`, name: `${name}.grad` }));
  }
  return [
    fixed(element("h4", {}, path ? `${path}: ` : null, element("code", {}, text))),
    fixed(element("p", { class: "small muted" }, ...passes(layer))),
    ...rows,
  ];
}

function passes({ operations, backward }) {
  const links = (title, numbers) => (numbers.length ? [title, ...numbers.flatMap((number) => [" ", reference(number)])] : []);
  const [forward, back] = [links("forward", operations), links("backward", backward)];
  if (!forward.length && !back.length) return ["no operations of its own: it only returns a view of its input"];
  return [...forward, forward.length && back.length ? " · " : "", ...back];
}
