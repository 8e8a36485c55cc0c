// The message that the server is away; it disappears when the server is back.

import { element } from "./elements.js";

const PATIENCE = 1000; // milliseconds: a short break shows no message

/** Make the banner; return {host, tell(isThere), close()}. */
export function awayBanner() {
  const host = element("p", { class: "away", role: "status" });
  let timer = 0;
  const tell = (isThere) => {
    clearTimeout(timer);
    if (isThere) host.textContent = "";
    else timer = setTimeout(() => (host.textContent = "The server does not respond; trying again."), PATIENCE);
  };
  return { host, tell, close: () => clearTimeout(timer) };
}
