// One lane a thread, beside its row in the tree: when it ran, waited, forked, was joined.

const ROW = 24;

// Sizes that follow from the window and from how many threads are shown: set where these change, not at each drawing.
function fit() {
  const scroller = element("scroll");
  element("lanes").style.height = `${Math.max(state.visible.length * ROW, 1)}px`;
  element("timeline").style.height = `${scroller.clientHeight}px`;
  element("charts").style.paddingRight = `${scroller.offsetWidth - scroller.clientWidth}px`; // the same axis
  draw();
}

function drawTimeline() {
  const canvas = element("timeline");
  const scroller = element("scroll");
  const { context, width, height } = brush(canvas);
  const to = scale(width);
  const first = Math.max(0, Math.floor(scroller.scrollTop / ROW) - 1);
  const last = Math.min(state.visible.length, first + Math.ceil(height / ROW) + 3);
  const y = (row) => row * ROW + ROW / 2 - scroller.scrollTop;
  drawGrid(context, to, width, height);
  for (let row = first; row < last; row++) {
    const id = state.visible[row];
    if (id === state.selected || id === state.hovered) {
      context.fillStyle = id === state.selected ? palette.select : palette.hover;
      context.fillRect(0, y(row) - ROW / 2, width, ROW);
    }
  }
  for (const id of state.visible) drawLinks(context, to, threads[id], y, height);
  for (let row = first; row < last; row++) drawLane(context, to, threads[state.visible[row]], y(row));
}

function drawGrid(context, to, width, height) {
  context.fillStyle = palette.line;
  context.globalAlpha = 0.6;
  for (const [value] of ticks(width)) context.fillRect(to.x(stepOf(value)), 0, 1, height);
  context.globalAlpha = 1;
}

function drawLane(context, to, thread, y) {
  context.globalAlpha = thread.matched ? 1 : 0.3;
  const end = to.x(endOf(thread));
  const begin = to.x(thread.began);
  context.fillStyle = thread.on_path ? palette.critical : palette.wait;
  context.fillRect(begin, y - 0.5, Math.max(1, end - begin), thread.on_path ? 1.5 : 1);
  for (const [number, fork] of thread.forks.entries()) {
    const until = thread.joins[number] ? thread.joins[number].step : endOf(thread);
    dashed(context, to.x(fork.step), to.x(until), y);
  }
  for (const run of thread.runs) {
    const left = to.x(run.start);
    context.fillStyle = runColour(thread, run);
    if (run.kind === "flush") context.fillRect(left - 1, y - 6, 2, 12);
    else bar(context, left, y - 6, Math.max(1.5, to.x(run.end) - left - 0.5), 12);
  }
  for (const [from, until] of thread.preempted) hatched(context, to.x(from), to.x(until ?? endOf(thread)), y);
  context.fillStyle = palette.joined;
  for (const mark of thread.marks) diamond(context, to.x(mark), y);
  drawEnd(context, thread, end, y);
  context.globalAlpha = 1;
}

// Fork and join lines: vertical at their step, from the parent's lane to the children's.
function drawLinks(context, to, thread, y, height) {
  const above = y(state.row.get(thread.id));
  for (const fork of thread.forks) links(context, to.x(fork.step), above, fork.children, y, height, "shared");
  for (const join of thread.joins) {
    const x = to.x(join.step);
    links(context, x, above, join.children, y, height, "joined");
    for (const id of join.children) {
      if (!state.row.has(id)) continue;
      const at = y(state.row.get(id));
      if (at < -ROW || at > height + ROW) continue;
      context.strokeStyle = palette[threads[id].on_path ? "critical" : "joined"];
      context.setLineDash([2, 3]);
      line(context, to.x(endOf(threads[id])), at, x, at, 1);
      context.setLineDash([]);
    }
  }
}

function links(context, x, above, children, y, height, colour) {
  const rows = children.filter((id) => state.row.has(id)).map((id) => [y(state.row.get(id)), threads[id].on_path]);
  if (!rows.length) return;
  const lowest = Math.max(...rows.map(([at]) => at));
  if (lowest < 0 || above > height) return;
  x = Math.round(x) + 0.5; // a sharp line
  context.strokeStyle = palette[colour];
  line(context, x, above, x, lowest, 1);
  const onPath = rows.find(([, path]) => path);
  if (onPath) {
    context.strokeStyle = palette.critical;
    line(context, x, above, x, onPath[0], 2.5);
  }
}

function drawEnd(context, thread, x, y) {
  if (thread.ended === null) return;
  context.lineWidth = 1.8;
  context.strokeStyle = context.fillStyle = palette[thread.status === "joined" ? "joined" : "preempted"];
  if (thread.status === "joined") {
    context.beginPath();
    context.arc(x, y, 3.2, 0, 7);
    context.fill();
  } else if (thread.status !== "finished") {
    line(context, x - 3.5, y - 3.5, x + 3.5, y + 3.5, 1.8);
    line(context, x - 3.5, y + 3.5, x + 3.5, y - 3.5, 1.8);
  } else {
    context.fillStyle = palette.fg;
    context.fillRect(x - 1, y - 5, 2, 10);
  }
}

function line(context, x0, y0, x1, y1, width) {
  context.lineWidth = width;
  context.beginPath();
  context.moveTo(x0, y0);
  context.lineTo(x1, y1);
  context.stroke();
}

function bar(context, x, y, width, height) {
  context.beginPath();
  context.roundRect(x, y, width, height, Math.min(2.5, width / 2));
  context.fill();
}

function dashed(context, from, until, y) {
  context.strokeStyle = palette.bg;
  line(context, from, y, until, y, 2.5);
  context.strokeStyle = palette.wait;
  context.setLineDash([3, 3]);
  line(context, from, y, until, y, 1.5);
  context.setLineDash([]);
}

function hatched(context, from, until, y) {
  context.strokeStyle = palette.preempted;
  for (let x = from; x < until; x += 4) line(context, x, y + 4, Math.min(until, x + 3), y - 4, 1.2);
}

function diamond(context, x, y) {
  context.beginPath();
  for (const [dx, dy] of [[0, -7], [4, -3], [0, 1], [-4, -3]]) context.lineTo(x + dx, y - 4 + dy);
  context.fill();
}

// What lies under the pointer, for the tip.
function describeLane(id, step) {
  const thread = threads[id];
  const run = thread.runs.find((each) => each.start <= step && step < Math.max(each.end, each.start + 0.2));
  const out = thread.preempted.some(([from, until]) => from <= step && step < (until ?? endOf(thread)));
  const fork = thread.forks.findIndex((each, i) => each.step <= step && step < (thread.joins[i]?.step ?? endOf(thread)));
  let doing = "";
  if (step < thread.began || step > endOf(thread)) doing = "not there";
  else if (run) doing = `${run.kind}: ${number(run.num_fed)} tokens fed in steps ${run.start}–${run.end - 1}, slot ${run.slot}`;
  else if (out) doing = "its pages are in host memory";
  else if (fork >= 0) doing = `waits for ${thread.forks[fork].children.map(name).join(", ")}`;
  else doing = "waits";
  return `thread ${name(id)} (${thread.status}) · ${doing}`;
}
