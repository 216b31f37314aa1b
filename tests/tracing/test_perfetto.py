"""The Chrome trace: fields by phase, times in order, slices nested, flows whole. Checked in Python and in a browser."""

import json

import pytest
from traced import record

from apr_jax.tracing import as_chrome_trace

FIELDS = {  # of each phase: which must be there, and their types
    "M": {"name": str, "pid": int, "tid": int, "args": dict},
    "X": {"name": str, "cat": str, "pid": int, "tid": int, "ts": float, "dur": float, "args": dict},
    "C": {"name": str, "pid": int, "tid": int, "ts": float, "args": dict},
    "s": {"name": str, "cat": str, "pid": int, "tid": int, "ts": float, "id": str},
    "f": {"name": str, "cat": str, "pid": int, "tid": int, "ts": float, "id": str, "bp": str},
}


@pytest.fixture(scope="module")
def told():
    trace, _, _ = record(prompts=["Why?", "How?"])
    return trace, json.loads(json.dumps(as_chrome_trace(trace), allow_nan=False))


def test_events_are_sound(told):
    trace, content = told
    events = content["traceEvents"]
    for event in events:
        fields = FIELDS[event["ph"]]
        assert event.keys() == fields.keys() | {"ph"}
        assert all(isinstance(event[name], kind) for name, kind in fields.items()), event
    times = [event["ts"] for event in events if event["ph"] != "M"]
    assert times == sorted(times) and times[0] >= 0
    assert all(event["dur"] > 0 for event in events if event["ph"] == "X" and event["cat"] == "thread")
    tracks = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    assert len(tracks) == 1 + len(trace.threads)
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {"engine", "request 0", "request 1"}


def test_slices_nest(told):
    open_slices: dict[tuple[int, int], list[float]] = {}
    for event in told[1]["traceEvents"]:
        if event["ph"] == "X":
            ends = open_slices.setdefault((event["pid"], event["tid"]), [])
            while ends and ends[-1] <= event["ts"] + 1e-6:
                ends.pop()
            assert not ends or event["ts"] + event["dur"] <= ends[-1] + 1e-6, event
            ends.append(event["ts"] + event["dur"])


def test_flows_lead_from_slice_to_slice(told):
    trace, content = told
    events = content["traceEvents"]
    lives = {(e["pid"], e["tid"]): (e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "thread"}
    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    assert starts.keys() == ends.keys()
    assert len(starts) == sum(len(t.forks[0].children) + len(t.joins[0].children) for t in trace.threads if t.forks)
    for flow, start in starts.items():
        assert start["ts"] <= ends[flow]["ts"]
        for event in (start, ends[flow]):
            begin, end = lives[event["pid"], event["tid"]]
            assert begin <= event["ts"] <= end


def test_counters_add_up(told):
    trace, content = told
    pages = [e["args"] for e in content["traceEvents"] if e["ph"] == "C" and e["name"] == "pages"]
    assert len(pages) == trace.num_steps and {sum(each.values()) for each in pages} == {trace.num_pages}


def test_a_browser_reads_it(told, browser, tmp_path):
    """From a file, as a viewer in a browser does."""
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(told[1]))
    browser.open(path)
    found = browser.run("""
const { traceEvents, displayTimeUnit } = JSON.parse(document.body.innerText);
const timed = traceEvents.filter((event) => event.ph !== 'M');
const flows = (phase) => traceEvents.filter((event) => event.ph === phase).map((event) => event.id).sort().join();
return {
  unit: displayTimeUnit,
  count: traceEvents.length,
  known: traceEvents.every((event) => 'MXCsf'.includes(event.ph) && [event.pid, event.tid].every(Number.isInteger)),
  monotone: timed.every((event, i) => Number.isFinite(event.ts) && (i === 0 || timed[i - 1].ts <= event.ts)),
  flows: flows('s') === flows('f') && flows('s').length > 0,
};""")
    assert found == {"unit": "ms", "count": len(told[1]["traceEvents"]), "known": True, "monotone": True, "flows": True}
