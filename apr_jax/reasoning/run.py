"""One request on its way: what the driver knows of it."""

import dataclasses
from collections.abc import Callable, Sequence

from apr_jax.engine.thread import Thread
from apr_jax.reasoning.budget import Budget
from apr_jax.reasoning.program import Append, Fork, Program, Request
from apr_jax.reasoning.tags import Tags


@dataclasses.dataclass(eq=False)
class Run:
    """One request on its way.

    Attributes:
      degraded: (thread, reason) for all that did not go as the format wants, in order.
      finish_reason: why the root ended; None while it runs.
      error: what the program raised; the request ended there.
      clock: seconds since some moment.
      held: forced tokens of children that have not begun, by thread id.
      restrained: the program's fork tags, if the request's parallelism is not `on`.
      is_late: its time is over; what still happens winds it up.
    """

    request: Request
    program: Program
    root: Thread
    budget: Budget
    started_s: float
    first: Append | Fork | None  # what to do once the prompt is prefilled
    clock: Callable[[], float]
    restrained: Tags | None = None
    ended_s: float = 0.0
    ended: set[int] = dataclasses.field(default_factory=set)  # ids of threads that Finish was said for
    held: dict[int, Sequence[int]] = dataclasses.field(default_factory=dict)
    starved: set[int] = dataclasses.field(default_factory=set)  # ids of threads with nothing left to sample
    degraded: list[tuple[Thread, str]] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    num_idle: int = 0  # times in a row that no thread wanted to run and none had gained a token
    num_tokens: int = -1  # of all threads when none wanted to run
    error: Exception | None = None
    is_late: bool = False

    @property
    def wall_s(self) -> float:
        return (self.clock() if self.finish_reason is None else self.ended_s) - self.started_s
