// Labels that a person gives to channels: kept by the server when served, else in this browser, for this coupling alone.

import { jobOf } from "./job.js";

/** `get(name)`, `set(name, text)`, `all()`, and where they are kept in words. */
export function makeLabels(data, changed) {
  const where = data.explanation.provenance;
  const key = `bridge-labels:${where.coupling_fingerprint ?? `${where.dense_fingerprint}:${where.coupling}:${where.l0}`}`;
  let own = new Map(),
    kept = "kept in this browser",
    storage = null;
  if (!data.served) {
    try {
      storage = window.localStorage;
      own = clean(JSON.parse(storage.getItem(key) ?? "{}"));
    } catch {
      kept = "not kept: this browser stores nothing for files; save the labels as JSON";
    }
  } else kept = "kept with the coupling";
  const base = clean(data.labels ?? {});

  async function set(name, text) {
    const line = text.replace(/\s+/g, " ").trim().slice(0, 300);
    if (line === (get(name) ?? "")) return kept;
    own.set(name, line); // an empty one hides what came with the page
    changed();
    if (data.served) {
      const answer = await send({ [name]: line });
      if (!answer?.ok) throw new Error(`the server did not keep it (${answer ? answer.status : "no answer"})`);
    } else if (storage) {
      try {
        storage.setItem(key, JSON.stringify(Object.fromEntries(own)));
      } catch {
        throw new Error("this browser has no room for it; save the labels as JSON");
      }
    }
    return kept;
  }

  let listed = null; // the coupling's name on the server
  async function send(changes) {
    const id = jobOf(data);
    try {
      listed ??= id ? ((await (await fetch("/api/explanations")).json()).find((job) => job.id === id)?.bridge ?? null) : null;
      const query = listed === null ? "" : `?bridge=${encodeURIComponent(listed)}`;
      return await fetch(`/api/labels${query}`, {
        method: "PATCH",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(changes),
      });
    } catch {
      return null;
    }
  }

  const get = (name) => (own.has(name) ? own.get(name) : base.get(name)) || null;
  const all = () => Object.fromEntries([...new Map([...base, ...own])].filter(([, text]) => text));
  async function take(labels) {
    for (const [name, text] of clean(labels)) await set(name, text);
  }
  return { get, set, all, take, where: () => kept };
}

function clean(labels) {
  if (labels === null || typeof labels !== "object" || Array.isArray(labels))
    throw new Error("labels are an object of names and texts");
  return new Map(Object.entries(labels).filter(([, text]) => typeof text === "string"));
}
