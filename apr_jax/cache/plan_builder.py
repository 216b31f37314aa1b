"""Turns the contexts of a step's threads into a plan: which rows read which pages.

Letters: W items, C pages an item, N runs, R rows, S slots, M pages a tail, P partials a row.

Three ways to a plan, each dearer than the one before: where only tails took pages, the last plan's pages are copied
and patched; where a tail needs another item, the runs found before are laid out again; where threads or their segments
changed, all is found anew. The plan is the same whichever way it came.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from apr_kernels.plan import DATA_FIELDS, Plan

from apr_jax.cache.context import Context, Segment
from apr_jax.cache.layout import Layout
from apr_jax.cache.runs import Held, Runs, expand, find_runs
from apr_jax.config import CacheConfig, EngineConfig


@dataclasses.dataclass(slots=True)
class _Row:
    """What a thread's context was when the last plan was made: its segments, and its open tail's pages."""

    segments: list[Segment]
    has_tail: bool
    tail: list[int]
    first_item: int = 0  # of the tail


@dataclasses.dataclass
class _Last:
    """The last plan and what it was made from.

    Attributes:
      shape: the arguments besides the threads.
      rows: by slot, in row order.
      tail_pages: the plan's, as it will be in the next one.
    """

    shape: tuple
    rows: dict[int, _Row]
    runs: Runs
    tail_pages: np.ndarray
    plan: Plan | None = None


class PlanBuilder:
    """Builds plans of fixed shapes, and remembers the last one. A plan's arrays are read-only and never reused:
    a dispatch may still read them when the next plan is made.

    Args:
      cache_config: page size and number of pages.
      engine_config: item_pages (C), max_tail_pages (M), max_partials (P), min_shared_tokens, target_runs.
      max_partials: P, if not engine_config's.
    """

    def __init__(self, cache_config: CacheConfig, engine_config: EngineConfig, max_partials: int | None = None):
        self._page_size = cache_config.page_size
        self._item_pages = engine_config.item_pages
        self._min_shared_tokens = engine_config.min_shared_tokens
        max_partials = engine_config.max_partials if max_partials is None else max_partials
        self._layout = Layout(cache_config, engine_config, max_partials)
        self._last: _Last | None = None

    def item_buckets(self, num_rows: int) -> tuple[int, ...]:
        """The declared numbers of items W for a number of rows, smallest first."""
        return self._layout.item_buckets(num_rows)

    def build(
        self,
        threads: Sequence[tuple[int, Context]],
        num_rows: int,
        num_slots: int,
        num_items: int | None = None,
        num_queries: int = 1,
    ) -> Plan:
        """Builds the plan of a step.

        Args:
          threads: (slot, context) of each; slots are distinct. The row a thread gets is where its slot stands
            in `row_slot`: rows are sorted so that the readers of a segment are an interval.
          num_rows: R, at least the number of threads.
          num_slots: S.
          num_items: W, one of `item_buckets(num_rows)`; None takes the smallest that holds the plan.
          num_queries: the most a row may have; runs are cut up until they, times their queries, fill the chip.

        Returns:
          A plan of numpy arrays, read-only. Tails' items cover their reserved pages; how many of their tokens are
          valid comes from tail_len on the device.

        Raises:
          PlanOverflow: a row needs more than P partials, or all rows more than W items.
          ValueError: more threads than rows, a slot out of range or used twice, a context in host memory.
        """
        shape = (num_rows, num_slots, num_items, num_queries)
        last, self._last = self._last, None  # an error leaves nothing half patched
        if last is None or last.shape != shape or not self._patch(last, threads):
            last = self._start(threads, shape)
        if last.plan is None:
            slots, tails = list(last.rows), [len(row.tail) for row in last.rows.values()]
            last.plan, first_items = self._layout.lay_out(
                last.runs,
                np.array(slots, np.int64),
                np.array(tails, np.int64),
                last.tail_pages,
                num_rows,
                num_items,
                num_queries,
            )
            for row, first_item in zip(last.rows.values(), first_items.tolist()):
                row.first_item = first_item
        for name in DATA_FIELDS:
            getattr(last.plan, name).flags.writeable = False
        self._last = last
        return last.plan

    # From the last plan.

    def _patch(self, last: _Last, threads: Sequence[tuple[int, Context]]) -> bool:
        """Brings `last` up to date: its plan too, or None where a tail needs another item.

        Returns:
          False if more has changed than that tails took pages.
        """
        if len(threads) != len(last.rows) or len(threads) != len({slot for slot, _ in threads}):
            return False
        slots, first, counts, pages = [], [], [], []
        for slot, context in threads:
            row = last.rows.get(slot)
            if row is None or row.segments != context.segments:
                return False
            if not row.has_tail:
                continue
            tail = context.segments[-1]
            if tail.pages == row.tail and not tail.sealed:
                continue
            had = len(row.tail)
            if tail.sealed or len(tail.pages) > self._layout.max_tail_pages or tail.pages[:had] != row.tail:
                return False
            slots.append(slot)
            first.append(had)
            counts.append(len(tail.pages) - had)
            pages += tail.pages[had:]
        if any(segment.page_array() is not array for segment, array in zip(last.runs.segments, last.runs.arrays)):
            return False
        if slots:
            self._add_pages(last, np.array(slots), np.array(first), np.array(counts), np.array(pages, np.int32))
        return True

    def _add_pages(self, last: _Last, slots: np.ndarray, first: np.ndarray, counts: np.ndarray, new: np.ndarray):
        """Writes the pages that tails took, from their `first` on, to copies of the arrays that hold them."""
        plan = last.plan
        assert plan is not None
        which, at = expand(first, first + counts)
        last.tail_pages = last.tail_pages.copy()
        last.tail_pages[slots[which], at] = new
        rows = [last.rows[slot] for slot in slots.tolist()]
        if np.any(self._layout.num_items(first) != self._layout.num_items(first + counts)):
            last.plan = None
        else:
            pages = plan.pages.copy()
            item = np.array([row.first_item for row in rows])
            pages.reshape(-1)[item[which] * self._item_pages + at] = new
            last.plan = dataclasses.replace(plan, pages=pages, tail_pages=last.tail_pages)
        for row in rows:
            row.tail = row.segments[-1].pages[:]

    # From nothing.

    def _start(self, threads: Sequence[tuple[int, Context]], shape: tuple) -> _Last:
        num_rows, num_slots = shape[:2]
        threads = sorted(threads, key=lambda thread: thread[0])
        held = Held.of([context for _, context in threads])
        self._check(threads, held, num_rows, num_slots)
        order = held.row_order()
        threads = [threads[i] for i in order]
        runs = find_runs(held, order, self._page_size, self._min_shared_tokens)
        rows, pages, counts = {}, [], []
        for slot, context in threads:
            tail = context.tail
            rows[slot] = _Row(context.segments[:], tail is not None, [] if tail is None else tail.pages[:])
            pages += rows[slot].tail
            counts.append(len(rows[slot].tail))
        counts = np.array(counts, np.int64)
        which, at = expand(np.zeros_like(counts), counts)
        tail_pages = np.zeros((num_slots, self._layout.max_tail_pages), np.int32)
        tail_pages[np.array(list(rows), np.int64)[which], at] = pages
        return _Last(shape, rows, runs, tail_pages)

    def _check(self, threads: Sequence[tuple[int, Context]], held: Held, num_rows: int, num_slots: int) -> None:
        if len(threads) > num_rows:
            raise ValueError(f"{len(threads)} threads for {num_rows} rows")
        slots = [slot for slot, _ in threads]
        if len(set(slots)) != len(slots) or (slots and not 0 <= min(slots) <= max(slots) < num_slots):
            raise ValueError(f"slots {slots}: must be distinct and in [0, {num_slots})")
        max_tail_pages = self._layout.max_tail_pages
        for segment in held.distinct:
            if segment.swapped:
                slot = next(slot for slot, context in threads if segment in context.segments)
                raise ValueError(f"the context of slot {slot} is in host memory")
            if not segment.sealed and len(segment.pages) > max_tail_pages:
                raise ValueError(f"a tail of {len(segment.pages)} pages, at most {max_tail_pages}")
