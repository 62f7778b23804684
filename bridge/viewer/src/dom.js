// Elements, text and numbers. Whatever comes from a user, a model or a corpus enters the page as a text node, never as markup.

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes (on* are listeners; null and false are left out) and children, strings of which become text. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function s(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.entries(value).forEach(([key, one]) => element.style.setProperty(key, one));
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Replace what an element holds. */
export function put(element, ...children) {
  element.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

// What has no shape of its own, or would move the text around it: controls, bidirectional and zero-width marks, half characters,
// and what is no character.
const HIDDEN =
  /[\u0000-\u001f\u007f-\u00a0\u00ad\u061c\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/;
const SIGNS = { " ": "·", "\n": "↵", "\t": "⇥" };

/** Text in pieces [shown, whether it stands for something unseen]. */
export function pieces(text) {
  const out = [];
  for (const letter of text) {
    const hidden = letter in SIGNS || HIDDEN.test(letter);
    const shown = SIGNS[letter] ?? (hidden ? `\\u${letter.charCodeAt(0).toString(16).padStart(4, "0")}` : letter);
    const last = out[out.length - 1];
    if (last && last[1] === hidden) last[0] += shown;
    else out.push([shown, hidden]);
  }
  return out;
}

/** The same as one string, of at most `most` letters. */
export function plain(text, most = Infinity) {
  const letters = [
    ...pieces(text)
      .map(([shown]) => shown)
      .join(""),
  ];
  return letters.length > most ? `${letters.slice(0, most - 1).join("")}…` : letters.join("");
}

const ruler = document.createElement("canvas").getContext("2d");

/** A text in at most `most` lines no wider than `width` in a font, broken at spaces where there are any; the rest is cut off. */
export function fitLines(text, width, font, most) {
  ruler.font = font;
  const fits = (one) => ruler.measureText(one).width <= width;
  const out = [];
  let rest = [...plain(text).replaceAll("·", " ").replace(/^ /, "·")].slice(0, 400);
  while (rest.length && out.length < most) {
    let end = rest.length;
    const last = out.length === most - 1;
    if (!fits(rest.join(""))) {
      let low = 1,
        high = rest.length;
      while (high - low > 1) {
        const middle = (low + high) >> 1;
        if (fits(rest.slice(0, middle).join("") + (last ? "…" : ""))) low = middle;
        else high = middle;
      }
      const space = rest.lastIndexOf(" ", low);
      end = !last && space > low / 2 ? space : low;
    }
    out.push(rest.slice(0, end).join("") + (last && end < rest.length ? "…" : ""));
    rest = rest.slice(rest[end] === " " ? end + 1 : end);
  }
  return out.length ? out : ["∅"];
}

/** A label as text: its spaces as they are, the rest of what is unseen spelled out. */
export const plainLabel = (text) => plain(text).replaceAll("·", " ");

/** A token as a chip in which spaces and line ends can be seen. */
export function token(text, extra = "") {
  const shown = pieces(text).map(([piece, hidden]) => (hidden ? h("i", {}, piece) : piece));
  return h("code", { class: `token ${extra}` }, shown.length ? shown : h("i", {}, "∅"));
}

/** Running text of a model: spaces as they are, line ends marked and the rest of what is unseen spelled out. */
export function running(text, breaks = false) {
  return text.split(/( +)/).flatMap((part) => {
    if (/^ *$/.test(part)) return [part];
    return pieces(part).flatMap(([piece, hidden]) =>
      hidden ? [h("i", {}, piece), breaks && piece.includes("↵") ? h("br") : ""] : [piece],
    );
  });
}

/** A number with three digits that count, a real minus, and a plus where signed. */
export function number(x, signed = false) {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  const size = Math.abs(x);
  const digits = size >= 100 ? 0 : size >= 10 ? 1 : size >= 0.1 || size === 0 ? 2 : size >= 0.01 ? 3 : size >= 0.001 ? 4 : null;
  const text = digits === null ? size.toExponential(0).replace("e-", "e−") : size.toFixed(digits);
  return `${x < 0 ? "−" : signed ? "+" : ""}${text}`;
}

export const signed = (x) => number(x, true);
/** An effect in nats, to the second digit, where there is little room. */
export const nats = (x) => `${x < 0 ? "−" : "+"}${Math.abs(x).toFixed(2)}`;
export const percent = (x) => (x >= 0.9995 ? "100%" : x < 0.0005 ? "<0.1%" : `${(100 * x).toFixed(1)}%`);
export const count = (x) => x.toLocaleString("en-US");
export const side = (x) => (x >= 0 ? "for" : "against");

/** Give the user a file. */
export function download(name, content, type) {
  const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
