// What stands above and below the circuit: how much of it is drawn, and what colours and sizes mean.

import { count, h, number, put, s, token } from "./dom.js";
import { missedBy } from "./measures.js";
import { MOST_NODES, drawn, keptEdges } from "./model.js";

/** The line above the circuit: how much of it is shown, the levels, and what was left out. */
export function drawBar(model, bar, state, set) {
  const { explanation, levels } = model;
  const level = levels[state.level];
  const nodes = drawn(model, state.level, state.all);
  const whole = model.nodes.length;
  const told = level.whole
    ? `the whole circuit: ${count(level.count)} nodes`
    : level.kl === null
      ? `the ${count(level.count)} strongest of ${count(whole)} nodes`
      : `${count(level.count)} of ${count(whole)} nodes`;
  const facts = level.kl !== null ? checked(level, explanation) : level.whole ? null : "only the whole was checked";
  const slider =
    levels.length > 1 &&
    h(
      "label",
      { class: "levels" },
      h("span", {}, "smaller"),
      h("input", {
        type: "range",
        id: "level",
        min: 0,
        max: levels.length - 1,
        step: 1,
        value: state.level,
        "aria-label": "How much of the circuit is drawn",
        "aria-valuetext": told,
        oninput: (event) => set({ level: Number(event.target.value) }),
      }),
      h("span", {}, "whole"),
      levelMarks(levels, explanation),
    );
  const input = bar.querySelector("#level");
  const more = [];
  if (!level.whole) more.push(h("p", { class: "note" }, `Verdict and evidence are of the whole circuit, ${count(whole)} nodes.`));
  if (nodes.length < level.nodes.length) {
    more.push(
      h(
        "p",
        { class: "note" },
        `Drawn are the ${count(nodes.length)} strongest. `,
        h(
          "button",
          { type: "button", class: "link", onclick: () => set({ all: true }) },
          `Draw all ${count(level.nodes.length)}`,
        ),
      ),
    );
  } else if (state.all && level.nodes.length > MOST_NODES) {
    more.push(
      h(
        "p",
        { class: "note" },
        h(
          "button",
          { type: "button", class: "link", onclick: () => set({ all: false }) },
          `Draw the ${MOST_NODES} strongest only`,
        ),
      ),
    );
  }
  if (!explanation.searched.complete)
    more.push(h("p", { class: "note" }, "The search was cut short: a smaller circuit may exist."));
  const text = h(
    "p",
    { class: "level-text", id: "level-text" },
    h("b", {}, told[0].toUpperCase() + told.slice(1)),
    facts && h("span", {}, " · ", facts),
  );
  if (input && slider) {
    // the slider stays the element that is being dragged
    input.value = state.level;
    input.setAttribute("aria-valuetext", told);
    put(bar.querySelector(".bar-text"), text, more);
  } else put(bar, h("h2", {}, "Circuit"), slider, h("div", { class: "bar-text" }, text, more));
}

/** What a level keeps, and what it misses of the aims of the whole. */
function checked(level, { sparse_difference: difference }) {
  const [kl, share] = missedBy(level, difference);
  const fact = (text, missed, aim) => (missed ? h("em", {}, `${text} (✗ ${aim})`) : text);
  return [
    fact(`KL ${number(level.kl)} nats`, kl, "aim ≤ 0.1"),
    ", ",
    fact(`keeps ${number(level.share)} of D`, share, "aim 0.9 to 1.1"),
  ];
}

/** A mark below each step of the slider: hollow where that level misses an aim. */
function levelMarks(levels, { sparse_difference: difference }) {
  const mark = (level) => {
    const missed = level.kl !== null && missedBy(level, difference).some(Boolean);
    const told = `${count(level.count)} nodes${level.kl === null ? "" : missed ? ": misses the aims" : ": meets the aims"}`;
    return h("i", { class: missed ? "missed" : "", title: told });
  };
  return h("span", { class: "marks", "aria-hidden": "true" }, levels.map(mark));
}

/** What colours and sizes mean, and how many edges are drawn. */
export function drawLegend(model, legend, edges) {
  const { target, contrast } = model.explanation;
  const kept = keptEdges(model.explanation);
  const dot = (name) =>
    s(
      "svg",
      { width: 12, height: 12, viewBox: "-6 -6 12 12", "aria-hidden": "true" },
      s("g", { class: name }, s("circle", { class: "dot", r: 4.6 })),
    );
  const sizes = s(
    "svg",
    { width: 34, height: 14, viewBox: "0 -7 34 14", "aria-hidden": "true" },
    [
      [4, 2.4],
      [13, 4],
      [26, 6.4],
    ].map(([cx, r]) => s("circle", { class: "size", cx, r })),
  );
  put(
    legend,
    h("span", {}, dot("for"), "towards ", token(target.text)),
    h("span", {}, dot("against"), "towards ", token(contrast.text)),
    h("span", {}, sizes, "what D loses without the node"),
    model.nodes.some((node) => node.known && !node.measured) && h("span", {}, dot("for estimated"), "estimated from its edges"),
    model.nodes.some((node) => !node.known) && h("span", {}, dot("unmeasured"), "not measured"),
    h(
      "span",
      {},
      `the ${count(edges)} strongest of ${kept ? `the edges that were kept (${kept})` : `${count(model.edges.length)} edges`}`,
    ),
    h("span", { class: "quiet defined" }, "D is the logit of the first less that of the second"),
  );
}
