// The trace, and what the page shows of it now. Everything else reads this.

const trace = JSON.parse(document.getElementById("trace").textContent);
const threads = trace.threads;
const element = (id) => document.getElementById(id);

const state = {
  selected: null, // a thread's id
  hovered: null,
  collapsed: new Set(),
  query: "",
  seconds: false,
  view: null, // [from, to] of the axis; null shows all
  visible: [], // ids of the threads shown, in order
};

for (const thread of threads) {
  thread.children = thread.forks.flatMap((fork) => fork.children);
  thread.said = thread.pieces.filter(isText).map((piece) => piece[1]).join("");
  thread.searched = `${thread.prompt}\n${thread.said}\n${thread.notes.join("\n")}`.toLowerCase();
}
const roots = trace.requests.map((request) => request.root);
const depthFirst = [];
for (const stack = [...roots].reverse(); stack.length; ) {
  const id = stack.pop();
  depthFirst.push(id);
  stack.push(...[...threads[id].children].reverse());
}

function isText(piece) {
  return piece[0] === "sampled" || piece[0] === "forced";
}

function name(id) {
  const thread = threads[id];
  return roots.length > 1 ? `${thread.request}.${thread.label}` : thread.label;
}

// Does the thread itself match the filter? Words are joined by "and".
function matches(thread) {
  return state.query.toLowerCase().split(/\s+/).filter(Boolean).every((word) => {
    if (word === "critical") return thread.on_path;
    if (word === "preempted") return thread.preempted.length > 0;
    if (word === "degraded") return thread.notes.length > 0;
    if (word === thread.status) return true;
    if (/^\d+(\.\d+)?$/.test(word) && (word === thread.label || word === name(thread.id))) return true;
    return thread.searched.includes(word);
  });
}

// Fills in `state.visible`: what is not inside of something collapsed; with a filter, what matches and all above it.
function arrange() {
  const filtered = state.query.trim() !== "";
  const kept = new Set();
  for (const thread of threads) {
    thread.matched = !filtered || matches(thread);
    if (filtered && thread.matched) {
      for (let id = thread.id; id !== null && !kept.has(id); id = threads[id].parent) kept.add(id);
    }
  }
  const hidden = new Set();
  state.visible = depthFirst.filter((id) => {
    const parent = threads[id].parent;
    const inside = parent !== null && (hidden.has(parent) || state.collapsed.has(parent));
    if (inside && !filtered) hidden.add(id);
    return filtered ? kept.has(id) : !inside;
  });
  state.row = new Map(state.visible.map((id, row) => [id, row]));
}

// Where a thread was preempted or not ended, the trace's end stands in.
function endOf(thread) {
  return thread.ended === null ? trace.num_steps : thread.ended;
}

function number(value) {
  return value.toLocaleString("en");
}

function create(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}
