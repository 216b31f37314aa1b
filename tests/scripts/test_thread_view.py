"""What a person sees of threads, in a terminal and elsewhere."""

import io

from rich.console import Console
from thread_view import LiveView, PlainView, ThreadView

from apr_jax.config import EngineConfig
from apr_jax.reasoning.api import Engine
from apr_jax.testing import byte_tokenizer, tiny_config
from apr_jax.testing.scripted import ScriptedRunner
from apr_jax.types import SamplingParams

PLAN = "<Goal><Outline>1: a</Outline><Outline>2: b</Outline></Goal>"


def forking_engine(texts: dict[tuple, str]) -> Engine:
    tokenizer = byte_tokenizer()

    def script(thread, ids):
        said = tokenizer.encode(texts[thread.path])
        index = thread.num_sampled + len(ids) - len(thread.token_ids)
        return said[index] if index < len(said) else tokenizer.eos_ids[0]

    runner = ScriptedRunner(script, EngineConfig().steps_per_dispatch)
    return Engine(tiny_config(), None, tokenizer, runner=runner)


TEXTS = {
    (): f"Hm {PLAN} end</Conclusion>",
    ((0, 0),): f" inner {PLAN} x</Conclusion></Path>",
    ((0, 0), (0, 0)): " deep one</Path>",
    ((0, 0), (0, 1)): " deep two",
    ((0, 1),): " second</Path>",
}


def test_the_tree_shows_every_text_side_by_side():
    engine = forking_engine(TEXTS)
    view = ThreadView(engine.tokenizer)
    engine.listeners.append(view)
    engine.generate("P", "multiverse", sampling=SamplingParams(max_new_tokens=300))
    console = Console(file=io.StringIO(), width=160)
    console.print(view.render(160))
    shown = console.file.getvalue()
    lines = shown.splitlines()
    assert all(len(line) <= 160 for line in lines)
    assert any("<Path>1: inner" in line and "<Path>2: second</Path>" in line for line in lines)
    assert any("<Path>1: deep one</Path>" in line and "<Path>2: deep two" in line for line in lines)
    for piece in ("Hm <Goal>", "<Conclusion> end</Conclusion>", "thread 0 · done", "thread 4 · joined"):
        assert piece in shown
    assert "ended without </Path> (eos)" in " ".join(shown.split())


def test_many_children_wrap_into_even_rows():
    plan = "<Goal>" + "".join(f"<Outline>{i}: x</Outline>" for i in range(1, 8)) + "</Goal>"
    engine = forking_engine({(): plan} | {((0, i),): f"said {i}</Path>" for i in range(7)})
    view = ThreadView(engine.tokenizer)
    engine.listeners.append(view)
    engine.generate("P", "multiverse", sampling=SamplingParams(max_new_tokens=300))
    console = Console(file=io.StringIO(), width=140)
    console.print(view.render(140))
    rows = [line for line in console.file.getvalue().splitlines() if "said" in line]
    assert [line.count("said") for line in rows] == [4, 3]


def test_a_live_view_ends_with_the_whole_text():
    engine = forking_engine({(): "long " * 200})
    view = ThreadView(engine.tokenizer)
    engine.listeners.append(view)
    console = Console(file=io.StringIO(), width=60, force_terminal=True)
    with LiveView(view, console) as live:
        engine.generate("P", sampling=SamplingParams(max_new_tokens=900))
        live.update()
    shown = console.file.getvalue()
    assert "…" in shown  # while it grows, only the last lines
    assert shown.rpartition("…")[2].count("long") > 190


def test_plain_lines_tell_all_in_order():
    engine = forking_engine(TEXTS)
    view, lines = ThreadView(engine.tokenizer), []
    engine.listeners += [view, PlainView(view, lines.append)]
    engine.generate("P", "multiverse", sampling=SamplingParams(max_new_tokens=300))
    assert lines == [
        f"thread 0: Hm {PLAN}",
        "thread 0 forks into 1, 2",
        "thread 2: <Path>2: second</Path>",
        f"thread 1: <Path>1: inner {PLAN}",
        "thread 1 forks into 3, 4",
        "thread 3: <Path>1: deep one</Path>",
        "thread 4: <Path>2: deep two",
        "thread 4 degrades: ended without </Path> (eos)",
        "thread 4: </Path>",
        "thread 1 joins 3, 4 (stitch)",
        "thread 1: <Conclusion> x</Conclusion></Path>",
        "thread 0 joins 1, 2 (stitch)",
        "thread 0: <Conclusion> end</Conclusion>",
    ]
