"""Carries out what programs answer, within the request's guards and budget."""

import dataclasses
import time
from collections.abc import Callable, Sequence

from apr_jax.engine import events
from apr_jax.engine.engine import EngineCore
from apr_jax.engine.joining import joined_len
from apr_jax.engine.thread import WANTS_TO_RUN, Status, Thread
from apr_jax.reasoning.budget import forced_len
from apr_jax.reasoning.deciding import cut_records
from apr_jax.reasoning.metrics import descendants
from apr_jax.reasoning.program import (
    Action,
    Append,
    Cancel,
    Finish,
    Fork,
    Join,
    Keep,
    Mark,
    Spawn,
    Wait,
)
from apr_jax.reasoning.run import Run
from apr_jax.types import OutOfPages, SamplingParams


class Answers:
    """What programs may ask for: to append, mark, fork, join, finish. What cannot be done degrades, with a reason."""

    def __init__(self, core: EngineCore, clock: Callable[[], float] = time.perf_counter):
        self.core = core
        self.clock = clock
        self._runs: dict[int, Run] = {}
        self._done: list[Run] = []

    def _ask_parent(self, run: Run, parent: Thread) -> None:
        """Asks until the program stops cancelling children."""
        for _ in range(len(parent.children) + 1):
            alive = [child for child in parent.children if not child.is_done]
            ended = [child for child in alive if child.id in run.ended]
            running = [child for child in alive if child.id not in run.ended]
            action = run.program.on_child(parent, ended, running)
            if not isinstance(action, Keep | Cancel):
                break
            self._apply(run, parent, action)
        else:
            action = Wait()
        self._apply(run, parent, action)

    def _apply(self, run: Run, thread: Thread, action: Action) -> None:
        self._note(run, thread, action)
        match action:
            case Append():
                self._append(run, thread, action.tokens, action.sampling, action.drop)
            case Mark():
                self._mark(run, thread, action)
            case Fork():
                self._fork(run, thread, action)
            case Join():
                self._join(run, thread, action)
            case Keep():
                self._cancel(run, [child for child in thread.children if child not in action.children])
                self._cut(thread, action.children, action.cut)
            case Cancel():
                self._cancel(run, action.children)
            case Finish():
                self._finish(run, thread, action.reason)
            case Wait():
                pass
            case _:
                raise TypeError(f"program {run.program.name} answered {action!r} for {thread}")

    def _granted(
        self, run: Run, thread: Thread, tokens: Sequence[int], sampling: SamplingParams | None, joined: int = 0
    ) -> SamplingParams:
        """The parameters with a budget that keeps the limits; without new ones, the thread's own with what
        is left. `joined` tokens come into its context before the forced ones.
        """
        if sampling is not None and (reason := self._unsound([sampling])):
            self._degrade(run, thread, f"its own sampling parameters are kept: {reason}")
            sampling = dataclasses.replace(thread.sampling, max_new_tokens=sampling.max_new_tokens)
        wanted = thread.budget if sampling is None else sampling.max_new_tokens
        room = min(run.budget.room(thread), run.budget.context_room(thread) - joined) - len(tokens)
        granted = 0 if run.is_late else max(0, min(wanted, room))
        if granted == 0 and (sampling is None or wanted > 0):
            run.starved.add(thread.id)
        else:
            run.starved.discard(thread.id)
        return dataclasses.replace(sampling or thread.sampling, max_new_tokens=granted)

    def _append(
        self, run: Run, thread: Thread, tokens: Sequence[int], sampling: SamplingParams | None, drop: int = 0
    ) -> None:
        self.core.append(thread, tokens, sampling=self._granted(run, thread, tokens, sampling), drop=drop)

    def _mark(self, run: Run, thread: Thread, action: Mark) -> None:
        self.core.mark(thread)
        self._append(run, thread, (), action.sampling)

    def _fork(self, run: Run, thread: Thread, action: Fork) -> None:
        bound = run.request.guards.max_fan_out
        if len(action.token_lists) > bound:
            self._degrade(run, thread, f"fork into {len(action.token_lists)} children cut to max_fan_out = {bound}")
            params = action.sampling
            action = dataclasses.replace(
                action,
                token_lists=action.token_lists[:bound],
                sampling=params if isinstance(params, SamplingParams) else params[:bound],
            )
        reason = self._try_fork(run, thread, action)
        if reason is not None:
            self._degrade(run, thread, f"fork refused: {reason}")
            answer = run.program.on_refused(thread, reason)
            assert isinstance(answer, Append | Finish), f"on_refused answered {answer!r}"
            self._apply(run, thread, answer)

    def _try_fork(self, run: Run, thread: Thread, action: Fork) -> str | None:
        """Forks, or says why not."""
        guards = run.request.guards
        if run.request.parallelism == "off":
            return "parallelism is off"
        if run.is_late:
            return f"max_wall_s = {guards.max_wall_s:g} is over"
        if len(thread.path) >= guards.max_depth:
            return f"depth {len(thread.path) + 1} is beyond max_depth = {guards.max_depth}"
        if thread.num_forks >= guards.max_rounds:
            return f"it would be fork {thread.num_forks + 1} of its thread, max_rounds is {guards.max_rounds}"
        limit = run.budget.share(thread, action)
        if limit is None:
            return f"too few tokens are left for {len(action.token_lists)} children"
        each, is_spawn = each_sampling(action), isinstance(action, Spawn)
        if reason := self._unsound(each):
            return reason
        room = min(limit.path, limit.total, limit.path if limit.own is None else limit.own)
        params = [
            dataclasses.replace(p, max_new_tokens=min(p.max_new_tokens, room - (0 if is_spawn else len(ids))))
            for p, ids in zip(each, action.token_lists, strict=True)
        ]
        try:
            if is_spawn:
                children = self.core.spawn(thread, action.token_lists, sampling=params)
            else:
                children = self.core.fork(
                    thread, action.token_lists, sampling=params, drop=action.drop, carry=action.carry
                )
        except OutOfPages as error:
            return str(error)
        run.budget.give(children, limit)
        run.budget.note(children[0], forced_len(action))
        forced = [()] * len(children) if is_spawn else action.token_lists
        run.held |= {child.id: ids for child, ids in zip(children, forced, strict=True) if child.is_held}
        return None

    def _begin_held(self, run: Run, parent: Thread) -> None:
        """Lets held children go on, in their order, where fewer of their siblings want to run than may; all of them,
        where the request's time is over and none will sample.
        """
        held = [child for child in parent.children if child.is_held]
        if not held:
            return
        running = sum(any(t.status in WANTS_TO_RUN for t in descendants(child)) for child in parent.children)
        room = len(held) if run.is_late else max(0, (parent.family.max_width or 0) - running)
        for child in held[:room]:
            sampling = dataclasses.replace(child.sampling, max_new_tokens=child.budget)
            self._append(run, child, run.held.pop(child.id), sampling)

    def _unsound(self, sampling: Sequence[SamplingParams]) -> str | None:
        """Why the engine would refuse these parameters: a program's stops and the request's may be too many."""
        try:
            for params in sampling:
                self.core.check_sampling(params)
        except ValueError as error:
            return str(error)
        return None

    def _join(self, run: Run, thread: Thread, action: Join) -> None:
        children, tokens = list(action.children), action.tokens
        if action.cut is not None:
            self._cancel(run, [child for child in thread.children if child not in children])
            self._cut(thread, children, action.cut)
        room = max(1, run.budget.room(thread))
        if action.mode == "splice" and len(tokens) > room:  # how much children return is not known at the fork
            self._degrade(run, thread, f"{len(tokens)} tokens to splice cut to the {room} that are left")
            tokens = tokens[:room]
        joined = joined_len(thread, children, action.mode)
        params = self._granted(run, thread, tokens, action.sampling, joined)
        if joined + len(tokens) > (left := run.budget.context_room(thread)):
            needed = f"a join of {joined + len(tokens)} tokens"
            self._degrade(run, thread, f"{needed} does not fit the {left} that max_context_tokens leaves")
            self._end(run, "context")
            return
        while True:
            try:
                self.core.join(thread, children, mode=action.mode, tokens=tokens, sampling=params)
                break
            except OutOfPages as error:
                if not children:
                    raise
                last = children.pop()
                self.core.cancel(last)
                self._degrade(run, thread, f"child {len(children) + 1} left out of the join: {error}")
        answer = run.program.on_joined(thread)
        if not isinstance(answer, Wait):
            assert isinstance(answer, Finish) and thread is run.root, f"on_joined answered {answer!r}"
            self._finish(run, thread, answer.reason)

    def _cancel(self, run: Run, threads: Sequence[Thread]) -> None:
        for thread in threads:
            if not thread.is_done:
                for each in descendants(thread):
                    run.budget.note(each)
                self.core.cancel(thread)

    def _cut(self, parent: Thread, kept: Sequence[Thread], limit: int | None) -> None:
        """Takes from the record of the parent's other children what lies beyond a decision."""
        if limit is None:
            return
        for thread, count in cut_records(parent.children, limit, kept):
            thread.family.counters.overshoot_tokens += count
            self.core.emit(events.RewindEvent, thread, num_tokens=count)

    def _finish(self, run: Run, thread: Thread, reason: str) -> None:
        if thread is run.root:
            out_of_window = len(run.request.token_ids) + run.request.sampling.max_new_tokens
            is_full = out_of_window > self.core.model_config.max_position or run.budget.context_room(thread) <= 0
            if reason == "length" and is_full:
                reason = "context"
            self._end(run, reason)
            return
        run.ended.add(thread.id)
        assert thread.parent is not None
        if thread.parent.status is Status.FORKED:
            self._ask_parent(run, thread.parent)

    def _end(self, run: Run, reason: str) -> None:
        """Ends a request, once: the first reason counts."""
        if run.finish_reason is not None:
            return
        if run.is_late and reason not in ("cancelled", "error"):
            reason = "wall_clock"
        run.finish_reason, run.ended_s = reason, self.clock()
        for thread in run.root.family.live:
            run.budget.note(thread)
        self._runs.pop(run.root.family.id, None)
        self._done.append(run)
        if reason in ("cancelled", "error") or run.root.status in WANTS_TO_RUN:
            self.core.cancel(run.root)
        else:
            self.core.release(run.root)

    # What is recorded.

    def _note(self, run: Run, thread: Thread, action: Action) -> None:
        for reason in action.degraded:
            self._degrade(run, thread, reason)

    def _degrade(self, run: Run, thread: Thread, reason: str) -> None:
        run.degraded.append((thread, reason))
        self.core.emit(events.DegradeEvent, thread, reason=reason)


def each_sampling(action: Fork) -> Sequence[SamplingParams]:
    """The parameters of each child."""
    params = action.sampling
    return [params] * len(action.token_lists) if isinstance(params, SamplingParams) else params
