// From steps to places: an axis of steps or of milliseconds, zoomed and moved.

const knots = trace.samples.map((sample) => [sample.start, sample.start_ms]);
if (trace.samples.length) {
  const last = trace.samples[trace.samples.length - 1];
  knots.push([last.end, last.end_ms]);
} else {
  knots.push([0, 0]);
}

// The piecewise linear function through the knots, or its inverse.
function interpolate(value, from, to) {
  let low = 0;
  let high = knots.length - 1;
  if (value <= knots[0][from]) return knots[0][to];
  if (value >= knots[high][from]) return knots[high][to];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (knots[middle][from] <= value) low = middle;
    else high = middle;
  }
  const [a, b] = [knots[low], knots[high]];
  return b[from] > a[from] ? a[to] + ((value - a[from]) / (b[from] - a[from])) * (b[to] - a[to]) : a[to];
}

const axisOf = (step) => (state.seconds ? interpolate(step, 0, 1) : step);
const stepOf = (value) => (state.seconds ? interpolate(value, 1, 0) : value);

function whole() {
  const first = axisOf(knots[0][0]);
  return [first, Math.max(axisOf(knots[knots.length - 1][0]), first + 1e-6)];
}

const shown = () => state.view ?? whole();

// A scale for a canvas of that width: step -> pixels, and back.
function scale(width) {
  const [from, to] = shown();
  const pad = 6;
  const factor = (width - 2 * pad) / (to - from);
  return {
    x: (step) => pad + (axisOf(step) - from) * factor,
    step: (x) => stepOf(from + (x - pad) / factor),
    value: (x) => from + (x - pad) / factor,
    first: stepOf(from),
    last: stepOf(to),
  };
}

// Zooms by a factor around a value of the axis, within the trace.
function zoom(factor, around) {
  const [low, high] = whole();
  const [from, to] = shown();
  const centre = around ?? (from + to) / 2;
  const least = (high - low) / 1e5;
  const size = Math.min(high - low, Math.max(least, (to - from) * factor));
  moveTo(centre - ((centre - from) / (to - from)) * size, size);
}

function moveTo(from, size) {
  const [low, high] = whole();
  const start = Math.max(low, Math.min(from, high - size));
  state.view = size >= (high - low) * 0.999 ? null : [start, start + size];
  draw();
}

// Round numbers across the axis, with how they are written.
function ticks(width) {
  const [from, to] = shown();
  const wanted = Math.max(2, Math.floor(width / 90));
  const rough = (to - from) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  let unit = [1, 2, 5, 10].map((m) => m * power).find((each) => each >= rough);
  if (!state.seconds) unit = Math.max(1, Math.round(unit));
  const found = [];
  for (let value = Math.ceil(from / unit) * unit; value <= to; value += unit) {
    const text = state.seconds ? `${Number((value / 1000).toPrecision(6))} s` : number(Math.round(value));
    found.push([value, text]);
  }
  return found;
}

// A canvas cleared for drawing at the screen's resolution, with its size in CSS pixels.
function brush(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

const palette = {};
function readPalette() {
  const style = getComputedStyle(document.documentElement);
  for (const colour of ["bg", "fg", "muted", "line", "hover", "select", "critical", "decode", "prefill", "wait",
    "preempted", "private", "shared", "joined", "cached"]) {
    palette[colour] = style.getPropertyValue(`--${colour}`).trim();
  }
}
