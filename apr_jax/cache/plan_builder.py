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
from apr_jax.cache.runs import Runs, expand, find_runs, row_order
from apr_jax.config import CacheConfig, EngineConfig

TILE_QUERIES = 64  # queries of a row that keep one matrix unit busy: a chunk of more fills the chip with fewer runs


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
class _Row:
    """What a thread's context was when the last plan was made: its segments, and its tail's pages."""

    context: Context
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
      arrays: of the runs' segments when their pages were looked up.
      tail_pages: the plan's, as it will be in the next one.
    """

    shape: tuple
    rows: dict[int, _Row]
    runs: Runs
    arrays: list[np.ndarray]
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
        self._num_pages = cache_config.num_pages
        self._item_pages = engine_config.item_pages
        self._max_tail_pages = engine_config.max_tail_pages
        self._max_partials = engine_config.max_partials if max_partials is None else max_partials
        self._min_shared_tokens = engine_config.min_shared_tokens
        self._target_runs = engine_config.target_runs
        self._last: _Last | None = None

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
            self._lay_out(last)
        assert last.plan is not None
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
            if row is None or row.context is not context or row.segments != context.segments:
                return False
            if not row.has_tail:
                continue
            tail = context.segments[-1]
            if tail.pages == row.tail and not tail.sealed:
                continue
            had = len(row.tail)
            if tail.sealed or len(tail.pages) > self._max_tail_pages or tail.pages[:had] != row.tail:
                return False
            slots.append(slot)
            first.append(had)
            counts.append(len(tail.pages) - had)
            pages += tail.pages[had:]
        if any(segment.page_array() is not array for segment, array in zip(last.runs.segments, last.arrays)):
            return False
        if slots:
            self._add_pages(last, np.array(slots), np.array(first), np.array(counts), np.array(pages, np.int32))
        return True

    def _add_pages(self, last: _Last, slots: np.ndarray, first: np.ndarray, counts: np.ndarray, new: np.ndarray):
        """Writes the pages that tails took, from their `first` on, to copies of the arrays that hold them."""
        plan, size = last.plan, self._item_pages
        assert plan is not None
        which, at = expand(first, first + counts)
        last.tail_pages = last.tail_pages.copy()
        last.tail_pages[slots[which], at] = new
        rows = [last.rows[slot] for slot in slots.tolist()]
        if np.any(-(-first // size) != -(-(first + counts) // size)):
            last.plan = None
        else:
            pages = plan.pages.copy()
            item = np.array([row.first_item for row in rows])
            pages.reshape(-1)[item[which] * size + at] = new
            last.plan = dataclasses.replace(plan, pages=pages, tail_pages=last.tail_pages)
        for row in rows:
            row.tail = row.context.segments[-1].pages[:]

    # From nothing.

    def _start(self, threads: Sequence[tuple[int, Context]], shape: tuple) -> _Last:
        num_rows, num_slots = shape[:2]
        self._check(threads, num_rows, num_slots)
        threads = sorted(threads, key=lambda thread: thread[0])
        threads = [threads[i] for i in row_order([context for _, context in threads])]
        runs = find_runs([context for _, context in threads], self._page_size, self._min_shared_tokens)
        tail_pages = np.zeros((num_slots, self._max_tail_pages), np.int32)
        rows = {}
        for slot, context in threads:
            tail = context.tail
            pages = [] if tail is None else tail.pages[:]
            rows[slot] = _Row(context, context.segments[:], tail is not None, pages)
            tail_pages[slot, : len(pages)] = pages
        return _Last(shape, rows, runs, [segment.page_array() for segment in runs.segments], tail_pages)

    def _check(self, threads: Sequence[tuple[int, Context]], num_rows: int, num_slots: int) -> None:
        if len(threads) > num_rows:
            raise ValueError(f"{len(threads)} threads for {num_rows} rows")
        slots = [slot for slot, _ in threads]
        if len(set(slots)) != len(slots) or not all(0 <= slot < num_slots for slot in slots):
            raise ValueError(f"slots {slots}: must be distinct and in [0, {num_slots})")
        for slot, context in threads:
            if any([segment.swapped for segment in context.segments]):
                raise ValueError(f"the context of slot {slot} is in host memory")
            if context.tail is not None and len(context.tail.pages) > self._max_tail_pages:
                raise ValueError(f"a tail of {len(context.tail.pages)} pages, at most {self._max_tail_pages}")

    # From runs to a plan.

    def _lay_out(self, last: _Last) -> None:
        """Cuts runs into items and gives every reader of a run a partial."""
        num_rows, num_slots, num_items, num_queries = last.shape
        runs, size = last.runs, self._item_pages
        slots = np.array(list(last.rows), np.int64)
        tail_lens = np.array([len(row.tail) for row in last.rows.values()], np.int64)
        sealed = -(-runs.num_pages // size)  # i64[N] items
        tails = -(-tail_lens // size)
        items = sealed.copy()
        items[runs.num_shared :] += tails
        num_items, num_shared = self._bucket(
            num_rows, num_items, int(items[: runs.num_shared].sum()), int(items[runs.num_shared :].sum())
        )
        starts = np.cumsum(items) - items  # i64[N] of each run's items
        starts[runs.num_shared :] += num_shared - items[: runs.num_shared].sum()
        plan = self._empty_plan(num_rows, num_slots, num_items, num_shared, last.tail_pages)
        plan.row_slot[: len(slots)] = slots

        flat = plan.pages.reshape(-1), plan.fills.reshape(-1)
        at = expand(starts * size, starts * size + runs.num_pages)[1]
        flat[0][at], flat[1][at] = runs.pages, runs.fills
        first_tail = (starts + sealed)[runs.num_shared :]
        row, item = expand(first_tail, first_tail + tails)
        nth = item - first_tail[row]
        padded = np.zeros((num_slots, -(-self._max_tail_pages // size) * size), np.int32)
        padded[:, : self._max_tail_pages] = last.tail_pages
        plan.pages[item] = padded.reshape(num_slots, -1, size)[slots[row], nth]
        plan.tail_slot[item], plan.tail_offset[item] = slots[row], nth * size * self._page_size
        for each, start in zip(last.rows.values(), first_tail.tolist()):
            each.first_item = start

        target = -(-self._target_runs // -(-num_queries // TILE_QUERIES))
        self._give_partials(plan, runs, items, starts, self._num_pieces(runs, items, target))
        last.plan = plan

    def _empty_plan(
        self, num_rows: int, num_slots: int, num_items: int, num_shared: int, tail_pages: np.ndarray
    ) -> Plan:
        return Plan(
            pages=np.zeros((num_items, self._item_pages), np.int32),
            fills=np.zeros((num_items, self._item_pages), np.int32),
            rows=np.zeros((num_items, 2), np.int32),
            tail_slot=np.full(num_items, -1, np.int32),
            tail_offset=np.zeros(num_items, np.int32),
            row_slot=np.full(num_rows, num_slots, np.int32),
            tail_pages=tail_pages,
            partial_start=np.zeros(num_items, np.int32),
            partials=np.full((num_rows, self._max_partials), -1, np.int32),
            num_shared=num_shared,
        )

    def _num_pieces(self, runs: Runs, items: np.ndarray, target: int) -> np.ndarray:
        """Into how many pieces each run is cut, i64[N]: pieces of about equal length, `target` in all or a few more.

        Fewer where a row would have more than P partials; a run that is not cut has one piece, an empty one none.
        """

        def cut(longest: int) -> tuple[np.ndarray, int]:
            pieces = -(-items // longest)
            change = np.zeros(len(items) + 1, np.int64)
            np.add.at(change, runs.lo, pieces)
            np.subtract.at(change, runs.hi, pieces)
            return pieces, int(np.cumsum(change).max())

        high = max(1, int(items.max(initial=0)))
        low = min(high, max(1, -(-int(items.sum()) // target)))
        if cut(low)[1] > self._max_partials:
            needed = cut(high)[1]
            if needed > self._max_partials:
                raise PlanOverflow("partials", needed, self._max_partials)
            while low + 1 < high:  # cut(low) is too many, cut(high) is not
                middle = (low + high) // 2
                low, high = (low, middle) if cut(middle)[1] <= self._max_partials else (middle, high)
            low = high
        return cut(low)[0]

    def _give_partials(self, plan: Plan, runs: Runs, items: np.ndarray, starts: np.ndarray, pieces: np.ndarray) -> None:
        """Writes who reads each item, and where the partials of each piece go."""
        run, item = expand(starts, starts + items)
        piece = (np.cumsum(pieces) - pieces)[run] + (item - starts[run]) * pieces[run] // items[run]
        run_of_piece = np.repeat(np.arange(len(pieces)), pieces)
        lo, hi = runs.lo[run_of_piece], runs.hi[run_of_piece]
        plan.rows[item, 0], plan.rows[item, 1] = runs.lo[run], runs.hi[run]
        plan.partial_start[item] = (np.cumsum(hi - lo) - (hi - lo))[piece]
        row = expand(lo, hi)[1]  # of each partial, as they are numbered
        order = np.argsort(row, kind="stable")
        row = row[order]
        nth = np.arange(len(row)) - np.searchsorted(row, row)
        plan.partials[row, nth] = order

    # Buckets.

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
