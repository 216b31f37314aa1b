"""Skeletons of thought, byte for byte; strategies by name."""

import pytest
from transcripts import Transcripts, assert_all_pages_free, scripted_engine

from apr_jax.reasoning.deciding import Deciding, first
from apr_jax.reasoning.program import Guards
from apr_jax.reasoning.programs import STRATEGIES, make_program
from apr_jax.reasoning.strategies.options import SkeletonOptions, StrategyOptions, ThoughtOptions
from apr_jax.reasoning.strategies.skeleton_of_thought import SkeletonOfThought
from apr_jax.testing import byte_tokenizer
from apr_jax.types import SamplingParams

LONG = SamplingParams(max_new_tokens=300)
OPTIONS = StrategyOptions(skeleton=SkeletonOptions(outline_prompt="\n1."))
PROGRAM = SkeletonOfThought(byte_tokenizer(), OPTIONS)
TEXTS = {"": " Be brief\n2. Be clear", "0.0": "Say less.", "0.1": "Say it plainly, and once."}


def test_points_are_expanded_side_by_side_behind_the_outline():
    engine = scripted_engine(Transcripts(byte_tokenizer(), TEXTS))
    out = engine.generate("P", PROGRAM, sampling=LONG)
    points = "\n\n1. Be brief: Say less.\n\n2. Be clear: Say it plainly, and once.\n"
    assert out.text == "\n1. Be brief\n2. Be clear" + points
    assert out.answer == points.strip() and out.finish_reason == "eos" and not out.degraded
    outline, longest = len("\n1. Be brief\n2. Be clear"), len("\n\n2. Be clear: Say it plainly, and once.") + 1
    assert out.metrics.critical_path_tokens == outline + longest + 1
    assert out.metrics.total_tokens == outline + len(points) + 2
    starts = [thread.start_position for thread in out.threads[1:]]
    assert starts == [2 + outline] * 2  # the outline's end is taken back
    assert_all_pages_free(engine)


def test_an_outline_without_points_or_a_refused_fork_is_the_answer():
    engine = scripted_engine(Transcripts(byte_tokenizer(), {"": "\nno points"}))
    out = engine.generate("P", PROGRAM, sampling=LONG)
    assert out.answer == "1.\nno points"
    assert out.degraded == ["thread 0: an outline without points is the answer itself"]
    engine = scripted_engine(Transcripts(byte_tokenizer(), TEXTS))
    out = engine.generate("P", PROGRAM, sampling=LONG, guards=Guards(max_depth=0))
    assert out.text == "\n1. Be brief\n2. Be clear" and out.finish_reason == "eos"
    assert_all_pages_free(engine)


@pytest.mark.parametrize("budget", range(1, 90, 4))
def test_any_budget_ends_within_it(budget):
    engine = scripted_engine(Transcripts(byte_tokenizer(), TEXTS))
    out = engine.generate("P", PROGRAM, sampling=SamplingParams(max_new_tokens=budget))
    assert out.finish_reason in ("eos", "length")
    assert out.metrics.critical_path_tokens <= max(budget, 3)
    assert_all_pages_free(engine)


def test_programs_are_made_by_name():
    tokenizer = byte_tokenizer()
    for name, strategy in STRATEGIES.items():
        program = make_program(name, tokenizer, options=OPTIONS)
        assert type(program) is strategy and program.name == name and program.options is OPTIONS
        with pytest.raises(ValueError, match="no joins whose time could be chosen"):
            make_program(name, tokenizer, when=first())
    assert isinstance(make_program("multiverse", tokenizer, when=first()), Deciding)
    with pytest.raises(ValueError, match="beam_width is 9, must be <= num_samples = 8"):
        StrategyOptions(beam_width=9)
    with pytest.raises(ValueError, match="search is 'random', not one of"):
        ThoughtOptions(search="random")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must have one group"):
        SkeletonOptions(point="a")
