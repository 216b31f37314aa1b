"""What decides at a stop: the interface of programs, and the actions they answer with.

A program holds no threads and runs nothing. The driver asks it where a thread has stopped or a child has
ended, and carries out the answer. Actions are plain values; each may say what did not go as the format wants
(`degraded`).
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol, get_args

from apr_jax.config import check
from apr_jax.engine.thread import JoinMode, Stop, Thread
from apr_jax.reasoning.tags import ForkTags
from apr_jax.types import SamplingParams

Parallelism = Literal["off", "on", "auto"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guards:
    """Bounds that hold for every program. What exceeds one degrades to plain text, with a recorded reason.

    Attributes:
      max_depth: forks above a thread; 0 forbids forking.
      max_fan_out: children of one fork; the first ones are kept.
      max_rounds: forks of one thread.
      max_width: children of one fork that run side by side; the next one begins when one of them ends or waits. Where
        joins need not wait for all, children that have not begun cost nothing: fewer tokens for a longer critical
        path, which counts their waiting, and is shared among those that follow each other. None: all.
      max_thread_tokens: tokens of one thread, forced ones counted; None is no bound of its own.
      max_family_tokens: tokens of all threads of a request. A fork divides what is left evenly among the
        children, and what they leave over goes back at the join, so that the outcome does not depend on
        timing.
      max_family_pages: unique pages that all threads of a request hold; None is the engine's bound. A fork that does
        not fit is refused, a thread that needs one more stops.
      max_wall_s: seconds from the submission, looked at after each engine step. Then no token is sampled any more:
        threads are closed and joined as if their budgets were spent, and the request ends with `wall_clock`. What
        it has said by then depends on load. None is no bound.
      max_context_tokens: tokens that any one token of a request attends to, itself and the prompt's included. A
        thread that has no room left stops; a join whose context does not fit ends the request. None: the model's
        context window alone, which bounds positions.
    """

    max_depth: int = 5
    max_fan_out: int = 32
    max_rounds: int = 32
    max_width: int | None = None
    max_thread_tokens: int | None = None
    max_family_tokens: int = 1_000_000
    max_family_pages: int | None = None
    max_wall_s: float | None = None
    max_context_tokens: int | None = None

    def __post_init__(self):
        check(self.max_depth >= 0, f"max_depth is {self.max_depth}, must be >= 0")
        for name in (field.name for field in dataclasses.fields(self) if field.name not in ("max_depth", "max_wall_s")):
            value = getattr(self, name)
            check(value is None or value >= 1, f"{name} is {value}, must be >= 1")
        wall_s = self.max_wall_s
        check(wall_s is None or 0 < wall_s < float("inf"), f"max_wall_s is {wall_s}, must be > 0 and finite")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What one family is asked to do.

    Attributes:
      token_ids: the prompt.
      sampling: of the root, and of its children unless the program says otherwise. `max_new_tokens` bounds
        the critical path: the tokens, forced ones counted, on the longest chain from the prompt to the end.
          For a
        program that never forks that is simply the number of new tokens.
      parallelism: `on`: the model forks where it wants to. `off`: it never does, and goes on as if the tags that lead
        to a fork were not in its vocabulary. `auto`: so where the engine is busy at that moment (see `hybrid.py`); what
        the request says depends on load then.
    """

    token_ids: Sequence[int]
    sampling: SamplingParams = SamplingParams()  # noqa: RUF009 (frozen)
    guards: Guards = Guards()
    parallelism: Parallelism = "on"

    def __post_init__(self):
        choices = get_args(Parallelism)
        check(self.parallelism in choices, f"parallelism is {self.parallelism!r}, not one of {', '.join(choices)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Action:
    """What the driver shall do.

    Attributes:
      degraded: what did not go as the format wants, for people.
    """

    degraded: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Append(Action):
    """The thread goes on with these forced tokens (may be none); `sampling` None keeps parameters and
    budget.

    Attributes:
      drop: tokens at the thread's end that these replace.
    """

    tokens: Sequence[int] = ()
    sampling: SamplingParams | None = None
    drop: int = 0


@dataclasses.dataclass(frozen=True)
class Mark(Action):
    """What the thread says from here on is its conclusion; it goes on."""

    sampling: SamplingParams | None = None


@dataclasses.dataclass(frozen=True)
class Fork(Action):
    """Children continue the thread's context, each starting with its own forced tokens.

    Attributes:
      closing_len: forced tokens that the program may still add to a child when its budget is spent.
      joining_len: forced tokens that the thread goes on with after the join. Both are kept back from the
        budget.
      drop: tokens at the thread's end that are taken back first: they belong to no thread any more.
      carry: as the engine's `fork` has it: the thread can take the fork back.
      num_dealt: 0 shares what the thread may still add among the fork's children. A program that forks several
        threads at once while nothing else of the request runs (`on_idle`) says here how many children they get in
        all, and what the family may still add is dealt to these.
    """

    token_lists: Sequence[Sequence[int]]
    sampling: SamplingParams | Sequence[SamplingParams]
    closing_len: int = 0
    joining_len: int = 0
    drop: int = 0
    carry: bool = False
    num_dealt: int = 0


@dataclasses.dataclass(frozen=True)
class Spawn(Fork):
    """Like Fork, but each child starts from a context of its own that holds its tokens only."""


@dataclasses.dataclass(frozen=True)
class Wait(Action):
    """Nothing to do until another thread stops or ends."""


@dataclasses.dataclass(frozen=True)
class Finish(Action):
    """The thread has ended: a child is ready to be joined, a root's request is done."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Join(Action):
    """The children's parent goes on; children that are not joined are cancelled.

    Attributes:
      cut: tokens since the fork, along the critical path, that children which are not joined keep: what a dispatch
        ran beyond the decision is overshoot. None keeps all.
    """

    children: Sequence[Thread]
    mode: JoinMode
    tokens: Sequence[int] = ()
    sampling: SamplingParams | None = None
    cut: int | None = None


@dataclasses.dataclass(frozen=True)
class Keep(Action):
    """All other children of the same parent are cancelled, and cut as `Join` does; the program is asked again."""

    children: Sequence[Thread]
    cut: int | None = None


@dataclasses.dataclass(frozen=True)
class Cancel(Action):
    """These children are cancelled; the program is asked again."""

    children: Sequence[Thread]


class Program(Protocol):
    """Decides at every stop. One instance may serve many requests at once: it reads the thread that it is
    asked about, and keeps what it must remember by `thread.family.id`.

    Attributes:
      name: for people.
      block: the tags around a parallel block in the text, or None if the text shows no blocks.
      fork_tags: what the model writes where it wants to fork; None if it does not decide.
    """

    name: str
    block: tuple[str, str] | None
    fork_tags: ForkTags | None = None

    def start(self, request: Request) -> Append | Fork | Spawn:
        """How the request begins: tokens after the prompt, or a fork of the prompt itself."""
        ...

    def on_stop(self, thread: Thread, stop: Stop) -> Append | Mark | Fork | Spawn | Wait | Finish:
        """A thread has stopped."""
        ...

    def on_child(
        self, parent: Thread, ended: Sequence[Thread], running: Sequence[Thread]
    ) -> Join | Keep | Cancel | Wait | Finish:
        """A child has ended, or a step has passed since one did. `ended` and `running` are the parent's children, in
        the order of the fork. A running one may have tokens that settle what is joined; those that are held are among
        them.
        """
        ...

    def on_joined(self, thread: Thread) -> Wait | Finish:
        """A thread goes on after a join; Wait lets it, Finish (for a root) ends it there."""
        return Wait()

    def on_refused(self, thread: Thread, reason: str) -> Append | Finish:
        """A fork was refused, by a guard or for want of pages; the reason is recorded already."""
        return Append()

    def on_idle(self, threads: Sequence[Thread]) -> Iterable[tuple[Thread, Action]]:
        """No thread of the request wants to run. What the stopped ones that wait (`threads`), or forked ones, do next.

        Actions are carried out one by one as they are drawn. None of them: the request has stalled.
        """
        return ()

    def widened(self, guards: Guards) -> Guards:
        """The guards of a request under this program, made wide enough for what the client asked of it."""
        return guards

    def read_answer(self, text: str) -> str | None:
        """The answer in the whole text: what follows the last parallel block."""
        return (text.rpartition(self.block[1])[2] if self.block else text).strip()
