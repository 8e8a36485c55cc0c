// The appearance of the page: remembered by the browser, for all runs.

import { button, element } from "./elements.js";
import { closing, openDialog } from "./dialog.js";

const CHOICES = [
  { key: "theme", title: "Colours", values: [["system", "as the system"], ["light", "light"], ["dark", "dark"]] },
  { key: "size", title: "Size", values: [["normal", "normal"], ["large", "large, for a projector"]] },
  { key: "lines", title: "Lines of your code", values: [["shown", "shown"], ["hidden", "hidden"]] },
  { key: "operators", title: "Operator names (aten.mm)", values: [["hidden", "hidden"], ["shown", "shown"]] },
];
const DARK = "(prefers-color-scheme: dark)";

const chosen = Object.fromEntries(CHOICES.map(({ key, values }) => [key, remembered(key, values)]));
const watchers = new Set();

/** Call a function when colours or sizes change; return a function that stops. */
export function watchAppearance(changed) {
  watchers.add(changed);
  const system = window.matchMedia(DARK);
  system.addEventListener("change", changed);
  return () => {
    watchers.delete(changed);
    system.removeEventListener("change", changed);
  };
}

/** Apply the choices. */
export function applyAppearance() {
  const { theme, size, lines, operators } = chosen;
  Object.assign(document.documentElement.dataset, { size, lines, operators });
  document.documentElement.style.colorScheme = theme === "system" ? "" : theme;
  const media = { system: DARK, light: "not all", dark: "all" }[theme];
  for (const sheet of document.styleSheets) {
    for (const rule of sheet.cssRules) {
      if (rule.media && (rule.isOfDark ??= rule.media.mediaText === DARK)) rule.media.mediaText = media;
    }
  }
  watchers.forEach((changed) => changed());
}

/** Open the dialog of choices. */
export function openAppearance() {
  const content = element("div", { class: "appearance" }, ...CHOICES.map(choiceOf), closing());
  openDialog("Appearance", content);
}

function choiceOf({ key, title, values }) {
  const buttons = values.map(([value, text]) => button(text, () => choose(value), { "aria-pressed": String(chosen[key] === value) }));
  function choose(value) {
    chosen[key] = value;
    values.forEach(([each], place) => buttons[place].setAttribute("aria-pressed", String(each === value)));
    try {
      localStorage.setItem(`everystep ${key}`, value);
    } catch {
      // Choices apply even if the browser cannot store them.
    }
    applyAppearance();
  }
  return element("div", { class: "choice", role: "group", "aria-label": title }, element("p", { class: "small muted" }, title), ...buttons);
}

function remembered(key, values) {
  try {
    const found = localStorage.getItem(`everystep ${key}`);
    return values.some(([value]) => value === found) ? found : values[0][0];
  } catch {
    return values[0][0];
  }
}
