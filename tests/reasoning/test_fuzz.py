"""Models that babble: whatever they say, every request ends, with a reason for what went wrong, and holds no
page.
"""

import hashlib

import pytest
from transcripts import assert_all_pages_free, scripted_engine

from apr_jax.reasoning.program import Guards
from apr_jax.testing import byte_tokenizer, tiny_config
from apr_jax.tokenizers import ByteTokenizer
from apr_jax.types import SamplingParams

PIECES = ["<Parallel>", "<Goal>", "</Goal>", "<Outline>", "</Outline>", "<Path>", "</Path>", "<Conclusion>"]
PLANS = [
    "<Goal><Outline>1: a</Outline><Outline>2: b</Outline></Goal>",
    "<Goal><Outline>1:</Outline><Outline>1:</Outline><Outline>2.1:</Outline></Goal>",
    "</Outline></Goal>",
    "<Goal><Outline>...:</Goal>",
]


def babble(tokenizer, seed: int):
    """A script of tags, plans and letters in any order; depends on the seed and the thread's tokens alone."""
    tags = [tokenizer.encode(piece) for piece in PIECES]
    plans = [tokenizer.encode(plan) for plan in PLANS]

    def script(thread, ids):
        """Says what is left of the piece that it is in, else draws the next piece."""
        at, n = 0, thread.num_sampled + len(ids) - len(thread.token_ids)
        for draw in range(10_000):
            digest = hashlib.blake2b(repr((seed, thread.path, draw)).encode(), digest_size=8).digest()
            kind, pick = digest[0] % 16, digest[1]
            if kind < 3:
                said = plans[pick % len(plans)]
            elif kind < 8:
                said = tags[pick % len(tags)]
            elif kind == 8 and pick < 60:
                said = [tokenizer.eos_ids[0]]
            else:
                said = [97 + pick % 26]
            if n < at + len(said):
                return said[n - at]
            at += len(said)
        raise AssertionError("unreachable")

    return script


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("one_token_tags", [True, False])
@pytest.mark.parametrize("num_pages", [512, 24])
def test_babbling_ends_and_leaks_nothing(seed, one_token_tags, num_pages):
    tokenizer = byte_tokenizer() if one_token_tags else ByteTokenizer()
    engine = scripted_engine(
        babble(tokenizer, seed),
        tokenizer,
        model_config=tiny_config(vocab_size=tokenizer.vocab_size, max_position=300),
        page_size=8,
        num_pages=num_pages,
        max_threads=8,
        steps_per_dispatch=4,
    )
    sampling = SamplingParams(max_new_tokens=[40, 100, 290][seed % 3])
    guards = Guards(max_depth=3, max_fan_out=4, max_thread_tokens=[None, 60][seed % 2], max_family_tokens=1500)
    outs = engine.generate([f"Prompt {i}" for i in range(4)], "multiverse", sampling=sampling, guards=guards)
    assert_all_pages_free(engine)
    for out in outs:
        assert out.metrics.total_tokens <= 1500
        assert out.metrics.critical_path_tokens <= sampling.max_new_tokens
        assert out.finish_reason in ("eos", "length", "context", "pages")
        assert tokenizer.decode(out.text_ids).startswith(out.text)
        for thread in out.threads[1:]:
            if thread.status == "finished":
                assert thread.text.startswith("<Path>") and thread.text.endswith("</Path>")
