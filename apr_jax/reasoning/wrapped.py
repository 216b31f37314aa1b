"""Programs around another program, which change one thing of it."""

import dataclasses
from collections.abc import Iterable, Sequence

from apr_jax.config import check
from apr_jax.engine.thread import Stop, Thread
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


class Wrapped(Program):
    """Another program as it is."""

    def __init__(self, program: Program):
        self.name, self.block, self.fork_tags = program.name, program.block, program.fork_tags
        self._program = program

    def start(self, request: Request) -> Append | Fork:
        return self._program.start(request)

    def on_stop(self, thread: Thread, stop: Stop) -> Append | Mark | Fork | Wait | Finish:
        return self._program.on_stop(thread, stop)

    def on_child(
        self, parent: Thread, ended: Sequence[Thread], running: Sequence[Thread]
    ) -> Join | Keep | Cancel | Wait | Finish:
        return self._program.on_child(parent, ended, running)

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


class InTurns(Wrapped):
    """Another program, no more than `max_width` children of whose forks run side by side."""

    def __init__(self, program: Program, max_width: int):
        check(max_width >= 1, f"max_width is {max_width}, must be >= 1")
        super().__init__(program)
        self._max_width = max_width

    def widened(self, guards: Guards) -> Guards:
        narrow = min(self._max_width, guards.max_width or self._max_width)
        return dataclasses.replace(super().widened(guards), max_width=narrow)
