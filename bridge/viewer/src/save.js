// The circuit as SVG and as PNG, the labels and the explanation as JSON.

import { download, h, plain, put, s } from "./dom.js";
import { LABELS } from "./layout.js";

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

/** One SVG of the three that the circuit is made of, its looks written out, readable without this page. */
export function standalone(parts, title) {
  const size = (svg) => [Number(svg.getAttribute("width")), Number(svg.getAttribute("height"))];
  const [width, height] = size(parts.plot),
    [, tokensHeight] = size(parts.tokens);
  const whole = s(
    "svg",
    {
      xmlns: "http://www.w3.org/2000/svg",
      width: width + LABELS,
      height: height + tokensHeight,
      viewBox: `0 0 ${width + LABELS} ${height + tokensHeight}`,
    },
    s("title", {}, title),
  );
  whole.append(s("rect", { width: "100%", height: "100%", fill: getComputedStyle(document.body).backgroundColor }));
  for (const [svg, x, y] of [
    [parts.names, 0, 0],
    [parts.plot, LABELS, 0],
    [parts.tokens, LABELS, height],
  ]) {
    whole.append(s("g", { transform: `translate(${x},${y})` }, [...svg.children].map(dressed)));
  }
  return new XMLSerializer().serializeToString(whole);
}

function dressed(element) {
  const copy = element.cloneNode(false);
  const looks = getComputedStyle(element);
  for (const name of ["class", "style", "id", "tabindex", "role", "aria-label", "aria-pressed"]) copy.removeAttribute(name);
  if (!["g", "title"].includes(element.localName)) KEPT.forEach((name) => copy.setAttribute(name, looks.getPropertyValue(name)));
  else if (looks.opacity !== "1") copy.setAttribute("opacity", looks.opacity);
  for (const child of element.childNodes) copy.append(child.nodeType === 1 ? dressed(child) : child.cloneNode());
  return copy;
}

async function png(text) {
  const image = new Image();
  const url = URL.createObjectURL(new Blob([text], { type: "image/svg+xml" }));
  try {
    await new Promise(
      (done, failed) => (
        (image.onload = done),
        (image.onerror = () => failed(new Error("this browser could not draw it"))),
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
export function makeSave(model, menu, items, parts, labels, say) {
  const title = `Circuit for ${plain([...model.explanation.prompt].slice(-60).join(""))}`;
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
            say(`Not saved: ${error.message}`);
          }
        },
      },
      name,
    );
  const file = h("input", {
    type: "file",
    accept: "application/json,.json",
    hidden: true,
    "aria-label": "A file of labels",
    onchange: async () => {
      try {
        await labels.take(JSON.parse(await file.files[0].text()));
        say("Labels taken over");
      } catch (error) {
        say(`Labels not taken over: ${error.message}`);
      }
      file.value = "";
    },
  });
  put(
    items,
    item("Circuit as SVG", () => download("circuit.svg", standalone(parts, title), "image/svg+xml")),
    item("Circuit as PNG", async () => download("circuit.png", await png(standalone(parts, title)), "image/png")),
    item("Explanation as JSON", () =>
      download("explanation.json", JSON.stringify(model.explanation, null, 1), "application/json"),
    ),
    item("Labels as JSON", () => download("labels.json", JSON.stringify(labels.all(), null, 1), "application/json")),
    item("Read labels…", () => file.click()),
    file,
  );
}
