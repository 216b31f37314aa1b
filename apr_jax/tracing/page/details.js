// All about the selected thread.

const ORIGINS = { own: "private", forked: "shared", joined: "joined", cached: "cached" };
const ORIGIN_NAMES = {
  own: "its own",
  forked: "from before the fork",
  joined: "gathered by a join",
  cached: "found in the prefix cache",
};

function drawDetails() {
  const panel = element("details");
  const thread = threads[state.selected];
  if (!thread) {
    panel.replaceChildren(create("p", { textContent: "No thread." }));
    return;
  }
  panel.replaceChildren(
    create("h2", { textContent: `Thread ${name(thread.id)}` }),
    badges(thread),
    family(thread),
    facts(thread),
    ...thread.notes.map((note) => create("div", { className: "note", textContent: `⚠ ${note}` })),
    create("h3", { textContent: "Text" }),
    said(thread),
    create("h3", { textContent: `Pages of its context${thread.ended === null ? "" : " at the end"}` }),
    ...pages(thread));
  panel.scrollTop = 0;
}

function badges(thread) {
  const found = [create("span", { className: `badge ${thread.status}`, textContent: thread.status })];
  if (thread.on_path) found.push(create("span", { className: "badge path", textContent: "critical path" }));
  return create("div", {}, ...found);
}

function jump(id) {
  const button = create("button", { className: "jump", textContent: name(id) });
  button.setAttribute("aria-label", `go to thread ${name(id)}`);
  button.addEventListener("click", () => select(id));
  return button;
}

function family(thread) {
  const line = create("div");
  if (thread.parent !== null) line.append("parent ", jump(thread.parent), " ");
  if (thread.children.length) line.append("children ", ...thread.children.map(jump));
  return line;
}

function facts(thread) {
  const count = (kind) => thread.runs.filter((run) => run.kind === kind).reduce((sum, run) => sum + run.num_fed, 0);
  const rows = [
    ["tokens", `${number(thread.num_tokens)} (${number(thread.num_sampled)} sampled, ${number(thread.num_tokens - thread.num_sampled)} forced)`],
    ["critical path", `${number(thread.critical_path)} tokens through it`],
    ["steps", `${thread.began} – ${thread.ended ?? "…"} (${((thread.ended_ms ?? trace.duration_ms) - thread.began_ms).toFixed(1)} ms)`],
    ["fed", `${number(count("decode"))} decode, ${number(count("prefill"))} prefill, ${number(count("flush"))} flush`],
    ["stops", thread.stops.map(([step, reason]) => `${reason} at ${step}`).join(", ") || "none"],
  ];
  if (thread.num_dropped) rows.push(["taken back", `${number(thread.num_dropped)} tokens`]);
  if (thread.preempted.length) rows.push(["preempted", thread.preempted.map(([a, b]) => `${a} – ${b ?? "end"}`).join(", ")]);
  for (const join of thread.joins) {
    rows.push(["join", `${join.mode} at ${join.step}: ${join.num_segments} segments, ${join.host_ms.toFixed(3)} ms`]);
  }
  return create("dl", {}, ...rows.flatMap(([term, value]) =>
    [create("dt", { textContent: term }), create("dd", { textContent: value })]));
}

function said(thread) {
  const box = create("div", { className: "said" });
  if (thread.prompt) box.append(highlighted(thread.prompt, "prompt"), thread.parent === null ? "\n" : "");
  for (const piece of thread.pieces) {
    if (isText(piece)) box.append(highlighted(piece[1], piece[0]));
    else if (piece[0] === "fork") box.append(event("fork", thread.forks[piece[1]]));
    else if (piece[0] === "join") box.append(event("join", thread.joins[piece[1]]));
    else box.append(create("span", { className: "note", textContent: ` … ${piece[1]} left out` }));
  }
  return box;
}

function event(kind, what) {
  const words = kind === "join" ? `joins by ${what.mode} ` : what.spawned ? "spawns " : "forks into ";
  return create("span", { className: `event ${kind}` }, words, ...(what.children.length ? what.children.map(jump) : ["none"]));
}

// Text with the filter's words marked. Built of text nodes only: nothing in it is ever read as HTML.
function highlighted(text, kind) {
  const span = create("span", { className: kind });
  if (kind === "forced") span.title = "forced, not sampled";
  const words = state.query.toLowerCase().split(/\s+/).filter((word) => word.length > 1);
  const lower = text.toLowerCase();
  let at = 0;
  while (words.length && lower.length === text.length) {
    const hits = words.map((word) => [lower.indexOf(word, at), word.length]).filter(([place]) => place >= 0);
    if (!hits.length) break;
    const [place, length] = hits.sort((a, b) => a[0] - b[0])[0];
    span.append(text.slice(at, place), create("mark", { textContent: text.slice(place, place + length) }));
    at = place + length;
  }
  span.append(text.slice(at));
  return span;
}

function swatch(origin) {
  const box = create("i");
  box.style.background = `var(--${ORIGINS[origin]})`;
  return box;
}

function pages(thread) {
  if (!thread.segments.length) return [create("p", { textContent: "none" })];
  const strip = create("div", { className: "strip" });
  strip.setAttribute("role", "img");
  const table = create("table", { className: "segments" }, create("tr", {},
    ...["pages", "tokens", "from", "written by", "readers"].map((text) => create("th", { textContent: text }))));
  const totals = {};
  for (const use of thread.segments) {
    const label = `${use.num_pages} pages, ${use.num_tokens} tokens from position ${use.start_position}: ${ORIGIN_NAMES[use.origin]}`;
    const block = create("span", { title: label });
    block.style.cssText = `flex: ${use.num_pages} 1 0; background: var(--${ORIGINS[use.origin]})`;
    strip.append(block);
    totals[use.origin] = (totals[use.origin] ?? 0) + use.num_pages;
    const readers = use.max_readers > 1 ? `${use.max_readers} at once` : "1";
    table.append(create("tr", { title: label },
      create("td", {}, swatch(use.origin), String(use.num_pages)),
      create("td", { textContent: number(use.num_tokens) }),
      create("td", { textContent: number(use.start_position) }),
      create("td", {}, use.writer === null ? "?" : use.writer === thread.id ? "itself" : jump(use.writer)),
      create("td", { textContent: readers })));
  }
  const words = Object.entries(totals).map(([origin, count]) => `${number(count)} ${ORIGIN_NAMES[origin]}`);
  strip.setAttribute("aria-label", words.join(", "));
  const legend = create("ul", { className: "legend" }, ...Object.entries(totals).map(([origin, count]) =>
    create("li", {}, swatch(origin), `${number(count)} ${ORIGIN_NAMES[origin]}`)));
  return [strip, legend, table];
}
