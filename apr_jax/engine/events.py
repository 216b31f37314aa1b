"""What happens in the engine, for whoever listens: live views, traces, metrics. A leaf: imports nothing of ours.

Events name threads and families by id. `step` counts engine steps, `time_s` is time.perf_counter().
"""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    step: int
    time_s: float
    family_id: int
    thread_id: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubmitEvent(Event):
    prompt_len: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenEvent(Event):
    """Tokens a thread gained in one dispatch, in order; sampled[i] says whether token_ids[i] was sampled."""

    token_ids: tuple[int, ...]
    sampled: tuple[bool, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewindEvent(Event):
    """A thread lost its last tokens again: what comes next took them back, or a decision before them cancelled it."""

    num_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForkEvent(Event):
    child_ids: tuple[int, ...]
    spawned: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class JoinEvent(Event):
    child_ids: tuple[int, ...]
    mode: str
    num_segments: int  # of the parent's context after the join
    seconds: float  # host time


@dataclasses.dataclass(frozen=True, kw_only=True)
class StopEvent(Event):
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinishEvent(Event):
    """A thread was released; cancelled says whether before its end."""

    cancelled: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreemptEvent(Event):
    """A family (or, with whole_family false, one thread) gave up its pages to host memory, or came back."""

    num_pages: int
    resumed: bool
    whole_family: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class DegradeEvent(Event):
    """Structure that could not be followed ended in plain text; the reason is for people."""

    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepEvent(Event):
    """End of an engine step; family_id and thread_id are -1. Page counts are after the step."""

    num_running: int
    num_waiting: int
    free_pages: int
    used_pages: int
    cached_pages: int


Listener = Callable[[Event], None]
