"""What a request cost: tokens, critical path, parallelism, pages.

A thread's tokens count, forced or sampled: headers, closers and what follows a join are part of the text.
Prompts do not, neither a spawned child's. With T all tokens of all threads, cancelled ones too, and L the
critical path:

    L(thread) = its own tokens + for each fork: the largest L of its children; or, where only some of them run side by
                side (`Guards.max_width`), the time in which they all do, one token a tick (`engine/spans.py`)
    acceleration ratio = 1 - L / T
    parallel ratio = (tokens of all children + the root's tokens inside blocks, tags included) / T

Children that were not joined count in L as well: the decision for their siblings waited for them. Those that it did
not wait for lose the tokens beyond it before. Children that were forked and not joined yet count as if they were
joined now.

Source: the definitions of ThreadWeaver (Lian et al. 2025, arXiv 2512.07843); those of the sequences are APR's (Pan et
al. 2025, arXiv 2504.15466), whose longest single sequence is `max_context_tokens` and a last token.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from apr_jax.engine.joining import flatten
from apr_jax.engine.spans import makespan
from apr_jax.engine.thread import Thread


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metrics:
    """One request's costs.

    Attributes:
      total_tokens: T. critical_path_tokens: L.
      overshoot_tokens: sampled beyond a decision, then dropped; not part of T.
      num_threads: the root and all descendants, those that were held and never began too.
      peak_pages: unique pages held at most.
      reprefill_tokens: computed again at joins. flush_tokens: fed only so that a segment could be sealed.
      join_s: host seconds in joins.
      max_context_tokens: the longest context that any token attended to.
      sequence_tokens: of all sequences, each thread's counted once, however often it was continued: prompts, also
        those of spawned children (but not of such as took turns and said nothing), T, and texts that joins computed
        again.
      num_children: threads below the root, but for those that only called others (they spawned them).
    """

    total_tokens: int
    overshoot_tokens: int
    critical_path_tokens: int
    acceleration_ratio: float
    parallel_ratio: float
    num_threads: int
    wall_s: float
    peak_pages: int
    reprefill_tokens: int
    flush_tokens: int
    join_s: float
    max_context_tokens: int
    sequence_tokens: int
    num_children: int


def critical_path(thread: Thread) -> int:
    """L: tokens on the longest chain through the thread and its children."""
    return len(thread.token_ids) + joined_path(thread) + forked_path(thread.children)


def joined_path(thread: Thread) -> int:
    """What the thread's joined forks add to its critical path."""
    return sum(forked_path((*record.children, *record.dropped)) for record in thread.joins)


def forked_path(children: Iterable[Thread]) -> int:
    """What all children of one fork add to the critical path of their parent."""
    children = sorted(children, key=lambda child: child.ordinal)
    return makespan(map(critical_path, children), children[0].family.max_width) if children else 0


def descendants(thread: Thread) -> Iterator[Thread]:
    """The thread and everything below it, cancelled threads too."""
    inside = {thread.id}
    for other in thread.family.threads:  # oldest first: a parent comes before its children
        if other is thread or (other.parent is not None and other.parent.id in inside):
            inside.add(other.id)
            yield other


def total_tokens(thread: Thread) -> int:
    """T: tokens of the thread and everything below it."""
    return sum(len(other.token_ids) for other in descendants(thread))


def measure(root: Thread, *, wall_s: float, block_spans: Iterable[tuple[int, int]] = ()) -> Metrics:
    """The metrics of a family.

    Args:
      block_spans: half-open intervals of the root's own tokens that lie inside parallel blocks.
    """
    total, path = total_tokens(root), critical_path(root)
    inside = total - len(root.token_ids) + num_covered(block_spans)
    counters, threads = root.family.counters, root.family.threads
    may_not_begin = root.family.max_width is not None
    prompt_tokens = sum(len(t.prompt_ids) for t in threads if t is root or t.token_ids or not may_not_begin)
    records = [record for thread in threads for record in thread.joins if record.mode == "prefill"]
    again = sum(len(flatten(child)) for record in records for child in record.children[1:])
    callers = {thread.parent.id for thread in threads if thread.prompt_ids and thread.parent is not None}
    return Metrics(
        total_tokens=total,
        overshoot_tokens=counters.overshoot_tokens,
        critical_path_tokens=path,
        acceleration_ratio=1 - path / total if total else 0.0,
        parallel_ratio=inside / total if total else 0.0,
        num_threads=len(threads),
        wall_s=wall_s,
        peak_pages=counters.peak_pages,
        reprefill_tokens=counters.reprefill_tokens,
        flush_tokens=counters.flush_tokens,
        join_s=counters.join_s,
        max_context_tokens=counters.max_context_tokens,
        sequence_tokens=prompt_tokens + total + again,
        num_children=sum(thread is not root and thread.id not in callers for thread in threads),
    )


def num_covered(spans: Iterable[tuple[int, int]]) -> int:
    """How many integers lie in at least one half-open interval."""
    covered, end = 0, 0
    for start, stop in sorted(spans):
        covered += max(0, stop - max(start, end))
        end = max(end, stop)
    return covered


def mean_metrics(metrics: Sequence[Metrics]) -> dict[str, float]:
    """The mean of each metric over requests. The ratios are means of ratios, not ratios of means."""
    names = [field.name for field in dataclasses.fields(Metrics)]
    return {name: sum(getattr(each, name) for each in metrics) / len(metrics) for name in names}
