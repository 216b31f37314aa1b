// Controls, keys, the pointer; and the first drawing.

let scheduled = false;
function draw() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    drawPages();
    drawRows();
    drawTicks();
    drawTimeline();
  });
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function recolour() {
  element("theme").textContent = isDark() ? "light" : "dark";
  readPalette();
  draw();
}

function toggleTheme() {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  recolour();
}

function toggleAxis() {
  const steps = shown().map(stepOf);
  state.seconds = !state.seconds;
  if (state.view) state.view = steps.map(axisOf);
  element("axis").textContent = state.seconds ? "axis: seconds" : "axis: steps";
  element("axis").setAttribute("aria-pressed", state.seconds);
  draw();
}

function filter(query) {
  state.query = query;
  rearrange();
  const first = state.visible.find((id) => threads[id].matched);
  if (!threads[state.selected]?.matched && first !== undefined) select(first, { reveal: false });
  else drawDetails();
}

function showMetrics() {
  const several = trace.requests.length > 1;
  const lines = trace.requests.flatMap((request, place) => Object.entries(request.metrics).map(([key, value]) =>
    [several ? `${key} (${place})` : key, value]));
  const known = ["total_tokens", "critical_path_tokens", "acceleration_ratio", "parallel_ratio", "num_threads", "peak_pages",
    "reprefill_tokens", "overshoot_tokens", "max_context_tokens", "wall_s"];
  for (const [key, value] of lines) {
    if (!known.includes(key.replace(/ \(\d+\)$/, "")) || (several && trace.requests.length > 3)) continue;
    const text = Number.isInteger(value) ? number(value) : value.toFixed(3);
    element("metrics").append(create("span", {}, `${key.replaceAll("_", " ")} `, create("b", { textContent: text })));
  }
  if (several) element("metrics").append(create("span", {}, "requests ", create("b", { textContent: number(trace.requests.length) })));
  element("incomplete").textContent = trace.incomplete.join("; ");
  element("incomplete").hidden = trace.incomplete.length === 0;
}

function showLegends() {
  const entry = (colour, text) => {
    const box = create("i");
    box.style.background = `var(--${colour})`;
    return create("li", {}, box, text);
  };
  const most = Math.max(0, ...trace.samples.map((sample) => sample.num_running));
  element("pages-most").textContent = `at most ${number(mostPages)} of ${number(trace.num_pages)}`;
  element("rows-most").textContent = `at most ${number(most)} of ${number(trace.num_slots)}`;
  element("pages-legend").append(...KINDS.map(([kind, text]) => entry(kind, text)));
  const colours = [["critical", "on the critical path"], ["decode", "decode"], ["prefill", "prefill"], ["wait", "waits; dashed: for children"],
    ["preempted", "hatched: pages in host memory; ✕ dropped or cancelled"], ["shared", "fork; pages that several threads read"],
    ["joined", "join; pages it gathered; ◆ a conclusion begins"], ["forced", "forced text"]];
  element("legend").append(...colours.map(([colour, text]) => entry(colour, text)));
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || element("help").open) return;
  const typing = event.target === element("search");
  if (event.key === "Escape") {
    if (typing || state.query) { element("search").value = ""; filter(""); }
    element("tree").focus();
  } else if (typing) {
    if (event.key !== "Enter" && event.key !== "ArrowDown") return;
    element("tree").focus();
  } else if (event.target.tagName === "BUTTON" && (event.key === "Enter" || event.key === " ")) {
    return;
  } else if (event.target === element("details") && /^(Arrow|Page|Home|End)/.test(event.key)) {
    return; // scrolls
  } else if (event.target === element("split") && /^Arrow(Left|Right)$/.test(event.key)) {
    resize(element("details").clientWidth + (event.key === "ArrowLeft" ? 24 : -24));
  } else {
    const [low, high] = shown();
    const actions = {
      "/": () => element("search").select(), "?": () => element("help").showModal(), d: toggleTheme, s: toggleAxis, x: foldAll,
      c: nextOnPath, "+": () => zoom(0.5), "=": () => zoom(0.5), "-": () => zoom(2), 0: () => { state.view = null; draw(); },
      ",": () => moveTo(low - (high - low) / 4, high - low), ".": () => moveTo(low + (high - low) / 4, high - low),
    };
    if (/^[1-9]$/.test(event.key)) showLevels(Number(event.key));
    else if (actions[event.key]) actions[event.key]();
    else if (!treeKey(event.key)) return;
  }
  event.preventDefault();
}

