"""A runner without a model: a Python function says each thread's next token. For tests of what is built on top."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from apr_jax.engine.batch import PADDING_ID, DecodeBatch, DecodeResult, PrefillBatch
from apr_jax.engine.thread import Thread

# script(thread, its own token ids so far, forced and sampled) -> the next token id
Script = Callable[[Thread, list[int]], int]


class ScriptedRunner:
    """Follows the engine's protocol step by step, as the compiled loop does, with tokens from a script.

    Args:
      script: called once for each sampled token. Where that is banned, the next smaller id is said that is not.
      steps_per_dispatch: the engine's.
    """

    def __init__(self, script: Script, steps_per_dispatch: int = 16):
        self.script = script
        self.steps_per_dispatch = steps_per_dispatch
        self.num_compiles = 0

    def prefill(self, batch: PrefillBatch) -> None:
        """Nothing to compute."""

    def decode(self, batch: DecodeBatch) -> DecodeResult:
        num_rows = len(batch.capacity)
        tokens = np.full((num_rows, self.steps_per_dispatch), PADDING_ID, np.int32)
        num_fed = np.zeros(num_rows, np.int32)
        for row, thread in enumerate(batch.threads):
            num_fed[row] = self._run_row(batch, row, thread, tokens[row])
        return DecodeResult(tokens=tokens, logprobs=np.zeros(tokens.shape, np.float32), num_fed=num_fed)

    def _run_row(self, batch: DecodeBatch, row: int, thread: Thread, sampled: np.ndarray) -> int:
        ids, budget, fed, draining = list(thread.token_ids), int(batch.budget[row]), 0, False
        for step in range(min(self.steps_per_dispatch, int(batch.capacity[row]))):
            fed += 1
            if fed < batch.num_forced[row]:
                continue
            if draining or budget == 0:
                break
            token = _allowed(int(self.script(thread, ids)), batch.banned_ids[row])
            ids.append(token)
            sampled[step] = token
            budget -= 1
            stop = np.flatnonzero(batch.stop_ids[row] == token)
            draining = len(stop) > 0 and bool(batch.drain[row][stop].any())
            if (len(stop) > 0 or budget == 0) and not draining:
                break
        return fed

    def read_pages(self, page_ids: Sequence[int]) -> Any:
        return list(page_ids)

    def write_pages(self, page_ids: Sequence[int], data: Any) -> None:
        """Nothing to copy."""


def _allowed(token: int, banned_ids: np.ndarray) -> int:
    banned = set(banned_ids.tolist())
    below = (i for i in range(token, -1, -1) if i not in banned)
    return next(below, max(banned) + 1)
