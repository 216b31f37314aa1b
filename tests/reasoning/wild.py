"""A program that does at random whatever programs may do: what metrics and traces must be right for."""

import hashlib
import random
from collections.abc import Sequence

from apr_jax.engine.thread import Status, Stop, Thread
from apr_jax.reasoning.deciding import All, Deadline, Deciding, Quorum, When, first
from apr_jax.reasoning.program import (
    Append,
    Cancel,
    Finish,
    Fork,
    Join,
    Keep,
    Mark,
    Program,
    Request,
    Spawn,
    Wait,
)
from apr_jax.types import SamplingParams

STOP_IDS = (1, 2, 3)
LETTERS = range(4, 30)
MODES = ("stitch", "conclusion", "select", "prefill", "splice")


def say_anything(thread: Thread, ids: list[int]) -> int:
    """A script: the next token depends on the request, the thread's path and its length."""
    said = repr((thread.family.seed, thread.path, thread.num_sampled + len(ids) - len(thread.token_ids)))
    digest = hashlib.blake2b(said.encode(), digest_size=2).digest()
    return STOP_IDS[digest[1] % 3] if digest[0] < 20 else LETTERS[digest[1] % len(LETTERS)]


class Wild(Program):
    """Serves one request."""

    name = "wild"
    block = None

    def __init__(self, seed: int, max_depth: int = 3):
        self.rng = random.Random(seed)
        self.max_depth = max_depth

    def start(self, request: Request) -> Append | Fork:
        return Append(self._ids(0, 2)) if self.rng.random() < 0.8 else Fork([self._ids(1, 4)] * 3, self._params())

    def on_stop(self, thread: Thread, stop: Stop) -> Append | Mark | Fork | Finish:
        rng, may_resample = self.rng, bool(thread.pending) or thread.context.tail_len > 0
        if stop.reason in ("pages", "context", "eos") or thread.marks or rng.random() < 0.3:
            return Finish(stop.reason)
        own = len(thread.token_ids) - (thread.joins[-1].at if thread.joins else 0)
        drop = min(own, rng.choice([0, 0, 1, 2, 9]))
        draw = rng.random()
        if draw < 0.25 and may_resample:
            return Mark(self._params()) if thread.parent is not None and draw < 0.12 else Append((), self._params())
        if draw < 0.4:
            return Append(self._ids(1, 6), self._params(), drop)
        if len(thread.path) >= self.max_depth:
            return Finish(stop.reason)
        count = rng.randint(1, 4)
        if draw < 0.5:
            return Spawn([self._ids(1, 9) for _ in range(count)], self._params())
        if draw < 0.7 and may_resample:
            return Fork([self._ids(0, 3) for _ in range(count)], self._params(), carry=True)
        lists = [self._ids(1, 5) for _ in range(count)]
        return Fork(lists, [self._params() for _ in lists], drop=drop)

    def on_child(
        self, parent: Thread, ended: Sequence[Thread], running: Sequence[Thread]
    ) -> Join | Keep | Cancel | Wait | Finish:
        rng = self.rng
        if running and rng.random() < 0.95:
            return Wait()
        if running and rng.random() < 0.5:
            return Cancel([rng.choice(list(running))])
        if running and ended:
            return Keep(ended, rng.choice([None, 3, 12]))
        alive = [child for child in parent.children if child.status is Status.STOPPED and child in ended]
        mode = "splice" if any(child.prompt_ids for child in parent.children) else rng.choice(MODES)
        wanted = [child for child in alive if rng.random() < 0.8]
        tokens = self._ids(1, 6)
        if mode == "select":
            wanted = wanted[:1]
            sealed = wanted and not wanted[0].pending and wanted[0].context.tail_len == 0
            if rng.random() < 0.5 and not sealed and (wanted or parent.carried):
                tokens = []
        return Join(wanted, mode, tokens, self._params())

    def _ids(self, low: int, high: int) -> list[int]:
        return [self.rng.choice(LETTERS) for _ in range(self.rng.randint(low, high))]

    def _params(self) -> SamplingParams:
        rng = self.rng
        stops = tuple(token for token in STOP_IDS if rng.random() < 0.5)
        strings = ("\x09\x0a",) if rng.random() < 0.2 else ()
        return SamplingParams(max_new_tokens=rng.choice([0, 1, 3, 8, 20, 40]), stop_ids=stops, stop=strings)


def wild_program(seed: int) -> Program:
    """A wild program, whose joins happen at a time of their own in most cases."""
    rng = random.Random(-seed)
    accept = [None, lambda child: len(child.token_ids) % 2 == 0][rng.randint(0, 1)]
    times: list[When | None] = [None, All(), first(accept), first(accept, arrival=True)]
    times += [Quorum(count=2, accept=accept), Deadline(rng.choice([3, 15]))]
    when = rng.choice(times)
    return Wild(seed) if when is None else Deciding(Wild(seed), when)
