// The drawing of the circuit: tokens run from left to right, the computation from the inputs up to the answer. Each group of
// nodes is a card that opens into its nodes. Edges are as wide as their effect; those of the selected card are highlighted.

import { scaleSqrt } from "d3-scale";
import { fitLines, h, nats, percent, plain, put, s, side, signed, token } from "./dom.js";
import { KIND_NAMES, dOf, effectOf, heightName, linksOf, partOf, partsOf, sizeOf } from "./model.js";
import { LABELS, NAME_FONT, PAD, boxOf, place, portsOf, route } from "./layout.js";

const MOST_EDGES = 90;
const LEAST = 0.01; // of the strongest edge; weaker edges are drawn only for what is selected
const FOCUS_EDGES = 300;

/** Draw into `holder`, and call `choose(key)` on a click. Return the functions and elements that the page uses. */
export function makeGraph(model, holder, tip, { choose, labelOf }) {
  const names = s("svg", { class: "names", "aria-hidden": "true" });
  const plot = s("svg", { class: "plot", role: "group", "aria-label": "Groups and nodes of the circuit" });
  const corner = h("div", { class: "corner", "aria-hidden": "true" });
  const tokens = s("svg", { class: "tokens", "aria-hidden": "true" });
  put(holder, names, plot, corner, tokens);
  const bands = s("g"),
    lines = s("g", { class: "edges" }),
    cards = s("g", { class: "cards" }),
    focusLines = s("g", { class: "edges focus" }),
    answer = s("g");
  const hatch = s(
    "pattern",
    { id: "hatch", width: 7, height: 7, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    s("line", { class: "hatching", x1: 0, x2: 0, y1: 0, y2: 7 }),
  );
  plot.append(s("defs", {}, hatch), bands, lines, focusLines, cards, answer);
  let layout = null,
    parts = new Map(),
    links = [],
    state = null,
    hovered = null,
    attention = null;

  function draw(next) {
    const again = !state || ["level", "open", "width", "height", "fonts"].some((name) => next[name] !== state[name]);
    const before = layout && [holder.scrollWidth - holder.scrollLeft, holder.scrollTop]; // from the right, where the answer is
    state = next;
    if (again) {
      parts = partsOf(model, state.level);
      const open = new Set([...state.open].filter((key) => parts.has(key)));
      links = linksOf(model, parts, open, state.level);
      const read = new Set(strong().flatMap(({ source }) => (source.startsWith("input:") ? [Number(source.slice(6))] : [])));
      layout = place(model.explanation.tokens, parts, open, read, state.width, state.height);
      drawFrame();
      drawCards();
      edges(lines, strong());
      const [left, top] = before ?? [0, 0];
      holder.scrollTo(holder.scrollWidth - left, top);
    }
    focus();
  }

  const strong = () => links.slice(0, MOST_EDGES).filter((link) => Math.abs(link.effect) >= LEAST * Math.abs(links[0].effect));

  function drawFrame() {
    const { width, height, rows, columns } = layout;
    for (const [svg, w, tall] of [
      [names, LABELS, height],
      [plot, width, height],
    ]) {
      (svg.setAttribute("width", w), svg.setAttribute("height", tall), svg.setAttribute("viewBox", `0 0 ${w} ${tall}`));
    }
    const label = (row, place) => {
      const [layer, step] = heightName(row.name),
        middle = row.y + row.height / 2 + 4,
        again = rows.slice(0, place).some((other) => heightName(other.name)[0] === layer);
      return [
        !again && s("text", { class: "layer", x: 10, y: middle }, layer),
        s("text", { class: "kind", x: LABELS - 6, y: middle, "text-anchor": "end" }, step),
      ];
    };
    put(names, rows.map(label), s("text", { class: "layer", x: 10, y: layout.answer.y + 4 }, "answer"));
    put(
      bands,
      rows.map((row) => s("rect", { class: "band", x: 0, y: row.y, width, height: row.height, rx: 4 })),
      columns.slice(1).map((column) => s("line", { class: "rule", x1: column.x, x2: column.x, y1: 48, y2: height })),
      !rows.length &&
        s(
          "text",
          { class: "nothing", x: width / 2, y: height / 2, "text-anchor": "middle" },
          "There is no circuit to draw; the verdict says why.",
        ),
    );
    const { x, y } = layout.answer,
      { answer: asked } = model.explanation;
    const first = model.explanation.dense.find((each) => each.token.id === asked.id);
    const text = plain(asked.text, 9);
    put(
      answer,
      s(
        "g",
        { class: "goal", transform: `translate(${x},${y})` },
        s("title", {}, dOf(model.explanation, plain).join("")),
        s("rect", { x: -64, y: -16, width: 128, height: 30, rx: 15 }),
        s("text", { y: 4, "text-anchor": "middle" }, first ? `${text}  ${percent(first.probability)}` : text),
      ),
    );
    drawTokens();
  }

  function drawTokens() {
    const { columns, width, tokensHeight: height } = layout;
    (tokens.setAttribute("width", width), tokens.setAttribute("height", height));
    tokens.setAttribute("viewBox", `0 0 ${width} ${height}`);
    corner.style.height = `${height}px`;
    put(corner, h("span", {}, attention ? `L${attention.layer} head ${attention.head} reads` : "tokens"));
    const weight = new Map((attention?.reads ?? []).map((read) => [read.position, read.weight]));
    const cell = (column) => {
      const [position] = column.positions;
      const size = column.positions.reduce((sum, each) => sum + (weight.get(each) ?? 0), 0);
      const label = column.positions.map((each) => `${each}: ${plain(model.explanation.tokens[each].text)}`).join("\n");
      return s(
        "g",
        { class: `word ${column.run ? "run" : ""}`, "data-position": position },
        s("rect", { class: "cell", x: column.x + 3, y: 3, width: column.width - 6, height: height - 6, rx: 5 }),
        size > 0.004 &&
          s("rect", {
            class: "weight",
            x: column.x + 3,
            y: height - 3 - (height - 6) * Math.min(1, size),
            width: column.width - 6,
            height: (height - 6) * Math.min(1, size),
            rx: 3,
          }),
        attention &&
          column.positions.includes(attention.query) &&
          s("rect", { class: "query", x: column.x + 3, y: 3, width: column.width - 6, height: height - 6, rx: 5 }),
        column.upright
          ? s("text", { transform: `translate(${column.center + 4},${height - 8}) rotate(-90)` }, column.text)
          : s("text", { x: column.center, y: height / 2 + 4, "text-anchor": "middle" }, column.text),
        s("title", {}, `${label}${size ? `\nattention ${percent(size)}` : ""}`),
      );
    };
    put(tokens, columns.map(cell));
  }

  const look = (effect) => (effect === null ? "unmeasured" : side(effect));
  const wash = (effect, most) =>
    effect === null ? 0 : (0.06 + 0.3 * Math.sqrt(Math.min(1, Math.abs(effect) / most))).toFixed(3);

  /** Return the attributes and listeners of an element that can be selected. */
  const button = (key, id, name, about) => ({
    id,
    role: "button",
    tabindex: -1,
    "data-key": key,
    "aria-label": name,
    onclick: (event) => (event.stopPropagation(), choose(key, true)),
    onpointerenter: (event) => ((hovered = key), showTip(event, about), focus()),
    onpointermove: moveTip,
    onpointerleave: () => ((hovered = null), (tip.hidden = true), focus()),
  });

  function drawCards() {
    put(cards, [...layout.at.values()].map(drawCard));
  }

  function drawCard(box) {
    const { part, x, y, w, h: tall, lines: title } = box;
    const size = sizeOf(part);
    const label = `${part.title}: ${size}, ${part.effect === null ? "effect not measured" : `effect ${signed(part.effect)} nats`}`;
    const about = () => aboutPart(part);
    const cls = `card ${part.type} ${look(part.effect)} ${box.open ? "open" : ""}`;
    if (box.small)
      return s(
        "g",
        { class: cls, ...button(part.key, `part-${part.key}`, label, about) },
        s("rect", { class: "frame", x, y, width: w, height: tall, rx: tall / 2 }),
        s("text", { class: "count", x: x + w / 2, y: y + 14, "text-anchor": "middle" }, title[0]),
      );
    const base = y + 15 + 14 * title.length;
    const numbers = part.effect === null ? "" : `${nats(part.effect)}${part.dense === null ? "" : ` / ${nats(part.dense)}`}`;
    return s(
      "g",
      { class: cls },
      s(
        "g",
        button(part.key, `part-${part.key}`, label, about),
        s("rect", { class: "frame", x, y, width: w, height: tall, rx: 7 }),
        part.type === "error" && s("rect", { class: "hatched", x, y, width: w, height: tall, rx: 7, fill: "url(#hatch)" }),
        s("rect", {
          class: "wash",
          x,
          y,
          width: w,
          height: box.open ? box.head - 3 : tall,
          rx: 7,
          "fill-opacity": wash(part.effect, model.strongestGroup),
        }),
        s("rect", { class: "edge-mark", x, y: y + 5, width: 3, height: (box.open ? box.head : tall) - 10, rx: 1.5 }),
        title.map((text, line) => s("text", { class: "name", x: x + PAD, y: y + 15 + 14 * line }, text)),
        s(
          "text",
          { class: "size", x: x + PAD, y: base },
          part.type === "error" ? "unexplained" : shortened(size, w - 2 * PAD - 5.9 * numbers.length),
        ),
        part.effect !== null &&
          s(
            "text",
            { class: "effect", x: x + w - PAD, y: base, "text-anchor": "end" },
            s("tspan", {}, nats(part.effect)),
            part.dense !== null && s("tspan", { class: "dense" }, ` / ${nats(part.dense)}`),
          ),
      ),
      box.open && part.nodes.map((node) => drawLeaf(node, layout.leaves.get(node.id))),
    );
  }

  /** Return a size in the longest form that fits. */
  function shortened(size, wide) {
    const ways = [size, size.replace(" of ", "/"), size.replace(" of ", "/").replace(/ nodes?$/, "")];
    return ways.find((way) => 5.8 * way.length <= wide) ?? ways[2];
  }

  function drawLeaf(node, { x, y, w, h: tall }) {
    const label = `${node.name} at ${node.position}, ${plain(model.explanation.tokens[node.position].text)}, effect ${effectOf(node)}`;
    const text = fitLines(labelOf(node) ?? node.name, w - 58, '10.5px "Inter", sans-serif', 1)[0];
    return s(
      "g",
      { class: `leaf ${look(node.effect)}`, ...button(node.id, `node-${node.id}`, label, () => aboutNode(node)) },
      s("rect", { class: "frame", x, y, width: w, height: tall, rx: 4 }),
      s("rect", { class: "wash", x, y, width: w, height: tall, rx: 4, "fill-opacity": wash(node.effect, model.strongest) }),
      s("text", { class: "name", x: x + 6, y: y + 13 }, text),
      s(
        "text",
        { class: "effect", x: x + w - 5, y: y + 13, "text-anchor": "end" },
        node.effect === null ? "–" : nats(node.effect),
      ),
    );
  }

  /** Draw a list of edges into `group`. */
  function edges(group, list) {
    const most = Math.max(Math.abs(links[0]?.effect ?? 0), 1e-9);
    const thick = scaleSqrt().domain([0, most]).range([0.5, 8]).clamp(true);
    const drawn = portsOf(layout, list).map((each, lane) =>
      s(
        "path",
        {
          class: side(each.link.effect),
          d: route(layout, each, lane),
          "stroke-width": thick(Math.abs(each.link.effect)).toFixed(2),
          "stroke-opacity": (0.22 + 0.5 * Math.sqrt(Math.abs(each.link.effect) / most)).toFixed(2),
        },
        s(
          "title",
          {},
          `${nameOf(each.link.source)} → ${nameOf(each.link.target)}: ${signed(each.link.effect)} nats by ${each.link.edges} ${each.link.edges === 1 ? "edge" : "edges"}`,
        ),
      ),
    );
    put(group, drawn);
  }

  /** Return the name of a key. */
  function nameOf(key) {
    if (key === "answer") return "the answer";
    if (key.startsWith("input:")) return `embedding of ${plain(model.explanation.tokens[Number(key.slice(6))].text, 20)}`;
    const part = parts.get(key),
      node = model.byId.get(key);
    return part ? `${part.title} at ${part.position}` : node ? `${node.name}@${node.position}` : key;
  }

  /** Return the key under which a key is drawn: a node of a closed group is drawn as its part. */
  const shownFor = (key) => (key === null || boxOf(layout, key) ? key : model.byId.has(key) ? partOf(model.byId.get(key)) : null);

  /** Highlight the element under the pointer, else the search results, else the selection, with its edges; dim the rest. */
  function focus() {
    const key = shownFor(hovered ?? state.selected);
    const sought = hovered ? null : state.found;
    // the edges of an open group end at its nodes
    const own = new Set([key, ...(layout.at.get(key)?.open ? parts.get(key).nodes.map((node) => node.id) : [])]);
    const near = key ? links.filter((link) => own.has(link.source) || own.has(link.target)).slice(0, FOCUS_EDGES) : [];
    const lit = sought
      ? new Set([...sought].map(shownFor))
      : new Set([...own, ...near.flatMap((link) => [link.source, link.target])]);
    plot.classList.toggle("focused", Boolean(sought || (key && boxOf(layout, key))));
    edges(focusLines, near);
    const chosen = shownFor(state.selected);
    for (const each of cards.querySelectorAll("[data-key]")) {
      const is = each.dataset.key;
      each.classList.toggle("lit", lit.has(is) || (layout.leaves.has(is) && lit.has(partOf(model.byId.get(is)))));
      each.classList.toggle("chosen", is === chosen);
      each.setAttribute("tabindex", is === chosen ? 0 : -1);
      each.setAttribute("aria-pressed", String(is === chosen));
    }
  }

  const numbersOf = (effect, sparse, dense) => [
    h(
      "p",
      { class: `tip-effect ${effect === null ? "quiet" : side(effect)}` },
      effect === null ? "effect not measured" : `loss of d when ablated alone: ${signed(effect)} nats`,
    ),
    sparse !== null && h("p", { class: "tip-numbers" }, `in sparse, with all its nodes: ${signed(sparse)} nats`),
    dense !== null && h("p", { class: "tip-numbers" }, `that change patched into dense: ${signed(dense)} nats`),
  ];

  function aboutPart(part) {
    const { tokens: texts } = model.explanation;
    const at = [...new Set(part.nodes.map((node) => node.position))].sort((a, b) => a - b);
    return [
      h("p", { class: "tip-head" }, part.title),
      h(
        "p",
        { class: "tip-label" },
        part.type === "error" ? "part of the dense residual that the sparse model misses" : sizeOf(part),
        " at ",
        at.slice(0, 6).map((each) => [token(texts[each].text), h("small", {}, ` ${each} `)]),
      ),
      numbersOf(part.effect, part.sparse, part.dense),
      h("p", { class: "tip-numbers" }, part.type === "error" ? null : "click to open or close"),
    ];
  }

  const aboutNode = (node) => [
    h(
      "p",
      { class: "tip-head" },
      h("code", {}, node.name),
      " at ",
      token(model.explanation.tokens[node.position].text),
      h("small", {}, ` ${node.position}`),
    ),
    h("p", { class: "tip-label" }, labelOf(node) ?? KIND_NAMES[node.kind]),
    h("p", { class: "tip-numbers" }, `value ${signed(node.activation)}, mean ${signed(node.mean)}`),
    numbersOf(node.effect, null, null),
  ];

  function showTip(event, about) {
    put(tip, about());
    tip.hidden = false;
    moveTip(event);
  }

  function moveTip(event) {
    const wide = tip.offsetWidth,
      tall = tip.offsetHeight;
    tip.style.left = `${Math.max(6, Math.min(event.clientX + 16, innerWidth - wide - 8))}px`;
    tip.style.top = `${event.clientY + 18 + tall > innerHeight ? event.clientY - tall - 12 : event.clientY + 18}px`;
  }

  const boxes = () => [...layout.at.values()].map((box) => box).concat([...layout.leaves.values()]);

  /** Return the key of the nearest box in an arrow's direction; the first card if nothing is selected. */
  function next(key, arrow) {
    const from = key && boxOf(layout, shownFor(key) ?? "");
    if (!from) return layout.at.keys().next().value ?? null;
    const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[arrow];
    const middle = (box) => [box.x + box.w / 2, box.y + (box.open ? 10 : box.h / 2)];
    const [x, y] = middle(from);
    let best = null,
      least = Infinity;
    for (const box of boxes()) {
      const [u, v] = middle(box);
      const along = (u - x) * dx + (v - y) * dy,
        across = Math.abs((u - x) * dy) + Math.abs((v - y) * dx);
      if (along > 0.5 && along + 3 * across < least) ((least = along + 3 * across), (best = box.key));
    }
    return best ?? key;
  }

  /** Scroll to the box of a key. */
  function reveal(key) {
    const box = boxOf(layout, shownFor(key) ?? "");
    if (!box) return;
    const seen = (now, room, low, size) =>
      low < now + 8 || low + size > now + room - 8 ? Math.max(0, low + size / 2 - room / 2) : now;
    holder.scrollTo({
      left: seen(holder.scrollLeft, holder.clientWidth - LABELS, box.x, box.w),
      top: seen(holder.scrollTop, holder.clientHeight - layout.tokensHeight, box.y, box.h),
    });
  }

  return {
    draw,
    next,
    reveal,
    parts: { names, plot, tokens },
    focusOn: (key) => plot.querySelector(`[data-key="${CSS.escape(shownFor(key) ?? "")}"]`)?.focus({ preventScroll: true }),
    attend(head) {
      attention = head;
      drawTokens();
    },
    groups: () => [...parts.values()].filter((part) => part.type === "group").map((part) => part.key),
    shown: () => [...parts.values()].reduce((sum, part) => sum + part.nodes.length, 0),
    edges: () => [lines.childElementCount, links.length],
    small: () => [...layout.at.values()].some((box) => box.small && box.part.weak),
    nameOf,
  };
}
