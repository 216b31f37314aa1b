"""Engines with threads that say what a script says, and what tests ask of them."""

from apr_jax.config import CacheConfig, EngineConfig
from apr_jax.engine import events
from apr_jax.engine.engine import EngineCore
from apr_jax.engine.thread import Thread
from apr_jax.testing import byte_tokenizer, tiny_config
from apr_jax.testing.scripted import ScriptedRunner
from apr_jax.types import SamplingParams


def make_engine(
    *,
    max_position: int = 1024,
    page_size: int = 4,
    num_pages: int = 200,
    prefix_cache: bool = True,
    **fields,
) -> EngineCore:
    config = EngineConfig(**fields)
    return EngineCore(
        tiny_config(max_position=max_position),
        None,
        byte_tokenizer(),
        cache_config=CacheConfig(page_size=page_size, num_pages=num_pages, prefix_cache=prefix_cache),
        engine_config=config,
        runner=ScriptedRunner(lambda thread, ids: 97 + len(ids) % 20, config.steps_per_dispatch),
    )


def up_to(count: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, ignore_eos=True)


def stopped_root(engine: EngineCore, prompt=(1, 2, 3), count: int = 4) -> Thread:
    root = engine.submit(prompt, sampling=up_to(count))
    engine.run()
    return root


def held(thread: Thread) -> list[int]:
    return [token for segment in thread.context.segments for token in segment.token_ids] + thread.pending


def assert_clean(engine: EngineCore) -> None:
    for family in list(engine.scheduler.families.values()):
        engine.cancel(family.root)
    engine.cache.flush_prefix_cache()
    engine.cache.check()
    assert engine.cache.pool.num_free == engine.cache.pool.total


def preempted(engine: EngineCore, family) -> list[events.PreemptEvent]:
    """Collects, from now on, the events in which this family gives up its pages."""
    found: list[events.PreemptEvent] = []

    def note(event):
        if isinstance(event, events.PreemptEvent) and event.family_id == family.id and not event.resumed:
            found.append(event)

    engine.listeners.append(note)
    return found
