// The page's data -> what is drawn: the groups, errors and added nodes of a nested circuit, and the edges between them.
//
// A part is what stands in the graph as one card: a group of nodes, an error, or the nodes of one place that a larger circuit adds.
// Parts and other ends of edges have keys as the explanation's group edges name them: group:3, error:4@7, input:7, answer; and
// more:13@7 for what is added.

import { signed } from "./dom.js";

export const KIND_NAMES = {
  attn_in: "attention input",
  q: "query",
  k: "key",
  v: "value",
  attn_out: "attention output",
  mlp_in: "MLP input",
  mlp_gate: "MLP gate",
  mlp_act: "MLP neuron",
  mlp_out: "MLP output",
  error: "error",
};
const ATTENTION = new Set(["attn_in", "q", "k", "v", "attn_out"]);

/** Read the page's data. */
export function read(data) {
  const { explanation } = data;
  const nodes = [...explanation.nodes].sort((a, b) => Math.abs(b.effect ?? 0) - Math.abs(a.effect ?? 0));
  const byId = new Map(nodes.map((node) => [node.id, node]));
  const edges = [...explanation.edges].sort((a, b) => Math.abs(b.effect) - Math.abs(a.effect));
  const ends = (key) => {
    const found = new Map();
    for (const edge of edges) found.set(edge[key], [...(found.get(edge[key]) ?? []), edge]);
    return (id) => found.get(id) ?? [];
  };
  const strongestGroup = Math.max(...explanation.groups.map((group) => Math.abs(group.effect)), 1e-9);
  return {
    data,
    explanation,
    nodes,
    byId,
    edges,
    attention: explanation.attention,
    pages: new Map(Object.entries(data.nodes ?? {})),
    ins: ends("target"),
    outs: ends("source"),
    strongest: Math.max(...nodes.map((node) => Math.abs(node.effect ?? 0)), 1e-9),
    strongestEdge: Math.abs(edges[0]?.effect ?? 0) || 1e-9,
    strongestGroup,
    weak: Math.min(0.05, strongestGroup / 40), // nats; groups that do less are drawn small
  };
}

/** The explanation's id on the server; null where the page is a file. */
export const jobOf = (data) => (data.served && location.protocol.startsWith("http") ? data.job : null);

/** A nested circuit's name: the faithfulness that was asked of it. */
export const levelName = (nested) => (nested.asked === null ? "full distribution" : `F ${nested.asked}`);

/** How high in the computation a node is. An error enters the residual before the sublayer that reads at its site. */
function heightOf({ layer, kind }) {
  if (kind === "error") return 2 * layer;
  return 4 * layer + (ATTENTION.has(kind) ? 1 : 3);
}

/** The name of a height: the layer and what is computed there. */
export function heightName(height) {
  if (height % 2 === 0) return ["", `site ${height / 2}`];
  return [`L${Math.floor(height / 4)}`, height % 4 === 1 ? "attn" : "MLP"];
}

export const errorName = (node) => `error at site ${node.layer}`;
export const keyOfError = (node) => `error:${node.layer}@${node.position}`;

/** The key of the part that has a node. */
export function partOf(node) {
  if (node.kind === "error") return keyOfError(node);
  return node.group !== null ? `group:${node.group}` : `more:${heightOf(node)}@${node.position}`;
}

/** The value of `of` that has most of the nodes' effect. */
function mostly(nodes, of) {
  const sums = new Map();
  for (const node of nodes) sums.set(of(node), (sums.get(of(node)) ?? 0) + Math.abs(node.effect ?? 0) + 1e-6);
  return [...sums].reduce((best, each) => (each[1] > best[1] ? each : best))[0];
}

/** The parts of a nested circuit, by key, the strongest first. */
export function partsOf(model, level) {
  const byKey = new Map();
  for (const node of model.nodes) {
    if (node.level > level) continue;
    const key = partOf(node);
    if (!byKey.has(key)) byKey.set(key, []);
    byKey.get(key).push(node);
  }
  const parts = [...byKey].map(([key, nodes]) => {
    const type = key.slice(0, key.indexOf(":"));
    const group = nodes[0].group === null ? null : model.explanation.groups[nodes[0].group];
    return {
      key,
      type,
      nodes,
      group,
      // of a smaller circuit it says how many it has of all; what a large one has is not all listed
      total: group && type !== "error" ? group.nodes.length : nodes.length,
      partly: level < model.explanation.opening && group !== null && nodes.length < group.nodes.length,
      title: type === "error" ? errorName(nodes[0]) : group ? (group.label ?? group.name) : `added at ${addedAt(model, nodes)}`,
      effect: group ? group.effect : nodes[0].effect,
      sparse: group && type !== "error" ? group.sparse_effect : null,
      dense: group && type !== "error" ? group.dense_effect : null,
      weak: type === "group" && Math.abs(group.effect) < model.weak,
      position: mostly(nodes, (node) => node.position),
      height: mostly(nodes, heightOf),
    };
  });
  parts.sort((a, b) => Math.abs(b.effect ?? 0) - Math.abs(a.effect ?? 0));
  return new Map(parts.map((part) => [part.key, part]));
}

const addedAt = (model, nodes) => levelName(model.explanation.nested[nodes[0].level]);

/** An end of an edge that is no node of the circuit: its key, or null. */
export function outerKey(id) {
  if (id === "answer" || /answer\[/.test(id)) return "answer";
  const found = /^(?:embedding|bigram)\b.*@(\d+)$/.exec(id);
  return found ? `input:${found[1]}` : null;
}

/** Edges between parts, the strongest first; a part that is open has its nodes for ends instead. */
export function linksOf(model, parts, open, level) {
  const { explanation } = model;
  if (!open.size && level >= explanation.opening) {
    const drawn = (key) => parts.has(key) || key === "answer" || key.startsWith("input:");
    const kept = explanation.group_edges.filter((edge) => drawn(edge.source) && drawn(edge.target));
    return kept.sort((a, b) => Math.abs(b.effect) - Math.abs(a.effect));
  }
  const keyOf = (id) => {
    const node = model.byId.get(id);
    if (!node) return outerKey(id);
    const key = partOf(node);
    return node.level > level ? null : open.has(key) ? id : key;
  };
  const sums = new Map();
  for (const edge of model.edges) {
    const source = keyOf(edge.source),
      target = keyOf(edge.target);
    if (source === null || target === null || source === target) continue;
    const key = `${source}\n${target}`;
    const link = sums.get(key) ?? { source, target, effect: 0, edges: 0 };
    sums.set(key, Object.assign(link, { effect: link.effect + edge.effect, edges: link.edges + 1 }));
  }
  return [...sums.values()].sort((a, b) => Math.abs(b.effect) - Math.abs(a.effect));
}

/** A node's effect in words. */
export const effectOf = (node) => (node.effect === null ? "not measured" : `${signed(node.effect)} nats`);

/** How many nodes, in words. */
export const nodeCount = (many) => `${many.toLocaleString("en-US")} ${many === 1 ? "node" : "nodes"}`;

/** How large a part is, in words: its leaves, and how many of them a smaller circuit has. */
export const sizeOf = (part) => (part.partly ? `${part.nodes.length} of ${nodeCount(part.total)}` : nodeCount(part.total));

/** The question in words: what d is the log-odds of. */
export const dOf = ({ answer, contrast }, name) =>
  contrast
    ? ["log-odds of ", name(answer.text), " against ", name(contrast.text)]
    : ["log-odds of ", name(answer.text), " against all other tokens"];
