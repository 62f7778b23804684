// The sheet of a node: what it is called, what it does here, what it does on text, and what it is linked to.

import { scaleLinear } from "d3-scale";
import { h, number, percent, plain, put, running, s, side, signed, token } from "./dom.js";
import { KIND_NAMES, outer } from "./model.js";
import { headsOf } from "./attention.js";
import { drawSteer } from "./steer.js";

const W = 344;
const FIRST = 12; // edges listed each way at first
const BEFORE = 20,
  AFTER = 14; // letters of a context, more do not fit

/** Draw the sheet. */
export function drawNode(model, sheet, id, { choose, labels, showHead, say }) {
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
    labelEditor(node, page, labels, say),
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
    edges(model, "Fed by", model.ins(id), "source", choose, labels),
    edges(model, "Feeds", model.outs(id), "target", choose, labels),
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

function labelEditor(node, page, labels, say) {
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
      say(error.message);
    }
  }
  return h(
    "div",
    { class: "label-edit" },
    input,
    h(
      "p",
      { class: "label-note" },
      automatic && labels.get(node.name) ? h("span", {}, `by rule: ${plainLabel(automatic)} `) : null,
      status,
    ),
  );
}

const plainLabel = (text) => plain(text).replaceAll("·", " ");

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
  const scale = Math.max(
    Math.abs(node.effect ?? node.shown),
    Math.abs(node.dense?.dense ?? 0),
    Math.abs(node.dense?.sparse ?? 0),
    1e-9,
  );
  const bar = (name, value, note) => [
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
      note && h("small", {}, note),
    ),
  ];
  return h(
    "section",
    {},
    h("h3", {}, "Here"),
    h(
      "p",
      { class: "row-text" },
      "value ",
      h("b", {}, node.activation ? signed(node.activation) : "off"),
      ` mean over text ${signed(node.mean)}${spread ? ` ± ${number(spread)}` : ""}`,
    ),
    drawing,
    h(
      "dl",
      { class: "effects" },
      node.measured ? bar("deleted from the circuit", node.effect) : bar("by its edges, not measured", node.shown),
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
  return h(
    "p",
    { class: "heads" },
    found
      .slice(0, 6)
      .map((head) =>
        h(
          "button",
          { type: "button", class: "link", onclick: () => showHead(head) },
          `What head ${model.explanation.attention[head].head} reads at token ${model.explanation.attention[head].query}`,
        ),
      ),
  );
}

function edges(model, title, list, key, choose, labels) {
  const body = h("ul", { class: "edges-list" });
  const show = (most) =>
    put(
      body,
      list.slice(0, most).map((edge) => nodeRow(model, edge[key], edge.effect, choose, labels, edge)),
      list.length > most &&
        h(
          "li",
          {},
          h("button", { type: "button", class: "link", onclick: () => show(list.length) }, `${list.length - most} more`),
        ),
    );
  show(FIRST);
  return h(
    "section",
    {},
    h("h3", {}, title, h("small", {}, list.length ? "edge, its weight, what D owes to it" : "")),
    list.length ? body : h("p", { class: "row-text quiet" }, "No edge among the strongest that the explanation holds."),
  );
}

/** A node in a list: a button with its name, place and a bar. */
export function nodeRow(model, id, effect, choose, labels, edge = null) {
  const node = model.byId.get(id),
    what = outer(id);
  const text = what.position !== null ? model.explanation.tokens[what.position]?.text : null;
  const title = node
    ? (labels.get(node.name) ?? null)
    : { answer: "the answer", embedding: "embedding", bigram: "bigram table" }[what.kind];
  const most = edge ? model.strongestEdge : model.strongest;
  const inner = [
    h("code", {}, what.kind === "answer" ? "D" : what.name),
    text !== null && text !== undefined && what.kind !== "answer" ? token(text) : null,
    title ? h("span", { class: "row-label" }, title) : null,
    h(
      "span",
      { class: "row-numbers" },
      edge && h("small", {}, `${edge.kind} ${signed(edge.weight)}`),
      h(
        "span",
        { class: "diverging" },
        h("i", {
          class: side(effect),
          style: { [effect >= 0 ? "left" : "right"]: "50%", width: `${50 * Math.sqrt(Math.abs(effect) / most)}%` },
        }),
      ),
      h("b", {}, signed(effect)),
    ),
  ];
  return h(
    "li",
    {},
    node ? h("button", { type: "button", class: "row", onclick: () => choose(id) }, inner) : h("span", { class: "row" }, inner),
  );
}

/** Contexts, tokens and the dense direction, from the node's page. */
function onText(page) {
  const most = Math.max(...[...page.high, ...page.low].map((each) => Math.abs(each.value)), 1e-9);
  const contexts = (title, list) =>
    list.length > 0 &&
    h(
      "section",
      {},
      h("h3", {}, title),
      h(
        "ol",
        { class: "contexts" },
        list.map((each) =>
          h(
            "li",
            {},
            h("b", {}, signed(each.value)),
            h(
              "span",
              { class: "context" },
              h("bdi", { class: "before" }, running([...each.before].slice(-BEFORE).join(""))),
              h(
                "mark",
                { class: side(each.value), style: { "--strength": `${Math.round((100 * Math.abs(each.value)) / most)}%` } },
                running(each.token),
              ),
              h("bdi", {}, running([...each.after].slice(0, AFTER).join(""))),
            ),
          ),
        ),
      ),
    );
  const chips = (list, name) =>
    h(
      "p",
      { class: "chips" },
      list.length
        ? list.map((each) => h("span", { class: "chip" }, token(each.text, name), h("small", {}, signed(each.score))))
        : h("span", { class: "quiet" }, "none"),
    );
  const words = page.tokens === "embedded" ? ["Embedded by, positively", "Embedded by, negatively"] : ["Promotes", "Demotes"];
  return [
    h(
      "section",
      {},
      h("h3", {}, "On text"),
      h("p", { class: "row-text" }, page.summary),
      page.description && h("p", { class: "row-text" }, page.description),
    ),
    contexts("Where it is highest", page.high),
    contexts("Where it is lowest", page.low),
    page.tokens !== "none" &&
      h("section", {}, h("h3", {}, words[0]), chips(page.promotes, "for"), h("h3", {}, words[1]), chips(page.demotes, "against")),
    page.dense &&
      h(
        "section",
        {},
        h(
          "h3",
          {},
          "In the dense model",
          h(
            "small",
            {},
            `direction of length ${number(page.dense.length)} at site ${page.dense.site}, read by ${page.dense.read_by}`,
          ),
        ),
        page.dense.promotes === null
          ? h("p", { class: "row-text quiet" }, "The dense model does not say which its output embedding is.")
          : [chips(page.dense.promotes, "for"), chips(page.dense.demotes ?? [], "against")],
      ),
    h(
      "p",
      { class: "row-text quiet" },
      `Active at ${percent(page.active)} of ${page.n_tokens.toLocaleString("en-US")} tokens, mean ${signed(page.mean)}, deviation ${number(page.deviation)}.`,
    ),
  ];
}
