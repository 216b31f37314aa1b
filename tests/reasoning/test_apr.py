"""APR's protocol on written-down threads: contexts and text byte for byte, splicing, what degrades."""

import pytest
from transcripts import Transcripts, assert_all_pages_free, scripted_engine

from apr_jax.reasoning.grammars.apr import read_nodes, winning_path
from apr_jax.reasoning.program import Guards
from apr_jax.reasoning.programs import make_program
from apr_jax.testing import tiny_config
from apr_jax.tokenizers import ByteTokenizer
from apr_jax.types import SamplingParams

PROMPT = "Moving to Node #0\nCurrent State: 27:[22, 26, 31, 53], Operations: []"
BEFORE = (
    "\nExploring Operation: 53-22=31, Resulting Numbers: [26, 31, 31]\n"
    "Generated Node #0,0: 27:[26, 31, 31] Operation: 53-22=31\n"
    "Exploring Operation: 53-26=27, Resulting Numbers: [22, 27, 31]\n"
    "Generated Node #0,1: 27:[22, 27, 31] Operation: 53-26=27\n"
)
CALLS = (
    "\n<Start Sub Search 0 at level 1> Moving to Node #0,0"
    "\n<Start Sub Search 1 at level 1> Moving to Node #0,1"
    "\n<End Calling Sub Searches>"
)
PATH = (
    "Moving to Node #0,1\nCurrent State: 27:[22, 27, 31], Operations: ['53-26=27']\n"
    "Exploring Operation: 31-22=9, Resulting Numbers: [9, 27]\nExploring Operation: 27+9=36"
    ", Resulting Numbers: [36]\n27,27 equal: Goal Reached"
)
SEARCHES = ["\n36,27 unequal: No Solution\nNo solution found.", f"\n27,27 equal: Goal Reached\n{PATH}\n"]
SPLICED = (
    "<Sub Searches>\n"
    "<No Solution in Sub Search 0 at level 1 at Node #0,0>\n"
    "<Goal Reached in Sub Search 1 at level 1 at Node #0,1>\n"
    f"{PATH}\n"
    "<End Sub Searches>\n"
)
AFTER = f"Moving to Node #0,1\n27,27 equal: Goal Reached\n{PATH}"
TAGS = ("<Calling Sub Searches>", "<End Calling Sub Searches>", "<Sub Searches>", "<End Sub Searches>")
ONE, SEVERAL = ByteTokenizer(TAGS), ByteTokenizer()
LONG = SamplingParams(max_new_tokens=3000)
TEXTS = {
    "": f"{BEFORE}<Calling Sub Searches>{AFTER}",
    "0.0": CALLS,
    "0.0/0.0": SEARCHES[0],
    "0.0/0.1": SEARCHES[1],
}


def run(texts, tokenizer=ONE, *, prompt=PROMPT, sampling=LONG, guards=Guards(), script=None, **engine_fields):  # noqa: B008
    engine = scripted_engine(
        script or Transcripts(tokenizer, texts),
        tokenizer,
        model_config=tiny_config(vocab_size=tokenizer.vocab_size, max_position=4096),
        **{"num_pages": 1024, **engine_fields},
    )
    out = engine.generate(prompt, "apr", sampling=sampling, guards=guards)
    assert_all_pages_free(engine)
    return out


@pytest.mark.parametrize("tokenizer", [ONE, SEVERAL], ids=["one token", "several"])
def test_transcript_byte_for_byte(tokenizer):
    out = run(TEXTS, tokenizer)
    assert out.text == BEFORE + SPLICED + AFTER
    assert out.answer == AFTER and out.degraded == [] and out.finish_reason == "eos"
    assert [thread.parent for thread in out.threads] == [None, 0, 1, 1]
    assert out.threads[1].text == f"<Calling Sub Searches>{CALLS}\n"
    assert [thread.text for thread in out.threads[2:]] == SEARCHES


@pytest.mark.parametrize("tokenizer", [ONE, SEVERAL], ids=["one token", "several"])
@pytest.mark.parametrize("max_tail_pages", [1, 2, 32])
def test_every_thread_sees_what_apr_shows_it(tokenizer, max_tail_pages):
    """Also where tails are so short that a tag crosses from one segment to the next."""
    seen, said = {}, Transcripts(tokenizer, TEXTS)

    def script(thread, ids):
        context = [token for segment in thread.context.segments for token in segment.token_ids]
        text = tokenizer.decode(context + thread.pending)
        seen.setdefault((thread.path, len(thread.joins)), []).append(text)
        return said(thread, ids)

    out = run(TEXTS, tokenizer, script=script, steps_per_dispatch=1, max_tail_pages=max_tail_pages)
    assert out.text == BEFORE + SPLICED + AFTER
    call, search = ((0, 0),), ((0, 0), (0, 1))
    assert seen[(), 0][0] == PROMPT
    assert f"{PROMPT}{BEFORE}<Calling Sub Searches>".startswith(seen[(), 0][-1])
    assert seen[call, 0][-1].startswith(f"{PROMPT}{BEFORE}<Calling Sub Searches>\n<Start Sub Search 0 at level 1>")
    assert seen[search, 0][0] == "Moving to Node #0,1\nCurrent State: 27:[22, 27, 31], Operations: ['53-26=27']"
    assert seen[(), 1][-1] == PROMPT + BEFORE + SPLICED + AFTER  # no call in it


