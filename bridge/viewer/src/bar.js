// What stands above and below the circuit: the nested circuits and the measures of the one that is drawn; what colours mean.

import { count, h, nats, number, percent, put, s } from "./dom.js";
import { levelName, nodeCount } from "./model.js";

const two = (x) => (x === null ? "–" : x.toFixed(2).replace("-", "−"));

/** Measures of a nested circuit: their names, what they say, and their texts. */
export const FACTS = [
  [
    "F",
    "normalised faithfulness: 1 less the distance from the dense model's d, as a share of the span",
    (c) => two(c.faithfulness),
  ],
  ["miss", "nats from the dense model's d", (c) => nats(c.miss)],
  ["KL", "of the next-token distribution, nats", (c) => number(c.kl)],
  ["supersets", "F in random supersets, mean", (c) => two(c.supersets_mean)],
  ["worst", "the lowest F in random supersets", (c) => two(c.supersets_worst)],
  ["adversary", "F in the superset that 20 sign steps against the circuit find; it bounds nothing", (c) => two(c.adversary)],
  ["left", "share of the span that is left when the circuit is ablated", (c) => two(c.left)],
  ["via errors", "share of the span that flows through its errors", (c) => percent(Math.max(0, c.error_share))],
];

/** The line above the circuit: the slider over the nested circuits, what was measured of this one, what is not drawn. */
export function drawBar(model, bar, state, set, graph) {
  const { nested, opening } = model.explanation;
  const circuit = nested[state.level];
  const listed = model.nodes.filter((node) => node.level <= state.level).length;
  const label = `${levelName(circuit)}: ${nodeCount(circuit.nodes)}${circuit.errors ? ` (${count(circuit.errors)} ${circuit.errors === 1 ? "error" : "errors"})` : ""}`;
  const levels =
    nested.length > 1 &&
    h(
      "div",
      { class: "levels" },
      h("input", {
        type: "range",
        id: "level",
        min: 0,
        max: nested.length - 1,
        step: 1,
        value: state.level,
        "aria-label": "Nested circuit",
        "aria-valuetext": label,
        oninput: (event) => set({ level: Number(event.target.value) }),
      }),
      h(
        "ol",
        { "aria-hidden": "true" },
        nested.map((each, place) =>
          h(
            "li",
            { class: place === state.level ? "here" : "", onclick: () => set({ level: place }) },
            h("b", {}, each.asked === null ? "full" : `F ${each.asked}`),
            h("small", { class: each.within ? "" : "missed" }, count(each.nodes)),
          ),
        ),
      ),
    );
  const notes = [
    !circuit.within && "The search did not reach all that it asks of this circuit.",
    state.level !== opening &&
      nested.length > 1 &&
      `Verdict, effects and edges are of the circuit at ${levelName(nested[opening])}.`,
    listed < circuit.nodes &&
      `${count(listed)} are drawn; ${count(circuit.nodes - listed)} more are counted and measured, not drawn.`,
  ];
  const closed = graph.groups().some((key) => !state.open.has(key));
  const input = bar.querySelector("#level");
  const line = [
    h("h2", { id: "level-text" }, label),
    circuit.nodes > 0 &&
      h(
        "dl",
        { class: "facts" },
        FACTS.map(([name, what, text]) => h("div", { title: what }, h("dt", {}, name), h("dd", {}, text(circuit)))),
      ),
    graph.groups().length > 0 &&
      h(
        "button",
        { type: "button", id: "open-all", class: "link", onclick: () => set({ open: new Set(closed ? graph.groups() : []) }) },
        closed ? "Open all groups" : "Close all groups",
      ),
    notes.some(Boolean) && h("p", { class: "note", id: "level-note" }, notes.filter(Boolean).join(" ")),
  ];
  if (input && levels) {
    // the slider stays the same element while it is dragged
    input.value = state.level;
    input.setAttribute("aria-valuetext", label);
    bar.querySelector(".levels ol").replaceWith(levels.querySelector("ol"));
    [...bar.children].slice(1).forEach((each) => each.remove());
    bar.append(...line.filter(Boolean));
  } else put(bar, levels, line);
}

/** What colours and hatching mean, how many edges are drawn, and how the answer divides between nodes and errors. */
export function drawLegend(model, legend, graph) {
  const { explanation } = model;
  const [drawn, all] = graph.edges();
  const circuit = explanation.nested[explanation.opening];
  const swatch = (name) =>
    s(
      "svg",
      { width: 20, height: 12, "aria-hidden": "true" },
      s(
        "g",
        { class: `card ${name}` },
        s("rect", { class: "frame", x: 1, y: 1, width: 18, height: 10, rx: 3 }),
        name.includes("error")
          ? s("rect", { class: "hatched", x: 1, y: 1, width: 18, height: 10, rx: 3, fill: "url(#hatch)" })
          : s("rect", { class: "wash", x: 1, y: 1, width: 18, height: 10, rx: 3, "fill-opacity": 0.45 }),
      ),
    );
  const share = Math.max(0, circuit.error_share);
  put(
    legend,
    h("span", {}, swatch("for"), "supports the answer"),
    h("span", {}, swatch("against"), "works against it"),
    model.nodes.some((node) => node.kind === "error") && h("span", {}, swatch("error"), "error: unexplained by the sparse model"),
    h(
      "span",
      {
        title:
          "what d loses when the group alone is ablated from the circuit, and, patched through the bridge, in the dense model",
      },
      "on cards: nats lost where it is ablated, circuit / dense",
    ),
    graph.small() && h("span", {}, `small, with their number of nodes: under ${number(model.weak)} nats`),
    all > 0 && h("span", {}, drawn < all ? `the ${count(drawn)} strongest of ${count(all)} edges` : `all ${count(all)} edges`),
    circuit.nodes > 0 &&
      h(
        "span",
        { class: "shares" },
        `span through nodes ${percent(1 - share)}, errors ${percent(share)} · replacement ${number(explanation.replacement)}, completeness ${number(explanation.completeness)}`,
      ),
  );
}
