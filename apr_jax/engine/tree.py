"""Threads come and go, and whoever listens is told: what the loop and the primitives stand on."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

from apr_jax.cache.cache import KVCache
from apr_jax.cache.context import Context
from apr_jax.config import CacheConfig, EngineConfig, ModelConfig, check
from apr_jax.engine import events
from apr_jax.engine.scheduler import Scheduler
from apr_jax.engine.thread import WANTS_TO_RUN, Family, Status, Thread
from apr_jax.types import SamplingParams


@dataclasses.dataclass
class EngineStats:
    """Counts since the engine was made.

    Attributes:
      num_round_trips: fetches from the device that the host waits for.
      max_unused_slots: slots of pages in use that hold no token, as a segment ends within a page; the most after
        any step.
    """

    num_steps: int = 0
    num_prefill_dispatches: int = 0
    num_decode_dispatches: int = 0
    num_round_trips: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    max_unused_slots: int = 0


P = ParamSpec("P")
R = TypeVar("R")


def changes_threads(method: Callable[P, R]) -> Callable[P, R]:
    """A method of `ThreadTree` during which cancellations that listeners ask for wait."""

    @functools.wraps(method)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        tree: Any = args[0]
        with tree._changing():
            return method(*args, **kwargs)

    return wrapped


class ThreadTree:
    """All families and their threads, with the cache that holds their contexts.

    Args:
      runner: what copies pages to and from host memory (and runs batches, for the loop).

    Attributes:
      listeners: called with every event, in order; of what changes threads they may call `cancel` only.
      tells_contexts: whether listeners are told of contexts too, which costs host time for every thread and step.
    """

    def __init__(self, model_config: ModelConfig, cache_config: CacheConfig, engine_config: EngineConfig, runner: Any):
        self.model_config = model_config
        self.config = engine_config
        self.cache = KVCache(cache_config, engine_config.max_tail_pages)
        self.runner = runner
        self.scheduler = Scheduler(
            engine_config,
            self.cache,
            model_config.max_position,
            lambda page_ids: self.runner.read_pages(page_ids),
            lambda page_ids, data: self.runner.write_pages(page_ids, data),
            self._note_preemption,
        )
        self.listeners: list[events.Listener] = []
        self.tells_contexts = False
        self.stats = EngineStats()
        self._told_contexts: dict[int, tuple[events.SegmentState, ...]] = {}
        self._next_family_id = 0
        self._next_thread_id = 0
        self._stopped: list[Thread] = []  # since the last step's end
        self._depth = 0  # of calls that change threads; their cancellations wait until the outermost ends
        self._to_cancel: list[Thread] = []

    def cancel(self, thread: Thread) -> None:
        """Ends the thread and all its descendants, whatever they are doing; their pages come free at once.

        Called from a listener, that is within a step or a primitive, it takes effect at the end of that. A thread
        that has ended already stays as it is.
        """
        if self._depth:
            self._to_cancel.append(thread)
            return
        self._end(thread, Status.CANCELLED)

    def release(self, thread: Thread) -> None:
        """Gives up the pages of a thread that has stopped, and of its descendants; its tokens stay readable.

        Raises:
          ValueError: the thread still runs (cancel it instead).
        """
        if thread.is_done:
            return
        check(
            thread.status in (Status.STOPPED, Status.FORKED),
            f"thread {thread.id} is {thread.status.value}: cancel it, or let it stop before it is released",
        )
        self._end(thread, Status.FINISHED)

    def check_sampling(self, sampling: SamplingParams) -> None:
        """Raises ValueError for more stop or banned ids than the engine takes, or ids outside the vocabulary."""
        self._checked_ids((*sampling.stop_ids, *sampling.banned_ids))
        bound = self.config.max_stop_ids
        num_stops = len({*sampling.stop_ids, *(() if sampling.ignore_eos else self.model_config.eos_ids)})
        included = "those of the program's tags and of the end of a sequence included"
        check(num_stops <= bound, f"{num_stops} stop ids, {included}; max_stop_ids is {bound}")
        num_banned = len(sampling.banned_ids)
        check(num_banned <= bound, f"{num_banned} banned ids, max_stop_ids (which bounds them too) is {bound}")

    def emit(self, kind: type[events.Event], thread: Thread, **fields) -> None:
        """Tells the listeners; `fields` are what the event holds beside step, time, family and thread."""
        if self.listeners:
            event = kind(
                step=self.stats.num_steps,
                time_s=time.perf_counter(),
                family_id=thread.family.id,
                thread_id=thread.id,
                **fields,
            )
            for listener in self.listeners:
                listener(event)

    # For the loop and the primitives.

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Threads are being changed: cancellations that listeners ask for wait until the outermost of these ends."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        while self._to_cancel and not self._depth:
            self._end(self._to_cancel.pop(0), Status.CANCELLED)

    def _new_thread(
        self,
        family: Family,
        parent: Thread | None,
        path: tuple[tuple[int, int], ...],
        sampling: SamplingParams,
        context: Context,
    ) -> Thread:
        thread = Thread(
            id=self._next_thread_id,
            family=family,
            parent=parent,
            path=path,
            sampling=sampling,
            context=context,
            start_position=context.next_position,
            budget=sampling.max_new_tokens,
        )
        self._next_thread_id += 1
        family.threads.append(thread)
        return thread

    def _end(self, thread: Thread, status: Status) -> None:
        for child in thread.children:
            if not child.is_done:
                self._end(child, Status.CANCELLED if child.status in WANTS_TO_RUN or child.is_held else status)
        if not thread.is_done:
            assert thread.context is not None
            self._emit_context(thread)
            self._told_contexts.pop(thread.id, None)
            self.cache.release(thread.context)
            thread.context = None
            thread.slot = None
            thread.status = status
            self.emit(events.FinishEvent, thread, cancelled=status is Status.CANCELLED)
        if not thread.family.live:
            self.scheduler.families.pop(thread.family.id, None)

    def _checked_ids(self, token_ids: Sequence[int]) -> list[int]:
        ids = [int(token) for token in token_ids]
        vocab_size = self.model_config.vocab_size
        for token in ids:
            check(0 <= token < vocab_size, f"token id {token} is outside the vocabulary of {vocab_size}")
        return ids

    def _note_stop(self, thread: Thread) -> None:
        assert thread.stop is not None
        self._stopped.append(thread)
        self.emit(events.StopEvent, thread, reason=thread.stop.reason)

    def _note_preemption(self, family: Family, thread: Thread | None, num_pages: int, resumed: bool) -> None:
        whole = thread is None
        self.emit(
            events.PreemptEvent,
            thread or family.root,
            num_pages=num_pages,
            resumed=resumed,
            whole_family=whole,
        )

    def _emit_keys(self, thread: Thread, num_tokens: int, reason: events.KeysReason) -> None:
        if num_tokens:
            self.emit(events.KeysEvent, thread, num_tokens=num_tokens, reason=reason, slot=thread.slot)

    def _mark_context(self, thread: Thread, context: Context) -> None:
        """What follows in the thread's context is its conclusion."""
        self.cache.mark(context)
        thread.marks = False
        self.emit(events.MarkEvent, thread)

    def _emit_context(self, thread: Thread) -> None:
        """Tells of a live thread's segments if they are not as last told."""
        if not (self.listeners and self.tells_contexts):
            return
        assert thread.context is not None
        segments = tuple(
            events.SegmentState(
                id=s.id,
                start_position=s.start_position,
                num_tokens=s.num_tokens,
                page_ids=tuple(s.pages),
                num_pages=len(s.pages) or self.cache.num_pages_of([s]),
            )
            for s in thread.context.segments
        )
        if self._told_contexts.get(thread.id) != segments:
            self._told_contexts[thread.id] = segments
            self.emit(events.ContextEvent, thread, segments=segments)

    def _emit_step(self, started_s: float) -> None:
        self.stats.max_unused_slots = max(self.stats.max_unused_slots, self.cache.num_unused_slots)
        for family in self.scheduler.families.values():
            pages = self.scheduler.family_pages(family)
            family.counters.peak_pages = max(family.counters.peak_pages, pages)
            for thread in family.live if self.tells_contexts else ():
                self._emit_context(thread)
        if not self.listeners:
            return
        event = events.StepEvent(
            step=self.stats.num_steps,
            time_s=time.perf_counter(),
            family_id=-1,
            thread_id=-1,
            started_s=started_s,
            num_running=len(self.scheduler.threads(Status.RUNNING)),
            num_waiting=len(self.scheduler.threads(Status.WAITING)),
            free_pages=self.cache.pool.num_free,
            used_pages=self.cache.pool.num_used,
            cached_pages=self.cache.num_cached_pages,
        )
        for listener in self.listeners:
            listener(event)
