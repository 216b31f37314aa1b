"""The Multiverse grammar on written-down threads: the text byte for byte, the tree, and what degrades."""

import pytest
from transcripts import Transcripts, assert_all_pages_free, scripted_engine

from apr_jax.reasoning.program import Guards
from apr_jax.testing import byte_tokenizer
from apr_jax.types import SamplingParams

PLAN = "<Parallel><Goal><Outline>1: add</Outline><Outline>2: multiply</Outline></Goal>"
AFTER = " both done</Conclusion></Parallel> answer: 7"
LONG = SamplingParams(max_new_tokens=600)


def run(texts: dict[str, str], *, sampling=LONG, guards=Guards(), **engine_fields):  # noqa: B008 (frozen)
    tokenizer = byte_tokenizer()
    engine = scripted_engine(Transcripts(tokenizer, texts), tokenizer, **engine_fields)
    out = engine.generate("Question?", program="multiverse", sampling=sampling, guards=guards)
    assert_all_pages_free(engine)
    return out


def test_flat_block_byte_for_byte():
    out = run({"": f"Hm. {PLAN}{AFTER}", "0.0": " 3 + 4 = 7</Path>", "0.1": " 3 * 4 = 12, no</Path>"})
    assert out.text == (
        "Hm. <Parallel><Goal><Outline>1: add</Outline><Outline>2: multiply</Outline></Goal>"
        "<Path>1: 3 + 4 = 7</Path><Path>2: 3 * 4 = 12, no</Path>"
        "<Conclusion> both done</Conclusion></Parallel> answer: 7"
    )
    assert out.answer == "answer: 7"
    assert out.finish_reason == "eos"
    assert out.degraded == []
    tokenizer = byte_tokenizer()
    prompt_len = 1 + len("Question?")
    root, first, second = out.threads
    assert (root.id, root.parent, root.start_position) == (0, None, 0)
    assert tokenizer.decode(out.token_ids) == root.text == f"Hm. {PLAN}<Conclusion>{AFTER}"
    fork_position = prompt_len + len(tokenizer.encode(f"Hm. {PLAN}"))
    for child, ordinal in ((first, 1), (second, 2)):
        assert (child.id, child.parent, child.start_position) == (ordinal, 0, fork_position)
        assert child.status == "finished"
    assert first.text == "<Path>1: 3 + 4 = 7</Path>"
    assert tokenizer.decode(out.text_ids) == out.text


def test_flat_block_metrics():
    out = run({"": f"Hm. {PLAN}{AFTER}", "0.0": " 3 + 4 = 7</Path>", "0.1": " 3 * 4 = 12, no</Path>"})
    encode = byte_tokenizer().encode
    root = len(encode(f"Hm. {PLAN}<Conclusion>{AFTER}")) + 1  # and the end of sequence
    paths = [len(encode("<Path>1: 3 + 4 = 7</Path>")), len(encode("<Path>2: 3 * 4 = 12, no</Path>"))]
    metrics = out.metrics
    assert metrics.total_tokens == root + sum(paths)
    assert metrics.critical_path_tokens == root + max(paths)
    assert metrics.acceleration_ratio == pytest.approx(1 - (root + max(paths)) / (root + sum(paths)))
    outside = len(encode("Hm. ")) + len(encode(" answer: 7")) + 1
    assert metrics.parallel_ratio == pytest.approx(1 - outside / metrics.total_tokens)
    assert metrics.num_threads == 3
    assert metrics.reprefill_tokens == 0
    assert metrics.max_context_tokens >= 1 + len("Question?") + root - 1 + sum(paths)
    assert metrics.peak_pages > 0


def test_nested_block_byte_for_byte():
    inner = "<Parallel><Goal><Outline>1.1: a</Outline><Outline>1.2: b</Outline></Goal>"
    out = run(
        {
            "": f"{PLAN} 2nd block next</Conclusion></Parallel>{PLAN}{AFTER}",
            "0.0": f" deeper {inner} inner</Conclusion></Parallel> so 7</Path>",
            "0.0/0.0": " left</Path>",
            "0.0/0.1": " right, longer</Path>",
            "0.1": " nothing</Path>",
            "1.0": " x</Path>",
            "1.1": " y</Path>",
        }
    )
    assert out.text == (
        "<Parallel><Goal><Outline>1: add</Outline><Outline>2: multiply</Outline></Goal>"
        "<Path>1: deeper <Parallel><Goal><Outline>1.1: a</Outline><Outline>1.2: b</Outline></Goal>"
        "<Path>1.1: left</Path><Path>1.2: right, longer</Path>"
        "<Conclusion> inner</Conclusion></Parallel> so 7</Path>"
        "<Path>2: nothing</Path>"
        "<Conclusion> 2nd block next</Conclusion></Parallel>"
        "<Parallel><Goal><Outline>1: add</Outline><Outline>2: multiply</Outline></Goal>"
        "<Path>1: x</Path><Path>2: y</Path>"
        "<Conclusion> both done</Conclusion></Parallel> answer: 7"
    )
    assert [thread.parent for thread in out.threads] == [None, 0, 0, 1, 1, 0, 0]
    assert out.degraded == []
    encode = byte_tokenizer().encode
    longest_inner = len(encode("<Path>1.2: right, longer</Path>"))
    child = len(encode(out.threads[1].text)) + longest_inner
    root = len(encode(out.threads[0].text)) + 1
    assert out.metrics.critical_path_tokens == root + child + len(encode("<Path>1: x</Path>"))


