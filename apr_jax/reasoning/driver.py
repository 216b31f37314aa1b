"""Drives requests: steps the engine, asks programs, carries out what they answer. Any number side by side.

The driver owns the guards and the budget; a program never sees a request that is not its own, and an error
in one ends that request only. Whatever happens, a request that has ended holds no pages.
"""

import dataclasses

from apr_jax.engine.thread import WANTS_TO_RUN, Status, Stop, Thread
from apr_jax.reasoning.answers import each_sampling
from apr_jax.reasoning.budget import Budget
from apr_jax.reasoning.hybrid import Hybrid, restrained_sampling, restrained_tags
from apr_jax.reasoning.metrics import total_tokens
from apr_jax.reasoning.program import Action, Append, Fork, Program, Request
from apr_jax.reasoning.run import Run as Run


class Driver(Hybrid):
    """Serves requests over one engine. Use as a context manager: what has not ended at the exit is
    cancelled.

    Args:
      clock: tells seconds, for wall clocks and what bounds them.
    """

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *exception: object) -> None:
        for run in list(self._runs.values()):
            self.cancel(run)

    @property
    def active(self) -> list[Run]:
        """Requests that have not ended, oldest first."""
        return list(self._runs.values())

    def submit(self, request: Request, program: Program) -> Run:
        """Takes a request in; it runs with the next step.

        Raises:
          ValueError: the prompt is empty, longer than the context window, or can never fit the cache; or there are
            more stop ids, the program's included, than the engine takes.
        """
        tags = restrained_tags(request, program, self.core.tokenizer)
        sampling = restrained_sampling(request, program, tags)
        request = dataclasses.replace(request, guards=program.widened(request.guards), sampling=sampling)
        action = program.start(request)
        if isinstance(action, Fork):
            for params in each_sampling(action):
                self.core.check_sampling(params)
        window = self.core.model_config.max_position
        max_path = max(0, min(request.sampling.max_new_tokens, window - len(request.token_ids)))
        budget = Budget(request.guards, max_path, len(request.token_ids))
        sampling = request.sampling if isinstance(action, Fork) else action.sampling or request.sampling
        wanted = sampling.max_new_tokens
        at_once = isinstance(action, Append) and not action.tokens  # else the prompt is prefilled first
        granted = min(wanted, budget.initial) if at_once else 0
        params = dataclasses.replace(sampling, max_new_tokens=granted)
        root = self.core.submit(request.token_ids, sampling=params, max_pages=request.guards.max_family_pages)
        root.family.yields = request.parallelism == "auto"
        root.family.max_width = request.guards.max_width
        run = Run(request, program, root, budget, self.clock(), None if at_once else action, self.clock, tags)
        budget.start(root)
        if at_once and granted == 0 < wanted:
            run.starved.add(root.id)
        self._runs[root.family.id] = run
        if at_once:
            self._note(run, root, action)
        return run

    def step(self) -> list[Run]:
        """One engine step, and what the programs make of it; returns the requests that ended in it."""
        for thread in self.core.step():
            run = self._runs.get(thread.family.id)
            if run is not None and thread.status is Status.STOPPED:
                self._guarded(run, self._stopped, thread)
        for run in self.active:
            self._guarded(run, self._look_after)
            limit = run.request.guards.max_wall_s
            if limit is not None and run.wall_s > limit:
                self._guarded(run, self._wind_up)
        done, self._done = self._done, []
        return done

    def run(self) -> None:
        """Steps until all requests have ended."""
        while self._runs:
            self.step()

    def cancel(self, run: Run) -> None:
        """Ends a request at once; its pages come free. One that has ended stays as it is."""
        self._end(run, "cancelled")

    # What happened.

    def _guarded(self, run: Run, handle, *args) -> None:
        try:
            handle(run, *args)
        except Exception as error:
            if run.finish_reason != "cancelled":  # within this very answer: the rest of it can only fail
                self._end(run, "error")
                run.error, run.finish_reason = error, "error"
            self.core.cancel(run.root)  # what an end that failed has left

    def _stopped(self, run: Run, thread: Thread) -> None:
        stop = thread.stop
        assert stop is not None
        run.budget.note(thread)
        if run.first is not None:
            action: Action = run.first
            run.first = None
        else:
            if stop.reason == "prefilled" and thread.id in run.starved:
                stop = Stop("length")
            if self._turned_back(run, thread, stop):
                return
            action = run.program.on_stop(thread, stop)
        self._apply(run, thread, action)

    def _look_after(self, run: Run) -> None:
        """Goes on where no stop says so: threads cancelled from outside, programs that wait for nothing."""
        if run.finish_reason is not None:
            return
        if run.root.is_done:
            self._end(run, "cancelled")
            return
        threads = run.root.family.threads
        for parent in [t for t in threads if t.status is Status.FORKED]:
            if parent.status is not Status.FORKED:
                continue  # asking one parent may end another
            alive = [child for child in parent.children if not child.is_done]
            if not alive or any(child.id in run.ended for child in alive):
                self._ask_parent(run, parent)
        if run.held:
            for parent in reversed(threads):  # what goes on deep below a child takes its place
                if parent.status is Status.FORKED:
                    self._begin_held(run, parent)
        if run.finish_reason is None and not any(t.status in WANTS_TO_RUN for t in threads):
            self._idle(run)

    def _idle(self, run: Run) -> None:
        """Asks the program what comes next where no thread of the request wants to run."""
        threads = run.root.family.threads
        run.budget.settle(run.root)
        run.num_idle = run.num_idle + 1 if run.num_tokens == (total := total_tokens(run.root)) else 0
        run.num_tokens = total
        acted = False
        waiting = [t for t in threads if t.status is Status.STOPPED and t.id not in run.ended]
        if run.num_idle <= 8 + len(threads):  # a program that goes round in circles
            for thread, action in run.program.on_idle(waiting):
                acted = True
                if not thread.is_done:
                    self._apply(run, thread, action)
                if run.finish_reason is not None:
                    return
        if not acted:
            self._degrade(run, run.root, "the program waits for nothing")
            self._end(run, "stalled")

    def _wind_up(self, run: Run) -> None:
        """The request's time is over: its program closes and joins what there is, without a token being sampled."""
        if run.finish_reason is not None:
            return
        run.is_late = True
        self._degrade(run, run.root, f"max_wall_s = {run.request.guards.max_wall_s:g} is over")
        threads = run.root.family.threads
        for _ in range(8 + len(threads)):  # a program that goes on forcing tokens
            if run.root.status is not Status.FORKED:
                break
            for thread in threads:
                if thread.status in WANTS_TO_RUN and thread is not run.root:
                    self.core.interrupt(thread, "wall_clock")
                    self._stopped(run, thread)
            self._look_after(run)
        if run.finish_reason is None:
            if run.root.status in WANTS_TO_RUN:
                self.core.interrupt(run.root, "wall_clock")
            self._end(run, "wall_clock")
