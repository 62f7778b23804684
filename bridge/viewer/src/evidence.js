// The evidence, drawn: every measure on an axis with its control, its aim and, where there is one, its interval and its ceiling.

import { scaleLinear, scaleSymlog } from "d3-scale";
import { count, h, number, put, s, signed } from "./dom.js";
import { aimRegion, asksOf, measuresOf } from "./measures.js";
import { jobOf } from "./job.js";
import { drawProfile } from "./profile.js";

const TESTS = {
  gate: "Is it done at all?",
  swap: "1. Counterfactual transport",
  loop: "2. Circuit in the loop",
  profile: "3. Effect profile",
  blind: "4. Blind prediction",
};
const BARE = new Set(["it", "mean"]); // bars of a control that say no more than its mean
const W = 344,
  TOP = 15,
  H = 42,
  SIDE = 6;

/** One measure. */
function drawMeasure(measure) {
  const { control, ceiling, interval } = measure;
  const asks = asksOf(measure.name);
  const met = measure.passed === null ? ["unknown", "not known"] : measure.passed ? ["met", "met"] : ["missed", "missed"];
  const beside = control
    ? `${control.what} ${number(control.mean)}${BARE.has(control.bar_is) ? "" : ` (${control.bar_is} ${number(control.bar)})`}`
    : "no control";
  const shown = interval ? `${number(measure.value)} [${number(interval[0])}, ${number(interval[1])}]` : number(measure.value);
  return h(
    "article",
    { class: `measure ${met[0]}` },
    h("header", {}, h("h4", {}, asks ?? measure.name), h("span", { class: "met-word" }, met[1])),
    measure.value !== null && axis(measure),
    h(
      "p",
      { class: "measure-text" },
      h("b", {}, shown),
      unitOf(measure.name) && measure.value !== null && ` ${unitOf(measure.name)}`,
      asks && h("span", {}, ` ${measure.name}`),
      h("span", {}, ` · beside ${beside}${control ? `, ${count(control.draws)} draws` : ""}`),
      ceiling && h("span", {}, ` · ceiling ${number(ceiling.mean)}`),
      h("span", {}, ` · aim ${measure.aim.replaceAll("<=", "≤").replaceAll(">=", "≥")}`),
    ),
    measure.note && h("p", { class: "measure-note" }, measure.note),
  );
}

function axis(measure) {
  const { value, control, ceiling, interval } = measure;
  const region = aimRegion(measure.aim, control, ceiling);
  const marks = [value, control?.mean, control?.bar, ceiling?.mean, ...(interval ?? []), ...(region ?? [])].filter(
    (x) => x !== undefined && x !== null && Number.isFinite(x),
  );
  const logarithmic = measure.name.startsWith("KL") && Math.min(...marks) >= 0;
  let [low, high] = [Math.min(0, ...marks), Math.max(...marks)];
  if (high - low < 1e-9) high = low + 1;
  const pad = (high - low) * 0.05;
  const scale = (logarithmic ? scaleSymlog().constant(0.05) : scaleLinear())
    .domain([logarithmic ? 0 : low - pad, high + pad])
    .range([SIDE, W - SIDE]);
  const x = (at) => scale(Math.max(scale.domain()[0], Math.min(scale.domain()[1], at)));
  const unit = unitOf(measure.name);
  const ticks = ticksOf(x, region, logarithmic ? [0.1, 1, 10] : scale.ticks(5), scale.domain(), unit ? W - 42 : W);
  const middle = TOP + 6;
  const told = `value ${number(value)}${control ? `, ${control.what} mean ${number(control.mean)}, ${control.bar_is} ${number(control.bar)}` : ""}, aim ${measure.aim}`;
  return s(
    "svg",
    { class: "axis", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": told },
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
    unit && s("text", { class: "tick-text", x: W - SIDE, y: H - 1, "text-anchor": "end" }, unit),
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
          "text-anchor": x(control.mean) > W - 40 ? "end" : x(control.mean) < 40 ? "start" : "middle",
        },
        control.what,
      ),
    ],
    ceiling && s("path", { class: "ceiling", d: `M${x(ceiling.mean)} ${middle - 9}v18m-4-18h8m-8 18h8` }),
    interval && s("line", { class: "interval", x1: x(interval[0]), x2: x(interval[1]), y1: middle, y2: middle }),
    s("circle", { class: "value", cx: x(value), cy: middle, r: 5 }),
  );
}

const unitOf = (name) => (name.startsWith("KL") ? "nats" : "");
const shortly = (x) => String(Number(x.toPrecision(3))).replace("-", "−");

/** Where an axis is marked: at 0, where the aim begins and ends, and at round numbers that leave these room; none beyond `end`. */
function ticksOf(x, region, round, [low, high], end) {
  const kept = [];
  for (const tick of [...(region ?? []), 0, ...round]) {
    if (!(tick >= low && tick <= high) || x(tick) > end) continue;
    if (kept.every((other) => Math.abs(x(tick) - x(other)) > 26)) kept.push(tick);
  }
  return kept;
}

