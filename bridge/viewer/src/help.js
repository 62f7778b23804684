// How to read the page, its keys, and the licences of what it is made with.

import { h, put } from "./dom.js";

const KEYS = [
  ["/", "find a node"],
  ["← ↑ → ↓", "to the next node"],
  ["Enter", "to the node's sheet"],
  ["Esc", "let go of the node"],
  ["[ ]", "a smaller, a larger circuit"],
  ["1 2 3", "evidence, node, attention"],
  ["l", "label the node"],
  ["t", "light or dark"],
  ["?", "this help"],
];

/** Fill the dialog. */
export function makeHelp(dialog) {
  const licences = document.getElementById("licences").textContent;
  put(
    dialog,
    h("form", { method: "dialog" }, h("button", { "aria-label": "Close" }, "Close")),
    h("h2", {}, "How to read this"),
    h(
      "p",
      {},
      "D is the logit of the answer less that of the contrast. A node is a channel of the sparse model at one token. What is not in the circuit stands at its average over text.",
    ),
    h(
      "p",
      {},
      "A node's size and colour are its effect: what D loses when it alone is deleted from the circuit. Where that was not measured, the node is hollow, and its effect estimated from its edges. An edge's width and colour are what D owes to it. The strongest edges are drawn, and all that are known of the node under the pointer.",
    ),
    h(
      "p",
      {},
      "A circuit is found in the sparse model. What holds there holds for the dense one only as far as the evidence on the dense model goes: that is what the verdict says. The strongest verdict there is says support, never proof.",
    ),
    h("h2", {}, "Keys"),
    h(
      "dl",
      { class: "keys" },
      KEYS.map(([key, what]) => [
        h(
          "dt",
          {},
          key.split(" ").map((each) => h("kbd", {}, each)),
        ),
        h("dd", {}, what),
      ]),
    ),
    h("details", {}, h("summary", {}, "Licences"), h("pre", {}, licences)),
  );
}
