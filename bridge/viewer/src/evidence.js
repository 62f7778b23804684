// Draw the evidence: the nested circuits as a table, and each measure on an axis with its control and the values that pass.

import { scaleLinear } from "d3-scale";
import { count, h, number, put, s } from "./dom.js";
import { FACTS } from "./bar.js";
import { madeOf } from "./answer.js";
import { drawPoints } from "./profile.js";
import { levelName } from "./model.js";

const BARE = new Set(["it", "mean"]); // names of bars that are the control's mean itself
const W = 344,
  TOP = 15,
  H = 42,
  SIDE = 6;
const OPS = { ">=": "≥", "<=": "≤" };

/** Return the region of values that pass, as [low, high]; null if there is no criterion. */
export function passing(criterion, control) {
  if (!criterion) return null;
  const up = criterion.op === ">=";
  let bound = criterion.bound;
  if (criterion.beyond_control && control) bound = up ? Math.max(bound, control.bar) : Math.min(bound, control.bar);
  return up ? [bound, Infinity] : [-Infinity, bound];
}

/** Return a criterion in words. */
function asked({ op, bound, beyond_control, control_bound }) {
  const parts = [`${OPS[op]} ${shortly(bound)}`];
  if (beyond_control) parts.push(`${op === ">=" ? "above" : "below"} the control`);
  if (control_bound !== null) parts.push(`control ${OPS[op === ">=" ? "<=" : ">="]} ${shortly(control_bound)}`);
  return parts.join(", ");
}

const metOf = ({ passed, criterion }) => {
  if (!criterion) return ["bare", ""];
  return passed === null ? ["unknown", "not judged"] : passed ? ["met", "passed"] : ["missed", "failed"];
};

/** Draw one measure. */
function drawMeasure(measure, choose, model) {
  const { control, ceiling, interval, criterion, value } = measure;
  const [met, word] = metOf(measure);
  const shown = interval ? `${number(value)} [${number(interval[0])}, ${number(interval[1])}]` : number(value);
  const bar = control && !BARE.has(control.bar_is) ? ` (${control.bar_is} ${number(control.bar)})` : "";
  return h(
    "article",
    { class: `measure ${met}`, "data-measure": measure.key },
    h("header", {}, h("h4", {}, measure.name), h("span", { class: "met-word" }, word)),
    value !== null && axis(measure),
    h(
      "p",
      { class: "measure-text" },
      h("b", {}, value === null ? "not measured" : shown),
      criterion && h("span", {}, ` · asked ${asked(criterion)}`),
      control && h("span", {}, ` · ${control.what} ${number(control.mean)}${bar}, ${count(control.draws)} draws`),
      ceiling !== null && h("span", {}, ` · all nodes ${number(ceiling)}`),
      !criterion && value !== null && h("span", {}, " · no bound"),
    ),
    measure.note && h("p", { class: "measure-note" }, measure.note),
    measure.points.length > 0 && drawPoints(model, measure, choose),
  );
}

