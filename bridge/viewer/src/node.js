// The sheet of a node: its label, its value and effect on this prompt, its edges, and its behaviour on text.

import { scaleLinear } from "d3-scale";
import { count, h, number, plain, plainLabel, put, s, signed, token } from "./dom.js";
import { KIND_NAMES, levelName, partOf } from "./model.js";
import { headsOf } from "./attention.js";
import { edgeLists } from "./edges.js";
import { effectBars } from "./group.js";
import { drawSteer } from "./steer.js";
import { onText } from "./text.js";

const W = 344;

/** Draw the sheet of a node of the circuit. */
export function drawNode(model, sheet, node, { choose, labels, showHead, notify }) {
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
    partLink(model, node, choose),
    numbers(model, node, page),
    heads(model, node, showHead),
    edgeLists(model, node.id, choose),
    page
      ? onText(page)
      : h(
          "p",
          { class: "empty" },
          "This page has no data on what this channel does on other text: run ",
          h("code", {}, "bridge nodes"),
          " on the coupling once, then explain the prompt again.",
        ),
    model.data.served && drawSteer(model, node),
  );
}

function labelEditor(node, page, labels, notify) {
  const automatic = node.label ?? page?.label ?? null;
  const status = h(
    "span",
    { class: "kept" },
    labels.where(node.name) ?? (automatic ? "label by rule; type to replace it with your own" : ""),
  );
  const input = h("input", {
    class: "label-input",
    type: "text",
    maxlength: 300,
    spellcheck: false,
    value: labels.get(node.name) ?? "",
    placeholder: automatic ? plainLabel(automatic) : "Label this channel",
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
      automatic && labels.get(node.name) ? h("span", {}, `label by rule: ${plainLabel(automatic)} · `) : null,
      status,
    ),
  );
}

/** Return the text over which the explanation's means were taken: its number of tokens if known, else its name. */
function reference(model) {
  const text = String(model.explanation.provenance.reference),
    tokens = /^(\d+) tokens/.exec(text);
  return tokens ? `${count(Number(tokens[1]))} tokens` : plain(text, 40);
}

/** Draw a node's value, its mean and deviation, and its effect. */
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
  return h(
    "section",
    {},
    h("h3", {}, "Here"),
    h("p", { class: "row-text" }, "value in the circuit ", h("b", {}, signed(node.activation))),
    h(
      "p",
      { class: "row-text quiet" },
      `mean ${signed(node.mean)} over ${reference(model)}, the value of the node when it is ablated${spread ? `; standard deviation ${number(spread)} over ${count(page.n_tokens)} tokens` : ""}`,
    ),
    drawing,
    node.effect === null
      ? h(
          "p",
          { class: "row-text quiet" },
          `Its effect was not measured. The smallest circuit with this node is the one at ${levelName(model.explanation.nested[node.level])}.`,
        )
      : effectBars([["loss of d when ablated alone, nats", node.effect]], model.strongest),
  );
}

/** Return a link to the node's group; null if it has none. */
function partLink(model, node, choose) {
  const group = node.group === null ? null : model.explanation.groups[node.group];
  if (!group) return null;
  return h(
    "p",
    { class: "heads" },
    h(
      "button",
      { type: "button", class: "link", onclick: () => choose(partOf(node)) },
      `Group: ${plainLabel(group.label ?? group.name)}`,
    ),
  );
}

function heads(model, node, showHead) {
  const found = headsOf(model, node);
  if (!found.length) return null;
  const link = (place) => {
    const { head, query } = model.attention[place];
    const text = `Attention of head ${head} at ${plain(model.explanation.tokens[query]?.text ?? "", 12)} (${query})`;
    return h("button", { type: "button", class: "link", onclick: () => showHead(place) }, text);
  };
  return h("p", { class: "heads" }, found.slice(0, 6).map(link));
}
