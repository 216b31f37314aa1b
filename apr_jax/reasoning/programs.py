"""Programs by name."""

from apr_jax.config import check
from apr_jax.reasoning.grammar import GrammarProgram
from apr_jax.reasoning.grammars.multiverse import MULTIVERSE
from apr_jax.reasoning.program import Program
from apr_jax.reasoning.sequential import SequentialProgram
from apr_jax.tokenizers import Tokenizer

GRAMMARS = {grammar.name: grammar for grammar in (MULTIVERSE,)}
PROGRAM_NAMES = ("sequential", *GRAMMARS)


def make_program(name: str, tokenizer: Tokenizer) -> Program:
    """The program of that name, for a model with that tokenizer.

    Raises:
      ValueError: there is no such program, or the tokenizer cannot write its tags.
    """
    check(name in PROGRAM_NAMES, f"program {name!r} is not one of {', '.join(PROGRAM_NAMES)}")
    return GrammarProgram(GRAMMARS[name], tokenizer) if name in GRAMMARS else SequentialProgram()
