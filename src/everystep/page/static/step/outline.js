// The contents of an open step, in order: the phases of the chapter, or the segments of a user's loop.

const TITLES = {
  batch: "Batch",
  forward: "Forward",
  loss: "Loss",
  zero_grad: "Zero grad",
  backward: "Backward",
  update: "Update",
  other: "Other",
};
/** Sequences of segments that repeat at least so often are grouped. */
const REPEATED = 3;

/**
 * Return the entries of a step: {key, phase, title, number, label}, `key` as the address has it.
 *
 * Those of a loop have the segment's `place` in the content's list, its model or optimizer as `part`, its
 * parameters, and `count`, 1 for the first of its title. Those that repeat are one: {key, title, number,
 * label, passes}, a list of entries for each pass. Gradients that no optimizer used are `pending`,
 * parameters that something else wrote `changed`.
 */
export function outline(content) {
  return numbered([{ key: "batch", phase: "batch", title: TITLES.batch }, ...(content.segments ? ofLoop(content) : ofChapter(content))]);
}

/** Return the operations of an entry. */
export function operationsOf({ phase, place }, { operations, segments }) {
  if (place === undefined) return operations.filter((one) => one.phase === phase);
  return operations.slice(segments[place].first, segments[place].last + 1);
}

function ofChapter({ operations }) {
  const hasOthers = operations.some(({ phase }) => phase === "other");
  const phases = Object.keys(TITLES).filter((phase) => phase !== "batch" && (phase !== "other" || hasOthers));
  return phases.map((phase) => ({ key: phase, phase, title: TITLES[phase] }));
}

function ofLoop({ segments, changed_outside, gradients }) {
  const seen = new Map();
  const countOf = (name) => seen.set(name, (seen.get(name) ?? 0) + 1).get(name);
  const entries = segments.map(({ phase, part, parameters }, place) => {
    const title = [TITLES[phase], part].filter(Boolean).join(" · ");
    const ofPhase = countOf(phase);
    const key = ofPhase === 1 ? phase : `${phase}-${ofPhase}`;
    return { key, phase, title, place, part, parameters, count: countOf(`title ${title}`) };
  });
  const used = new Set(segments.flatMap(({ parameters }) => parameters));
  const pending = gradients.map(({ parameter }) => parameter).filter((parameter) => !used.has(parameter));
  const rest = [
    ...(pending.length ? [{ key: "gradients", title: "Gradients", pending }] : []),
    ...(changed_outside.length ? [{ key: "changed", title: "Changed outside the updates", changed: changed_outside }] : []),
  ];
  return [...together(entries), ...rest];
}

function together(entries) {
  const found = [];
  let start = 0;
  while (start < entries.length) {
    const { period, count } = repetition(entries, start);
    if (count < REPEATED) found.push(entries[start]);
    else found.push(group(entries.slice(start, start + period * count), period));
    start += count < REPEATED ? 1 : period * count;
  }
  return found;
}

// Return the shortest repetition from a place on: the number of entries, and how often they repeat.
function repetition(entries, start) {
  for (let period = 1; start + REPEATED * period <= entries.length; period += 1) {
    let end = start + period;
    while (end < entries.length && entries[end].title === entries[end - period].title) end += 1;
    const count = Math.floor((end - start) / period);
    if (count >= REPEATED) return { period, count };
  }
  return { period: 1, count: 1 };
}

function group(entries, period) {
  const passes = [];
  for (let start = 0; start < entries.length; start += period) passes.push(entries.slice(start, start + period));
  const [first, ...others] = new Set(passes[0].map(({ title }) => title));
  const names = [first, ...others.map((title) => title[0].toLowerCase() + title.slice(1))];
  return { key: `${entries[0].key}-repeated`, title: `${names.join(", ")} × ${passes.length}`, passes };
}

// Segments of a loop may have the same title: their numbers tell them apart.
function numbered(entries) {
  return entries.map((entry, number) => {
    const isOfLoop = entry.place !== undefined || entry.passes;
    return { ...entry, number: number || "", label: isOfLoop ? `${number} ${entry.title}` : entry.title };
  });
}
