"""Bounds on tokens: what holds under each, and that `needed` is true: with that bound a request runs the same."""

import pytest
from test_fuzz import babble, engine_for, pieces_of
from transcripts import assert_all_pages_free, grammar_tokenizer

from apr_jax.reasoning.deciding import Deadline, first
from apr_jax.reasoning.driver import Driver
from apr_jax.reasoning.grammars.multiverse import MULTIVERSE
from apr_jax.reasoning.program import Guards, Request
from apr_jax.reasoning.programs import GRAMMARS, make_program
from apr_jax.reasoning.strategies.options import StrategyOptions
from apr_jax.types import SamplingParams

WIDE = {"critical_path": 400, "total": 1500, "context": 1500}
OPTIONS = StrategyOptions(num_samples=4, separator="a", max_steps=5, extract_answer=lambda text: text[-1:])
PROGRAMS = {
    "multiverse": {},
    "multiverse first": {"when": first()},
    "multiverse deadline": {"when": Deadline(12)},
    "multiverse conclusion": {"join": "conclusion"},
    "npr": {},
    "threadweaver": {},
    "self_consistency": {},
    "best_of_n": {},
    "beam_search": {},
}


def request(bounds: dict[str, int]) -> Request:
    return Request(
        token_ids=list(range(60, 72)),
        sampling=SamplingParams(max_new_tokens=bounds["critical_path"]),
        guards=Guards(max_depth=3, max_family_tokens=bounds["total"], max_context_tokens=bounds["context"]),
    )


def run(label: str, seed: int, bounds: dict[str, int]):
    """A request that babbles, alone: how it ended, what each thread said, and what it was bounded by."""
    name = label.split()[0]
    grammar = GRAMMARS.get(name, MULTIVERSE)
    tokenizer = grammar_tokenizer(grammar)
    script = babble(tokenizer, pieces_of(grammar), seed)
    engine = engine_for(script, tokenizer, max_position=1000)
    with Driver(engine) as driver:
        run = driver.submit(request(bounds), make_program(name, tokenizer, options=OPTIONS, **PROGRAMS[label]))
        driver.run()
    assert run.error is None
    output = engine.collect(run)
    assert_all_pages_free(engine)
    return run, output


def outcome(output) -> dict:
    """All of it but times, and contexts of what a dispatch ran beyond a decision."""
    return {
        "text": output.text,
        "threads": output.threads,
        "reason": output.finish_reason,
        "degraded": output.degraded,
        "total": output.metrics.total_tokens,
        "path": output.metrics.critical_path_tokens,
    }


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("label", PROGRAMS)
def test_what_is_needed_is_enough_and_bounds_hold(label, seed):
    free, unbounded = run(label, seed, WIDE)
    compared = 0
    for kind, needed in free.budget.needed.items():
        for tokens in sorted({needed, (needed + WIDE[kind]) // 2, *(max(1, needed * i // 4) for i in (1, 3))}):
            _, output = run(label, seed, {**WIDE, kind: tokens})
            if tokens >= needed:
                assert outcome(output) == outcome(unbounded), (kind, tokens, needed)
                compared += tokens < WIDE[kind]
            spent = {
                "critical_path": output.metrics.critical_path_tokens,
                "total": output.metrics.total_tokens,
                "context": output.metrics.max_context_tokens,
            }
            assert spent[kind] <= max(tokens, 12 if kind == "context" else 0), (kind, tokens, spent)
    assert compared or unbounded.finish_reason in ("length", "context")


def test_one_token_less_than_needed_may_change_a_run():
    """So the bound is not wasteful: a thread had exactly that much left."""
    changed = 0
    for seed in range(6):
        free, unbounded = run("multiverse", seed, WIDE)
        for kind, needed in free.budget.needed.items():
            if 2 < needed < WIDE[kind]:
                _, output = run("multiverse", seed, {**WIDE, kind: needed - 2})
                changed += outcome(output) != outcome(unbounded)
    assert changed


def test_a_join_that_does_not_fit_the_context_ends_the_request():
    free, unbounded = next(
        (r, o) for r, o in (run("multiverse", seed, WIDE) for seed in range(20)) if len(o.threads) > 2 and r.root.joins
    )
    at_join = min(record.at for record in free.root.joins)
    bound = 12 + at_join + max(len(t.token_ids) for t in unbounded.threads[1:]) + 8
    _, output = run("multiverse", free.root.family.seed, {**WIDE, "context": bound})
    assert output.metrics.max_context_tokens <= bound


def test_a_prompt_beyond_the_context_bound_says_nothing():
    _, output = run("multiverse", 0, {**WIDE, "context": 5})
    assert (output.finish_reason, output.token_ids) == ("context", [])
