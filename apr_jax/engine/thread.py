"""Threads and families: one line of reasoning, and a request's whole tree of them. Plain host state."""

import dataclasses
import enum
import hashlib
from typing import Literal

from apr_jax.cache.context import Context
from apr_jax.types import SamplingParams

JoinMode = Literal["stitch", "conclusion", "select", "prefill", "splice"]


class Status(enum.Enum):
    """Where a thread is in its life. Only RUNNING threads hold a slot."""

    WAITING = "waiting"  # has tokens to feed or to sample, waits for a slot or pages
    RUNNING = "running"  # holds a slot
    STOPPED = "stopped"  # reached a stop; whoever drives it decides what comes next
    FORKED = "forked"  # waits for its children
    FINISHED = "finished"  # was released: holds no pages any more
    CANCELLED = "cancelled"  # likewise, before its end


WANTS_TO_RUN = (Status.WAITING, Status.RUNNING)

StopReason = Literal[
    "stop_id", "stop_string", "eos", "length", "context", "pages", "prefilled", "cancelled", "wall_clock", "held"
]


@dataclasses.dataclass(frozen=True)
class Stop:
    """Why a thread stopped.

    Attributes:
      reason: `stop_id`, `eos`: that token was sampled and is the thread's last; `stop_string`: the text holds it;
        `length`: max_new_tokens; `context`: the model's context window; `pages`: a family's bound or the pool;
        `prefilled`: nothing was to be sampled; `wall_clock`: whoever drives it ran out of time; `held`: it has not
        begun, as its siblings run first.
      token_id: the token for `stop_id` and `eos`.
      string: the string for `stop_string`.
    """

    reason: StopReason
    token_id: int | None = None
    string: str | None = None


@dataclasses.dataclass(frozen=True)
class JoinRecord:
    """One join of a thread: its children's text belongs between its own tokens [.., at) and [at, ..).

    Attributes:
      dropped: the fork's other children.
    """

    at: int
    children: tuple["Thread", ...]
    mode: JoinMode
    dropped: tuple["Thread", ...] = ()


@dataclasses.dataclass
class Counters:
    """What a family cost, beside the tokens that its threads hold."""

    prefill_tokens: int = 0  # prompt and forced tokens fed
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    reprefill_tokens: int = 0  # tokens computed again at joins
    flush_tokens: int = 0  # last tokens fed without sampling, so that a segment can be sealed
    overshoot_tokens: int = 0  # sampled beyond a decision, then dropped
    join_s: float = 0.0  # host seconds in joins
    peak_pages: int = 0  # unique pages at most
    max_context_tokens: int = 0  # the longest context any token attended to
    preemptions: int = 0


class Family:
    """A request's root thread and all its descendants, oldest first.

    Attributes:
      max_pages: unique pages that it may hold, within the engine's own bound; None is no bound of its own.
      yields: beyond its first thread it takes no rows but within an even share of all of them.
      max_width: children of one fork that begin with it; None: all. The others are held: they have stopped and said
        nothing. Whoever drives the family lets them go on (`append`, with their forced tokens) as siblings end or wait.
    """

    def __init__(self, family_id: int, seed: int, max_pages: int | None = None):
        self.id = family_id
        self.seed = seed
        self.max_pages = max_pages
        self.yields = False
        self.max_width: int | None = None
        self.threads: list[Thread] = []
        self.counters = Counters()

    @property
    def root(self) -> "Thread":
        return self.threads[0]

    @property
    def live(self) -> "list[Thread]":
        """Threads that still hold a context."""
        return [thread for thread in self.threads if thread.context is not None]


@dataclasses.dataclass(eq=False)
class Thread:
    """One line of reasoning.

    Attributes:
      prompt_ids: the root's prompt; empty for a child.
      token_ids: everything after the prompt or fork, forced and sampled; `sampled` says which, `logprobs` holds
        the model's log-probability of sampled tokens where asked for (nan where forced).
      pending: tokens that have no keys yet, in order; all but the last are fed without sampling.
      path: (fork number of the parent, ordinal) from the root: what the random keys fold in.
      context: what the thread attends to; None once released.
      joins: this thread's joins, in order.
      carried: of a parent: the tokens that its fork left without keys and put before every child's.
      num_to_seal: how many tokens the thread feeds before its tail is sealed: of a child, those that the fork
        carried, so that a join can count them once; of a marked thread, the marker.
      is_flushed: the last token, a stop, has keys though nothing was sampled from it: one of the `flush_tokens`.
      marks: what follows the thread's last token is its conclusion; the cache is told when that token has keys.
      avoided: (place in token_ids, ids that are not sampled there); num_avoided: how often it was turned back so.
    """

    id: int
    family: Family
    parent: "Thread | None"
    path: tuple[tuple[int, int], ...]
    sampling: SamplingParams
    context: Context | None
    start_position: int
    prompt_ids: list[int] = dataclasses.field(default_factory=list)
    token_ids: list[int] = dataclasses.field(default_factory=list)
    sampled: list[bool] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    pending: list[int] = dataclasses.field(default_factory=list)
    children: "list[Thread]" = dataclasses.field(default_factory=list)
    joins: list[JoinRecord] = dataclasses.field(default_factory=list)
    status: Status = Status.WAITING
    stop: Stop | None = None
    slot: int | None = None
    carried: list[int] = dataclasses.field(default_factory=list)
    num_to_seal: int = 0
    marks: bool = False
    is_flushed: bool = False
    num_forks: int = 0
    num_sampled: int = 0  # over the thread's whole life; what the random keys count
    budget: int = 0  # tokens it may still sample before it stops with `length`
    sampled_since: int = 0  # first index of token_ids that stop strings are matched from
    avoided: tuple[int, tuple[int, ...]] = (0, ())
    num_avoided: int = 0

    @property
    def ordinal(self) -> int:
        """A child's place in its fork."""
        return self.path[-1][1]

    @property
    def is_done(self) -> bool:
        return self.status in (Status.FINISHED, Status.CANCELLED)

    @property
    def is_held(self) -> bool:
        """Whether it has not begun, as siblings run first (`Family.max_width`)."""
        return self.status is Status.STOPPED and self.stop == Stop("held")

    @property
    def avoided_ids(self) -> tuple[int, ...]:
        """Token ids that must not come next."""
        place, ids = self.avoided
        return ids if place == len(self.token_ids) else ()

    def key(self) -> tuple[int, int]:
        """The thread's random key, two 32-bit words: a hash of the request's seed and the path from the root."""
        digest = hashlib.blake2b(repr((self.family.seed, self.path)).encode(), digest_size=8).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")

    def visible_ids(self) -> list[int]:
        """Token ids of the thread's own context with its pending tokens: what penalties count."""
        assert self.context is not None
        ids = [token for segment in self.context.segments for token in segment.token_ids]
        return ids + self.pending

    def __repr__(self) -> str:
        return f"Thread({self.id}, {self.status.value}, tokens={len(self.token_ids)}, pending={len(self.pending)})"
