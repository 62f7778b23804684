// The page's data -> what is drawn: nodes with a strength and a sign, rows of sublayers, edges by their ends, nested levels.

import { count, signed } from "./dom.js";

export const KINDS = ["attn_in", "q", "k", "v", "attn_out", "mlp_in", "mlp_act", "mlp_out"];
export const KIND_NAMES = {
  attn_in: "attention reads",
  q: "query",
  k: "key",
  v: "value",
  attn_out: "attention writes",
  mlp_in: "MLP reads",
  mlp_act: "MLP neuron",
  mlp_out: "MLP writes",
};
export const MOST_NODES = 500; // drawn unless asked for all
const CALM = 120; // nodes in the first view, where there is a level as small
const SIZES = [12, 25, 50, 100, 200, 500, 1000, 2000, 5000, 10000];

/** Read the page's data. */
export function read(data) {
  const explanation = data.explanation;
  const ins = new Map(),
    outs = new Map();
  const edges = explanation.edges.map((edge) => ({ ...edge, size: Math.abs(edge.effect) })).sort((a, b) => b.size - a.size);
  for (const edge of edges) {
    if (!ins.has(edge.target)) ins.set(edge.target, []);
    if (!outs.has(edge.source)) outs.set(edge.source, []);
    ins.get(edge.target).push(edge);
    outs.get(edge.source).push(edge);
  }
  const dense = new Map(explanation.faithfulness.effects.map((effect) => [effect.node, effect]));
  const nodes = explanation.nodes.map((node) => {
    const measured = node.effect !== null,
      known = measured || outs.has(node.id);
    const effect = measured ? node.effect : (outs.get(node.id) ?? []).reduce((sum, edge) => sum + edge.effect, 0);
    return {
      ...node,
      measured,
      known, // an effect that was not measured is estimated from the edges that were kept, where there are such
      strength: Math.abs(effect),
      shown: known ? effect : null,
      dense: dense.get(node.id) ?? null,
    };
  });
  nodes.sort((a, b) => b.measured - a.measured || b.known - a.known || b.strength - a.strength); // measured, estimated, not known
  nodes.forEach((node, rank) => (node.rank = rank));
  const byId = new Map(nodes.map((node) => [node.id, node]));
  const layers = [...new Set(nodes.map((node) => node.layer))].sort((a, b) => a - b);
  return {
    data,
    explanation,
    nodes,
    edges,
    byId,
    layers,
    attention: [...(explanation.attention ?? [])].sort((a, b) => Math.abs(b.effect) - Math.abs(a.effect)),
    pages: new Map(Object.entries(data.nodes ?? {})),
    ins: (id) => ins.get(id) ?? [],
    outs: (id) => outs.get(id) ?? [],
    levels: levelsOf(explanation, nodes),
    strongest: Math.max(...nodes.map((node) => node.strength), 1e-9),
    strongestEdge: edges[0]?.size || 1e-9,
  };
}

/** A node's effect in words, as far as it is known. */
export function effectOf(node) {
  if (!node.known) return "not measured";
  return node.measured ? signed(node.effect) : `about ${signed(node.shown)} by its edges, not measured`;
}

/** An edge in words. Its weight here is what the source's deviation from its mean adds to the target. */
export const linkOf = (edge) => `${edge.kind}, adds ${signed(edge.weight)}, D owes it ${signed(edge.effect)}`;

/** The edges that the explanation kept, in words, where it did not keep all of them; "" where it did. */
export function keptEdges({ counts, edges }) {
  return counts.edges > edges.length ? `${count(edges.length)} of ${count(counts.edges)}` : "";
}

function levelsOf(explanation, nodes) {
  const found = explanation.levels ?? [];
  const total = nodes.length;
  if (found.length) {
    return found.map((level, place) => ({
      checked: true,
      count: level.nodes,
      kl: level.kl,
      share: level.share,
      whole: place === found.length - 1,
      nodes: nodes.filter((node) => (node.level ?? found.length - 1) <= place),
    }));
  }
  return [...SIZES.filter((size) => size < total), total].map((size) => ({
    checked: size === total,
    count: size,
    kl: null,
    share: null,
    whole: size === total,
    nodes: nodes.slice(0, size),
  }));
}

/** The level to begin with: the largest that can be taken in at a glance. */
export function firstLevel(model) {
  let best = 0;
  model.levels.forEach((level, place) => {
    if (level.nodes.length <= CALM) best = place;
  });
  return best;
}

/** The nodes drawn at a level, the strongest first. */
export function drawn(model, level, all) {
  const nodes = model.levels[level].nodes;
  return all ? nodes : nodes.slice(0, MOST_NODES);
}

/** An end of an edge that is no node of the circuit: what it is, and the position. */
export function outer(id) {
  const [, name, position] = /^(.*?)@(\d+)$/.exec(id) ?? [null, id, null];
  const kind = name.startsWith("embedding")
    ? "embedding"
    : name.startsWith("bigram")
      ? "bigram"
      : /answer/.test(name)
        ? "answer"
        : "node";
  return { kind, name, position: position === null ? null : Number(position) };
}