def test_unclosed_path_is_closed_and_joined():
    out = run(
        {"": PLAN + AFTER, "0.0": " never ends" * 40, "0.1": " done</Path>"},
        guards=Guards(max_thread_tokens=100),
    )
    first = out.threads[1]
    assert first.text.startswith("<Path>1: never ends") and first.text.endswith("</Path>")
    assert len(first.token_ids) == 100
    assert "<Path>2: done</Path><Conclusion> both done</Conclusion></Parallel> answer: 7" in out.text
    assert len(out.degraded) == 1 and "without </Path> (length)" in out.degraded[0]


def test_end_of_sequence_inside_a_path_is_closed():
    out = run({"": PLAN + AFTER, "0.0": " stops here", "0.1": " done</Path>"})
    assert out.text == f"{PLAN}<Path>1: stops here</Path><Path>2: done</Path><Conclusion>{AFTER}"
    assert len(out.degraded) == 1 and "without </Path> (eos)" in out.degraded[0]


def test_closer_outside_of_a_block_is_text():
    out = run({"": "a</Path>b"})
    assert out.text == "a</Path>b"
    assert out.degraded == ["thread 0: </Path> outside of a thread"]


@pytest.mark.parametrize(
    "said, reason",
    [
        ("<Parallel><Goal>no outlines</Goal> goes on", "</Goal> without outlines"),
        ("x</Goal> goes on", "</Goal> without <Goal>"),
        ("<Outline>1: before the goal</Outline><Goal></Goal> goes on", "</Goal> without outlines"),
    ],
)
def test_no_outlines_goes_on_in_plain_text(said, reason):
    out = run({"": said})
    assert out.text == said
    assert len(out.threads) == 1
    assert any(reason in each for each in out.degraded)


def test_repeated_outlines_are_dropped():
    plan = "<Goal><Outline>1: a</Outline><Outline> 1 : again</Outline><Outline>3: c</Outline></Goal>"
    out = run({"": f"{plan} end", "0.0": "x</Path>", "0.1": "y</Path>"})
    assert out.text == f"{plan}<Path>1:x</Path><Path>3:y</Path><Conclusion> end"
    assert out.degraded == ["thread 0: outline 1 is there twice: dropped"]


def test_fork_beyond_the_depth_is_text():
    out = run({"": PLAN + AFTER, "0.0": f"{PLAN} alone</Path>", "0.1": "y</Path>"}, guards=Guards(max_depth=1))
    assert f"<Path>1:{PLAN} alone</Path><Path>2:y</Path>" in out.text
    assert out.degraded == ["thread 1: fork refused: depth 2 is beyond max_depth = 1"]


def test_fan_out_and_rounds_are_bounded():
    out = run({"": PLAN + AFTER + PLAN + " end", "0.0": "x</Path>"}, guards=Guards(max_fan_out=1, max_rounds=1))
    assert out.text == f"{PLAN}<Path>1:x</Path><Conclusion>{AFTER}{PLAN} end"
    assert len(out.degraded) == 3 and "max_fan_out = 1" in out.degraded[0] and "max_rounds is 1" in out.degraded[2]


def test_fork_without_pages_is_text():
    tokenizer = byte_tokenizer()
    at_fork = len(tokenizer.encode("Question?" + PLAN)) + 1
    bound = -(-at_fork // 4) + 1  # room for one page, two children need two
    out = run({"": PLAN + AFTER, "0.0": "", "0.1": ""}, page_size=4, max_family_pages=bound)
    assert len(out.threads) == 1
    assert len(out.text) > len(PLAN) and (PLAN + AFTER).startswith(out.text)
    assert out.finish_reason == "pages"
    assert len(out.degraded) == 1 and "fork refused: " in out.degraded[0] and "pages" in out.degraded[0]


def test_budget_bounds_the_critical_path_and_ends_cleanly():
    texts = {"": PLAN + AFTER, "0.0": " long" * 100, "0.1": " short</Path>"}
    used = len(byte_tokenizer().encode(PLAN))
    for max_new_tokens in range(used - 2, used + 40):
        out = run(texts, sampling=SamplingParams(max_new_tokens=max_new_tokens))
        assert out.metrics.critical_path_tokens == max_new_tokens
        assert out.finish_reason == "length"
        if len(out.threads) > 1:
            assert out.threads[1].text.endswith("</Path>")
            assert out.token_ids[used] == byte_tokenizer().token_id("<Conclusion>")


def test_budget_of_the_family_is_shared_evenly():
    texts = {"": PLAN + AFTER, "0.0": " long" * 100, "0.1": " long" * 100}
    out = run(texts, guards=Guards(max_family_tokens=300))
    assert out.metrics.total_tokens <= 300
    assert len(out.threads[1].token_ids) == len(out.threads[2].token_ids)


@pytest.mark.parametrize(
    "field, value",
    [("max_depth", -1), ("max_fan_out", 0), ("max_thread_tokens", 0), ("max_family_tokens", 0)],
)
def test_bad_guards_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        Guards(**{field: value})
