"""Random families for engine tests: each is a generator that says what its threads do, whatever runs beside it."""

import numpy as np

from apr_jax.engine.engine import EngineCore
from apr_jax.engine.thread import Status, Thread
from apr_jax.types import SamplingParams

MODES = ("stitch", "conclusion", "select", "prefill", "splice")


class Family:
    """One request that forks and joins at random. What it does depends on its seed alone."""

    def __init__(self, seed: int, vocab_size: int, greedy: bool):
        self.rng = np.random.default_rng(seed)
        self.seed = seed
        self.vocab_size = vocab_size
        self.greedy = greedy
        self.log: list[tuple] = []
        self.marks: dict[int, int] = {}  # thread id -> its number of tokens when it was last marked

    def ids(self, low: int, high: int) -> list[int]:
        return [int(i) for i in self.rng.integers(1, self.vocab_size, self.rng.integers(low, high))]

    def params(self, low: int = 1, high: int = 24) -> SamplingParams:
        rng = self.rng
        stops = tuple(int(i) for i in rng.integers(0, self.vocab_size, rng.integers(0, 4)))
        common = dict(max_new_tokens=int(rng.integers(low, high)), stop_ids=stops, seed=self.seed, ignore_eos=True)
        if self.greedy:
            return SamplingParams(**common)
        return SamplingParams(
            temperature=float(rng.choice([0.0, 0.7, 1.3])),
            top_k=int(rng.choice([0, 5])),
            top_p=float(rng.choice([1.0, 0.8])),
            min_p=float(rng.choice([0.0, 0.05])),
            repetition_penalty=float(rng.choice([1.0, 1.3])),
            **common,
        )

    def run(self, engine: EngineCore):
        """Yields the threads it waits for; records every thread's tokens."""
        shared = [7] * 24 if self.rng.random() < 0.5 else []  # some prompts share pages
        root = engine.submit(shared + self.ids(1, 40), sampling=self.params(0))
        yield [root]
        yield from self.grow(engine, root, depth=0)
        self.record(root)
        self.root = root
        engine.release(root)

    def grow(self, engine: EngineCore, thread: Thread, depth: int):
        for _ in range(int(self.rng.integers(0, 3 - depth))):
            fan_out = int(self.rng.integers(1, 5))
            headers = [self.ids(0 if self.rng.random() < 0.3 else 1, 5) for _ in range(fan_out)]
            mode = str(self.rng.choice(MODES))
            if mode == "splice" and all(headers) and self.rng.random() < 0.5:
                children = engine.spawn(thread, headers, sampling=[self.params() for _ in headers])
            else:
                children = engine.fork(thread, headers, sampling=[self.params() for _ in headers])
            yield children
            for child in children:
                if self.rng.random() < 0.3:
                    yield from self.grow(engine, child, depth + 1)
                if self.rng.random() < 0.3:
                    engine.mark(child)
                    self.marks[child.id] = len(child.token_ids)
                    engine.append(child, self.ids(1, 6), sampling=self.params())
                    yield [child]
                self.record(child)
            wanted = [c for c in children if self.rng.random() < 0.8]
            tokens = self.ids(1, 12)
            if mode == "select":
                wanted = [children[int(self.rng.integers(fan_out))]]
                # A child that was just sealed needs forced tokens.
                tokens = tokens if self.rng.random() < 0.5 or wanted[0].context.tail_len == 0 else []
            engine.join(thread, wanted, mode=mode, tokens=tokens, sampling=self.params())
            yield [thread]

    def record(self, thread: Thread) -> None:
        self.log.append((thread.path, tuple(thread.token_ids), tuple(thread.sampled), thread.stop.reason))


def drive(engine: EngineCore, families: list[Family], on_step=None, max_steps: int = 20_000) -> None:
    """Runs families side by side until all have ended."""
    running = {id(f): [f.run(engine), None] for f in families}
    for step in range(max_steps):
        for key, (generator, waits_for) in list(running.items()):
            while waits_for is None or all(t.status is Status.STOPPED for t in waits_for):
                try:
                    waits_for = next(generator)
                except StopIteration:
                    del running[key]
                    break
            else:
                running[key][1] = waits_for
        if not running:
            return
        engine.step()
        if on_step is not None:
            on_step(step)
    raise AssertionError(f"{len(running)} families are not done after {max_steps} steps")
