// Steering from the page, when it is served: a node is set to a value, the change carried into the dense model at a strength.

import { h, number, percent, put, running, token } from "./dom.js";
import { jobOf } from "./job.js";

/** The controls for a node. */
export function drawSteer(model, node) {
  const id = jobOf(model.data);
  if (!id) return null;
  const { explanation } = model;
  const most = Math.max(1, 3 * Math.abs(node.activation), 3 * Math.abs(node.mean));
  const range = (name, min, max, step, value) => {
    const shown = h("output", {}, number(value));
    const input = h("input", {
      type: "range",
      min,
      max,
      step,
      value,
      "aria-label": name,
      oninput: () => (shown.textContent = number(Number(input.value))),
    });
    return [h("label", {}, h("span", {}, name), input, shown), input];
  };
  const [valueRow, value] = range("set to", -most, most, most / 100, -node.activation || most / 3);
  const [strengthRow, strength] = range("strength", 0, 1, 0.05, 1);
  const result = h("div", { class: "steered", "aria-live": "polite" });
  const button = h("button", { type: "button", class: "primary" }, "Steer the dense model");
  button.addEventListener("click", async () => {
    button.disabled = true;
    put(result, h("p", { class: "quiet" }, "running"));
    try {
      const answer = await fetch(`/api/explanations/${encodeURIComponent(id)}/steer`, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ node: node.id, value: Number(value.value), strength: Number(strength.value) }),
      });
      const told = await answer.json();
      if (!answer.ok)
        throw new Error(typeof told.detail === "string" ? told.detail : (told.error ?? `the server answered ${answer.status}`));
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
        line(explanation.target, told.probability_target, "for"),
        line(explanation.contrast, told.probability_contrast, "against"),
        h(
          "p",
          { class: "chips" },
          told.dense
            .slice(0, 5)
            .map((each) => h("span", { class: "chip" }, token(each.token.text), h("small", {}, percent(each.probability)))),
        ),
        h("pre", {}, running(explanation.prompt, true), h("b", {}, running(told.text ?? "", true))),
      );
    } catch (error) {
      put(result, h("p", { class: "problem" }, `Not steered: ${error.message}`));
    }
    button.disabled = false;
  });
  return h(
    "section",
    { class: "steer" },
    h("h3", {}, "Steer", h("small", {}, `it is ${number(node.activation)} here`)),
    valueRow,
    strengthRow,
    button,
    result,
  );
}
