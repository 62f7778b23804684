// Lay out the circuit: a column for each token, a row for each height of the computation, cards packed into cells, edges routed.
//
// Columns without cards are as narrow as their tokens; if there is too little room, tokens that nothing reads share a column.
// Columns with cards are widened by one card at a time, each time the column that saves most height, until the graph fits.

import { curveBundle, line } from "d3-shape";
import { fitLines } from "./dom.js";

export const LABELS = 74; // width of the rows' names
export const PAD = 9;
const CARDS = [164, 146]; // widths of a card; the second is used if there is little room
const LINE = 14,
  GAP = 9,
  GUTTER = 16,
  ROW_GAP = 11,
  TOP = 44, // room for the answer
  LEAF = 21,
  LEAF_WIDE = 150,
  TOKENS = 34,
  UPRIGHT = 76,
  MOST_SPREAD = 64, // added at most to each column if there is room
  SLIM = 40; // the largest width of a part that is drawn small
export const NAME_FONT = '500 11.5px "Inter", sans-serif',
  TOKEN_FONT = '12px "JetBrains Mono", monospace';
const bundled = line().curve(curveBundle.beta(0.9));

/** Return a part's title without the token at its start, if the part is in the column of that token. */
function shortTitle(part) {
  const found = /^(?:at|reads) .*?@(\d+), (?=.)/s.exec(part.title);
  return found && !part.group?.label && Number(found[1]) === part.position ? part.title.slice(found[0].length) : part.title;
}

/** Return the size of a part, closed or open; groups with weak effects and added nodes are drawn small. */
function sized(part, open, card, most) {
  if (open) {
    const many = part.nodes.length;
    const across = many <= 5 ? 1 : many <= 16 ? 2 : many <= 45 ? 3 : 5;
    const lines = fitLines(part.title, across * LEAF_WIDE - 18, NAME_FONT, 2);
    const head = lines.length * LINE + LINE + 8;
    return { open, across, lines, head, w: across * (LEAF_WIDE + 4) + 8, h: head + Math.ceil(many / across) * LEAF + 7 };
  }
  if (part.type === "more") return { small: true, w: 40, h: 20, lines: [`+${part.nodes.length}`] };
  if (part.weak) return { small: true, w: 32, h: 20, lines: [String(part.nodes.length)] };
  const lines = fitLines(shortTitle(part), card - 2 * PAD, NAME_FONT, most);
  return { w: card, h: lines.length * LINE + LINE + 11, lines };
}

/** Return a cell's cards in lines no wider than `wide`, as [[card, ...], ...]. */
function packed(cards, wide) {
  const lines = [];
  let room = 0;
  for (const card of cards) {
    if (!lines.length || card.w + GAP > room) (lines.push([]), (room = wide + GAP));
    lines[lines.length - 1].push(card);
    room -= card.w + GAP;
  }
  return lines;
}

const tallOf = (lines) => lines.reduce((sum, inLine) => sum + Math.max(...inLine.map((card) => card.h)) + GAP, -GAP);
const wideOf = (inLine) => inLine.reduce((sum, card) => sum + card.w + GAP, -GAP);

/**
 * Return the places of parts, leaves, columns and rows for a width and a height to fill; `read` has the positions of inputs with
 * edges. Cards are drawn smaller if they do not fit otherwise.
 */
export function place(tokens, parts, open, read, width, tall) {
  const ways = [
    [CARDS[0], 2, 0],
    [CARDS[0], 2, 1],
    [CARDS[0], 1, 1],
    [CARDS[1], 2, 1],
    [CARDS[1], 1, 1],
    [CARDS[0], 1, 2],
    [CARDS[1], 1, 2],
  ];
  let best = null,
    least = Infinity;
  for (const [card, most, folded] of ways) {
    const layout = placed(tokens, parts, open, read, width, tall, card, most, folded);
    const over = 3 * Math.max(0, layout.width - width + LABELS) + Math.max(0, layout.height + layout.tokensHeight - tall);
    if (over < least - 20) ((best = layout), (least = over));
    if (least < 2) break;
  }
  return best;
}

