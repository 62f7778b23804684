// One explanation, drawn. The page's state is one object; every change of it goes through `set`, which draws what depends on it.

import { drawAnswers, drawAsk, drawMade, drawVerdict } from "./answer.js";
import { drawAttention } from "./attention.js";
import { drawBar, drawLegend } from "./bar.js";
import { h, plain, put } from "./dom.js";
import { drawEvidence, drawTests } from "./evidence.js";
import { makeFind } from "./find.js";
import { makeGraph } from "./graph.js";
import { makeHelp } from "./help.js";
import { awaitCard, jobOf } from "./job.js";
import { makeLabels } from "./labels.js";
import { MOST_NODES, effectOf, firstLevel, read } from "./model.js";
import { drawNode } from "./node.js";
import { makeSave } from "./save.js";
import { hintBelow } from "./scroll.js";

const TABS = ["evidence", "node", "attention"];
const NOTICED = 6000; // milliseconds that a notice stays
const $ = (id) => document.getElementById(id);

const model = read(JSON.parse($("data").textContent));
const room = () => ({ width: Math.max(280, $("plot").clientWidth), height: $("plot").clientHeight });
const state = {
  level: firstLevel(model),
  all: false,
  selected: null,
  found: null,
  tab: "evidence",
  head: null,
  read: null,
  awaited: null, // where the card is, while it is still to come
  width: 0,
  height: 0,
};
const say = (text) => ($("live").textContent = text);
/** Say it, and show it for a while: what came of something that a person did, where nothing else on the page tells. */
function notify(text) {
  say(text);
  clearTimeout($("notice").timer);
  Object.assign($("notice"), { textContent: text, hidden: false });
  $("notice").timer = setTimeout(() => ($("notice").hidden = true), NOTICED);
}
const labels = makeLabels(model.data, () => drawSheet());
const labelOf = (node) => labels.get(node.name) ?? node.label ?? model.pages.get(node.name)?.label ?? null;
const graph = makeGraph(model, $("plot"), $("tip"), { choose, labelOf });
const below = hintBelow($("plot"), $("below"));

function set(patch) {
  const before = { ...state };
  Object.assign(state, patch);
  const changed = (...names) => names.some((name) => before[name] !== state[name]);
  if (changed("level", "all", "selected", "found", "width", "height")) (graph.draw({ ...state }), below());
  if (changed("level", "all")) (drawBar(model, $("bar"), state, set), drawLegend(model, $("legend"), graph.strongestEdges()));
  if (changed("all") && model.nodes.length) (graph.toAnswer(), graph.reveal(state.selected ?? model.nodes[0].id));
  if (changed("selected", "tab", "head", "read")) (drawTabs(), drawSheet(changed("selected", "tab", "head")));
  if (changed("awaited") && $("tests")) drawTests(model, $("tests"), state.awaited); // the rest of the sheet stays as it is
  if (changed("tab", "head")) graph.attend(state.tab === "attention" ? (model.attention[state.head ?? 0] ?? null) : null);
}

/** The card has come: what it says is put where it belongs, and nothing else changes. */
function takeCard(card) {
  model.explanation.card = card;
  drawVerdict(model, $("verdict"));
  set({ awaited: null });
  say(`The card is there: ${card.verdict}`);
}

/** Choose a node, from anywhere; where it is not drawn, more of the circuit is. */
function choose(id) {
  const node = model.byId.get(id);
  if (!node) return;
  const patch = { selected: id, tab: "node" };
  if (!graph.has(id)) {
    const level = model.levels.findIndex((each, place) => place >= state.level && each.nodes.includes(node));
    Object.assign(patch, { level: level < 0 ? model.levels.length - 1 : level });
    if (model.levels[patch.level].nodes.indexOf(node) >= MOST_NODES) patch.all = true;
  }
  set(patch);
  graph.reveal(id);
  say(`${node.name} at ${node.position}, ${plain(model.explanation.tokens[node.position].text)}, effect ${effectOf(node)}`);
}

const goTo = (id) => (choose(id), graph.focusNode(id));

