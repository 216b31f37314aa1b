"""Grammars: formats in which the model itself writes when to fork. A grammar is data; one program reads all.

... <Parallel><Goal><Outline>1: ...</Outline><Outline>2: ...</Outline></Goal>  the model, to the trigger
    <Path>1: ...</Path>   <Path>2: ...</Path>                                  one thread an outline
<Conclusion>...</Conclusion></Parallel> ...                                    the model, after the join
"""

import dataclasses
import re
from collections.abc import Sequence

from apr_jax.engine.thread import Stop, Thread
from apr_jax.reasoning.grammars.declaration import Grammar as Grammar
from apr_jax.reasoning.program import Append, Finish, Fork, Join, Mark, Program, Request, Wait
from apr_jax.reasoning.tags import ForkTags, Tags
from apr_jax.tokenizers import Tokenizer
from apr_jax.types import SamplingParams

UNBOUNDED = 2**31 - 1  # tokens; the driver grants what the request's budget holds


class GrammarProgram(Program):
    """Follows a grammar. Holds no state: all that it needs to know stands in the threads' tokens.

    What does not follow the grammar degrades, with a reason:
      - no outline, or a trigger without its plan: the thread goes on in plain text, or stops, as the grammar says;
      - an outline twice, one without label or beyond max_children, or one whose label has no tokens: dropped;
      - a child that ends without its closer (budget, end of sequence, pages): gets the closer and is joined, or
        ends its parent too, as the grammar says;
      - a closer outside of a child, a trigger in a child that may not fork, or a fork that is refused: plain text.
    """

    def __init__(self, grammar: Grammar, tokenizer: Tokenizer):
        self.grammar = grammar
        self.name = grammar.name
        self.block = grammar.block
        self._tokenizer = tokenizer
        self._before_fork = tokenizer.encode(grammar.before_fork, continuation=True) if grammar.before_fork else []
        self._closer = tokenizer.encode(grammar.closer, continuation=True)
        self._after_join = tokenizer.encode(grammar.after_join, continuation=True)
        tags = [grammar.trigger, grammar.closer]
        if grammar.join == "conclusion" and grammar.conclusion_marker is not None:
            tags.append(grammar.conclusion_marker)
        self._tags = Tags(tokenizer, tags)
        self.fork_tags = _fork_tags(grammar)

    def start(self, request: Request) -> Append:
        return Append(sampling=self._tags.only(request.sampling, [self.grammar.trigger, self.grammar.closer]))

    def on_stop(self, thread: Thread, stop: Stop) -> Append | Mark | Fork | Finish:
        grammar, is_child = self.grammar, thread.parent is not None
        tag = self._tags.at(stop)
        if tag == grammar.trigger:
            return self._at_trigger(thread, stop)
        if stop.reason == "prefilled" and self._is_led(thread):
            return self._fork(thread)
        if tag == grammar.closer:
            if is_child:
                return Finish("closed", degraded=self._unread_triggers(thread))
            return Append(degraded=(f"{tag} outside of a thread",))
        if tag is not None:
            return Mark()
        if not is_child or self._is_closed(thread):
            return Finish(stop.reason)
        closing = dataclasses.replace(thread.sampling, max_new_tokens=0)
        reason = f"ended without {grammar.closer} ({stop.reason})"
        drop = 1 if stop.reason == "eos" else 0  # the closer stands in place of the end of sequence
        return Append(self._closer, closing, drop, degraded=(*self._unread_triggers(thread), reason))

    def on_child(self, parent: Thread, ended: Sequence[Thread], running: Sequence[Thread]) -> Join | Wait | Finish:
        if running:
            return Wait()
        if self.grammar.unclosed == "stop" and any(map(self._is_closed, ended)):
            return Finish("unclosed")
        unmarked = ()
        if self.grammar.join == "conclusion":
            unmarked = tuple(
                f"child {ordinal} has no conclusion and is joined whole"
                for ordinal, child in enumerate(ended, 1)
                if child.context is None or child.context.mark_index is None
            )
        return Join(ended, self.grammar.join, self._after_join, self._resumed(parent), degraded=unmarked)

    def on_refused(self, thread: Thread, reason: str) -> Append:
        return Append(sampling=self._resumed(thread))

    # Forking.

    def _at_trigger(self, thread: Thread, stop: Stop) -> Append | Fork | Finish:
        """Forks, or first writes what comes before; or says why there is no fork."""
        labels, degraded = self._labels(thread)
        if not labels:
            degraded.append(f"{self.grammar.trigger} without outlines: no fork")
            if self.grammar.without_outlines == "stop" and thread.parent is None:
                return Finish(stop.reason, degraded=tuple(degraded))
            return Append(degraded=tuple(degraded))
        if (refusal := self._refusal(thread)) is not None:
            return Append(degraded=(*degraded, f"fork refused: {refusal}"))
        if not self._before_fork:
            return self._fork(thread)
        return Append(self._before_fork, dataclasses.replace(thread.sampling, max_new_tokens=0))

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
            degraded.append(f"{self.grammar.trigger} without outlines: no fork")
            return Append(sampling=self._resumed(thread), degraded=tuple(degraded))
        sampling = self._child_sampling(thread)
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
        degraded: list[str] = []
        for label in re.findall(grammar.outline, plan):
            if label == "":
                degraded.append("an outline without label: dropped")
            elif label in labels:
                degraded.append(f"outline {label} is there twice: dropped")
            elif len(labels) == grammar.max_children:
                degraded.append(f"outline {label} is beyond max_children = {grammar.max_children}: dropped")
            else:
                labels.append(label)
        return labels, degraded

    def _refusal(self, thread: Thread) -> str | None:
        """Why the grammar's own bounds forbid a fork here, or the budget what is written before it."""
        grammar = self.grammar
        if grammar.max_depth is not None and len(thread.path) >= grammar.max_depth:
            return f"depth {len(thread.path) + 1} is beyond {grammar.name}'s max_depth = {grammar.max_depth}"
        if grammar.max_rounds is not None and thread.num_forks >= grammar.max_rounds:
            return f"it would be fork {thread.num_forks + 1} of its thread, {grammar.name} has {grammar.max_rounds}"
        if thread.budget < len(self._before_fork):
            return f"{thread.budget} tokens are left, {len(self._before_fork)} needed before it"
        return None

    # What stands in a thread.

    def _is_closed(self, thread: Thread) -> bool:
        """Whether the closer was forced on the thread: it had stopped before."""
        return not thread.sampled[-1] and thread.token_ids[-len(self._closer) :] == self._closer

    def _is_led(self, thread: Thread) -> bool:
        """Whether what comes before a fork was just forced on the thread, behind the trigger that it sampled."""
        count = len(self._before_fork)
        if not count or len(thread.token_ids) <= count or thread.token_ids[-count:] != self._before_fork:
            return False
        return not any(thread.sampled[-count:]) and thread.sampled[-count - 1]

    def _unread_triggers(self, child: Thread) -> tuple[str, ...]:
        """A child that may not fork has written that it wants to: kept as text."""
        if self.grammar.nested or self.grammar.trigger not in self._tokenizer.decode(child.token_ids):
            return ()
        return (f"{self.grammar.trigger} inside a thread is text: {self.grammar.name} does not nest",)

    # Sampling parameters.

    def _resumed(self, thread: Thread) -> SamplingParams:
        """The thread's parameters with all that its budget still holds."""
        bound = self.grammar.max_child_tokens
        left = UNBOUNDED if bound is None or thread.parent is None else max(0, bound - thread.num_sampled)
        return dataclasses.replace(thread.sampling, max_new_tokens=left)

    def _child_sampling(self, thread: Thread) -> SamplingParams:
        grammar = self.grammar
        tags = [tag for tag in self._tags.ids if tag != grammar.trigger or grammar.nested]
        return dataclasses.replace(
            self._tags.only(thread.sampling, tags),
            max_new_tokens=grammar.max_child_tokens or UNBOUNDED,
            **grammar.child_sampling,
        )


def _fork_tags(grammar: Grammar) -> ForkTags:
    """A fork begins with its block, unless the trigger itself holds the opening tag."""
    opener = grammar.trigger if grammar.block[0] in grammar.trigger else grammar.block[0]
    inside = () if opener == grammar.trigger else (grammar.plan, grammar.trigger)
    return ForkTags(
        openers=(opener,),
        inside=tuple(tag for tag in inside if tag not in ("", opener)),
        closer=grammar.closer,
        end=grammar.block[1],
        nested=grammar.nested,
    )
