// Making elements. Texts are always text, never markup: names and messages come from runs.

/** Return an element. `properties`: properties by name, and attributes (aria-*, data-*, role, ...). */
export function element(name, properties = {}, ...children) {
  return furnish(document.createElement(name), properties, children);
}

/** Return an element of SVG. */
export function drawing(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

/** Return an icon of lines; `path`: on 16 by 16 pixels. */
export function icon(path, properties = {}) {
  return drawing("svg", { viewBox: "0 0 16 16", width: 14, height: 14, "aria-hidden": "true", ...properties }, drawing("path", { d: path }));
}

/** Return a button with a text. */
export function button(text, press, properties = {}) {
  return element("button", { type: "button", ...properties, onclick: press }, text);
}

/** Return terms and their descriptions: what is in a `dl`. */
export function described(pairs) {
  return pairs.flatMap(([term, ...description]) => [element("dt", {}, term), element("dd", {}, ...description)]);
}

/** Show a text, or hide its node if there is none. */
export function showText(node, text) {
  node.textContent = text;
  node.hidden = !text;
}

function furnish(made, properties, children) {
  for (const [key, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (key === "class") made.className = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key in made && !key.includes("-")) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}
