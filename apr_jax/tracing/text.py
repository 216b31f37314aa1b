"""What threads said, and which of them the critical path leads through."""

from array import array
from collections.abc import Callable, Sequence
from typing import Any

from apr_jax.engine.spans import spans
from apr_jax.tracing.trace import ThreadTrace


class Transcript:
    """A thread's tokens with a flag each, and what stands between them."""

    def __init__(self) -> None:
        self._ids = array("i")
        self._sampled = bytearray()
        self._placed: list[tuple[int, list[Any]]] = []  # (tokens before, what)
        self._left_out = 0

    def say(self, token_ids: Sequence[int], sampled: Sequence[bool], room: int) -> None:
        """Adds tokens, as many as there is room for; the others are only counted."""
        kept = 0 if self._left_out else min(room, len(token_ids))
        self._ids.extend(token_ids[:kept])
        self._sampled.extend(sampled[:kept])
        self._left_out += len(token_ids) - kept

    def rewind(self, count: int) -> int:
        """Takes the last tokens back; returns how many of these were sampled (of those left out: all)."""
        unheard = min(count, self._left_out)
        self._left_out -= unheard
        if count == unheard:
            return count
        lost = unheard + sum(self._sampled[unheard - count :])
        del self._ids[unheard - count :], self._sampled[unheard - count :]
        return lost

    def place(self, what: list[Any]) -> None:
        self._placed.append((len(self._ids), what))

    def pieces(self, decode: Callable[[Sequence[int]], str]) -> list[list[Any]]:
        """Runs of forced and of sampled text, with what was placed between them."""
        pieces: list[list[Any]] = []
        at = 0
        for end, what in [*self._placed, (len(self._ids), [])]:
            end = min(end, len(self._ids))
            while at < end:
                flag = self._sampled[at]
                until = self._sampled.find(1 - flag, at, end)
                until = end if until < 0 else until
                pieces.append(["sampled" if flag else "forced", decode(list(self._ids[at:until]))])
                at = until
            if what:
                pieces.append(what)
        if self._left_out:
            pieces.append(["left out", f"{self._left_out:,} tokens"])
        return pieces


def critical_path(threads: Sequence[ThreadTrace], roots: Sequence[int]) -> None:
    """Fills in `critical_path` and `on_path`: a thread's own tokens, and of each fork the child that ends last, with
    those that ran in its row before it.

    Args:
      threads: parents before their children.
    """
    waited_for: list[list[int]] = [[] for _ in threads]
    for thread in reversed(threads):
        thread.critical_path, thread.on_path = thread.num_tokens, False
        for fork in filter(lambda fork: fork.children, thread.forks):
            found = spans([(threads[child].critical_path, False) for child in fork.children], fork.max_width)
            last = max(found, key=lambda span: span.end)
            thread.critical_path += last.end
            row = [(i, s) for i, s in zip(fork.children, found, strict=True) if s.row == last.row]
            waited_for[thread.id] += [child for child, span in row if span == last or span.end > span.start]
    on_path = list(roots)
    while on_path:
        thread = threads[on_path.pop()]
        thread.on_path = True
        on_path += waited_for[thread.id]
