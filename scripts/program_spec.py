"""How a program is spelled on the command line: `NAME+option=value+option=value`.

    multiverse                          as the model was trained
    multiverse+when=first               a join happens at the first path that solves the problem
    multiverse+when=first+max_width=1   the same, one path after the other: no token is spent on paths behind that one
    multiverse+join=conclusion          only conclusions are kept at joins
    best_of_n+score=checker             samples are judged by the task's checker, the first right one ends the others
    best_of_n+score=checker+when=all    the same, but all samples are heard
    tree_of_thoughts+evaluate=score+search=depth_first+max_states=20

Variants of one program stand side by side in one table under the names that they were spelled with.
"""

import dataclasses
import hashlib
import math
import re
from pathlib import Path
from typing import Literal, cast, get_args

from apr_jax.config import check
from apr_jax.engine.thread import JoinMode
from apr_jax.reasoning.deciding import Accept, All, Deadline, Quorum, When, first
from apr_jax.reasoning.grammars.apr import AprProgram
from apr_jax.reasoning.grammars.custom import load_grammar
from apr_jax.reasoning.grammars.declaration import GRAMMAR_JOINS
from apr_jax.reasoning.programs import PROGRAM_NAMES, STRATEGIES
from apr_jax.reasoning.strategies.options import ThoughtOptions

PROGRAM_HELP = f"{', '.join(PROGRAM_NAMES)}, or a grammar's file.toml"
WHEN_HELP = "all, first, quorum:K or deadline:TOKENS"
SEARCH_OPTIONS = ("num_samples", "score", "beam_width", "max_steps")
THOUGHT_OPTIONS = ("generate", "evaluate", "search", "threshold", "num_evaluations", "max_states")
STRATEGY_OPTIONS = {name: SEARCH_OPTIONS for name in STRATEGIES} | {
    "tree_of_thoughts": (*SEARCH_OPTIONS, *THOUGHT_OPTIONS),
    "self_consistency": ("num_samples",),
    "best_of_n": ("num_samples", "score", "when"),
    "skeleton_of_thought": (),
}
OPTIONS_HELP = (
    "Options stand behind it, as in multiverse+when=first+join=conclusion or best_of_n+num_samples=16+score=checker. "
    "Formats take join, when and max_width (apr no join); "
    + "; ".join(f"{name} {', '.join((*options, 'max_width'))}" for name, options in STRATEGY_OPTIONS.items())
    + "."
)
Score = Literal["logprob", "checker"]
_OPTION = re.compile(r"\+(?=\w+=)")
_TOO_MANY = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramSpec:
    """A program and how it is to differ from its default.

    Attributes:
      label: as it was spelled.
      join, when: of a grammar's threads. Of best_of_n, `when` is `first` or `all`.
      num_samples, beam_width, max_steps: of a strategy.
      score: of a strategy: what says which sample is best.
      thoughts: of `tree_of_thoughts`.
      max_width: children of one fork that run side by side.
    """

    label: str
    name: str
    join: JoinMode | None = None
    when: str | None = None
    num_samples: int | None = None
    beam_width: int | None = None
    max_steps: int | None = None
    thoughts: ThoughtOptions = ThoughtOptions()  # noqa: RUF009 (frozen)
    score: Score = "logprob"
    max_width: int | None = None

    @property
    def is_strategy(self) -> bool:
        return self.name in STRATEGIES

    @property
    def takes_when(self) -> bool:
        """Whether there are joins whose time can be chosen."""
        return self.name != "sequential" and not self.is_strategy

    @property
    def takes_join(self) -> bool:
        """Whether the way in which it joins can be chosen: APR splices text, whatever comes."""
        return self.takes_when and self.name != AprProgram.name

    @property
    def grammar_fingerprint(self) -> str | None:
        """Fingerprint of a grammar's file; None: the program is built in."""
        if not self.name.endswith(".toml"):
            return None
        return hashlib.sha256(Path(self.name).read_bytes()).hexdigest()[:12]

    @property
    def format(self) -> str:
        """What a task knows its prompts by: the program's name; of a grammar's file, the `name` in it."""
        return load_grammar(self.name).name if self.name.endswith(".toml") else self.name


