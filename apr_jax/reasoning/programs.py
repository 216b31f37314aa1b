"""Programs by name."""

import dataclasses

from apr_jax.config import check
from apr_jax.engine.thread import JoinMode
from apr_jax.reasoning.deciding import Deciding, When
from apr_jax.reasoning.grammar import GrammarProgram
from apr_jax.reasoning.grammars.apr import AprProgram
from apr_jax.reasoning.grammars.custom import load_grammar
from apr_jax.reasoning.grammars.multiverse import MULTIVERSE
from apr_jax.reasoning.grammars.npr import NPR
from apr_jax.reasoning.grammars.parallel_r1 import PARALLEL_R1
from apr_jax.reasoning.grammars.threadweaver import THREADWEAVER
from apr_jax.reasoning.program import Program
from apr_jax.reasoning.sequential import SequentialProgram
from apr_jax.reasoning.strategies.beam_search import BeamSearch, DiverseVerifierTreeSearch
from apr_jax.reasoning.strategies.best_of_n import BestOfN
from apr_jax.reasoning.strategies.options import StrategyOptions
from apr_jax.reasoning.strategies.self_consistency import SelfConsistency
from apr_jax.reasoning.strategies.skeleton_of_thought import SkeletonOfThought
from apr_jax.reasoning.strategies.strategy import Strategy
from apr_jax.reasoning.strategies.tree_of_thoughts import TreeOfThoughts
from apr_jax.tokenizers import Tokenizer

GRAMMARS = {grammar.name: grammar for grammar in (MULTIVERSE, NPR, THREADWEAVER, PARALLEL_R1)}
STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy
    for strategy in (
        SelfConsistency,
        BestOfN,
        TreeOfThoughts,
        BeamSearch,
        DiverseVerifierTreeSearch,
        SkeletonOfThought,
    )
}
PROGRAM_NAMES = ("sequential", *GRAMMARS, AprProgram.name, *STRATEGIES)


def make_program(
    name: str,
    tokenizer: Tokenizer,
    join: JoinMode | None = None,
    when: When | None = None,
    options: StrategyOptions = StrategyOptions(),  # noqa: B008 (frozen)
) -> Program:
    """The program of that name, for a model with that tokenizer.

    Args:
      name: one of PROGRAM_NAMES, or the path of a grammar's file, ending in `.toml`.
      join: how a grammar's threads are joined instead of its own way: `stitch`, `prefill` or `conclusion`.
      when: when a grammar's threads are joined, instead of once all have ended.
      options: of a strategy.

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
    check(
        when is None or grammar is not None or name == AprProgram.name,
        f"program {name!r} has no joins whose time could be chosen",
    )
    try:
        if name in STRATEGIES:
            return STRATEGIES[name](tokenizer, options)
        if grammar is None and name != AprProgram.name:
            return SequentialProgram()
        program = AprProgram(tokenizer) if grammar is None else GrammarProgram(grammar, tokenizer)
        return program if when is None else Deciding(program, when)
    except ValueError as error:
        raise ValueError(f"program {name!r} is not for this model's tokenizer: {error}") from error
