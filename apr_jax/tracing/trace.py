"""What a trace holds. Plain values: `dataclasses.asdict` of a `Trace` is what the page reads.

Steps count engine steps from 0 over the whole trace. What happens in step k lies between k and k + 1; forks and joins
happen between steps and have the number of the next one. Times are milliseconds since the trace's first event.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass
class Run:
    """Steps in a row in which a thread held the same slot and did the same.

    Attributes:
      start, end: steps, half-open; equal for a flush, which happens between steps.
      slot: None for a flush.
      kind: `prefill`, `decode` or `flush`.
      num_fed: tokens that got keys.
    """

    start: int
    end: int
    slot: int | None
    kind: str
    num_fed: int


@dataclasses.dataclass
class Fork:
    step: int
    ms: float
    children: list[int]
    spawned: bool
    max_width: int | None = None  # children that run side by side


@dataclasses.dataclass
class Join:
    """Children that the join did not take were dropped with it."""

    step: int
    ms: float
    children: list[int]
    mode: str
    num_segments: int
    host_ms: float


@dataclasses.dataclass
class SegmentUse:
    """A segment of a thread's context, as it was last.

    Attributes:
      id: the same wherever it is shared.
      writer: the thread that computed it; None where that is not in the trace.
      origin: how the thread came by it: `own`, `forked` (an ancestor's), `joined` (a descendant's), `cached` (found
        in the prefix cache, or written alike by a sibling).
      max_readers: threads that held it at the same time, at most.
    """

    id: int
    num_tokens: int
    num_pages: int
    start_position: int
    writer: int | None
    origin: str
    max_readers: int


@dataclasses.dataclass
class ThreadTrace:
    """One thread.

    Attributes:
      id: its place in `Trace.threads`; parents come before their children.
      label: "0" for a request's root, then its number in the request, in the order of forks.
      pieces: what it said, in order: ["forced" | "sampled", text], and between them ["fork", number of the fork],
        ["join", number of the join].
      num_dropped: tokens that it lost again; these are not in its text.
      critical_path: tokens on the longest chain through it; on_path: whether the request's own leads through it.
      status: `running`, `waiting`, `forked`, `stopped` while it lived, then `finished`, `joined`, `dropped` (a join
        or a decision went without it) or `cancelled`.
      stops: [step, reason].
      preempted: [from, to] in steps, when it waited for its pages to come back from host memory.
      ended: step, or None.
    """

    id: int
    request: int
    parent: int | None
    label: str
    depth: int
    prompt: str
    began: int
    began_ms: float
    status: str = "waiting"
    pieces: list[list[Any]] = dataclasses.field(default_factory=list)
    num_tokens: int = 0
    num_sampled: int = 0
    num_dropped: int = 0
    critical_path: int = 0
    on_path: bool = False
    runs: list[Run] = dataclasses.field(default_factory=list)
    forks: list[Fork] = dataclasses.field(default_factory=list)
    joins: list[Join] = dataclasses.field(default_factory=list)
    stops: list[list[Any]] = dataclasses.field(default_factory=list)
    marks: list[int] = dataclasses.field(default_factory=list)
    preempted: list[list[int | None]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    segments: list[SegmentUse] = dataclasses.field(default_factory=list)
    ended: int | None = None
    ended_ms: float | None = None


@dataclasses.dataclass
class Request:
    """One request: its root thread, and its metrics where they are known."""

    root: int
    prompt: str
    metrics: dict[str, float]


@dataclasses.dataclass
class Sample:
    """One step, or several in a row that were merged to save memory: then the one with the fewest free pages.

    Attributes:
      start, end: steps, half-open; start_ms, end_ms: of the first one's beginning, and of the last one's end.
      private, shared, joined: pages that one thread reads; several; one, which got them by a join.
      cached: that the prefix cache alone holds.
    """

    start: int
    end: int
    start_ms: float
    end_ms: float
    num_running: int
    num_waiting: int
    private: int
    shared: int
    joined: int
    cached: int
    free: int


@dataclasses.dataclass
class Trace:
    """Everything, in the order of time.

    Attributes:
      incomplete: what was left out to save memory, for people.
    """

    title: str
    page_size: int
    num_pages: int
    num_slots: int
    requests: list[Request]
    threads: list[ThreadTrace]
    samples: list[Sample]
    num_steps: int
    duration_ms: float
    incomplete: list[str]
