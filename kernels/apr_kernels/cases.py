"""Cases shared by tests and benchmarks: who reads what, in which shapes, with the data to fill it.

A case names segments (sealed, of a given number of tokens) and rows; `build` lays them out in pages in random
order, fills all that is unused with NaN, and makes a plan the simple way, one run a segment and interval of
readers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from apr_kernels.kv_pages import KVPages
from apr_kernels.plan import Plan, validate_plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row: the segments it reads, its tail, its queries. A slot of None is a row of padding."""

    segments: tuple[str, ...] = ()
    tail_len: int = 0
    num_queries: int = 1
    slot: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of a call. T, the queries a row, is num_tokens; W is what the case needs, and some padding."""

    name: str
    rows: tuple[Row, ...]
    segments: dict[str, int] = dataclasses.field(default_factory=dict)
    page_size: int = 16
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    num_tokens: int = 1
    item_pages: int = 4
    num_slots: int = 12
    padding_items: int = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaseData:
    """What `build` makes. Arrays are numpy; `context` holds, for each row, keys and values [n, K, D] it reads
    besides the call's own tokens, in any order."""

    case: Case
    kv_pages: KVPages
    plan: Plan
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    tail_len: np.ndarray
    num_queries: np.ndarray
    context: list[tuple[np.ndarray, np.ndarray]]
    tail_pages: list[list[int]]


def _rows(*rows: tuple[tuple[str, ...], int], queries: tuple[int, ...] | None = None) -> tuple[Row, ...]:
    return tuple(
        Row(
            segments=names,
            tail_len=tail,
            num_queries=1 if queries is None else queries[i],
            slot=(i * 5 + 2) % 12,
        )
        for i, (names, tail) in enumerate(rows)
    )


PADDING = Row(num_queries=0)

CASES = (
    Case(name="first_token", rows=_rows(((), 0))),
    Case(name="page_boundary", rows=_rows(((), 16), ((), 15), ((), 17))),
    Case(name="only_padding", rows=(PADDING, PADDING)),
    Case(
        name="siblings",
        segments={"prompt": 70},
        rows=(*_rows((("prompt",), 3), (("prompt",), 16), (("prompt",), 40), (("prompt",), 0)), PADDING),
    ),
    Case(
        name="tree",
        segments={"root": 40, "left": 21, "right": 9, "leaf": 64},
        rows=_rows(
            (("root", "left"), 5),
            (("root", "left", "leaf"), 2),
            (("root", "left", "leaf"), 90),
            (("root", "right"), 0),
        ),
    ),
    Case(  # a join of joins: partly filled pages in the middle, segments of one token
        name="joined",
        segments={"p": 33, "a": 1, "b": 17, "c": 5, "d": 48, "other": 20},
        rows=_rows((("p", "a", "b", "c", "d"), 7), (("p", "a", "b"), 1), (("other",), 12), (("other", "d"), 0)),
    ),
    Case(
        name="one_kv_head",
        segments={"p": 50},
        num_kv_heads=1,
        head_dim=64,
        rows=_rows((("p",), 9), (("p",), 20), ((), 3)),
    ),
    Case(
        name="no_groups",
        segments={"p": 50},
        num_heads=3,
        num_kv_heads=3,
        head_dim=48,
        rows=_rows((("p",), 9), (("p",), 20)),
    ),
    Case(
        name="prefill",
        segments={"p": 21},
        num_tokens=40,
        rows=(*_rows((("p",), 0), (("p",), 13), ((), 5), ((), 0), queries=(40, 17, 1, 0)), PADDING),
    ),
)


def with_page_size(case: Case, page_size: int) -> Case:
    return dataclasses.replace(case, page_size=page_size, name=f"{case.name}_page{page_size}")


def shuffled(case: Case, rng: np.random.Generator) -> Case:
    """The same rows in another order: readers of a segment need not be one interval any more."""
    rows = tuple(case.rows[i] for i in rng.permutation(len(case.rows)))
    return dataclasses.replace(case, rows=rows, name=f"{case.name}_shuffled")


def build(case: Case, rng: np.random.Generator, dtype=np.float32) -> CaseData:
    """Fills a case with normal data. Unused pages, the null page among them, hold NaN."""
    layout = _Layout(case, rng, dtype)
    contexts, tails = [], []
    segments = {name: layout.add(length) for name, length in case.segments.items()}
    for row in case.rows:
        tail = layout.add(row.tail_len, row.tail_len + row.num_queries) if row.slot is not None else ([], *layout.empty)
        tails.append(tail[0])
        parts = [tail[1:], *(segments[name][1:] for name in row.segments)]
        contexts.append(tuple(np.concatenate([part[i] for part in parts]) for i in range(2)))
    plan = _plan(case, {name: segment[0] for name, segment in segments.items()}, tails)
    validate_plan(plan, num_pages=layout.k.shape[1], page_size=case.page_size)
    tail_len = np.zeros(case.num_slots, np.int32)
    for row in case.rows:
        if row.slot is not None:
            tail_len[row.slot] = row.tail_len
    new = (len(case.rows), case.num_tokens, case.num_kv_heads, case.head_dim)
    return CaseData(
        case=case,
        kv_pages=KVPages(
            jnp.asarray(layout.k), jnp.asarray(layout.v), None, None, case.page_size, case.num_kv_heads, case.head_dim
        ),
        plan=plan,
        q=rng.normal(size=(*new[:2], case.num_heads, case.head_dim)).astype(dtype),
        k=rng.normal(size=new).astype(dtype),
        v=rng.normal(size=new).astype(dtype),
        tail_len=tail_len,
        num_queries=np.array([row.num_queries for row in case.rows], np.int32),
        context=contexts,
        tail_pages=tails,
    )


