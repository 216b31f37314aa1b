"""What happens in the engine, for whoever listens: live views, traces, metrics. A leaf: imports nothing of ours.

Events name threads and families by id. `step` counts engine steps, `time_s` is time.perf_counter().
"""

import dataclasses
from collections.abc import Callable
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    step: int
    time_s: float
    family_id: int
    thread_id: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubmitEvent(Event):
    prompt_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenEvent(Event):
    """Tokens a thread gained in one dispatch, in order; sampled[i] says whether token_ids[i] was sampled.

    Attributes:
      num_dropped: what the same dispatch sampled beyond a stop; these are no tokens of the thread.
    """

    token_ids: tuple[int, ...]
    sampled: tuple[bool, ...]
    num_dropped: int = 0


KeysReason = Literal["cached", "prefill", "decode", "flush", "unfed", "dropped"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeysEvent(Event):
    """A thread's next tokens got keys, or its last ones lost them again.

    Attributes:
      num_tokens: negative where keys were lost.
      reason: `cached`: found in the prefix cache; `prefill`, `decode`: fed in such a dispatch; `flush`: fed between
        steps, so that a segment could be sealed; `unfed`: taken back because something is to be sampled from the
        last token (with all of the sealed segment that it ends, if it ends one); `dropped`: taken back with tokens
        that the thread lost (what lay before these in a sealed segment is computed again).
      slot: of a thread that ran.
    """

    num_tokens: int
    reason: KeysReason
    slot: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MarkEvent(Event):
    """What the thread's context gains from here on is its conclusion."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewindEvent(Event):
    """A thread lost its last tokens again: what comes next took them back, or a decision before them cancelled it."""

    num_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForkEvent(Event):
    """A thread was suspended; the forced tokens of its children follow as events of theirs.

    Attributes:
      max_width: how many children run side by side; those that are held (a StopEvent says so) begin later.
      prompts: of spawned children, which start from a context of their own; none if the children were forked.
    """

    child_ids: tuple[int, ...]
    prompts: tuple[tuple[int, ...], ...] = ()
    max_width: int | None = None


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
class SegmentState:
    """A segment of a context.

    Attributes:
      id: the same in all contexts that share it. Where the prefix cache splits a segment, a new one appears before it.
      num_tokens: that have keys; start_position: of the first.
      page_ids: reserved ones too; empty while the segment is in host memory.
      num_pages: that its tokens fill, or that it has reserved.
    """

    id: int
    start_position: int
    num_tokens: int
    page_ids: tuple[int, ...]
    num_pages: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextEvent(Event):
    """What a thread attends to is another list of segments, or its tail has other pages, than last told.

    Told at the end of a step and when a thread ends, and only where an engine `tells_contexts`.
    """

    segments: tuple[SegmentState, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DegradeEvent(Event):
    """Structure that could not be followed ended in plain text; the reason is for people."""

    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepEvent(Event):
    """End of an engine step; family_id and thread_id are -1. Page counts are after the step.

    Attributes:
      started_s: when it began, as `time_s`.
      used_pages: not free; cached_pages: of these, what only the prefix cache holds.
    """

    started_s: float
    num_running: int
    num_waiting: int
    free_pages: int
    used_pages: int
    cached_pages: int


Listener = Callable[[Event], None]
