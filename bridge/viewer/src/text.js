// The behaviour of a channel on text: its contexts, the tokens that it promotes, and its direction in the dense model.

import { count, h, number, percent, running, side, signed, token } from "./dom.js";

const BEFORE = 20,
  AFTER = 14; // numbers of letters of a context that fit
const RUN = / {4,}/g; // spaces that are shown as their number

/** Return text as pieces, each a letter or a run of spaces. */
function unitsOf(text) {
  const units = [];
  let from = 0;
  for (const run of text.matchAll(RUN)) {
    units.push(...text.slice(from, run.index), run[0]);
    from = run.index + run[0].length;
  }
  return [...units, ...text.slice(from)];
}

/** Return pieces as running text, with long runs of spaces as their number. */
function shortened(units) {
  const out = [];
  let words = "";
  for (const unit of [...units, ""]) {
    if (unit !== "" && !/^ {4,}$/.test(unit)) words += unit;
    else {
      out.push(running(words), unit && h("i", { title: `${unit.length} spaces` }, `·×${unit.length}`));
      words = "";
    }
  }
  return out;
}

function contexts(title, list, most) {
  if (!list.length) return null;
  const item = (each) =>
    h(
      "li",
      {},
      h("b", {}, signed(each.value)),
      h(
        "span",
        { class: "context" },
        h("bdi", { class: "before" }, shortened(unitsOf(each.before).slice(-BEFORE))),
        h(
          "mark",
          { class: side(each.value), style: { "--strength": `${Math.round((100 * Math.abs(each.value)) / most)}%` } },
          shortened(unitsOf(each.token)),
        ),
        h("bdi", {}, shortened(unitsOf(each.after).slice(0, AFTER))),
      ),
    );
  return h("section", {}, h("h3", {}, title), h("ol", { class: "contexts" }, list.map(item)));
}

function chips(list, name) {
  const chip = (each) => h("span", { class: "chip" }, token(each.text, name), h("small", {}, signed(each.score)));
  return h("p", { class: "chips" }, list.length ? list.map(chip) : h("span", { class: "quiet" }, "none"));
}

/** Return contexts, tokens and the dense direction from the node's page. */
export function onText(page) {
  const most = Math.max(...[...page.high, ...page.low].map((each) => Math.abs(each.value)), 1e-9);
  const words = page.tokens === "embedded" ? ["Embeddings that raise it", "Embeddings that lower it"] : ["Promotes", "Demotes"];
  return [
    h(
      "section",
      {},
      h("h3", {}, "On text"),
      h("p", { class: "row-text" }, page.summary),
      page.description && h("p", { class: "row-text" }, page.description),
    ),
    contexts("Contexts of the highest values", page.high, most),
    contexts("Contexts of the lowest values", page.low, most),
    page.tokens !== "none" &&
      h("section", {}, h("h3", {}, words[0]), chips(page.promotes, "for"), h("h3", {}, words[1]), chips(page.demotes, "against")),
    page.dense && inDense(page.dense),
    h(
      "p",
      { class: "row-text quiet" },
      `Active at ${percent(page.active)} of the ${count(page.n_tokens)} tokens of text on which node statistics were collected; mean ${signed(page.mean)}, standard deviation ${number(page.deviation)} over this text.`,
    ),
  ];
}

function inDense(dense) {
  return h(
    "section",
    {},
    h(
      "h3",
      {},
      "In the dense model",
      h("small", {}, `direction of length ${number(dense.length)} at site ${dense.site}, read by ${dense.read_by}`),
    ),
    dense.promotes === null
      ? h("p", { class: "row-text quiet" }, "Promoted tokens are unknown: the dense model gives no access to its unembedding.")
      : [chips(dense.promotes, "for"), chips(dense.demotes ?? [], "against")],
  );
}