/** Everything that was measured, the card, and the nulls; `awaited` says where a card is that is still to come. */
export function drawEvidence(model, sheet, choose, awaited) {
  const { faithfulness } = model.explanation;
  put(
    sheet,
    h(
      "section",
      {},
      h("h3", {}, "On this prompt"),
      h(
        "p",
        { class: "lead" },
        `Of the whole circuit, ${count(model.nodes.length)} nodes. A dot is the measure, a bar its control from mean to hardest draw, the tinted region the aim.`,
      ),
      measuresOf(faithfulness).map(drawMeasure),
    ),
    faithfulness.effects.length > 2 && drawProfile(model, choose),
    h("div", { id: "tests" }),
  );
  drawTests(model, sheet.querySelector("#tests"), awaited);
}

/** What to do for a card, where there is none. */
const forACard = (served) =>
  served
    ? ["To have them, ask again on the start page with the box for the card ticked."]
    : [
        h("code", {}, "bridge explain --card"),
        " runs all but the first of them, ",
        h("code", {}, '--counterfactual "…"'),
        " all.",
      ];

/** The card and the nulls, or where the card is. */
export function drawTests(model, holder, awaited) {
  const { card } = model.explanation;
  put(
    holder,
    h(
      "section",
      { id: "card" },
      h("h3", {}, "The card: tests on the dense model"),
      card
        ? drawCard(card)
        : awaited
          ? h("p", { class: "empty awaited" }, awaited)
          : h(
              "p",
              { class: "empty" },
              "No card has been made: the tests on the dense model were not run. Of the measures above only the last is of it. ",
              forACard(jobOf(model.data) !== null),
            ),
    ),
    card && drawNulls(card),
  );
}

function drawCard(card) {
  const groups = new Map();
  for (const test of card.tests) groups.set(test.test ?? "", [...(groups.get(test.test ?? "") ?? []), test]);
  return [
    h(
      "p",
      { class: "lead" },
      card.verdict && h("b", {}, `${card.verdict[0].toUpperCase()}${card.verdict.slice(1)}. `),
      (card.reasons ?? []).join(" "),
    ),
    [...groups].map(([test, measures]) => [test && h("h5", {}, TESTS[test] ?? test), measures.map(drawMeasure)]),
    (card.notes ?? []).map((note) => h("p", { class: "measure-note" }, note)),
  ];
}

const NULL_TESTS = { swap: "transport", loop: "loop", profile: "profile", blind: "blind" };
const SOLVED = 0.9; // accuracy of a null's sparse model from which on it does the task

/** What must not pass, null by null: how many tasks it solves, and on how many each test holds. */
function drawNulls({ nulls, nulls_note }) {
  return h(
    "section",
    { id: "nulls" },
    h("h3", {}, "Nulls: none may pass all four tests"),
    nulls?.length
      ? [
          h(
            "p",
            { class: "lead" },
            "A null is a model, a bridge or an answer made meaningless. It passes where all four tests hold on one task: the tests are worthless then. A single test that holds for a null is no evidence by itself.",
          ),
          nullsTable(nulls),
          nulls.map((each) =>
            h("p", { class: "measure-note" }, h("b", {}, each.name), ` ${each.what}${each.note ? `; ${each.note}` : ""}`),
          ),
        ]
      : h(
          "p",
          { class: "empty" },
          h("b", {}, "Without nulls. "),
          nulls_note || "Whether a sparse model that is not coupled would pass the same tests is not known here.",
          " ",
          h("code", {}, "bridge nulls"),
          " finds out.",
        ),
  );
}

function nullsTable(nulls) {
  const many = (found, of) => (found ? `on ${found} of ${of} ${of === 1 ? "task" : "tasks"}` : "on none");
  const cell = (found, of) => h("td", { class: found ? "" : "quiet" }, many(found, of));
  const row = ({ name, what, tasks, passed }) =>
    h(
      "tr",
      { class: passed ? "bad" : "" },
      h("th", { scope: "row", title: what }, name, h("span", { class: "met-word" }, passed ? "✗ passes" : "✓ fails")),
      h("td", { class: "quiet" }, `${tasks.filter((task) => (task.accuracy ?? 0) >= SOLVED).length} of ${tasks.length}`),
      Object.keys(NULL_TESTS).map((test) => cell(tasks.filter((task) => task.holds[test] === true).length, tasks.length)),
    );
  const heads = Object.entries(NULL_TESTS).map(([test, name]) => h("th", { scope: "col", title: TESTS[test] }, name));
  const solved = h(
    "th",
    { scope: "col", title: `its sparse model answers right at least ${100 * SOLVED} % of the time` },
    "solved",
  );
  return h("table", { class: "nulls" }, h("thead", {}, h("tr", {}, h("td", {}), solved, heads)), h("tbody", {}, nulls.map(row)));
}
