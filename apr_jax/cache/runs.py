"""Which rows read which sealed pages: the runs of a plan, before they are cut into items.

Letters: N runs, R rows that serve a thread, E entries (a segment read by a run, at a place of a context). Everything
that is as long as the pages or the contexts is an array: a step has a few milliseconds for 256 threads.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from apr_jax.cache.context import Context, Segment


@dataclasses.dataclass(frozen=True)
class Runs:
    """Pages that the same rows read. Shared runs come first, outer before inner; then one private run a row.

    Attributes:
      num_shared: runs [0, num_shared) have several readers; run num_shared + r is row r's own.
      lo, hi: i64[N] half-open interval of the rows that read the run.
      num_pages: i64[N] pages of each run, tails left out; a private run may have none.
      pages, fills: i32[sum of num_pages] page ids and valid tokens in each, run after run.
      segments: every sealed segment read, once. arrays: their pages.
    """

    num_shared: int
    lo: np.ndarray
    hi: np.ndarray
    num_pages: np.ndarray
    pages: np.ndarray
    fills: np.ndarray
    segments: list[Segment]
    arrays: list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Held:
    """The segments of contexts in one list, row after row, so that each is looked at once.

    Attributes:
      distinct: each segment once, in order of id.
      ids: i64, of all segments that rows hold. index: where in `distinct` each is.
      ends: i64[R + 1] row r holds those in [ends[r], ends[r + 1]).
    """

    distinct: list[Segment]
    ids: np.ndarray
    index: np.ndarray
    ends: np.ndarray

    @staticmethod
    def of(contexts: Sequence[Context]) -> "Held":
        segments = list(itertools.chain.from_iterable([context.segments for context in contexts]))
        ids = np.array([segment.id for segment in segments], np.int64)
        _, first, index = np.unique(ids, return_index=True, return_inverse=True)
        ends = np.cumsum([0, *(len(context.segments) for context in contexts)])
        return Held([segments[i] for i in first.tolist()], ids, index, ends)

    def row_order(self) -> list[int]:
        """The order of rows that makes the readers of a segment of a tree an interval: by the lists of segments.

        Equal lists keep their order.
        """
        data, ends = self.ids.astype(">i8").tobytes(), (8 * self.ends).tolist()
        keys = [data[start:end] for start, end in itertools.pairwise(ends)]  # big-endian bytes sort like the lists
        return sorted(range(len(keys)), key=keys.__getitem__)


def find_runs(held: Held, row_order: Sequence[int], page_size: int, min_shared_tokens: int) -> Runs:
    """The runs of contexts in the order of their rows; their open tails are left out.

    All pages with the same readers form one run: the order of a context's pages does not matter to attention, as
    positions are in the keys and validity in fills. Runs of fewer than min_shared_tokens are read privately.
    """
    num_rows, at = len(row_order), np.asarray(row_order, np.int64)
    rows, place = expand(held.ends[:-1][at], held.ends[1:][at])
    index = held.index[place]
    is_read = np.array([segment.sealed and bool(segment.token_ids) for segment in held.distinct], bool)[index]
    lo, hi, of_interval = _intervals(index[is_read], rows[is_read])
    used, entry = np.unique(of_interval, return_inverse=True)
    found = [held.distinct[i] for i in used.tolist()]
    num_tokens = np.array([len(segment.token_ids) for segment in found], np.int64)

    # Entries with the same readers: one run, kept if it is long enough.
    shared = np.flatnonzero(hi - lo > 1)
    intervals, run_of = np.unique(lo[shared] * (num_rows + 1) + num_rows - hi[shared], return_inverse=True)
    run_tokens = np.bincount(run_of, weights=num_tokens[entry[shared]], minlength=len(intervals))
    is_kept = run_tokens >= min_shared_tokens
    kept, num_shared = shared[is_kept[run_of]], int(is_kept.sum())
    is_private = np.ones(len(entry), bool)
    is_private[kept] = False
    private = np.flatnonzero(is_private)

    # Every run's entries, in the order in which contexts first read them; a private one comes once a reader.
    own, own_row = expand(lo[private], hi[private])
    run = np.concatenate([(np.cumsum(is_kept) - 1)[run_of[is_kept[run_of]]], num_shared + own_row])
    entries = np.concatenate([kept, private[own]])
    order = np.lexsort((entries, run))
    run, entry = run[order], entry[entries[order]]

    arrays = [segment.page_array() for segment in found]
    sizes = np.array([len(array) for array in arrays], np.int64)
    num_pages = np.zeros(num_shared + num_rows, np.int64)
    np.add.at(num_pages, run, sizes[entry])
    pages = np.concatenate([arrays[i] for i in entry.tolist()] or [np.zeros(0, np.int32)])
    fills = np.full(len(pages), page_size, np.int32)
    fills[np.cumsum(sizes[entry]) - 1] = (num_tokens - (sizes - 1) * page_size)[entry]
    rows = np.arange(num_rows)
    shared_lo, shared_hi = intervals[is_kept] // (num_rows + 1), num_rows - intervals[is_kept] % (num_rows + 1)
    return Runs(
        num_shared=num_shared,
        lo=np.concatenate([shared_lo, rows]),
        hi=np.concatenate([shared_hi, rows + 1]),
        num_pages=num_pages,
        pages=pages,
        fills=fills,
        segments=found,
        arrays=arrays,
    )


def _intervals(index: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The intervals of rows that read each segment, twice those that hold it twice, ordered by their first place.

    Args:
      index, rows: of each segment that a row reads, row after row.

    Returns:
      lo, hi, index: i64[E].
    """
    order = np.argsort(index, kind="stable")  # by segment, then by row, then by place
    index, rows = index[order], rows[order]
    again = np.zeros(len(index), bool)
    again[1:] = (index[1:] == index[:-1]) & (rows[1:] == rows[:-1])
    nth = np.zeros(len(index), np.int64)
    if again.any():
        place = np.arange(len(index))
        nth = place - np.maximum.accumulate(np.where(again, 0, place))
        by_nth = np.lexsort((rows, nth, index))
        order, index, rows, nth = order[by_nth], index[by_nth], rows[by_nth], nth[by_nth]
    first = np.ones(len(index), bool)
    first[1:] = (index[1:] != index[:-1]) | (nth[1:] != nth[:-1]) | (rows[1:] != rows[:-1] + 1)
    starts = np.flatnonzero(first)
    ends = np.append(starts[1:], len(index))
    by_place = np.argsort(order[starts])
    starts, ends = starts[by_place], ends[by_place]
    return rows[starts], rows[ends - 1] + 1, index[starts]


def expand(lo: np.ndarray, hi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All (i, j) with lo[i] <= j < hi[i], ordered by i, then j: two arrays."""
    counts = hi - lo
    which = np.repeat(np.arange(len(lo)), counts)
    ends = np.cumsum(counts)
    return which, np.arange(len(which)) - (ends - counts - lo)[which]
