// Lists of edges of a node, and of nodes: a row each, with its place, its label and what D owes to it.

import { h, plainLabel, put, side, signed, token } from "./dom.js";
import { keptEdges, linkOf, outer } from "./model.js";

const FIRST = 12; // listed each way at first

/** What feeds a node and what it feeds. */
export function edgeLists(model, id, choose, labels) {
  const ins = model.ins(id),
    outs = model.outs(id);
  const caption =
    "adds: by how much the source, being off its mean, changes the target before AbsTopK. Bar and last number: what D owes to the edge, to first order.";
  return [
    ins.length + outs.length > 0 && h("section", {}, h("h3", {}, "Edges"), h("p", { class: "lead" }, caption)),
    listed(model, "Fed by", ins, "source", choose, labels),
    listed(model, "Feeds", outs, "target", choose, labels),
  ];
}

function listed(model, title, list, key, choose, labels) {
  const body = h("ul", { class: "edges-list" });
  const kept = keptEdges(model.explanation);
  const show = (most) =>
    put(
      body,
      list.slice(0, most).map((edge) => nodeRow(model, edge[key], edge.effect, choose, labels, edge)),
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
    h("h4", {}, title, kept && list.length > 0 && h("small", {}, `${list.length} of the edges that were kept (${kept})`)),
    list.length ? body : h("p", { class: "row-text quiet" }, kept ? `No edge among those that were kept (${kept}).` : "No edge."),
  );
}

/** A node in a list: a button with its name and place, a bar, and below its label and what the edge adds. */
export function nodeRow(model, id, effect, choose, labels, edge = null) {
  const node = model.byId.get(id),
    what = outer(id);
  const text = what.kind === "answer" || what.position === null ? null : model.explanation.tokens[what.position]?.text;
  const label = node ? (labels.get(node.name) ?? node.label) : { answer: "the answer", bigram: "bigram table" }[what.kind];
  const title = label ? plainLabel(label) : null;
  const most = edge ? model.strongestEdge : model.strongest;
  const inner = [
    h(
      "span",
      { class: "row-main" },
      h("code", {}, what.kind === "answer" ? "D" : what.name, text === null ? null : h("small", {}, `@${what.position}`)),
      text === null || text === undefined ? null : token(text),
      h(
        "span",
        { class: "row-numbers" },
        h(
          "span",
          { class: "diverging" },
          h("i", {
            class: side(effect),
            style: { [effect >= 0 ? "left" : "right"]: "50%", width: `${50 * Math.sqrt(Math.abs(effect) / most)}%` },
          }),
        ),
        h("b", {}, signed(effect)),
      ),
    ),
    (title || edge) &&
      h(
        "span",
        { class: "row-under" },
        edge && h("span", {}, `${edge.kind}, adds ${signed(edge.weight)}`),
        title && h("span", { class: "row-label", title }, title),
      ),
  ];
  const told = edge ? linkOf(edge) : null;
  return h(
    "li",
    {},
    node
      ? h("button", { type: "button", class: "row two", title: told, onclick: () => choose(id) }, inner)
      : h("span", { class: "row two", title: told }, inner),
  );
}
