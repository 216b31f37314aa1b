"""Skeleton of thought: an outline, then all its points at once.

Source: Ning et al. 2023, arXiv 2307.15337.
"""

import dataclasses
import re
from collections.abc import Sequence

from apr_jax.engine.thread import Stop, Thread
from apr_jax.reasoning.program import Append, Finish, Fork, Join, Request, Wait
from apr_jax.reasoning.strategies.options import StrategyOptions
from apr_jax.reasoning.strategies.strategy import UNBOUNDED, Strategy
from apr_jax.tokenizers import Tokenizer


class SkeletonOfThought(Strategy):
    """The root writes an outline and forks into one thread a point; the threads do not see each other.

    They are joined by `stitch`, so that the text is the outline and the points' texts in order; the answer is the
    latter alone. An outline without a point is the answer itself.
    """

    name = "skeleton_of_thought"

    def __init__(self, tokenizer: Tokenizer, options: StrategyOptions):
        super().__init__(tokenizer, options)
        skeleton = options.skeleton
        self._point = re.compile(skeleton.point)
        self._outline_ids = tokenizer.encode(skeleton.outline_prompt, continuation=True)
        self._closing_ids = tokenizer.encode("\n", continuation=True)

    def start(self, request: Request) -> Append:
        return Append(self._outline_ids, dataclasses.replace(request.sampling, max_new_tokens=UNBOUNDED))

    def on_stop(self, thread: Thread, stop: Stop) -> Fork | Finish:
        if thread.parent is not None or thread.num_forks:
            last = thread.joins[-1].children[-1].stop if thread.joins and thread.joins[-1].children else None
            return Finish(stop.reason if last is None else last.reason)
        points = self._points(self._text(thread))
        if not points:
            return Finish(stop.reason, degraded=("an outline without points is the answer itself",))
        headers = [self._tokenizer.encode(header, continuation=True) for header in points]
        sampling = dataclasses.replace(thread.sampling, max_new_tokens=UNBOUNDED)
        ended = int(thread.token_ids[-1] in self._tokenizer.eos_ids)  # the points go on behind the outline's text
        return Fork(headers, sampling, joining_len=len(self._closing_ids), drop=ended)

    def on_child(self, parent: Thread, ended: Sequence[Thread], running: Sequence[Thread]) -> Join | Wait:
        if running:
            return Wait()
        stopping = dataclasses.replace(parent.sampling, max_new_tokens=0)
        return Join(ended, "stitch", self._closing_ids, stopping)

    def on_refused(self, thread: Thread, reason: str) -> Finish:
        """The outline is the answer."""
        return Finish("length" if thread.stop is None else thread.stop.reason)

    def read_answer(self, text: str) -> str | None:
        points = self._points(text)
        return text[text.find(points[0]) :].strip() if points and points[0] in text else text.strip()

    def _points(self, text: str) -> list[str]:
        """What comes before each point's text."""
        prompt = self.options.skeleton.point_prompt
        return [prompt.format(number=i, point=p.strip()) for i, p in enumerate(self._point.findall(text), 1)]
