// The explanation on the server that shows this page, and its card, which may come while the page is open.

const EVERY = 1000; // milliseconds between two questions
const PATIENCE = 15000; // for one answer
const MISSES = 5; // answers in a row that did not come

/** The explanation's id on the server; null where the page is a file. */
export const jobOf = (data) => (data.served && location.protocol.startsWith("http") ? data.job : null);

/** Ask for the card until it is there: `tell(line)` says where it is or why it will not come, `come(card)` hands it over. */
export async function awaitCard(data, tell, come) {
  const id = jobOf(data);
  if (id === null || !data.pending) return;
  const computed = (phase) => tell(`The card is being computed: ${phase}`);
  computed("starting");
  for (let missed = 0, brief = true; missed < MISSES; ) {
    let answer, told;
    try {
      const where = `/api/explanations/${encodeURIComponent(id)}${brief ? "?brief=true" : ""}`;
      answer = await fetch(where, { signal: AbortSignal.timeout(PATIENCE) });
      told = await answer.json();
    } catch {
      missed += 1;
      await new Promise((next) => setTimeout(next, EVERY));
      continue;
    }
    missed = 0;
    if (!answer.ok) return tell(`The card will not come: ${told.detail ?? `the server answered ${answer.status}`}`);
    if (told.status === "failed") return tell(`The card failed: ${told.error}`);
    if (told.status === "cancelled") return tell("The card was cancelled. What is shown here does not depend on it.");
    if (told.explanation) return told.explanation.card ? come(told.explanation.card) : tell(null);
    brief = told.status !== "done"; // the whole of it is asked for once
    if (!brief) continue;
    computed(told.phase);
    await new Promise((next) => setTimeout(next, EVERY));
  }
  tell("The server does not answer any more. Reload the page to ask it again for the card.");
}
