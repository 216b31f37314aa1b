"""Cases of the kernels laid out in pages, and planned as the engine does.

Letters: R rows, V variants (the same case on other pages), W items, P positions a page.
"""

import dataclasses
import itertools

import numpy as np
from apr_kernels.plan import Plan, validate_plan
from kernel_cases import Group, KernelCase

from apr_jax.cache.context import Context, Segment
from apr_jax.cache.plan_builder import PlanBuilder
from apr_jax.config import CacheConfig, EngineConfig


@dataclasses.dataclass(frozen=True)
class Layout:
    """A case in pages: ids 1 to num_pages - 1, in order; page 0 is the null page.

    Attributes:
      groups: by level, each group's rows, page ids and valid tokens in each page.
      tails: each row's page ids.
      num_pages: the null page among them.
    """

    groups: list[list[tuple[Group, list[int], list[int]]]]
    tails: list[list[int]]
    num_pages: int


def lay_out(case: KernelCase, page_size: int) -> Layout:
    """Gives every segment and tail pages of its own."""
    next_page = itertools.count(1)

    def take(tokens: int) -> list[int]:
        return [next(next_page) for _ in range(-(-tokens // page_size))]

    groups = []
    for level in case.levels:
        groups.append([])
        for group in level:
            pages, fills = [], []
            for tokens in group.segments:
                pages += take(tokens)
                fills += [page_size] * (tokens // page_size) + [tokens % page_size] * (tokens % page_size > 0)
            groups[-1].append((group, pages, fills))
    tails = [take(case.tail_len) for _ in range(case.num_rows)]
    return Layout(groups, tails, next(next_page))


def build_plan(
    case: KernelCase,
    page_size: int,
    *,
    item_pages: int,
    target_runs: int,
    max_partials: int,
    min_shared_tokens: int,
) -> Plan:
    """The plan the engine's builder makes of a case, without its padding: W and P are what the case needs.

    Args:
      min_shared_tokens: shorter runs are read privately; one above all segments' tokens shares nothing.

    Raises:
      ValueError: the case needs more than max_partials for a row.
    """
    contexts = _contexts(case, page_size)
    pages_read = sum(context.num_pages for context in contexts)
    engine_config = EngineConfig(
        max_threads=case.num_rows,
        max_tail_pages=-(-case.tail_len // page_size),
        item_pages=item_pages,
        max_partials=max_partials,
        target_runs=target_runs,
        min_shared_tokens=min_shared_tokens,
    )
    # The builder sizes its arrays by the pool: room for all pages once a reader.
    builder = PlanBuilder(CacheConfig(page_size=page_size, num_pages=pages_read + 2), engine_config)
    plan = builder.build(list(enumerate(contexts)), case.num_rows, case.num_rows, num_queries=case.num_queries)
    assert np.array_equal(plan.row_slot, np.arange(case.num_rows)), "rows keep their order"
    plan = _trim(plan)
    if plan.num_items < 4096:  # the check is slow, and the larger plans are made the same way
        validate_plan(plan, num_pages=lay_out(case, page_size).num_pages, page_size=page_size)
    return plan


def _contexts(case: KernelCase, page_size: int) -> list[Context]:
    layout = lay_out(case, page_size)
    contexts = [Context() for _ in range(case.num_rows)]
    for group, pages, _ in itertools.chain.from_iterable(layout.groups):
        first = 0
        for tokens in group.segments:
            count = -(-tokens // page_size)
            segment = Segment(0, None, pages[first : first + count], [0] * tokens, sealed=True)
            first += count
            for context in contexts[group.lo : group.hi]:
                context.segments.append(segment)
    for context, pages in zip(contexts, layout.tails):
        context.segments.append(Segment(0, None, pages))
    return contexts


def _trim(plan: Plan) -> Plan:
    """The plan without padding items and partials. Partials are a power of two, so that few programs are compiled."""
    used = plan.rows[:, 0] < plan.rows[:, 1]
    num_partials = int((plan.partials >= 0).sum(1).max())
    fields = ("pages", "fills", "rows", "tail_slot", "tail_offset", "partial_start")
    return dataclasses.replace(
        plan,
        **{name: np.ascontiguousarray(getattr(plan, name)[used]) for name in fields},
        partials=np.ascontiguousarray(plan.partials[:, : 1 << (num_partials - 1).bit_length()]),
        num_shared=int(used[: plan.num_shared].sum()),
    )


def on_other_pages(plan: Plan, page_map: np.ndarray) -> Plan:
    """The plan with page p at page_map[p]; the null page stays."""
    return dataclasses.replace(plan, pages=page_map[plan.pages], tail_pages=page_map[plan.tail_pages])


def page_maps(num_pages: int, num_variants: int, rng: np.random.Generator) -> np.ndarray:
    """i32[V, num_pages]: where each variant of a layout lies in a store of V * (num_pages - 1) + 1 pages."""
    ids = rng.permutation(np.arange(1, num_variants * (num_pages - 1) + 1, dtype=np.int32)).reshape(num_variants, -1)
    return np.concatenate([np.zeros((num_variants, 1), np.int32), ids], axis=1)


def page_table(case: KernelCase, layout: Layout, page_size: int) -> np.ndarray | None:
    """i32[R, n]: all pages of each row in order; None where a page before the last is partly filled."""
    rows: list[list[int]] = [[] for _ in range(case.num_rows)]
    for group, pages, fills in itertools.chain.from_iterable(layout.groups):
        if any(fill != page_size for fill in fills):
            return None
        for row in rows[group.lo : group.hi]:
            row += pages
    for row, tail in zip(rows, layout.tails):
        row += tail
    return np.array(rows, np.int32)