function axis(measure) {
  const { value, control, ceiling, interval, criterion } = measure;
  const region = passing(criterion, control);
  const marks = [value, control?.mean, control?.bar, ceiling, ...(interval ?? []), ...(region ?? [])].filter(
    (x) => x !== undefined && x !== null && Number.isFinite(x),
  );
  let [low, high] = [Math.min(0, ...marks), Math.max(...marks)];
  if (low >= 0 && high > 0.7 && high <= 1) high = 1;
  if (high - low < 1e-9) high = low + 1;
  const pad = (high - low) * 0.05;
  const scale = scaleLinear()
    .domain([low - pad, high + pad])
    .range([SIDE, W - SIDE]);
  const x = (at) => scale(Math.max(scale.domain()[0], Math.min(scale.domain()[1], at)));
  const ticks = ticksOf(x, region, scale.ticks(5), scale.domain());
  const middle = TOP + 6;
  const label = `value ${number(value)}${control ? `, ${control.what} mean ${number(control.mean)}, ${control.bar_is} ${number(control.bar)}` : ""}${criterion ? `, asked ${asked(criterion)}` : ""}`;
  return s(
    "svg",
    { class: "axis", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": label },
    region &&
      s("rect", {
        class: "aim",
        x: x(region[0]),
        y: TOP - 4,
        width: Math.max(2, x(region[1]) - x(region[0])),
        height: 20,
        rx: 2,
      }),
    s("line", { class: "base", x1: SIDE, x2: W - SIDE, y1: middle, y2: middle }),
    ticks.map((tick) => [
      s("line", { class: "tick", x1: x(tick), x2: x(tick), y1: middle + 8, y2: middle + 12 }),
      s(
        "text",
        { class: "tick-text", x: x(tick), y: H - 1, "text-anchor": x(tick) < 20 ? "start" : x(tick) > W - 20 ? "end" : "middle" },
        shortly(tick),
      ),
    ]),
    control && [
      s("line", { class: "control-band", x1: x(control.mean), x2: x(control.bar), y1: middle, y2: middle }),
      s("line", { class: "control-mean", x1: x(control.mean), x2: x(control.mean), y1: middle - 7, y2: middle + 7 }),
      !BARE.has(control.bar_is) &&
        s("line", { class: "control-bar", x1: x(control.bar), x2: x(control.bar), y1: middle - 7, y2: middle + 7 }),
      s(
        "text",
        {
          class: "control-text",
          x: x(control.mean),
          y: 9,
          "text-anchor": x(control.mean) > W - 60 ? "end" : x(control.mean) < 60 ? "start" : "middle",
        },
        control.what,
      ),
    ],
    ceiling !== null && s("path", { class: "ceiling", d: `M${x(ceiling)} ${middle - 9}v18m-4-18h8m-8 18h8` }),
    interval && s("line", { class: "interval", x1: x(interval[0]), x2: x(interval[1]), y1: middle, y2: middle }),
    s("circle", { class: "value", cx: x(value), cy: middle, r: 5 }),
  );
}

const shortly = (x) => String(Number(x.toPrecision(3))).replace("-", "−");

/** Return the ticks of an axis: the bounds of the region, 0, and those round numbers for which there is room. */
function ticksOf(x, region, round, [low, high]) {
  const kept = [];
  for (const tick of [...(region ?? []), 0, ...round]) {
    if (!(tick >= low && tick <= high)) continue;
    if (kept.every((other) => Math.abs(x(tick) - x(other)) > 26)) kept.push(tick);
  }
  return kept;
}

/** Draw the table of nested circuits, the measures of the opening circuit, and the rules for the verdict. */
export function drawEvidence(model, sheet, choose, set, level) {
  const { report, nested, opening, backup } = model.explanation;
  put(
    sheet,
    nested[opening].nodes > 0 &&
      h(
        "section",
        {},
        h("h3", {}, "Nested circuits"),
        h("p", { class: "lead" }, "Each lies inside the next. Sizes count nodes, never groups."),
        nestedTable(nested, opening, level, set),
        backup &&
          h(
            "p",
            { class: "measure-note" },
            `When the circuit at ${levelName(nested[opening])} is ablated, ${number(backup.left)} of the span is left: ${count(backup.nodes)} other nodes back it up`,
            backup.strongest.length
              ? [", mainly ", backup.strongest.slice(0, 4).map((id, place) => [place ? ", " : "", h("code", {}, id)])]
              : null,
            ".",
          ),
      ),
    h(
      "section",
      {},
      h("h3", {}, "Evidence"),
      h(
        "p",
        { class: "lead" },
        `${nested[opening].nodes ? `Measured on the circuit at ${levelName(nested[opening])}. ` : ""}The dot is the value. The bar is its control, from the mean to the draw that is hardest to beat. Values in the tinted region pass.`,
      ),
      report.measures.map((measure) => drawMeasure(measure, choose, model)),
    ),
    h(
      "section",
      { id: "rules" },
      h("h3", {}, "Rules for the verdict"),
      h("p", { class: "lead" }, "A rule gives its verdict if its measures and those of the rules before it pass."),
      h(
        "table",
        { class: "rules" },
        h(
          "tbody",
          {},
          report.rules.map((rule) =>
            h(
              "tr",
              {},
              h("th", { scope: "row" }, rule.refuted ? `${rule.verdict}, else ${rule.refuted}` : rule.verdict),
              h("td", {}, needed(rule, report.measures)),
            ),
          ),
        ),
      ),
    ),
    h("p", { class: "made" }, madeOf(model)),
  );
}

/** Return the names of a rule's measures, each with a mark that tells whether it passed. */
function needed(rule, measures) {
  const mark = { met: "✓", missed: "✗" };
  return rule.needs.map((key) => {
    const measure = measures.find((each) => each.key === key);
    const [met] = metOf(measure);
    return h("span", { class: met }, `${mark[met] ?? "?"} ${measure.name}`);
  });
}

/** Return a table with a column for each nested circuit and a row for each measure. */
function nestedTable(nested, opening, level, set) {
  const look = (place) => ({
    class: `${place === opening ? "opening" : ""} ${place === level ? "here" : ""}`,
    onclick: () => set({ level: place }),
  });
  const row = ([name, what, text]) =>
    h(
      "tr",
      {},
      h("th", { scope: "row", title: what }, name),
      nested.map((circuit, place) => h("td", look(place), text(circuit))),
    );
  const heads = nested.map((circuit, place) =>
    h(
      "th",
      { scope: "col", ...look(place) },
      circuit.asked === null ? "full KL" : levelName(circuit),
      !circuit.within && h("small", { class: "bad", title: "misses a bound of the search" }, " ✗"),
    ),
  );
  const sizes = [
    ["nodes", "number of nodes, including errors", (circuit) => count(circuit.nodes)],
    ["errors", null, (circuit) => count(circuit.errors)],
  ];
  return h(
    "table",
    { class: "nested" },
    h("thead", {}, h("tr", {}, h("td", {}), heads)),
    h("tbody", {}, [...sizes, ...FACTS].map(row)),
  );
}