def read_spec(text: str) -> ProgramSpec:
    """Raises ValueError for what is no program, or an option that does not go with it."""
    name, *options = _OPTION.split(text)
    known = name in PROGRAM_NAMES or name.endswith(".toml")
    check(known, f"--program={name} is not one of {PROGRAM_HELP}")
    spec = ProgramSpec(label=text, name=name)
    allowed = STRATEGY_OPTIONS.get(name, ())
    if spec.takes_when:
        allowed = ("join", "when") if spec.takes_join else ("when",)
    if name != "sequential":
        allowed = (*allowed, "max_width")
    seen = set()
    for option in options:
        key, _, value = option.partition("=")
        takes = f"takes {', '.join(allowed)}" if allowed else "takes none"
        check(key in allowed, f"--program={text}: {name} has no option {key!r}, it {takes}")
        check(key not in seen, f"--program={text}: {key} is there twice")
        seen.add(key)
        spec = _with_option(spec, key, value)
    if spec.is_strategy and spec.when is not None:
        check(
            spec.score == "checker", f"--program={text}: when goes with score=checker, nothing else ends samples early"
        )
        check(spec.when in ("all", "first"), f"--program={text}: when is {spec.when!r}, must be all or first")
    return spec


def _with_option(spec: ProgramSpec, key: str, value: str) -> ProgramSpec:
    where = f"--program={spec.label}: {key} is {value!r}"
    if key == "join":
        check(value in GRAMMAR_JOINS, f"{where}, must be one of {', '.join(GRAMMAR_JOINS)}")
        return dataclasses.replace(spec, join=cast(JoinMode, value))
    if key == "when":
        read_when(value, None, where)
        return dataclasses.replace(spec, when=value)
    if key == "score":
        check(value in get_args(Score), f"{where}, must be one of {', '.join(get_args(Score))}")
        return dataclasses.replace(spec, score=cast(Score, value))
    if key in ("generate", "evaluate", "search"):
        try:
            return _with_thought(spec, key, value)
        except ValueError as error:
            raise ValueError(f"--program={spec.label}: {error}") from error
    if key == "threshold":
        try:
            threshold = float(value)
        except ValueError:
            threshold = math.nan
        check(math.isfinite(threshold), f"{where}, must be a finite number")
        return _with_thought(spec, key, threshold)
    valid = value.isdecimal() and len(value) < 9 and 1 <= int(value) < _TOO_MANY
    check(valid, f"{where}, must be a whole number in [1, {_TOO_MANY:,})")
    if key in THOUGHT_OPTIONS:
        return _with_thought(spec, key, int(value))
    return dataclasses.replace(spec, **{key: int(value)})


def _with_thought(spec: ProgramSpec, key: str, value: str | float) -> ProgramSpec:
    return dataclasses.replace(spec, thoughts=dataclasses.replace(spec.thoughts, **{key: value}))


def read_when(text: str, accept: Accept | None, where: str | None = None) -> When:
    """When joins happen.

    Args:
      accept: which children `first` and `quorum` count; None: all.
      where: what the text is, for a message.

    Raises:
      ValueError: it is none of WHEN_HELP.
    """
    kind, colon, number = text.partition(":")
    valid = not colon if kind in ("all", "first") else number.isdecimal() and int(number) >= 1
    check(kind in ("all", "first", "quorum", "deadline") and valid, f"{where or repr(text)}, must be {WHEN_HELP}")
    match kind:
        case "all":
            return All()
        case "first":
            return first(accept)
        case "quorum":
            return Quorum(count=int(number), accept=accept)
    return Deadline(int(number))
