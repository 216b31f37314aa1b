"""The page in a real browser: it opens without complaint, shows the tree, obeys keys, and asks nobody for anything."""

import json

import pytest
from traced import HOSTILE, record

from apr_jax.tracing import as_html
from apr_jax.tracing.html import as_json

READY = "return document.documentElement.dataset.ready === 'true'"
ROWS = "return [...document.querySelectorAll('[role=treeitem]')].map((row) => row.querySelector('.number').textContent)"
SELECTED = "return document.querySelector('[aria-selected=true] .number')?.textContent"
DETAILS = "return document.getElementById('details').innerText"
BACKGROUND = "return getComputedStyle(document.body).backgroundColor"
COLOURS = """
const drawn = document.getElementById(arguments[0]);
const copy = new OffscreenCanvas(drawn.width, drawn.height).getContext('2d', { willReadFrequently: true });
copy.drawImage(drawn, 0, 0);
const data = copy.getImageData(0, 0, drawn.width, drawn.height).data;
const found = {};
for (let i = 0; i < data.length; i += 4) {
  const colour = [data[i], data[i + 1], data[i + 2]].join();
  if (data[i + 3] === 255) found[colour] = (found[colour] ?? 0) + 1;
}
return found"""
DRAWN = "return document.getElementById('ticks').toDataURL()"
FRAME = "return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"
RED, GREEN, VIOLET = "217,72,15", "12,166,120", "121,80,242"  # critical path, joined, shared: the light theme's


@pytest.fixture
def page(browser, tmp_path):
    """Opens a trace; at the end nothing may have been complained of or asked for."""
    opened = []

    def show(trace):
        browser.emulate(prefers_color_scheme="light")
        opened.append(tmp_path / "trace.html")
        opened[0].write_text(as_html(trace), encoding="utf-8")
        browser.requests()
        browser.open(opened[0])
        assert browser.run(READY)
        browser.run(FRAME)
        return browser

    yield show
    assert browser.console() == []
    asked = [url for url in browser.requests() if not url.startswith(("data:", "chrome:"))]
    assert asked == [opened[0].as_uri()]


def test_tree_keys_and_colours(page):
    trace, _, _ = record()
    shown = page(trace)
    assert shown.run(ROWS) == ["0", "1", "4", "5", "2", "6", "7", "3", "8", "9"]  # children below their parents
    levels = shown.run("return [...document.querySelectorAll('[role=treeitem]')].map((row) => row.ariaLevel)")
    assert levels == ["1", "2", "3", "3", "2", "3", "3", "2", "3", "3"]
    assert shown.run(SELECTED) == "0"
    walked = []
    for key in ("down", "down", "up", "left", "down", "right", "right", "end", "left", "home"):
        shown.press(key)
        walked.append(shown.run(SELECTED))
    # 1 is collapsed by "left", so that 2 comes after it; the first "right" goes into 2, which has no deeper child
    assert walked == ["1", "4", "1", "1", "2", "6", "6", "9", "3", "0"]
    assert len(shown.run(ROWS)) == 8
    shown.press("x")
    assert len(shown.run(ROWS)) == 10  # all expanded again
    shown.press("2")
    assert shown.run(ROWS) == ["0", "1", "2", "3"]
    shown.press("x")
    on_path = {thread.label for thread in trace.threads if thread.on_path}
    seen = set()
    for _ in on_path:
        shown.press("c")
        seen.add(shown.run(SELECTED))
    assert seen == on_path and len(on_path) == 3
    shown.press("enter")
    assert shown.run("return document.activeElement.id") == "details"
    shown.press("escape")
    assert shown.run("return document.activeElement.id") == "tree"
    shown.press("?")
    assert shown.run("return document.getElementById('help').open")
    shown.press("escape")
    assert not shown.run("return document.getElementById('help').open")


def test_filter(page):
    shown = page(record()[0])
    shown.press("/", *"0.1/0.0")
    assert shown.run(ROWS) == ["0", "2", "6"]  # what matches with all above it
    assert shown.run(SELECTED) == "6" and "0.1/0.0" in shown.run("return document.querySelector('mark').textContent")
    assert "1 match" in shown.run("return document.getElementById('counts').textContent")
    shown.press("escape")
    assert len(shown.run(ROWS)) == 10
    shown.press("/", *"critical")
    assert len(shown.run(ROWS)) == 3


def test_drawings_and_details(page):
    trace, _, (out,) = record()
    shown = page(trace)
    pages, lanes, rows = (shown.run(COLOURS, name) for name in ("pages", "timeline", "rows"))
    assert all(pages.get(colour, 0) > 50 for colour in (GREEN, VIOLET)), "joined and shared pages"
    assert all(lanes.get(colour, 0) > 50 for colour in (RED, GREEN, VIOLET)), "critical path, joins and forks"
    assert rows.get(RED, 0) > 50
    told = shown.run(DETAILS)
    assert "forks into" in told and "joins by stitch" in told and "gathered by a join" in told
    forced = shown.run("return [...document.querySelectorAll('.said .forced')].map((each) => each.textContent)")
    assert forced == ["<Conclusion>"]
    metrics = shown.run("return document.getElementById('metrics').innerText")
    assert f"critical path tokens {out.metrics.critical_path_tokens:,}" in " ".join(metrics.split())
    left, top = shown.run(
        "const b = document.getElementById('timeline').getBoundingClientRect(); return [b.left, b.top]"
    )
    shown.click(int(left) + 200, int(top) + 24 * 4 + 12)  # the fifth lane
    assert shown.run(SELECTED) == "2"
    assert "from before the fork" in shown.run(DETAILS) and "10 at once" in shown.run(DETAILS)


