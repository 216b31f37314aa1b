"""What the Hopper kernel derives from a plan: dense lists of pages by run, and windows of queries.

Letters: W items, C pages an item, P positions a page, R rows, T queries a row, G query heads a KV head, X partials
in all, M queries a window, B windows at most, L pages of all runs together, each run's rounded up to whole tiles.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from apr_kernels.kv_pages import NULL_PAGE
from apr_kernels.plan import Plan

HIDDEN = -1e30
RUN_TOKENS = 128  # a run's pages begin at a multiple of this many tokens: no tile has tokens of two runs
SLAB = 8  # rows of a shared-memory tile: tiled copies begin at multiples of it
_NEVER = 2**30

WINDOW_FIELDS = (
    "first_page",  # of the run, in the dense list
    "num_pages",  # of the run
    "num_tiles",  # to attend to
    "num_plain",  # of these, the leading ones whose tokens are each visible to all queries or to none
    "q_copy",  # which of the shifted copies of the queries
    "q_row",  # where in that copy the window's queries begin
    "out_row",  # where its results go
    "num_live",  # queries, at most M
    "first_query",  # the window's first query, of the run's
)

DATA_FIELDS = (
    "page_ids", "visible", "first_page", "num_pages", "first_row", "num_readers", "partial_start", "last_token",
    "ends_in_tail", "partials",
)  # fmt: skip


@functools.partial(jax.tree_util.register_dataclass, data_fields=DATA_FIELDS, meta_fields=("several_readers",))
@dataclasses.dataclass(frozen=True)
class Prepared:
    """What all layers of a step have in common.

    Attributes:
      page_ids: i32[L] the pages of each run that have visible tokens, in order.
      visible: f32[L * P] of each token: 0 if all the run's queries see it, -t if those from t on, HIDDEN if none.
      first_page, num_pages: i32[W] of each run.
      first_row, num_readers: i32[W]; num_readers is 0 from num_runs on.
      partial_start: i32[W].
      last_token: i32[W] the token, of the run's, that query 0 sees last, query t the one t further; _NEVER if all
        see all.
      ends_in_tail: bool[W] whether nothing but the tail comes after that token.
      partials: i32[R, P'] of the plan.
      several_readers: whether a run can have more than one.
    """

    page_ids: jax.Array
    visible: jax.Array
    first_page: jax.Array
    num_pages: jax.Array
    first_row: jax.Array
    num_readers: jax.Array
    partial_start: jax.Array
    last_token: jax.Array
    ends_in_tail: jax.Array
    partials: jax.Array
    several_readers: bool


def prepare(plan: Plan, tail_len, num_queries, page_size: int) -> Prepared:
    """See `apr_kernels.paged_attention.api.prepare`."""
    num_items, item_pages = plan.num_items, plan.item_pages
    align = max(1, RUN_TOKENS // page_size)
    item = jnp.arange(num_items)
    used = plan.rows[:, 0] < plan.rows[:, 1]
    visible, has_tokens = _visible(plan, tail_len, num_queries, page_size, used)
    item_len = has_tokens.sum(1)

    key = jnp.concatenate([plan.rows, plan.partial_start[:, None], used[:, None]], axis=1)
    begins = used & jnp.concatenate([jnp.ones(1, bool), (key[1:] != key[:-1]).any(1)])
    run = jnp.cumsum(begins) - 1
    ends = used & jnp.concatenate([begins[1:] | ~used[1:], jnp.ones(1, bool)])
    start = lax.cummax(jnp.where(begins, item, 0))  # the first item of each item's run
    through = jnp.cumsum(item_len)
    run_len = through - (through - item_len)[start]  # of the run, up to and with this item
    padded = item_len + jnp.where(ends, -run_len % align, 0)
    first = jnp.cumsum(padded) - padded  # dense place of each item's first page

    size = num_items * (item_pages + align - 1)
    size += -size % align
    place = jnp.where(has_tokens, first[:, None] + jnp.cumsum(has_tokens, axis=1) - 1, size).reshape(-1)
    page_ids = jnp.full(size, NULL_PAGE, jnp.int32).at[place].set(plan.pages.reshape(-1), mode="drop")
    tokens = jnp.full((size, page_size), HIDDEN, jnp.float32)
    tokens = tokens.at[place].set(visible.reshape(-1, page_size), mode="drop")

    is_tail = plan.tail_slot >= 0
    tail_base = (first - first[start]) * page_size - plan.tail_offset  # where, in the run, the tail's token 0 is
    last_token = tail_base + tail_len.at[plan.tail_slot].get(mode="clip")
    last_token = jnp.where(is_tail & (item_len > 0), last_token, _NEVER)
    run_last = jnp.full(num_items, _NEVER, jnp.int32).at[jnp.where(used, run, num_items)].min(last_token, mode="drop")

    def by_run(values, fill=0):
        return jnp.full(num_items, fill, values.dtype).at[jnp.where(ends, run, num_items)].set(values, mode="drop")

    return Prepared(
        page_ids=page_ids,
        visible=tokens.reshape(-1),
        first_page=by_run(first[start]),
        num_pages=by_run(run_len),
        first_row=by_run(plan.rows[:, 0]),
        num_readers=by_run(plan.rows[:, 1] - plan.rows[:, 0]),
        partial_start=by_run(plan.partial_start),
        last_token=run_last,
        ends_in_tail=by_run(is_tail),
        partials=plan.partials,
        several_readers=plan.num_shared > 0,
    )


def _visible(plan: Plan, tail_len, num_queries, page_size: int, used):
    """What each token of each item's pages is to the readers, f32[W, C, P], and which pages have any, bool[W, C]."""
    is_tail = (plan.tail_slot >= 0)[:, None, None]
    position = jnp.arange(page_size)
    token = plan.tail_offset[:, None, None] + jnp.arange(plan.item_pages)[:, None] * page_size + position
    from_query = token - tail_len.at[plan.tail_slot].get(mode="clip")[:, None, None]
    queries = num_queries.at[plan.rows[:, 0]].get(mode="clip")[:, None, None]
    seen = jnp.where(is_tail, from_query < queries, position < plan.fills[:, :, None])
    seen &= used[:, None, None] & (plan.pages != NULL_PAGE)[:, :, None]
    delay = jnp.where(is_tail, jnp.maximum(from_query, 0), 0).astype(jnp.float32)
    return jnp.where(seen, -delay, HIDDEN), seen.any(-1)


def make_windows(prepared: Prepared, queries: int, group: int, rows: int, tile: int, num_tokens: int):
    """Cuts the queries of each run into windows.

    The numbers depend on the model's heads, which `prepare` does not know; they are the same for all layers, and XLA
    computes them once.

    Args:
      queries: T * G, of a row and KV head. group: G. rows: M. tile: tokens of a tile. num_tokens: T.

    Returns:
      i32[B * len(WINDOW_FIELDS)] and the number of windows, i32[].
    """
    num_runs = prepared.first_page.shape[0]
    num_queries = prepared.num_readers * queries  # of each run
    several = prepared.several_readers or queries > rows
    count = -(-num_queries // rows)
    size = num_runs
    run, nth = jnp.arange(num_runs), jnp.zeros(num_runs, jnp.int32)
    if several:  # otherwise a run is a window
        size += -(-prepared.partials.size * queries // rows)
        first = jnp.cumsum(count) - count
        run = jnp.zeros(size, jnp.int32).at[jnp.where(count > 0, first, size)].max(run, mode="drop")
        run = lax.cummax(run)
        nth = jnp.arange(size) - first[run]
    page_size = prepared.visible.shape[0] // prepared.page_ids.shape[0]
    of_run = {name: getattr(prepared, name)[run] for name in ("first_page", "num_pages", "first_row", "partial_start")}
    first_query = nth * rows
    num_live = jnp.clip(num_queries[run] - first_query, 0, rows)
    num_seen = of_run["num_pages"] * page_size
    num_plain = num_seen
    if num_tokens > 1:  # the tail's tokens appear query by query: stop where the window's last query does
        last_query = (first_query + num_live - 1) // group
        last_token = prepared.last_token[run]
        num_seen = jnp.where(prepared.ends_in_tail[run], jnp.minimum(num_seen, last_token + last_query + 1), num_seen)
        num_plain = jnp.where(last_token < _NEVER, (last_token + 1) // tile * tile, num_seen)
    num_tiles = -(-num_seen // tile)

    step = math.gcd(queries, SLAB)
    first_row = of_run["first_row"] * queries
    fields = {
        "first_page": of_run["first_page"],
        "num_pages": of_run["num_pages"],
        "num_tiles": num_tiles,
        "num_plain": jnp.minimum(num_tiles, -(-num_plain // tile)),
        "q_copy": first_row % SLAB // step,
        "q_row": first_row // SLAB * SLAB + first_query,
        "out_row": of_run["partial_start"] * queries + first_query,
        "num_live": num_live,
        "first_query": first_query,
    }
    table = jnp.stack([fields[name] for name in WINDOW_FIELDS], axis=1).astype(jnp.int32)
    return table.reshape(-1), jnp.sum(count).astype(jnp.int32)
