// What a reader sees first: the prompt and the answer, how sure both models are, the verdict and why.

import { count, h, number, percent, put, running, signed, token } from "./dom.js";

const LADDER = ["refuted", "behavioural", "representational", "mechanistic support"];
const SMALL = "(max-width: 1180px), (max-height: 800px)"; // the circuit needs the room: reasons are opened when asked for
const MEANING = {
  "no explanation": "The sparse model does not answer as the dense one does, so it cannot explain it here.",
  refuted: "The circuit fails a test that it must pass. Do not rely on it.",
  undecided: "A test that is needed could not be taken.",
  behavioural: "The circuit suffices on the sparse model. It is not shown that the dense model computes it this way.",
  representational: "The circuit's changes, carried into the dense model, move its answer too.",
  "mechanistic support": "All tests on the dense model hold and the nulls fail. This is support, not proof.",
};

/** The verdict that counts: the card's where there is one. */
export const verdictOf = (explanation) => (explanation.card?.verdict ? explanation.card : explanation.faithfulness);

/** The prompt and the question. */
export function drawAsk(model, holder) {
  const { explanation } = model;
  const own = explanation.target.id === explanation.dense[0].token.id;
  const first = explanation.dense.find((answer) => answer.token.id === explanation.target.id);
  const second = explanation.dense.find((answer) => answer.token.id === explanation.contrast.id);
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
      own ? "continues with " : "might continue with ",
      h("span", {}, token(explanation.target.text, "for"), first && h("small", {}, percent(first.probability))),
      " rather than ",
      h("span", {}, token(explanation.contrast.text, "against"), second && h("small", {}, percent(second.probability))),
    ),
    !own && h("p", { class: "note" }, "The dense model's own answer is ", token(explanation.dense[0].token.text), "."),
  );
}

/** Both models' answers beside each other. */
export function drawAnswers(model, holder) {
  const { explanation } = model;
  const shown = explanation.dense
    .slice(0, 4)
    .map((answer) => [answer, explanation.sparse.find((other) => other.token.id === answer.token.id)]);
  const most = Math.max(explanation.dense[0]?.probability ?? 0, explanation.sparse[0]?.probability ?? 0, 1e-9);
  const bar = (name, answer) =>
    h(
      "div",
      { class: `track ${name}` },
      answer && h("i", { style: { width: `${(100 * answer.probability) / most}%` } }),
      h("span", {}, answer ? percent(answer.probability) : `not in its top ${explanation.sparse.length}`),
    );
  put(
    holder,
    h("h2", {}, "Next token"),
    h(
      "div",
      { class: "pairs" },
      shown.map(([answer, other]) => [
        token(
          answer.token.text,
          answer.token.id === explanation.target.id ? "for" : answer.token.id === explanation.contrast.id ? "against" : "",
        ),
        h("div", {}, bar("dense", answer), bar("sparse", other)),
      ]),
    ),
    h(
      "p",
      { class: "key" },
      h("span", {}, h("i", { class: "swatch dense" }), `dense, D ${signed(explanation.dense_difference)}`),
      h("span", {}, h("i", { class: "swatch sparse" }), `sparse, D ${signed(explanation.sparse_difference)}`),
    ),
    !explanation.agree && h("p", { class: "key" }, h("b", {}, "The two models disagree.")),
  );
}

/** The verdict on a ladder, and the reasons. */
export function drawVerdict(model, holder) {
  const { explanation } = model;
  const { verdict, reasons } = verdictOf(explanation);
  const before = holder.querySelector("details"); // as a person left it
  const reached = LADDER.indexOf(verdict);
  const steps = LADDER.map((step, place) =>
    h(
      "li",
      {
        class: `${place === reached ? "here" : ""} ${reached > 0 && place > 0 && place <= reached ? "met" : ""} ${step === "refuted" ? "bad" : ""}`,
        "aria-current": place === reached ? "step" : null,
      },
      step,
    ),
  );
  put(
    holder,
    h("h2", {}, "Verdict"),
    h("p", { class: `word ${verdict.replace(/\W+/g, "-")}` }, verdict[0].toUpperCase() + verdict.slice(1)),
    h("p", { class: "meaning" }, MEANING[verdict] ?? ""),
    h("ol", { class: "ladder" }, steps),
    h(
      "details",
      { class: "why", open: before ? before.open : !matchMedia(SMALL).matches },
      h("summary", {}, "Why"),
      h(
        "ul",
        { class: "reasons" },
        reasons.map((reason) => h("li", {}, reason)),
      ),
    ),
  );
}

/** Where it comes from. */
export function drawMade(model, models, made) {
  const where = model.explanation.provenance;
  const name = (path) => String(path).split("/").filter(Boolean).pop() ?? "";
  put(models, name(where.dense), " explained by ", where.coupling ? name(where.coupling) : "a coupling in memory");
  put(
    made,
    `bridge ${where.version} · seed ${where.seed} · ${where.coupling ?? "a coupling in memory"}, L0 ${where.l0 < 1 ? number(where.l0) : count(where.l0)} · dense model ${where.dense} (${where.dense_fingerprint.slice(0, 12)}) · means over ${where.reference}`,
  );
}
