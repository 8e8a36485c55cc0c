// The heading of an open step.

import { copyMark } from "../shared/copy.js";
import { element } from "../shared/elements.js";
import { numberOf, short, whole } from "../shared/format.js";
import { fixed, setText, show } from "../shared/part.js";

/** Return the part with the step's number, its loss, and whether it matches the recording. */
export function heading() {
  const title = element("h2");
  const loss = element("span", { class: "loss-short" });
  const full = element("span", { class: "loss-full" });
  const exactness = element("p", { class: "exactness" });
  const settings = element("p", { class: "small muted" });
  const problems = element("div");
  const copying = copyMark(() => full.textContent, "copy the loss in full precision");
  const line = element("p", { class: "loss-line" }, element("span", { class: "what" }, "loss"), " ", loss, " ", full, copying);
  const node = element("header", { class: "step-heading" }, title, line, exactness, settings, problems);
  return fixed(node, (content) => {
    const { step, steps, loss_text, epoch, hyperparameters, batch } = content;
    setText(title, `Step ${whole(step)} of ${whole(steps)}`);
    const isFinite = !content.has_loss || Number.isFinite(numberOf(content.loss));
    setText(loss, content.has_loss ? short(content.loss) : "not logged");
    setText(full, content.has_loss ? (isFinite ? loss_text : "not finite") : "");
    show(copying, content.has_loss && isFinite);
    loss.classList.toggle("nonfinite", !isFinite);
    exactness.className = content.is_exact ? "exactness small muted" : "exactness alarm";
    setText(exactness, exactnessText(content));
    const listed = Object.entries(hyperparameters).map(([name, value]) => `${name} ${short(value, 8)}`);
    setText(settings, [...(batch.rows ? [`Epoch ${whole(epoch + 1)}`] : []), ...listed].join(" · "));
    problems.replaceChildren(...content.problems.map((text) => element("p", { class: "alarm" }, text)));
  });
}

function exactnessText(content) {
  const { is_exact, is_of_loop, has_loss, is_computed, diverged_at, loss_text, recorded_loss_text } = content;
  const how = is_of_loop ? "without the code of your loop" : "without your code";
  if (is_exact && !has_loss) return `Replayed ${how}. Without losses, only Verify can tell whether it matches the recording.`;
  if (is_exact && !is_computed) return `Replayed ${how}. No operation computes the loss, so only Verify can tell whether it matches the recording.`;
  if (is_exact) return `Replayed ${how}, bit-identical.`;
  const here = !has_loss
    ? `step ${whole(diverged_at)} differs`
    : loss_text === recorded_loss_text
      ? `this loss matches, but step ${whole(diverged_at)} differs`
      : `replayed loss ${loss_text}, recorded ${recorded_loss_text}`;
  return `Does not match the recording (replayed ${how}): ${here}. Steps from ${whole(diverged_at)} on are not the original.`;
}
