"""When a join happens: values that any program can be run under, and the order that makes them fair.

Children are ranked by their tokens since the fork, counted along the critical path, ties by ordinal. An ended child is
*settled* once no running sibling can come before it: running siblings only grow. What is decided from settled children
alone, in their order, does not depend on what else the engine runs, in which batches or with how many pages.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from apr_jax.config import check
from apr_jax.engine.joining import flatten
from apr_jax.engine.thread import Stop, Thread
from apr_jax.reasoning.metrics import critical_path
from apr_jax.reasoning.program import (
    Action,
    Append,
    Cancel,
    Finish,
    Fork,
    Guards,
    Join,
    Keep,
    Mark,
    Program,
    Request,
    Wait,
)
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
        candidates = sorted(ended, key=rank) if self.arrival else settled(ended, running)
        chosen: list[Thread] = []
        for child in candidates:
            if self.accept is None or self.accept(child):
                chosen.append(child)
            if len(chosen) == self.count:
                return Decision(_in_order(chosen), None if self.arrival else critical_path(child))
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
        in_time = [child for child in ended if critical_path(child) <= self.tokens]
        if any(least_path(child) <= self.tokens for child in running):
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


def rank(child: Thread) -> tuple[int, int]:
    """Where an ended child comes among its siblings."""
    return critical_path(child), ordinal(child)


def ordinal(child: Thread) -> int:
    return child.path[-1][1]


def settled(ended: Sequence[Thread], running: Sequence[Thread]) -> list[Thread]:
    """Ended children by rank, as far as no running sibling can come before or between them."""
    earliest = min(((least_path(child), ordinal(child)) for child in running), default=None)
    ranked = sorted(ended, key=rank)
    return [child for child in ranked if earliest is None or rank(child) < earliest]


def least_path(thread: Thread) -> int:
    """The critical path that a thread which still runs will have at least. Of children that are not joined yet, the
    one that is behind may be what is waited for.
    """
    joined = sum(max(map(critical_path, (*r.children, *r.dropped)), default=0) for r in thread.joins)
    behind = min((least_path(child) for child in thread.children if not child.is_done), default=0)
    return len(thread.token_ids) + joined + behind


def cut_record(thread: Thread, limit: int) -> Iterator[tuple[Thread, int]]:
    """Takes from a cancelled thread's record, and from those of all threads below it, the tokens that lie beyond
    `limit` on their chain. Yields which threads lost how many.
    """
    start = kept = 0
    ends = [record.at for record in thread.joins]
    for number, children in enumerate(_forks(thread)):
        end = ends[number] if number < len(ends) else len(thread.token_ids)
        own = min(end - start, limit)
        kept, limit, start = kept + own, limit - own, end
        for child in children:
            yield from cut_record(child, limit)
        limit -= max(map(critical_path, children))
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


def _in_order(children: Sequence[Thread]) -> list[Thread]:
    return sorted(children, key=ordinal)


class Deciding(Program):
    """Another program, whose joins happen when `when` says."""

    def __init__(self, program: Program, when: When):
        self.name, self.block, self.fork_tags = program.name, program.block, program.fork_tags
        self._program = program
        self._when = when

    def start(self, request: Request) -> Append | Fork:
        return self._program.start(request)

    def on_stop(self, thread: Thread, stop: Stop) -> Append | Mark | Fork | Wait | Finish:
        return self._program.on_stop(thread, stop)

    def on_child(
        self, parent: Thread, ended: Sequence[Thread], running: Sequence[Thread]
    ) -> Join | Keep | Cancel | Wait | Finish:
        """The program is asked as if the chosen children were all that there are."""
        decision = self._when.decide(ended, running)
        if decision is None:
            return Wait()
        action = self._program.on_child(parent, decision.children, [])
        return dataclasses.replace(action, cut=decision.cut) if isinstance(action, Join) else action

    def on_joined(self, thread: Thread) -> Wait | Finish:
        return self._program.on_joined(thread)

    def on_refused(self, thread: Thread, reason: str) -> Append | Finish:
        return self._program.on_refused(thread, reason)

    def on_idle(self, threads: Sequence[Thread]) -> Iterable[tuple[Thread, Action]]:
        return self._program.on_idle(threads)

    def widened(self, guards: Guards) -> Guards:
        return self._program.widened(guards)

    def read_answer(self, text: str) -> str | None:
        return self._program.read_answer(text)
