"""What the Triton kernel derives from a plan: one dense list of pages, and windows of queries.

Letters: W items, C pages an item, P positions a page, R rows, T queries a row, G query heads a KV head, X partials
in all, M queries a window, B windows at most.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from apr_kernels.kv_pages import NULL_PAGE
from apr_kernels.plan import Plan

_NEVER = 2**29

PAGE_FIELDS = (
    "page",  # its id
    "limit",  # query 0 sees the slots below it; of a tail that begins later it is not positive
    "grows",  # 1: query t sees t slots more, this being the query's own tail; 0: it does not
)
WINDOW_FIELDS = (
    "first_page",  # of the run, in the dense list
    "num_tokens",  # slots of the run's pages to attend to
    "q_row",  # where, in R * T * G, the window's queries begin
    "out_row",  # where, in X * T * G, its results go
    "num_live",  # queries, at most M
    "first_query",  # the window's first query, of the run's
)


class Prepared(NamedTuple):
    """What all layers of a step have in common. A run's numbers stand at its last item.

    Attributes:
      pages: i32[W * C, len(PAGE_FIELDS)] the pages with visible tokens, those of a run together and in order.
      first_page: i32[W] of the run, in `pages`. run_len: i32[W] slots of its pages.
      first_row: i32[W]. num_readers: i32[W], 0 but at the last item of a run.
      partial_start: i32[W].
      first_len: i32[W] how many slots query 0 sees if the run ends with its reader's tail (query t sees t more);
        _NEVER if it does not.
      partials: i32[R, P'] of the plan.
      any_shared: i32[num_shared] static by its shape: how many runs may have several readers.
    """

    pages: jax.Array
    first_page: jax.Array
    run_len: jax.Array
    first_row: jax.Array
    num_readers: jax.Array
    partial_start: jax.Array
    first_len: jax.Array
    partials: jax.Array
    any_shared: jax.Array


class Windows(NamedTuple):
    """Blocks of queries of a run.

    Attributes:
      table: i32[B, len(WINDOW_FIELDS)].
      count: i32[1] how many are used; they come first.
    """

    table: jax.Array
    count: jax.Array


def prepare(plan: Plan, tail_len, num_queries, page_size: int) -> Prepared:
    """See `apr_kernels.paged_attention.api.prepare`."""
    num_items, item_pages = plan.num_items, plan.item_pages
    used = plan.rows[:, 0] < plan.rows[:, 1]
    is_tail = plan.tail_slot >= 0
    limit, has_tokens = _limits(plan, tail_len, num_queries, page_size, used)

    item_len = has_tokens.sum(1)
    through = jnp.cumsum(item_len)
    first = through - item_len  # dense place of each item's first page
    place = jnp.where(has_tokens, first[:, None] + jnp.cumsum(has_tokens, axis=1) - 1, num_items * item_pages)
    fields = jnp.stack([plan.pages, limit, jnp.broadcast_to(is_tail[:, None], limit.shape)], axis=-1)
    pages = jnp.zeros((num_items * item_pages, len(PAGE_FIELDS)), jnp.int32)
    pages = pages.at[place.reshape(-1)].set(fields.reshape(pages.shape).astype(jnp.int32), mode="drop")

    key = jnp.concatenate([plan.rows, plan.partial_start[:, None], used[:, None]], axis=1)
    differs = (key[1:] != key[:-1]).any(1)
    begins = jnp.concatenate([jnp.ones(1, bool), differs])
    ends = used & jnp.concatenate([differs, jnp.ones(1, bool)])
    start = lax.cummax(jnp.where(begins, jnp.arange(num_items), 0))  # the first item of each item's run
    return Prepared(
        pages=pages,
        first_page=first[start],
        run_len=(through - first[start]) * page_size,
        first_row=plan.rows[:, 0],
        num_readers=jnp.where(ends, plan.rows[:, 1] - plan.rows[:, 0], 0),
        partial_start=plan.partial_start,
        first_len=_first_len(plan, tail_len, page_size, first, item_len, start),
        partials=plan.partials,
        any_shared=jnp.zeros(plan.num_shared, jnp.int32),
    )


def _limits(plan: Plan, tail_len, num_queries, page_size: int, used):
    """Slots of each page that query 0 sees, i32[W, C], and which pages have any for some query, bool[W, C]."""
    is_tail = plan.tail_slot >= 0
    offset = plan.tail_offset[:, None] + jnp.arange(plan.item_pages) * page_size
    limit = tail_len.at[plan.tail_slot].get(mode="clip")[:, None] + 1 - offset
    limit = jnp.where(is_tail[:, None], limit, plan.fills)
    growth = jnp.where(is_tail, num_queries.at[plan.rows[:, 0]].get(mode="clip") - 1, 0)
    readable = used[:, None] & (plan.pages != NULL_PAGE)
    return limit, readable & (limit + growth[:, None] > 0)


def _first_len(plan: Plan, tail_len, page_size: int, first, item_len, start):
    """See Prepared. A run whose tail is not at its end, or not in order, is read whole by every query."""
    num_items = plan.num_items
    item = jnp.arange(num_items)
    has_tokens, is_tail = item_len > 0, plan.tail_slot >= 0

    def lowest(values, where):
        """Of each run, _NEVER where there is none."""
        return jnp.full(num_items, _NEVER).at[start].min(jnp.where(where & has_tokens, values, _NEVER))[start]

    base = (first - first[start]) * page_size - plan.tail_offset  # where, in the run, the tail's token 0 is
    first_base, last_base = lowest(base, is_tail), -lowest(-base, is_tail)
    tails_last = -lowest(-item, ~is_tail) < lowest(item, is_tail)
    own_len = tail_len.at[plan.row_slot.at[plan.rows[:, 0]].get(mode="clip")].get(mode="clip")
    return jnp.where((first_base == last_base) & tails_last, first_base + own_len + 1, _NEVER)


def make_windows(prepared: Prepared, num_queries, num_tokens: int, group: int, rows: int, wide: bool | None) -> Windows:
    """Cuts the queries of runs into windows.

    The numbers depend on the model's heads, which `prepare` does not know; they are the same for all layers, and XLA
    computes them once.

    Args:
      num_queries: i32[R]. num_tokens: T. group: G. rows: M.
      wide: only runs with several readers, or only the others; None: all.
    """
    queries = num_tokens * group  # of a row
    readers, first_row = prepared.num_readers, prepared.first_row
    single = readers == 1
    # A reader's queries beyond num_queries come last: with a single reader they are left out.
    run_queries = jnp.where(single, num_queries.at[first_row].get(mode="clip") * group, readers * queries)
    if wide is not None:
        run_queries = jnp.where((readers > 1) == wide, run_queries, 0)
    count = -(-run_queries // rows)

    num_items, num_rows = readers.shape[0], num_queries.shape[0]
    num_shared = prepared.any_shared.shape[0]
    bounds = num_shared * -(-num_rows * queries // rows), num_shared + prepared.partials.size * queries // rows
    size = min(bounds) if wide is not False else 0
    size += (num_items - num_shared if wide is None else num_items if not wide else 0) * -(-queries // rows)
    first = jnp.cumsum(count) - count
    run = jnp.zeros(size, jnp.int32).at[jnp.where(count > 0, first, size)].max(jnp.arange(num_items), mode="drop")
    run = lax.cummax(run)
    first_query = (jnp.arange(size) - first[run]) * rows
    num_live = jnp.clip(run_queries[run] - first_query, 0, rows)
    last_query = jnp.maximum(first_query + num_live - 1, 0) // group
    fields = {
        "first_page": prepared.first_page[run],
        "num_tokens": jnp.minimum(prepared.run_len[run], prepared.first_len[run] + last_query),
        "q_row": first_row[run] * queries + first_query,
        "out_row": prepared.partial_start[run] * queries + first_query,
        "num_live": num_live,
        "first_query": first_query,
    }
    table = jnp.stack([fields[name] for name in WINDOW_FIELDS], axis=1).astype(jnp.int32)
    return Windows(table, jnp.sum(count, keepdims=True).astype(jnp.int32))
