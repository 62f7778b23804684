// The sheet of a part, and the list of all parts of the circuit, with their sizes, their edges and the effects of ablating them.

import { h, nats, number, plainLabel, put, signed, token } from "./dom.js";
import { diverging, effectRow, nodeRow } from "./edges.js";
import { partsOf, sizeOf } from "./model.js";

const FIRST = 10;

const uniq = (list) => [...new Set(list)].sort((a, b) => a - b);

/** Return named effects as bars on one scale. */
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

/** Draw the sheet of a part: a group, an error, or nodes that a larger circuit adds. */
export function drawPart(model, sheet, part, { choose, labels, nameOf, links, isOpen }) {
  const { tokens } = model.explanation;
  const positions = uniq(part.nodes.map((node) => node.position)),
    layers = uniq(part.nodes.map((node) => node.layer));
  const error = part.type === "error";
  const scale = Math.max(...[part.effect, part.sparse, part.dense].map((effect) => Math.abs(effect ?? 0)), 1e-9);
  put(
    sheet,
    h("h3", { class: "title" }, plainLabel(part.title)),
    part.group?.label && h("p", { class: "row-text quiet" }, `name by rule: ${plainLabel(part.group.name)}`),
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
        `The part of the dense residual that the sparse model misses here. Its length is ${number(part.nodes[0].activation)}. When the error is ablated, it is set to its mean, whose length is ${number(part.nodes[0].mean)}.`,
      ),
    part.type === "more"
      ? h(
          "p",
          { class: "row-text quiet" },
          "Nodes that the larger circuit adds to the measured one. They are not grouped, and their effects are not measured.",
        )
      : h(
          "section",
          {},
          h("h3", {}, "Loss of d when ablated alone, in nats"),
          effectBars(
            [
              ["from the circuit", part.effect],
              ...(error
                ? []
                : [
                    ["from sparse with all its nodes", part.sparse],
                    ["that change patched into dense", part.dense],
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

/** Return the list of a part's edges in one direction, to other parts, inputs or the answer; null if there are none. */
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
  return h("section", { class: "listed" }, h("h3", {}, title, h("small", {}, "effect on d in nats, first order")), body);
}

/** Draw the list of all groups and errors of the circuit, the strongest first; it is shown if nothing is selected. */
export function drawParts(model, sheet, level, choose) {
  const parts = [...partsOf(model, level).values()].filter((part) => part.type !== "more");
  if (!parts.length) {
    put(sheet, h("div", { class: "empty" }, h("p", {}, "The circuit has no nodes, so there is nothing to draw.")));
    return;
  }
  put(
    sheet,
    h("h3", {}, "Groups and errors"),
    h(
      "p",
      { class: "lead" },
      "Loss of d in nats when each alone is ablated from the circuit. Sparse: loss when a group is ablated from the sparse model with all its nodes. Dense: loss in the dense model when that change is patched through the bridge. Click a row to see its nodes and edges.",
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
