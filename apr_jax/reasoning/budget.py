"""How many tokens each thread of a request may still add: a tree of limits, the same whatever runs beside it.

A thread's limit bounds four things at once, forced tokens counted: the critical path through it, the tokens
of it and everything below it, its own tokens, and its context. At a fork the children get what is left of the first
(an even share of it, if they follow each other), an even share of the second, and the last as it is; what the join will
force is kept back.
"""

import dataclasses

from apr_jax.engine.thread import Thread
from apr_jax.reasoning.metrics import critical_path, total_tokens
from apr_jax.reasoning.program import Fork, Guards, Spawn

UNLIMITED = 2**31 - 1


def forced_len(fork: Fork) -> int:
    """Tokens that are forced on some child at most; a spawned one's are its prompt."""
    return 0 if isinstance(fork, Spawn) else max(map(len, fork.token_lists))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limit:
    path: int
    total: int
    own: int | None
    context: int = UNLIMITED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rooms:
    """What a thread may still add by each bound of a request that a client may vary."""

    critical_path: int
    total: int
    context: int


class Budget:
    """The limits of one request's threads.

    Args:
      max_path: tokens on the longest chain from the prompt to the end.
      prompt_len: tokens that the root's context begins with.
    """

    def __init__(self, guards: Guards, max_path: int, prompt_len: int = 0):
        self._guards = guards
        self._limits: dict[int, Limit] = {}
        self._first = Limit(
            path=max_path,
            total=guards.max_family_tokens,
            own=guards.max_thread_tokens,
            context=guards.max_context_tokens or UNLIMITED,
        )
        self._prompt_len = prompt_len
        self._to_deal = guards.max_family_tokens
        self._least = self._had = Rooms(critical_path=max_path, total=self._first.total, context=self._first.context)

    @property
    def initial(self) -> int:
        """Tokens that a root may add."""
        first = self._first
        room = min(first.path, first.total, max(0, first.context - self._prompt_len))
        return room if first.own is None else min(room, first.own)

    @property
    def needed(self) -> dict[str, int]:
        """By kind, the smallest bound that is known to change nothing of what has run.

        Every limit of a thread is the request's bound less what was there before it, shared out at forks: with a bound
        that is d smaller, no limit shrinks by more than d. So a run in which every thread had more than d left whenever
        it stopped, or was cancelled, takes the same steps.
        """
        had, least = dataclasses.asdict(self._had), dataclasses.asdict(self._least)
        return {kind: had[kind] - max(0, least[kind] - 1) for kind in had}

    def start(self, root: Thread) -> None:
        self._limits[root.id] = self._first

    def note(self, thread: Thread, forced: int = 0) -> None:
        """Remembers how much the thread has left, `forced` tokens later. One that was cancelled before it had a limit
        has said nothing.
        """
        if thread.id not in self._limits:
            return
        rooms, least = dataclasses.asdict(self._rooms(thread)), dataclasses.asdict(self._least)
        self._least = Rooms(**{kind: min(rooms[kind] - forced, least[kind]) for kind in rooms})

    def room(self, thread: Thread) -> int:
        """Tokens that the thread may still add; below zero where forced tokens went beyond."""
        return self._room(thread, self._limits[thread.id])

    def context_room(self, thread: Thread) -> int:
        """How much the thread's context may still grow."""
        return self._limits[thread.id].context - context_len(thread)

    def _room(self, thread: Thread, limit: Limit) -> int:
        rooms = self._rooms(thread, limit)
        room = min(rooms.critical_path, rooms.total, rooms.context)
        return room if limit.own is None else min(room, limit.own - len(thread.token_ids))

    def _rooms(self, thread: Thread, limit: Limit | None = None) -> Rooms:
        limit = limit or self._limits[thread.id]
        return Rooms(
            critical_path=limit.path - critical_path(thread),
            total=limit.total - total_tokens(thread),
            context=limit.context - context_len(thread),
        )

    def settle(self, root: Thread) -> None:
        """Nothing of the request runs: what it may still add can be dealt to many forks, whichever comes first."""
        self._to_deal = self._first.total - total_tokens(root)

    def share(self, thread: Thread, fork: Fork) -> Limit | None:
        """The limit of each child, or None if some child could not add its forced tokens and one more."""
        limit, kept, closing = self._limits[thread.id], fork.joining_len, fork.closing_len
        if fork.num_dealt:
            limit = dataclasses.replace(limit, total=total_tokens(thread) + self._to_deal)
        left = limit.total - total_tokens(thread) - kept
        is_spawn = isinstance(fork, Spawn)
        start = max(map(len, fork.token_lists)) if is_spawn else context_len(thread) - fork.drop
        context = limit.context - closing
        bounds = [self._guards.max_thread_tokens, None if limit.context == UNLIMITED else limit.context - start]
        own = min((bound - closing for bound in bounds if bound is not None), default=None)
        count = len(fork.token_lists)
        in_a_row = -(-count // (self._guards.max_width or count))  # children that follow each other
        share = Limit(
            path=(limit.path - critical_path(thread) - kept) // in_a_row - closing,
            total=left // (fork.num_dealt or count) - closing,
            own=own,
            context=context,
        )
        needed = 1 + forced_len(fork)
        smallest = min(share.path, share.total, needed if share.own is None else share.own)
        return share if self._room(thread, limit) >= kept and smallest >= needed else None

    def give(self, children: list[Thread], limit: Limit) -> None:
        for child in children:
            self._limits[child.id] = limit


def context_len(thread: Thread) -> int:
    """Tokens that the thread's next one attends to; 0 once its context is given up."""
    return 0 if thread.context is None else thread.context.num_tokens + len(thread.pending)
