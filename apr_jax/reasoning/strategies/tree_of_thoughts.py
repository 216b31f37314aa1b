"""Tree of thoughts: thoughts are sampled or proposed, states valued or voted on, and searched in some order.

Source: Yao et al. 2023, arXiv 2305.10601. The words that stand for values, and what they are worth, are theirs.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

from apr_jax.engine.thread import Family, Stop, Thread
from apr_jax.reasoning.program import Action, Append, Finish, Fork, Request, Spawn, Wait
from apr_jax.reasoning.strategies.options import StrategyOptions
from apr_jax.reasoning.strategies.tree_search import Leaf, Search, TreeSearch
from apr_jax.tokenizers import Tokenizer
from apr_jax.types import SamplingParams

WORDS = {"impossible": 0.001, "likely": 1.0, "sure": 20.0}


class TreeOfThoughts(TreeSearch):
    """See `ThoughtOptions`. A value is asked of a thread that continues the state; a vote of one that sees the prompt
    and all states, in a context of its own that shares the prompt's whole pages.
    """

    name = "tree_of_thoughts"

    def __init__(self, tokenizer: Tokenizer, options: StrategyOptions):
        super().__init__(tokenizer, options)
        self._thoughts = thoughts = options.thoughts
        self._proposes = thoughts.generate == "propose"

        def encode(text: str, used: bool = True) -> list[int]:
            return tokenizer.encode(text, continuation=True) if text and used else []

        self._thought_ids = encode(thoughts.thought_prompt, not self._proposes)
        self._propose_ids = encode(thoughts.propose_prompt, self._proposes)
        self._value_ids = encode(thoughts.value_prompt, thoughts.evaluate == "value")
        encode(_ballot([""]) + thoughts.vote_prompt, thoughts.evaluate == "vote")  # refused before anything is asked
        self._answer_ids = encode(thoughts.answer_prompt or "")

    def start(self, request: Request) -> Fork:
        if self._proposes:
            return self._proposal(request.sampling, 1)
        count = self._num_children()
        return Fork([self._thought_ids] * count, self._stepping(request.sampling), carry=True, num_dealt=count)

    def on_stop(self, thread: Thread, stop: Stop) -> Append | Fork | Wait | Finish:
        search = self._search(thread)
        if search.over and thread.parent is None and self._answer_ids:
            if stop.reason != "prefilled":
                return Finish(stop.reason)
            unbounded = self._sampled(thread.sampling)
            return Append(self._answer_ids, dataclasses.replace(unbounded, temperature=thread.sampling.temperature))
        return super().on_stop(thread, stop)

    def choose(self, search: Search) -> tuple[list[Leaf], list[Leaf]]:
        leaves = sorted(search.leaves.values(), key=Leaf.key, reverse=True)
        kept = [leaf for leaf in leaves if leaf.key()[0] >= self._thoughts.threshold]
        if self._thoughts.search == "beam":
            kept = kept[: self.options.beam_width]
        going_on = [leaf for leaf in kept if not leaf.complete]
        if self._thoughts.search == "depth_first":
            if any(leaf.complete for leaf in kept) or search.num_expanded >= self._thoughts.max_states:
                return kept, []
            going_on = sorted(going_on, key=lambda leaf: (leaf.depth, *leaf.key()))[-1:]
        return kept, going_on

    # Thoughts.

    def _num_children(self) -> int:
        return self.options.num_samples

    def _expand(self, search: Search, thread: Thread, steps: Sequence[Sequence[int]]) -> Fork:
        if not self._proposes:
            fork = super()._expand(search, thread, steps)
            return dataclasses.replace(fork, token_lists=[self._thought_ids] * len(fork.token_lists))
        if steps:
            nothing_more = dataclasses.replace(thread.sampling, max_new_tokens=0)
            return Fork(steps, nothing_more, carry=True, num_dealt=search.dealt)
        search.asking = "steps"
        search.asked.add(thread.id)
        return self._proposal(thread.sampling, search.dealt)

    def _proposal(self, sampling: SamplingParams, dealt: int) -> Fork:
        bounded = dataclasses.replace(self._sampled(sampling), max_new_tokens=self._thoughts.max_proposal_tokens)
        return Fork([self._propose_ids], bounded, carry=True, num_dealt=dealt)

    def _take_steps(self, search: Search, proposed: Sequence[Thread]) -> Iterator[tuple[Thread, Action]]:
        """Each line that a proposer has written is a step; a state without any is complete."""
        for thread in proposed:
            lines = [self._said(child) for child in thread.children if not child.is_done]
            texts = list(dict.fromkeys(line.strip() for line in "".join(lines).split("\n") if line.strip()))
            separator = self.options.separator
            steps = [self._tokenizer.encode(text + separator, continuation=True) for text in texts]
            if steps:
                search.steps[thread.id] = steps[: self.options.num_samples]
            else:
                leaf = Leaf(thread.id, search.depths.get(thread.id, 0), search.num_leaves, 0, "steps")
                leaf.complete, leaf.score = True, self._score(thread) if thread.token_ids else -math.inf
                search.leaves[thread.id] = leaf
                search.num_leaves += 1
        search.dealt = sum(map(len, search.steps.values()))
        for thread in proposed:
            yield thread, self._select(thread, [])

    def _is_step(self, stop: Stop) -> bool:
        return stop.reason == "prefilled" if self._proposes else super()._is_step(stop)

    def _new_search(self, family: Family) -> Search:
        return Search(asking="steps", asked={family.root.id}) if self._proposes else Search()

    # Values and votes.

    def _judge(
        self, search: Search, unscored: Sequence[Leaf], by_id: dict[int, Thread]
    ) -> Iterator[tuple[Thread, Fork]]:
        kind, count = self._thoughts.evaluate, self._thoughts.num_evaluations
        if kind == "score":
            yield from super()._judge(search, unscored, by_id)
        elif kind == "value":
            for leaf in unscored:
                thread = by_id[leaf.thread_id]
                dealt = count * len(unscored)
                yield thread, Fork([self._value_ids] * count, self._asking(thread), carry=True, num_dealt=dealt)
        elif len(search.leaves) == 1:
            unscored[0].score = 0.0
        else:
            thread = by_id[unscored[0].thread_id]
            texts = [self._text(by_id[i]).strip() for i in search.leaves]
            ids = self._tokenizer.encode(_ballot(texts) + self._thoughts.vote_prompt, continuation=True)
            ballot = [*thread.family.root.prompt_ids, *ids]
            yield thread, Spawn([ballot] * count, self._asking(thread), num_dealt=count)

    def _read_scores(self, search: Search, by_id: dict[int, Thread]) -> None:
        leaves = list(search.leaves.values())
        said = {
            leaf.thread_id: [self._said(child) for child in by_id[leaf.thread_id].children if not child.is_done]
            for leaf in leaves
        }
        if self._thoughts.evaluate == "value":
            read = self._thoughts.read_value or read_value
            for leaf in leaves:
                if leaf.score is None:
                    values = [read(text) for text in said[leaf.thread_id]]
                    leaf.score = sum(values) / len(values) if values else -math.inf
            return
        for leaf in leaves:
            leaf.score = 0.0
        for text in (text for texts in said.values() for text in texts):
            number = re.search(r"\d+", text)
            if number and 1 <= int(number[0]) <= len(leaves):
                chosen = leaves[int(number[0]) - 1]
                chosen.score = chosen.key()[0] + 1

    def _asking(self, thread: Thread) -> SamplingParams:
        bound = self._thoughts.max_evaluation_tokens
        return dataclasses.replace(self._sampled(thread.sampling), max_new_tokens=bound)

    def _said(self, helper: Thread) -> str:
        """What a helper has sampled."""
        ids = [token for token, sampled in zip(helper.token_ids, helper.sampled, strict=True) if sampled]
        return self._tokenizer.decode(ids[:-1] if ids and ids[-1] in self._tokenizer.eos_ids else ids)


def _ballot(texts: Sequence[str]) -> str:
    return "".join(f"\n\nChoice {number}:\n{text}" for number, text in enumerate(texts, 1))


def read_value(text: str) -> float:
    """The last number or word of value in a text; 0 if there is none."""
    found = re.findall(rf"-?\d+(?:\.\d+)?|\b(?:{'|'.join(WORDS)})\b", text.lower())
    if not found:
        return 0.0
    return WORDS[found[-1]] if found[-1] in WORDS else float(found[-1])
