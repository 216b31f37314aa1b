"""A family's metrics from the engine's events alone, by brute force: nothing of threads, contexts or counters is read.

Threads are replayed as lists of tokens with forks between them; the critical path is the number of ticks of a clock
under which every thread that may go on says one token a tick; pages are sets of page ids; what is computed again, and
how long contexts are, follows from which tokens had keys when.
"""

import dataclasses
from collections.abc import Sequence

from apr_jax.engine import events


class Node:
    """A thread as its events tell it.

    Attributes:
      items: its tokens, and between them lists of the children that it forked into.
      unfed: tokens without keys that it has to feed. base: what it saw when it began; seen: what it sees now, in
        tokens that have keys; marked: what it saw at its last mark.
      carried: what its fork left unfed to each child.
    """

    def __init__(self, parent: "Node | None", base: int, unfed: int, prompt_len: int):
        self.parent = parent
        self.items: list[int | list[Node]] = []
        self.joined: list[tuple[int, list[Node], str]] = []  # (tokens before, children, mode)
        self.children: list[Node] = []
        self.base, self.seen, self.unfed, self.prompt_len = base, base, unfed, prompt_len
        self.marked = base
        self.carried = 0
        self.flushed = False
        self.ended = self.called = False
        self.max_width: int | None = None
        self.segments: tuple[events.SegmentState, ...] = ()

    @property
    def tokens(self) -> list[int]:
        return [item for item in self.items if isinstance(item, int)]

    def lose(self, count: int) -> None:
        """Takes back the last tokens, wherever forks stand between them."""
        at = len(self.items)
        while count:
            at -= 1
            if isinstance(self.items[at], int):
                del self.items[at]
                count -= 1

    def text(self) -> int:
        """Tokens of the thread with those that its joins put between them."""
        return len(self.tokens) + sum(
            child.text() for _, children, mode in self.joined if mode != "splice" for child in children
        )