def test_metrics():
    """Counted by hand with every tag one token and every other character one."""
    out = run(TEXTS)
    call = 1 + 2 * 52 + 1 + 1 + 1  # tag, two lines, a line break before the end, the end, a line break
    searches = [len(SEARCHES[0]) + 1, len(SEARCHES[1]) + 1]  # and the ends of sequence
    spliced = len(SPLICED) - len("<Sub Searches>") - len("<End Sub Searches>") + 2
    root = len(BEFORE) + spliced + len(AFTER) + 1
    assert [len(thread.token_ids) for thread in out.threads] == [root, call, *searches]
    metrics = out.metrics
    assert metrics.total_tokens == root + call + sum(searches)
    assert metrics.critical_path_tokens == root + call + max(searches)
    inside = spliced - 1 + call + sum(searches)  # the line break behind <End Sub Searches> is outside
    assert metrics.parallel_ratio == pytest.approx(inside / metrics.total_tokens)
    assert metrics.overshoot_tokens == 1  # the tag that the root lost to the call
    assert metrics.reprefill_tokens == 0 and metrics.num_threads == 4
    assert metrics.max_context_tokens == 1 + len(PROMPT) + root - 1


@pytest.mark.parametrize("tokenizer", [ONE, SEVERAL], ids=["one token", "several"])
def test_results_in_place_of_a_call_become_one(tokenizer):
    texts = TEXTS | {"": f"{BEFORE}<Sub Searches>{AFTER}"}
    out = run(texts, tokenizer)
    assert out.text == BEFORE + SPLICED + AFTER and out.degraded == []
    assert out.threads[1].text == f"<Calling Sub Searches>{CALLS}\n"


def test_two_rounds():
    again = "\n<Start Sub Search 0 at level 1> Moving to Node #0,0\n<End Calling Sub Searches>"
    texts = TEXTS | {"": f"{BEFORE}<Calling Sub Searches>mid<Calling Sub Searches>end", "1.0": again, "1.0/0.0": "no"}
    out = run(texts)
    last = "<Sub Searches>\n<No Solution in Sub Search 0 at level 1 at Node #0,0>\n<End Sub Searches>\n"
    assert out.text == f"{BEFORE}{SPLICED}mid{last}end"
    inside = out.metrics.parallel_ratio * out.metrics.total_tokens
    outside = len(BEFORE) + 1 + len("mid") + 1 + len("end") + 1
    assert inside == pytest.approx(out.metrics.total_tokens - outside)


def test_a_tokenizer_may_join_a_tag_with_what_is_before_it():
    tokenizer = ByteTokenizer(["\n<Calling"])
    out = run(TEXTS, tokenizer)
    assert out.text == BEFORE + SPLICED + AFTER
    assert out.threads[1].text == f"\n<Calling Sub Searches>{CALLS}\n"


def test_a_conditioned_prompt_begins_no_search():
    seen, said = {}, Transcripts(ONE, TEXTS)

    def script(thread, ids):
        seen.setdefault(thread.path, list(thread.prompt_ids))
        return said(thread, ids)

    run(TEXTS, prompt=f"Sub Call Budget: 2 {PROMPT}", script=script)
    assert seen[(0, 0), (0, 0)][0] == ONE.bos_id
    start = "Moving to Node #0,0\nCurrent State: 27:[26, 31, 31], Operations: ['53-22=31']"
    assert ONE.decode(seen[(0, 0), (0, 0)]) == start


# What degrades.


def test_unknown_and_repeated_nodes_are_dropped():
    calls = CALLS.replace("\n<End", "\n<Start Sub Search 2 at level 1> Moving to Node #0,1\n<Start Sub Search 3 at"
                          " level 1> Moving to Node #7\n<End")  # fmt: skip
    out = run(TEXTS | {"0.0": calls})
    assert out.text == BEFORE + SPLICED + AFTER
    assert out.degraded == [
        "thread 1: a search from node #0,1 is called twice: dropped",
        "thread 1: a search from node #7, which was not generated: dropped",
    ]


class Narrow(ByteTokenizer):
    """Has no token for one text."""

    def __init__(self, missing: str):
        super().__init__(TAGS)
        self.missing = missing

    def encode(self, text, **options):
        if self.missing in text:
            raise ValueError(f"no token for {self.missing!r}")
        return super().encode(text, **options)


