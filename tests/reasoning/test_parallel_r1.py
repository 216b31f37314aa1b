"""The Parallel-R1 grammar on written-down threads: the text byte for byte, the second prefill, bounds."""

import pytest
from transcripts import Transcripts, assert_all_pages_free, grammar_tokenizer, scripted_engine

from apr_jax.reasoning.grammars.parallel_r1 import PARALLEL_R1
from apr_jax.testing import tiny_config
from apr_jax.tokenizers import ByteTokenizer
from apr_jax.types import SamplingParams

TEXTS = {"": "Hm. <Parallel> both</Summary> 7", "0.0": "3 + 4 = 7</Path>", "0.1": "3 * 4 = 12, no</Path>"}
LONG = SamplingParams(max_new_tokens=900)
ONE, SEVERAL = grammar_tokenizer(PARALLEL_R1), ByteTokenizer()


def run(texts, tokenizer=ONE, *, sampling=LONG, **engine_fields):
    engine = scripted_engine(Transcripts(tokenizer, texts), tokenizer, **engine_fields)
    out = engine.generate("Q?", "parallel_r1", sampling=sampling)
    assert_all_pages_free(engine)
    return out


@pytest.mark.parametrize("tokenizer", [ONE, SEVERAL], ids=["one token", "several"])
def test_transcript_byte_for_byte(tokenizer):
    out = run(TEXTS, tokenizer)
    assert out.text == (
        "Hm. <Parallel><Path>3 + 4 = 7</Path><Path>3 * 4 = 12, no</Path></Parallel>\n<Summary> both</Summary> 7"
    )
    assert out.answer == "7" and out.degraded == [] and out.finish_reason == "eos"


def test_metrics():
    """Counted by hand with every tag one token and every other character one."""
    out = run(TEXTS)
    root, paths = 4 + 1 + 3 + 5 + 1 + 2 + 1, [1 + 9 + 1, 1 + 14 + 1]
    assert [len(thread.token_ids) for thread in out.threads] == [root, *paths]
    metrics = out.metrics
    assert (metrics.total_tokens, metrics.critical_path_tokens) == (root + sum(paths), root + max(paths))
    assert metrics.parallel_ratio == pytest.approx(1 - (4 + 2 + 1) / metrics.total_tokens)
    assert metrics.reprefill_tokens == paths[1]


def test_paths_are_sampled_even_where_the_request_is_greedy():
    seen, said = {}, Transcripts(ONE, TEXTS)

    def script(thread, ids):
        seen.setdefault(thread.path, set()).add(thread.sampling.temperature)
        return said(thread, ids)

    scripted_engine(script, ONE).generate("Q?", "parallel_r1", sampling=LONG)
    assert seen == {(): {0.0}, ((0, 0),): {1.0}, ((0, 1),): {1.0}}


def test_a_path_has_at_most_4096_tokens_of_its_own():
    model = tiny_config(vocab_size=ONE.vocab_size, max_position=20_000)
    out = run(
        {"": "<Parallel>end", "0.0": "x" * 5000, "0.1": "y</Path>"},
        sampling=SamplingParams(max_new_tokens=9000),
        model_config=model,
        page_size=16,
        num_pages=1024,
        steps_per_dispatch=128,
    )
    assert out.text == f"<Parallel><Path>{'x' * 4096}</Path><Path>y</Path></Parallel>\n<Summary>end"
    assert out.degraded == ["thread 1: ended without </Path> (length)"]


def test_a_block_inside_a_path_is_text():
    out = run({"": "<Parallel>end", "0.0": "a<Parallel>b</Path>", "0.1": "y</Path>"})
    assert out.text == "<Parallel><Path>a<Parallel>b</Path><Path>y</Path></Parallel>\n<Summary>end"
    assert out.degraded == ["thread 1: <Parallel> inside a thread is text: parallel_r1 does not nest"]


def test_a_closer_stands_in_place_of_an_end_of_sequence():
    out = run({"": "<Parallel>end", "0.0": "cut short", "0.1": "y</Path>"})
    assert out.text == "<Parallel><Path>cut short</Path><Path>y</Path></Parallel>\n<Summary>end"
    assert out.threads[1].token_ids == ONE.encode("<Path>cut short</Path>")
    assert ONE.eos_ids[0] not in out.text_ids[:-1]
    assert out.degraded == ["thread 1: ended without </Path> (eos)"]
    assert out.metrics.overshoot_tokens == 1
