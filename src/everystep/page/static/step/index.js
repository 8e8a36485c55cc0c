// The contents of a step: the list stays visible, and marks the current section.

import { element } from "../shared/elements.js";
import { fixed } from "../shared/part.js";

/** Return the part that lists sections. */
export function index(sections) {
  const links = new Map(
    sections.map(({ node, entry: { key, label } }) => [node, element("a", { href: `#phase-${key}`, "data-phase": key }, label)]),
  );
  const node = element("nav", { class: "phases", "aria-label": "phases of the step" }, ...links.values());
  const seen = new Set();
  let current;
  const watching = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) seen[isIntersecting ? "add" : "delete"](target);
      choose();
    },
    { rootMargin: "-20% 0px -60% 0px" },
  );
  sections.forEach((section) => watching.observe(section.node));
  addEventListener("scroll", choose, { passive: true });

  // At the end of the page, the last section is the current one.
  function choose() {
    const isAtEnd = scrollY > 0 && innerHeight + scrollY >= document.documentElement.scrollHeight - 2;
    const now = isAtEnd ? sections.at(-1).node : sections.find(({ node }) => seen.has(node))?.node;
    if (now !== current) mark(links.get(current), links.get((current = now)));
  }

  function mark(before, link) {
    before?.removeAttribute("aria-current");
    if (!link) return;
    link.setAttribute("aria-current", "true");
    // The list of a long step can be wider than the page.
    node.scrollLeft = link.offsetLeft - node.offsetLeft - (node.clientWidth - link.offsetWidth) / 2;
  }

  const close = () => {
    watching.disconnect();
    removeEventListener("scroll", choose);
  };
  return { ...fixed(node), close };
}
