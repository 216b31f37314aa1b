"""Self-consistency: the answer that most samples of one prompt agree on.

Source: Wang et al. 2022, arXiv 2203.11171. Votes are counted in the order of `deciding`, until the winner is certain.
"""

import weakref
from collections.abc import Sequence

from apr_jax.engine.thread import Family, Stop, Thread
from apr_jax.reasoning.deciding import Times
from apr_jax.reasoning.program import Cancel, Finish, Fork, Join, Request, Wait
from apr_jax.reasoning.strategies.options import StrategyOptions
from apr_jax.reasoning.strategies.strategy import Strategy
from apr_jax.tokenizers import Tokenizer


class SelfConsistency(Strategy):
    """Majority vote. Ties go to the answer that came first; samples without an answer vote for none, nor do those that
    were cut short where the whole text is the answer.

    A sample whose answer an earlier one has given already is not needed any more: its pages come free at once.
    """

    name = "self_consistency"

    def __init__(self, tokenizer: Tokenizer, options: StrategyOptions):
        super().__init__(tokenizer, options)
        self._votes: weakref.WeakKeyDictionary[Family, dict[int, str | None]] = weakref.WeakKeyDictionary()

    def start(self, request: Request) -> Fork:
        return self._samples(request, self.options.num_samples)

    def on_stop(self, thread: Thread, stop: Stop) -> Finish:
        if thread.parent is not None:
            votes = self.options.extract_answer is not None or self._is_whole(stop)
            answer = self.read_answer(self._text(thread)) if votes else None
            self._votes.setdefault(thread.family, {})[thread.id] = answer
        return self._chosen(thread, stop)

    def on_child(self, parent: Thread, ended: Sequence[Thread], running: Sequence[Thread]) -> Join | Cancel | Wait:
        votes = self._votes.get(parent.family, {})
        voters = [child for child in parent.children if child.id in votes and child not in running]
        times = Times(voters, running)
        ranked = times.settled(voters)
        found = decide_vote([votes[child.id] for child in ranked], num_voters=len(voters) + len(running))
        if found is not None:
            winner, num_counted = found
            return self._select(parent, [ranked[winner]], times.end(ranked[num_counted - 1]))
        if not running:
            return self._select(parent, [])  # all samples were cancelled from outside
        first: dict[str | None, Thread] = {}
        placed = times.ranked(filter(times.is_known, ended))
        for child in placed:
            first.setdefault(votes[child.id], child)
        repeated = [child for child in placed if first[votes[child.id]] is not child]
        return Cancel(repeated) if repeated else Wait()

    def read_answer(self, text: str) -> str | None:
        extract = self.options.extract_answer
        return text.strip() if extract is None else extract(text)


def decide_vote(answers: Sequence[str | None], num_voters: int) -> tuple[int, int] | None:
    """Which answer wins a vote, once the voters that are still to come cannot change it.

    Args:
      answers: in the order of the vote; None votes for nothing.
      num_voters: those still to come included.

    Returns:
      (index of the first voter for the winner, how many voters had to be heard), or None.
    """
    first: dict[str, int] = {}
    counts: dict[str, int] = {}
    for index, answer in enumerate(answers):
        if answer is not None:
            first.setdefault(answer, index)
            counts[answer] = counts.get(answer, 0) + 1
        left = num_voters - index - 1
        if not counts:
            if left == 0:
                return 0, num_voters  # nobody has an answer
            continue
        leader, *others = sorted(counts, key=lambda a: (-counts[a], first[a]))
        rivals = [(counts[a] + left, -first[a]) for a in others] + [(left, -num_voters)]
        if max(rivals) < (counts[leader], -first[leader]):
            return first[leader], index + 1
    return None
