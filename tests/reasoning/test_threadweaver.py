"""The ThreadWeaver grammar on written-down threads: the text byte for byte, the second prefill, where it ends."""

import pytest
from transcripts import Transcripts, assert_all_pages_free, grammar_tokenizer, scripted_engine

from apr_jax.reasoning.grammars.threadweaver import THREADWEAVER
from apr_jax.reasoning.program import Guards
from apr_jax.tokenizers import ByteTokenizer
from apr_jax.types import SamplingParams

PLAN = "<Parallel>\n<Outlines>\n<Outline>1: add</Outline><Outline>2: multiply</Outline></Outlines>"
TEXTS = {
    "": f"<think>Hm. {PLAN}<Conclusion> both</Conclusion>\n</Parallel> so</think> 7",
    "0.0": " 3 + 4 = 7</Thread>",
    "0.1": " 3 * 4 = 12, no</Thread>",
}
LONG = SamplingParams(max_new_tokens=900)
ONE, SEVERAL = grammar_tokenizer(THREADWEAVER), ByteTokenizer()


def run(texts, tokenizer=ONE, *, sampling=LONG, guards=Guards(), **engine_fields):  # noqa: B008 (frozen)
    engine = scripted_engine(Transcripts(tokenizer, texts), tokenizer, **engine_fields)
    out = engine.generate("Q?", "threadweaver", sampling=sampling, guards=guards)
    assert_all_pages_free(engine)
    return out


@pytest.mark.parametrize("tokenizer", [ONE, SEVERAL], ids=["one token", "several"])
def test_transcript_byte_for_byte(tokenizer):
    out = run(TEXTS, tokenizer)
    assert out.text == (
        "<think>Hm. <Parallel>\n"
        "<Outlines>\n"
        "<Outline>1: add</Outline><Outline>2: multiply</Outline></Outlines>\n"
        "<Thread>\n"
        "1: 3 + 4 = 7</Thread><Thread>\n"
        "2: 3 * 4 = 12, no</Thread>\n"
        "<Conclusion> both</Conclusion>\n"
        "</Parallel> so</think> 7"
    )
    assert out.degraded == [] and out.finish_reason == "eos"


@pytest.mark.parametrize("tokenizer", [ONE, SEVERAL], ids=["one token", "several"])
def test_a_thread_sees_the_prefix_and_its_own_header(tokenizer):
    seen = {}
    said = Transcripts(tokenizer, TEXTS)

    def script(thread, ids):
        context = [token for segment in thread.context.segments for token in segment.token_ids]
        seen.setdefault(thread.path, tokenizer.decode(context + thread.pending))
        return said(thread, ids)

    engine = scripted_engine(script, tokenizer, steps_per_dispatch=1)
    engine.generate("Q?", "threadweaver", sampling=LONG)
    prefix = f"Q?<think>Hm. {PLAN}"
    for i in (1, 2):
        full = f"{prefix}\n<Thread>\n{i}:"
        assert full.startswith(seen[((0, i - 1),)]) and len(full) - len(seen[((0, i - 1),)]) <= len("<Thread>\n1:")


def test_the_first_threads_pages_are_reused():
    """Counted by hand with every tag one token and every other character one."""
    out = run(TEXTS)
    threads = [1 + 3 + 10 + 1, 1 + 3 + 15 + 1]  # tag, "\n1:", text, closer
    assert [len(thread.token_ids) for thread in out.threads[1:]] == threads
    metrics = out.metrics
    assert metrics.reprefill_tokens == threads[1]  # the second alone is computed again
    before = 7 + 4 + 4 + (1 + 6 + 1) + (1 + 11 + 1) + 1  # <think>, "Hm. ", tags and line breaks, outlines, trigger
    # Line breaks around the threads, a conclusion whose tags are plain, the block's end, " so</think> 7", the end.
    after = 1 + 1 + (12 + 5 + 13) + 1 + 1 + 3 + 8 + 2 + 1
    assert len(out.token_ids) == before + after
    assert metrics.total_tokens == before + after + sum(threads)
    assert metrics.critical_path_tokens == before + after + max(threads)
    outside = 7 + 4 + 3 + 8 + 2 + 1
    assert metrics.parallel_ratio == pytest.approx(1 - outside / metrics.total_tokens)


def test_positions_behind_the_join_are_sequential():
    tokenizer, positions = ONE, []
    said = Transcripts(tokenizer, TEXTS)

    def script(thread, ids):
        if thread.parent is None and thread.joins:
            behind = len(ids) - len(thread.token_ids)  # sampled in this very dispatch
            positions.append(thread.context.next_position + len(thread.pending) + behind)
        return said(thread, ids)

    engine = scripted_engine(script, tokenizer, steps_per_dispatch=1)
    out = engine.generate("Q?", "threadweaver", sampling=LONG)
    prompt_len = 1 + len("Q?")
    last = prompt_len + len(out.text_ids) - 1  # of the end of sequence
    assert positions[-1] == last and positions == list(range(positions[0], last + 1))


def test_a_thread_without_its_closer_ends_generation():
    plan = "<Outlines><Outline>1: a</Outline><Outline>2: b</Outline></Outlines>"
    out = run({"": f"{plan}never said", "0.0": "x" * 60, "0.1": "y</Thread>"}, guards=Guards(max_thread_tokens=80))
    assert out.text.startswith(f"{plan}\n<Thread>\n1:xxx") and out.text.endswith("x</Thread><Thread>\n2:y</Thread>")
    assert out.finish_reason == "unclosed"
    assert out.degraded == ["thread 1: ended without </Thread> (eos)"]
    assert out.metrics.reprefill_tokens == 0
    assert [thread.status for thread in out.threads] == ["finished"] * 3


@pytest.mark.parametrize("one_token", [True, False])
def test_a_plan_without_outlines_ends_generation(one_token):
    out = run({"": "<Outlines>\n1: a</Outlines>never said"}, ONE if one_token else SEVERAL)
    assert out.text == "<Outlines>\n1: a</Outlines>"
    assert out.finish_reason == ("stop_id" if one_token else "stop_string")
    assert out.degraded == ["thread 0: </Outlines> without outlines: no fork"]


def test_without_a_plan_the_text_is_a_sequential_answer():
    out = run({"": "<think>alone</think> 7"})
    assert out.text == "<think>alone</think> 7" and out.degraded == [] and len(out.threads) == 1


def test_duplicate_outlines_are_dropped_and_inner_blocks_are_text():
    plan = "<Outlines><Outline>1: a</Outline><Outline>1: again</Outline><Outline>2.1: b</Outline></Outlines>"
    out = run({"": f"{plan}end", "0.0": f"{PLAN} in</Thread>", "0.1": "y</Thread>"})
    assert out.text == f"{plan}\n<Thread>\n1:{PLAN} in</Thread><Thread>\n2.1:y</Thread>\nend"
    assert out.degraded == [
        "thread 0: outline 1 is there twice: dropped",
        "thread 1: </Outlines> inside a thread is text: threadweaver does not nest",
    ]


def test_rounds_are_capped():
    plan = "<Outlines><Outline>1: a</Outline></Outlines>"
    texts = {"": plan * 33 + "end"} | {f"{i}.0": "</Thread>" for i in range(32)}
    out = run(texts, sampling=SamplingParams(max_new_tokens=900), guards=Guards(max_rounds=99), num_pages=2048)
    assert len(out.threads) == 33 and out.text.endswith(f"</Thread>\n{plan}end")
    assert out.degraded == ["thread 0: fork refused: it would be fork 33 of its thread, threadweaver has 32"]