function placed(tokens, parts, open, read, width, tall, card, most, folded) {
  const cards = [...parts.values()].map((part) => ({ part, key: part.key, ...sized(part, open.has(part.key), card, most) }));
  const free = width - LABELS - 2 * GUTTER;
  const columns = columnsOf(tokens, cards, read, free, folded);
  const columnAt = new Map(columns.flatMap((column) => column.positions.map((position) => [position, column])));
  const heights = [...new Set(cards.map((card) => card.part.height))].sort((a, b) => b - a); // from the top
  const cells = new Map();
  for (const card of cards) {
    const key = `${card.part.height}|${columnAt.get(card.part.position).place}`;
    cells.set(key, [...(cells.get(key) ?? []), card]);
  }
  const cell = (height, column) => cells.get(`${height}|${column.place}`) ?? [];
  const filled = new Map(heights.map((height) => [height, columns.filter((column) => cell(height, column).length)]));
  const rowTall = (height) => Math.max(...filled.get(height).map((column) => tallOf(packed(cell(height, column), column.wide))));
  const upright = columns.some((column) => column.upright);
  const tokensHeight = upright ? UPRIGHT : TOKENS;
  const room = tall - TOP - tokensHeight - ROW_GAP;
  const total = () => heights.reduce((sum, height) => sum + rowTall(height) + ROW_GAP, 0);

  let spare = free - columns.reduce((sum, column) => sum + column.wide + GUTTER, 0);
  for (let now = total(); now > room;) {
    const tried = columns
      .filter((column) => column.cards && card + GAP <= spare)
      .map((column) => {
        column.wide += card + GAP;
        const then = total();
        column.wide -= card + GAP;
        return [then, column];
      });
    const best = tried.sort((a, b) => a[0] - b[0])[0];
    if (!best || best[0] >= now) break;
    best[1].wide += card + GAP;
    spare -= card + GAP;
    now = best[0];
  }
  const more = Math.max(0, spare) / Math.max(1, columns.length);
  let x = GUTTER + (Math.max(0, more - MOST_SPREAD) * columns.length) / 2;
  for (const column of columns) {
    column.width = column.wide + GUTTER + Math.min(MOST_SPREAD, more);
    Object.assign(column, { x, center: x + column.width / 2 });
    x += column.width;
  }

  const extra = Math.max(0, Math.min(40, (room - total()) / Math.max(1, heights.length + 1)));
  const rows = [],
    at = new Map(),
    leaves = new Map();
  let y = TOP + ROW_GAP + extra / 2;
  for (const height of heights) {
    const row = { name: height, y: y - extra / 2, height: rowTall(height) + extra };
    rows.push(row);
    for (const column of columns) {
      const lines = packed(cell(height, column), column.wide);
      let top = row.y + (row.height - (tallOf(lines) || 0)) / 2;
      for (const inLine of lines) {
        const high = Math.max(...inLine.map((card) => card.h));
        let left = column.center - wideOf(inLine) / 2;
        for (const card of inLine) {
          const box = { ...card, x: left, y: top + (high - card.h) / 2, row: rows.length - 1, column };
          at.set(card.key, box);
          if (card.open) placeLeaves(box, leaves);
          left += card.w + GAP;
        }
        top += high + GAP;
      }
    }
    y += row.height + ROW_GAP;
  }
  const height = Math.ceil(Math.max(y + extra / 2, tall - tokensHeight));
  const last = columns[columns.length - 1];
  return {
    width: Math.ceil(Math.max(x + GUTTER, width - LABELS)),
    height,
    tokensHeight,
    rows,
    columns,
    at,
    leaves,
    answer: { x: last.center, y: 22 },
  };
}

/** Return the columns from left to right; a run of tokens that nothing reads is one column if there is no room for each. */
function columnsOf(tokens, cards, read, free, folded) {
  const widest = new Map();
  for (const { part, w } of cards) widest.set(part.position, Math.max(w, widest.get(part.position) ?? 0));
  const last = tokens.length - 1;
  const make = (positions, upright) => {
    const [position] = positions;
    const has = widest.has(position);
    const slim = upright && (widest.get(position) ?? 0) <= SLIM && position !== last;
    const text = positions.length > 1 ? `${positions.length} tokens` : null;
    const lines = fitLines(text ?? tokens[position].text, slim ? UPRIGHT - 14 : 88, TOKEN_FONT, 1);
    const flat = 7.3 * [...lines[0]].length + 8;
    const own = positions.length > 1 ? 70 : slim ? 15 : Math.max(22, flat);
    return {
      positions,
      text: lines[0],
      run: positions.length > 1,
      upright: slim && positions.length === 1 && Math.max(own, widest.get(position) ?? 0) < flat - 8,
      cards: has,
      wide: Math.max(own, widest.get(position) ?? 0, position === last ? 134 : 0),
    };
  };
  const every = tokens.map((_, position) => [position]);
  const fits = (columns) => columns.reduce((sum, column) => sum + column.wide + GUTTER, 0) <= free;
  const runs = [];
  for (const [position] of every) {
    const idle = !widest.has(position) && !read.has(position) && position !== last;
    const before = runs[runs.length - 1];
    if (idle && before?.idle) before.push(position);
    else runs.push(Object.assign([position], { idle }));
  }
  const ways = [
    () => every.map((positions) => make(positions, false)),
    () => runs.map((positions) => make(positions, false)),
    () => runs.map((positions) => make(positions, true)),
  ];
  const made = ways.slice(folded).reduce((found, way) => (found && fits(found) ? found : way()), null);
  made.forEach((column, place) => (column.place = place));
  return made;
}

