// List rows of nodes and of a node's edges, each with its effect as a bar and a number.

import { h, plain, plainLabel, put, side, signed } from "./dom.js";
import { outerKey } from "./model.js";

const FIRST = 12; // number of edges listed in each direction before the user asks for more

/** Return a bar from a middle line, to the right for positive values, to the left for negative ones. */
export function diverging(value, scale) {
  const width = `${50 * Math.min(1, Math.abs(value ?? 0) / scale)}%`;
  return h(
    "span",
    { class: "diverging" },
    value !== null && h("i", { class: side(value), style: { [value >= 0 ? "left" : "right"]: "50%", width } }),
  );
}

/** Return a list row with a name, its effect, and the text `under` below them. */
export function effectRow(name, effect, most, under, choose, title = null) {
  const inner = [
    h(
      "span",
      { class: "row-main" },
      h("span", { class: "row-name" }, plainLabel(name)),
      h("span", { class: "row-numbers" }, diverging(effect, most), h("b", {}, effect === null ? "–" : signed(effect))),
    ),
    under && h("span", { class: "row-under" }, under),
  ];
  return h(
    "li",
    {},
    choose
      ? h("button", { type: "button", class: "row two", title, onclick: choose }, inner)
      : h("span", { class: "row two", title }, inner),
  );
}

const placed = (model, name, position) => `${name} at ${plain(model.explanation.tokens[position].text, 12)} (${position})`;

/** Return the list row of a node. */
export function nodeRow(model, node, choose, labels) {
  const label = labels.get(node.name) ?? node.label ?? "";
  return effectRow(
    placed(model, node.name, node.position),
    node.effect,
    model.strongest,
    plainLabel(label),
    () => choose(node.id),
    label,
  );
}

/** Return the lists of a node's incoming and outgoing edges. */
export function edgeLists(model, id, choose) {
  const lists = [
    ["Inputs", model.ins(id), "source"],
    ["Outputs", model.outs(id), "target"],
  ];
  return lists.map(([title, list, end]) => {
    const body = h("ul", { class: "edges-list" });
    const show = (most) =>
      put(
        body,
        list.slice(0, most).map((edge) => {
          const node = model.byId.get(edge[end]),
            key = outerKey(edge[end]);
          const position = /@(\d+)$/.exec(edge[end])?.[1];
          const name =
            key === "answer"
              ? "the answer"
              : position === undefined
                ? edge[end]
                : placed(model, edge[end].replace(/@\d+$/, ""), Number(position));
          return effectRow(
            name,
            edge.effect,
            model.strongestEdge,
            `${edge.kind}, weight ${signed(edge.weight)}`,
            node ? () => choose(node.id) : null,
            node?.label ?? null,
          );
        }),
        list.length > most &&
          h(
            "li",
            {},
            h("button", { type: "button", class: "link", onclick: () => show(list.length) }, `${list.length - most} more`),
          ),
      );
    show(FIRST);
    return h(
      "section",
      { class: "listed" },
      h("h3", {}, title, list.length > 0 && h("small", {}, "effect on d in nats, first order")),
      list.length ? body : h("p", { class: "row-text quiet" }, "No edges in the circuit."),
    );
  });
}
