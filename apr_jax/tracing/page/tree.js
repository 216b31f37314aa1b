// The tree of threads: one row each, with keys as the ARIA pattern for trees has them.

const SIGNS = { joined: "●", dropped: "✕", cancelled: "✕", finished: "■", running: "▶", waiting: "…", forked: "⑂", stopped: "■" };

function drawTree() {
  const tree = element("tree");
  const rows = state.visible.map((id) => {
    const thread = threads[id];
    const snippet = thread.said.trim().replace(/\s+/g, " ").slice(0, 160);
    const row = create("div", { id: `t${id}`, className: "thread" },
      create("span", { className: "twist" }),
      create("span", { className: `state ${thread.status}`, title: thread.status, textContent: SIGNS[thread.status] }),
      create("span", { className: "number", textContent: name(id) }),
      create("span", { className: "snippet", textContent: snippet || "(says nothing)" }),
      create("span", { className: "tokens", title: "tokens", textContent: number(thread.num_tokens) }));
    row.style.paddingLeft = `${4 + 14 * thread.depth}px`;
    row.classList.toggle("critical", thread.on_path);
    row.classList.toggle("dim", !thread.matched);
    row.setAttribute("role", "treeitem");
    row.setAttribute("aria-level", thread.depth + 1);
    row.setAttribute("aria-label", `thread ${name(id)}, ${thread.status}, ${thread.num_tokens} tokens` +
      `${thread.on_path ? ", on the critical path" : ""}: ${snippet}`);
    if (thread.children.length) row.setAttribute("aria-expanded", isOpen(id));
    return row;
  });
  tree.replaceChildren(...rows);
  markSelected();
  const count = `${number(threads.length)} threads${state.query.trim() ? `, ${number(threads.filter((t) => t.matched).length)} match` : ""}`;
  element("counts").textContent = `${count}, ${number(trace.num_steps)} steps, ${(trace.duration_ms / 1000).toFixed(2)} s`;
}

const isOpen = (id) => !state.collapsed.has(id) || state.query.trim() !== "";

function markSelected() {
  const tree = element("tree");
  for (const row of tree.querySelectorAll('[aria-selected="true"]')) row.removeAttribute("aria-selected");
  const row = element(`t${state.selected}`);
  row?.setAttribute("aria-selected", "true");
  if (row) tree.setAttribute("aria-activedescendant", row.id);
  else tree.removeAttribute("aria-activedescendant");
}

function select(id, { reveal = true } = {}) {
  if (id === null || id === undefined) return;
  state.selected = id;
  if (reveal && !state.row.has(id)) {
    state.query = element("search").value = "";
    for (let up = threads[id].parent; up !== null; up = threads[up].parent) state.collapsed.delete(up);
    rearrange();
  }
  markSelected();
  const row = state.row.get(id);
  const scroller = element("scroll");
  if (row * ROW < scroller.scrollTop) scroller.scrollTop = row * ROW;
  else if ((row + 1) * ROW > scroller.scrollTop + scroller.clientHeight) scroller.scrollTop = (row + 1) * ROW - scroller.clientHeight;
  drawDetails();
  draw();
}

function toggle(id, open) {
  if (!threads[id].children.length) return;
  if (open ?? state.collapsed.has(id)) state.collapsed.delete(id);
  else state.collapsed.add(id);
  rearrange();
}

function rearrange() {
  arrange();
  drawTree();
  fit();
}

const foldAll = () => showLevels(state.collapsed.size ? Infinity : 1);

// Collapses what lies deeper; the selection goes up to what is still shown.
function showLevels(count) {
  const closed = threads.filter((thread) => thread.children.length && thread.depth + 1 >= count);
  state.collapsed = new Set(closed.map((thread) => thread.id));
  element("fold").textContent = state.collapsed.size ? "expand all" : "collapse all";
  rearrange();
  while (state.selected !== null && !state.row.has(state.selected)) state.selected = threads[state.selected].parent;
  select(state.selected);
}

function moveSelection(by) {
  const row = state.row.get(state.selected) ?? 0;
  select(state.visible[Math.max(0, Math.min(state.visible.length - 1, row + by))]);
}

function nextOnPath() {
  const onPath = depthFirst.filter((id) => threads[id].on_path);
  select(onPath[(onPath.indexOf(state.selected) + 1) % onPath.length]);
}

// Returns whether the key meant something.
function treeKey(key) {
  const thread = threads[state.selected];
  switch (key) {
    case "ArrowDown": moveSelection(1); return true;
    case "ArrowUp": moveSelection(-1); return true;
    case "PageDown": moveSelection(20); return true;
    case "PageUp": moveSelection(-20); return true;
    case "Home": select(state.visible[0]); return true;
    case "End": select(state.visible[state.visible.length - 1]); return true;
    case "ArrowRight":
      if (thread?.children.length) {
        if (isOpen(thread.id)) select(thread.children[0]);
        else toggle(thread.id, true);
      }
      return true;
    case "ArrowLeft":
      if (thread?.children.length && isOpen(thread.id) && !state.query.trim()) toggle(thread.id, false);
      else if (thread) select(thread.parent);
      return true;
    case "Enter": element("details").focus(); return true;
  }
  return false;
}
