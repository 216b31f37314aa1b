"""A trace in the JSON of Chrome's tracing, which ui.perfetto.dev and chrome://tracing open.

Process 0 is the engine: steps, rows, pages. Each request is a process, each of its threads a track. Forks and joins
are flows: from the parent to each child's beginning, from each joined child's end to the parent.

Source: "Trace Event Format", Google, https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

import bisect
from collections.abc import Iterator
from typing import Any

from apr_jax.tracing.trace import Sample, ThreadTrace, Trace

ENGINE = 0  # its process id
MIN_US = 1.0  # of a slice, so that flows can be bound to it

Event = dict[str, Any]


def as_chrome_trace(trace: Trace) -> dict[str, Any]:
    """The object to be written as JSON. Events are in the order of time, enclosing slices first; times are in µs."""
    clock = Clock(trace.samples)
    events = [*_engine_events(trace)]
    for thread in trace.threads:
        events += _thread_events(trace, thread, clock)
    events.sort(key=lambda event: (event["ph"] != "M", event.get("ts", 0.0), -event.get("dur", 0.0)))
    other = {"title": trace.title, "page_size": trace.page_size, "incomplete": trace.incomplete}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": other}


class Clock:
    """When steps were, in µs. Steps of one sample are taken to have been equally long."""

    def __init__(self, samples: list[Sample]):
        self._samples = samples
        self._starts = [sample.start for sample in samples]

    def at(self, step: float) -> float:
        """The beginning of a step; that of one which has not been is the end of the last."""
        if not self._samples or step < self._starts[0]:
            return 0.0
        sample = self._samples[bisect.bisect_right(self._starts, step) - 1]
        part = min(1.0, (step - sample.start) / (sample.end - sample.start))
        return (sample.start_ms + part * (sample.end_ms - sample.start_ms)) * 1e3

    def end_of(self, step: int) -> float:
        """The end of the step before."""
        sample = self._samples[max(0, bisect.bisect_left(self._starts, step) - 1)] if self._samples else None
        return self.at(step) if sample is None or sample.end != step else sample.end_ms * 1e3


def _engine_events(trace: Trace) -> Iterator[Event]:
    yield _metadata("process_name", ENGINE, 0, {"name": "engine"})
    yield _metadata("process_sort_index", ENGINE, 0, {"sort_index": ENGINE})
    yield _metadata("thread_name", ENGINE, 0, {"name": "steps"})
    for sample in trace.samples:
        ts, end = sample.start_ms * 1e3, sample.end_ms * 1e3
        many = sample.end - sample.start > 1
        name = f"steps {sample.start} to {sample.end - 1}" if many else f"step {sample.start}"
        rows = {"running": sample.num_running, "waiting": sample.num_waiting}
        pages = {kind: getattr(sample, kind) for kind in ("private", "shared", "joined", "cached", "free")}
        yield _slice(ENGINE, 0, name, "step", ts, end, rows)
        yield {"ph": "C", "pid": ENGINE, "tid": 0, "name": "rows", "ts": end, "args": rows}
        yield {"ph": "C", "pid": ENGINE, "tid": 0, "name": "pages", "ts": end, "args": pages}


def _thread_events(trace: Trace, thread: ThreadTrace, clock: Clock) -> Iterator[Event]:
    pid, tid = thread.request + 1, thread.id
    if thread.parent is None:
        args = {"name": f"request {thread.request}"}
        yield _metadata("process_name", pid, tid, args)
        yield _metadata("process_sort_index", pid, tid, {"sort_index": pid})
    yield _metadata("thread_name", pid, tid, {"name": f"{'  ' * thread.depth}thread {thread.label}"})
    yield _metadata("thread_sort_index", pid, tid, {"sort_index": tid})
    begin, end = _life(trace, thread)
    facts = {
        "status": thread.status,
        "tokens": thread.num_tokens,
        "sampled": thread.num_sampled,
        "critical_path": thread.critical_path,
        "on_critical_path": thread.on_path,
        "text": "".join(piece[1] for piece in thread.pieces if piece[0] in ("forced", "sampled")),
    }
    yield _slice(pid, tid, f"thread {thread.label} ({thread.status})", "thread", begin, end, facts)
    for run in thread.runs:
        if run.kind != "flush":
            args = {"tokens fed": run.num_fed, "slot": run.slot, "steps": [run.start, run.end]}
            start, stop = max(begin, clock.at(run.start)), min(end, clock.end_of(run.end))
            yield _slice(pid, tid, run.kind, "run", start, max(start, stop), args)
    for number, fork in enumerate(thread.forks):
        for child in fork.children:
            after = trace.threads[child]
            yield from _flow(
                "fork", f"fork {thread.id} {child}", (pid, tid, fork.ms * 1e3), after, after.began_ms * 1e3
            )
        join = thread.joins[number] if number < len(thread.joins) else None
        if join is not None:
            yield _slice(pid, tid, "waits for children", "wait", fork.ms * 1e3, join.ms * 1e3, {})
    for number, join in enumerate(thread.joins):
        for child in join.children:
            before = trace.threads[child]
            ended = max(before.began_ms * 1e3, _life(trace, before)[1] - MIN_US)
            flow = f"join {thread.id} {number} {child}"
            yield from _flow("join", flow, (before.request + 1, before.id, ended), thread, max(ended, join.ms * 1e3))


def _life(trace: Trace, thread: ThreadTrace) -> tuple[float, float]:
    begin = thread.began_ms * 1e3
    end = (trace.duration_ms if thread.ended_ms is None else thread.ended_ms) * 1e3
    return begin, max(end, begin + MIN_US)


def _flow(name: str, flow: str, start: tuple[int, int, float], to: ThreadTrace, end: float) -> Iterator[Event]:
    pid, tid, ts = start
    yield {"ph": "s", "pid": pid, "tid": tid, "ts": ts, "id": flow, "name": name, "cat": "flow"}
    common = {"id": flow, "name": name, "cat": "flow", "bp": "e"}
    yield {"ph": "f", "pid": to.request + 1, "tid": to.id, "ts": max(ts, end), **common}


def _slice(pid: int, tid: int, name: str, cat: str, ts: float, end: float, args: dict[str, Any]) -> Event:
    return {"ph": "X", "pid": pid, "tid": tid, "name": name, "cat": cat, "ts": ts, "dur": end - ts, "args": args}


def _metadata(name: str, pid: int, tid: int, args: dict[str, Any]) -> Event:
    return {"ph": "M", "pid": pid, "tid": tid, "name": name, "args": args}
