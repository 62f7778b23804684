// How to read the page, its keys, and the licences of what it is made with.

import { h, put } from "./dom.js";

const KEYS = [
  ["/", "find a node"],
  ["← ↑ → ↓", "to the next group or node"],
  ["Enter", "open or close the group"],
  ["o", "open or close all groups"],
  ["Esc", "let go of what is chosen"],
  ["[ ]", "a smaller, a larger circuit"],
  ["1 2 3", "evidence, what is chosen, attention"],
  ["l", "label the node"],
  ["t", "light or dark"],
  ["?", "this help"],
];

const WORDS = [
  ["d", "the log-odds of the answer at the last token, in nats: against all other tokens, or against one"],
  ["span", "d of the dense model less d with every node and every error at its mean: what there is to explain"],
  ["F", "normalised faithfulness: 1 less the distance of d from the dense model's, as a share of the span"],
  ["KL", "how far the next-token probabilities are from the dense model's, in nats"],
  ["random supersets", "the circuit with random other nodes kept as well; what works only while all else is ablated fails there"],
  ["adversary", "the superset that is worst for F, by 20 sign steps; it bounds nothing"],
  ["left", "the share of the span that is left when the circuit alone is ablated"],
  ["ablated", "set to its mean over text"],
  [
    "error",
    "what the dense model has at a site and token beyond the sparse one; with all errors the sparse model gives the dense answer exactly",
  ],
  [
    "replacement, completeness",
    "shares of the paths from input to answer, and of the inputs of nodes, that flow through nodes rather than errors",
  ],
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
      "Tokens run from left to right, the computation from the embeddings below to the answer above. A node is a channel of the sparse model at one token. Nodes that do one job are drawn as a card; a click opens it into its nodes.",
    ),
    h(
      "p",
      {},
      "The numbers on a card are what d loses, in nats, when the group alone is ablated from the circuit, and what the dense model loses when its ablation is patched through the bridge; that of the sparse model with all its nodes, which is what is patched, is in its tip. An edge is as wide as what it adds to d, to first order. Blue supports the answer, orange works against it. Hatched cards are errors: what is unexplained.",
    ),
    h(
      "p",
      {},
      "The slider walks the nested circuits. A circuit is found in the sparse model; what holds there holds for the dense one only as far as the evidence on the dense model goes. The strongest verdict says support, never proof.",
    ),
    h("h2", {}, "Words"),
    pairs(WORDS),
    h("h2", {}, "Keys"),
    pairs(KEYS.map(([key, what]) => [key.split(" ").map((each) => h("kbd", {}, each)), what])),
    h("details", {}, h("summary", {}, "Licences"), h("pre", {}, licences)),
  );
}
