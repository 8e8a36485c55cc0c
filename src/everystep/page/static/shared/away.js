// Messages while an answer of the server is awaited, and while the server is away.

import { element } from "./elements.js";
import { ask } from "./server.js";

const PATIENCE = 1000; // milliseconds: a short break shows no message

/** Ask for what a view shows; until then it shows a message. Throws an error if the reader has left: a late view would change the title. */
export async function awaited(main, message, address) {
  const waiting = element("p", { class: "waiting muted" }, message);
  main.append(waiting);
  const found = await ask(address).finally(() => waiting.remove());
  if (!main.isConnected) throw new Error("another place is shown");
  return found;
}

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