class Recount:
    """Listens to an engine that `tells_contexts`, and recounts one family.

    Attributes:
      total_tokens, ...: as `Metrics` names them.
    """

    def __init__(self, family_id: int):
        self.family_id = family_id
        self.nodes: dict[int, Node] = {}
        self.overshoot_tokens = self.reprefill_tokens = self.flush_tokens = 0
        self.peak_pages = self.max_context_tokens = 0
        self.join_s = 0.0
        self._lost_keys = 0  # by the last event, if it was that

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, events.StepEvent):
            self._count_pages()
        elif event.family_id == self.family_id:
            name = f"_{type(event).__name__}"
            if hasattr(self, name):
                getattr(self, name)(self.nodes.get(event.thread_id), event)

    # What the events mean.

    def _SubmitEvent(self, _, event: events.SubmitEvent) -> None:
        self.nodes[event.thread_id] = Node(None, 0, len(event.prompt_ids), len(event.prompt_ids))

    def _TokenEvent(self, node: Node, event: events.TokenEvent) -> None:
        node.items += event.token_ids
        node.unfed += len(event.token_ids)
        node.flushed = False
        self.overshoot_tokens += event.num_dropped
        self._lost_keys = 0

    def _KeysEvent(self, node: Node, event: events.KeysEvent) -> None:
        count = event.num_tokens
        node.seen += count
        node.unfed -= count
        if event.reason == "unfed":
            self.flush_tokens -= node.flushed
            node.flushed = False
            self.reprefill_tokens += -count - 1  # of a whole segment all but the last, which is sampled from
        elif event.reason == "dropped":
            self._lost_keys = -count
            node.marked = min(node.marked, node.seen)
        elif event.reason == "flush":
            self.flush_tokens += count
            node.flushed = node.unfed == 0
        if event.reason in ("prefill", "decode", "flush"):
            self.max_context_tokens = max(self.max_context_tokens, node.seen)

    def _MarkEvent(self, node: Node, _) -> None:
        node.marked = node.seen

    def _RewindEvent(self, node: Node, event: events.RewindEvent) -> None:
        self.overshoot_tokens += event.num_tokens
        node.lose(event.num_tokens)
        if not node.ended:  # else only its record is shortened
            had_none = min(event.num_tokens, node.unfed - self._lost_keys)
            self.reprefill_tokens += self._lost_keys - (event.num_tokens - had_none)
            node.unfed -= event.num_tokens
            node.flushed = False
        self._lost_keys = 0

    def _StopEvent(self, node: Node, event: events.StopEvent) -> None:
        if event.reason == "stop_id" and node.unfed == 0:
            self.flush_tokens += 1
            node.flushed = True

    def _ForkEvent(self, node: Node, event: events.ForkEvent) -> None:
        spawned = bool(event.prompts)
        node.carried = 0 if spawned else node.unfed
        lengths = [len(prompt) for prompt in event.prompts] or [0] * len(event.child_ids)
        node.called = node.called or spawned
        node.max_width = event.max_width
        node.children = [Node(node, 0 if spawned else node.seen, n or node.carried, n) for n in lengths]
        node.items.append(node.children)
        if not spawned:
            node.unfed = 0
        self.nodes |= zip(event.child_ids, node.children, strict=True)

    def _JoinEvent(self, node: Node, event: events.JoinEvent) -> None:
        children = [self.nodes[i] for i in event.child_ids]
        taken = {"splice": [], "prefill": children[:1]}.get(event.mode, children)
        for number, child in enumerate(taken):
            carried = node.carried if child.seen > child.base else 0
            gained = child.seen - child.base
            if event.mode == "conclusion" and child.marked > child.base:
                gained = carried + child.seen - max(child.marked, child.base + carried)
            node.seen += gained - (carried if number else 0)
        node.unfed += sum(child.unfed for child in taken) if taken else node.carried
        if event.mode == "prefill":
            again = sum(child.text() for child in children[1:])
            node.unfed += again
            self.reprefill_tokens += again
        node.carried, node.flushed, node.children = 0, False, []
        node.joined.append((len(node.tokens), children, event.mode))
        self.join_s += event.seconds

    def _FinishEvent(self, node: Node, _) -> None:
        node.ended = True

    def _ContextEvent(self, node: Node, event: events.ContextEvent) -> None:
        node.segments = event.segments

    def _count_pages(self) -> None:
        pages: set[tuple[str, int, int]] = set()
        for node in self.nodes.values():
            if not node.ended:
                for segment in node.segments:
                    pages |= {("device", page, 0) for page in segment.page_ids}
                    if not segment.page_ids:
                        pages |= {("host", segment.id, i) for i in range(segment.num_pages)}
        self.peak_pages = max(self.peak_pages, len(pages))

    # What follows from them.

    @property
    def root(self) -> Node:
        return next(iter(self.nodes.values()))

    @property
    def num_threads(self) -> int:
        return len(self.nodes)

    @property
    def num_children(self) -> int:
        return sum(node is not self.root and not node.called for node in self.nodes.values())

    @property
    def sequence_tokens(self) -> int:
        began = [n for n in self.nodes.values() if n.parent is None or n.parent.max_width is None or n.tokens]
        prompts = sum(node.prompt_len for node in began)
        joined = [(children, mode) for node in self.nodes.values() for _, children, mode in node.joined]
        return (
            prompts
            + self.total_tokens
            + sum(c.text() for group, mode in joined if mode == "prefill" for c in group[1:])
        )

    @property
    def total_tokens(self) -> int:
        return sum(len(node.tokens) for node in self.nodes.values())

    @property
    def critical_path_tokens(self) -> int:
        """Ticks until the root is done, if every thread that may go on says one token a tick."""
        at = {self.root: 0}  # the item that each thread that has begun comes to next
        for ticks in range(self.total_tokens + 1):
            moved = True
            while moved:  # forks and joins take no time
                moved = False
                for node, i in list(at.items()):
                    children = node.items[i] if i < len(node.items) else None
                    if isinstance(children, list):
                        going = [c for c in children if c in at and at[c] < len(c.items)]
                        held = [c for c in children if c not in at]
                        if held and len(going) < (node.max_width or len(children)):
                            at[held[0]] = 0
                            moved = True
                        elif not held and not going:
                            at[node], moved = i + 1, True
            going = [node for node, i in at.items() if i < len(node.items) and isinstance(node.items[i], int)]
            if not going:
                return ticks
            for node in going:
                at[node] += 1
        raise AssertionError("the clock never stops")

    @property
    def acceleration_ratio(self) -> float:
        return 1 - self.critical_path_tokens / self.total_tokens if self.total_tokens else 0.0

    def parallel_ratio(self, decode, block: tuple[str, str] | None) -> float:
        """Everything but what the root says outside of blocks, letter by letter."""
        total = self.total_tokens
        outside = set(range(len(self.root.tokens)))
        if block is not None:
            bounds = [0, *(at for at, _, _ in self.root.joined), len(self.root.tokens)]
            for start, at, stop in zip(bounds, bounds[1:], bounds[2:], strict=False):
                outside -= set(range(_opened(self.root.tokens[start:at], decode, block[0], start), at))
                outside -= set(range(at, _closed(self.root.tokens[at:stop], decode, block[1], at)))
        return 1 - len(outside) / total if total else 0.0


def _opened(ids: Sequence[int], decode, tag: str, offset: int) -> int:
    """The token in which the last opening tag begins; where there is none, the end."""
    for i in reversed(range(len(ids))):
        if tag in decode(list(ids[i:])):
            return offset + i
    return offset + len(ids)


def _closed(ids: Sequence[int], decode, tag: str, offset: int) -> int:
    """One after the token in which the first closing tag ends; where there is none, the end."""
    for i in range(len(ids)):
        if tag in decode(list(ids[: i + 1])):
            return offset + i + 1
    return offset + len(ids)


def assert_agrees(recount: Recount, metrics, decode, block: tuple[str, str] | None) -> None:
    """Every field of `metrics` but the wall clock, which is no matter of events."""
    told = dataclasses.asdict(metrics)
    counted = {name: getattr(recount, name) for name in told if name not in ("wall_s", "parallel_ratio")}
    counted["parallel_ratio"] = recount.parallel_ratio(decode, block)
    for name, value in counted.items():
        assert abs(told[name] - value) < 1e-9, f"{name}: {told[name]}, recounted {value}"