function resize(width) {
  const most = document.body.clientWidth - 500;
  document.documentElement.style.setProperty("--details", `${Math.max(220, Math.min(most, width))}px`);
  draw();
}

function laneAt(event) {
  const row = Math.floor((event.clientY - element("tree").getBoundingClientRect().top) / ROW);
  return state.visible[row];
}

function slotAt(event, step) {
  const box = element("rows").getBoundingClientRect();
  const slot = slots[Math.floor(((event.clientY - box.top - 4) / (box.height - 8)) * slots.length)];
  return threads.find((t) => t.runs.some((run) => run.slot === slot && run.start <= step && step < run.end))?.id;
}

function tip(event, text) {
  const box = element("tip");
  box.hidden = !text;
  if (!text) return;
  box.textContent = text;
  const left = Math.min(event.clientX + 14, window.innerWidth - box.offsetWidth - 6);
  box.style.left = `${left}px`;
  box.style.top = `${event.clientY + 18 + box.offsetHeight > window.innerHeight ? event.clientY - box.offsetHeight - 10 : event.clientY + 18}px`;
}

function hover(id) {
  if (state.hovered === id) return;
  element(`t${state.hovered}`)?.classList.remove("hovered");
  state.hovered = id ?? null;
  element(`t${state.hovered}`)?.classList.add("hovered");
  draw();
}

// What a canvas shows under the pointer; a click selects it, a drag across zooms there.
function watch(canvas, threadAt) {
  let pressed = null;
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    const to = scale(box.width);
    return { step: to.step(event.clientX - box.left), value: to.value(event.clientX - box.left) };
  };
  canvas.addEventListener("pointermove", (event) => {
    const { step } = place(event);
    const id = threadAt(event, step);
    hover(id);
    tip(event, `${id === undefined ? "" : `${describeLane(id, step)}\n`}${describeStep(Math.floor(step))}`);
  });
  canvas.addEventListener("pointerleave", () => { hover(null); tip(null, ""); });
  canvas.addEventListener("pointerdown", (event) => { pressed = { x: event.clientX, ...place(event) }; });
  canvas.addEventListener("pointerup", (event) => {
    const now = place(event);
    if (pressed && Math.abs(event.clientX - pressed.x) > 6) {
      const [from, to] = [pressed.value, now.value].sort((a, b) => a - b);
      moveTo(from, to - from);
    } else {
      select(threadAt(event, now.step));
      element("tree").focus({ preventScroll: true });
    }
    pressed = null;
  });
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.shiftKey) return;
    event.preventDefault();
    const [from, to] = shown();
    if (event.ctrlKey) zoom(event.deltaY > 0 ? 1.25 : 0.8, place(event).value);
    else moveTo(from + ((to - from) * Math.sign(event.deltaY + event.deltaX)) / 8, to - from);
  }, { passive: false });
}

function listen() {
  document.addEventListener("keydown", onKey);
  element("search").addEventListener("input", (event) => filter(event.target.value));
  element("axis").addEventListener("click", toggleAxis);
  element("fold").addEventListener("click", foldAll);
  element("theme").addEventListener("click", toggleTheme);
  element("help-button").addEventListener("click", () => element("help").showModal());
  element("tree").addEventListener("click", (event) => {
    const row = event.target.closest(".thread");
    if (!row) return;
    const id = Number(row.id.slice(1));
    if (event.target.classList.contains("twist")) toggle(id);
    select(id);
  });
  element("tree").addEventListener("pointermove", (event) => hover(laneAt(event)));
  element("tree").addEventListener("pointerleave", () => hover(null));
  element("scroll").addEventListener("scroll", draw, { passive: true });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
  new ResizeObserver(fit).observe(element("scroll"));
  for (const id of ["pages", "ticks"]) watch(element(id), () => undefined);
  watch(element("rows"), slotAt);
  watch(element("timeline"), laneAt);
  const split = element("split");
  split.addEventListener("pointerdown", (event) => split.setPointerCapture(event.pointerId));
  split.addEventListener("pointermove", (event) => { if (event.buttons) resize(document.body.clientWidth - event.clientX - 4); });
}

showMetrics();
showLegends();
readPalette();
rearrange();
listen();
recolour();
if (depthFirst.length) select(depthFirst[0]);
else drawDetails();
element("tree").focus({ preventScroll: true });
document.documentElement.dataset.ready = "true";
