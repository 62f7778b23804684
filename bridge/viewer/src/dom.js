// Elements, text and numbers. Text of a user, a model or a corpus enters the page as text nodes, never as markup.

const SVG = "http://www.w3.org/2000/svg";

/** Return an element with attributes (on* are listeners; null and false are skipped) and children; strings become text nodes. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** Return an SVG element; the arguments are those of `h`. */
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

/** Replace the children of an element, and return it. */
export function put(element, ...children) {
  element.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

// Characters that are invisible or that move the text around them: controls, bidirectional and zero-width marks, unpaired
// surrogates, and noncharacters.
const HIDDEN =
  /[\u0000-\u001f\u007f-\u00a0\u00ad\u061c\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/;
const SIGNS = { " ": "·", "\n": "↵", "\t": "⇥" };

/** Return text as pieces [shown text, whether it is the sign of an invisible character]. */
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

/** Return text with signs for its invisible characters, as a string of at most `most` letters. */
export function plain(text, most = Infinity) {
  const letters = [
    ...pieces(text)
      .map(([shown]) => shown)
      .join(""),
  ];
  return letters.length > most ? `${letters.slice(0, most - 1).join("")}…` : letters.join("");
}

const ruler = document.createElement("canvas").getContext("2d");

/** Return text as at most `most` lines no wider than `width` in a font, broken at spaces if possible; the rest is cut off. */
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

/** Return a label as a string: spaces stay spaces, other invisible characters become signs. */
export const plainLabel = (text) => plain(text).replaceAll("·", " ");

/** Return a token as a chip that shows a sign for each space, line end and other invisible character. */
export function token(text, extra = "") {
  const shown = pieces(text).map(([piece, hidden]) => (hidden ? h("i", {}, piece) : piece));
  return h("code", { class: `token ${extra}` }, shown.length ? shown : h("i", {}, "∅"));
}

/** Return running text: spaces stay spaces, other invisible characters become signs; `breaks` breaks lines after line ends. */
export function running(text, breaks = false) {
  return text.split(/( +)/).flatMap((part) => {
    if (/^ *$/.test(part)) return [part];
    return pieces(part).flatMap(([piece, hidden]) =>
      hidden ? [h("i", {}, piece), breaks && piece.includes("↵") ? h("br") : ""] : [piece],
    );
  });
}

/** Return a number as text: decimals by its size, a real minus sign, and a plus sign if `signed`. */
export function number(x, signed = false) {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  const size = Math.abs(x);
  const digits = size >= 100 ? 0 : size >= 10 ? 1 : size >= 0.1 || size === 0 ? 2 : size >= 0.01 ? 3 : size >= 0.001 ? 4 : null;
  const text = digits === null ? size.toExponential(0).replace("e-", "e−") : size.toFixed(digits);
  return `${x < 0 ? "−" : signed ? "+" : ""}${text}`;
}

export const signed = (x) => number(x, true);
/** Return an effect in nats with two decimals, for places with little room. */
export const nats = (x) => `${x < 0 ? "−" : "+"}${Math.abs(x).toFixed(2)}`;
export const percent = (x) => (x >= 0.9995 ? "100%" : x < 0.0005 ? "<0.1%" : `${(100 * x).toFixed(1)}%`);
export const count = (x) => x.toLocaleString("en-US");
export const side = (x) => (x >= 0 ? "for" : "against");

/** Let the browser download content as a file. */
export function download(name, content, type) {
  const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
