"""The program that never forks: one thread to its stop."""

from collections.abc import Sequence

from apr_jax.engine.thread import Stop, Thread
from apr_jax.reasoning.program import Append, Finish, Join, Program, Request


class SequentialProgram(Program):
    name = "sequential"
    block = None

    def start(self, request: Request) -> Append:
        return Append(sampling=request.sampling)

    def on_stop(self, thread: Thread, stop: Stop) -> Finish:
        return Finish(stop.reason)

    def on_child(self, parent: Thread, ended: Sequence[Thread], running: Sequence[Thread]) -> Join:
        raise AssertionError("a sequential thread has no children")