function placeLeaves(box, leaves) {
  box.part.nodes.forEach((node, place) => {
    const across = place % box.across,
      down = Math.floor(place / box.across);
    leaves.set(node.id, {
      key: node.id,
      x: box.x + 6 + across * (LEAF_WIDE + 4),
      y: box.y + box.head + down * LEAF,
      w: LEAF_WIDE,
      h: LEAF - 3,
      row: box.row,
      column: box.column,
    });
  });
}

/** Return the box of a key; null if the key is not drawn. */
export function boxOf(layout, key) {
  if (key === "answer")
    return { key, x: layout.answer.x - 64, y: 6, w: 128, h: 30, row: -1, column: layout.columns[layout.columns.length - 1] };
  if (key.startsWith("input:")) {
    const column = layout.columns.find((each) => each.positions.includes(Number(key.slice(6))));
    return column ? { key, x: column.x + 4, y: layout.height, w: column.width - 8, h: 0, row: layout.rows.length, column } : null;
  }
  return layout.leaves.get(key) ?? layout.at.get(key) ?? null;
}

/** Return edges with the points at which they meet their boxes, spread along each side in the order of the other ends. */
export function portsOf(layout, links) {
  const sides = new Map();
  const boxed = [];
  for (const link of links) {
    const from = boxOf(layout, link.source),
      to = boxOf(layout, link.target);
    if (!from || !to) continue;
    const each = { link, from, to };
    boxed.push(each);
    for (const [box, end, other] of [
      [from, "out", to],
      [to, "into", from],
    ]) {
      const key = `${end} ${box.key}`;
      sides.set(key, [...(sides.get(key) ?? []), { each, end, other: other.x + other.w / 2 }]);
      each[end] = box;
    }
  }
  for (const ends of sides.values()) {
    ends.sort((a, b) => a.other - b.other);
    ends.forEach(({ each, end }, place) => {
      const box = each[end];
      const step = Math.min(12, (box.w - 24) / Math.max(1, ends.length - 1));
      const x = box.x + box.w / 2 + (place - (ends.length - 1) / 2) * Math.max(0, step);
      each[end === "out" ? "start" : "stop"] = { x, y: end === "out" ? box.y : box.y + box.h };
    });
  }
  return boxed;
}

/** Return the path of an edge: direct if no row is between its ends, else around the cards, in one of the lanes of a gutter. */
export function route(layout, { from, to, start, stop }, lane) {
  const aside = (lane % 4) * 3.5 - 5;
  if (from.row === to.row && from.row >= 0 && from.row < layout.rows.length) return across(layout, from, to, start, stop, aside);
  const up = Math.min(34, Math.abs(start.y - stop.y) / 2);
  if (from.row - to.row === 1 || stop.y >= start.y)
    return `M${start.x} ${start.y}C${start.x} ${start.y - up} ${stop.x} ${stop.y + up} ${stop.x} ${stop.y}`;
  const left = to.column === from.column ? start.x <= from.column.center : to.column.x < from.column.x;
  const gutter = aside + (left ? from.column.x : from.column.x + from.column.width);
  return bundled([
    [start.x, start.y],
    [start.x, start.y - 8],
    [gutter, start.y - 12],
    [gutter, stop.y + 18],
    [stop.x, stop.y + 10],
    [stop.x, stop.y],
  ]);
}

/** Return the path of an edge within a row: from side to side, or over the cards between its ends. */
function across(layout, from, to, start, stop, aside) {
  const y = from.y + from.h / 2,
    v = to.y + to.h / 2;
  const right = to.x >= from.x + from.w,
    leftwards = from.x >= to.x + to.w;
  const [x, u] = right ? [from.x + from.w, to.x] : [from.x, to.x + to.w];
  const [low, high] = [Math.min(x, u), Math.max(x, u)];
  const between = [...layout.at.values()].some((box) => box.row === from.row && box.x < high - 1 && box.x + box.w > low + 1);
  if ((right || leftwards) && !between) return `M${x} ${y}C${(x + u) / 2} ${y} ${(x + u) / 2} ${v} ${u} ${v}`;
  if (right || leftwards) {
    const over = layout.rows[from.row].y - 5 + aside / 2;
    return bundled([
      [start.x, from.y],
      [start.x, over],
      [start.x, over],
      [stop.x, over],
      [stop.x, over],
      [stop.x, to.y],
    ]);
  }
  const edge = Math.min(from.x, to.x) - 10 + aside; // one box is above the other
  return `M${from.x} ${y}C${edge} ${y} ${edge} ${v} ${to.x} ${v}`;
}
