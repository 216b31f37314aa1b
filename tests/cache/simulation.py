"""A brute-force model of the cache: every context is a list of what its queries must see.

Device memory is a dict from (page, slot) to a content. A token's content is a hash of itself, its position
and all
that its context saw before: two pages may stand for each other only if their contents are equal, so that a
wrong adoption, a page freed too early or a wrong claim of causality shows as a wrong content.
"""

import dataclasses

import numpy as np
from apr_kernels.plan import validate_plan

from apr_jax.cache import Context, KVCache, PlanBuilder, marked_segments, own_segments
from apr_jax.config import CacheConfig, EngineConfig
from apr_jax.types import OutOfPages

MAX_TAIL_TOKENS = 12
NUM_SLOTS = 64


@dataclasses.dataclass(eq=False)
class Thread:
    """What the model knows of a context.

    Attributes:
      seen: the contents its queries must see, in order.
      tokens: its token ids, while it is plain causal from position 0; None afterwards.
      own_from: how many of `seen` came from the parent.
      marked_from: how many there were at the last mark, or None.
    """

    context: Context
    seen: list[int]
    tokens: list[int] | None
    position: int = 0
    parent: "Thread | None" = None
    own_from: int = 0
    marked_from: int | None = None
    swapped: bool = False


class Simulation:
    """Runs operations on a cache and on the model side by side."""

    def __init__(self, num_pages: int, page_size: int, prefix_cache: bool = True):
        self.config = CacheConfig(page_size=page_size, num_pages=num_pages, prefix_cache=prefix_cache)
        self.page_size = page_size
        self.max_tail_pages = MAX_TAIL_TOKENS // page_size
        self.cache = KVCache(self.config, self.max_tail_pages)
        self.memory: dict[tuple[int, int], int] = {}
        self.threads: list[Thread] = []

    # What the device would do.

    def write(self, context: Context, content: int) -> None:
        tail, at = context.tail, context.tail_len
        assert tail is not None
        self.memory[tail.pages[at // self.page_size], at % self.page_size] = content

    def read(self, context: Context) -> list[int]:
        return [
            self.memory[segment.pages[i // self.page_size], i % self.page_size]
            for segment in context.segments
            for i in range(len(segment.token_ids))
        ]

    def copy_out(self, page_ids: list[int]) -> list[dict[int, int]]:
        return [
            {slot: self.memory[page, slot] for slot in range(self.page_size) if (page, slot) in self.memory}
            for page in page_ids
        ]

    def copy_in(self, page_ids: list[int], data: list[dict[int, int]]) -> None:
        for page, slots in zip(page_ids, data, strict=True):
            for slot in range(self.page_size):
                self.memory.pop((page, slot), None)
            self.memory.update({(page, slot): content for slot, content in slots.items()})

    # Operations. Each takes small integers that choose among what is possible.

    def is_suspended(self, thread: Thread) -> bool:
        return thread.swapped or any(child.parent is thread for child in self.threads)

    def pick(self, choice: int) -> Thread | None:
        able = [thread for thread in self.threads if not self.is_suspended(thread)]
        return able[choice % len(able)] if able else None

    def new(self, choice: int, start: int) -> None:
        if len(self.threads) < 8:
            context = self.cache.new_context(start % 3)
            tokens = [] if start % 3 == 0 else None
            self.threads.append(Thread(context, [], tokens, position=start % 3))

    def match(self, choice: int, length: int) -> None:
        """Looks up what some thread has, cut, and followed by another token."""
        thread = self.pick(choice)
        if thread is None or thread.tokens is None or len(self.threads) >= 8:
            return
        tokens = [*thread.tokens[: length % 40], 1]
        context, matched = self.cache.match_prefix(tokens)
        assert matched <= len(tokens) - 1 and matched % self.page_size == 0
        assert matched == 0 or self.config.prefix_cache
        seen: list[int] = []
        for position, token in enumerate(tokens[:matched]):
            seen.append(hash((token, position, tuple(seen))))
        self.threads.append(Thread(context, seen, tokens[:matched], position=matched))

    def append(self, choice: int, bits: int) -> None:
        if thread := self.pick(choice):
            self.write_tokens(thread, 1 + bits % 13, bits // 13)

    def write_tokens(self, thread: Thread, length: int, bits: int) -> None:
        """Reserves, writes and notes tokens of two kinds, mostly alike: prefixes are to be shared often."""
        context = thread.context
        length = min(length, self.cache.tail_room(context))
        tokens = [bits >> i & 1 for i in range(length)]
        before = self.counts(context)
        needed = self.cache.pages_needed(context, length)
        free = self.cache.num_available
        try:
            self.cache.reserve(context, length)
        except OutOfPages as error:
            assert error.needed == needed > error.available == free
            assert self.counts(context) == before
            return
        assert needed <= free
        for token in tokens:
            content = hash((token, thread.position, tuple(thread.seen)))
            self.write(context, content)
            self.cache.advance(context, [token])
            thread.seen.append(content)
            thread.position += 1
        if thread.tokens is not None:
            thread.tokens += tokens

    def counts(self, context: Context):
        return (
            self.cache.pool.num_free,
            self.cache.num_cached_pages,
            [(segment.id, list(segment.pages), len(segment.token_ids)) for segment in context.segments],
        )

    def rollback(self, choice: int, length: int) -> None:
        thread = self.pick(choice)
        if thread is not None:
            n = length % (thread.context.tail_len + 1)
            self.cache.rollback(thread.context, n)
            thread.position -= n
            del thread.seen[len(thread.seen) - n :]
            if thread.tokens is not None:
                del thread.tokens[len(thread.tokens) - n :]

    def seal(self, choice: int, _: int) -> None:
        if thread := self.pick(choice):
            self.cache.seal(thread.context)
            assert thread.context.tail is None

    def commit(self, choice: int, _: int) -> None:
        if thread := self.pick(choice):
            self.cache.commit_prefix(thread.context)

    def trim(self, choice: int, _: int) -> None:
        if thread := self.pick(choice):
            self.cache.trim(thread.context)

    def mark(self, choice: int, _: int) -> None:
        if thread := self.pick(choice):
            self.cache.mark(thread.context)
            thread.marked_from = len(thread.seen)

    def fork(self, choice: int, bits: int) -> None:
        thread = self.pick(choice)
        n = 1 + bits % 3
        if thread is None or len(self.threads) + n > 10:
            return
        for context in self.cache.fork(thread.context, n):
            tokens = None if thread.tokens is None else list(thread.tokens)
            child = Thread(context, list(thread.seen), tokens, thread.position, thread, len(thread.seen))
            self.threads.append(child)
            self.write_tokens(child, bits % 7, bits >> 3)
            bits //= 5

    def join(self, choice: int, mode: int) -> None:
        """Joins all children of a thread whose children have none and are on the device."""
        parents = {child.parent for child in self.threads if child.parent is not None}
        ready = [
            parent
            for parent in self.threads
            if parent in parents and not parent.swapped and not any(map(self.is_suspended, self.children(parent)))
        ]
        if not ready:
            return
        parent = ready[choice % len(ready)]
        children = self.children(parent)
        if mode % 3 == 2:
            children_joined = [children[choice % len(children)]]
        else:
            children_joined = children
        parts = []
        for child in children_joined:
            self.cache.seal(child.context)
            if mode % 3 == 1:
                parts.append(marked_segments(child.context))
                first = child.own_from if child.marked_from is None else child.marked_from
            else:
                parts.append(own_segments(child.context))
                first = child.own_from
            parent.seen += child.seen[first:]
        position = max(child.position for child in children_joined)
        self.cache.join(parent.context, parts, position)
        parent.position = position
        parent.tokens = children_joined[0].tokens if mode % 3 == 2 else None
        for child in children:
            self.drop(child)

    def children(self, parent: Thread) -> list[Thread]:
        return [thread for thread in self.threads if thread.parent is parent]

    def drop(self, thread: Thread) -> None:
        self.cache.release(thread.context)
        self.threads.remove(thread)

    def release(self, choice: int, _: int) -> None:
        leaves = [thread for thread in self.threads if not self.children(thread)]
        if leaves:
            self.drop(leaves[choice % len(leaves)])

    def swap_out(self, choice: int, mask: int) -> None:
        """Preempts some threads: what they alone read goes to host memory."""
        chosen = [t for i, t in enumerate(self.threads) if i % 4 == mask % 4 and not t.swapped]
        others = {segment for t in self.threads if t not in chosen and not t.swapped for segment in t.context.segments}
        for thread in chosen:
            self.cache.trim(thread.context)
            thread.swapped = True
        segments = [s for t in chosen for s in t.context.segments if s not in others]
        for segment, page_ids in self.cache.swap_out(segments):
            self.cache.finish_swap_out(segment, self.copy_out(page_ids))
            self.cache.check()

    def swap_in(self, choice: int, _: int) -> None:
        swapped = [thread for thread in self.threads if thread.swapped]
        if not swapped:
            return
        thread = swapped[choice % len(swapped)]
        free = self.cache.pool.num_free
        try:
            copies = self.cache.swap_in(thread.context.segments)
        except OutOfPages:
            assert self.cache.pool.num_free == free
            return
        for segment, page_ids in copies:
            self.copy_in(page_ids, segment.host_data)
            self.cache.finish_swap_in(segment)
        thread.swapped = False

    def flush(self, choice: int, _: int) -> None:
        if choice % 8 == 0:
            self.cache.flush_prefix_cache()
            assert self.cache.num_cached_pages == 0

    def plan(self, choice: int, min_shared_tokens: int) -> None:
        """Every (row, visible token) is read exactly once."""
        threads = [thread for thread in self.threads if not thread.swapped]
        threads = [t for t in threads if not any(s.swapped for s in t.context.segments)]
        for thread in threads[: choice % 3]:
            try:
                self.cache.reserve(thread.context, min(5, self.cache.tail_room(thread.context)))
            except OutOfPages:
                break
        order = np.random.default_rng(choice).permutation(len(threads))
        slots = {(7 * i + choice) % NUM_SLOTS: threads[i] for i in order}
        engine_config = EngineConfig(
            max_tail_pages=self.max_tail_pages,
            item_pages=(1, 3, 8)[choice % 3],
            min_shared_tokens=min_shared_tokens % 12,
            max_partials=24,
        )
        builder = PlanBuilder(self.config, engine_config)
        plan = builder.build([(slot, t.context) for slot, t in slots.items()], 12, NUM_SLOTS)
        validate_plan(plan, num_pages=self.config.num_pages, page_size=self.page_size)
        assert plan.num_items in builder.item_buckets(12)
        rows = {slot: [] for slot in slots}
        for w in range(plan.num_items):
            for row in range(*plan.rows[w]):
                rows[int(plan.row_slot[row])] += self.tokens_of_item(plan, w, slots)
        for slot, thread in slots.items():
            assert sorted(rows[slot]) == sorted(thread.seen)
        for slot in set(range(NUM_SLOTS)) - set(slots):
            assert not plan.tail_pages[slot].any()

    def tokens_of_item(self, plan, w: int, slots: dict[int, Thread]) -> list[int]:
        found = []
        for i, page in enumerate(plan.pages[w]):
            fill = int(plan.fills[w, i])
            if plan.tail_slot[w] >= 0:
                tail_len = slots[int(plan.tail_slot[w])].context.tail_len
                fill = min(self.page_size, tail_len - int(plan.tail_offset[w]) - i * self.page_size)
            found += [self.memory[int(page), slot] for slot in range(fill)]
        return found

    OPERATIONS = (
        "new", "match", "append", "append", "append", "append", "rollback", "seal", "commit", "trim", "mark",
        "fork", "fork", "join", "join", "join", "release", "swap_out", "swap_in", "swap_in", "swap_in",
        "flush", "plan",
    )  # fmt: skip

    def run(self, operations: list[tuple[int, int, int]]) -> None:
        """Runs operations, checking the cache and every context after each; then drops everything."""
        for op, a, b in operations:
            getattr(self, self.OPERATIONS[op % len(self.OPERATIONS)])(a, b)
            self.check()
        while self.threads:
            self.release(0, 0)
            self.cache.check()
        self.cache.flush_prefix_cache()
        self.cache.check()
        assert self.cache.pool.num_free == self.cache.pool.total

    def check_tree(self) -> None:
        """What the tree holds for a token path is what plain causal tokens would have written."""
        stack = [(root, start, []) for start, root in self.cache._tree._roots.items()]
        while stack:
            node, position, seen = stack.pop()
            if node.segment is not None:
                assert node.segment.start_position == position
                for i, token in enumerate(node.segment.token_ids):
                    content = hash((token, position, tuple(seen)))
                    page = node.segment.pages[i // self.page_size]
                    assert self.memory[page, i % self.page_size] == content
                    seen = [*seen, content]
                    position += 1
            stack += [(child, position, seen) for child in node.children.values()]

    def check(self) -> None:
        self.cache.check()
        self.check_tree()
        for thread in self.threads:
            assert thread.context.next_position == thread.position
            assert thread.context.num_tokens == len(thread.seen)
            if not any(segment.swapped for segment in thread.context.segments):
                assert self.read(thread.context) == thread.seen
