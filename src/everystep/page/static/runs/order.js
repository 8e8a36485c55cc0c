// The shown runs, and their order.

import { compared } from "../shared/format.js";
import { textOf, valueOf } from "./kinds.js";

/** Return runs that contain a text, sorted by a column, as {name, depth}; by name or time, forks are below their parents. */
export function arranged(runs, column, direction, text) {
  const wanted = text.trim().toLowerCase();
  const wordsOf = ({ name, status, optimizer, note, tags, config }) => [name, status, optimizer, note, ...(tags ?? []), JSON.stringify(config)].join(" ");
  const found = runs.filter((run) => wordsOf(run).toLowerCase().includes(wanted));
  const sign = direction === "ascending" ? 1 : -1;
  const ofValues = (a, b) => (typeof a === "string" && b !== null ? sign * byName(a, b) : compared(a, b, sign));
  const sorted = found.sort((a, b) => ofValues(valueOf(column, a), valueOf(column, b)) || byName(a.name, b.name));
  if (!["name", "time"].includes(column.kind)) return sorted.map(({ name }) => ({ name, depth: 0 }));
  return nested(sorted);
}

/** Return the text of each setting that more than half of the runs with this setting have, if there is one, by column. */
export function usualOf(runs, columns) {
  const usual = new Map();
  for (const column of columns.filter(({ is_setting: isSetting }) => isSetting)) {
    const counts = new Map();
    const known = runs.map((run) => textOf(column, run)).filter(Boolean);
    for (const text of known) counts.set(text, (counts.get(text) ?? 0) + 1);
    for (const [text, count] of counts) if (2 * count > known.length && count < known.length) usual.set(column, text);
  }
  return usual;
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

const { compare: byName } = new Intl.Collator("en", { numeric: true });
