// The evidence, drawn: every measure on an axis with its control, its aim and, where there is one, its interval and its ceiling.

import { scaleLinear, scaleSymlog } from "d3-scale";
import { h, number, put, s, signed } from "./dom.js";

const ASKS = {
  "KL(dense, sparse)": "Do the two models answer alike?",
  "KL of the circuit alone": "Is the circuit enough?",
  "share of D it keeps": "Does it keep the preference?",
  "KL in random company, mean": "Without help from cancellation?",
  "KL in random company, worst": "And at worst?",
  "KL with the circuit deleted": "Is it needed?",
  "share of D left without it": "Is the preference gone without it?",
  "rank correlation in dense": "Do its effects recur in the dense model?",
};
const TESTS = {
  gate: "Is it done at all?",
  swap: "1. Counterfactual transport",
  loop: "2. Circuit in the loop",
  profile: "3. Effect profile",
  blind: "4. Blind prediction",
};
const ORDER = ["agreement", "kl_kept", "share_kept", "company_mean", "company_worst", "kl_lost", "share_lost", "profile"];
const W = 344,
  TOP = 15,
  H = 42,
  SIDE = 6;

/** The measures of a faithfulness in reading order, the interval put with the profile. */
export function measuresOf(faithfulness) {
  return ORDER.filter((name) => faithfulness[name]).map((name) => ({
    ...faithfulness[name],
    interval: name === "profile" ? faithfulness.profile_interval : faithfulness[name].interval,
  }));
}

/** The region that an aim in words asks for, as [low, high]; null where it is no region. */
export function aimRegion(aim, control) {
  let low = -Infinity,
    high = Infinity,
    known = false;
  for (const part of aim.split(",")) {
    const between = /(-?[\d.]+) to (-?[\d.]+)/.exec(part),
      bound = /(<=|>=|<|>)\s*(-?[\d.]+)/.exec(part);
    if (between) ((low = Math.max(low, Number(between[1]))), (high = Math.min(high, Number(between[2]))), (known = true));
    else if (bound)
      (bound[1][0] === "<" ? (high = Math.min(high, Number(bound[2]))) : (low = Math.max(low, Number(bound[2]))), (known = true));
    else if (control && /\bbelow\b/.test(part)) ((high = Math.min(high, control.bar)), (known = true));
    else if (control && /\babove\b/.test(part)) ((low = Math.max(low, control.bar)), (known = true));
  }
  return known ? [low, high] : null;
}

/** One measure. */
export function drawMeasure(measure) {
  const { control, ceiling, interval } = measure;
  const met = measure.passed === null ? ["unknown", "not known"] : measure.passed ? ["met", "met"] : ["missed", "missed"];
  const beside = control
    ? `${control.what} ${number(control.mean)}${control.bar_is === "mean" ? "" : ` (${control.bar_is} ${number(control.bar)})`}`
    : "no control";
  const shown = interval ? `${number(measure.value)} [${number(interval[0])}, ${number(interval[1])}]` : number(measure.value);
  return h(
    "article",
    { class: `measure ${met[0]}` },
    h("header", {}, h("h4", {}, ASKS[measure.name] ?? measure.name), h("span", { class: "met-word" }, met[1])),
    measure.value !== null && axis(measure),
    h(
      "p",
      { class: "measure-text" },
      h("b", {}, shown),
      ASKS[measure.name] && h("span", {}, ` ${measure.name}`),
      h("span", {}, ` · beside ${beside}${control ? `, ${control.draws.toLocaleString("en-US")} draws` : ""}`),
      ceiling && h("span", {}, ` · ceiling ${number(ceiling.mean)}`),
      h("span", {}, ` · aim ${measure.aim.replaceAll("<=", "≤").replaceAll(">=", "≥")}`),
    ),
    measure.note && h("p", { class: "measure-note" }, measure.note),
  );
}

