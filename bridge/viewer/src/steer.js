// Steering from the page, when it is served: a node is set to a value, the change patched into the dense model at a strength.

import { h, number, percent, put, running, token } from "./dom.js";
import { jobOf } from "./model.js";

const unsteered = new Map(); // what the dense model writes without a change, by explanation

/** A prompt and how it goes on. */
const continued = (name, prompt, text) => [
  h("small", {}, name),
  h("pre", {}, running(prompt, true), h("b", {}, running(text, true))),
];

/** Ask the server what the dense model does with a node set. Raises Error with its reason. */
async function ask(id, body) {
  const answer = await fetch(`/api/explanations/${encodeURIComponent(id)}/steer`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
  const reply = await answer.json();
  if (!answer.ok)
    throw new Error(typeof reply.detail === "string" ? reply.detail : (reply.error ?? `the server answered ${answer.status}`));
  return reply;
}

/** How the dense model goes on by itself: at strength 0, asked for once; null where the server does not tell. */
async function plainText(id, body) {
  if (!unsteered.has(id)) {
    const reply = await ask(id, { ...body, strength: 0 }).catch(() => null);
    if (reply) unsteered.set(id, reply.text ?? "");
  }
  return unsteered.get(id) ?? null;
}

/** The controls for a node. */
export function drawSteer(model, node) {
  const id = jobOf(model.data);
  if (!id) return null;
  const { explanation } = model;
  const most = Math.max(1, 3 * Math.abs(node.activation), 3 * Math.abs(node.mean));
  const range = (name, what, min, max, step, value) => {
    const shown = h("output", {}, number(value));
    const input = h("input", {
      type: "range",
      min,
      max,
      step,
      value,
      "aria-label": name,
      oninput: () => {
        shown.textContent = number(Number(input.value));
        result.classList.toggle("stale", Boolean(result.childElementCount));
      },
    });
    return [[h("label", {}, h("span", {}, name), input, shown), h("p", { class: "row-text quiet" }, what)], input];
  };
  const result = h("div", { class: "steered", "aria-live": "polite" });
  const [valueRow, value] = range(
    "set to",
    `The node's value in the sparse model; without a change it is ${number(node.activation)} here.`,
    -most,
    most,
    most / 100,
    -node.activation || most / 3,
  );
  const [strengthRow, strength] = range(
    "strength",
    "How much of what this changes in the sparse model is added to the dense one: 0 nothing, 1 all.",
    0,
    1,
    0.05,
    1,
  );
  const button = h("button", { type: "button", class: "primary" }, "Steer the dense model");
  button.addEventListener("click", async () => {
    button.disabled = true;
    result.classList.remove("stale");
    put(result, h("p", { class: "quiet" }, "running"));
    try {
      const body = { node: node.id, value: Number(value.value), strength: Number(strength.value) };
      const reply = await ask(id, body);
      const own = await plainText(id, body);
      const before = (id) => explanation.dense.find((each) => each.token.id === id)?.probability;
      const line = (which, now, name) =>
        h(
          "p",
          {},
          token(which.text, name),
          ` ${before(which.id) === undefined ? "" : `${percent(before(which.id))} → `}`,
          h("b", {}, percent(now)),
        );
      put(
        result,
        line(explanation.answer, reply.probability_target, "for"),
        explanation.contrast && line(explanation.contrast, reply.probability_contrast, "against"),
        h(
          "p",
          { class: "chips" },
          reply.dense
            .slice(0, 5)
            .map((each) => h("span", { class: "chip" }, token(each.token.text), h("small", {}, percent(each.probability)))),
        ),
        continued("steered", explanation.prompt, reply.text ?? ""),
        own !== null && continued("by itself", explanation.prompt, own),
        h("p", { class: "stale-note" }, "The sliders have moved since: this is of their earlier places."),
      );
    } catch (error) {
      put(result, h("p", { class: "problem" }, `Not steered: ${error.message}`));
    }
    button.disabled = false;
  });
  return h("section", { class: "steer" }, h("h3", {}, "Steer"), valueRow, strengthRow, button, result);
}
