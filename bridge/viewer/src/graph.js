// The circuit: tokens along one axis, sublayers along the other; nodes by sign and strength, the strongest edges, and those of a node.

import { select } from "d3-selection";
import { scaleSqrt } from "d3-scale";
import { h, percent, plain, put, s, side, signed, token } from "./dom.js";
import { KIND_NAMES, drawn, effectOf, linkOf } from "./model.js";
import { LABELS, end, place, route } from "./layout.js";
import { fit } from "./scroll.js";

const DEFAULT_EDGES = 160;
const FOCUS_EDGES = 400;
const KEPT_IN_VIEW = 40; // neighbours of a node that is gone to, the strongest

/** Draw into `holder`; `choose(id)` on a click, `hover(id)` on the pointer. Returns what the page may ask of it. */
export function makeGraph(model, holder, tip, { choose, labelOf }) {
  const names = s("svg", { class: "names", "aria-hidden": "true" });
  const plot = s("svg", { class: "plot", role: "group", "aria-label": "Nodes of the circuit" });
  const corner = h("div", { class: "corner", "aria-hidden": "true" });
  const tokens = s("svg", { class: "tokens", "aria-hidden": "true" });
  put(holder, names, plot, corner, tokens);
  const bands = s("g"),
    lines = s("g", { class: "edges" }),
    focusLines = s("g", { class: "edges focus" }),
    dots = s("g", { class: "dots" }),
    front = s("g", { class: "front" }),
    answer = s("g");
  plot.append(bands, lines, focusLines, dots, front, answer); // edges below nodes: either has its own words under the pointer
  const radius = scaleSqrt().domain([0, model.strongest]).range([2.4, 8]).clamp(true);
  const thick = scaleSqrt().domain([0, model.strongestEdge]).range([0.35, 5]).clamp(true);
  let layout = null,
    nodes = [],
    state = null,
    hovered = null,
    pressed = null,
    attention = null;

  function draw(next) {
    const again =
      !layout ||
      !state ||
      next.level !== state.level ||
      next.all !== state.all ||
      next.width !== state.width ||
      next.height !== state.height;
    state = next;
    if (again) {
      nodes = drawn(model, state.level, state.all);
      const stays = !layout || Math.abs(holder.scrollLeft - answerAt()) < 4; // a view of the answer stays one
      layout = place(model, nodes, state.width, state.height);
      drawFrame();
      drawNodes();
      drawEdges();
      if (stays) toAnswer();
    }
    focus();
  }

  function drawFrame() {
    const { width, height, rows, layers, columns } = layout;
    const { explanation } = model;
    for (const [svg, w, tall] of [
      [names, LABELS, height],
      [plot, width, height],
    ]) {
      (svg.setAttribute("width", w), svg.setAttribute("height", tall), svg.setAttribute("viewBox", `0 0 ${w} ${tall}`));
    }
    put(
      names,
      layers.map((layer) =>
        s("text", { class: "layer", x: 10, y: layer.y + Math.min(layer.height / 2 + 4, 16) }, `L${layer.layer}`),
      ),
      rows.map((row) =>
        s(
          "text",
          { class: "kind", x: LABELS - 8, y: row.middle + 3.5, "text-anchor": "end" },
          row.kind,
          s("title", {}, KIND_NAMES[row.kind]),
        ),
      ),
      s("text", { class: "layer", x: 10, y: layout.top.y + 4 }, "answer"),
    );
    put(
      bands,
      layers.map((layer) => s("rect", { class: "band", x: 0, y: layer.y, width, height: layer.height, rx: 4 })),
      rows
        .slice(1)
        .filter((row, place) => row.layer === rows[place].layer)
        .map((row) => s("line", { class: "rule", x1: 0, x2: width, y1: row.y, y2: row.y })),
      columns.map((column) => s("rect", { class: "column", x: column.x, y: 0, width: column.width, height })),
      columns
        .slice(1)
        .map((column) => s("line", { class: "rule", x1: column.x, x2: column.x, y1: layout.layers[0]?.y ?? 0, y2: height })),
    );
    const sides = [
      ["for", explanation.target.text, layout.top.for],
      ["against", explanation.contrast.text, layout.top.against],
    ];
    put(
      answer,
      sides.map(([name, text, x]) =>
        s(
          "g",
          { class: `side ${name}`, transform: `translate(${x},${layout.top.y})` },
          s("rect", { x: -33, y: -13, width: 66, height: 26, rx: 13 }),
          s("text", { y: 4.5, "text-anchor": "middle" }, plain(text, 7)),
        ),
      ),
    );
    drawTokens();
  }

  function drawTokens() {
    const { columns, width, upright, tokensHeight: height } = layout;
    (tokens.setAttribute("width", width),
      tokens.setAttribute("height", height),
      tokens.setAttribute("viewBox", `0 0 ${width} ${height}`));
    corner.style.height = `${height}px`;
    put(corner, h("span", {}, attention ? `L${attention.layer} head ${attention.head} reads` : "tokens"));
    const weight = new Map((attention?.reads ?? []).map((read) => [read.position, read.weight]));
    put(
      tokens,
      columns.map((column, position) => {
        const label = plain(column.token.text, 9);
        const text = upright
          ? s("text", { transform: `translate(${column.center + 4},${height - 6}) rotate(-90)` }, label)
          : s("text", { x: column.center, y: 23, "text-anchor": "middle" }, label);
        const size = weight.get(position) ?? 0;
        return s(
          "g",
          { class: "word", "data-position": position },
          s("rect", { class: "cell", x: column.x + 1, y: 1, width: column.width - 2, height: height - 2, rx: 3 }),
          size > 0.004 &&
            s("rect", {
              class: "weight",
              x: column.x + 3,
              y: height - 2 - (height - 6) * size,
              width: column.width - 6,
              height: (height - 6) * size,
              rx: 2,
            }),
          attention?.query === position &&
            s("rect", { class: "query", x: column.x + 2, y: 2, width: column.width - 4, height: height - 4, rx: 3 }),
          text,
          s("title", {}, `${position}: ${plain(column.token.text)}${size ? `, attention ${percent(size)}` : ""}`),
          columns.length > 12 &&
            !upright &&
            s("text", { class: "index", x: column.center, y: 36, "text-anchor": "middle" }, position),
        );
      }),
    );
  }

  const look = (node) => {
    if (!node.known) return "unmeasured";
    return node.strength < 1e-9 ? "none" : `${side(node.shown)}${node.measured ? "" : " estimated"}`;
  };

  function drawNodes() {
    const join = select(dots)
      .selectAll("g.node")
      .data(nodes, (node) => node.id);
    join.exit().remove();
    const made = join.enter().append("g").attr("role", "button").attr("tabindex", -1);
    made.append("circle").attr("class", "hit").attr("r", 8);
    made.append("circle").attr("class", "dot");
    made
      .attr("id", (node) => `node-${node.id}`)
      .on("click", (_, node) => choose(node.id))
      .on("pointerenter", (event, node) => ((hovered = node.id), showTip(event, node), focus()))
      .on("pointermove", moveTip)
      .on("pointerleave", () => ((hovered = null), (tip.hidden = true), focus()));
    made
      .merge(join)
      .attr("class", (node) => `node ${look(node)}`)
      .attr(
        "aria-label",
        (node) =>
          `${node.name} at ${node.position}, ${plain(model.explanation.tokens[node.position].text)}, effect ${effectOf(node)}`,
      )
      .attr("transform", (node) => `translate(${layout.at.get(node.id).x},${layout.at.get(node.id).y})`)
      .select("circle.dot")
      .attr("r", (node) => radius(node.strength));
  }

  const ends = (edge) => [end(layout, edge.source, edge.effect), end(layout, edge.target, edge.effect)];

  function paths(group, edges, most) {
    const found = [];
    for (const edge of edges) {
      const [from, to] = ends(edge);
      if (from && to)
        found.push(
          s(
            "path",
            { class: side(edge.effect), d: route(layout, from, to), "stroke-width": thick(edge.size).toFixed(2) },
            s("title", {}, `${edge.source} → ${edge.target}: ${linkOf(edge)}`),
          ),
        );
      if (found.length >= most) break;
    }
    put(group, found);
  }

  const drawEdges = () => paths(lines, model.edges, DEFAULT_EDGES);

  /** Bring out one node and what it is linked to, or what is sought; the others stand back, all at once, and these are drawn again. */
  function focus() {
    const id = hovered ?? state.selected;
    const node = id && layout.at.has(id) ? id : null;
    const links = node ? [...model.ins(node), ...model.outs(node)].sort((a, b) => b.size - a.size) : [];
    const sought = hovered ? null : state.found;
    const near = sought ?? new Set(node ? [node, ...links.flatMap((edge) => [edge.source, edge.target])] : []);
    plot.classList.toggle("focused", Boolean(node || sought));
    paths(focusLines, links, FOCUS_EDGES);
    put(
      front,
      [...near]
        .filter((each) => layout.at.has(each))
        .map((each) => {
          const one = model.byId.get(each),
            { x, y } = layout.at.get(each);
          return s(
            "g",
            { class: look(one), transform: `translate(${x},${y})` },
            sought && s("circle", { class: "ring", r: 9 }),
            s("circle", { class: "dot", r: radius(one.strength) }),
          );
        }),
    );
    press(pressed, false);
    press((pressed = state.selected), true);
    const place = node ? layout.at.get(node).column : -1;
    bands.querySelectorAll(".column").forEach((column, position) => column.classList.toggle("here", position === place));
  }

  function press(id, on) {
    const element = id && document.getElementById(`node-${id}`);
    if (!element) return;
    element.classList.toggle("chosen", on);
    element.setAttribute("tabindex", on ? 0 : -1);
    element.setAttribute("aria-pressed", String(on));
    if (on) front.append(s("circle", { class: "ring chosen", cx: layout.at.get(id).x, cy: layout.at.get(id).y, r: 10.5 }));
  }

  function showTip(event, node) {
    const text = model.explanation.tokens[node.position].text;
    put(
      tip,
      h("p", { class: "tip-head" }, h("code", {}, node.name), " at ", token(text)),
      h("p", { class: "tip-label" }, labelOf(node) ?? KIND_NAMES[node.kind]),
      h(
        "p",
        { class: "tip-numbers" },
        `value in the whole model ${node.activation ? signed(node.activation) : "off"}, mean ${signed(node.mean)}`,
      ),
      h("p", { class: `tip-effect ${node.known ? side(node.shown) : "quiet"}` }, `effect on D ${effectOf(node)}`),
    );
    tip.hidden = false;
    moveTip(event);
  }

  function moveTip(event) {
    const wide = tip.offsetWidth,
      tall = tip.offsetHeight;
    tip.style.left = `${Math.max(6, Math.min(event.clientX + 16, innerWidth - wide - 8))}px`;
    tip.style.top = `${event.clientY + 18 + tall > innerHeight ? event.clientY - tall - 12 : event.clientY + 18}px`;
  }

  /** The node next to one in a direction; without one the strongest. */
  function next(id, key) {
    const from = id && layout.at.get(id);
    if (!from) return nodes[0]?.id ?? null;
    const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
    let best = null,
      least = Infinity;
    for (const node of nodes) {
      const to = layout.at.get(node.id);
      const along = (to.x - from.x) * dx + (to.y - from.y) * dy,
        across = Math.abs((to.x - from.x) * dy) + Math.abs((to.y - from.y) * dx);
      if (along > 0.5 && along + 3 * across < least) ((least = along + 3 * across), (best = node.id));
    }
    return best ?? id;
  }

  const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
  const roomy = () => [holder.clientWidth - LABELS, holder.clientHeight - layout.tokensHeight]; // what names and tokens leave free

  /** Go to a node, and show what it is linked to as far as there is room. */
  function reveal(id) {
    const at = layout?.at.get(id);
    if (!at) return;
    const links = [...model.ins(id), ...model.outs(id)].sort((a, b) => b.size - a.size).slice(0, KEPT_IN_VIEW);
    const near = links.flatMap((edge) => [layout.at.get(edge.source), layout.at.get(edge.target)]).filter(Boolean);
    const [wide, tall] = roomy();
    const left = fit(
        holder.scrollLeft,
        wide,
        at.x,
        near.map((one) => one.x),
      ),
      top = fit(
        holder.scrollTop,
        tall,
        at.y,
        near.map((one) => one.y),
      );
    holder.scrollTo({ left, top, behavior: still() ? "auto" : "smooth" });
  }

  /** How far to the right the answer is seen with as much as there is room for on both its sides. */
  function answerAt() {
    const [wide] = roomy(),
      last = layout.columns[layout.columns.length - 1];
    const most = Math.max(0, holder.scrollWidth - holder.clientWidth);
    return last && last.width > wide ? Math.min(most, Math.max(0, last.center - wide / 2)) : most;
  }

  function toAnswer() {
    holder.scrollLeft = answerAt();
  }

  return {
    draw,
    next,
    reveal,
    parts: { names, plot, tokens },
    has: (id) => layout.at.has(id),
    focusNode: (id) => document.getElementById(`node-${id}`)?.focus({ preventScroll: true }),
    attend(head) {
      attention = head;
      drawTokens();
    },
    toAnswer,
    shown: () => nodes.length,
    strongestEdges: () => lines.childElementCount,
  };
}
