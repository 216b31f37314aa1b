"""Searches in steps: all candidates take a step, all wait, the best go on. What beam search, DVTS and trees share.

    step     leaves fork, their children say a step each and stop at the separator
    judge    once all have stopped: a score each, or threads that ask the model
    choose   some leaves are dropped, their pages come free; some go on

A leaf that is its parent's only child takes the parent's place (a join by `select`), so that the tree does not grow
deeper than its branches. The best leaf takes the root's place in the same way. What a search remembers names threads by
id, as the threads themselves hold on to their family.
"""

import dataclasses
import math
import weakref
from collections.abc import Iterator, Sequence
from typing import Literal

from apr_jax.engine.thread import Family, Status, Stop, Thread
from apr_jax.reasoning.program import Action, Append, Cancel, Finish, Fork, Guards, Join, Request, Wait
from apr_jax.reasoning.strategies.options import StrategyOptions
from apr_jax.reasoning.strategies.strategy import Strategy
from apr_jax.tokenizers import Tokenizer
from apr_jax.types import SamplingParams

ROUNDS_A_STEP = 3  # forks of one thread: to propose, to judge, to go on


@dataclasses.dataclass
class Leaf:
    """A line of reasoning that has stopped.

    Attributes:
      depth: steps from the prompt.
      order: when it came, for ties. branch: which of the root's first children it descends from.
      reason: why it stopped; `steps` behind a step.
      complete: it has an end and takes no further step; accepted: it ends the search.
    """

    thread_id: int
    depth: int
    order: int
    branch: int
    reason: str
    complete: bool = False
    accepted: bool = False
    score: float | None = None

    def key(self) -> tuple[float, int]:
        """What the best leaf has the largest of."""
        assert self.score is not None
        return self.score, -self.order


@dataclasses.dataclass
class Search:
    """A request's search.

    Attributes:
      leaves: by thread id, in the order they came.
      asked: ids of the threads whose children are helpers, not candidates; asking: what these are asked for.
      steps: what threads that shall fork are to say, by id; empty: their children say it.
      depths: of threads, by id. num_expanded: leaves that have taken a step.
      dealt: children that the forks of this round get in all.
      over: the one leaf that is left takes the root's place; reason: why it stopped.
    """

    leaves: dict[int, Leaf] = dataclasses.field(default_factory=dict)
    asked: set[int] = dataclasses.field(default_factory=set)
    asking: Literal["steps", "scores"] | None = None
    steps: dict[int, list[list[int]]] = dataclasses.field(default_factory=dict)
    depths: dict[int, int] = dataclasses.field(default_factory=dict)
    num_leaves: int = 0
    num_expanded: int = 0
    dealt: int = 0
    over: bool = False
    reason: str = ""


