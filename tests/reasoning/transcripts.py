"""Engines whose threads say what a test writes down, one string a thread."""

import re
from typing import Any

from apr_jax.config import CacheConfig, EngineConfig, ModelConfig
from apr_jax.engine.thread import Thread
from apr_jax.reasoning.api import Engine
from apr_jax.reasoning.grammar import Grammar
from apr_jax.testing import byte_tokenizer, tiny_config
from apr_jax.testing.scripted import ScriptedRunner
from apr_jax.tokenizers import ByteTokenizer, Tokenizer


def scripted_engine(
    script,
    tokenizer: Tokenizer | None = None,
    *,
    model_config: ModelConfig | None = None,
    page_size: int = 4,
    num_pages: int = 512,
    **engine_fields: Any,
) -> Engine:
    """An engine whose next tokens a function says: script(thread, its own token ids so far) -> token id."""
    tokenizer = tokenizer or byte_tokenizer()
    return Engine(
        model_config or tiny_config(vocab_size=tokenizer.vocab_size),
        None,
        tokenizer,
        cache_config=CacheConfig(page_size=page_size, num_pages=num_pages),
        engine_config=EngineConfig(**engine_fields),
        runner=ScriptedRunner(script, EngineConfig(**engine_fields).steps_per_dispatch),
    )


def grammar_tokenizer(grammar: Grammar) -> ByteTokenizer:
    """Bytes, with every tag of a grammar as one token."""
    texts = (*grammar.block, grammar.plan, grammar.outline or "", grammar.trigger, grammar.header, grammar.closer)
    names = re.findall("</?([A-Za-z]+)>", "".join((*texts, grammar.after_join)))
    return ByteTokenizer([f"<{slash}{name}>" for name in dict.fromkeys(names) for slash in ("", "/")])


def path_name(thread: Thread) -> str:
    """Where a thread stands in the tree: "" for the root, "0.1" for its first fork's second child, ..."""
    return "/".join(f"{fork}.{ordinal}" for fork, ordinal in thread.path)


class Transcripts:
    """A script that lets each thread say one string, whatever was forced on it in between.

    Args:
      texts: what each thread samples in all, by `path_name`; then it says end-of-sequence for ever.
    """

    def __init__(self, tokenizer: Tokenizer, texts: dict[str, str]):
        self.ids = {name: tokenizer.encode(text, continuation=True) for name, text in texts.items()}
        self.eos_id = tokenizer.eos_ids[0]

    def __call__(self, thread: Thread, ids: list[int]) -> int:
        sampled = thread.num_sampled + len(ids) - len(thread.token_ids)
        said = self.ids[path_name(thread)]
        return said[sampled] if sampled < len(said) else self.eos_id


def assert_all_pages_free(engine: Engine) -> None:
    """Nothing holds a page once the prefix cache is flushed."""
    engine.cache.flush_prefix_cache()
    pool = engine.cache.pool
    assert pool.num_free == pool.total, f"{pool.total - pool.num_free} of {pool.total} pages are still held"
    assert not engine.scheduler.families
