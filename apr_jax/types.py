"""Values that several layers speak of. Imports nothing of ours."""

import dataclasses
import math


class OutOfPages(RuntimeError):
    """The page pool cannot hold what was asked; nothing has changed.

    Attributes:
      needed: pages asked for.
      available: pages that could be had (free, or cached and evictable).
    """

    def __init__(self, needed: int, available: int, what: str = "the page pool"):
        super().__init__(f"{needed} pages needed, {available} available in {what}")
        self.needed = needed
        self.available = available


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one thread samples and when it stops.

    Attributes:
      temperature: 0 is greedy.
      top_k: 0 keeps all; top_p: 1 keeps all; min_p: 0 keeps all (relative to the most likely token).
      repetition_penalty: 1 is none; counts the thread's own context, prompt included.
      max_new_tokens: sampled tokens at most; 0 only prefills.
      stop_ids: token ids that stop the thread, kept as its last token; the model's own eos ids stop it too
        unless ignore_eos.
      stop: strings that stop the thread; the token in which one is complete is the thread's last, and those that
        went beyond are rolled back.
      seed: the request's random seed.
      logprobs: also return each sampled token's log-probability under the model (before temperature and filters).
      banned_ids: token ids never sampled.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    seed: int = 0
    logprobs: bool = False
    banned_ids: tuple[int, ...] = ()

    def __post_init__(self):
        def check(condition, message):
            if not condition:
                raise ValueError(message)

        check(
            self.temperature >= 0 and math.isfinite(self.temperature),
            f"temperature is {self.temperature}, must be >= 0 and finite",
        )
        check(self.top_k >= 0, f"top_k is {self.top_k}, must be >= 0 (0 keeps all)")
        check(0 < self.top_p <= 1, f"top_p is {self.top_p}, must be in (0, 1]")
        check(0 <= self.min_p <= 1, f"min_p is {self.min_p}, must be in [0, 1]")
        check(self.repetition_penalty > 0, f"repetition_penalty is {self.repetition_penalty}, must be > 0")
        check(self.max_new_tokens >= 0, f"max_new_tokens is {self.max_new_tokens}, must be >= 0")
        check(not isinstance(self.stop, str), f"stop is {self.stop!r}, must be a tuple of strings")
        check(all(self.stop), "stop holds an empty string")
        for name in ("stop_ids", "banned_ids"):
            check(min(getattr(self, name), default=0) >= 0, f"{name} is {getattr(self, name)}, ids must be >= 0")
