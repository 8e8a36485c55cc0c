// The shown runs, and their order.

import { compared, numberOf, short } from "../shared/format.js";

/** Settings to mark if a run differs from most others. */
export const COMPARED = ["optimizer", "lr", "batch_size"];

/** Return runs that contain a text, sorted, as {name, depth}; by name or time, forks are below their parents. */
export function arranged(runs, { key, direction }, text) {
  const wanted = text.trim().toLowerCase();
  const textOf = ({ name, status, optimizer, note, tags, config }) => [name, status, optimizer, note, ...(tags ?? []), JSON.stringify(config)].join(" ");
  const found = runs.filter((run) => textOf(run).toLowerCase().includes(wanted));
  const sign = direction === "ascending" ? 1 : -1;
  const ofValues = (a, b) => (typeof a === "string" && b !== null ? sign * byName(a, b) : compared(a, b, sign));
  const sorted = found.sort((a, b) => ofValues(valueOf(a, key), valueOf(b, key)) || byName(a.name, b.name));
  if (key !== "name" && key !== "started") return sorted.map(({ name }) => ({ name, depth: 0 }));
  return nested(sorted);
}

/** Return the value of each compared setting that more than half of the runs have, if there is one. */
export function usualOf(runs) {
  const usual = new Map();
  for (const key of COMPARED) {
    const counts = new Map();
    const known = runs.filter((run) => run.optimizer !== null);
    for (const run of known) counts.set(settingOf(run, key), (counts.get(settingOf(run, key)) ?? 0) + 1);
    for (const [value, count] of counts) if (2 * count > known.length && count < known.length) usual.set(key, value);
  }
  return usual;
}

/** Return a setting of a run; learning rates are a text. */
export function settingOf(run, key) {
  return key === "lr" ? (run.lr ?? []).map((rate) => short(rate, 8)).join(", ") : run[key];
}

function nested(runs) {
  const names = new Set(runs.map(({ name }) => name));
  const children = new Map([null, ...names].map((name) => [name, []]));
  for (const { name, parent } of runs) {
    const isBelow = parent && parent[0] !== name && names.has(parent[0]);
    children.get(isBelow ? parent[0] : null).push(name);
  }
  const found = [];
  const add = (parent, depth) => {
    for (const name of children.get(parent)) {
      found.push({ name, depth });
      add(name, depth + 1);
    }
  };
  add(null, 0);
  // Parents are names: since a run was renamed, two may be each other's.
  const listed = new Set(found.map(({ name }) => name));
  return [...found, ...runs.filter(({ name }) => !listed.has(name)).map(({ name }) => ({ name, depth: 0 }))];
}

function valueOf(run, key) {
  if (["last_loss", "steps", "batch_size", "seconds"].includes(key)) return run[key] === null ? null : numberOf(run[key]);
  if (key === "lr") return run.lr?.length ? run.lr[0] : null;
  if (key === "validation") return run.validation ? numberOf(run.validation.value) : null;
  if (key === "started") return run.started === null ? null : Date.parse(run.started);
  return run[key];
}

const { compare: byName } = new Intl.Collator("en", { numeric: true });
