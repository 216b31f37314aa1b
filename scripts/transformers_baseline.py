"""The baseline of `benchmark.py`: the same weights in transformers, on the CPU."""

import sys
import tempfile
import time
from typing import Any

import numpy as np

from apr_jax.models.checkpoint import load_decoder
from apr_jax.models.hf import export_hf


class Transformers:
    """The same weights in transformers, and how long its `generate` takes a decode step."""

    def __init__(self, directory: str):
        import torch
        import transformers

        self._torch = torch
        self.versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        transformers.logging.set_verbosity_error()
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa"
        )
        self._model = model.eval()
        self._model.generation_config.eos_token_id = None

    def decode_s(self, rows: np.ndarray, num_tokens: int, num_torch_threads: int) -> tuple[float, np.ndarray]:
        """Seconds for num_tokens - 1 decode steps of all rows [N, P] at once, and the tokens [N, num_tokens]."""
        torch = self._torch
        torch.set_num_threads(num_torch_threads)
        ids = torch.as_tensor(rows)

        def run(count: int):
            started = time.perf_counter()
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
            return time.perf_counter() - started, out[:, ids.shape[1] :].numpy()

        with torch.inference_mode():
            prompt_s, _ = run(1)
            total_s, tokens = run(num_tokens)
        return total_s - prompt_s, tokens


def load_baseline(checkpoint: str) -> Transformers | None:
    """The baseline; None, with a note, where transformers is not installed."""
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]  # transformers would take ours for another's
    with tempfile.TemporaryDirectory() as parent:
        directory = f"{parent}/hf"
        export_hf(directory, load_decoder(checkpoint, dtype="float32"))
        try:
            return Transformers(directory)
        except ImportError as error:
            print(f"no baseline: {error} (pip install -e '.[test]')", file=sys.stderr)
            return None
