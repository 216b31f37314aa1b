"""How programs are spelled."""

import pytest
from program_spec import read_spec, read_when

from apr_jax.reasoning.deciding import All, Deadline, Quorum
from apr_jax.reasoning.strategies.options import ThoughtOptions


def test_options_in_any_order():
    spec = read_spec("multiverse+join=conclusion+when=quorum:2")
    other = read_spec("multiverse+when=quorum:2+join=conclusion")
    assert (spec.name, spec.join, spec.when) == (other.name, other.join, other.when)
    assert (spec.name, spec.join, spec.when) == ("multiverse", "conclusion", "quorum:2")
    assert (spec.is_strategy, spec.takes_join, spec.max_width) == (False, True, None)
    assert read_spec("apr+when=first+max_width=2").max_width == 2


def test_a_file_may_have_a_plus_in_its_name():
    spec = read_spec("my+own/a+b.toml+when=first")
    assert (spec.name, spec.when, spec.label) == ("my+own/a+b.toml", "first", "my+own/a+b.toml+when=first")


def test_strategies():
    spec = read_spec("best_of_n+num_samples=16+score=checker+when=all")
    assert (spec.num_samples, spec.score, spec.when, spec.is_strategy) == (16, "checker", "all", True)
    tree = read_spec("tree_of_thoughts+search=depth_first+threshold=0.5+num_evaluations=3+max_steps=4+beam_width=1")
    assert tree.thoughts == ThoughtOptions(search="depth_first", threshold=0.5, num_evaluations=3)
    assert (tree.max_steps, tree.beam_width) == (4, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("multiverse+first", "--program=multiverse\\+first is not one of"),
        ("multiverse+when=first+when=all", "when is there twice"),
        ("multiverse+join=splice", "join is 'splice', must be one of stitch, prefill, conclusion"),
        ("apr+join=stitch", "apr has no option 'join', it takes when"),
        ("self_consistency+score=checker", "self_consistency has no option 'score', it takes num_samples"),
        ("multiverse+max_width=0", "max_width is '0', must be a whole number in \\[1, 1,000,000\\)"),
        ("sequential+max_width=1", "sequential has no option 'max_width', it takes none"),
        ("best_of_n+num_samples=0", "num_samples is '0', must be a whole number in \\[1, 1,000,000\\)"),
        ("beam_search+search=beam", "it takes num_samples, score, beam_width, max_steps, max_width"),
        ("tree_of_thoughts+search=dfs", "search=dfs: search is 'dfs', not one of breadth_first, depth_first, beam"),
        ("tree_of_thoughts+threshold=nan", "threshold is 'nan', must be a finite number"),
        ("best_of_n+score=good", "score is 'good', must be one of logprob, checker"),
        ("best_of_n+when=first", "when goes with score=checker"),
        ("best_of_n+score=checker+when=quorum:2", "when is 'quorum:2', must be all or first"),
        ("multiverse+when=deadline:0", "when is 'deadline:0', must be all, first"),
        ("multiverse+when=first:2", "when is 'first:2', must be all, first"),
    ],
)
def test_nonsense_is_refused_by_name(text, message):
    with pytest.raises(ValueError, match=message):
        read_spec(text)


def test_when_joins_happen():
    def accept(thread):
        return True

    assert read_when("all", accept) == All()
    assert read_when("first", accept) == Quorum(count=1, accept=accept)
    assert read_when("quorum:3", None) == Quorum(count=3)
    assert read_when("deadline:40", accept) == Deadline(40)
