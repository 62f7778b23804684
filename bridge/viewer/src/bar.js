// The bar above the circuit, with the nested circuits and the measures of the drawn one, and the legend below the circuit.

import { count, h, nats, number, percent, put, s } from "./dom.js";
import { levelName, nodeCount } from "./model.js";

const two = (x) => (x === null ? "–" : x.toFixed(2).replace("-", "−"));

/** Measures of a nested circuit, each as [name, meaning, function that returns its text]. */
export const FACTS = [
  [
    "F",
    "normalised faithfulness: 1 minus the distance of d from the dense model's, as a share of the span",
    (c) => two(c.faithfulness),
  ],
  ["miss", "distance of d from the dense model's, in nats", (c) => nats(c.miss)],
  ["KL", "KL from the dense model's next-token distribution, in nats", (c) => number(c.kl)],
  ["supersets", "mean F in random supersets", (c) => two(c.supersets_mean)],
  ["worst", "lowest F in random supersets", (c) => two(c.supersets_worst)],
  ["adversary", "lowest F that 20 sign steps on a mask over the outside nodes find; no bound", (c) => two(c.adversary)],
  ["left", "share of the span that is left when the circuit is ablated", (c) => two(c.left)],
  ["by errors", "share of the span that flows through its errors", (c) => percent(Math.max(0, c.error_share))],
];

/** Draw the bar: the slider over the nested circuits, the measures of the selected one, and notes on what is not drawn. */
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
    !circuit.within && "This circuit misses a bound of the search.",
    state.level !== opening &&
      nested.length > 1 &&
      `The verdict, effects and edges are those of the circuit at ${levelName(nested[opening])}.`,
    listed < circuit.nodes &&
      `${count(listed)} nodes are drawn; ${count(circuit.nodes - listed)} more are counted and measured, but not drawn.`,
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
    // keep the slider's element, because the user may be dragging it
    input.value = state.level;
    input.setAttribute("aria-valuetext", label);
    bar.querySelector(".levels ol").replaceWith(levels.querySelector("ol"));
    [...bar.children].slice(1).forEach((each) => each.remove());
    bar.append(...line.filter(Boolean));
  } else put(bar, levels, line);
}

/** Draw the legend: colours and hatching, the number of edges drawn, and the shares of the span through nodes and errors. */
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
    h("span", {}, swatch("against"), "opposes the answer"),
    model.nodes.some((node) => node.kind === "error") && h("span", {}, swatch("error"), "error: unexplained by the sparse model"),
    h(
      "span",
      {
        title:
          "First the loss of d when the group alone is ablated from the circuit, then the loss in the dense model when the group is ablated from the sparse model with all its nodes and this change is patched through the bridge",
      },
      "on cards: loss of d when ablated, in nats, circuit / dense",
    ),
    graph.small() && h("span", {}, `small cards: node count, effect under ${number(model.weak)} nats`),
    all > 0 && h("span", {}, drawn < all ? `the ${count(drawn)} strongest of ${count(all)} edges` : `all ${count(all)} edges`),
    circuit.nodes > 0 &&
      h(
        "span",
        { class: "shares" },
        `span: ${percent(1 - share)} through nodes, ${percent(share)} through errors · replacement ${number(explanation.replacement)}, completeness ${number(explanation.completeness)}`,
      ),
  );
}
