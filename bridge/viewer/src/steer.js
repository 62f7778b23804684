// Steering from a served page: a node is set to a value, and a fraction of the change is patched into the dense model.

import { h, number, percent, put, running, token } from "./dom.js";
import { jobOf } from "./model.js";

const unsteered = new Map(); // explanation id -> the dense model's continuation without a change

/** Return a prompt with a continuation of it. */
const continued = (name, prompt, text) => [
  h("small", {}, name),
  h("pre", {}, running(prompt, true), h("b", {}, running(text, true))),
];

/** Ask the server for the dense model's answer with a node set. Throws an Error with the server's reason if it refuses. */
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

/** Return the dense model's continuation without a change (at strength 0), requested once; null if the request fails. */
async function plainText(id, body) {
  if (!unsteered.has(id)) {
    const reply = await ask(id, { ...body, strength: 0 }).catch(() => null);
    if (reply) unsteered.set(id, reply.text ?? "");
  }
  return unsteered.get(id) ?? null;
}

/** Return the controls for a node; null if the page is not served. */
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
    `The node's new value in the sparse model; without a change it is ${number(node.activation)} here.`,
    -most,
    most,
    most / 100,
    -node.activation || most / 3,
  );
  const [strengthRow, strength] = range(
    "strength",
    "The fraction of the change in the sparse model that is patched into the dense model, from 0 to 1.",
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
        own !== null && continued("unsteered", explanation.prompt, own),
        h("p", { class: "stale-note" }, "The sliders have changed; this is the result for their earlier values."),
      );
    } catch (error) {
      put(result, h("p", { class: "problem" }, `Not steered: ${error.message}`));
    }
    button.disabled = false;
  });
  return h("section", { class: "steer" }, h("h3", {}, "Steer"), valueRow, strengthRow, button, result);
}
