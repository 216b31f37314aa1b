"""Metrics against a recomputation token by token: the longest path through a graph of tokens."""

import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apr_jax.engine.thread import Counters, JoinRecord
from apr_jax.reasoning.metrics import critical_path, measure, num_covered, total_tokens
from apr_jax.reasoning.text import flatten


class Tree:
    """A random family, and beside it, for every token, which token it had to wait for."""

    def __init__(self, draw):
        self.draw = draw
        self.family = types.SimpleNamespace(threads=[], counters=Counters(), max_width=None)
        self.waits_for: list[list[int]] = []  # by token id: ids of the tokens that come directly before it
        self.order: list[int] = []  # token ids in reading order
        self.root = self.thread(None, [], depth=0)[0]

    def thread(self, parent, before: list[int], depth: int):
        """A thread whose first token waits for `before`; returns it and what its successor waits for."""
        thread = types.SimpleNamespace(
            id=len(self.family.threads),
            parent=parent,
            family=self.family,
            prompt_ids=[],
            token_ids=[],
            joins=[],
            children=[],
        )
        self.family.threads.append(thread)
        before = self.tokens(thread, before)
        for _ in range(self.draw(st.integers(0, 2 - min(depth, 2)))):
            after, children = [], []
            for ordinal in range(self.draw(st.integers(0, 3))):
                child, ends = self.thread(thread, before, depth + 1)
                child.ordinal = ordinal
                children.append(child)
                after += ends
            if self.draw(st.integers(0, 9)) == 0:  # forked, not joined yet
                thread.children = children
                return thread, after or before
            thread.joins.append(JoinRecord(len(thread.token_ids), tuple(children), "stitch"))
            before = self.tokens(thread, after or before)
        return thread, before

    def tokens(self, thread, before: list[int]) -> list[int]:
        for _ in range(self.draw(st.integers(0, 4))):
            token = len(self.waits_for)
            self.waits_for.append(before)
            self.order.append(token)
            thread.token_ids.append(token)
            before = [token]
        return before

    def longest_path(self) -> int:
        lengths: list[int] = []
        for before in self.waits_for:
            lengths.append(1 + max((lengths[i] for i in before), default=0))
        return max(lengths, default=0)


@given(st.data())
def test_tokens_and_critical_path_equal_a_recount(data):
    tree = Tree(data.draw)
    assert total_tokens(tree.root) == len(tree.waits_for)
    assert critical_path(tree.root) == tree.longest_path()
    assert flatten(tree.root) == tree.order
    metrics = measure(tree.root, wall_s=1.0)
    assert metrics.num_threads == len(tree.family.threads)
    outside = len(tree.root.token_ids)
    total = len(tree.waits_for)
    assert metrics.parallel_ratio == (pytest.approx(1 - outside / total) if total else 0)
    assert metrics.acceleration_ratio == (pytest.approx(1 - tree.longest_path() / total) if total else 0)


def test_block_spans_count_the_roots_own_tags():
    root = types.SimpleNamespace(
        id=0, parent=None, prompt_ids=[], token_ids=list(range(10)), joins=[], children=[], family=None
    )
    root.family = types.SimpleNamespace(threads=[root], counters=Counters(), max_width=None)
    assert measure(root, wall_s=0.0, block_spans=[(2, 5), (4, 7)]).parallel_ratio == pytest.approx(0.5)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10)).map(lambda x: (x[0], x[0] + x[1]))))
def test_num_covered_counts_each_once(spans):
    assert num_covered(spans) == len({i for start, stop in spans for i in range(start, stop)})
