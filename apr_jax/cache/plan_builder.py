"""Turns the contexts of a step's threads into a plan: which rows read which pages.

Letters: W items, C pages an item, R rows, S slots, M pages a tail, P partials a row.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from apr_kernels.plan import Plan

from apr_jax.cache.context import Context, Segment
from apr_jax.config import CacheConfig, EngineConfig

Interval = tuple[int, int]


class PlanOverflow(ValueError):
    """A thread, or a batch of threads, needs more items or partials than are declared.

    Attributes:
      what: "items" or "partials".
      needed: how many the threads need.
      bound: how many there are.
    """

    def __init__(self, what: str, needed: int, bound: int):
        super().__init__(f"the plan needs {needed} {what}, at most {bound} are declared")
        self.what = what
        self.needed = needed
        self.bound = bound


@dataclasses.dataclass
class _Run:
    """Pages that the same rows read: the unit that becomes adjacent items with one partial a reader."""

    rows: Interval
    pages: list[int] = dataclasses.field(default_factory=list)
    fills: list[int] = dataclasses.field(default_factory=list)
    tail_pages: list[int] = dataclasses.field(default_factory=list)
    tail_slot: int = -1

    def num_items(self, item_pages: int) -> int:
        return -(-len(self.pages) // item_pages) + -(-len(self.tail_pages) // item_pages)


class PlanBuilder:
    """Builds plans of fixed shapes.

    Args:
      cache_config: page size and number of pages.
      engine_config: item_pages (C), max_tail_pages (M), max_partials (P), min_shared_tokens.
    """

    def __init__(self, cache_config: CacheConfig, engine_config: EngineConfig):
        self._page_size = cache_config.page_size
        self._num_pages = cache_config.num_pages
        self._item_pages = engine_config.item_pages
        self._max_tail_pages = engine_config.max_tail_pages
        self._max_partials = engine_config.max_partials
        self._min_shared_tokens = engine_config.min_shared_tokens

    def item_buckets(self, num_rows: int) -> tuple[int, ...]:
        """The declared numbers of items W for a number of rows, smallest first: two.

        The smaller holds, besides full tails, 8 items of other pages a row, and shared runs of as many; the
        larger what the whole pool can need: each page once, in runs that may end in an item partly filled.
        Padding items cost their metadata only, as the kernels loop over used items.
        """
        tail = -(-self._max_tail_pages // self._item_pages)
        pool = -(-self._num_pages // self._item_pages)
        small = self._num_shared_for(num_rows, 8 * num_rows) + num_rows * (tail + 8)
        large = self._num_shared_for(num_rows, pool) + num_rows * (tail + 8) + pool
        return tuple(sorted({small, large}))

    def num_shared(self, num_rows: int, num_items: int) -> int:
        """How many of a bucket's items may have several readers."""
        tail = -(-self._max_tail_pages // self._item_pages)
        pool = -(-self._num_pages // self._item_pages)
        if num_items == self.item_buckets(num_rows)[0]:
            return self._num_shared_for(num_rows, 8 * num_rows)
        return max(0, min(num_items - num_rows * (tail + 8) - pool, num_items))

    def build(
        self,
        threads: Sequence[tuple[int, Context]],
        num_rows: int,
        num_slots: int,
        num_items: int | None = None,
    ) -> Plan:
        """Builds the plan of a step.

        Args:
          threads: (slot, context) of each; slots are distinct. The row a thread gets is where its slot stands
            in `row_slot`: rows are sorted so that the readers of a segment are an interval.
          num_rows: R, at least the number of threads.
          num_slots: S.
          num_items: W, one of `item_buckets(num_rows)`; None takes the smallest that holds the plan.

        Returns:
          A plan of numpy arrays. Tails' items cover their reserved pages; how many of their tokens are valid
          comes from tail_len on the device.

        Raises:
          PlanOverflow: a row needs more than P partials, or all rows more than W items.
          ValueError: more threads than rows, a slot out of range or used twice, a context in host memory.
        """
        self._check(threads, num_rows, num_slots)
        threads = sorted(threads, key=lambda thread: [segment.id for segment in thread[1].segments])
        shared, private = self._runs(threads)
        plan = self._place(shared, private, num_rows, num_items)
        plan.row_slot[:] = num_slots
        tail_pages = np.zeros((num_slots, self._max_tail_pages), np.int32)
        for row, (slot, context) in enumerate(threads):
            plan.row_slot[row] = slot
            if context.tail is not None:
                pages = context.tail.pages
                tail_pages[slot, : len(pages)] = pages
        return dataclasses.replace(plan, tail_pages=tail_pages)

    def num_partials(self, threads: Sequence[tuple[int, Context]]) -> int:
        """The most partials a row of these threads needs."""
        threads = sorted(threads, key=lambda thread: [segment.id for segment in thread[1].segments])
        shared, private = self._runs(threads)
        counts = np.zeros(len(threads) + 1, np.int64)
        for run in (*shared, *private):
            counts[run.rows[0] : run.rows[1]] += 1
        return int(counts.max())

    def _check(self, threads: Sequence[tuple[int, Context]], num_rows: int, num_slots: int) -> None:
        if len(threads) > num_rows:
            raise ValueError(f"{len(threads)} threads for {num_rows} rows")
        slots = [slot for slot, _ in threads]
        if len(set(slots)) != len(slots) or not all(0 <= slot < num_slots for slot in slots):
            raise ValueError(f"slots {slots}: must be distinct and in [0, {num_slots})")
        for slot, context in threads:
            if any(segment.swapped for segment in context.segments):
                raise ValueError(f"the context of slot {slot} is in host memory")
            if context.tail is not None and len(context.tail.pages) > self._max_tail_pages:
                raise ValueError(f"a tail of {len(context.tail.pages)} pages, at most {self._max_tail_pages}")

    def _runs(self, threads: Sequence[tuple[int, Context]]) -> tuple[list[_Run], list[_Run]]:
        """Shared runs, in order of first use, and one private run a row that has private pages.

        All pages with the same readers form one run: the order of a context's pages does not matter to
        attention, as positions are in the keys and validity in fills.
        """
        shared: dict[Interval, _Run] = {}
        private = [_Run((row, row + 1)) for row in range(len(threads))]
        for interval, segment in _readers(threads):
            run = private[interval[0]]
            if interval[1] - interval[0] > 1:
                run = shared.setdefault(interval, _Run(interval))
            self._add(run, segment.pages, segment.token_ids)
        long_enough = []
        for run in shared.values():
            if sum(run.fills) >= self._min_shared_tokens:
                long_enough.append(run)
                continue
            for row in range(*run.rows):
                private[row].pages += run.pages
                private[row].fills += run.fills
        for run, (slot, context) in zip(private, threads):
            if context.tail is not None:
                run.tail_pages, run.tail_slot = context.tail.pages, slot
        return long_enough, [run for run in private if run.pages or run.tail_pages]

    def _add(self, run: _Run, pages: list[int], token_ids: list[int]) -> None:
        run.pages += pages
        whole, rest = divmod(len(token_ids), self._page_size)
        run.fills += [self._page_size] * whole + [rest] * (rest > 0)

    def _place(self, shared: list[_Run], private: list[_Run], num_rows: int, num_items: int | None) -> Plan:
        """Cuts runs into items and gives every reader of a run a partial."""
        needed_shared = sum(run.num_items(self._item_pages) for run in shared)
        needed_private = sum(run.num_items(self._item_pages) for run in private)
        num_items, num_shared = self._bucket(num_rows, num_items, needed_shared, needed_private)
        plan = Plan(
            pages=np.zeros((num_items, self._item_pages), np.int32),
            fills=np.zeros((num_items, self._item_pages), np.int32),
            rows=np.zeros((num_items, 2), np.int32),
            tail_slot=np.full(num_items, -1, np.int32),
            tail_offset=np.zeros(num_items, np.int32),
            row_slot=np.zeros(num_rows, np.int32),
            tail_pages=np.zeros((0, self._max_tail_pages), np.int32),
            partial_start=np.zeros(num_items, np.int32),
            partials=np.full((num_rows, self._max_partials), -1, np.int32),
            num_shared=num_shared,
        )
        counts = np.zeros(num_rows, np.int64)
        next_partial = 0
        for first, runs in ((0, shared), (num_shared, private)):
            w = first
            for run in runs:
                lo, hi = run.rows
                end = w + run.num_items(self._item_pages)
                plan.rows[w:end] = run.rows
                plan.partial_start[w:end] = next_partial
                if counts[lo:hi].max() >= self._max_partials:
                    raise PlanOverflow("partials", int(counts[lo:hi].max()) + 1, self._max_partials)
                for row in range(lo, hi):
                    plan.partials[row, counts[row]] = next_partial + row - lo
                counts[lo:hi] += 1
                next_partial += hi - lo
                self._fill(plan, w, run)
                w = end
        return plan

    def _fill(self, plan: Plan, w: int, run: _Run) -> None:
        for at in range(0, len(run.pages), self._item_pages):
            pages = run.pages[at : at + self._item_pages]
            plan.pages[w, : len(pages)] = pages
            plan.fills[w, : len(pages)] = run.fills[at : at + self._item_pages]
            w += 1
        for at in range(0, len(run.tail_pages), self._item_pages):
            pages = run.tail_pages[at : at + self._item_pages]
            plan.pages[w, : len(pages)] = pages
            plan.tail_slot[w], plan.tail_offset[w] = run.tail_slot, at * self._page_size
            w += 1

    def _num_shared_for(self, num_rows: int, num_items: int) -> int:
        """Shared items of a bucket: none for one row; each of R nested intervals' runs may end unfilled."""
        return 0 if num_rows == 1 else num_items + num_rows

    def _bucket(self, num_rows: int, num_items: int | None, shared: int, private: int) -> tuple[int, int]:
        buckets = self.item_buckets(num_rows)
        if num_items is not None and num_items not in buckets:
            raise ValueError(f"num_items is {num_items}, must be one of {buckets} for {num_rows} rows")
        for size in buckets if num_items is None else (num_items,):
            num_shared = self.num_shared(num_rows, size)
            if shared <= num_shared and private <= size - num_shared:
                return size, num_shared
        size = buckets[-1] if num_items is None else num_items
        num_shared = self.num_shared(num_rows, size)
        if shared > num_shared:
            raise PlanOverflow("items", shared, num_shared)
        raise PlanOverflow("items", private, size - num_shared)


def _readers(threads: Sequence[tuple[int, Context]]) -> list[tuple[Interval, Segment]]:
    """The intervals of rows that read each sealed segment that has tokens; twice those that hold it twice."""
    rows: dict[tuple[int, int], list[int]] = {}
    segments: dict[int, Segment] = {}
    for row, (_, context) in enumerate(threads):
        times: dict[int, int] = {}
        for segment in context.segments:
            if segment.sealed and segment.token_ids:
                segments[segment.id] = segment
                nth = times[segment.id] = times.get(segment.id, 0) + 1
                rows.setdefault((segment.id, nth), []).append(row)
    readers = []
    for (segment_id, _), found in rows.items():
        start = 0
        for i in range(1, len(found) + 1):
            if i == len(found) or found[i] != found[i - 1] + 1:
                readers.append(((found[start], found[i - 1] + 1), segments[segment_id]))
                start = i
    return readers
