// The measurements of a plot that have no button: a list to search and choose from, over the plot.

import { element, button } from "../shared/elements.js";

/** Return a button that opens the list: {node, update(lines)}; `choose(line)`: called when one is shown or hidden. */
export function lineChooser(choose) {
  const opener = button("", () => show(panel.hidden), { "aria-expanded": "false" });
  const search = element("input", { type: "search", placeholder: "search", "aria-label": "search the measurements", autocomplete: "off", spellcheck: false });
  const list = element("ul");
  const none = element("p", { class: "muted small" }, "no measurement matches");
  const panel = element("div", { class: "further", role: "group", "aria-label": "more measurements", hidden: true }, search, none, list);
  const node = element("div", { class: "loose", hidden: true }, opener, panel);
  const items = new Map();

  function pressed({ target }) {
    if (!node.contains(target)) show(false);
  }

  function show(isOpen) {
    panel.hidden = !isOpen;
    if (isOpen) document.addEventListener("pointerdown", pressed);
    else document.removeEventListener("pointerdown", pressed);
    opener.setAttribute("aria-expanded", String(isOpen));
    if (isOpen) search.focus();
    else if (node.contains(document.activeElement)) opener.focus();
  }

  function filter() {
    const wanted = search.value.trim().toLowerCase();
    for (const [line, { item }] of items) item.hidden = !line.title.toLowerCase().includes(wanted);
    none.hidden = [...items.values()].some(({ item }) => !item.hidden);
  }

  function add(line) {
    const press = button(line.title, () => choose(line), { class: "series" });
    press.style.setProperty("--swatch", `var(${line.colour})`);
    const item = element("li", {}, press);
    items.set(line, { item, press });
    list.append(item);
  }

  search.addEventListener("input", filter);
  node.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || panel.hidden) return;
    event.preventDefault();
    show(false);
  });
  node.addEventListener("focusout", ({ relatedTarget }) => relatedTarget && !node.contains(relatedTarget) && show(false));

  const update = (lines) => {
    node.hidden = !lines.length;
    opener.textContent = `${lines.length} more`;
    lines.filter((line) => !items.has(line)).forEach(add);
    for (const [line, { press }] of items) press.setAttribute("aria-pressed", String(line.isShown));
    filter();
  };
  return { node, update };
}
