// Where everything stands: a column for each token, a row for each sublayer's location, nodes packed in cells, edges routed.
//
// Edges leave their cell for the gutter beside its column, run there to the target's row, and enter. The route's corners are the
// control points of a bundled curve (d3's, after Holten 2006), so that edges between the same two cells share a trunk.

import { curveBundle, line } from "d3-shape";
import { plain } from "./dom.js";
import { KINDS, outer } from "./model.js";

const STEP = 15,
  ROW = 23,
  MOST_LINES = 4,
  EMPTY = 12,
  NARROW = 26,
  PAD = 12,
  ANSWER = 62,
  LAYER_GAP = 10;
const UPRIGHT = 78,
  LEVEL = 40; // heights of the tokens' names
export const LABELS = 96; // width of the rows' names
const bundled = line().curve(curveBundle.beta(0.82));

/** Places of a line from its middle outwards, so that the strongest of a cell stand below the answer and stay in view. */
const fromMiddle = (place, many) => Math.floor((many - 1) / 2) + (place % 2 ? 1 : -1) * Math.ceil(place / 2);

/** Positions of the nodes, columns and rows, for a width and a height to fill. */
export function place(model, nodes, width, tall) {
  const tokens = model.explanation.tokens;
  const cells = new Map();
  for (const node of nodes) {
    const key = `${node.layer}.${node.kind}|${node.position}`;
    if (!cells.has(key)) cells.set(key, []);
    cells.get(key).push(node);
  }
  const columns = tokens.map((token) => ({
    token,
    most: 0,
    least: Math.max(NARROW, Math.min(74, 7.4 * plain(token.text, 9).length + 10)),
  }));
  for (const [key, cell] of cells) {
    const column = columns[Number(key.slice(key.indexOf("|") + 1))];
    column.most = Math.max(column.most, cell.length);
  }
  const free = width - LABELS - 2 * PAD;
  if (columns.reduce((sum, column) => sum + column.least, 0) > free) columns.forEach((column) => (column.least = NARROW)); // names upright
  const last = columns[columns.length - 1];
  if (last) last.least = Math.max(last.least, 150); // the answer's two tokens stand above it
  // As few lines to a cell as the width allows, then what is spare to all.
  const needed = (column, lines) => Math.max(column.least, Math.ceil(column.most / lines) * STEP + 22);
  const widthAt = (lines) => columns.reduce((sum, column) => sum + needed(column, lines), 0);
  let lines = 1;
  while (lines < MOST_LINES && widthAt(lines) > free) lines += 1;
  const spare = Math.max(0, free - widthAt(lines));
  for (const column of columns) {
    column.across = Math.max(1, Math.ceil(column.most / lines));
    column.width = needed(column, lines) + Math.min(60, spare / columns.length);
  }
  let x = PAD;
  for (const column of columns) (Object.assign(column, { x, center: x + column.width / 2 }), (x += column.width));
  const total = x + PAD;

  // From the top: the answer, the layers downwards, the embedding; what height is spare is shared by the rows.
  const rows = [],
    layers = [];
  const heightOf = (inRow) =>
    Math.max(ROW, Math.max(...inRow.map((size, position) => Math.ceil(size / columns[position].across))) * STEP + 7);
  const sizesOf = (layer, kind) => columns.map((column, position) => cells.get(`${layer}.${kind}|${position}`)?.length ?? 0);
  const used = model.layers.map((layer) => KINDS.map((kind) => sizesOf(layer, kind)).filter((inRow) => inRow.some(Boolean)));
  const heights = used.map((inLayer) => inLayer.reduce((sum, inRow) => sum + heightOf(inRow), 0) || EMPTY);
  const upright = columns.some((column) => plain(column.token.text, 9).length * 7.4 > column.width - 2);
  const least = ANSWER + heights.reduce((sum, height) => sum + height + LAYER_GAP, 0) + 8 + (upright ? UPRIGHT : LEVEL);
  const extra = Math.max(0, Math.min(22, (tall - least) / Math.max(1, used.flat().length)));
  let y = ANSWER;
  for (const layer of [...model.layers].reverse()) {
    const top = y;
    for (const kind of [...KINDS].reverse()) {
      const inRow = sizesOf(layer, kind);
      if (!inRow.some(Boolean)) continue;
      const height = heightOf(inRow) + extra;
      rows.push({ layer, kind, y, height, middle: y + height / 2 });
      y += height;
    }
    if (y === top) y += EMPTY;
    layers.push({ layer, y: top, height: y - top });
    y += LAYER_GAP;
  }
  const at = new Map();
  for (const row of rows) {
    columns.forEach((column, position) => {
      const cell = cells.get(`${row.layer}.${row.kind}|${position}`) ?? [];
      const lines = Math.ceil(cell.length / column.across);
      cell.forEach((node, place) => {
        const down = Math.floor(place / column.across);
        const here = down === lines - 1 ? cell.length - down * column.across : column.across;
        const across = fromMiddle(place % column.across, here);
        at.set(node.id, {
          x: column.center + (across - (here - 1) / 2) * STEP,
          y: row.middle + (down - (lines - 1) / 2) * STEP,
          column: position,
          row,
        });
      });
    });
  }
  const bottom = y + 4;
  return {
    columns,
    rows,
    layers,
    at,
    upright,
    tokensHeight: upright ? UPRIGHT : LEVEL,
    width: total,
    height: bottom,
    top: { y: 30, for: last?.center - 36, against: last?.center + 36 },
  };
}

/** Where an end of an edge is, null if it is not drawn. An embedding stands at its token, the answer at the side it speaks for. */
export function end(layout, id, effect) {
  const found = layout.at.get(id);
  if (found) return found;
  const what = outer(id);
  const column = layout.columns[what.position];
  if (what.kind === "embedding" || what.kind === "bigram") {
    return column && { x: column.center, y: layout.height, column: what.position, row: { y: layout.height, height: 0 } };
  }
  if (what.kind !== "answer") return null;
  const x = effect >= 0 ? layout.top.for : layout.top.against;
  return { x, y: layout.top.y + 13, column: layout.columns.length - 1, row: { y: layout.top.y, height: 16 } };
}

/** The path of an edge between two places. */
export function route(layout, from, to) {
  const [source, target] = [layout.columns[from.column], layout.columns[to.column]];
  const out = from.row.y - 2,
    into = to.row.y + to.row.height + 3;
  if (from.column !== to.column) {
    const right = from.column < to.column;
    const gutters = [right ? source.x + source.width - 2 : source.x + 2, right ? target.x + 2 : target.x + target.width - 2];
    return bundled([
      [from.x, from.y],
      [from.x, out],
      [gutters[0], (out + into) / 2],
      [gutters[1], (out + into) / 2],
      [to.x, into],
      [to.x, to.y],
    ]);
  }
  if (out - into < ROW)
    return bundled([
      [from.x, from.y],
      [from.x, out],
      [to.x, into],
      [to.x, to.y],
    ]);
  const gutter = (from.x + to.x) / 2 <= source.center ? source.x + 6 : source.x + source.width - 6;
  return bundled([
    [from.x, from.y],
    [from.x, out],
    [gutter, out - 6],
    [gutter, into + 6],
    [to.x, into],
    [to.x, to.y],
  ]);
}
