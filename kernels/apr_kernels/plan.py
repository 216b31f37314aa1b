"""What one step reads: items of pages, who reads them, and how partial results merge.

Letters: W items, C pages an item, R rows, S slots, M pages a tail, P partials a row.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

DATA_FIELDS = (
    "pages", "fills", "rows", "tail_slot", "tail_offset", "row_slot", "tail_pages", "partial_start",
    "partials",
)  # fmt: skip


@functools.partial(jax.tree_util.register_dataclass, data_fields=DATA_FIELDS, meta_fields=("num_shared",))
@dataclasses.dataclass(frozen=True)
class Plan:
    """All items of a step. Arrays are numpy on the host and jax on the device.

    Attributes:
      pages: i32[W, C] page ids, 0 (the null page) beyond the end.
      fills: i32[W, C] valid tokens in each page, 0 beyond the end; ignored where tail_slot >= 0.
      rows: i32[W, 2] half-open interval of the rows that read the item; [0, 0) is padding.
      tail_slot: i32[W] -1, or the slot whose own tail this is: validity then comes from tail_len.
      tail_offset: i32[W] token index, in that tail, of the item's first slot.
      row_slot: i32[R] the slot each row serves; S is padding.
      tail_pages: i32[S, M] the pages of each tail, 0 beyond the end.
      partial_start: i32[W] reader j of item w writes partial partial_start[w] + j; adjacent items with the
        same rows and partial_start are one run, accumulated together and written once.
      partials: i32[R, P] where each row's partial results lie, -1: none.
      num_shared: items [0, num_shared) may have any number of readers; items [num_shared, W), tails among
        them, have at most one. Used items come first in each of the two ranges.
    """

    pages: Any
    fills: Any
    rows: Any
    tail_slot: Any
    tail_offset: Any
    row_slot: Any
    tail_pages: Any
    partial_start: Any
    partials: Any
    num_shared: int

    @property
    def num_items(self) -> int:
        return self.pages.shape[0]

    @property
    def item_pages(self) -> int:
        return self.pages.shape[1]

    @property
    def num_rows(self) -> int:
        return self.row_slot.shape[0]

    @property
    def num_slots(self) -> int:
        return self.tail_pages.shape[0]

    @property
    def max_tail_pages(self) -> int:
        return self.tail_pages.shape[1]

    @property
    def num_partials(self) -> int:
        """Partial results a kernel must have room for: P a row, in the worst case."""
        return self.partials.shape[0] * self.partials.shape[1]


def check_shapes(plan: Plan) -> None:
    """Checks what is static: ranks, matching sizes, integer types.

    Raises:
      ValueError: naming the field, its shape and the expected one.
    """
    num_items, item_pages = np.shape(plan.pages)
    (num_rows,) = np.shape(plan.row_slot)
    expected = {
        "pages": (num_items, item_pages), "fills": (num_items, item_pages), "rows": (num_items, 2),
        "tail_slot": (num_items,), "tail_offset": (num_items,), "row_slot": (num_rows,),
        "tail_pages": (None, None), "partial_start": (num_items,), "partials": (num_rows, None),
    }  # fmt: skip
    for name, want in expected.items():
        array = getattr(plan, name)
        shape = np.shape(array)
        if len(shape) != len(want) or any(w is not None and s != w for s, w in zip(shape, want)):
            raise ValueError(f"plan.{name} has shape {shape}, must be {want}")
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"plan.{name} has dtype {array.dtype}, must be an integer type")
    if not 0 <= plan.num_shared <= num_items:
        raise ValueError(f"plan.num_shared is {plan.num_shared}, must be in [0, {num_items}]")


def _require(condition, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _used_prefix(used: np.ndarray, what: str) -> None:
    _require(not np.any(used[1:] & ~used[:-1]), f"a used {what} item follows a padding item")


def validate_plan(plan: Plan, *, num_pages: int, page_size: int) -> None:
    """Checks a plan of numpy arrays before it goes to the device.

    Args:
      plan: numpy arrays.
      num_pages: pages of the store, the null page among them.
      page_size: token positions a page.

    Raises:
      ValueError: naming the first thing that is wrong.
    """
    check_shapes(plan)
    num_slots = plan.num_slots
    for name, array in (("pages", plan.pages), ("tail_pages", plan.tail_pages)):
        _require(np.all((array >= 0) & (array < num_pages)), f"plan.{name} holds an id outside [0, {num_pages})")
    _require(np.all((plan.fills >= 0) & (plan.fills <= page_size)), f"plan.fills outside [0, {page_size}]")
    _require(not np.any((plan.pages == 0) & (plan.fills > 0)), "the null page has a fill above 0")
    lo, hi = plan.rows[:, 0], plan.rows[:, 1]
    _require(np.all((lo >= 0) & (lo <= hi) & (hi <= plan.num_rows)), f"plan.rows outside [0, {plan.num_rows}]")
    readers = hi - lo
    _require(np.all(readers[plan.num_shared :] <= 1), "a private item has more than one reader")
    _used_prefix(readers[: plan.num_shared] > 0, "shared")
    _used_prefix(readers[plan.num_shared :] > 0, "private")
    empty = (readers > 0) & (plan.tail_slot == -1) & ~(plan.fills > 0).any(-1)
    _require(not empty.any(), "a used item has no tokens")
    _validate_slots(plan, num_slots, page_size)
    _validate_partials(plan)


def _validate_slots(plan: Plan, num_slots: int, page_size: int) -> None:
    served = plan.row_slot[plan.row_slot < num_slots]
    _require(np.all((plan.row_slot >= 0) & (plan.row_slot <= num_slots)), f"row_slot outside [0, {num_slots}]")
    _require(len(np.unique(served)) == len(served), "two rows serve one slot")
    owned = plan.tail_pages[plan.tail_pages > 0]
    _require(len(np.unique(owned)) == len(owned), "a page is in two places of plan.tail_pages")
    _require(np.all(plan.tail_slot[: plan.num_shared] == -1), "a shared item is a tail")
    for w in np.flatnonzero(plan.tail_slot != -1):
        slot, offset = int(plan.tail_slot[w]), int(plan.tail_offset[w])
        _require(0 <= slot < num_slots, f"plan.tail_slot[{w}] is {slot}, must be in [-1, {num_slots})")
        _require(plan.rows[w, 1] - plan.rows[w, 0] == 1, f"tail item {w} has no single reader")
        _require(plan.row_slot[plan.rows[w, 0]] == slot, f"tail item {w} is read by another slot than {slot}")
        _require(offset >= 0 and offset % page_size == 0, f"plan.tail_offset[{w}] is {offset}, not a page's start")
        first = offset // page_size
        pages = np.zeros(plan.item_pages, np.int64)
        owned = plan.tail_pages[slot, first : first + plan.item_pages]
        pages[: len(owned)] = owned
        _require(np.array_equal(pages, plan.pages[w]), f"tail item {w} is not what tail_pages[{slot}] says")


def _validate_partials(plan: Plan) -> None:
    """Every run's readers own partials of their own, and each row lists exactly those written for it."""
    written: dict[int, int] = {}
    previous = None
    for w in range(plan.num_items):
        lo, hi, start = int(plan.rows[w, 0]), int(plan.rows[w, 1]), int(plan.partial_start[w])
        run = (lo, hi, start)
        if hi > lo and run != previous:
            for row in range(lo, hi):
                index = start + row - lo
                _require(
                    0 <= index < plan.num_partials,
                    f"partial {index} of item {w} outside [0, {plan.num_partials})",
                )
                _require(index not in written, f"partial {index} is written by two runs")
                written[index] = row
        previous = run
    listed: dict[int, int] = {}
    for row, index in zip(*np.nonzero(plan.partials >= 0)):
        partial = int(plan.partials[row, index])
        _require(partial not in listed, f"partial {partial} is listed twice")
        listed[partial] = int(row)
    _require(listed == written, "plan.partials does not list exactly the partials that the items write")
