"""Held-out figures from decoding: the model under training in the engine, greedy, every program it was trained for."""

from collections.abc import Callable, Sequence
from typing import Any

from apr_jax.models.decoder import Decoder
from apr_jax.reasoning.api import Engine
from apr_jax.reasoning.output import GenerateError
from apr_jax.tasks.task import Task
from apr_jax.tokenizers import Tokenizer
from apr_jax.types import SamplingParams


def decoded(
    task: Task,
    problems: Sequence[Any],
    tokenizer: Tokenizer,
    *,
    programs: Sequence[str],
    max_new_tokens: int = 1600,
) -> Callable[[Decoder], dict[str, float]]:
    """An evaluation that solves problems with the engine.

    Returns:
      decoder -> per program: decoded accuracy, share of well-formed texts, mean tokens and critical path.
    """
    sampling = SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens)
    engines: list[Engine] = []  # one, made at the first call: its programs compile once

    def evaluate(decoder: Decoder) -> dict[str, float]:
        if engines:
            engines[0].runner.update_params(decoder)
            engines[0].cache.flush_prefix_cache()
        else:
            engines.append(Engine(decoder.config, decoder, tokenizer))
        engine = engines[0]
        figures: dict[str, float] = {}
        for program in programs:
            prompts = [task.prompt(problem, program) for problem in problems]
            try:
                outputs = engine.generate(prompts, program, sampling=sampling)
            except GenerateError as error:  # a model in the making may write anything: what failed is not right
                outputs = error.outputs
            assert isinstance(outputs, list)
            verdicts = [task.check(p, output.text) for p, output in zip(problems, outputs, strict=True)]
            means = {
                "accuracy": [verdict.correct for verdict in verdicts],
                "well_formed": [task.well_formed(output.text) for output in outputs],
                "total_tokens": [output.metrics.total_tokens for output in outputs],
                "critical_path_tokens": [output.metrics.critical_path_tokens for output in outputs],
            }
            for name, values in means.items():
                figures[f"decoded/{program}/{name}"] = round(sum(values) / len(values), 4)
        return figures

    return evaluate
