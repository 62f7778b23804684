// The help dialog: how to read the page, its words and keys, and the licences of the packages that it contains.

import { h, put } from "./dom.js";

const KEYS = [
  ["/", "find a node"],
  ["← ↑ → ↓", "go to the next group or node"],
  ["Enter", "open or close the group"],
  ["o", "open or close all groups"],
  ["Esc", "clear the selection"],
  ["[ ]", "show a smaller or a larger circuit"],
  ["1 2 3", "show the evidence, the groups and nodes, the attention"],
  ["l", "label the selected node"],
  ["t", "switch between light and dark"],
  ["?", "show this help"],
];

const WORDS = [
  ["d", "log-odds of the answer after the last token, in nats, against all other tokens or against one other token"],
  ["span", "d in the dense model minus d with every node and every error at its mean: the amount to explain"],
  ["F", "normalised faithfulness: 1 minus the distance of d from the dense model's, as a share of the span"],
  ["KL", "KL divergence from the dense model's next-token distribution, in nats"],
  ["random supersets", "the circuit with random outside nodes kept as well; a circuit that works only in isolation fails there"],
  ["adversary", "lowest F that 20 sign steps on a mask over the outside nodes find; it has no bound"],
  ["left", "share of the span that is left when the circuit is ablated and all other nodes are kept"],
  ["ablated", "set to its mean over text"],
  [
    "error",
    "the part of the dense residual that the sparse model misses at a site and token; with all errors the sparse model gives the dense answer exactly",
  ],
  ["replacement", "share of the paths from input to answer, weighted by strength, that go through nodes rather than errors"],
  ["completeness", "share of what the nodes read, weighted by influence on the answer, that comes from nodes rather than errors"],
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
    h("h2", {}, "How to read this page"),
    h(
      "p",
      {},
      "Tokens run from left to right, and the computation runs from the embeddings at the bottom to the answer at the top. A node is a channel of the sparse model at one token. Nodes that do one job form a group, which is drawn as one card. Click a card to open it into its nodes.",
    ),
    h(
      "p",
      {},
      "A card shows two numbers, in nats. The first is the loss of d when the group alone is ablated from the circuit. For the second, the group is ablated from the sparse model with all its nodes, and this change is patched through the bridge: the number is the loss of d in the dense model. The tooltip of the card also gives the loss in the sparse model. The width of an edge shows what it adds to d, to first order. Blue supports the answer, orange opposes it. Hatched cards are errors, which the sparse model does not explain.",
    ),
    h(
      "p",
      {},
      "The slider selects one of the nested circuits. Circuits are found in the sparse model. A result about the sparse model holds for the dense model only if the evidence on the dense model supports it. The strongest verdict claims support, never proof.",
    ),
    h("h2", {}, "Words"),
    pairs(WORDS),
    h("h2", {}, "Keys"),
    pairs(KEYS.map(([key, what]) => [key.split(" ").map((each) => h("kbd", {}, each)), what])),
    h("details", {}, h("summary", {}, "Licences"), h("pre", {}, licences)),
  );
}
