"""Runs programs over problems, as many side by side as the engine has slots, and records each that has ended."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from apr_jax.config import check
from apr_jax.evaluation.budgets import TokenBudget, budgeted, largest_first
from apr_jax.evaluation.records import Record, RecordStore
from apr_jax.reasoning.api import Engine
from apr_jax.reasoning.driver import Driver
from apr_jax.reasoning.output import Output
from apr_jax.reasoning.program import Guards, Parallelism, Program, Request
from apr_jax.reasoning.run import Run
from apr_jax.tasks.task import Task
from apr_jax.types import SamplingParams

NO_BUDGET = "unlimited"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A program under evaluation.

    Attributes:
      label: as it is spelled; two entries differ in it.
      name: what the task's prompt depends on.
      grammar_fingerprint: of the file that says what the program is; None: it is built in.
    """

    label: str
    name: str
    program: Program
    grammar_fingerprint: str | None = None


class Evaluation:
    """Programs on the same problems, with what they have done already.

    Args:
      sampling: problem i is sampled with seed `sampling.seed` + i.
      store: holds what is finished, and takes what ends.
      reuse: copy a run under a larger budget where it is the same as the one asked for, instead of running it.
      guards, parallelism: of every request, beside its budget.
    """

    def __init__(
        self,
        engine: Engine,
        task: Task,
        problems: Sequence[Any],
        sampling: SamplingParams,
        store: RecordStore,
        reuse: bool = True,
        guards: Guards = Guards(),  # noqa: B008 (frozen)
        parallelism: Parallelism = "on",
    ):
        self.engine = engine
        self.task = task
        self.problems = problems
        self.sampling = sampling
        self.store = store
        self.reuse = reuse
        self.guards = guards
        self.parallelism: Parallelism = parallelism

    def check_prompts(self, entries: Sequence[Entry]) -> None:
        """Refuses a prompt before anything runs.

        Raises:
          ValueError: one is empty, has no tokens, or is longer than the context window; the message names the problem.
        """
        window = self.engine.model_config.max_position
        for name in dict.fromkeys(entry.name for entry in entries):
            for number, problem in enumerate(self.problems):
                try:
                    count = len(self.engine.encode_prompt(self.task.prompt(problem, name)))
                    check(count <= window, f"the prompt has {count} tokens, the context window is {window}")
                except ValueError as error:
                    raise ValueError(f"problem {number}: {error}") from error

    def check_grammars(self, entries: Sequence[Entry]) -> None:
        """Refuses results of a grammar's file that is not what it was, before anything runs.

        Raises:
          ValueError: names the program.
        """
        for entry in entries:
            others = self.store.grammar_fingerprints(entry.label) - {entry.grammar_fingerprint}
            check(not others, f"{entry.label} has results of another text of that file: write new ones elsewhere")

    def run(
        self, entry: Entry, budgets: Sequence[TokenBudget | None], on_done: Callable[[], None] = lambda: None
    ) -> None:
        """Runs what is not finished yet of one program, under each budget.

        Args:
          on_done: called for each problem and budget, those finished before included.

        Raises:
          ValueError: a prompt is empty, longer than the context window or can never fit the cache.
          Exception: what a program raised. Whatever had ended is recorded.
        """
        larger: list[TokenBudget | None] = []
        for budget in largest_first(budgets):
            missing = []
            for number in range(len(self.problems)):
                done = self.store.get(entry.label, budget, number) is not None
                if not done and not self._reused(entry, budget, number, larger):
                    missing.append(number)
                else:
                    on_done()
            for record in self._records(entry, budget, missing):
                self.store.add(record)
                on_done()
            larger.append(budget)

    def records(self, entry: Entry, budget: TokenBudget | None) -> list[Record]:
        """Of all problems, in order, once they have run."""
        found = [self.store.get(entry.label, budget, number) for number in range(len(self.problems))]
        assert None not in found
        return [record for record in found if record is not None]

    def _reused(
        self, entry: Entry, budget: TokenBudget | None, number: int, larger: Sequence[TokenBudget | None]
    ) -> bool:
        """Whether a run under a larger budget is the same as the one asked for; it is copied then."""
        if budget is None or not self.reuse:
            return False
        for other in larger:
            record = self.store.get(entry.label, other, number)
            if record is not None and budget.tokens >= record.needed[budget.kind]:
                source = record.reused_from or (NO_BUDGET if other is None else str(other))
                self.store.add(dataclasses.replace(record, budget=budget, reused_from=source))
                return True
        return False

    def _records(self, entry: Entry, budget: TokenBudget | None, numbers: Sequence[int]) -> Iterator[Record]:
        waiting = iter(numbers)
        running: dict[int, int] = {}  # family id -> problem
        charged: dict[int, float] = {}  # problem -> seconds of the engine's time

        def submit(driver: Driver) -> None:
            for number in itertools.islice(waiting, self.engine.config.max_threads - len(running)):
                prompt = self.engine.encode_prompt(self.task.prompt(self.problems[number], entry.name))
                params = dataclasses.replace(self.sampling, seed=self.sampling.seed + number)
                request = Request(token_ids=prompt, sampling=params, guards=self.guards, parallelism=self.parallelism)
                run = driver.submit(budgeted(request, budget), entry.program)
                running[run.root.family.id], charged[number] = number, 0.0

        with Driver(self.engine) as driver:
            last_s = time.perf_counter()
            submit(driver)
            while running:
                ended = driver.step()
                now_s = time.perf_counter()
                for number in running.values():
                    charged[number] += (now_s - last_s) / len(running)
                last_s = now_s
                for run in ended:
                    number = running.pop(run.root.family.id)
                    if run.error is None:
                        yield self._judge(entry, budget, number, run, charged.pop(number))
                if failed := [run.error for run in ended if run.error is not None]:
                    raise failed[0]
                last_s = time.perf_counter()  # a checker may take long, which is not the engine's time
                submit(driver)

    def _judge(self, entry: Entry, budget: TokenBudget | None, number: int, run: Run, engine_s: float) -> Record:
        output: Output = self.engine.collect(run)
        verdict = self.task.check(self.problems[number], output.text)
        counted = self.task.measure(self.problems[number], [thread.text for thread in output.threads])
        return Record(
            program=entry.label,
            budget=budget,
            problem=number,
            seed=run.request.sampling.seed,
            settings=self.store.fingerprint,
            grammar_fingerprint=entry.grammar_fingerprint,
            correct=verdict.correct,
            answer=verdict.answer,
            reason=verdict.reason,
            finish_reason=output.finish_reason,
            well_formed=self.task.well_formed(output.text),
            degraded=output.degraded,
            metrics={**dataclasses.asdict(output.metrics), **counted, "engine_s": engine_s},
            needed=run.budget.needed,
        )
