"""The page store's host copies, and what a plan's validation catches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from apr_kernels import cases
from apr_kernels.kv_pages import make_kv_pages, read_pages, write_pages
from apr_kernels.plan import validate_plan


def test_sizes():
    pages = make_kv_pages(10, 4, 2, 8, jnp.float32)
    assert pages.num_pages == 10
    assert pages.bytes == 2 * 10 * 4 * 2 * 8 * 4
    assert len(jax.tree.leaves(pages)) == 2


@pytest.mark.parametrize("sizes", [(1, 4, 2, 8), (4, 0, 2, 8), (4, 4, 0, 8), (4, 4, 2, 0)])
def test_refuses_sizes(sizes):
    with pytest.raises(ValueError, match="must be >="):
        make_kv_pages(*sizes, jnp.float32)


def test_refuses_integer_pages():
    with pytest.raises(ValueError, match="floating"):
        make_kv_pages(4, 4, 2, 8, jnp.int32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pages_come_back_elsewhere_bit_for_bit(dtype):
    data = cases.build(cases.CASES[4], np.random.default_rng(0), dtype)
    before = jax.device_get(data.kv_pages)
    out = jax.device_get(read_pages(data.kv_pages, jnp.array([3, 1, 4])))
    assert all(len(leaf) == 3 for leaf in jax.tree.leaves(out))
    after = jax.device_get(write_pages(data.kv_pages, jnp.array([7, 0, before.num_pages + 5]), out))
    for name in ("k", "v"):
        want = np.array(getattr(before, name))
        want[:, 7] = want[:, 3]
        np.testing.assert_array_equal(getattr(after, name).view(np.uint8), want.view(np.uint8))


def broken(field: str, index, value):
    def change(plan):
        array = np.array(getattr(plan, field))
        array[index] = value
        return dataclasses.replace(plan, **{field: array})

    return change


def tail_item(plan) -> int:
    return int(np.flatnonzero(plan.tail_slot >= 0)[0])


BROKEN = {
    "an id outside": broken("pages", (0, 0), 10_000),
    "fill above 0": broken("pages", (0, 0), 0),
    "fills outside": broken("fills", (0, 0), 17),
    "rows outside": broken("rows", 0, (0, 99)),
    "more than one reader": lambda plan: broken("rows", plan.num_shared, (0, 2))(plan),
    "has no tokens": broken("fills", 0, 0),
    "follows a padding item": broken("rows", 0, (0, 0)),
    "row_slot outside": broken("row_slot", 0, 13),
    "serve one slot": lambda plan: broken("row_slot", 0, plan.row_slot[1])(plan),
    "two places of plan.tail_pages": lambda plan: broken("tail_pages", (5, 0), plan.tail_pages[2, 0])(plan),
    "a shared item is a tail": broken("tail_slot", 0, 2),
    "not a page's start": lambda plan: broken("tail_offset", tail_item(plan), 3)(plan),
    "is read by another slot": lambda plan: broken("tail_slot", tail_item(plan), 11)(plan),
    "is not what tail_pages": lambda plan: broken("pages", (tail_item(plan), 0), 1 + plan.pages[0, 0])(plan),
    "written by two runs": broken("partial_start", 0, 1),
    "listed twice": lambda plan: broken("partials", (0, 3), plan.partials[1, 0])(plan),
    "does not list exactly": broken("partials", (0, 0), -1),
}


@pytest.mark.parametrize("words", BROKEN)
def test_validation_names_what_is_wrong(words):
    data = cases.build(cases.CASES[3], np.random.default_rng(1))
    plan = dataclasses.replace(data.plan, row_slot=np.array(data.plan.row_slot))
    validate_plan(plan, num_pages=data.kv_pages.num_pages, page_size=16)
    with pytest.raises(ValueError, match=words):
        validate_plan(BROKEN[words](plan), num_pages=data.kv_pages.num_pages, page_size=16)


def test_validation_checks_shapes():
    data = cases.build(cases.CASES[3], np.random.default_rng(1))
    for field, value in (
        ("fills", data.plan.fills[:, :1]),
        ("partials", data.plan.partials[:1]),
        ("tail_slot", data.plan.tail_slot.astype(np.float32)),
        ("num_shared", 1000),
    ):
        with pytest.raises(ValueError, match=f"plan.{field}"):
            validate_plan(dataclasses.replace(data.plan, **{field: value}), num_pages=99, page_size=16)
