"""How many tokens each thread of a request may still add: a tree of limits, the same whatever runs beside it.

A thread's limit bounds three things at once, forced tokens counted: the critical path through it, the tokens
of it and everything below it, and its own tokens. At a fork the children get what is left of the first, and
an even share of the second; what the join will force is kept back from both.
"""

import dataclasses

from apr_jax.engine.thread import Thread
from apr_jax.reasoning.metrics import critical_path, total_tokens
from apr_jax.reasoning.program import Fork, Guards, Spawn


def forced_len(fork: Fork) -> int:
    """Tokens that are forced on some child at most; a spawned one's are its prompt."""
    return 0 if isinstance(fork, Spawn) else max(map(len, fork.token_lists))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limit:
    path: int
    total: int
    own: int | None


class Budget:
    """The limits of one request's threads.

    Args:
      max_path: tokens on the longest chain from the prompt to the end.
    """

    def __init__(self, guards: Guards, max_path: int):
        self._guards = guards
        self._limits: dict[int, Limit] = {}
        self._first = Limit(path=max_path, total=guards.max_family_tokens, own=guards.max_thread_tokens)
        self._to_deal = guards.max_family_tokens

    @property
    def initial(self) -> int:
        """Tokens that a root may add."""
        first = self._first
        return min(first.path, first.total, first.path if first.own is None else first.own)

    def start(self, root: Thread) -> None:
        self._limits[root.id] = self._first

    def room(self, thread: Thread) -> int:
        """Tokens that the thread may still add; below zero where forced tokens went beyond."""
        return self._room(thread, self._limits[thread.id])

    def _room(self, thread: Thread, limit: Limit) -> int:
        room = min(limit.path - critical_path(thread), limit.total - total_tokens(thread))
        return room if limit.own is None else min(room, limit.own - len(thread.token_ids))

    def settle(self, root: Thread) -> None:
        """Nothing of the request runs: what it may still add can be dealt to many forks, whichever comes first."""
        self._to_deal = self._first.total - total_tokens(root)

    def share(self, thread: Thread, fork: Fork) -> Limit | None:
        """The limit of each child, or None if some child could not add its forced tokens and one more."""
        limit, kept, closing = self._limits[thread.id], fork.joining_len, fork.closing_len
        if fork.num_dealt:
            limit = dataclasses.replace(limit, total=total_tokens(thread) + self._to_deal)
        left = limit.total - total_tokens(thread) - kept
        share = Limit(
            path=limit.path - critical_path(thread) - kept - closing,
            total=left // (fork.num_dealt or len(fork.token_lists)) - closing,
            own=None if self._guards.max_thread_tokens is None else self._guards.max_thread_tokens - closing,
        )
        needed = 1 + forced_len(fork)
        smallest = min(share.path, share.total, needed if share.own is None else share.own)
        return share if self._room(thread, limit) >= kept and smallest >= needed else None

    def give(self, children: list[Thread], limit: Limit) -> None:
        for child in children:
            self._limits[child.id] = limit
