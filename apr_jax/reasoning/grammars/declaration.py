"""What a grammar is: tags and rules, as data. `reasoning/grammar.py` follows them."""

import dataclasses
import math
import re
import string
from collections.abc import Mapping
from typing import Any, Literal

from apr_jax.config import check
from apr_jax.engine.thread import JoinMode
from apr_jax.types import SamplingParams

GRAMMAR_JOINS = ("stitch", "prefill", "conclusion")
CHILD_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
CONCLUSION_MARKER = " =>"  # as the embedded model ends its threads; published ones have no marker, and are joined whole
MAX_PATHS = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grammar:
    """One format. Tags may be one token each or several: the first kind stops by id, the second by string.

    Attributes:
      block: the tags around all that belongs to one fork, for metrics and answers.
      plan: the tag that opens the list of outlines.
      trigger: where the model has written this, its thread forks.
      outline: a pattern for one outline in the plan; its one group is the label. An outline where the group is
        missing or empty is dropped. None: there is no plan, and every fork has num_paths children, labelled
        1, 2, ...
      before_fork: forced on the parent between the trigger and its children's headers.
      header: forced at the start of each child; `{label}` is its label.
      closer: a child ends where it has written this.
      after_join: forced when the parent goes on.
      join: what the parent's context becomes, and with it the positions. `stitch` and `conclusion`: children's
        pages are gathered; every child starts behind the parent's last position, the parent goes on behind the
        longest child. `prefill`: children's text is computed again, each seeing the ones before it; positions
        are sequential.
      conclusion_marker: in a child, what follows it is its conclusion, the span that a `conclusion` join keeps.
        Without effect in other joins.
      nested: whether children may fork; if not, a trigger inside them is plain text.
      max_depth: forks above a thread that may fork no more (None: the request's guard alone says so); likewise
        max_rounds: forks of one thread, max_children: outlines of one plan, the first are kept, and
        max_child_tokens: sampled tokens of one child.
      without_outlines: what a thread does behind a plan that names no child.
      unclosed: what the parent does when some child has ended without its closer, beyond putting that there.
      child_sampling: sampling parameters that differ inside children.

    Raises:
      ValueError: the fields contradict each other; the message names one and its value.
    """

    name: str
    block: tuple[str, str]
    plan: str = ""
    trigger: str
    outline: str | None = None
    num_paths: int = 0
    before_fork: str = ""
    header: str
    closer: str
    after_join: str
    join: JoinMode = "stitch"
    conclusion_marker: str | None = None
    nested: bool = True
    max_depth: int | None = None
    max_rounds: int | None = None
    max_children: int | None = None
    max_child_tokens: int | None = None
    without_outlines: Literal["continue", "stop"] = "continue"
    unclosed: Literal["join", "stop"] = "join"
    child_sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self._check_tags()
        self._check_outline()
        for name, allowed in (
            ("join", GRAMMAR_JOINS),
            ("without_outlines", ("continue", "stop")),
            ("unclosed", ("join", "stop")),
        ):
            self._check(name, getattr(self, name) in allowed, f"must be one of {', '.join(allowed)}")
        for name in ("max_depth", "max_rounds", "max_children", "max_child_tokens"):
            value = getattr(self, name)
            self._check(name, value is None or value >= 1, "must be >= 1")
        self._check("max_depth", self.nested or self.max_depth is None, "though nested is false")
        self._check("unclosed", self.unclosed == "join" or not self.nested, "though nested is true")
        for name, value in self.child_sampling.items():
            known = f"child_sampling sets {name}, may set {', '.join(CHILD_SAMPLING)}"
            check(name in CHILD_SAMPLING, f"grammar {self.name!r}: {known}")
            kinds = int if name == "top_k" else int | float
            is_number = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
            what = "a whole number" if name == "top_k" else "a finite number"
            check(is_number, f"grammar {self.name!r}: {name} in child_sampling is {value!r}, must be {what}")
        try:
            SamplingParams(**self.child_sampling)
        except ValueError as error:
            raise ValueError(f"grammar {self.name!r}: child_sampling: {error}") from error

    def _check_tags(self) -> None:
        self._check("block", len(self.block) == 2 and all(self.block), "must be an opening and a closing tag")
        self._check("block", self.block[0] != self.block[1], "its tags must differ")
        for name in ("name", "trigger", "header", "closer", "after_join"):
            self._check(name, bool(getattr(self, name)), "must not be empty")
        self._check("conclusion_marker", self.conclusion_marker != "", "must not be empty")
        stops = {"trigger": self.trigger, "closer": self.closer}
        if self.conclusion_marker is not None:
            stops["conclusion_marker"] = self.conclusion_marker
        for name, tag in stops.items():
            for other, its in stops.items():
                self._check(name, name == other or tag not in its, f"is part of the {other} {its!r}")
        for name, tag in stops.items():
            for forced in ("before_fork", "header", "after_join"):
                self._check(forced, tag not in getattr(self, forced), f"holds the {name} {tag!r}")
            opens = name == "trigger" and tag == self.block[0]
            self._check(name, opens or tag not in self.block, "is a tag of the block as well")
            self._check(name, tag != self.plan, "opens the plan as well")
        try:
            parts = [part[1:] for part in string.Formatter().parse(self.header) if part[1] is not None]
        except ValueError as error:
            raise ValueError(f"grammar {self.name!r}: header is {self.header!r}: {error}") from error
        is_plain = all(part == ("label", "", None) for part in parts)
        self._check("header", is_plain, "may name {label} only, without a format or conversion")

    def _check_outline(self) -> None:
        either = (self.outline is None) == (self.num_paths > 0)
        self._check("num_paths", either, f"with outline = {self.outline!r}: either one says how many children")
        if self.outline is None:
            self._check("plan", not self.plan, "though there is no outline to look for in it")
            self._check("num_paths", self.num_paths <= MAX_PATHS, f"must be <= {MAX_PATHS}")
            self._check("max_children", self.max_children is None, f"though num_paths is {self.num_paths}")
            return
        self._check("plan", bool(self.plan), "must not be empty where there are outlines")
        try:
            pattern = re.compile(self.outline)
        except re.error as error:
            raise ValueError(f"grammar {self.name!r}: outline is {self.outline!r}, no pattern: {error}") from error
        self._check("outline", pattern.groups == 1, f"has {pattern.groups} groups, must have 1, the label")
        self._check("outline", pattern.match("") is None, "matches nothing at all")

    def _check(self, name: str, condition: bool, message: str) -> None:
        check(condition, f"grammar {self.name!r}: {name} is {getattr(self, name)!r}, {message}")
