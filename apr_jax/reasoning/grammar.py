"""Grammars: formats in which the model itself writes when to fork. A grammar is data; one program reads all.

... <Parallel><Goal><Outline>1: ...</Outline><Outline>2: ...</Outline></Goal>  the model, to the trigger
    <Path>1: ...</Path>   <Path>2: ...</Path>                                  one thread an outline
<Conclusion>...</Conclusion></Parallel> ...                                    the model, after the join
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from apr_jax.config import check
from apr_jax.engine.thread import JoinMode, Stop, Thread
from apr_jax.reasoning.program import Append, Finish, Fork, Join, Mark, Program, Request, Wait
from apr_jax.tokenizers import Tokenizer
from apr_jax.types import SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grammar:
    """One format. Tags may be one token each or several: the first kind stops by id, the second by string.

    Attributes:
      block: the tags around all that belongs to one fork, for metrics and answers.
      plan: the tag that opens the list of outlines.
      trigger: where the model has written this, its thread forks.
      outline: a pattern for one outline in the plan; group 1 is the label. None: there is no plan, and every
        fork has num_paths children, labelled 1, 2, ...
      header: forced at the start of each child; `{label}` is its label.
      closer: a child ends where it has written this.
      after_join: forced when the thread goes on.
      join: what the thread's context becomes (`stitch`, `conclusion`, `prefill`).
      nested: whether children may fork; if not, a trigger inside them is plain text.
      conclusion_marker: in a child, what follows it is its conclusion, the span that a `conclusion` join
        keeps.
      child_sampling: sampling parameters that differ inside children.
    """

    name: str
    block: tuple[str, str]
    plan: str
    trigger: str
    outline: str | None
    num_paths: int = 0
    header: str
    closer: str
    after_join: str
    join: JoinMode = "stitch"
    nested: bool = True
    conclusion_marker: str | None = None
    child_sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check(
            self.join in ("stitch", "conclusion", "prefill"),
            f"join is {self.join!r}, grammars know no such join",
        )
        for name in ("trigger", "header", "closer", "after_join"):
            check(bool(getattr(self, name)), f"{name} of grammar {self.name!r} is empty")
        check(
            (self.outline is None) == (self.num_paths > 0),
            "either outline or num_paths says how many children",
        )


class GrammarProgram(Program):
    """Follows a grammar. Holds no state: all that it needs to know stands in the threads' tokens.

    What does not follow the grammar degrades, with a reason:
      - no outline, or a trigger without its plan: the thread goes on in plain text;
      - an outline twice, or one whose label has no tokens: dropped;
      - a child that ends without its closer (budget, end of sequence, pages): gets the closer and is joined;
      - a closer outside of a child, or a fork that is refused: plain text.
    """

    def __init__(self, grammar: Grammar, tokenizer: Tokenizer):
        self.grammar = grammar
        self.name = grammar.name
        self.block = grammar.block
        self._tokenizer = tokenizer
        self._closer = tokenizer.encode(grammar.closer, continuation=True)
        self._after_join = tokenizer.encode(grammar.after_join, continuation=True)
        tags = [grammar.trigger, grammar.closer, grammar.conclusion_marker]
        self._tag_ids = {tag: tokenizer.token_id(tag) for tag in tags if tag is not None}

    def start(self, request: Request) -> Append:
        return Append(sampling=self._with_stops(request.sampling, [self.grammar.trigger, self.grammar.closer]))

    def on_stop(self, thread: Thread, stop: Stop) -> Append | Mark | Fork | Finish:
        grammar, is_child = self.grammar, thread.parent is not None
        tag = self._tag(stop)
        if tag == grammar.trigger:
            return self._fork(thread)
        if tag == grammar.closer:
            return Finish("closed") if is_child else Append(degraded=(f"{tag} outside of a thread",))
        if tag is not None:
            return Mark()
        if not is_child or self._is_closed(thread):
            return Finish(stop.reason)
        closing = dataclasses.replace(thread.sampling, max_new_tokens=0)
        reason = f"ended without {grammar.closer} ({stop.reason})"
        return Append(self._closer, closing, degraded=(reason,))

    def on_child(self, parent: Thread, ended: Sequence[Thread], running: Sequence[Thread]) -> Join | Wait:
        if running:
            return Wait()
        unmarked = ()
        if self.grammar.join == "conclusion":
            unmarked = tuple(
                f"child {ordinal} has no conclusion and is joined whole"
                for ordinal, child in enumerate(ended, 1)
                if child.context is None or child.context.mark_index is None
            )
        return Join(ended, self.grammar.join, self._after_join, degraded=unmarked)

    def _fork(self, thread: Thread) -> Append | Fork:
        labels, degraded = self._labels(thread)
        headers = []
        for label in labels:
            header = self.grammar.header.format(label=label)
            try:
                headers.append(self._tokenizer.encode(header, continuation=True))
            except ValueError as error:
                degraded.append(f"outline {label} dropped: {error}")
        if not headers:
            return Append(degraded=(*degraded, f"{self.grammar.trigger} without outlines: no fork"))
        tags = [self.grammar.closer]
        if self.grammar.nested:
            tags.append(self.grammar.trigger)
        if self.grammar.conclusion_marker is not None:
            tags.append(self.grammar.conclusion_marker)
        sampling = dataclasses.replace(
            self._with_stops(self._without_tags(thread.sampling), tags), **self.grammar.child_sampling
        )
        return Fork(headers, sampling, len(self._closer), len(self._after_join), degraded=tuple(degraded))

    def _labels(self, thread: Thread) -> tuple[list[str], list[str]]:
        """Labels of the plan that the thread has just closed, each once, and what was wrong with it."""
        grammar = self.grammar
        if grammar.outline is None:
            return [str(i) for i in range(1, grammar.num_paths + 1)], []
        start = thread.joins[-1].at if thread.joins else 0
        text = self._tokenizer.decode(thread.token_ids[start:])
        _, opened, plan = text.rpartition(grammar.plan)
        if not opened:
            return [], [f"{grammar.trigger} without {grammar.plan}"]
        labels: list[str] = []
        repeated: list[str] = []
        for label in re.findall(grammar.outline, plan):
            (repeated if label in labels else labels).append(label)
        return labels, [f"outline {label} is there twice: dropped" for label in repeated]

    def _tag(self, stop: Stop) -> str | None:
        """The grammar's tag that a thread has stopped at."""
        if stop.reason == "stop_string":
            return stop.string if stop.string in self._tag_ids else None
        by_id = {tag_id: tag for tag, tag_id in self._tag_ids.items() if tag_id is not None}
        return by_id.get(stop.token_id) if stop.reason == "stop_id" and stop.token_id is not None else None

    def _is_closed(self, thread: Thread) -> bool:
        """Whether the closer was forced on the thread: it had stopped before."""
        return not thread.sampled[-1] and thread.token_ids[-len(self._closer) :] == self._closer

    def _with_stops(self, sampling: SamplingParams, tags: Sequence[str]) -> SamplingParams:
        ids = [self._tag_ids[tag] for tag in tags]
        stop_ids = [*sampling.stop_ids, *(i for i in ids if i is not None)]
        strings = [*sampling.stop, *(tag for tag, i in zip(tags, ids, strict=True) if i is None)]
        return dataclasses.replace(
            sampling, stop_ids=tuple(dict.fromkeys(stop_ids)), stop=tuple(dict.fromkeys(strings))
        )

    def _without_tags(self, sampling: SamplingParams) -> SamplingParams:
        """The parameters with the request's own stops only."""
        ids = set(self._tag_ids.values())
        return dataclasses.replace(
            sampling,
            stop_ids=tuple(i for i in sampling.stop_ids if i not in ids),
            stop=tuple(s for s in sampling.stop if s not in self._tag_ids),
        )
