// What is measured on a prompt, in reading order, and what an aim in words asks of a value.

/** The field of the faithfulness, the measure's name, and the question that it answers. */
export const MEASURES = [
  ["agreement", "KL(dense, sparse)", "Do the two models answer alike?"],
  ["kl_kept", "KL of the circuit alone", "Is the circuit enough?"],
  ["share_kept", "share of D it keeps", "Does it keep the preference?"],
  ["company_mean", "KL in random company, mean", "Without help from cancellation?"],
  ["company_worst", "KL in random company, worst", "And at worst?"],
  ["kl_lost", "KL with the circuit deleted", "Is it needed?"],
  ["share_lost", "share of D left without it", "Is the preference gone without it?"],
  ["attention", "total variation of attention", "Does it attend alike?"],
  ["profile", "rank correlation in dense", "Do its effects recur in the dense model?"],
];

const ASKS = new Map(MEASURES.map(([, name, asks]) => [name, asks]));

/** The question that a measure answers; null where it has none but its name. */
export const asksOf = (name) => ASKS.get(name) ?? null;

/** The measures of a faithfulness in reading order, the interval put with the profile. */
export function measuresOf(faithfulness) {
  return MEASURES.filter(([field]) => faithfulness[field]).map(([field]) => ({
    ...faithfulness[field],
    interval: field === "profile" ? faithfulness.profile_interval : faithfulness[field].interval,
  }));
}

/** What a level misses of the aims of the whole circuit: [of the KL, of the share], by the rules of `bridge/validate.py`. */
export function missedBy(level, difference) {
  const off = Math.abs(level.share - 1) * Math.abs(difference);
  return [level.kl > 0.1, off > 0.1 * Math.max(Math.abs(difference), 1)];
}

/**
 * The region that an aim in words asks for, as [low, high]; null where it is no region, or not understood. A part that is about
 * something else than the value ("random <= 0.3") is left out.
 */
export function aimRegion(aim, control = null, ceiling = null) {
  let region = null;
  for (const part of aim.split(",")) {
    const bounds = boundsOf(part.trim(), control, ceiling);
    if (bounds === null) return null;
    if (bounds) region = region ? [Math.max(region[0], bounds[0]), Math.min(region[1], bounds[1])] : bounds;
  }
  return region && region[0] <= region[1] ? region : null;
}

/** What a part asks of the value: null where it is not understood, undefined where it asks nothing that is known here. */
function boundsOf(part, control, ceiling) {
  const between = /^(-?\d*\.?\d+) to (-?\d*\.?\d+)$/.exec(part);
  if (between) return [Number(between[1]), Number(between[2])];
  const bound = /^(<=|>=|<|>|below\b|above\b)\s*(.+)$/.exec(part);
  if (!bound) return /^[a-z]/i.test(part) ? undefined : null;
  const limit = limitOf(bound[2], control, ceiling);
  if (limit === null || limit === undefined) return limit;
  return "<b".includes(bound[1][0]) ? [-Infinity, limit] : [limit, Infinity];
}

/**
 * The number in "0.5", "0.5 of ceiling" and "3 times theirs"; words alone name the control, whose bar it is. Of a ceiling that is
 * not above 0 no share is enough, and more than others that do harm is at least 0.
 */
function limitOf(words, control, ceiling) {
  const [, size, of] = /^(-?\d*\.?\d+)?\s*(.*)$/.exec(words);
  if (size === undefined) return control?.bar;
  if (!of) return Number(size);
  if (of === "of ceiling") return ceiling ? (ceiling.mean > 0 ? Number(size) * ceiling.mean : null) : undefined;
  if (of === "times theirs") return control ? Math.max(0, Number(size) * control.mean) : undefined;
  return null;
}
