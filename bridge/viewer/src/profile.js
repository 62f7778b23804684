// The values from which a measure was computed: effects in the sparse and the dense model as a scatter plot, or a table.

import { scaleSymlog } from "d3-scale";
import { h, number, s, signed } from "./dom.js";

const W = 344,
  TALL = 216,
  LEFT = 44,
  BOTTOM = 34,
  TOP = 8,
  RIGHT = 8;
const MANY = 12; // the smallest number of points that is drawn as a scatter plot

/** Return the drawing of the values from which a measure was computed. */
export function drawPoints(model, measure, choose) {
  const { points } = measure;
  const names = [...new Set(points.flatMap((point) => Object.keys(point.values)))].filter((name) => name !== "behind");
  const paired = ["sparse", "dense"].every((name) => points.every((point) => Number.isFinite(point.values[name])));
  if (paired && points.length >= MANY) return scatter(model, points, choose);
  return h(
    "details",
    { class: "points", open: points.length <= MANY },
    h("summary", {}, `${points.length} ${points.length === 1 ? "value" : "values"}`),
    h(
      "table",
      {},
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          h("td", {}),
          names.map((name) => h("th", { scope: "col" }, name)),
        ),
      ),
      h(
        "tbody",
        {},
        points.slice(0, 60).map((point) =>
          h(
            "tr",
            {},
            h("th", { scope: "row" }, point.label),
            names.map((name) => h("td", {}, number(point.values[name]))),
          ),
        ),
      ),
    ),
  );
}

/** Return a scatter plot with a dot for each point. */
function scatter(model, points, choose) {
  const axisOf = (key, range) => {
    const most = Math.max(...points.map((point) => Math.abs(point.values[key])), 1e-3);
    const scale = scaleSymlog()
      .constant(most / 30)
      .domain([-most, most])
      .range(range);
    return { scale, ticks: ticksOf(most, scale) };
  };
  const across = axisOf("sparse", [LEFT, W - RIGHT]),
    up = axisOf("dense", [TALL - BOTTOM, TOP]);
  return s(
    "svg",
    { class: "profile", viewBox: `0 0 ${W} ${TALL}`, role: "img", "aria-label": `${points.length} effects in both models` },
    acrossTicks(across),
    upTicks(up),
    points.map((point) => {
      const node = model.byId.get(point.label) ?? model.nodes.find((each) => each.name === point.label);
      return s(
        "circle",
        {
          class: node ? "known" : "",
          cx: across.scale(point.values.sparse),
          cy: up.scale(point.values.dense),
          r: 3.6,
          onclick: node ? () => choose(node.id) : null,
        },
        s("title", {}, `${point.label}: ${signed(point.values.sparse)} in sparse, ${signed(point.values.dense)} in dense`),
      );
    }),
  );
}

/** Return ticks: 0 and powers of ten of both signs, the largest first, without those whose texts would overlap. */
function ticksOf(most, scale) {
  const kept = [0];
  for (let size = 10 ** Math.floor(Math.log10(most)); size > most / 200; size /= 10) {
    const far = kept.every((other) => Math.abs(scale(size) - scale(other)) > 24);
    if (far) kept.push(size, -size);
  }
  return kept;
}

const shown = (tick) =>
  signed(Number(tick.toPrecision(1)))
    .replace(/(\.\d*?)0+$/, "$1")
    .replace(/\.$/, "");
const base = (zero) => (zero ? "base zero-line" : "base");

function acrossTicks({ scale, ticks }) {
  const bottom = TALL - BOTTOM;
  return [
    ticks.map((tick) => [
      s("line", { class: base(tick === 0), x1: scale(tick), x2: scale(tick), y1: TOP, y2: bottom }),
      s("text", { class: "tick-text", x: scale(tick), y: bottom + 12, "text-anchor": "middle" }, tick ? shown(tick) : "0"),
    ]),
    s("text", { class: "tick-text", x: W - RIGHT, y: TALL - 5, "text-anchor": "end" }, "sparse model, nats"),
  ];
}

function upTicks({ scale, ticks }) {
  return [
    ticks.map((tick) => [
      s("line", { class: base(tick === 0), x1: LEFT, x2: W - RIGHT, y1: scale(tick), y2: scale(tick) }),
      s("text", { class: "tick-text", x: LEFT - 4, y: scale(tick) + 3, "text-anchor": "end" }, tick ? shown(tick) : "0"),
    ]),
    s("text", { class: "tick-text", transform: `translate(9,${TOP}) rotate(-90)`, "text-anchor": "end" }, "dense model, nats"),
  ];
}
