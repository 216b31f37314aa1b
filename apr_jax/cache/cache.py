"""The host side of the paged cache: how contexts begin, grow, fork, join and end.

    context.segments  [ radix node | radix node | remainder | ... sealed ... | open tail ]
    token positions    [0 ......... consecutive while causal ........... next_position)

Who holds which pages, and where they are, is the ledger's.
"""

from collections.abc import Sequence

from apr_jax.cache.context import Context, Segment
from apr_jax.cache.ledger import Ledger, resolve
from apr_jax.cache.radix import Node
from apr_jax.config import CacheConfig
from apr_jax.types import OutOfPages


class KVCache(Ledger):
    """Contexts over one page pool, with a prefix cache. Host bookkeeping only: no device array is held.

    Args:
      config: page size, number of pages, whether prefixes are cached.
      max_tail_pages: M, the most pages an open tail may have.
    """

    def __init__(self, config: CacheConfig, max_tail_pages: int):
        if max_tail_pages < 1:
            raise ValueError(f"max_tail_pages is {max_tail_pages}, must be >= 1")
        super().__init__(config)
        self.max_tail_pages = max_tail_pages
        self.weights_version = 0

    # Making and dropping contexts.

    def new_context(self, start_position: int = 0) -> Context:
        """Returns an empty context whose first token will have start_position."""
        if start_position < 0:
            raise ValueError(f"start_position is {start_position}, must be >= 0")
        context = Context(start_position, start_position, weights_version=self.weights_version)
        self._contexts[id(context)] = context
        return context

    def match_prefix(self, token_ids: Sequence[int]) -> tuple[Context, int]:
        """Returns a new context holding the cached pages token_ids begins with, and how many tokens that is.

        At most len(token_ids) - 1: one token is left to feed.
        """
        context = self.new_context()
        if not self.config.prefix_cache:
            return context, 0
        for node in self._tree.walk(self._tree.root(0), token_ids[: max(0, len(token_ids) - 1)]):
            assert node.segment is not None
            self._hold(context, node.segment)
        context.next_position = context.num_tokens
        return context, context.next_position

    def fork(self, context: Context, n: int) -> list[Context]:
        """Seals the context's tail and returns n contexts that go on from it. Nothing is copied."""
        if n < 1:
            raise ValueError(f"a fork into {n} children, must be >= 1")
        self.seal(context)
        children = []
        for _ in range(n):
            child = self.new_context(context.start_position)
            for segment in context.segments:
                self._hold(child, segment)
            child.next_position = context.next_position
            child.causal = context.causal
            child.weights_version = context.weights_version
            child.fork_index = len(child.segments)
            children.append(child)
        return children

    def join(self, parent: Context, parts: Sequence[Sequence[Segment]], next_position: int) -> None:
        """Appends sealed segments, sequence by sequence, to the parent's context. Nothing is copied.

        Args:
          parent: its tail is sealed; the next one starts at next_position.
          parts: for each child the segments wanted, in order. A segment may come in several of them.
          next_position: of the parent's next token.

        Raises:
          ValueError: a segment is open; nothing has changed.
        """
        wanted = [segment for part in parts for segment in part if segment.token_ids]
        for segment in wanted:
            if not segment.sealed:
                raise ValueError(f"segment {segment.id} is open: seal a child before it is joined")
        self.seal(parent)
        held = {segment.id for segment in parent.segments}
        for segment in resolve(wanted):
            held.add(segment.id)
            parent.causal = parent.causal and segment.previous_id == _last_id(parent)
            self._hold(parent, segment)
            node = segment.node
            above = None if node is None else node.parent.segment
            if node is not None and above is not None and above.id not in held:
                # A conclusion without what led to it: in the tree it would keep that from being evicted.
                self._tree.detach(node)
        end = parent.segments[-1].end_position if parent.segments else parent.start_position
        parent.causal = parent.causal and next_position == end
        parent.next_position = next_position

    def release(self, context: Context) -> None:
        """Drops the context's references; it must not be used again. Raises ValueError if it is not held."""
        if id(context) not in self._contexts:
            raise ValueError("the context is not held: released twice, or of another cache")
        del self._contexts[id(context)]
        for segment in context.segments:
            self._drop(segment)
        context.segments = []

    # The tail.

    def tail_room(self, context: Context) -> int:
        """Tokens that fit before the tail must be sealed; a full tail counts as sealed."""
        capacity = self.max_tail_pages * self.page_size
        room = capacity - context.tail_len
        return room if room > 0 else capacity

    def pages_needed(self, context: Context, num_tokens: int) -> int:
        """Pages to be taken so that num_tokens more fit, over as many tails as that needs."""
        tail = context.tail
        have = 0 if tail is None else len(tail.pages)
        return max(0, -(-(context.tail_len + num_tokens) // self.page_size) - have)

    def reserve(self, context: Context, num_tokens: int) -> None:
        """Gives the tail pages for num_tokens more. A tail that is full at its largest size is sealed first.

        Raises:
          ValueError: num_tokens exceeds `tail_room`.
          OutOfPages: not enough pages, even after eviction; nothing has changed.
        """
        if num_tokens > self.tail_room(context):
            raise ValueError(f"{num_tokens} tokens to reserve, the tail has room for {self.tail_room(context)}")
        if num_tokens <= 0:
            return
        assert not any(segment.swapped for segment in context.segments), "a context in host memory cannot grow"
        needed = self.pages_needed(context, num_tokens)
        if needed > self.pool.num_free and needed > self.num_available:
            raise OutOfPages(needed, self.num_available)
        if context.tail_len == self.max_tail_pages * self.page_size:
            self.seal(context)
        tail = context.tail
        if tail is None:
            tail = Segment(start_position=context.next_position, previous_id=_last_id(context))
            self._hold(context, tail)
        tail.pages.extend(self._allocate(needed))

    def advance(self, context: Context, token_ids: Sequence[int]) -> None:
        """Notes that token_ids were written, at consecutive positions, at the tail's end.

        Raises:
          ValueError: their pages are not reserved.
        """
        tail = context.tail
        room = 0 if tail is None else len(tail.pages) * self.page_size - len(tail.token_ids)
        if len(token_ids) > room:
            raise ValueError(f"{len(token_ids)} tokens written, {room} reserved")
        if tail is not None:
            tail.token_ids.extend(int(token) for token in token_ids)
            context.next_position += len(token_ids)

    def rollback(self, context: Context, n: int) -> None:
        """Shortens the open tail by n tokens; its pages stay reserved. Raises ValueError beyond the tail."""
        if not 0 <= n <= context.tail_len:
            raise ValueError(f"a rollback of {n} tokens, the open tail has {context.tail_len}")
        if n:
            del context.segments[-1].token_ids[-n:]
            context.next_position -= n

    def drop_last(self, context: Context) -> list[int]:
        """Gives up the context's last segment, a sealed one of its own; returns its tokens, which have no keys now."""
        segment = context.segments[-1]
        assert segment.sealed and len(context.segments) > context.fork_index, segment
        assert segment.end_position == context.next_position, "what was joined cannot be taken back"
        context.segments.pop()
        if context.mark_index is not None:
            context.mark_index = min(context.mark_index, len(context.segments))
        context.next_position = segment.start_position
        token_ids = list(segment.token_ids)
        self._drop(segment)
        return token_ids

    def trim(self, context: Context) -> None:
        """Frees the tail's pages beyond those in use; a tail without tokens goes away."""
        tail = context.tail
        if tail is None or (tail.swapped and tail.token_ids):
            return
        used = -(-len(tail.token_ids) // self.page_size)
        for page in tail.pages[used:]:
            self.pool.release(page)
        del tail.pages[used:]
        if used == 0:
            context.segments.pop()
            self._drop(tail)

    def seal(self, context: Context) -> None:
        """Ends the tail. Whole pages of a plain causal context go to the prefix cache."""
        self.trim(context)
        self.commit_prefix(context)
        tail = context.tail
        if tail is not None:
            tail.sealed = True

    def mark(self, context: Context) -> None:
        """Seals the tail: what follows is the span that a `conclusion` join keeps."""
        self.seal(context)
        context.mark_index = len(context.segments)

    # The prefix cache.

    def commit_prefix(self, context: Context) -> None:
        """Seals the tail's whole pages into the tree; the remainder stays the open tail, which may go away.

        Where the tree already holds them, the context takes the tree's segments and frees its own pages. Does
        nothing for a context that is not plain causal, that follows a segment outside the tree, or of older
        weights.
        """
        tail = context.tail
        if tail is None or tail.swapped or not self.config.prefix_cache:
            return
        if not context.causal or context.weights_version != self.weights_version:
            return
        node = self._end_node(context)
        num_pages = len(tail.token_ids) // self.page_size
        if node is None or num_pages == 0:
            return
        token_ids, pages = tail.token_ids[: num_pages * self.page_size], tail.pages[:num_pages]
        del tail.token_ids[: len(token_ids)], tail.pages[:num_pages]
        tail.start_position += len(token_ids)
        context.segments.pop()
        for held in self._tree.walk(node, token_ids):  # adopt what the tree holds
            node = held
            assert node.segment is not None
            self._hold(context, node.segment)
            adopted = len(node.segment.pages)
            for page in pages[:adopted]:
                self.pool.release(page)
            pages, token_ids = pages[adopted:], token_ids[adopted * self.page_size :]
        if pages:
            position = tail.start_position - len(token_ids)
            segment = Segment(position, _last_id(context), pages=pages, token_ids=token_ids, sealed=True)
            self._hold(context, segment)
            self._tree.insert(node, segment)
        tail.previous_id = _last_id(context)
        if tail.pages:
            context.segments.append(tail)
        else:
            self._drop(tail)

    def flush_prefix_cache(self) -> None:
        """Empties the tree, as after a change of weights; contexts of before never enter it again."""
        self._tree.clear()
        self.weights_version += 1

    # Inside.

    def _end_node(self, context: Context) -> Node | None:
        """The tree's node that the segments before the tail end at; None if they leave the tree."""
        before = context.segments[:-1]
        return before[-1].node if before else self._tree.root(context.start_position)


def _last_id(context: Context) -> int | None:
    return context.segments[-1].id if context.segments else None
