"""The Python interface: an engine with a model in it, and generation under a program."""

import dataclasses
import numbers
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import overload

from apr_jax.config import CacheConfig, EngineConfig, check
from apr_jax.engine.engine import EngineCore
from apr_jax.reasoning.driver import Driver
from apr_jax.reasoning.output import GenerateError, Output, collect
from apr_jax.reasoning.program import Guards, Parallelism, Program, Request
from apr_jax.reasoning.programs import make_program
from apr_jax.reasoning.run import Run
from apr_jax.types import SamplingParams

Prompt = str | Sequence[int]


class Engine(EngineCore):
    """A model that reasons in threads: `generate` under a program, or the primitives of `EngineCore` by
    hand.
    """

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        engine_config: EngineConfig | None = None,
        cache_config: CacheConfig | None = None,
        dtype: str | None = None,
    ) -> "Engine":
        """Loads a model.

        Args:
          path: "countdown" (the embedded model), a checkpoint directory, or a Hugging Face directory.
          engine_config: its dtype is replaced by the model's.
          dtype: of weights, computation and cache; None keeps the stored one.

        Raises:
          ValueError: there is no such checkpoint, or it is damaged.
        """
        from apr_jax.models.checkpoint import load_checkpoint

        model_config, decoder, tokenizer = load_checkpoint(
            path, dtype=dtype, tensor=(engine_config or EngineConfig()).tensor
        )
        config = dataclasses.replace(engine_config or EngineConfig(), dtype=str(decoder.dtype))
        return cls(
            model_config,
            decoder,
            tokenizer,
            cache_config=cache_config or CacheConfig(),
            engine_config=config,
        )

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; text gets the token that begins one, if the tokenizer has any and the text does not
        begin with it, as a rendered chat template may. Ids stay as they are.

        Raises:
          ValueError: it is empty, or part of the text has no token.
        """
        check(len(prompt) > 0, "the prompt is empty: at least 1 token is needed")
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        bos_id, ids = self.tokenizer.bos_id, self.tokenizer.encode(prompt)
        return ids if bos_id is None or ids[:1] == [bos_id] else [bos_id, *ids]

    def make_program(self, program: str | Program) -> Program:
        """The program of that name for this model's tokenizer; a program stays as it is."""
        return make_program(program, self.tokenizer) if isinstance(program, str) else program

    def collect(self, run: Run, extract_answer: Callable[[str], str | None] | None = None) -> Output:
        """The output of a request that a driver has ended."""
        return collect(run, self.tokenizer, self.model_config.eos_ids, extract_answer)

    @overload
    def generate(
        self,
        prompt: Prompt,
        program: str | Program = "sequential",
        *,
        sampling: SamplingParams = ...,
        guards: Guards = ...,
        parallelism: Parallelism = ...,
        extract_answer: Callable[[str], str | None] | None = None,
    ) -> Output: ...

    @overload
    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        program: str | Program = "sequential",
        *,
        sampling: SamplingParams = ...,
        guards: Guards = ...,
        parallelism: Parallelism = ...,
        num_samples: int = ...,
        extract_answer: Callable[[str], str | None] | None = None,
    ) -> list[Output]: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        program: str | Program = "sequential",
        *,
        sampling: SamplingParams = SamplingParams(),  # noqa: B008 (frozen)
        guards: Guards = Guards(),  # noqa: B008 (frozen)
        parallelism: Parallelism = "on",
        num_samples: int = 1,
        extract_answer: Callable[[str], str | None] | None = None,
    ) -> Output | list[Output]:
        """Answers a prompt, or several side by side.

        Args:
          prompt: text or token ids; a list of these gives a list of outputs.
          program: a name of PROGRAM_NAMES, the path of a grammar's file.toml, or any Program.
          sampling: `max_new_tokens` bounds the critical path (see `Request`).
          parallelism: whether the model may fork: "on", "off", or "auto", if the engine is not busy (see `Request`).
          num_samples: outputs a prompt, with seeds `sampling.seed`, `sampling.seed` + 1, ...; more than one
            gives a list, the samples of a prompt next to each other.
          extract_answer: from an output's text to its answer; without one the answer is what follows the last
            parallel block.

        Raises:
          ValueError: a prompt is empty, longer than the context window or can never fit the cache, or there
            is no such program. Nothing has run then.
          GenerateError: of several outputs some failed; it holds them all. (Of a single one the error itself is
            raised.)
        """
        check(num_samples >= 1, f"num_samples is {num_samples}, must be >= 1")
        prompts: list[Prompt] = [prompt] if _is_one(prompt) else list(prompt)  # type: ignore[list-item]
        chosen = self.make_program(program)
        requests = [
            Request(
                token_ids=self.encode_prompt(each),
                sampling=dataclasses.replace(sampling, seed=sampling.seed + sample),
                guards=guards,
                parallelism=parallelism,
            )
            for each in prompts
            for sample in range(num_samples)
        ]
        with Driver(self) as driver:
            runs = [driver.submit(request, chosen) for request in requests]
            driver.run()
        outputs = [self.collect(run, extract_answer) for run in runs]
        is_single = _is_one(prompt) and num_samples == 1
        errors = {place: run.error for place, run in enumerate(runs) if run.error is not None}
        for error in errors.values():
            if is_single:
                raise error
            raise GenerateError(outputs, errors) from error
        return outputs[0] if is_single else outputs


def _is_one(prompt: "Prompt | Sequence[Prompt]") -> bool:
    return isinstance(prompt, str) or len(prompt) == 0 or isinstance(prompt[0], numbers.Integral)
