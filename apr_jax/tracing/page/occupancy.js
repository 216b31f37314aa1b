// Pages by step, stacked by who reads them; and the rows of the batch, one lane a slot.

const KINDS = [
  ["private", "read by one thread"],
  ["shared", "read by several"],
  ["joined", "gathered by a join"],
  ["cached", "prefix cache only"],
];

function sampleAt(step) {
  let low = 0;
  let high = trace.samples.length;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (trace.samples[middle].start <= step) low = middle;
    else high = middle;
  }
  return trace.samples[low];
}

const mostPages = Math.max(1, ...trace.samples.map((s) => s.private + s.shared + s.joined + s.cached));

function drawPages() {
  const { context, width, height } = brush(element("pages"));
  const to = scale(width);
  const top = Math.min(trace.num_pages, Math.ceil(mostPages * 1.08));
  const y = (pages) => height - (pages / top) * (height - 14);
  for (const sample of trace.samples) {
    if (sample.end < to.first || sample.start > to.last) continue;
    const left = to.x(sample.start);
    const wide = Math.max(0.6, to.x(sample.end) - left + 0.35);
    let stacked = 0;
    for (const [kind] of KINDS) {
      if (sample[kind] === 0) continue;
      context.fillStyle = palette[kind];
      context.fillRect(left, y(stacked + sample[kind]), wide, y(stacked) - y(stacked + sample[kind]));
      stacked += sample[kind];
    }
  }
  context.fillStyle = palette.muted;
  context.font = "11px system-ui, sans-serif";
  const size = `pages of ${trace.page_size} tokens`;
  const label = top === trace.num_pages ? `all ${number(top)} ${size}` : `${number(top)} of ${number(trace.num_pages)} ${size}`;
  context.fillText(label, 8, 11);
  context.strokeStyle = palette.line;
  context.strokeRect(0, 13.5, width, 0);
}

// Runs by slot; slots that were never used take no room.
const slots = [...new Set(threads.flatMap((thread) => thread.runs.map((run) => run.slot)))]
  .filter((slot) => slot !== null)
  .sort((a, b) => a - b);
const laneOf = new Map(slots.map((slot, lane) => [slot, lane]));
element("rows").style.height = `${Math.min(120, Math.max(30, slots.length * 7 + 8))}px`;

function drawRows() {
  const { context, width, height } = brush(element("rows"));
  const to = scale(width);
  const lane = (height - 8) / Math.max(1, slots.length);
  const gap = lane > 3 ? 1 : 0;
  for (const thread of threads) {
    for (const run of thread.runs) {
      if (run.slot === null || run.end < to.first || run.start > to.last) continue;
      const chosen = thread.id === state.selected || thread.id === state.hovered;
      context.fillStyle = chosen ? palette.fg : runColour(thread, run);
      context.globalAlpha = chosen || thread.matched ? 1 : 0.25;
      const left = to.x(run.start);
      context.fillRect(left, 4 + laneOf.get(run.slot) * lane, Math.max(1, to.x(run.end) - left - 0.5), lane - gap);
    }
  }
  context.globalAlpha = 1;
}

function runColour(thread, run) {
  if (run.kind === "prefill") return palette.prefill;
  return thread.on_path ? palette.critical : palette.decode;
}

function drawTicks() {
  const { context, width, height } = brush(element("ticks"));
  const to = scale(width);
  context.fillStyle = palette.muted;
  context.strokeStyle = palette.line;
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "middle";
  for (const [value, text] of ticks(width)) {
    const x = to.x(stepOf(value));
    context.fillRect(x, 0, 1, 4);
    const wide = context.measureText(text).width;
    context.fillText(text, Math.max(2, Math.min(width - wide - 2, x - wide / 2)), height / 2 + 3);
  }
}

function describeStep(step) {
  if (!trace.samples.length) return "";
  const s = sampleAt(step);
  const span = s.end - s.start > 1 ? `steps ${s.start}–${s.end - 1}` : `step ${s.start}`;
  const pages = KINDS.map(([kind]) => `${number(s[kind])} ${kind}`).join(", ");
  return `${span} · ${(s.end_ms / 1000).toFixed(3)} s\n${pages}, ${number(s.free)} free pages\n` +
    `${s.num_running} threads in rows, ${s.num_waiting} wait`;
}
