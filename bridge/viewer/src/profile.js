// Effects in the sparse model against those in the dense one, a dot per node.

import { scaleSymlog } from "d3-scale";
import { h, s, signed } from "./dom.js";

const W = 344,
  TALL = 236,
  LEFT = 44,
  BOTTOM = 34,
  TOP = 8,
  RIGHT = 8;

/** The drawing and what it shows. */
export function drawProfile(model, choose) {
  const { effects } = model.explanation.faithfulness;
  const axisOf = (key, range) => {
    const most = Math.max(...effects.map((effect) => Math.abs(effect[key])), 1e-3);
    const scale = scaleSymlog()
      .constant(most / 30)
      .domain([-most, most])
      .range(range);
    return { scale, ticks: ticksOf(most, scale) };
  };
  const across = axisOf("sparse", [LEFT, W - RIGHT]),
    up = axisOf("dense", [TALL - BOTTOM, TOP]);
  return h(
    "section",
    {},
    h("h3", {}, "Effects in both models"),
    h(
      "p",
      { class: "lead" },
      "A dot is a node: what D loses without it in the sparse model, and by its transported change in the dense one, in logits. Filled dots are the circuit's. Axes are stretched around 0.",
    ),
    s(
      "svg",
      {
        class: "profile",
        viewBox: `0 0 ${W} ${TALL}`,
        role: "img",
        "aria-label": `Effects of ${effects.length} nodes in both models`,
      },
      acrossTicks(across),
      upTicks(up),
      dotsOf(model, effects, across.scale, up.scale, choose),
    ),
  );
}

/** 0 and powers of ten on both sides, from the largest that fits down, as far apart as their texts need. */
function ticksOf(most, scale) {
  const kept = [0];
  for (let size = 10 ** Math.floor(Math.log10(most)); size > most / 200; size /= 10) {
    const far = kept.every((other) => Math.abs(scale(size) - scale(other)) > 24);
    if (far) kept.push(size, -size);
  }
  return kept;
}

const told = (tick) =>
  signed(Number(tick.toPrecision(1)))
    .replace(/(\.\d*?)0+$/, "$1")
    .replace(/\.$/, "");
const base = (zero) => (zero ? "base zero-line" : "base");

function acrossTicks({ scale, ticks }) {
  const bottom = TALL - BOTTOM;
  return [
    ticks.map((tick) => [
      s("line", { class: base(tick === 0), x1: scale(tick), x2: scale(tick), y1: TOP, y2: bottom }),
      s("text", { class: "tick-text", x: scale(tick), y: bottom + 12, "text-anchor": "middle" }, tick ? told(tick) : "0"),
    ]),
    s("text", { class: "tick-text", x: W - RIGHT, y: TALL - 5, "text-anchor": "end" }, "sparse model, logits of D"),
  ];
}

function upTicks({ scale, ticks }) {
  return [
    ticks.map((tick) => [
      s("line", { class: base(tick === 0), x1: LEFT, x2: W - RIGHT, y1: scale(tick), y2: scale(tick) }),
      s("text", { class: "tick-text", x: LEFT - 4, y: scale(tick) + 3, "text-anchor": "end" }, tick ? told(tick) : "0"),
    ]),
    s(
      "text",
      { class: "tick-text", transform: `translate(9,${TOP}) rotate(-90)`, "text-anchor": "end" },
      "dense model, logits of D",
    ),
  ];
}

function dotsOf(model, effects, x, y, choose) {
  return [...effects]
    .sort((a, b) => a.inside - b.inside)
    .map((effect) => {
      const known = model.byId.has(effect.node);
      return s(
        "circle",
        {
          class: `${effect.inside ? "inside" : "outside"}${known ? " known" : ""}`,
          cx: x(effect.sparse),
          cy: y(effect.dense),
          r: 3.6,
          onclick: known ? () => choose(effect.node) : null,
        },
        s("title", {}, `${effect.node}: ${signed(effect.sparse)} in sparse, ${signed(effect.dense)} in dense`),
      );
    });
}
