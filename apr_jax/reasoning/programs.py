"""Programs by name."""

import dataclasses

from apr_jax.config import check
from apr_jax.engine.thread import JoinMode
from apr_jax.reasoning.grammar import GrammarProgram
from apr_jax.reasoning.grammars.apr import AprProgram
from apr_jax.reasoning.grammars.custom import load_grammar
from apr_jax.reasoning.grammars.multiverse import MULTIVERSE
from apr_jax.reasoning.grammars.npr import NPR
from apr_jax.reasoning.grammars.parallel_r1 import PARALLEL_R1
from apr_jax.reasoning.grammars.threadweaver import THREADWEAVER
from apr_jax.reasoning.program import Program
from apr_jax.reasoning.sequential import SequentialProgram
from apr_jax.tokenizers import Tokenizer

GRAMMARS = {grammar.name: grammar for grammar in (MULTIVERSE, NPR, THREADWEAVER, PARALLEL_R1)}
PROGRAM_NAMES = ("sequential", *GRAMMARS, AprProgram.name)


def make_program(name: str, tokenizer: Tokenizer, join: JoinMode | None = None) -> Program:
    """The program of that name, for a model with that tokenizer.

    Args:
      name: one of PROGRAM_NAMES, or the path of a grammar's file, ending in `.toml`.
      join: how a grammar's threads are joined instead of its own way: `stitch`, `prefill` or `conclusion`.

    Raises:
      ValueError: there is no such program or join, the file is no grammar, or the tokenizer cannot write its tags.
    """
    is_file = name.endswith(".toml")
    check(
        is_file or name in PROGRAM_NAMES,
        f"program {name!r} is not one of {', '.join(PROGRAM_NAMES)}, nor a path ending in .toml",
    )
    grammar = load_grammar(name) if is_file else GRAMMARS.get(name)
    if join is not None:
        check(grammar is not None, f"join is {join!r}, program {name!r} has no join to replace")
        assert grammar is not None
        grammar = dataclasses.replace(grammar, join=join)
    try:
        if grammar is not None:
            return GrammarProgram(grammar, tokenizer)
        return AprProgram(tokenizer) if name == AprProgram.name else SequentialProgram()
    except ValueError as error:
        raise ValueError(f"program {name!r} is not for this model's tokenizer: {error}") from error
