"""What all strategies share: samples of one prompt, what they say, and how the chosen one becomes the answer."""

import dataclasses
import math
from collections.abc import Sequence

from apr_jax.engine.thread import Stop, Thread
from apr_jax.reasoning.program import Append, Finish, Fork, Guards, Join, Program, Request
from apr_jax.reasoning.strategies.options import StrategyOptions
from apr_jax.reasoning.text import chain, chain_ids
from apr_jax.tokenizers import Tokenizer
from apr_jax.types import SamplingParams

UNBOUNDED = 2**31 - 1  # tokens; the driver grants what the request's budget holds


class Strategy(Program):
    """A program in which the client decides. Reads texts, scores them, and brings the chosen thread to the root.

    A chosen child is joined by `select` into its parent, which then stops at once and ends in its turn: the root's
    context, text and reason to end are those of the chosen thread.
    """

    block = None

    def __init__(self, tokenizer: Tokenizer, options: StrategyOptions):
        self.options = options
        self._tokenizer = tokenizer

    def widened(self, guards: Guards) -> Guards:
        """The client says how many samples there are, not the model."""
        return dataclasses.replace(guards, max_fan_out=max(guards.max_fan_out, self.options.num_samples))

    def on_refused(self, thread: Thread, reason: str) -> Append:
        """The thread goes on alone."""
        return Append(sampling=dataclasses.replace(thread.sampling, max_new_tokens=UNBOUNDED))

    def _samples(self, request: Request, count: int) -> Fork:
        return Fork([[]] * count, self._sampled(request.sampling))

    def _sampled(self, sampling: SamplingParams) -> SamplingParams:
        """The parameters of samples that differ, with what their scores need."""
        return dataclasses.replace(
            sampling,
            temperature=sampling.temperature or self.options.temperature,
            max_new_tokens=UNBOUNDED,
            logprobs=sampling.logprobs or self.options.score is None,
        )

    def _select(self, parent: Thread, children: Sequence[Thread], cut: int | None = None) -> Join:
        """The parent takes the child's place (its own, if there is none) and stops."""
        return Join(children, "select", sampling=dataclasses.replace(parent.sampling, max_new_tokens=0), cut=cut)

    def _chosen(self, thread: Thread, stop: Stop) -> Finish:
        """A thread that has stopped behind a join ends as the thread that it took the place of did."""
        while stop.reason == "prefilled" and thread.joins and thread.joins[-1].children:
            thread = thread.joins[-1].children[-1]
            stop = thread.stop or stop
        return Finish(stop.reason)

    def _text(self, thread: Thread) -> str:
        """What was said from the prompt to the thread's end."""
        ids = chain_ids(thread)
        return self._tokenizer.decode(ids[:-1] if ids and ids[-1] in self._tokenizer.eos_ids else ids)

    def _is_whole(self, stop: Stop) -> bool:
        """Whether a sample has ended by itself: it was not cut for want of tokens, pages or time."""
        return stop.reason in ("eos", "stop_id", "stop_string")

    def _prompt(self, thread: Thread) -> str:
        return self._tokenizer.decode(thread.family.root.prompt_ids)

    def _is_accepted(self, thread: Thread) -> bool:
        accept = self.options.accept
        return accept is not None and accept(self._prompt(thread), self._text(thread))

    def _score(self, thread: Thread) -> float:
        score = self.options.score
        return mean_logprob(thread) if score is None else float(score(self._text(thread)))


def mean_logprob(thread: Thread) -> float:
    """The mean log-probability of the tokens sampled from the prompt to the thread's end; -inf if there is none."""
    found = [each.logprobs[i] for each, start, stop in chain(thread) for i in range(start, stop) if each.sampled[i]]
    return sum(found) / len(found) if found else -math.inf
