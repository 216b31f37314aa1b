"""Lays runs out in a plan's arrays of declared sizes: items, and the partials that they leave.

Letters: W items, C pages an item, N runs, R rows, S slots, M pages a tail, P partials a row.
"""

import numpy as np
from apr_kernels.plan import Plan

from apr_jax.cache.runs import Runs, expand
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


class Layout:
    """The declared sizes of plans.

    Args:
      cache_config: page size and number of pages.
      engine_config: item_pages (C), max_tail_pages (M), target_runs.
      max_partials: P.
    """

    def __init__(self, cache_config: CacheConfig, engine_config: EngineConfig, max_partials: int):
        self.max_tail_pages = engine_config.max_tail_pages
        self._page_size = cache_config.page_size
        self._item_pages = engine_config.item_pages
        self._max_partials = max_partials
        self._target_runs = engine_config.target_runs or 1
        self._pool_items = self.num_items(cache_config.num_pages)
        self._tail_items = self.num_items(engine_config.max_tail_pages)

    def num_items(self, num_pages):
        """Items that a run of so many pages is cut into: of one number or of an array of them."""
        return -(-num_pages // self._item_pages)

    def item_buckets(self, num_rows: int) -> tuple[int, ...]:
        """The declared numbers of items W for a number of rows, smallest first: two.

        The smaller holds, besides full tails, 8 items of other pages a row, and shared runs of as many; the
        larger what the whole pool can need: each page once, in runs that may end in an item partly filled.
        Padding items cost their metadata only, as the kernels loop over used items.
        """
        private = num_rows * (self._tail_items + 8)
        small = _num_shared(num_rows, 8 * num_rows) + private
        large = _num_shared(num_rows, self._pool_items) + private + self._pool_items
        return tuple(sorted({small, large}))

    def lay_out(
        self,
        runs: Runs,
        slots: np.ndarray,
        tail_lens: np.ndarray,
        tail_pages: np.ndarray,
        num_rows: int,
        num_items: int | None,
        num_queries: int,
    ) -> tuple[Plan, np.ndarray]:
        """Cuts runs into items and gives every reader of a run a partial.

        Args:
          runs: of the rows that serve a thread.
          slots, tail_lens: of each of these rows, tail_lens in pages.
          tail_pages: i32[S, M], the plan's.
          num_rows, num_items, num_queries: as `PlanBuilder.build` takes them.

        Returns:
          The plan and, for each row that serves a thread, the first item of its tail.

        Raises:
          PlanOverflow: a row needs more than P partials, or all rows more than W items.
          ValueError: num_items is no bucket.
        """
        sealed, tails = self.num_items(runs.num_pages), self.num_items(tail_lens)
        items = sealed.copy()
        items[runs.num_shared :] += tails
        needed_shared = int(items[: runs.num_shared].sum())
        num_items, num_shared = self._bucket(num_rows, num_items, needed_shared, int(items.sum()) - needed_shared)
        starts = np.cumsum(items) - items
        starts[runs.num_shared :] += num_shared - needed_shared
        target = -(-self._target_runs // -(-num_queries // TILE_QUERIES))
        pieces = self._num_pieces(runs, items, target)

        plan = Plan(
            pages=np.zeros((num_items, self._item_pages), np.int32),
            fills=np.zeros((num_items, self._item_pages), np.int32),
            rows=np.zeros((num_items, 2), np.int32),
            tail_slot=np.full(num_items, -1, np.int32),
            tail_offset=np.zeros(num_items, np.int32),
            row_slot=np.full(num_rows, len(tail_pages), np.int32),
            tail_pages=tail_pages,
            partial_start=np.zeros(num_items, np.int32),
            partials=np.full((num_rows, self._max_partials), -1, np.int32),
            num_shared=num_shared,
        )
        plan.row_slot[: len(slots)] = slots
        first_page = starts * self._item_pages
        _, at = expand(first_page, first_page + runs.num_pages)
        plan.pages.reshape(-1)[at], plan.fills.reshape(-1)[at] = runs.pages, runs.fills
        first_tail = (starts + sealed)[runs.num_shared :]
        self._place_tails(plan, slots, first_tail, tails)
        _give_partials(plan, runs, items, starts, pieces)
        return plan, first_tail

    def _place_tails(self, plan: Plan, slots: np.ndarray, first: np.ndarray, counts: np.ndarray) -> None:
        row, item = expand(first, first + counts)
        nth = item - first[row]
        padded = np.zeros((len(plan.tail_pages), self._tail_items * self._item_pages), np.int32)
        padded[:, : self.max_tail_pages] = plan.tail_pages
        plan.pages[item] = padded.reshape(len(padded), self._tail_items, -1)[slots[row], nth]
        plan.tail_slot[item], plan.tail_offset[item] = slots[row], nth * self._item_pages * self._page_size

    def _num_pieces(self, runs: Runs, items: np.ndarray, target: int) -> np.ndarray:
        """Into how many pieces each run is cut, i64[N]: no piece is longer than a `target`-th of all items.

        Unless a row would have more than P partials: then pieces are as short as P allows. A run without items has
        no piece.
        """

        def cut(longest: int) -> tuple[np.ndarray, int]:
            pieces = -(-items // longest)
            change = np.zeros(len(items) + 1, np.int64)
            np.add.at(change, runs.lo, pieces)
            np.subtract.at(change, runs.hi, pieces)
            return pieces, int(np.cumsum(change).max())

        whole = max(1, int(items.max(initial=0)))
        longest = min(whole, max(1, -(-int(items.sum()) // target)))
        pieces, needed = cut(longest)
        if needed <= self._max_partials:
            return pieces
        pieces, needed = cut(whole)
        if needed > self._max_partials:
            raise PlanOverflow("partials", needed, self._max_partials)
        while longest + 1 < whole:  # pieces of `longest` items are too many, of `whole` they are not
            middle = (longest + whole) // 2
            found, needed = cut(middle)
            if needed <= self._max_partials:
                pieces, whole = found, middle
            else:
                longest = middle
        return pieces

    def _bucket(self, num_rows: int, num_items: int | None, shared: int, private: int) -> tuple[int, int]:
        buckets = self.item_buckets(num_rows)
        if num_items is not None and num_items not in buckets:
            raise ValueError(f"num_items is {num_items}, must be one of {buckets} for {num_rows} rows")
        size, num_shared = 0, 0
        for size in buckets if num_items is None else (num_items,):
            num_shared = self._num_shared_of(num_rows, size)
            if shared <= num_shared and private <= size - num_shared:
                return size, num_shared
        if shared > num_shared:
            raise PlanOverflow("items", shared, num_shared)
        raise PlanOverflow("items", private, size - num_shared)

    def _num_shared_of(self, num_rows: int, num_items: int) -> int:
        """How many of a bucket's items may have several readers."""
        if num_items == self.item_buckets(num_rows)[0]:
            return _num_shared(num_rows, 8 * num_rows)
        return max(0, min(num_items - num_rows * (self._tail_items + 8) - self._pool_items, num_items))


def _num_shared(num_rows: int, num_items: int) -> int:
    """Shared items of a bucket: none for one row; each of R nested intervals' runs may end unfilled."""
    return 0 if num_rows == 1 else num_items + num_rows


def _give_partials(plan: Plan, runs: Runs, items: np.ndarray, starts: np.ndarray, pieces: np.ndarray) -> None:
    """Writes who reads each item, and where the partials of each piece go."""
    run, item = expand(starts, starts + items)
    piece = (np.cumsum(pieces) - pieces)[run] + (item - starts[run]) * pieces[run] // items[run]
    run_of_piece = np.repeat(np.arange(len(pieces)), pieces)
    lo, hi = runs.lo[run_of_piece], runs.hi[run_of_piece]
    plan.rows[item, 0], plan.rows[item, 1] = runs.lo[run], runs.hi[run]
    plan.partial_start[item] = (np.cumsum(hi - lo) - (hi - lo))[piece]
    _, row = expand(lo, hi)  # of each partial, as they are numbered
    order = np.argsort(row, kind="stable")
    row = row[order]
    plan.partials[row, np.arange(len(row)) - np.searchsorted(row, row)] = order
