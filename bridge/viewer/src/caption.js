// Caption and key of a saved picture of the circuit: the prompt, the question and the verdict, and the meaning of the marks.

import { count, h, number, plain, s, signed } from "./dom.js";
import { dOf, levelName } from "./model.js";

const LINE = 19,
  LETTER = 7.3, // widths of a letter, in the larger and in the smaller text
  SMALL = 6.4,
  PAD = 12;

/** Return a colour of the page's theme as a value that needs no stylesheet. */
function colour(name) {
  const probe = h("span", { style: { color: `var(--${name})` } });
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

/** Return text as lines of at most `most` letters, broken at spaces if possible. */
function lines(text, most) {
  const out = [];
  let rest = [...text];
  while (rest.length > most) {
    const space = rest.lastIndexOf(" ", most);
    const cut = space > most / 2 ? space : most;
    out.push(rest.slice(0, cut).join(""));
    rest = rest.slice(rest[cut] === " " ? cut + 1 : cut);
  }
  return [...out, rest.join("")];
}

/** Return the caption, which is above the circuit, as {drawing, height}. */
export function captionOf(model, level, shown, width) {
  const { explanation } = model;
  const { answer, provenance, nested } = explanation;
  const asked = `${plain([...explanation.prompt].slice(-160).join(""))} → ${plain(answer.text, 20)}`;
  const circuit = nested[level];
  const facts = [
    dOf(explanation, (text) => plain(text, 20)).join(""),
    `span ${number(Math.abs(explanation.span))} nats, d ${signed(explanation.dense_d)} in the dense model`,
    `verdict: ${explanation.report.verdict}`,
    `circuit at ${levelName(circuit)}: ${count(circuit.nodes)} nodes, F ${number(circuit.faithfulness)}${shown < circuit.nodes ? `, ${count(shown)} drawn` : ""}`,
    `${provenance.coupling ?? "a coupling in memory"}, bridge ${provenance.version}`,
  ].join(" · ");
  const rows = [
    ...lines(asked, Math.max(20, Math.floor((width - 2 * PAD) / LETTER))).map((text) => [text, 12.5, "monospace", colour("ink")]),
    ...lines(facts, Math.max(20, Math.floor((width - 2 * PAD) / SMALL))).map((text) => [text, 12, "sans-serif", colour("soft")]),
  ];
  const texts = rows.map(([text, size, family, fill], row) =>
    s("text", { x: PAD, y: PAD + LINE * (row + 0.7), fill, "font-size": size, "font-family": family }, text),
  );
  return { drawing: s("g", {}, texts), height: 2 * PAD + LINE * rows.length };
}

/** Return the key, which is below the circuit, as {drawing, height}. */
export function keyOf(width) {
  const items = [
    [{ fill: colour("for") }, "supports the answer"],
    [{ fill: colour("against") }, "opposes the answer"],
    [{ fill: "none", stroke: colour("faint"), "stroke-dasharray": "2 2" }, "error: unexplained by the sparse model"],
    [
      null,
      "numbers: loss of d when ablated, in nats, in the circuit / in the dense model; width of an edge: what it adds to d",
    ],
  ];
  let x = PAD,
    y = PAD + 6;
  const drawn = items.map(([looks, text]) => {
    const wide = (looks ? 14 : 0) + text.length * SMALL + 18;
    if (x > PAD && x + wide > width) ((x = PAD), (y += LINE));
    const at = x;
    x += wide;
    return [
      looks && s("circle", { cx: at + 4, cy: y, r: 4.4, "stroke-width": 1.4, ...looks }),
      s("text", { x: at + (looks ? 14 : 0), y: y + 4, fill: colour("soft"), "font-size": 12, "font-family": "sans-serif" }, text),
    ];
  });
  return { drawing: s("g", {}, drawn), height: y + PAD + 6 };
}
