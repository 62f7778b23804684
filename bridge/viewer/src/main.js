// Draw one explanation. The page's state is one object; every change goes through `set`, which redraws what depends on it.

import { drawAnswers, drawAsk, drawModels, drawVerdict } from "./answer.js";
import { drawAttention } from "./attention.js";
import { drawBar, drawLegend } from "./bar.js";
import { h, put } from "./dom.js";
import { drawEvidence } from "./evidence.js";
import { makeFind } from "./find.js";
import { makeGraph } from "./graph.js";
import { drawPart, drawParts } from "./group.js";
import { makeHelp } from "./help.js";
import { makeLabels } from "./labels.js";
import { jobOf, linksOf, partOf, partsOf, read } from "./model.js";
import { drawNode } from "./node.js";
import { makeSave } from "./save.js";

const TABS = { evidence: "Evidence", chosen: "Groups and nodes", attention: "Attention" };
const NOTICED = 6000; // milliseconds for which a notice is shown
const $ = (id) => document.getElementById(id);

const model = read(JSON.parse($("data").textContent));
const room = () => ({ width: Math.max(280, $("plot").clientWidth), height: $("plot").clientHeight });
const state = {
  level: model.explanation.opening,
  open: new Set(), // keys of the open parts, which are drawn as their nodes
  selected: null, // the key of a part, or the id of a node
  found: null,
  tab: "evidence",
  head: null,
  fonts: false,
  read: null,
  ...room(),
};
const say = (text) => ($("live").textContent = text);
/** Announce a text and show it for a while; for results of the user's actions that nothing else on the page shows. */
function notify(text) {
  say(text);
  clearTimeout($("notice").timer);
  Object.assign($("notice"), { textContent: text, hidden: false });
  $("notice").timer = setTimeout(() => ($("notice").hidden = true), NOTICED);
}
const labels = makeLabels(model.data, () => drawSheet());
const labelOf = (node) => labels.get(node.name) ?? node.label ?? model.pages.get(node.name)?.label ?? null;
const graph = makeGraph(model, $("plot"), $("tip"), { choose, labelOf });

function set(patch) {
  const before = { ...state };
  Object.assign(state, patch);
  const changed = (...names) => names.some((name) => before[name] !== state[name]);
  if (changed("level", "open", "selected", "found", "width", "height", "fonts")) graph.draw({ ...state });
  if (changed("level", "open")) (drawBar(model, $("bar"), state, set, graph), drawLegend(model, $("legend"), graph));
  if (changed("selected", "tab", "head", "read", "level")) (drawTabs(), drawSheet(changed("selected", "tab", "head")));
  if (changed("tab", "head")) graph.attend(state.tab === "attention" ? (model.attention[state.head ?? 0] ?? null) : null);
}

/** Select a part, and open or close it if `toggle`; or select a node, and open its group in a circuit that has the node. */
function choose(key, toggle = false) {
  const node = model.byId.get(key);
  const part = node && node.kind !== "error" ? partOf(node) : key;
  const open = new Set(state.open);
  if (node && node.kind !== "error") open.add(part);
  else if (toggle && !key.startsWith("error:") && !open.delete(key)) open.add(key);
  const level = node ? Math.max(state.level, node.level) : state.level;
  set({
    level,
    open: same(open, state.open) ? state.open : open,
    selected: node?.kind === "error" ? partOf(node) : key,
    tab: "chosen",
  });
  graph.reveal(state.selected);
  say(graph.nameOf(state.selected));
}

const same = (a, b) => a.size === b.size && [...a].every((each) => b.has(each));
const goTo = (key, toggle) => (choose(key, toggle), graph.focusOn(state.selected));

function drawTabs() {
  const names = Object.keys(TABS);
  put(
    $("tabs"),
    names.map((name) =>
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
            set({ tab: names[(names.indexOf(name) + step + names.length) % names.length] });
            $(`tab-${state.tab}`).focus();
          },
        },
        TABS[name],
      ),
    ),
  );
  $("sheet").setAttribute("aria-labelledby", `tab-${state.tab}`);
}

function drawSheet(fresh = false) {
  const sheet = $("sheet");
  const writing = sheet.contains(document.activeElement) && document.activeElement.classList.contains("label-input");
  if (!fresh && state.tab === "chosen" && writing) return;
  if (state.tab === "evidence") drawEvidence(model, sheet, choose, set, state.level);
  else if (state.tab === "attention") drawAttention(model, sheet, state, { set, choose });
  else drawChosen(sheet);
  if (fresh) sheet.scrollTop = 0;
}

function drawChosen(sheet) {
  const node = model.byId.get(state.selected);
  const parts = partsOf(model, state.level);
  const part = parts.get(state.selected);
  if (node) {
    const showHead = (head) => set({ tab: "attention", head, read: null });
    drawNode(model, sheet, node, { choose, labels, notify, showHead });
  } else if (part) {
    const links = linksOf(model, parts, new Set(), state.level);
    drawPart(model, sheet, part, { choose, labels, nameOf: graph.nameOf, links, isOpen: state.open.has(part.key) });
  } else drawParts(model, sheet, state.level, choose);
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
    // the theme is then kept only while the page is open
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
  else if (event.key === "o") $("open-all")?.click();
  else if ("123".includes(event.key)) set({ tab: Object.keys(TABS)[Number(event.key) - 1] });
  else if (event.key === "l" && model.byId.has(state.selected))
    (event.preventDefault(), set({ tab: "chosen" }), document.querySelector(".label-input")?.focus());
  else if (level !== undefined && level >= 0 && level < model.explanation.nested.length) set({ level });
  else if (event.key.startsWith("Arrow") && !inPanel) {
    event.preventDefault();
    const key = graph.next(state.selected, event.key);
    if (key) goTo(key);
  } else if ((event.key === "Enter" || event.key === " ") && event.target.closest("#plot")) {
    event.preventDefault();
    if (model.byId.has(state.selected)) $("sheet").focus();
    else if (state.selected) goTo(state.selected, true);
  }
}

startTheme();
if (jobOf(model.data) !== null) $("save").before(h("a", { href: "/", id: "again" }, "New prompt"));
drawModels(model, $("models"));
drawAsk(model, $("ask"));
drawAnswers(model, $("answers"));
drawVerdict(model, $("verdict"));
graph.draw({ ...state });
drawBar(model, $("bar"), state, set, graph);
drawLegend(model, $("legend"), graph);
set(room()); // the elements above and below have their final heights now
$("ask").querySelector("pre").scrollTop = 1e6; // show the end of the prompt, which the models continue
drawTabs();
drawSheet();
makeHelp($("help"));
makeSave(model, $("save"), $("save-items"), graph, labels, notify, () => state.level);
makeFind(model, $("find"), $("found"), { seek: (found) => set({ found }), choose: goTo, labelOf });
$("theme").addEventListener("click", switchTheme);
$("help-open").addEventListener("click", () => $("help").showModal());
document.addEventListener("keydown", onKey);
document.addEventListener("click", (event) => event.target.closest("#save") || ($("save").open = false));
document.fonts.ready.then(() => set({ fonts: true, ...room() })); // texts were fitted before the fonts were loaded
new ResizeObserver(
  () => (Math.abs(room().width - state.width) > 8 || Math.abs(room().height - state.height) > 24) && set(room()),
).observe($("plot"));
document.documentElement.dataset.ready = String(Math.round(performance.now()));
