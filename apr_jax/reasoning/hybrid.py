"""How much a model may fork: `off`, `on`, or `auto`, as the engine's load allows.

off    One-token tags that lead to a fork, or belong behind it, are banned. Where a tag is several tokens, banning one
       of them would forbid other text too: the tag is a stop instead, and once it is complete its tokens are taken back
       and the first of them is not sampled in that place again (`EngineCore.avoid`). What remains is what the model
       would say if it could not say the tag. A program that forks by itself is refused, and goes on alone.
auto   Where the model opens a block, the engine is asked whether two children at least would find rows and pages now,
       on free rows and within an even share for every request (`Scheduler.room_to_fork`). If not, the opening tag is
       taken back and avoided in that place: the model goes on sequentially, and may ask again later. Whoever was
       turned back often is not asked again. If there is room, all outlines fork: a model that has announced paths
       counts on each of them. How many of these run at once is the engine's matter: a family that yields takes no rows
       beyond an even share, and the others follow in waves.

An opening tag is the one place where nothing is lost: no outline has been written, and the text before it goes on in
the form that the model was trained on. `auto` is exempt from the rule that load does not change what a thread says.
"""

import dataclasses
from collections.abc import Sequence

from apr_jax.engine.thread import Stop, Thread
from apr_jax.reasoning.answers import Answers
from apr_jax.reasoning.program import Program, Request
from apr_jax.reasoning.run import Run
from apr_jax.reasoning.tags import Tags
from apr_jax.tokenizers import Tokenizer
from apr_jax.types import SamplingParams

MIN_CHILDREN = 2  # a fork of fewer runs nothing side by side
MAX_TURNS = 8  # of one thread under `auto`, before its tags are banned
SPARE_TURNS = 64  # beyond one for each token that a thread has kept: whoever needs more has its tags left as text


def restrained_tags(request: Request, program: Program, tokenizer: Tokenizer) -> Tags | None:
    """The tags that are watched; None where the model may fork as it likes, or does not decide."""
    tags = program.fork_tags
    if request.parallelism == "on" or tags is None:
        return None
    return Tags(tokenizer, tuple(tags))


def restrained_sampling(request: Request, program: Program, tags: Tags | None) -> SamplingParams:
    """The request's parameters with what keeps its threads from forking, or stops them before they do."""
    if tags is None or program.fork_tags is None:
        return request.sampling
    if request.parallelism == "auto":
        return tags.also(request.sampling, program.fork_tags.openers)
    several = [tag for tag, tag_id in tags.ids.items() if tag_id is None]
    return _banned(tags.also(request.sampling, several), tags.of(tags.ids))


def _banned(sampling: SamplingParams, ids: Sequence[int]) -> SamplingParams:
    return dataclasses.replace(sampling, banned_ids=tuple(dict.fromkeys((*sampling.banned_ids, *ids))))


class Hybrid(Answers):
    """Turns threads back where they want to fork and shall not."""

    def _turned_back(self, run: Run, thread: Thread, stop: Stop) -> bool:
        """Whether the thread has stopped at a tag that the program is not to see: it goes on already."""
        tag = None if run.restrained is None else run.restrained.at(stop)
        if tag is None:
            return False
        tags = run.program.fork_tags
        assert tags is not None and run.restrained is not None
        if run.request.parallelism == "off":
            self._turn_back(run, thread, tag, thread.sampling)
            return True
        if tag == tags.closer and thread.parent is None:  # what a model may say that would have opened a block
            self._turn_back(run, thread, tag, thread.sampling)
            return True
        if tag not in tags.openers:
            return False
        if thread.parent is None or tags.nested:
            room = self.core.scheduler.room_to_fork(thread.family)
            if room < MIN_CHILDREN:
                self._degrade(run, thread, f"{tag} taken back: there is room for {room} threads")
                is_often = thread.num_avoided >= MAX_TURNS
                asking = run.restrained.of((*tags.openers, *tags.inside))
                params = _banned(thread.sampling, asking) if is_often else thread.sampling
                self._turn_back(run, thread, tag, params)
                return True
        if not tags.inside:
            return False  # the program's own: it forks here
        self._append(run, thread, (), None)
        return True

    def _turn_back(self, run: Run, thread: Thread, tag: str, params: SamplingParams) -> None:
        """Takes the tag at the thread's end back; where that cannot be done, it is text."""
        count = self._num_tokens(thread, tag)
        if count and thread.num_avoided < SPARE_TURNS + len(thread.token_ids):
            bound = self.core.config.max_stop_ids
            place = len(thread.token_ids) - count
            num_avoided = 1 + (len(thread.avoided[1]) if thread.avoided[0] == place else 0)
            if len(params.banned_ids) + num_avoided > bound:
                params = thread.sampling
            if len(params.banned_ids) + num_avoided <= bound:
                self.core.avoid(
                    thread, count, sampling=dataclasses.replace(params, max_new_tokens=thread.budget + count)
                )
                run.starved.discard(thread.id)
                return
        self._degrade(run, thread, f"{tag} is left as text: it cannot be avoided here")
        self._append(run, thread, (), None)

    def _num_tokens(self, thread: Thread, tag: str) -> int:
        """How many of the thread's last tokens the tag at its end is in; 0 if some of them were forced."""
        own = len(thread.token_ids) - (thread.joins[-1].at if thread.joins else 0)
        for count in range(1, own + 1):
            if not thread.sampled[-count]:
                return 0
            if tag in self.core.tokenizer.decode(thread.token_ids[-count:]):
                return count
        return 0
