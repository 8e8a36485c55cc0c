// The open step of a saved report: it is in the address (`report.html#step=137`), and Back works.

/** Return the step, or null. */
export function chosenStep() {
  const [, digits] = /^#step=(\d{1,15})$/u.exec(location.hash) ?? [];
  return digits ? Number(digits) : null;
}

/** Open a step. */
export function choose(step) {
  location.hash = `step=${step}`;
}

/** Call `changed(step)` whenever another step is opened. */
export function onChosen(changed) {
  window.addEventListener("hashchange", () => changed(chosenStep()));
}
