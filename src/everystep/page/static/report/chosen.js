// Which step of a saved report is looked at: its address says so (`report.html#step=137`), and Back works.

/** Return the step, null where there is none. */
export function chosenStep() {
  const [, digits] = /^#step=(\d{1,15})$/u.exec(location.hash) ?? [];
  return digits ? Number(digits) : null;
}

/** Look at a step. */
export function choose(step) {
  location.hash = `step=${step}`;
}

/** Call `changed(step)` whenever another step is looked at. */
export function onChosen(changed) {
  window.addEventListener("hashchange", () => changed(chosenStep()));
}
