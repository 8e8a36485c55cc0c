// Pointer, wheel and keys on a heat map.

const STEP = 1.6;

/** Make a heat map movable; return a function that stops. */
export function handle(map) {
  const { canvas } = map;
  const listeners = {
    ...pointerListeners(map),
    dblclick: () => map.reset(),
    blur: ({ relatedTarget }) => isAway(map, relatedTarget) && map.point(null),
    wheel(event) {
      // The wheel scrolls the page until the map was clicked, or two fingers pinch it.
      if (document.activeElement !== canvas && !event.ctrlKey) return;
      if (event.deltaY > 0 && map.extract.isWhole) return;
      event.preventDefault();
      map.zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.002)), event.offsetX, event.offsetY);
    },
    keydown(event) {
      if (event.altKey || event.ctrlKey || event.metaKey || !press(map, event)) return;
      event.preventDefault();
      event.stopPropagation();
    },
  };
  const ended = new AbortController();
  for (const [name, listener] of Object.entries(listeners)) {
    const hear = (event) => map.extract && listener(event); // nothing to move before the numbers are loaded
    canvas.addEventListener(name, hear, { passive: false, signal: ended.signal });
  }
  // Keep the cell while the pointer moves to the button that copies its number.
  const left = (event) => map.extract && event.pointerType === "mouse" && !map.node.contains(document.activeElement) && map.point(null);
  map.node.addEventListener("pointerleave", left, { signal: ended.signal });
  map.node.addEventListener("focusout", ({ relatedTarget }) => map.extract && isAway(map, relatedTarget) && map.point(null), { signal: ended.signal });
  return () => ended.abort();
}

function isAway(map, target) {
  return !map.node.contains(target);
}

function pointerListeners(map) {
  const { canvas } = map;
  const pointers = new Map();
  let moved = 0;
  return {
    pointerdown(event) {
      pointers.set(event.pointerId, [event.offsetX, event.offsetY]);
      moved = 0;
      if (!map.extract.isWhole) canvas.setPointerCapture(event.pointerId);
    },
    pointermove(event) {
      const now = [event.offsetX, event.offsetY];
      const before = pointers.get(event.pointerId);
      if (!before) return map.point(map.extract.at(...now));
      if (pointers.size === 2) pinch(map, [...pointers].find(([id]) => id !== event.pointerId)[1], before, now);
      else if (!map.extract.isWhole) map.pan(now[0] - before[0], now[1] - before[1]);
      moved += Math.abs(now[0] - before[0]) + Math.abs(now[1] - before[1]);
      pointers.set(event.pointerId, now);
    },
    pointerup(event) {
      pointers.delete(event.pointerId);
      const cell = map.extract.at(event.offsetX, event.offsetY);
      if (moved < 4 || event.pointerType === "mouse") map.point(cell);
      if (moved < 4) map.choose(cell);
    },
    pointercancel: (event) => pointers.delete(event.pointerId),
    pointerleave(event) {
      if (!canvas.hasPointerCapture(event.pointerId)) pointers.delete(event.pointerId);
      if (event.pointerType === "mouse" && isAway(map, event.relatedTarget) && document.activeElement !== canvas) map.point(null);
    },
  };
}

function press(map, { key, shiftKey }) {
  const far = shiftKey ? 10 : 1;
  const moves = {
    ArrowUp: [-far, 0],
    ArrowDown: [far, 0],
    ArrowLeft: [0, -far],
    ArrowRight: [0, far],
    Home: [0, -Infinity],
    End: [0, Infinity],
  };
  if (moves[key]) move(map, moves[key]);
  else if (key === "+" || key === "=") map.zoom(STEP);
  else if (key === "-") map.zoom(1 / STEP);
  else if (key === "0") map.reset();
  else if (key === "Enter" && map.cursor) map.choose(map.cursor);
  else if (key === "PageUp" || key === "PageDown") map.slices.move(key === "PageUp" ? -1 : 1);
  else return false;
  return true;
}

// The cursor moves between drawn cells, and scrolls the map.
function move(map, [down, right]) {
  const { rows, columns } = map.extract;
  const [high, wide] = map.block;
  const { rows: [top], columns: [left] } = map.extract.seen();
  const within = (value, length) => Math.min(Math.max(value, 0), length - 1);
  const isFirst = !map.cursor && Number.isFinite(right); // it starts at the first cell
  const [row, column] = map.cursor ?? [top, left];
  const next = isFirst ? [row, column] : [row + down * high, column + right * wide];
  map.point([within(next[0], rows), within(next[1], columns)], true);
}

function pinch(map, other, before, now) {
  const apart = ([x, y]) => Math.hypot(x - other[0], y - other[1]) || 1;
  const middle = [(now[0] + other[0]) / 2, (now[1] + other[1]) / 2];
  map.zoom(apart(now) / apart(before), ...middle);
}
