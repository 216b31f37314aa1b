"""When a join happens: values that any program can be run under, and the order that makes them fair.

Children are ranked by when they end, in tokens since the fork, counted along the critical path, ties by ordinal. An
ended child is *settled* once no running sibling can come before it: running siblings only grow, and those that are held
(`Guards.max_width`) begin no sooner because another is longer. What is decided from settled children alone, in their
order, does not depend on what else the engine runs, in which batches or with how many pages.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from apr_jax.config import check
from apr_jax.engine.joining import flatten
from apr_jax.engine.spans import spans
from apr_jax.engine.thread import Thread
from apr_jax.reasoning.metrics import critical_path, forked_path, joined_path
from apr_jax.reasoning.program import Cancel, Finish, Join, Keep, Program, Wait
from apr_jax.reasoning.wrapped import Wrapped
from apr_jax.tokenizers import Tokenizer

Accept = Callable[[Thread], bool]


@dataclasses.dataclass(frozen=True)
class Decision:
    """Which children are joined, in the order of the fork, and what the others keep (`Join.cut`)."""

    children: Sequence[Thread]
    cut: int | None


class When(Protocol):
    """When a join happens."""

    def decide(self, ended: Sequence[Thread], running: Sequence[Thread]) -> Decision | None:
        """What is joined, or None: not yet. Asked after every step while some child has ended."""
        ...


@dataclasses.dataclass(frozen=True)
class All:
    """All children are joined once all have ended."""

    def decide(self, ended: Sequence[Thread], running: Sequence[Thread]) -> Decision | None:
        return None if running else Decision(ended, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quorum:
    """The first `count` children that are accepted are joined; if there are fewer in the end, all are.

    Attributes:
      accept: which children count; None: all.
      arrival: children count in the order in which they are seen to end, none is waited for. Faster, but the outcome
        depends on load, and so do the tokens of the others, which are not cut.
    """

    count: int
    accept: Accept | None = None
    arrival: bool = False

    def __post_init__(self):
        check(self.count >= 1, f"count is {self.count}, must be >= 1")

    def decide(self, ended: Sequence[Thread], running: Sequence[Thread]) -> Decision | None:
        times = Times(ended, running)
        candidates = times.ranked(ended) if self.arrival else times.settled(ended)
        chosen: list[Thread] = []
        for child in candidates:
            if self.accept is None or self.accept(child):
                chosen.append(child)
            if len(chosen) == self.count:
                chosen.sort(key=lambda child: child.ordinal)
                return Decision(chosen, None if self.arrival else times.end(child))
        return None if running else Decision(ended, None)


def first(accept: Accept | None = None, *, arrival: bool = False) -> Quorum:
    """The first child that is accepted is joined, alone."""
    return Quorum(count=1, accept=accept, arrival=arrival)


@dataclasses.dataclass(frozen=True)
class Deadline:
    """The children that have ended within `tokens` are joined; where none has, the first one to end."""

    tokens: int

    def __post_init__(self):
        check(self.tokens >= 1, f"a deadline is {self.tokens} tokens, must be >= 1")

    def decide(self, ended: Sequence[Thread], running: Sequence[Thread]) -> Decision | None:
        times = Times(ended, running)
        in_time = [child for child in ended if times.end(child) <= self.tokens]
        if any(times.end(child) <= self.tokens for child in running):
            return None
        if in_time:
            return Decision(in_time, self.tokens)
        return first().decide(ended, running)


def by_text(tokenizer: Tokenizer, accept: Callable[[str, str], bool]) -> Accept:
    """Accepts a child by (the request's prompt, what the child has said, joined threads in their places)."""

    def accept_child(child: Thread) -> bool:
        ids = flatten(child)
        text = tokenizer.decode(ids[:-1] if ids and ids[-1] in tokenizer.eos_ids else ids)
        return accept(tokenizer.decode(child.family.root.prompt_ids), text)

    return accept_child


class Times:
    """When the children of a fork end, in tokens since the fork along the critical path.

    Args:
      ended, running: children of one fork, which is not joined yet. Others of it were cancelled.
    """

    def __init__(self, ended: Sequence[Thread], running: Sequence[Thread]):
        self._running = running
        grow = {child.id for child in running}
        first = next(iter((*ended, *running)), None)
        parent = None if first is None else first.parent
        siblings = [] if parent is None else parent.children
        lengths = [(_least_path(c), True) if c.id in grow else (critical_path(c), False) for c in siblings]
        found = spans(lengths, None if first is None else first.family.max_width)
        self._spans = {child.id: span for child, span in zip(siblings, found, strict=True)}

    def end(self, child: Thread) -> int:
        """When it ends. Exact for settled children, else a lower bound."""
        return self._spans[child.id].end

    def is_known(self, child: Thread) -> bool:
        """Whether an ended child's rank will change no more."""
        return self._spans[child.id].is_known

    def rank(self, child: Thread) -> tuple[int, int]:
        """Where a child comes among its siblings."""
        return self.end(child), child.ordinal

    def ranked(self, children: Iterable[Thread]) -> list[Thread]:
        return sorted(children, key=self.rank)

    def settled(self, children: Iterable[Thread]) -> list[Thread]:
        """Ended children by rank, as far as no running sibling can come before or between them."""
        earliest = min(map(self.rank, self._running), default=None)
        return [child for child in self.ranked(children) if earliest is None or self.rank(child) < earliest]


def _least_path(thread: Thread) -> int:
    """The critical path that a thread which still runs will have at least. Of children that are not joined yet, the
    one that is behind may be what is waited for.
    """
    alive = [child for child in thread.children if not child.is_done]
    times = Times([], alive)
    behind = min(map(times.end, alive), default=0)
    return len(thread.token_ids) + joined_path(thread) + behind


def cut_records(children: Sequence[Thread], limit: int, kept: Sequence[Thread] = ()) -> Iterator[tuple[Thread, int]]:
    """Takes from the records of a fork's cancelled children, and from those of all threads below them, the tokens that
    lie beyond `limit` since the fork. Yields which threads lost how many.

    Args:
      children: all of the fork, in its order. kept: those of them that keep all.
    """
    lengths = [(critical_path(child), False) for child in children]
    found = spans(lengths, children[0].family.max_width if children else None)
    for child, span in zip(children, found, strict=True):
        if child not in kept:
            yield from _cut_record(child, max(0, limit - span.start))


def _cut_record(thread: Thread, limit: int) -> Iterator[tuple[Thread, int]]:
    """The same of one child, with `limit` since it began."""
    start = kept = 0
    ends = [record.at for record in thread.joins]
    for number, children in enumerate(_forks(thread)):
        end = ends[number] if number < len(ends) else len(thread.token_ids)
        own = min(end - start, limit)
        kept, limit, start = kept + own, limit - own, end
        yield from cut_records(children, limit)
        limit -= forked_path(children)
    kept += min(len(thread.token_ids) - start, limit)
    count = len(thread.token_ids) - kept
    if count:
        for values in (thread.token_ids, thread.sampled, thread.logprobs):
            del values[kept:]
        thread.joins = [record for record in thread.joins if record.at <= kept]
        yield thread, count


def _forks(thread: Thread) -> list[list[Thread]]:
    """All children that the thread ever had, by fork."""
    forks: list[list[Thread]] = [[] for _ in range(thread.num_forks)]
    for child in thread.family.threads:
        if child.parent is thread:
            forks[child.path[-1][0]].append(child)
    return forks


class Deciding(Wrapped):
    """Another program, whose joins happen when `when` says."""

    def __init__(self, program: Program, when: When):
        super().__init__(program)
        self._when = when

    def on_child(
        self, parent: Thread, ended: Sequence[Thread], running: Sequence[Thread]
    ) -> Join | Keep | Cancel | Wait | Finish:
        """The program is asked as if the chosen children were all that there are."""
        decision = self._when.decide(ended, running)
        if decision is None:
            return Wait()
        action = super().on_child(parent, decision.children, [])
        if isinstance(action, Join):
            return dataclasses.replace(action, cut=decision.cut)
        if decision.cut is not None and len(decision.children) < len(ended) + len(running):
            return Keep(decision.children, decision.cut)  # then asked again: what ends here ends without the others
        return action
