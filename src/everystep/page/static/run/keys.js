// The keys of a run's view.

/** Return bindings for keys.bind. */
export function runKeys(view) {
  const stride = ({ shiftKey }) => (shiftKey ? 10 : 1);
  return [
    { keys: ["ArrowLeft"], shown: "←", says: "the previous step; ten with Shift", press: (event) => view.walk(-stride(event)) },
    { keys: ["ArrowRight"], shown: "→", says: "the next step; ten with Shift", press: (event) => view.walk(stride(event)) },
    { keys: ["Home"], shown: "Home", says: "the first step", press: () => view.jump(1) },
    { keys: ["End"], shown: "End", says: "the last step; during training, the newest", press: () => view.jump(view.about.steps) },
    { keys: ["/"], shown: "/", says: "go to a step: 137, -1, +10", press: () => view.bar.focus() },
    { keys: ["p"], shown: "p", says: "play through the run, or pause", press: () => view.togglePlay() },
    { keys: ["l"], shown: "l", says: "logarithmic axis", press: () => view.plot.toggleLog() },
    { keys: ["f"], shown: "f", says: "fork from here", press: () => view.fork() },
    { keys: ["Escape"], shown: "Escape", says: "stop playing, or close the step", press: () => view.leave() },
  ];
}
