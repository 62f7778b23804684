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

const WORDS = [
  ["D", "the logit of the answer less that of the contrast, at the last token"],
  ["KL", "how far one model's next-token probabilities are from another's, in nats; 0 where they are the same"],
  ["random company", "the circuit with random other nodes beside it: what only works where all else is silent fails there"],
  [
    "steps of the slider",
    "smaller circuits within the circuit, each tried alone; a hollow mark misses the aims of KL and share of D",
  ],
  ["attn_in, mlp_in", "what a sublayer reads of the residual, normalized"],
  ["q, k, v", "queries, keys and values of the heads"],
  ["mlp_act", "neurons of the MLP"],
  ["attn_out, mlp_out", "what a sublayer writes to the residual"],
];

const pairs = (list) =>
  h(
    "dl",
    { class: "keys" },
    list.map(([name, what]) => [h("dt", {}, name), h("dd", {}, what)]),
  );

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
      "A node is a channel of the sparse model at one token. What is not in the circuit stands at its average over text.",
    ),
    h(
      "p",
      {},
      "A node's size and colour are its effect: what D loses when it alone is deleted from the circuit. Where that was not measured, the node is hollow, and its effect estimated from its edges; where no edge of it was kept, it is grey. An edge's width and colour are what D owes to it. The strongest edges are drawn, and all that were kept of the node under the pointer.",
    ),
    h(
      "p",
      {},
      "A circuit is found in the sparse model. What holds there holds for the dense one only as far as the evidence on the dense model goes: that is what the verdict says. The strongest verdict there is says support, never proof.",
    ),
    h("h2", {}, "Words"),
    pairs(WORDS),
    h("h2", {}, "Keys"),
    pairs(KEYS.map(([key, what]) => [key.split(" ").map((each) => h("kbd", {}, each)), what])),
    h("details", {}, h("summary", {}, "Licences"), h("pre", {}, licences)),
  );
}
