"""The NPR grammar on written-down threads: the text byte for byte, positions, bounds."""

import pytest
from transcripts import Transcripts, assert_all_pages_free, grammar_tokenizer, scripted_engine

from apr_jax.reasoning.grammars.npr import NPR
from apr_jax.reasoning.program import Guards
from apr_jax.tokenizers import ByteTokenizer
from apr_jax.types import SamplingParams

PLAN = "<guideline>\n<plan>1: add</plan>\n<plan>2: multiply</plan>\n</guideline>"
TEXTS = {
    "": f"{PLAN}both done.\n</takeaway>\n\n\\boxed{{7}}",
    "0.0": " 3 + 4 = 7.\n</step>",
    "0.1": " 3 * 4 = 12, no.\n</step>",
}
LONG = SamplingParams(max_new_tokens=900)


def run(texts, tokenizer=None, *, sampling=LONG, guards=Guards()):  # noqa: B008 (frozen)
    tokenizer = tokenizer or grammar_tokenizer(NPR)
    engine = scripted_engine(Transcripts(tokenizer, texts), tokenizer)
    out = engine.generate("Q?", "npr", sampling=sampling, guards=guards)
    assert_all_pages_free(engine)
    return out


@pytest.mark.parametrize("tokenizer", [grammar_tokenizer(NPR), ByteTokenizer()], ids=["one token", "several"])
def test_transcript_byte_for_byte(tokenizer):
    out = run(TEXTS, tokenizer)
    assert out.text == (
        "<guideline>\n"
        "<plan>1: add</plan>\n"
        "<plan>2: multiply</plan>\n"
        "</guideline>\n"
        "<step>\n"
        "1: 3 + 4 = 7.\n"
        "</step><step>\n"
        "2: 3 * 4 = 12, no.\n"
        "</step><takeaway>\n"
        "both done.\n"
        "</takeaway>\n"
        "\n"
        "\\boxed{7}"
    )
    assert out.answer == "\\boxed{7}" and out.degraded == [] and out.finish_reason == "eos"


def test_metrics_and_positions():
    """Counted by hand with every tag one token and every other character one."""
    out = run(TEXTS)
    plan = 1 + 1 + (1 + 6 + 1) + 1 + (1 + 11 + 1) + 1 + 1  # guideline, two plans, line breaks
    root = plan + 1 + 2 + 23 + 1  # line break, <takeaway> and line break, the rest, end of sequence
    assert root == len(out.token_ids)
    steps = [1 + 3 + 12 + 1, 1 + 3 + 17 + 1]  # tag, "\n1:", text, closer
    assert [len(thread.token_ids) for thread in out.threads] == [root, *steps]
    assert [thread.start_position for thread in out.threads] == [0, 3 + plan + 1, 3 + plan + 1]  # behind the line break
    metrics = out.metrics
    assert (metrics.total_tokens, metrics.critical_path_tokens) == (root + sum(steps), root + max(steps))
    outside = 11 + 1  # line breaks, box, end of sequence
    assert metrics.parallel_ratio == pytest.approx(1 - outside / metrics.total_tokens)
    assert metrics.reprefill_tokens == 0 and metrics.num_threads == 3


def test_branches_have_a_repetition_penalty_of_their_own():
    tokenizer, seen = grammar_tokenizer(NPR), {}
    said = Transcripts(tokenizer, TEXTS)

    def script(thread, ids):
        seen.setdefault(thread.path, set()).add(thread.sampling.repetition_penalty)
        return said(thread, ids)

    scripted_engine(script, tokenizer).generate("Q?", "npr", sampling=LONG)
    assert seen == {(): {1.0}, ((0, 0),): {1.02}, ((0, 1),): {1.02}}


def test_at_most_five_plans():
    plans = "".join(f"<plan>{i}: p</plan>" for i in range(1, 8))
    texts = {"": f"<guideline>{plans}</guideline>end"} | {f"0.{i}": f"{i}</step>" for i in range(5)}
    out = run(texts)
    steps = "".join(f"<step>\n{i + 1}:{i}</step>" for i in range(5))
    assert out.text == f"<guideline>{plans}</guideline>\n{steps}<takeaway>\nend"
    assert out.degraded == [f"thread 0: outline {i} is beyond max_children = 5: dropped" for i in (6, 7)]


def test_no_fork_below_five_others():
    plan = "<guideline><plan>1: p</plan></guideline>"
    names = ["/".join(["0.0"] * depth) for depth in range(6)]
    out = run(dict.fromkeys(names, f"{plan}x</step>"), guards=Guards(max_depth=9))
    assert len(out.threads) == 6
    refused = [line for line in out.degraded if "refused" in line]
    assert refused == ["thread 5: fork refused: depth 6 is beyond npr's max_depth = 5"]
    assert f"1:{plan}x</step><takeaway>\nx</step>" in out.text


def test_where_no_line_break_fits_there_is_no_fork():
    plan = "<guideline><plan>1: p</plan></guideline>"
    at = len(grammar_tokenizer(NPR).encode(plan))
    for left in range(20):
        out = run({"": f"{plan}{'x' * 50}", "0.0": "y" * 50}, sampling=SamplingParams(max_new_tokens=at + left))
        assert out.metrics.critical_path_tokens == at + left and out.finish_reason == "length"
        needed = 1 + 4 + 1 + 1 + 2  # line break, header, a token, closer, takeaway
        assert len(out.threads) == (2 if left >= needed else 1)
        assert len(out.degraded) == 1
        assert ("refused" in out.degraded[0]) is (left < needed)
