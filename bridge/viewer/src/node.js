// The sheet of a node: what it is called, what it does here, what it does on text, and what it is linked to.

import { scaleLinear } from "d3-scale";
import { count, h, number, plain, plainLabel, put, s, side, signed, token } from "./dom.js";
import { KIND_NAMES } from "./model.js";
import { headsOf } from "./attention.js";
import { edgeLists, nodeRow } from "./edges.js";
import { drawSteer } from "./steer.js";
import { onText } from "./text.js";

const W = 344;

/** Draw the sheet. */
export function drawNode(model, sheet, id, { choose, labels, showHead, notify }) {
  const node = model.byId.get(id);
  if (!node) {
    const many = model.nodes.length;
    put(
      sheet,
      h(
        "div",
        { class: "empty" },
        many
          ? [
              h("p", {}, "Choose a node: what it is, when it is active, and what it is linked to will stand here."),
              h("p", {}, "The strongest are"),
              h(
                "ul",
                { class: "edges-list" },
                model.nodes.slice(0, 8).map((each) => nodeRow(model, each.id, each.shown, choose, labels)),
              ),
            ]
          : h("p", {}, "The circuit has no nodes: nothing was needed beyond the averages over text."),
      ),
    );
    return;
  }
  const page = model.pages.get(node.name) ?? null;
  const here = model.explanation.tokens[node.position].text;
  put(
    sheet,
    labelEditor(node, page, labels, notify),
    h(
      "p",
      { class: "who" },
      h("code", {}, node.name),
      ` ${KIND_NAMES[node.kind]}${page?.head != null ? ` of head ${page.head}` : ""}, at `,
      token(here),
      ` (${node.position})`,
    ),
    numbers(model, node, page),
    heads(model, node, showHead),
    edgeLists(model, id, choose, labels),
    page
      ? onText(page)
      : h(
          "p",
          { class: "empty" },
          "What this channel does on other text is not known here: run ",
          h("code", {}, "bridge nodes"),
          " on the coupling once, and explain again.",
        ),
    model.data.served && drawSteer(model, node),
  );
}

function labelEditor(node, page, labels, notify) {
  const automatic = node.label ?? page?.label ?? null;
  const status = h(
    "span",
    { class: "kept" },
    labels.where(node.name) ?? (automatic ? "by rule; type to give it your own label" : ""),
  );
  const input = h("input", {
    class: "label-input",
    type: "text",
    maxlength: 300,
    spellcheck: false,
    value: labels.get(node.name) ?? "",
    placeholder: automatic ? plainLabel(automatic) : "Give it a label",
    title: labels.get(node.name) ?? (automatic ? plainLabel(automatic) : null),
    "aria-label": `Label of ${node.name}`,
    onkeydown: (event) => event.key === "Enter" && input.blur(),
    oninput: () => (clearTimeout(input.timer), (input.timer = setTimeout(keep, 400))),
    onchange: () => keep(),
  });
  async function keep() {
    clearTimeout(input.timer);
    try {
      const where = await labels.set(node.name, input.value);
      status.textContent = labels.get(node.name) ? where : "";
    } catch (error) {
      status.textContent = error.message;
      notify(error.message);
    }
  }
  return h(
    "div",
    { class: "label-edit" },
    input,
    h(
      "p",
      { class: "label-note" },
      automatic && labels.get(node.name) ? h("span", {}, `by rule: ${plainLabel(automatic)} · `) : null,
      status,
    ),
  );
}

/** The text over which the means of the explanation were taken, by its size where that is told. */
function reference(model) {
  const told = String(model.explanation.provenance.reference),
    tokens = /^(\d+) tokens/.exec(told);
  return tokens ? `${count(Number(tokens[1]))} tokens` : plain(told, 40);
}

/** Value against its mean, effect in both models. */
function numbers(model, node, page) {
  const spread = page?.deviation ?? 0;
  const most = 1.1 * Math.max(Math.abs(node.activation), Math.abs(node.mean) + spread, 1e-6);
  const x = scaleLinear()
    .domain([-most, most])
    .range([4, W - 4]);
  const drawing = s(
    "svg",
    {
      class: "strip",
      viewBox: `0 0 ${W} 22`,
      role: "img",
      "aria-label": `value ${signed(node.activation)}, mean ${signed(node.mean)}`,
    },
    spread > 0 && s("rect", { class: "spread", x: x(node.mean - spread), y: 6, width: x(spread) - x(0), height: 10, rx: 2 }),
    spread > 0 && s("rect", { class: "spread", x: x(node.mean), y: 6, width: x(spread) - x(0), height: 10, rx: 2 }),
    s("line", { class: "base", x1: 4, x2: W - 4, y1: 11, y2: 11 }),
    s("line", { class: "zero", x1: x(0), x2: x(0), y1: 4, y2: 18 }),
    s("line", { class: "control-mean", x1: x(node.mean), x2: x(node.mean), y1: 3, y2: 19 }),
    s("circle", { class: "value", cx: x(node.activation), cy: 11, r: 4.5 }),
  );
  const scale = Math.max(node.strength, Math.abs(node.dense?.dense ?? 0), Math.abs(node.dense?.sparse ?? 0), 1e-9);
  const bar = (name, value) => [
    h("dt", {}, name),
    h(
      "dd",
      {},
      h(
        "span",
        { class: "diverging" },
        value !== null &&
          h("i", {
            class: side(value),
            style: { [value >= 0 ? "left" : "right"]: "50%", width: `${(50 * Math.abs(value)) / scale}%` },
          }),
      ),
      h("b", {}, signed(value)),
    ),
  ];
  return h(
    "section",
    {},
    h("h3", {}, "Here"),
    h(
      "p",
      { class: "row-text" },
      "value in the whole sparse model ",
      h("b", {}, node.activation ? signed(node.activation) : "off"),
    ),
    h(
      "p",
      { class: "row-text quiet" },
      `mean ${signed(node.mean)} over ${reference(model)}, which stands for it when it is deleted${spread ? `; deviation ${number(spread)} over ${count(page.n_tokens)} tokens` : ""}`,
    ),
    drawing,
    h(
      "dl",
      { class: "effects" },
      node.measured
        ? bar("deleted from the circuit", node.effect)
        : bar(node.known ? "by its edges that were kept, not measured" : "deleted from the circuit: not measured", node.shown),
      node.dense && [
        bar("deleted from the sparse model", node.dense.sparse),
        bar("carried to the dense model", node.dense.dense),
      ],
    ),
    node.importance !== null &&
      h("p", { class: "row-text" }, `Without it the KL to the sparse model rises by ${number(node.importance)} nats.`),
    !node.dense && h("p", { class: "row-text quiet" }, "Its effect in the dense model was not among those measured."),
  );
}

function heads(model, node, showHead) {
  const found = headsOf(model, node);
  if (!found.length) return null;
  const link = (place) => {
    const { head, query } = model.attention[place];
    const told = `What head ${head} reads at ${plain(model.explanation.tokens[query]?.text ?? "", 12)} (${query})`;
    return h("button", { type: "button", class: "link", onclick: () => showHead(place) }, told);
  };
  return h("p", { class: "heads" }, found.slice(0, 6).map(link));
}
