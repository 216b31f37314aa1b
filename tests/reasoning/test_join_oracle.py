"""Every grammar's fork and join against one dense forward pass over the whole tree, mask and positions explicit.

A random model never writes a tag, so a script says what is sampled; what the model would have said at every place is
noted, and must be the dense pass's argmax there.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_apr
import test_npr
import test_threadweaver
from transcripts import Transcripts, grammar_tokenizer

from apr_jax.config import CacheConfig, EngineConfig
from apr_jax.engine.batch import PADDING_ID
from apr_jax.engine.runner import Runner
from apr_jax.models.dense import dense_logits
from apr_jax.reasoning.api import Engine
from apr_jax.reasoning.driver import Driver
from apr_jax.reasoning.grammar import GrammarProgram
from apr_jax.reasoning.program import Request
from apr_jax.reasoning.programs import GRAMMARS, make_program
from apr_jax.testing import tiny_config, tiny_decoder
from apr_jax.testing.replay import Replay
from apr_jax.tokenizers import ByteTokenizer
from apr_jax.types import SamplingParams

MV_PLAN = "<Parallel><Goal><Outline>1: add</Outline><Outline>2: multiply</Outline></Goal>"
MV_TEXTS = {
    "": f"so {MV_PLAN} both</Conclusion></Parallel> and {MV_PLAN} again</Conclusion></Parallel> 7",
    "0.0": f" then {MV_PLAN} inner</Conclusion> =>7 it is</Path>",
    "0.0/0.0": " deep</Path>",
    "0.0/0.1": " deeper =>8</Path>",
    "0.1": " a longer path that has no conclusion</Path>",
    "1.0": " x =>y</Path>",
    "1.1": " z =>w</Path>",
}
FLAT_TEXTS = {"": "Hm. <Parallel> both</Summary> then <Parallel>!</Summary> 7", "0.0": "3 + 4 = 7</Path>"}
FLAT_TEXTS |= {"0.1": "3 * 4 = 12, no</Path>", "1.0": "</Path>", "1.1": "long one</Path>"}
TW_TEXTS = test_threadweaver.TEXTS | {"": test_threadweaver.TEXTS[""] + test_threadweaver.PLAN + "end"}
TW_TEXTS |= {"1.0": "a</Thread>", "1.1": "bb</Thread>"}
APR_PROMPT = "Moving to Node #0\nCurrent State: 9:[1, 2], Operations: []"
APR_TEXTS = test_apr.TEXTS | {
    "": "\nGenerated Node #0,0: 9:[3] Operation: 1+2=3\nGenerated Node #0,1: 9:[2] Operation: 1*2=2\n"
    "<Calling Sub Searches>so<Sub Searches> 7",
    "0.0/0.0": "\n3,9 unequal",
    "0.0/0.1": " Goal Reached\na path: Goal Reached",
    "1.0": "\n<Start Sub Search 0 at level 1> Moving to Node #0,1\n<End Calling Sub Searches>",
    "1.0/0.0": "\nno",
}


def concluding(name: str, texts: dict[str, str]) -> dict[str, str]:
    """The texts, every first child with a conclusion of its own."""
    closer = GRAMMARS[name].closer
    return {path: text.replace(closer, f" =>so{closer}") if path[-2:] == ".0" else text for path, text in texts.items()}


TEXTS = {
    "multiverse": MV_TEXTS,
    "npr": concluding("npr", test_npr.TEXTS),
    "threadweaver": concluding("threadweaver", TW_TEXTS),
    "parallel_r1": concluding("parallel_r1", FLAT_TEXTS),
    "apr": APR_TEXTS,
}
PIECES = [piece for grammar in GRAMMARS.values() for piece in grammar_tokenizer(grammar).special_pieces]
ONE, SEVERAL = ByteTokenizer(tuple(dict.fromkeys([*PIECES, *test_apr.TAGS]))), ByteTokenizer()
MODEL = tiny_config(vocab_size=ONE.vocab_size, max_position=2048)
CACHE = CacheConfig(page_size=8, num_pages=400)
ENGINE = EngineConfig(dtype="float64", max_threads=8, steps_per_dispatch=1, prefill_chunk=32, max_tail_pages=2)
PADDED = 1280


class TaughtRunner:
    """A runner whose model computes, and whose tokens a script says; one step a dispatch.

    Attributes:
      said: what the model would have said, by (thread id, index in its tokens).
    """

    def __init__(self, runner: Runner, script):
        self.runner, self.script = runner, script
        self.said: dict[tuple[int, int], int] = {}

    def __getattr__(self, name):
        return getattr(self.runner, name)

    def decode(self, batch):
        result = self.runner.decode(batch)
        tokens = np.array(result.tokens)
        for row, thread in enumerate(batch.threads):
            if tokens[row, 0] != PADDING_ID:
                self.said[thread.id, len(thread.token_ids)] = int(tokens[row, 0])
                tokens[row, 0] = self.script(thread, list(thread.token_ids))
        return dataclasses.replace(result, tokens=tokens)


@pytest.fixture(scope="module")
def compiled():
    """One model for all cases: its runner, which compiles once, and its dense pass."""
    with jax.enable_x64(True):
        decoder = tiny_decoder(MODEL, 3, jnp.float64)
        forward = jax.jit(lambda *arrays: dense_logits(decoder, *arrays).argmax(-1))
        yield decoder, Runner(MODEL, decoder, CACHE, ENGINE), forward


CASES = [(name, None, ONE) for name in TEXTS]
CASES += [
    (name, join, ONE)
    for name, grammar in GRAMMARS.items()
    for join in ("stitch", "prefill", "conclusion")
    if join != grammar.join
]
CASES += [("threadweaver", None, SEVERAL), ("apr", None, SEVERAL)]


@pytest.mark.slow
@pytest.mark.parametrize("name, join, tokenizer", CASES)
def test_what_the_model_says_is_the_dense_argmax(name, join, tokenizer, compiled):
    decoder, plain_runner, forward = compiled
    runner = TaughtRunner(plain_runner, Transcripts(tokenizer, TEXTS[name]))
    engine = Engine(MODEL, decoder, tokenizer, cache_config=CACHE, engine_config=ENGINE, runner=runner)
    marks: dict[int, int] = {}
    core_mark = engine.mark
    engine.mark = lambda thread: (marks.update({thread.id: len(thread.token_ids)}), core_mark(thread))
    program = make_program(name, tokenizer, join)
    if isinstance(program, GrammarProgram):  # the model's own choice is its argmax, also where a format samples
        program.grammar = dataclasses.replace(program.grammar, child_sampling={})
    prompt = engine.encode_prompt(APR_PROMPT if name == "apr" else "Question?")
    with Driver(engine) as driver:
        run = driver.submit(Request(token_ids=prompt, sampling=SamplingParams(max_new_tokens=1500)), program)
        driver.run()
    assert run.error is None and run.finish_reason == "eos" and not run.root.children
    replay = Replay(marks)
    replay.thread(run.root, [], 0)
    best = np.asarray(forward(*replay.arrays(PADDED)))
    assert len(replay.sampled) > 40 and bool(marks) is (join == "conclusion")
    for (entry, _), place in zip(replay.sampled, replay.places, strict=True):
        assert best[entry] == runner.said[place], f"thread {place[0]}, token {place[1]}"
