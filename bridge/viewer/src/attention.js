// The attention of a head over the prompt: the positions that it reads, the channels that cause this, and the values it moves.

import { h, number, percent, plain, put, running, signed, token } from "./dom.js";
import { diverging } from "./edges.js";
import { effectBars } from "./group.js";

/** Return the indices in `model.attention` of a node's heads: of its layer, of its head if its page names one, and with its
 *  position as the query (q and attn_out) or among the positions that are read (other kinds). */
export function headsOf(model, node) {
  if (!["q", "k", "v", "attn_out"].includes(node.kind)) return [];
  const head = model.pages.get(node.name)?.head ?? null;
  const found = [];
  model.attention.forEach((each, place) => {
    const reads = each.reads.some((read) => read.position === node.position);
    const fits = each.layer === node.layer && (head === null || head === each.head);
    if (fits && (node.kind === "attn_out" || node.kind === "q" ? each.query === node.position : reads)) found.push(place);
  });
  return found;
}

function leftOut({ explanation }) {
  const more = explanation.attention_left_out;
  return more ? ` ${more} more heads at tokens have smaller first-order effects and are not listed.` : "";
}

/** Draw the sheet; `state.head` is the index of the selected head, `state.read` the position whose terms are shown. */
export function drawAttention(model, sheet, state, { set, choose }) {
  const { tokens } = model.explanation,
    { attention } = model;
  if (!attention.length) {
    put(sheet, h("div", { class: "empty" }, h("p", {}, "No head of the circuit affects d, so there is no attention to show.")));
    return;
  }
  const place = Math.min(state.head ?? 0, attention.length - 1);
  const head = attention[place];
  const title = (each) =>
    `Layer ${each.layer}, head ${each.head}, at ${plain(tokens[each.query]?.text ?? "", 12)} (${each.query}): ${signed(each.effect)}`;
  const chooser = h(
    "select",
    { "aria-label": "Head", onchange: (event) => set({ head: Number(event.target.value), read: null }) },
    attention.map((each, other) => h("option", { value: other, selected: other === place }, title(each))),
  );
  const weight = new Map(head.reads.map((read) => [read.position, read.weight]));
  const rest = Math.max(0, 1 - head.sink - head.reads.reduce((sum, read) => sum + read.weight, 0));
  const prompt = h(
    "div",
    { class: "attended" },
    tokens.slice(0, head.query + 1).map((each, position) =>
      h(
        "span",
        {
          role: "button",
          tabindex: weight.has(position) ? 0 : null,
          class: `${position === head.query ? "query" : ""} ${position === state.read ? "open" : ""}`,
          style: { "--weight": `${Math.round(100 * Math.sqrt(weight.get(position) ?? 0))}%` },
          title: `${position}: ${percent(weight.get(position) ?? 0)}`,
          "aria-disabled": String(!weight.has(position)),
          onclick: () => weight.has(position) && set({ read: position }),
          onkeydown: (event) => event.key === "Enter" && set({ read: position }),
        },
        running(each.text, true),
      ),
    ),
  );
  const effects = [
    ["pattern and values", head.effect],
    ["pattern alone, values frozen", head.pattern_effect],
    ["values alone, pattern frozen", head.value_effect],
    ["interaction of pattern and values", head.interaction],
  ];
  const most = Math.max(...effects.map(([, value]) => Math.abs(value)), 1e-9);
  const reads = [...head.reads].sort((a, b) => b.weight - a.weight);
  const open = head.reads.find((read) => read.position === state.read) ?? reads[0] ?? null;
  put(
    sheet,
    h(
      "section",
      {},
      h("h3", {}, "Head"),
      chooser,
      h(
        "p",
        { class: "lead" },
        `Heads at tokens are ordered by the loss of d when they are ablated, in nats. Each token is tinted by its attention weight from the outlined token.${leftOut(model)}`,
      ),
      prompt,
    ),
    h(
      "section",
      {},
      h("h3", {}, "What it reads"),
      h(
        "ul",
        { class: "reads" },
        reads
          .slice(0, 12)
          .map((read) =>
            h(
              "li",
              {},
              h(
                "button",
                { type: "button", class: `row ${read === open ? "open" : ""}`, onclick: () => set({ read: read.position }) },
                h("code", {}, read.position),
                token(tokens[read.position]?.text ?? ""),
                h("span", { class: "weight" }, h("i", { style: { width: `${100 * read.weight}%` } })),
                h("b", {}, percent(read.weight)),
              ),
            ),
          ),
        h(
          "li",
          { class: "quiet row" },
          h("span", {}, "sink"),
          h("span", { class: "weight" }, h("i", { style: { width: `${100 * head.sink}%` } })),
          h("b", {}, percent(head.sink)),
        ),
        rest > 0.005 &&
          h(
            "li",
            { class: "quiet row" },
            h("span", {}, "other tokens"),
            h("span", { class: "weight" }, h("i", { style: { width: `${100 * rest}%` } })),
            h("b", {}, percent(rest)),
          ),
      ),
    ),
    open && terms(model, open, choose),
    h("section", {}, h("h3", {}, "Loss of d when the head is ablated, in nats"), effectBars(effects, most)),
  );
}

function terms(model, read, choose) {
  const scores = [...read.terms].sort((a, b) => Math.abs(b.product) - Math.abs(a.product)),
    moved = [...read.moved].sort((a, b) => Math.abs(b.effect) - Math.abs(a.effect));
  const top = Math.abs(scores[0]?.product ?? 1),
    far = Math.abs(moved[0]?.effect ?? 1);
  const known = (node) =>
    model.byId.has(node) ? node : model.byId.has(`${node}@${read.position}`) ? `${node}@${read.position}` : null;
  return [
    h(
      "section",
      {},
      h(
        "h3",
        {},
        "Why it reads ",
        token(model.explanation.tokens[read.position]?.text ?? ""),
        h("small", {}, `score ${signed(read.score)} in the circuit: the sum of query × key / √channels over the channels`),
      ),
      scores.length
        ? h(
            "ul",
            { class: "terms" },
            scores
              .slice(0, 10)
              .map((term) =>
                h(
                  "li",
                  {},
                  h("code", {}, `channel ${term.channel}`),
                  h("small", {}, `${number(term.query_value)} × ${number(term.key_value)}`),
                  diverging(term.product, top),
                  h("b", {}, signed(term.product)),
                ),
              ),
          )
        : h("p", { class: "row-text quiet" }, "No channel is listed."),
    ),
    h(
      "section",
      {},
      h("h3", {}, "What it moves from there", h("small", {}, "value in the circuit, and what it adds to d, in nats")),
      moved.length
        ? h(
            "ul",
            { class: "terms" },
            moved.slice(0, 10).map((term) => {
              const id = known(term.node);
              const inner = [
                h("code", {}, term.node),
                h("small", {}, signed(term.value)),
                diverging(term.effect, far),
                h("b", {}, signed(term.effect)),
              ];
              return h("li", {}, id ? h("button", { type: "button", class: "row", onclick: () => choose(id) }, inner) : inner);
            }),
          )
        : h("p", { class: "row-text quiet" }, "No node of the circuit."),
    ),
  ];
}