function drawTabs() {
  put(
    $("tabs"),
    TABS.map((name) =>
      h(
        "button",
        {
          type: "button",
          role: "tab",
          id: `tab-${name}`,
          "aria-selected": String(state.tab === name),
          "aria-controls": "sheet",
          tabindex: state.tab === name ? 0 : -1,
          onclick: () => set({ tab: name }),
          onkeydown: (event) => {
            const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
            if (!step) return;
            event.stopPropagation();
            set({ tab: TABS[(TABS.indexOf(name) + step + TABS.length) % TABS.length] });
            $(`tab-${state.tab}`).focus();
          },
        },
        name[0].toUpperCase() + name.slice(1),
      ),
    ),
  );
  $("sheet").setAttribute("aria-labelledby", `tab-${state.tab}`);
}

function drawSheet(fresh = false) {
  const sheet = $("sheet");
  if (
    !fresh &&
    state.tab === "node" &&
    sheet.contains(document.activeElement) &&
    document.activeElement.classList.contains("label-input")
  )
    return;
  if (state.tab === "evidence") drawEvidence(model, sheet, choose, state.awaited);
  else if (state.tab === "node")
    drawNode(model, sheet, state.selected, {
      choose,
      labels,
      notify,
      showHead: (head) => set({ tab: "attention", head, read: null }),
    });
  else drawAttention(model, sheet, state, { set, choose });
  if (fresh) sheet.scrollTop = 0;
}

function theme(next) {
  document.documentElement.dataset.theme = next;
  $("theme").textContent = next === "dark" ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", `Switch to the ${next === "dark" ? "light" : "dark"} theme`);
}

function switchTheme() {
  const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  theme(next);
  try {
    localStorage.setItem("bridge-theme", next);
  } catch {
    // it lasts as long as the page does
  }
}

function startTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const kept = () => {
    try {
      return localStorage.getItem("bridge-theme");
    } catch {
      return null;
    }
  };
  const now = () => theme(["dark", "light"].includes(kept()) ? kept() : dark.matches ? "dark" : "light");
  dark.addEventListener("change", now);
  now();
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  const typing = event.target.closest("input, select, textarea");
  if (event.key === "Escape") {
    if (typing) return event.target.blur();
    $("save").open = false;
    return set({ selected: null });
  }
  if (typing) return;
  const inPanel = event.target.closest(".panel, .menu, .prompt");
  const level = { "[": state.level - 1, "]": state.level + 1 }[event.key];
  if (event.key === "/") (event.preventDefault(), $("find").focus());
  else if (event.key === "?") $("help").showModal();
  else if (event.key === "t") switchTheme();
  else if ("123".includes(event.key)) set({ tab: TABS[Number(event.key) - 1] });
  else if (event.key === "l" && state.selected)
    (event.preventDefault(), set({ tab: "node" }), document.querySelector(".label-input")?.focus());
  else if (level !== undefined && level >= 0 && level < model.levels.length) set({ level });
  else if (event.key.startsWith("Arrow") && !inPanel) {
    event.preventDefault();
    const id = graph.next(state.selected, event.key);
    if (id) goTo(id);
  } else if ((event.key === "Enter" || event.key === " ") && event.target.closest("#plot")) {
    event.preventDefault();
    if (state.selected) (set({ tab: "node" }), $("sheet").focus());
  }
}

startTheme();
if (jobOf(model.data) !== null) $("save").before(h("a", { href: "/", id: "again" }, "Ask another"));
drawMade(model, $("models"), $("made"));
drawAsk(model, $("ask"));
drawAnswers(model, $("answers"));
drawVerdict(model, $("verdict"));
drawBar(model, $("bar"), state, set);
drawLegend(model, $("legend"), 0);
graph.draw({ ...Object.assign(state, room()) });
drawLegend(model, $("legend"), graph.strongestEdges());
graph.toAnswer();
below();
$("ask").querySelector("pre").scrollTop = 1e6; // the end of the prompt is what is continued
drawTabs();
drawSheet();
makeHelp($("help"));
makeSave(model, $("save"), $("save-items"), graph, labels, notify);
makeFind(model, $("find"), $("found"), { seek: (found) => set({ found }), choose: goTo, labelOf });
$("theme").addEventListener("click", switchTheme);
$("help-open").addEventListener("click", () => $("help").showModal());
document.addEventListener("keydown", onKey);
document.addEventListener("click", (event) => event.target.closest("#save") || ($("save").open = false));
new ResizeObserver(
  () => (Math.abs(room().width - state.width) > 8 || Math.abs(room().height - state.height) > 24) && set(room()),
).observe($("plot"));
awaitCard(model.data, (awaited) => set({ awaited }), takeCard);
document.documentElement.dataset.ready = String(Math.round(performance.now()));
