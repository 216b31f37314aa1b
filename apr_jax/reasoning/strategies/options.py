"""What a client asks of the strategies."""

import dataclasses
import re
from collections.abc import Callable
from typing import Literal

from apr_jax.config import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThoughtOptions:
    """Of `tree_of_thoughts`. All prompts are text that continues what was said.

    Attributes:
      generate: `sample` lets the thoughts of a state be said independently; `propose` lets one thread list them.
      evaluate: `score` as `StrategyOptions.score` has it; `value` asks the model about each state, `vote` shows it
        all states and asks for the best.
      search: `breadth_first` goes on with every state of at least `threshold`, `beam` with the `beam_width` best;
        `depth_first` with the best of the deepest, and ends at the first complete one.
      threshold: states of less are given up.
      num_evaluations: values that are averaged, or votes.
      max_states: states that `depth_first` goes on with, at most.
      thought_prompt: before each thought; propose_prompt: before a list of them, one a line.
      value_prompt: before a value; `read_value` reads what the model says to it.
      vote_prompt: behind the numbered states, before the number of the best.
      answer_prompt: behind the last state, before the answer; None: the last state is the answer.
      max_evaluation_tokens: of a value or a vote. max_proposal_tokens: of a list of thoughts.
    """

    generate: Literal["sample", "propose"] = "sample"
    evaluate: Literal["score", "value", "vote"] = "value"
    search: Literal["breadth_first", "depth_first", "beam"] = "beam"
    threshold: float = 0.0
    num_evaluations: int = 1
    max_states: int = 64
    thought_prompt: str = ""
    propose_prompt: str = "\nPossible next steps, one a line:\n"
    value_prompt: str = "\nCan this reach the answer (sure, likely or impossible)? "
    vote_prompt: str = "\nThe best choice is choice "
    answer_prompt: str | None = None
    max_evaluation_tokens: int = 8
    max_proposal_tokens: int = 256
    read_value: Callable[[str], float] | None = None

    def __post_init__(self):
        for name in ("num_evaluations", "max_states", "max_evaluation_tokens", "max_proposal_tokens"):
            check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}, must be >= 1")
        choices = {
            "generate": ("sample", "propose"),
            "evaluate": ("score", "value", "vote"),
            "search": ("breadth_first", "depth_first", "beam"),
        }
        for name, allowed in choices.items():
            check(getattr(self, name) in allowed, f"{name} is {getattr(self, name)!r}, not one of {', '.join(allowed)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkeletonOptions:
    """Of `skeleton_of_thought`.

    Attributes:
      outline_prompt: behind the prompt, before the outline.
      point: a regular expression with a group for what a point says.
      point_prompt: before a point's text; `{number}`, `{point}`.
    """

    outline_prompt: str = "\nSkeleton of the answer, a few words a point:\n1."
    point: str = r"(?m)^[ \t]*\d+\.[ \t]*(\S.*)$"
    point_prompt: str = "\n\n{number}. {point}: "

    def __post_init__(self):
        check(re.compile(self.point).groups == 1, f"point is {self.point!r}, must have one group")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StrategyOptions:
    """What a client asks of the strategies; each reads its part.

    Attributes:
      num_samples: samples of `self_consistency` and `best_of_n`; candidates a step of the searches, and a state of
        `tree_of_thoughts`.
      temperature: of samples where the request's own is 0, which would make them all alike.
      extract_answer: from a sample's text to what is voted on; None: the text without white space around.
      score: of a text, higher is better; None: the mean log-probability of its sampled tokens.
      accept: (prompt, text) of a sample that ends the search at once, such as a task's checker.
      waits: of `best_of_n`: whether all samples are heard though one was accepted already. The same answer at a higher
        price, for comparison.
      separator: what a step of the searches ends with.
      beam_width: candidates that the searches go on with; each continues num_samples // beam_width times.
      max_steps: of the searches.
    """

    num_samples: int = 8
    temperature: float = 0.7
    extract_answer: Callable[[str], str | None] | None = None
    score: Callable[[str], float] | None = None
    accept: Callable[[str, str], bool] | None = None
    waits: bool = False
    separator: str = "\n"
    beam_width: int = 2
    max_steps: int = 16
    thoughts: ThoughtOptions = ThoughtOptions()
    skeleton: SkeletonOptions = SkeletonOptions()

    def __post_init__(self):
        for name in ("num_samples", "beam_width", "max_steps"):
            check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}, must be >= 1")
        check(self.temperature > 0, f"temperature is {self.temperature}, must be > 0")
        check(bool(self.separator), "separator is empty")
        check(
            self.beam_width <= self.num_samples,
            f"beam_width is {self.beam_width}, must be <= num_samples = {self.num_samples}",
        )

    @property
    def expansion(self) -> int:
        """How often each candidate is continued."""
        return self.num_samples // self.beam_width
