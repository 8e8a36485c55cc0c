// Parts of an open step. A part is {node, update(content)[, close()]}: it is built once, and updated with the content of each step, so that
// numbers change and nothing moves.

import { element } from "./elements.js";

let unfoldings = 0;

/** Set the text of a node, if it changed. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Show or hide a node. */
export function show(node, isShown) {
  if (node.hidden === isShown) node.hidden = !isShown;
}

/** Unfold all ancestors of a node. */
export function unfoldAround(node) {
  for (let fold = node?.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
}

/** Return a part that is rebuilt only when the structure of what it shows changes. */
export function rebuilt(node, structureOf, build) {
  let structure = null;
  let parts = [];
  const close = () => parts.forEach((part) => part.close?.());
  const update = (content) => {
    const now = JSON.stringify(structureOf(content));
    if (now !== structure) {
      close();
      parts = build(content);
      node.replaceChildren(...parts.map((part) => part.node));
      structure = now;
    }
    for (const part of parts) part.update(content);
  };
  return { node, update, close };
}

/** Return a part that consists of others. */
export function composed(node, parts) {
  return {
    node,
    update: (content) => parts.forEach((part) => part.update(content)),
    close: () => parts.forEach((part) => part.close?.()),
  };
}

/** Return a part of fixed nodes. */
export function fixed(node, update = () => {}) {
  return { node, update };
}

/**
 * Return a part with a button (or a click next to it) that unfolds more below it.
 *
 * view: what is open stays open by its key from step to step; alongside: nodes, and parts that are updated with it; open(): the part below;
 * changed: called when the reader, not the address, has opened or closed it.
 */
export function unfolding(view, { key, name, alongside, className, open, update, changed = () => view.unfolded() }) {
  const id = `unfolding-${++unfoldings}`;
  const toggle = element("button", { type: "button", class: "unfold", "aria-expanded": "false" }, name);
  const parts = alongside.filter((each) => each?.update);
  const head = element("div", { class: "head" }, toggle, ...alongside.map((each) => each?.node ?? each));
  const node = element("div", { class: `unfolding ${className}` }, head);
  let inner = null;
  let content = null;

  const set = (isOpen) => {
    if (isOpen === Boolean(inner)) return;
    toggle.setAttribute("aria-expanded", String(isOpen));
    if (isOpen) {
      view.opened.add(key);
      inner = open();
      inner.node.id = id;
      toggle.setAttribute("aria-controls", id);
      node.append(inner.node);
      if (content) inner.update(content);
    } else {
      view.opened.delete(key);
      toggle.removeAttribute("aria-controls");
      inner.close?.();
      inner.node.remove();
      inner = null;
    }
  };
  head.addEventListener("click", (event) => {
    // Ignore a click that ends a text selection, or is on a link or another button.
    if (event.target.closest("a, .copying") || !getSelection().isCollapsed) return;
    set(!inner);
    changed(Boolean(inner));
  });
  return {
    node,
    toggle,
    set,
    isOpen: () => Boolean(inner),
    update(next) {
      content = next;
      update?.(next);
      parts.forEach((part) => part.update(next));
      const isWanted = view.opened.has(key);
      if (isWanted === Boolean(inner)) return inner?.update(next);
      set(isWanted);
      if (isWanted) unfoldAround(node);
    },
    close: () => [...parts, inner].forEach((part) => part?.close?.()),
  };
}