function axis(measure) {
  const { value, control, ceiling, interval } = measure;
  const region = aimRegion(measure.aim, control);
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
  const ticks = logarithmic ? [0, 0.1, 1, 10].filter((tick) => tick <= high + pad) : scale.ticks(5);
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
        String(tick),
      ),
    ]),
    control && [
      s("line", { class: "control-band", x1: x(control.mean), x2: x(control.bar), y1: middle, y2: middle }),
      s("line", { class: "control-mean", x1: x(control.mean), x2: x(control.mean), y1: middle - 7, y2: middle + 7 }),
      control.bar_is !== "mean" &&
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

/** Everything that was measured, the card, and the nulls; `awaited` says where a card is that is still to come. */
export function drawEvidence(model, sheet, choose, awaited) {
  const { faithfulness } = model.explanation;
  put(
    sheet,
    h(
      "section",
      {},
      h("h3", {}, "On this prompt"),
      h("p", { class: "lead" }, "A dot is the measure, a bar its control from mean to hardest draw, the tinted region the aim."),
      measuresOf(faithfulness).map(drawMeasure),
    ),
    faithfulness.effects.length > 2 && drawProfile(model, choose),
    h("div", { id: "tests" }),
  );
  drawTests(model, sheet.querySelector("#tests"), awaited);
}

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
              "No card has been made. Of the measures above only the last is of the dense model. ",
              h("code", {}, "bridge card"),
              " runs the tests on it.",
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

/** What must not pass, null by null: on how many tasks each test holds. */
function drawNulls({ nulls, nulls_note }) {
  const names = Object.keys(TESTS).filter((test) => nulls?.some((each) => each.tasks?.some((task) => test in task.holds)));
  const row = (each) =>
    h(
      "tr",
      { class: each.passed ? "bad" : "" },
      h("th", { scope: "row", title: each.what }, each.name),
      names.map((test) => h("td", {}, `${each.tasks.filter((task) => task.holds[test] === true).length}/${each.tasks.length}`)),
      h("td", { class: "met-word" }, each.passed ? "✗ passes" : "✓ fails"),
    );
  return h(
    "section",
    { id: "nulls" },
    h("h3", {}, "Nulls, which must fail"),
    nulls?.length
      ? [
          h(
            "p",
            { class: "lead" },
            "On how many tasks a test holds where it should not. A null that passes makes the tests worthless.",
          ),
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
                names.map((test) => h("th", { scope: "col" }, test)),
                h("td", {}),
              ),
            ),
            h("tbody", {}, nulls.map(row)),
          ),
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

/** Effects in the sparse model against those in the dense one, a dot per node. */
function drawProfile(model, choose) {
  const { effects } = model.explanation.faithfulness;
  const tall = 220,
    left = 34,
    bottom = 26;
  const most = (key) => Math.max(...effects.map((effect) => Math.abs(effect[key])), 1e-3);
  const x = scaleSymlog()
    .constant(most("sparse") / 30)
    .domain([-most("sparse"), most("sparse")])
    .range([left, W - 8]);
  const y = scaleSymlog()
    .constant(most("dense") / 30)
    .domain([-most("dense"), most("dense")])
    .range([tall - bottom, 8]);
  const dots = [...effects]
    .sort((a, b) => a.inside - b.inside)
    .map((effect) => {
      const known = model.byId.has(effect.node);
      const told = `${effect.node}: ${signed(effect.sparse)} in sparse, ${signed(effect.dense)} in dense`;
      return s(
        "circle",
        {
          class: `${effect.inside ? "inside" : "outside"}${known ? " known" : ""}`,
          cx: x(effect.sparse),
          cy: y(effect.dense),
          r: 3.6,
          onclick: known ? () => choose(effect.node) : null,
        },
        s("title", {}, told),
      );
    });
  return h(
    "section",
    {},
    h("h3", {}, "Effects in both models"),
    h(
      "p",
      { class: "lead" },
      "A dot is a node: what D loses without it in the sparse model, and by its transported change in the dense one. Filled dots are the circuit's. Axes are stretched around 0.",
    ),
    s(
      "svg",
      {
        class: "profile",
        viewBox: `0 0 ${W} ${tall}`,
        role: "img",
        "aria-label": `Effects of ${effects.length} nodes in both models`,
      },
      s("line", { class: "base", x1: left, x2: W - 8, y1: y(0), y2: y(0) }),
      s("line", { class: "base", x1: x(0), x2: x(0), y1: 8, y2: tall - bottom }),
      dots,
      s("text", { class: "tick-text", x: W - 8, y: tall - 4, "text-anchor": "end" }, `sparse, to ${number(most("sparse"))}`),
      s(
        "text",
        { class: "tick-text", transform: "translate(12,8) rotate(-90)", "text-anchor": "end" },
        `dense, to ${number(most("dense"))}`,
      ),
    ),
  );
}