def test_axis_and_zoom(page):
    trace = record()[0]
    shown = page(trace)
    whole = shown.run(DRAWN)
    shown.press("s")
    shown.run(FRAME)
    assert shown.run("return document.getElementById('axis').textContent") == "axis: seconds"
    assert shown.run(DRAWN) != whole
    shown.press("s", "+", "+")
    shown.run(FRAME)
    assert shown.run(DRAWN) != whole
    shown.press("0")
    shown.run(FRAME)
    assert shown.run(DRAWN) == whole


def test_dark_by_preference_and_by_key(page):
    shown = page(record()[0])
    light = shown.run(BACKGROUND)
    lanes = shown.run(COLOURS, "timeline")
    shown.emulate(prefers_color_scheme="dark")
    shown.run(FRAME)
    dark = shown.run(BACKGROUND)
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(20, 23, 27)")
    assert shown.run(COLOURS, "timeline").keys().isdisjoint([RED, GREEN, VIOLET]) and RED in lanes
    shown.press("d")
    assert shown.run(BACKGROUND) == light
    shown.press("d")
    assert shown.run(BACKGROUND) == dark
    contrast = """
const luminance = (colour) => colour.match(/\\d+/g).slice(0, 3)
  .map((c) => c / 255).map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const ratio = (element) => {
  const [a, b] = [getComputedStyle(element).color, getComputedStyle(document.body).backgroundColor].map(luminance);
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
};
return Math.min(...[...document.querySelectorAll('.snippet, .number, .tokens, dt, dd')].map(ratio));"""
    assert shown.run(contrast) >= 4.5
    shown.press("d")
    assert shown.run(contrast) >= 4.5


def test_texts_are_only_text(page):
    trace, _, _ = record((2,), extra=f"{HOSTILE} ", prompts=[HOSTILE])
    trace.title = HOSTILE
    trace.threads[1].notes.append(HOSTILE)
    shown = page(trace)
    assert shown.run("return [typeof window.hacked, document.images.length, document.scripts.length]") == [
        "undefined",
        0,
        2,
    ]
    assert shown.run("return document.querySelector('.said .prompt').textContent") == HOSTILE
    assert shown.run("return document.querySelector('.said .sampled').textContent").startswith(HOSTILE)
    assert shown.run("return document.title").startswith("</script><script>")
    assert len(shown.run(ROWS)) == 3


@pytest.mark.slow
def test_500_threads(page):
    """A tree of 500: every row is there, the last is reached by one key, the filter finds one of them."""
    trace = record((7, 10, 6), num_pages=6_000, max_threads=64, steps_per_dispatch=16)[0]
    assert len(trace.threads) == 498
    shown = page(trace)
    assert len(shown.run(ROWS)) == 498
    shown.press("end")
    shown.run(FRAME)
    last = trace.threads[0]
    while last.forks:
        last = trace.threads[last.forks[-1].children[-1]]
    assert shown.run(SELECTED) == last.label
    visible = """
const row = document.querySelector('[aria-selected=true]').getBoundingClientRect();
const box = document.getElementById('scroll').getBoundingClientRect();
return row.top >= box.top - 1 && row.bottom <= box.bottom + 1"""
    assert shown.run(visible)
    assert sum(shown.run(COLOURS, "timeline").values()) > 1_000
    aligned = """
const [a, b] = ['pages', 'timeline'].map((id) => document.getElementById(id).getBoundingClientRect());
return [a.left - b.left, a.right - b.right]"""
    assert shown.run(aligned) == [0, 0]  # one axis, beside the scroll bar too
    shown.press("/", *"0.6/0.9/0.5.")
    assert len(shown.run(ROWS)) == 4
    shown.press("escape", "2")
    assert len(shown.run(ROWS)) == 8


def test_an_empty_trace_opens(page):
    from traced import TOKENIZER
    from transcripts import Transcripts, scripted_engine

    from apr_jax.tracing import Recorder

    with Recorder(scripted_engine(Transcripts(TOKENIZER, {}), TOKENIZER)) as recorder:
        shown = page(recorder.trace("nothing"))
    assert shown.run(DETAILS) == "No thread."


def test_json_in_a_page_stays_json():
    content = {"text": HOSTILE, "lone": "\ud800 surrogate"}
    text = as_json(content)
    assert not set("<>&") & set(text)
    assert json.loads(text) == content | {"lone": "? surrogate"}
