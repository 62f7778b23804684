// What of the circuit is in view, and that there is more of it below.

const EDGE = 24; // room around what is gone to

/** Where to scroll along one axis, from `now`, so that a place is seen in `room`, and with it the others where they fit. */
export function fit(now, room, place, others = []) {
  const low = Math.min(place, ...others) - EDGE,
    high = Math.max(place, ...others) + EDGE;
  if (high - low <= room) return Math.min(low, Math.max(high - room, now));
  const seen = place > now + EDGE && place < now + room - EDGE;
  return seen ? now : place - room / 2;
}

/** A button that is there while rows of the circuit lie below what is seen, and goes to them. */
export function hintBelow(holder, button) {
  const update = () => {
    button.hidden = holder.scrollTop + holder.clientHeight >= holder.scrollHeight - 12;
    button.style.bottom = `${holder.offsetHeight - holder.clientHeight + holder.querySelector(".tokens").clientHeight + 8}px`;
  };
  button.addEventListener("click", () => holder.scrollBy({ top: holder.clientHeight * 0.6 }));
  holder.addEventListener("scroll", update, { passive: true });
  return update;
}
