// Labels that a person gives to the channels of one coupling: the server keeps them if it serves the page, else the browser.

/** Return {get(name), set(name, text), all(), take(labels), where(name)}; `where` says where a label is kept or why it is not. */
export function makeLabels(data, changed) {
  const made = data.explanation.provenance;
  const key = `bridge-labels:${made.coupling_fingerprint ?? `${made.dense_fingerprint}:${made.coupling}:${made.l0}`}`;
  let own = new Map(),
    kept = "kept in this browser",
    storage = null;
  const unkept = new Map(); // name -> why its last label could not be kept
  if (!data.served) {
    try {
      own = stored(window.localStorage, key);
      storage = window.localStorage;
    } catch {
      kept = "not kept: this browser stores nothing for pages opened from files; save the labels as JSON";
    }
  } else kept = "kept with the coupling";
  const base = clean(data.labels ?? {});

  async function set(name, text) {
    const line = text.replace(/\s+/g, " ").trim().slice(0, 300);
    if (line === (get(name) ?? "") && !unkept.has(name)) return kept;
    own.set(name, line); // an empty label hides the one that came with the page
    unkept.delete(name);
    changed();
    try {
      if (data.served) await send(name, line);
      else if (storage) store(name, line);
    } catch (error) {
      if (own.get(name) === line) (unkept.set(name, error.message), changed());
      throw error;
    }
    return kept;
  }

  /** Add one label to those that the browser keeps now, because other pages of this coupling may have added theirs. */
  function store(name, line) {
    try {
      storage.setItem(key, JSON.stringify(Object.fromEntries(stored(storage, key).set(name, line))));
    } catch {
      throw new Error("not kept: this browser has no room for the label; save the labels as JSON");
    }
  }

  /** Send one label to the server, for the coupling of this name and no other. */
  async function send(name, line) {
    let answer, reply;
    try {
      answer = await fetch(`/api/labels?bridge=${encodeURIComponent(made.coupling)}`, {
        method: "PATCH",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ [name]: line }),
      });
      reply = answer.ok ? null : await answer.json().catch(() => null);
    } catch {
      throw new Error("not kept: the server does not answer");
    }
    if (!answer.ok) throw new Error(`not kept: ${reply?.detail ?? `the server answered ${answer.status}`}`);
  }

  const get = (name) => (own.has(name) ? own.get(name) : base.get(name)) || null;
  const all = () => Object.fromEntries([...new Map([...base, ...own])].filter(([, text]) => text));
  async function take(labels) {
    for (const [name, text] of clean(labels)) await set(name, text);
  }
  return { get, set, all, take, where: (name) => unkept.get(name) ?? (get(name) ? kept : null) };
}

/** Return the labels that the browser keeps under a key; none if the stored text is not a set of labels. */
function stored(storage, key) {
  const text = storage.getItem(key);
  try {
    return clean(JSON.parse(text ?? "{}"));
  } catch {
    return new Map();
  }
}

function clean(labels) {
  if (labels === null || typeof labels !== "object" || Array.isArray(labels))
    throw new Error("labels must be an object of names and texts");
  return new Map(Object.entries(labels).filter(([, text]) => typeof text === "string"));
}
