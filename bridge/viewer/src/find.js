// Search for nodes by name, label, group, kind or token.

import { h, put, signed, token } from "./dom.js";
import { KIND_NAMES, errorName } from "./model.js";

const LISTED = 40;

/** Set up the search box; `seek(ids or null)` marks the nodes found in the circuit, `choose(id)` selects one. */
export function makeFind(model, input, list, { seek, choose, labelOf }) {
  let found = [],
    active = -1;

  function groupOf(node) {
    const group = model.explanation.groups[node.group];
    return node.kind === "error" ? errorName(node) : group ? `${group.name} ${group.label ?? ""}` : "";
  }

  function search() {
    const words = input.value.toLowerCase().trim().split(/\s+/).filter(Boolean);
    const { tokens } = model.explanation;
    const fits = (node) => {
      const text =
        `${node.id} ${KIND_NAMES[node.kind]} ${labelOf(node) ?? ""} ${node.label ?? ""} ${groupOf(node)} ${tokens[node.position].text}`.toLowerCase();
      return words.every((word) => text.includes(word));
    };
    found = words.length ? model.nodes.filter(fits) : [];
    active = found.length ? 0 : -1;
    seek(words.length ? new Set(found.map((node) => node.id)) : null);
    put(
      list,
      words.length
        ? [
            ...found
              .slice(0, LISTED)
              .map((node, place) =>
                h(
                  "li",
                  { role: "option", id: `found-${place}`, onpointerdown: (event) => (event.preventDefault(), take(place)) },
                  h("code", {}, node.name),
                  token(tokens[node.position].text),
                  h("span", { class: "row-label" }, labelOf(node) ?? ""),
                  node.effect === null ? h("small", {}, "not measured") : h("b", {}, signed(node.effect)),
                ),
              ),
            h(
              "li",
              { class: "quiet", role: "presentation" },
              found.length > LISTED
                ? `and ${found.length - LISTED} more`
                : found.length
                  ? ""
                  : "No node has all of these words in its name, label, group, kind or token.",
            ),
          ]
        : [],
    );
    list.hidden = !words.length;
    mark();
  }

  function mark() {
    [...list.querySelectorAll("[role=option]")].forEach((item, place) =>
      item.setAttribute("aria-selected", String(place === active)),
    );
    input.setAttribute("aria-expanded", String(!list.hidden));
    if (active >= 0 && !list.hidden) input.setAttribute("aria-activedescendant", `found-${active}`);
    else input.removeAttribute("aria-activedescendant");
    list.children[active]?.scrollIntoView({ block: "nearest" });
  }

  function take(place) {
    const node = found[place];
    if (!node) return;
    close();
    choose(node.id);
  }

  function close() {
    list.hidden = true;
    input.value = "";
    found = [];
    seek(null);
    mark();
    input.blur();
  }

  input.addEventListener("input", search);
  input.addEventListener("focus", () => input.value && search());
  input.addEventListener("blur", () => ((list.hidden = true), mark()));
  input.addEventListener("keydown", (event) => {
    const most = Math.min(found.length, LISTED);
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      active = most ? (active + (event.key === "ArrowDown" ? 1 : most - 1)) % most : -1;
      mark();
    } else if (event.key === "Enter") take(active);
    else if (event.key === "Escape") close();
    event.stopPropagation();
  });
}
