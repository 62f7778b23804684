// The Save menu: the circuit as SVG and as PNG, the explanation and the labels as JSON.

import { download, h, plain, put, s } from "./dom.js";
import { LABELS } from "./layout.js";
import { captionOf, keyOf } from "./caption.js";

const KEPT = [
  "fill",
  "fill-opacity",
  "stroke",
  "stroke-opacity",
  "stroke-width",
  "stroke-dasharray",
  "stroke-linecap",
  "opacity",
  "display",
  "font-family",
  "font-size",
  "font-weight",
  "mix-blend-mode",
];

const MOMENTARY = ".focus"; // edges of the selection or of the element under the pointer, which are not saved

/** Return the circuit's three SVGs as one, with a caption and a key, and with all styles written out, so it needs no page. */
function standalone(graph, title, model, level) {
  const { parts } = graph;
  const size = (svg) => [Number(svg.getAttribute("width")), Number(svg.getAttribute("height"))];
  const [across, height] = size(parts.plot),
    [, tokensHeight] = size(parts.tokens);
  const width = across + LABELS;
  const caption = captionOf(model, level(), graph.shown(), width),
    key = keyOf(width);
  const tall = caption.height + height + tokensHeight + key.height;
  const whole = s(
    "svg",
    { xmlns: "http://www.w3.org/2000/svg", width, height: tall, viewBox: `0 0 ${width} ${tall}` },
    s("title", {}, title),
  );
  whole.append(s("rect", { width: "100%", height: "100%", fill: getComputedStyle(document.body).backgroundColor }));
  const focused = parts.plot.classList.contains("focused");
  const chosen = parts.plot.querySelectorAll(".chosen");
  parts.plot.classList.remove("focused"); // so that nothing is dimmed
  chosen.forEach((each) => each.classList.remove("chosen"));
  const lasting = (svg) => [...svg.children].filter((each) => !each.matches(MOMENTARY));
  for (const [svg, x, y] of [
    [parts.names, 0, caption.height],
    [parts.plot, LABELS, caption.height],
    [parts.tokens, LABELS, caption.height + height],
  ]) {
    whole.append(s("g", { transform: `translate(${x},${y})` }, lasting(svg).map(dressed)));
  }
  parts.plot.classList.toggle("focused", focused);
  chosen.forEach((each) => each.classList.add("chosen"));
  key.drawing.setAttribute("transform", `translate(0,${caption.height + height + tokensHeight})`);
  whole.append(caption.drawing, key.drawing);
  return new XMLSerializer().serializeToString(whole);
}

/** Return a name for a file of this explanation: its kind, and the letters and digits at the end of the prompt. */
function fileName(what, prompt, ending) {
  const words = prompt.toLowerCase().match(/[a-z0-9]+/g) ?? [];
  const slug = words
    .join("-")
    .slice(-48)
    .replace(/^[^-]*-(?=.{24})/, (cut) => (words.join("-").length > 48 ? "" : cut));
  return `${[what, slug].filter(Boolean).join("-")}.${ending}`;
}

function dressed(element) {
  const copy = element.cloneNode(false);
  const looks = getComputedStyle(element);
  for (const name of ["class", "style", "tabindex", "role", "aria-label", "aria-pressed", "data-key", "data-position"])
    copy.removeAttribute(name);
  if (element.localName !== "pattern") copy.removeAttribute("id");
  if (!["g", "title", "defs", "pattern"].includes(element.localName))
    KEPT.forEach((name) => copy.setAttribute(name, looks.getPropertyValue(name)));
  else if (looks.opacity !== "1") copy.setAttribute("opacity", looks.opacity);
  for (const child of element.childNodes) {
    if (child.nodeType !== 1) copy.append(child.cloneNode());
    else if (!child.matches(MOMENTARY)) copy.append(dressed(child));
  }
  return copy;
}

async function png(text) {
  const image = new Image();
  const url = URL.createObjectURL(new Blob([text], { type: "image/svg+xml" }));
  try {
    await new Promise(
      (done, failed) => (
        (image.onload = done),
        (image.onerror = () => failed(new Error("this browser could not draw the picture"))),
        (image.src = url)
      ),
    );
    const scale = Math.min(2, 16000 / Math.max(image.width, image.height));
    const canvas = h("canvas", { width: Math.round(image.width * scale), height: Math.round(image.height * scale) });
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    return await new Promise((done) => canvas.toBlob(done, "image/png"));
  } finally {
    URL.revokeObjectURL(url);
  }
}

/** Fill the menu. */
export function makeSave(model, menu, items, graph, labels, notify, level) {
  const title = `Circuit for ${plain([...model.explanation.prompt].slice(-60).join(""))}`;
  const picture = () => standalone(graph, title, model, level);
  const named = (what, ending) => fileName(what, model.explanation.prompt, ending);
  const item = (name, act) =>
    h(
      "button",
      {
        type: "button",
        onclick: async () => {
          menu.open = false;
          try {
            await act();
          } catch (error) {
            notify(`Not saved: ${error.message}`);
          }
        },
      },
      name,
    );
  const file = h("input", {
    type: "file",
    accept: "application/json,.json",
    hidden: true,
    "aria-label": "File of labels",
    onchange: async () => {
      try {
        await labels.take(JSON.parse(await file.files[0].text()));
        notify("Labels imported");
      } catch (error) {
        notify(`Labels not imported: ${error.message}`);
      }
      file.value = "";
    },
  });
  put(
    items,
    item("Circuit as SVG", () => download(named("circuit", "svg"), picture(), "image/svg+xml")),
    item("Circuit as PNG", async () => download(named("circuit", "png"), await png(picture()), "image/png")),
    item("Explanation as JSON", () =>
      download(named("explanation", "json"), JSON.stringify(model.explanation, null, 1), "application/json"),
    ),
    item("Labels as JSON", () => download("labels.json", JSON.stringify(labels.all(), null, 1), "application/json")),
    item("Import labels…", () => file.click()),
    file,
  );
}
