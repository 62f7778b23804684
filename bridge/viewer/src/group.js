// The sheet of a group, and the list of all parts of the circuit: what they are, what ablating them does, what they are joined to.

import { h, nats, number, plainLabel, put, signed, token } from "./dom.js";
import { diverging, effectRow, nodeRow } from "./edges.js";
import { partsOf, sizeOf } from "./model.js";

const FIRST = 10;

const uniq = (list) => [...new Set(list)].sort((a, b) => a - b);

/** Sparse and dense effect as bars on one scale. */
export function effectBars(rows, scale) {
  return h(
    "dl",
    { class: "effects" },
    rows.map(([name, value]) => [
      h("dt", {}, name),
      h("dd", {}, diverging(value, scale), h("b", {}, value === null ? "not measured" : nats(value))),
    ]),
  );
}

/** A group, an error or what a larger circuit adds. */
export function drawPart(model, sheet, part, { choose, labels, nameOf, links, isOpen }) {
  const { tokens } = model.explanation;
  const positions = uniq(part.nodes.map((node) => node.position)),
    layers = uniq(part.nodes.map((node) => node.layer));
  const error = part.type === "error";
  const scale = Math.max(...[part.effect, part.sparse, part.dense].map((effect) => Math.abs(effect ?? 0)), 1e-9);
  put(
    sheet,
    h("h3", { class: "title" }, plainLabel(part.title)),
    part.group?.label && h("p", { class: "row-text quiet" }, `by rule: ${plainLabel(part.group.name)}`),
    h(
      "p",
      { class: "who" },
      error
        ? "unexplained by the sparse model, "
        : `${sizeOf(part)}, ${layers.length > 1 ? "layers" : "layer"} ${layers.join(", ")}, `,
      "at ",
      positions.slice(0, 8).map((position) => [token(tokens[position].text), h("small", {}, ` ${position} `)]),
      positions.length > 8 && `and ${positions.length - 8} more`,
    ),
    error &&
      h(
        "p",
        { class: "row-text" },
        `What the dense model adds here beyond the sparse one. Its length is ${number(part.nodes[0].activation)}; that of its mean, by which it is replaced elsewhere, ${number(part.nodes[0].mean)}.`,
      ),
    part.type === "more"
      ? h(
          "p",
          { class: "row-text quiet" },
          "Nodes that the larger circuit has beside the one that was measured: not grouped, effects not measured.",
        )
      : h(
          "section",
          {},
          h("h3", {}, "Ablated alone, d loses"),
          effectBars(
            [
              ["in the circuit, nats", part.effect],
              ...(error
                ? []
                : [
                    ["with all nodes of the sparse model", part.sparse],
                    ["that, patched into the dense model", part.dense],
                  ]),
            ],
            scale,
          ),
        ),
    joined(
      "From",
      links.filter((link) => link.target === part.key),
      "source",
      nameOf,
      choose,
    ),
    joined(
      "To",
      links.filter((link) => link.source === part.key),
      "target",
      nameOf,
      choose,
    ),
    !error &&
      h(
        "section",
        {},
        h(
          "h3",
          {},
          `Its ${part.nodes.length === 1 ? "node" : "nodes"}`,
          h("small", {}, isOpen ? "" : "click the card to draw them"),
        ),
        h(
          "ul",
          { class: "edges-list" },
          part.nodes.map((node) => nodeRow(model, node, choose, labels)),
        ),
      ),
  );
}

/** Edges of a part one way, to other parts, inputs and the answer. */
function joined(title, links, end, nameOf, choose) {
  if (!links.length) return null;
  const most = Math.abs(links[0].effect) || 1e-9;
  const body = h("ul", { class: "edges-list" });
  const show = (many) =>
    put(
      body,
      links.slice(0, many).map((link) => {
        const key = link[end];
        const fixed = key === "answer" || key.startsWith("input:");
        const under = `${link.edges} ${link.edges === 1 ? "edge" : "edges"}`;
        return effectRow(nameOf(key), link.effect, most, under, fixed ? null : () => choose(key));
      }),
      links.length > many &&
        h(
          "li",
          {},
          h("button", { type: "button", class: "link", onclick: () => show(links.length) }, `${links.length - many} more`),
        ),
    );
  show(FIRST);
  return h("section", { class: "listed" }, h("h3", {}, title, h("small", {}, "nats of d by its edges, first order")), body);
}

/** All parts of the circuit, the strongest first, where nothing is chosen. */
export function drawParts(model, sheet, level, choose) {
  const parts = [...partsOf(model, level).values()].filter((part) => part.type !== "more");
  if (!parts.length) {
    put(sheet, h("div", { class: "empty" }, h("p", {}, "The circuit has no nodes: there is nothing to draw.")));
    return;
  }
  put(
    sheet,
    h("h3", {}, "Groups and errors"),
    h(
      "p",
      { class: "lead" },
      "By what d loses, in nats, when each alone is ablated from the circuit; below, from the sparse model with all its nodes, and that patched into the dense model. Choose one, or a node in it.",
    ),
    h(
      "ul",
      { class: "edges-list" },
      parts.map((part) => {
        const under = [
          part.type === "error" ? "unexplained by the sparse model" : sizeOf(part),
          part.sparse === null ? null : `sparse ${signed(part.sparse)}`,
          part.dense === null ? null : `dense ${signed(part.dense)}`,
        ];
        return effectRow(part.title, part.effect, model.strongestGroup, under.filter(Boolean).join(" · "), () =>
          choose(part.key),
        );
      }),
    ),
  );
}
