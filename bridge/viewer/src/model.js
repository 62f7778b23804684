// Convert the page's data to what is drawn: the groups, errors and added nodes of a nested circuit, and the edges between them.
//
// A part is drawn as one card: a group of nodes, an error, or the nodes that a larger circuit adds at one place. Parts and other
// ends of edges have the keys that the explanation's group edges use: group:3, error:4@7, input:7, answer. The key of added nodes
// is more:13@7.

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

/** Return the page's data with nodes and edges sorted and indexed. */
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
    weak: Math.min(0.05, strongestGroup / 40), // nats; groups with smaller effects are drawn small
  };
}

/** Return the explanation's id on the server; null if the page is a file. */
export const jobOf = (data) => (data.served && location.protocol.startsWith("http") ? data.job : null);

/** Return a nested circuit's name: the faithfulness that the search had to reach. */
export const levelName = (nested) => (nested.asked === null ? "full KL" : `F ${nested.asked}`);

/** Return a node's height in the computation. An error enters the residual before the sublayer that reads at its site. */
function heightOf({ layer, kind }) {
  if (kind === "error") return 2 * layer;
  return 4 * layer + (ATTENTION.has(kind) ? 1 : 3);
}

/** Return the name of a height as [layer, sublayer or site]. */
export function heightName(height) {
  if (height % 2 === 0) return ["", `site ${height / 2}`];
  return [`L${Math.floor(height / 4)}`, height % 4 === 1 ? "attn" : "MLP"];
}

export const errorName = (node) => `error at site ${node.layer}`;
export const keyOfError = (node) => `error:${node.layer}@${node.position}`;

/** Return the key of the part that contains a node. */
export function partOf(node) {
  if (node.kind === "error") return keyOfError(node);
  return node.group !== null ? `group:${node.group}` : `more:${heightOf(node)}@${node.position}`;
}

/** Return the value of `of` whose nodes have the largest sum of effect magnitudes. */
function mostly(nodes, of) {
  const sums = new Map();
  for (const node of nodes) sums.set(of(node), (sums.get(of(node)) ?? 0) + Math.abs(node.effect ?? 0) + 1e-6);
  return [...sums].reduce((best, each) => (each[1] > best[1] ? each : best))[0];
}

/** Return the parts of a nested circuit by key, the strongest first. */
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
      // of the whole group: a smaller circuit has only some of its nodes, and for a large circuit not all of them are listed
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

/** Return the key of an edge's end that is the answer or an input; null for other ends. */
export function outerKey(id) {
  if (id === "answer" || /answer\[/.test(id)) return "answer";
  const found = /^(?:embedding|bigram)\b.*@(\d+)$/.exec(id);
  return found ? `input:${found[1]}` : null;
}

/** Return the edges between parts, the strongest first; the edges of an open part end at its nodes. */
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

/** Return a node's effect in words. */
export const effectOf = (node) => (node.effect === null ? "not measured" : `${signed(node.effect)} nats`);

/** Return a number of nodes in words. */
export const nodeCount = (many) => `${many.toLocaleString("en-US")} ${many === 1 ? "node" : "nodes"}`;

/** Return a part's number of nodes in words, and how many of them a smaller circuit has. */
export const sizeOf = (part) => (part.partly ? `${part.nodes.length} of ${nodeCount(part.total)}` : nodeCount(part.total));

/** Return in words what d is; `name` converts the text of a token. */
export const dOf = ({ answer, contrast }, name) =>
  contrast
    ? ["log-odds of ", name(answer.text), " against ", name(contrast.text)]
    : ["log-odds of ", name(answer.text), " against all other tokens"];
