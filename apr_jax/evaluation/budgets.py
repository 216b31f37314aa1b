"""Budgets that an evaluation runs under: of what, how each is enforced, and when one run answers several.

| kind | bounds | by |
|---|---|---|
| `critical_path` | tokens on the longest chain from the prompt to the end | `SamplingParams.max_new_tokens` |
| `total` | tokens of all threads; a fork divides what is left evenly among its children | `Guards.max_family_tokens` |
| `context` | tokens that any one token attends to, the prompt's among them | `Guards.max_context_tokens` |
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

from apr_jax.config import check
from apr_jax.reasoning.program import Request

BudgetKind = Literal["critical_path", "total", "context"]
KINDS: tuple[BudgetKind, ...] = get_args(BudgetKind)


@dataclasses.dataclass(frozen=True)
class TokenBudget:
    """At most so many tokens of a kind."""

    kind: BudgetKind
    tokens: int

    def __post_init__(self):
        check(self.kind in KINDS, f"a budget's kind is {self.kind!r}, must be one of {', '.join(KINDS)}")
        check(self.tokens >= 1, f"a budget is {self.tokens} tokens, must be >= 1")

    def __str__(self) -> str:
        return f"{self.kind}={self.tokens}"


def budgeted(request: Request, budget: TokenBudget | None) -> Request:
    """The request under a budget as well; it ends with a recorded reason where that is spent."""
    sampling, guards = request.sampling, request.guards
    match budget:
        case None:
            return request
        case TokenBudget("critical_path", tokens):
            sampling = dataclasses.replace(sampling, max_new_tokens=min(tokens, sampling.max_new_tokens))
        case TokenBudget("total", tokens):
            guards = dataclasses.replace(guards, max_family_tokens=min(tokens, guards.max_family_tokens))
        case TokenBudget("context", tokens):
            tokens = min(tokens, guards.max_context_tokens or tokens)
            guards = dataclasses.replace(guards, max_context_tokens=tokens)
    return dataclasses.replace(request, sampling=sampling, guards=guards)


def largest_first(budgets: Sequence[TokenBudget | None]) -> list[TokenBudget | None]:
    """Each once. A run under a larger budget may answer smaller ones too (`reasoning.budget.Budget.needed`), and one
    without any may answer all.
    """
    return sorted(dict.fromkeys(budgets), key=lambda budget: -float("inf") if budget is None else -budget.tokens)
