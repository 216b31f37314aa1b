"""One request on its way: what the driver knows of it."""

import dataclasses
import time

from apr_jax.engine.thread import Thread
from apr_jax.reasoning.budget import Budget
from apr_jax.reasoning.program import Append, Fork, Program, Request


@dataclasses.dataclass(eq=False)
class Run:
    """One request on its way.

    Attributes:
      degraded: (thread, reason) for all that did not go as the format wants, in order.
      finish_reason: why the root ended; None while it runs.
      error: what the program raised; the request ended there.
    """

    request: Request
    program: Program
    root: Thread
    budget: Budget
    started_s: float
    first: Append | Fork | None  # what to do once the prompt is prefilled
    ended_s: float = 0.0
    ended: set[int] = dataclasses.field(default_factory=set)  # ids of threads that Finish was said for
    starved: set[int] = dataclasses.field(default_factory=set)  # ids of threads with nothing left to sample
    degraded: list[tuple[Thread, str]] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    num_idle: int = 0  # times in a row that no thread wanted to run and none had gained a token
    num_tokens: int = -1  # of all threads when none wanted to run
    error: Exception | None = None

    @property
    def wall_s(self) -> float:
        return (self.ended_s or time.perf_counter()) - self.started_s
