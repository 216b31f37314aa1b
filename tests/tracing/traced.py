"""Traces of threads that say what is written down here."""

import dataclasses

from transcripts import Transcripts, scripted_engine

from apr_jax.reasoning.driver import Driver
from apr_jax.reasoning.program import Guards, Request
from apr_jax.reasoning.programs import make_program
from apr_jax.testing import byte_tokenizer, tiny_config
from apr_jax.tracing import Limits, Recorder
from apr_jax.types import SamplingParams

TOKENIZER = byte_tokenizer()
HOSTILE = (
    '</script><script>window.hacked = true</script><img src=x onerror="window.hacked = true"><!-- & \u2028 "quoted"'
)


def plan(count: int) -> str:
    return "<Goal>" + "".join(f"<Outline>{i + 1}: part {i + 1}</Outline>" for i in range(count)) + "</Goal>"


def tree(fan_out: tuple[int, ...], path: str = "", depth: int = 0) -> dict[str, str]:
    """Texts of a tree of threads by their paths: fan_out[d] children at depth d."""
    said = f"I am {path or 'the root'}. " + "word " * (sum(path.encode()) * 7 % 23 + 3)
    texts: dict[str, str] = {}
    if depth < len(fan_out):
        said += f"{plan(fan_out[depth])} done with {path}</Conclusion>"
        for i in range(fan_out[depth]):
            texts |= tree(fan_out, f"{path}/0.{i}".strip("/"), depth + 1)
    return {path: said + ("</Path>" if path else "")} | texts


def record(fan_out=(3, 2), *, limits=Limits(), when=None, extra="", prompts=("Why?",), listeners=(), **fields):  # noqa: B008
    """Runs the tree once for each prompt; returns (trace, runs, outputs)."""
    texts = tree(fan_out)
    texts[""] = f"{extra}{texts['']}"
    engine = scripted_engine(
        Transcripts(TOKENIZER, texts),
        TOKENIZER,
        model_config=tiny_config(max_position=20_000),
        **{"page_size": 8, "num_pages": 600, "max_threads": 16, "steps_per_dispatch": 4} | fields,
    )
    sampling, guards = SamplingParams(max_new_tokens=9_000), Guards(max_depth=4, max_fan_out=64)
    with Recorder(engine, limits) as recorder, Driver(engine) as driver:
        engine.listeners += [listener(engine, recorder) for listener in listeners]
        program = make_program("multiverse", TOKENIZER, when=when)
        requests = [Request(token_ids=TOKENIZER.encode(p), sampling=sampling, guards=guards) for p in prompts]
        runs = [driver.submit(request, program) for request in requests]
        driver.run()
    assert recorder not in engine.listeners and not engine.tells_contexts
    outputs = [engine.collect(run) for run in runs]
    metrics = {run.root.family.id: dataclasses.asdict(o.metrics) for run, o in zip(runs, outputs, strict=True)}
    return recorder.trace("a tree", metrics), runs, outputs