class TreeSearch(Strategy):
    """Takes steps until every leaf it goes on with is complete. Subclasses say how leaves are judged and chosen."""

    def __init__(self, tokenizer: Tokenizer, options: StrategyOptions):
        super().__init__(tokenizer, options)
        self._searches: weakref.WeakKeyDictionary[Family, Search] = weakref.WeakKeyDictionary()
        self._separator_id = tokenizer.token_id(options.separator)

    def widened(self, guards: Guards) -> Guards:
        """A fork for each step, above or beside each other."""
        wide = super().widened(guards)
        steps = ROUNDS_A_STEP * (self.options.max_steps + 1)
        return dataclasses.replace(
            wide, max_depth=max(wide.max_depth, self.options.max_steps + 1), max_rounds=max(wide.max_rounds, steps)
        )

    def start(self, request: Request) -> Fork:
        count = self.options.expansion * self.options.beam_width
        return Fork([[]] * count, self._stepping(request.sampling), carry=True, num_dealt=count)

    def choose(self, search: Search) -> tuple[list[Leaf], list[Leaf]]:
        """The leaves to keep, and those of them that take a step now; none of these ends the search."""
        raise NotImplementedError

    def on_stop(self, thread: Thread, stop: Stop) -> Append | Fork | Wait | Finish:
        search = self._search(thread)
        if thread.parent is not None and thread.parent.id in search.asked:
            return Wait()  # a helper
        if search.over:
            return Finish(search.reason)
        if thread.id in search.leaves or thread.id in search.steps:
            return self._go_on(search, thread)
        if thread.parent is None and not thread.num_forks:
            return Finish(stop.reason)  # its fork was refused, and it has gone on alone
        before = search.depths.get(thread.id)  # a thread whose fork was refused has gone on alone
        if before is None:
            before = search.depths.get(thread.parent.id, 0) if thread.parent is not None else 0
        depth = search.depths[thread.id] = before + 1
        branch = thread.path[0][1] if thread.path else 0
        is_step = self._is_step(stop)
        leaf = Leaf(thread.id, depth, search.num_leaves, branch, "steps" if is_step else stop.reason)
        search.num_leaves += 1
        leaf.accepted = self._is_accepted(thread)
        leaf.complete = leaf.accepted or depth >= self.options.max_steps or not is_step
        search.leaves[thread.id] = leaf
        return Wait()

    def on_child(self, parent: Thread, ended: Sequence[Thread], running: Sequence[Thread]) -> Join | Wait:
        """A child that has ended takes its parent's place; it is the only one left."""
        if running or len(ended) > 1:
            return Wait()
        search = self._search(parent)
        for child in ended:
            search.depths[parent.id] = search.depths.get(child.id, 0)
            if (leaf := search.leaves.pop(child.id, None)) is not None:
                leaf.thread_id = parent.id
                search.leaves[parent.id] = leaf
        return self._select(parent, ended)

    def on_idle(self, threads: Sequence[Thread]) -> Iterator[tuple[Thread, Action]]:
        """A round: what helpers have said is read, leaves are judged, then chosen."""
        if not threads:
            return
        family = threads[0].family
        search = self._search(family.root)
        by_id = {thread.id: thread for thread in family.threads}
        search.leaves = {i: leaf for i, leaf in search.leaves.items() if not by_id[i].is_done}
        if search.asking == "steps":
            search.asking = None
            proposed = [by_id[i] for i in sorted(search.asked) if by_id[i].status is Status.FORKED]
            if proposed:  # else their forks were refused
                yield from self._take_steps(search, proposed)
                return
        unscored = [leaf for leaf in search.leaves.values() if leaf.score is None]
        if search.asking == "scores":
            self._read_scores(search, by_id)
            search.asking = None
        elif unscored:
            asked = list(self._judge(search, unscored, by_id))
            if asked:
                search.asking = "scores"
                search.asked |= {thread.id for thread, _ in asked}
                yield from asked
                return
        yield from self._choose(search, by_id)

    # Judging. By default every leaf has a score of its own, at once.

    def _judge(
        self, search: Search, unscored: Sequence[Leaf], by_id: dict[int, Thread]
    ) -> Iterator[tuple[Thread, Fork]]:
        """Scores leaves, or says which threads fork helpers for it."""
        for leaf in unscored:
            leaf.score = self._score(by_id[leaf.thread_id])
        return iter(())

    def _read_scores(self, search: Search, by_id: dict[int, Thread]) -> None:
        """Scores leaves by what helpers have said."""
        raise AssertionError("no helper was asked")

    # Going on.

    def _choose(self, search: Search, by_id: dict[int, Thread]) -> Iterator[tuple[Thread, Action]]:
        leaves = list(search.leaves.values())
        accepted = [leaf for leaf in leaves if leaf.accepted]
        kept, expanded = (accepted, []) if accepted else self.choose(search)
        if not expanded and leaves:
            best = max([leaf for leaf in kept if leaf.complete] or kept or leaves, key=Leaf.key)
            kept, search.over, search.reason = [best], True, best.reason
        search.num_expanded += len(expanded)
        ids = {leaf.thread_id for leaf in kept}
        dropped = [by_id[i] for i in search.leaves if i not in ids]
        search.leaves = {i: leaf for i, leaf in search.leaves.items() if i in ids}
        for thread in dropped:
            yield _cancellation(thread)
        search.dealt = self._num_children() * len(expanded)
        going_on = {leaf.thread_id for leaf in expanded}
        for leaf in kept:
            thread = by_id[leaf.thread_id]
            if leaf.thread_id in going_on:
                search.steps[leaf.thread_id] = []
            if thread.status is Status.FORKED:  # its helpers are not needed any more
                yield thread, self._select(thread, [])
            else:
                yield thread, self._go_on(search, thread)

    def _go_on(self, search: Search, thread: Thread) -> Fork | Wait | Finish:
        """What a leaf that was kept does: take its parent's place if it is the only one left, fork, or wait."""
        search.asked.discard(thread.id)
        if search.over:
            return Finish(search.reason)
        parent = thread.parent
        if parent is not None and all(other is thread or other.is_done for other in parent.children):
            if thread.id in search.steps:
                search.steps[parent.id] = search.steps.pop(thread.id)
            return Finish("joined")
        if thread.id not in search.steps:
            return Wait()
        search.leaves.pop(thread.id, None)
        return self._expand(search, thread, search.steps.pop(thread.id))

    def _take_steps(self, search: Search, proposed: Sequence[Thread]) -> Iterator[tuple[Thread, Action]]:
        """Steps that helpers have proposed become children."""
        raise AssertionError("no helper was asked")

    def _num_children(self) -> int:
        return self.options.expansion

    def _expand(self, search: Search, thread: Thread, steps: Sequence[Sequence[int]]) -> Fork:
        """A leaf's next steps."""
        sampling = self._stepping(thread.sampling)
        return Fork([[]] * self._num_children(), sampling, carry=True, num_dealt=search.dealt)

    def _stepping(self, sampling: SamplingParams) -> SamplingParams:
        separator = self.options.separator
        ids = () if self._separator_id is None else (self._separator_id,)
        return dataclasses.replace(
            self._sampled(sampling),
            stop=tuple(dict.fromkeys((*sampling.stop, separator))),
            stop_ids=tuple(dict.fromkeys((*sampling.stop_ids, *ids))),
        )

    def _is_step(self, stop: Stop) -> bool:
        """Whether a candidate has stopped behind a step, and not for good."""
        if stop.reason == "stop_id":
            return stop.token_id == self._separator_id
        return stop.reason == "stop_string" and stop.string == self.options.separator

    def on_refused(self, thread: Thread, reason: str) -> Append:
        """A leaf that could not be judged scores least; one that could not fork goes on alone."""
        leaf = self._search(thread).leaves.get(thread.id)
        if leaf is None:
            return super().on_refused(thread, reason)
        leaf.score = -math.inf
        return Append(sampling=dataclasses.replace(thread.sampling, max_new_tokens=0))

    def _search(self, thread: Thread) -> Search:
        if thread.family not in self._searches:
            self._searches[thread.family] = self._new_search(thread.family)
        return self._searches[thread.family]

    def _new_search(self, family: Family) -> Search:
        return Search()


def _cancellation(thread: Thread) -> tuple[Thread, Action]:
    """Ends a leaf, and with it the threads above that have no other child."""
    while thread.parent is not None and thread.parent.parent is not None:
        if any(other is not thread and not other.is_done for other in thread.parent.children):
            break
        thread = thread.parent
    assert thread.parent is not None
    return thread.parent, Cancel([thread])