def test_a_node_that_the_tokenizer_cannot_write_is_dropped_alone():
    texts = TEXTS | {"": TEXTS[""].replace("53-22=31\nExp", "53%22=31\nExp"), "0.0/0.0": SEARCHES[1]}
    out = run(texts, Narrow("%"), script=Transcripts(ONE, texts))
    reason = "thread 1: a search from node #0,0, which cannot be written (no token for '%'): dropped"
    assert out.degraded == [reason] and out.finish_reason == "eos"
    assert [thread.parent for thread in out.threads] == [None, 0, 1]
    assert "<Goal Reached in Sub Search 0 at level 1 at Node #0,1>" in out.text


def test_a_search_that_could_not_be_told_of_is_not_begun():
    out = run(TEXTS, Narrow("Solution in Sub Search 1"), script=Transcripts(ONE, TEXTS))
    reason = (
        "thread 1: a search from node #0,1, which cannot be written (no token for 'Solution in Sub Search 1'): dropped"
    )
    assert out.degraded == [reason] and out.finish_reason == "eos"
    assert len(out.threads) == 3 and "Sub Search 0 at level 1 at Node #0,0>" in out.text


def test_a_call_of_nothing_stays_text():
    out = run({"": f"{BEFORE}<Calling Sub Searches>end", "0.0": "none<End Calling Sub Searches>"})
    assert out.text == f"{BEFORE}<Calling Sub Searches>none<End Calling Sub Searches>\nend"
    assert out.degraded == ["thread 1: <End Calling Sub Searches> without calls: no search"]
    assert out.finish_reason == "eos"


def test_a_call_that_breaks_off_ends_the_request():
    out = run({"": f"{BEFORE}<Calling Sub Searches>never", "0.0": "\n<Start"})
    assert out.text == f"{BEFORE}<Calling Sub Searches>\n<Start"
    assert out.degraded == ["thread 0: a call ended without <End Calling Sub Searches> (eos)"]
    assert out.finish_reason == "eos"


def test_a_search_that_is_cut_has_found_nothing():
    out = run(TEXTS | {"0.0/0.0": "\n" + "x" * 900}, guards=Guards(max_thread_tokens=700))
    assert out.text == BEFORE + SPLICED + AFTER[: 700 - len(BEFORE + SPLICED) + len("".join(TAGS[2:])) - 2]
    assert out.degraded == ["thread 2: a search ended without an end of sequence (length)"]


def test_calls_do_not_nest():
    out = run(TEXTS | {"0.0/0.0": f"<Calling Sub Searches>{CALLS}"})
    assert out.text == BEFORE + SPLICED + AFTER and len(out.threads) == 4
    assert out.degraded == ["thread 2: <Calling Sub Searches> inside a search is text: apr does not nest"]


@pytest.mark.parametrize("max_depth, num_threads", [(0, 1), (1, 2), (2, 4)])
def test_a_refused_search_is_text(max_depth, num_threads):
    out = run(TEXTS, guards=Guards(max_depth=max_depth))
    assert len(out.threads) == num_threads
    if num_threads == 1:
        assert out.text == f"{BEFORE}<Calling Sub Searches>{AFTER}"
    if num_threads == 2:
        assert out.text == f"{BEFORE}<Calling Sub Searches>{CALLS}\n{AFTER}"
    refused = f"thread {num_threads - 1}: fork refused: depth {max_depth + 1} is beyond max_depth = {max_depth}"
    assert out.degraded == ([refused] if num_threads < 4 else [])


def test_results_that_do_not_fit_are_cut():
    spent = 1 + len(BEFORE) + 1 + 2 * 52 + 3 + len(SEARCHES[1])
    none = SPLICED.replace(f"{PATH}\n", "").replace("Goal Reached", "No Solution")
    cut = 0
    for left in range(0, 400, 19):
        out = run(TEXTS, sampling=SamplingParams(max_new_tokens=spent + left))
        assert out.metrics.critical_path_tokens == spent + left and out.finish_reason == "length"
        if len(out.threads) == 4:
            assert any((BEFORE + results + AFTER).startswith(out.text) for results in (none, SPLICED))
            is_cut = "<End Sub Searches>" not in out.text
            assert any("tokens to splice cut to the" in line for line in out.degraded) is is_cut
            cut += is_cut
    assert cut > 5


def test_a_join_cannot_be_replaced():
    with pytest.raises(ValueError, match="join is 'stitch', program 'apr' has no join to replace"):
        make_program("apr", ONE, "stitch")


# What is read.


def test_nodes_are_read_from_states_and_generations():
    nodes = read_nodes(PROMPT + BEFORE + "Generated Node #5,1: 27:[1] Operation: 1+0=1\n" + PATH)
    assert sorted(nodes) == ["0", "0,0", "0,1"]
    assert str(nodes["0"]) == PROMPT
    assert nodes["0,0"].operations == ("53-22=31",) and nodes["0,1"].numbers == (22, 27, 31)


def test_a_winning_path_is_what_comes_after_the_goal():
    assert winning_path(f"x{SEARCHES[1]}") == PATH
    assert winning_path(SEARCHES[0]) is None
    assert winning_path("27,27 equal: Goal Reached") is None  # reached, but the path is not there