def on_device(plan: Plan) -> Plan:
    return jax.tree.map(jnp.asarray, plan)


class _Layout:
    """Places tokens in pages of random ids."""

    def __init__(self, case: Case, rng: np.random.Generator, dtype):
        lengths = [*case.segments.values(), *(row.tail_len + row.num_queries for row in case.rows)]
        num_pages = sum(-(-length // case.page_size) for length in lengths) + 4
        self.rng, self.case, self.dtype = rng, case, dtype
        self.free = [int(page) for page in rng.permutation(np.arange(1, num_pages))]
        self.k, self.v = (
            np.full((case.num_kv_heads, num_pages, case.page_size, case.head_dim), np.nan, dtype) for _ in range(2)
        )
        self.empty = tuple(np.zeros((0, case.num_kv_heads, case.head_dim), dtype) for _ in range(2))

    def add(self, length: int, reserved: int | None = None) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Takes pages for `reserved` tokens, writes `length` of them. Returns pages, keys, values."""
        size = self.case.page_size
        pages = [self.free.pop() for _ in range(-(-(reserved or length) // size))]
        written = []
        for store in (self.k, self.v):
            data = self.rng.normal(size=(length, self.case.num_kv_heads, self.case.head_dim)).astype(self.dtype)
            for i in range(0, length, size):
                part = data[i : i + size]
                store[:, pages[i // size]] = 0
                store[:, pages[i // size], : len(part)] = part.swapaxes(0, 1)
            written.append(data)
        return pages, written[0], written[1]


def _plan(case: Case, segments: dict[str, list[int]], tails: list[list[int]]) -> Plan:
    """One run for each segment and interval of rows that read it, one for each tail."""
    shared, private = [], []  # (rows, pages, fills or None, slot)
    for name, pages in segments.items():
        readers = [row for row, each in enumerate(case.rows) if name in each.segments]
        fills = [min(case.page_size, case.segments[name] - i * case.page_size) for i in range(len(pages))]
        for lo in readers:
            if lo - 1 in readers:
                continue
            hi = next(row for row in range(lo + 1, len(case.rows) + 1) if row not in readers)
            (shared if hi - lo > 1 else private).append(((lo, hi), pages, fills, -1))
    for i, row in enumerate(case.rows):
        if row.slot is not None and tails[i]:
            private.append(((i, i + 1), tails[i], None, row.slot))

    def num_items(runs):
        return sum(-(-len(pages) // case.item_pages) for _, pages, _, _ in runs) + case.padding_items

    num_shared, num_rows = num_items(shared), len(case.rows)
    size = num_shared + num_items(private)
    num_partials = max(4, len(shared) + len(private))
    plan = Plan(
        pages=np.zeros((size, case.item_pages), np.int32),
        fills=np.zeros((size, case.item_pages), np.int32),
        rows=np.zeros((size, 2), np.int32),
        tail_slot=np.full(size, -1, np.int32),
        tail_offset=np.zeros(size, np.int32),
        row_slot=np.array([case.num_slots if row.slot is None else row.slot for row in case.rows], np.int32),
        tail_pages=np.zeros((case.num_slots, max(1, *(len(tail) for tail in tails))), np.int32),
        partial_start=np.zeros(size, np.int32),
        partials=np.full((num_rows, num_partials), -1, np.int32),
        num_shared=num_shared,
    )
    for row, tail in zip(case.rows, tails):
        if row.slot is not None:
            plan.tail_pages[row.slot, : len(tail)] = tail
    counts, next_partial = [0] * num_rows, 0
    for first, runs in ((0, shared), (num_shared, private)):
        w = first
        for (lo, hi), pages, fills, slot in runs:
            for row in range(lo, hi):
                plan.partials[row, counts[row]] = next_partial + row - lo
                counts[row] += 1
            for at in range(0, len(pages), case.item_pages):
                part = pages[at : at + case.item_pages]
                plan.pages[w, : len(part)] = part
                if fills is not None:
                    plan.fills[w, : len(part)] = fills[at : at + case.item_pages]
                plan.rows[w], plan.partial_start[w] = (lo, hi), next_partial
                plan.tail_slot[w], plan.tail_offset[w] = slot, at * case.page_size if slot >= 0 else 0
                w += 1
            next_partial += hi - lo
    return plan
