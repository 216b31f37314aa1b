"""Best of n: the sample that scores best, or the first one that a checker accepts."""

import weakref
from collections.abc import Sequence

from apr_jax.engine.thread import Family, Stop, Thread
from apr_jax.reasoning.deciding import first
from apr_jax.reasoning.program import Cancel, Finish, Fork, Join, Request, Wait
from apr_jax.reasoning.strategies.options import StrategyOptions
from apr_jax.reasoning.strategies.strategy import Strategy
from apr_jax.tokenizers import Tokenizer

_Judgement = tuple[bool, tuple[bool, float]]  # whether it is accepted, (whether it is whole, its score)


class BestOfN(Strategy):
    """Samples of one prompt. With `accept` the first that is accepted, by rank, ends the others; without one, or where
    none is accepted, the best score wins, ties by ordinal; one that was cut short scores less than any that was not.
    What scores less than another is released at once.
    """

    name = "best_of_n"

    def __init__(self, tokenizer: Tokenizer, options: StrategyOptions):
        super().__init__(tokenizer, options)
        self._judged: weakref.WeakKeyDictionary[Family, dict[int, _Judgement]] = weakref.WeakKeyDictionary()

    def start(self, request: Request) -> Fork:
        return self._samples(request, self.options.num_samples)

    def on_stop(self, thread: Thread, stop: Stop) -> Finish:
        if thread.parent is not None:
            judged = self._judged.setdefault(thread.family, {})
            judged[thread.id] = self._is_accepted(thread), (self._is_whole(stop), self._score(thread))
        return self._chosen(thread, stop)

    def on_child(self, parent: Thread, ended: Sequence[Thread], running: Sequence[Thread]) -> Join | Cancel | Wait:
        judged = self._judged.get(parent.family, {})
        waits = self.options.waits
        if self.options.accept is not None and not (waits and running):
            decision = first(lambda child: judged[child.id][0]).decide(ended, running)
            if decision is not None and decision.cut is not None:
                return self._select(parent, decision.children, None if waits else decision.cut)
        if not ended:
            return self._select(parent, []) if not running else Wait()
        best = max(ended, key=lambda child: (judged[child.id][1], -child.ordinal))
        if not running:
            return self._select(parent, [best])
        worse = [child for child in ended if child is not best and not judged[child.id][0]]
        return Cancel(worse) if worse else Wait()
