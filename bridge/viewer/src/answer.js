// The top of the page: the prompt and the question, both models' answers, and the verdict with its reasons.

import { count, h, number, percent, put, running, signed, token } from "./dom.js";
import { dOf } from "./model.js";

const LADDER = ["behavioural", "representational", "mechanistic support"];
const SMALL = "(max-width: 1180px), (max-height: 800px)"; // here the reasons start folded, to leave room for the circuit

/** Draw the prompt, the question and the span. */
export function drawAsk({ explanation }, holder) {
  const { answer, contrast, dense } = explanation;
  const own = answer.id === dense[0].token.id;
  put(
    holder,
    h(
      "pre",
      { class: "prompt", tabindex: 0, "aria-label": "Prompt" },
      explanation.tokens.map((each, position) => h("span", { class: position % 2 ? "odd" : "" }, running(each.text, true))),
      h("span", { class: "caret", "aria-hidden": "true" }),
    ),
    h(
      "h1",
      {},
      own ? "Why does " : "Why might ",
      token(answer.text, "for"),
      own ? " follow" : " have followed",
      contrast ? [" rather than ", token(contrast.text, "against")] : " at all",
      "?",
    ),
    h(
      "p",
      { class: "question" },
      dOf(explanation, (text) => token(text)),
      ": a span of ",
      h("b", {}, `${number(Math.abs(explanation.span))} nats`),
      ` to explain, from ${signed(explanation.nothing_d)} with everything at its mean to ${signed(explanation.dense_d)} in the dense model.`,
    ),
    !own && h("p", { class: "note" }, "The dense model\u2019s own answer is ", token(dense[0].token.text), "."),
  );
}

/** Draw the dense model's likeliest tokens with their probabilities in both models. */
export function drawAnswers({ explanation }, holder) {
  const { answer, contrast, dense, sparse } = explanation;
  const most = Math.max(dense[0]?.probability ?? 0, sparse[0]?.probability ?? 0, 1e-9);
  const bar = (name, each) =>
    h(
      "div",
      { class: `track ${name}` },
      each && h("i", { style: { width: `${(100 * each.probability) / most}%` } }),
      h("span", {}, each ? percent(each.probability) : `not in its top ${sparse.length}`),
    );
  put(
    holder,
    h("h2", {}, "Next token"),
    h(
      "div",
      { class: "pairs" },
      dense.slice(0, 4).map((each) => [
        token(each.token.text, each.token.id === answer.id ? "for" : each.token.id === contrast?.id ? "against" : ""),
        h(
          "div",
          {},
          bar("dense", each),
          bar(
            "sparse",
            sparse.find((other) => other.token.id === each.token.id),
          ),
        ),
      ]),
    ),
    h(
      "p",
      { class: "key" },
      h("span", {}, h("i", { class: "swatch dense" }), `dense: d ${signed(explanation.dense_d)}`),
      h("span", {}, h("i", { class: "swatch sparse" }), `sparse: d ${signed(explanation.sparse_d)}`),
    ),
    !explanation.agree && h("p", { class: "key" }, h("b", {}, "The sparse model gives another answer.")),
  );
}

/** Draw the verdict, the ladder of verdicts, and the reasons. */
export function drawVerdict({ explanation }, holder) {
  const { verdict, reasons, rules } = explanation.report;
  const reached = LADDER.indexOf(verdict);
  put(
    holder,
    h("h2", {}, "Verdict"),
    h("p", { class: `verdict-word ${verdict.replace(/\W+/g, "-")}` }, verdict[0].toUpperCase() + verdict.slice(1)),
    h(
      "ol",
      { class: "ladder" },
      LADDER.map((step, place) =>
        h(
          "li",
          {
            class: `${place === reached ? "here" : ""} ${place <= reached ? "met" : ""}`,
            title: rules.find((rule) => rule.verdict === step)?.says ?? null,
            "aria-current": place === reached ? "step" : null,
          },
          step,
        ),
      ),
    ),
    h(
      "details",
      { class: "why", open: !matchMedia(SMALL).matches },
      h("summary", {}, "Why"),
      h(
        "ul",
        { class: "reasons" },
        reasons.map((reason) => h("li", {}, reason)),
      ),
    ),
  );
}

/** Draw the names of the dense model and of the coupling. */
export function drawModels({ explanation }, holder) {
  const where = explanation.provenance;
  const name = (path) => String(path).split("/").filter(Boolean).pop() ?? "";
  put(holder, name(where.dense), " explained by ", where.coupling ? name(where.coupling) : "a coupling in memory");
}

/** Return the explanation's origin in words. */
export function madeOf({ explanation }) {
  const where = explanation.provenance;
  return `bridge ${where.version} · seed ${where.seed} · ${where.coupling ?? "a coupling in memory"}, L0 ${where.l0 < 1 ? number(where.l0) : count(where.l0)} · dense model ${where.dense} (${where.dense_fingerprint.slice(0, 12)}) · means over ${where.reference}`;
}
